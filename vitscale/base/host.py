"""The processes of this host, as /proc shows them: which still live, and who started whom.

A pid alone is no name: after the end of a process, or after a reboot, another one may carry it. What stays apart is the
pid with the time at which the process began, inside one boot and one namespace of pids. Without /proc (no Linux) nothing
is known: `process_of` gives None.
"""

import os
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process, not to be taken for a later one of the same pid."""

    pid: int
    started_ticks: int
    """Clock ticks from the boot to its start: field 22 of /proc/PID/stat."""


@dataclass(frozen=True, kw_only=True)
class Ancestor:
    """A process above another one, with its command line."""

    process: Process
    argv: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the process table."""

    process: Process
    state: str
    """A letter of proc(5): R runs, S sleeps, T is stopped, Z has ended and was not waited for."""
    parent: int
    session: int

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def argv(self) -> tuple[str, ...]:
        """Its command line, read now; empty when it is gone."""
        return _argv_of(self.pid)

    @property
    def environment(self) -> dict[str, str]:
        """What it was started with, read now; empty when it is gone."""
        try:
            words = (PROC / str(self.pid) / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            return {}
        return dict(word.split("=", 1) for word in words if "=" in word)


def host_id() -> tuple[str, str, str]:
    """Name, boot and pid namespace of this host: where all three are equal, a pid means the same process."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink(PROC / "self/ns/pid")
    except OSError:
        boot = namespace = ""
    return socket.gethostname(), boot, namespace


def process_of(pid: int) -> Process | None:
    """The process that has this pid now; None where there is none."""
    stat = _stat_of(pid)
    return stat.process if stat else None


def is_alive(process: Process) -> bool:
    """Whether this very process still runs; one that has ended and was not waited for yet does not."""
    stat = _stat_of(process.pid)
    return stat is not None and stat.process == process and stat.state not in "ZX"


def is_stopped(process: Process) -> bool:
    """Whether SIGSTOP or a debugger holds it."""
    stat = _stat_of(process.pid)
    return stat is not None and stat.process == process and stat.state in "Tt"


def ancestors(pid: int) -> list[Ancestor]:
    """Parent, grandparent and so on of a process, up to the first one of this pid namespace."""
    found: list[Ancestor] = []
    stat = _stat_of(pid)
    while stat is not None and (above := _stat_of(stat.parent)) is not None:
        found.append(Ancestor(process=above.process, argv=_argv_of(above.process.pid)))
        stat = above
    return found


def descendants(pid: int) -> list[Process]:
    """Children, their children and so on of a process: all that live, parents before children."""
    below: dict[int, list[Entry]] = {}
    for entry in _entries():
        below.setdefault(entry.parent, []).append(entry)
    found, parents = [], [pid]
    for parent in parents:
        parents += [entry.pid for entry in below.get(parent, [])]
        found += [entry.process for entry in below.get(parent, []) if entry.state not in "ZX"]
    return found


def process_table() -> list[Entry]:
    """All processes of this pid namespace that have not ended."""
    return [entry for entry in _entries() if entry.state not in "ZX"]


def of_sessions(sessions: Collection[int]) -> list[Entry]:
    """The processes of some sessions."""
    return [entry for entry in process_table() if entry.session in sessions]


def bytes_of_its_own(pid: int) -> int:
    """Memory of a process that is in RAM and belongs to no file; 0 when it is gone. What a leak would add to.

    Pages of files, such as libraries, come and go as the system likes.
    """
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
    except OSError:
        return 0
    sizes = dict(line.split(":", 1) for line in lines)
    return 1024 * sum(int(sizes[name].split()[0]) for name in ("RssAnon", "RssShmem") if name in sizes)


def seconds_since_start(process: Process) -> float:
    """How long ago a process began."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - process.started_ticks / TICKS_PER_S


def _entries() -> list[Entry]:
    names = os.listdir(PROC) if PROC.is_dir() else []
    return [entry for name in names if name.isdecimal() and (entry := _stat_of(int(name))) is not None]


def _stat_of(pid: int) -> Entry | None:
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (OSError, ValueError):
        return None
    fields = text[text.rindex(")") + 1 :].split()  # the name before it may hold anything
    process = Process(pid=pid, started_ticks=int(fields[19]))
    return Entry(process=process, state=fields[0], parent=int(fields[1]), session=int(fields[3]))


def _argv_of(pid: int) -> tuple[str, ...]:
    try:
        content = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(word.decode(errors="replace") for word in content.rstrip(b"\0").split(b"\0"))
