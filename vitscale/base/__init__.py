"""The ground every package stands on: errors and exit codes, atomic files, cluster, fault points, progress."""
