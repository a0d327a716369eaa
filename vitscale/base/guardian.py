"""A small process beside a rank that kills it when it gives no sign of life: `python guardian.py PID SECONDS SENTENCE`.

A rank that is stopped (SIGSTOP), or whose interpreter is held by native code, cannot end itself; alone on its host nobody else
would, and its launcher would wait for ever. The rank writes to the standard input of this script, which ends quietly when that
is closed. Seconds are counted by looking, so that a guardian stopped together with its rank forgives both.
"""

import os
import select
import signal
import sys

SIGN_OF_LIFE, FAREWELL = b".", b"q"
"""A rank that goes on says farewell: its data workers, forked from it, hold the pipe open too."""
DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""They reach every process of a terminal or a job; the guardian ends with its rank."""


def guard(rank_pid: int, patience_s: float, sentence: str) -> None:
    """Return when the rank has said farewell or ended; kill it when it is silent for longer than its guardian is patient."""
    silent_s = 0.0
    while silent_s < patience_s:
        look_s = min(1.0, patience_s / 10)
        ready, _, _ = select.select([0], [], [], look_s)
        silent_s = 0.0 if ready else silent_s + look_s
        if ready and ((said := os.read(0, 4096)) == b"" or FAREWELL in said):
            return
    if os.getppid() == rank_pid:  # else it is gone, and another process may have its number
        os.write(2, f"{sentence}\n".encode())
        os.kill(rank_pid, signal.SIGKILL)


if __name__ == "__main__":
    for number in DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    guard(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
