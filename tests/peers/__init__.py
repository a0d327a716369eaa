"""Other libraries read what we write."""
