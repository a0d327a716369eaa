"""Start the same training again and again: each start is an *attempt*, forked from this process or by the real launcher.

An attempt is one or several sessions of processes: all that belongs to it can be found, whoever its parents are by now.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from launch import forked, pretrain
from vitscale.base.host import Entry, of_sessions, process_table

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = "deepspeed.launcher.launch"
"""The process of the `deepspeed` launcher whose children are the ranks of a node."""


class Attempt(Protocol):
    """One start of the command."""

    @property
    def sessions(self) -> list[int]: ...

    @property
    def port(self) -> int: ...

    def ranks(self) -> dict[int, int]:
        """The pid of each rank that is there, by rank."""
        ...

    def codes(self) -> list[int] | None:
        """Exit codes of what was started; None while any of it runs."""
        ...


Start = Callable[[Path, Path, dict[str, str]], Attempt]
"""(run directory, file for what is said, more environment) to an attempt."""


@dataclass(frozen=True)
class _Forked:
    program: forked.Program

    @property
    def sessions(self) -> list[int]:
        return self.program.pids

    @property
    def port(self) -> int:
        return self.program.port

    def ranks(self) -> dict[int, int]:
        self.program.has_ended()
        return {rank: pid for rank, pid in enumerate(self.program.pids) if pid not in self.program.codes}

    def codes(self) -> list[int] | None:
        return list(self.program.codes.values()) if self.program.has_ended() else None


@dataclass(frozen=True)
class _Launched:
    runner: subprocess.Popen[bytes]
    port: int

    @property
    def sessions(self) -> list[int]:
        return [self.runner.pid]

    def ranks(self) -> dict[int, int]:
        processes = of_sessions(self.sessions)
        nodes = {process.pid for process in processes if LAUNCHER in process.argv}
        return {
            int(environment["RANK"]): process.pid
            for process in processes
            if process.parent in nodes and "RANK" in (environment := process.environment)
        }

    def codes(self) -> list[int] | None:
        code = self.runner.poll()
        return None if code is None else [code]


def forking(world: int, arguments: list[str]) -> Start:
    """Attempts whose ranks are forked from this process."""

    def start(run: Path, said: Path, env: dict[str, str]) -> Attempt:
        return _Forked(forked.start(pretrain.main, "--run", run, *arguments, said=said, world=world, env=env))

    return start


def launching(world: int, arguments: list[str]) -> Start:
    """Attempts by `deepspeed --num_gpus WORLD launch/pretrain.py`."""

    def start(run: Path, said: Path, env: dict[str, str]) -> Attempt:
        port = forked.free_port()
        runner = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(world), "--master_port", str(port)]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with open(said, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, *runner, str(ROOT / "launch" / "pretrain.py"), "--run", str(run), *arguments],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(forked.end_with, os.getpid()),  # ranks in turn leave when their launcher is gone
            )
        return _Launched(process, port)

    return start


def has_ended(attempt: Attempt) -> bool:
    """Whether what was started has ended. Its children may take a moment more."""
    return attempt.codes() is not None


def workers_of(rank_pid: int) -> list[int]:
    """The data workers of a rank: children that were forked from it and run nothing else."""
    table = process_table()
    own = [process.argv for process in table if process.pid == rank_pid]
    return sorted(process.pid for process in table if process.parent == rank_pid and process.argv in own)


def kill_all(attempt: Attempt) -> list[Entry]:
    """SIGKILL to every process of the attempt; what was hit. A launcher first: it must not start or say anything more."""
    hit = sorted(of_sessions(attempt.sessions), key=lambda process: process.pid)
    for process in hit:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return hit
