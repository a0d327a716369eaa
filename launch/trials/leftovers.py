"""What a run could leave behind on a Linux machine: processes, shared memory, a port, temporary files."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Collection
from pathlib import Path

from vitscale.base.host import Entry, of_sessions, process_table

SHARED_MEMORY = Path("/dev/shm")
GRACE_S = 5.0
"""Data workers end with their rank, a moment after it."""
_LISTEN = "0A"  # include/net/tcp_states.h
_TEMPORARY = re.compile(r"\..*\.tmp-[0-9a-f]+$|.*\.partial$|\.nonce$")


def end_sessions(sessions: Collection[int]) -> list[Entry]:
    """Wait a moment for the processes of some sessions to end; what is then left is killed and returned."""
    give_up_at_s = time.monotonic() + GRACE_S
    while left := of_sessions(sessions):
        if time.monotonic() > give_up_at_s:
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            return left
        time.sleep(0.02)
    return []


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    return set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()


def forsaken(names: Collection[str]) -> list[str]:
    """Those names in /dev/shm that belong to this user and that, also after a moment, no process has open or mapped.

    Other programs use this directory too, and their helpers clean up behind them when they have ended.
    """
    give_up_at_s = time.monotonic() + GRACE_S
    while left := _held_by_none(names):
        if time.monotonic() > give_up_at_s:
            return left
        time.sleep(0.1)
    return []


def _held_by_none(names: Collection[str]) -> list[str]:
    places = {str(SHARED_MEMORY / name) for name in names}
    held: set[str] = set()
    for process in process_table() if places else ():
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            held |= {place for place in places if place in maps}
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    held.add(os.readlink(descriptor))
    return sorted(place for place in places - held if _is_mine(Path(place)))


def _is_mine(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except OSError:
        return False


def stays_taken(port: int) -> bool:
    """Whether a process of this machine still listens on this TCP port after a moment.

    Of a killed process the first thread may be gone, and it counts as ended, while another still closes its sockets.
    """
    give_up_at_s = time.monotonic() + GRACE_S
    while has_listener(port):
        if time.monotonic() > give_up_at_s:
            return True
        time.sleep(0.02)
    return False


def has_listener(port: int) -> bool:
    """Whether a process of this machine listens on this TCP port now."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state = line.split()[:4]
                if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                    return True
    return False


def temporary_files(run: Path) -> list[str]:
    """What in a run directory is there only while something is being written."""
    return sorted(str(path) for path in run.rglob("*") if _TEMPORARY.match(path.name))
