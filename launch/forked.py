"""Start our scripts as a user does, but forked from this process, which has torch and deepspeed loaded: 1 s instead of 10.

A rank is a session of its own, so that whatever it leaves behind can be found, and it ends with the process that forked it.
Fork from the main thread, and with one torch thread: a pool of OpenMP threads does not survive the fork.
"""

import ctypes
import gc
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import vitscale.training.engine  # noqa: F401  (before DeepSpeed itself: it says which accelerator there is)
from vitscale.base.cluster import Cluster
from vitscale.base.errors import run_main

# What torch's first optimizer would else import in every rank: seconds of it.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch._dynamo  # noqa: F401

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cluster_of(rank: int, world: int, port: int) -> Cluster:
    """The place of one of `world` ranks on this machine."""
    return Cluster(
        rank=rank,
        world=world,
        local_rank=rank,
        local_world=world,
        master_addr="127.0.0.1",
        master_port=port,
        launcher="test",
        host="test",
    )


@dataclass
class Program:
    """One started script: a process per rank, one file with everything they said."""

    pids: list[int]
    said: Path
    port: int = 0
    codes: dict[int, int] = field(default_factory=dict)
    """Exit codes of those that have ended, by pid; a process ended by a signal gives its negative number."""

    def has_ended(self) -> bool:
        """Whether every rank has, by now."""
        for pid in self.running:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return not self.running

    def wait(self, timeout_s: float = 240.0) -> list[int]:
        """Exit codes in rank order. Raises TimeoutError, after killing what runs, when one has not ended in time."""
        deadline_s = time.monotonic() + timeout_s
        while not self.has_ended():
            if time.monotonic() > deadline_s:
                self.kill()
                raise TimeoutError(f"still running after {timeout_s} s:\n{self.text}")
            time.sleep(0.01)
        return [self.codes[pid] for pid in self.pids]

    def kill(self) -> None:
        """SIGKILL to every rank, as losing the machine would do."""
        for pid in self.running:
            os.kill(pid, signal.SIGKILL)

    @property
    def running(self) -> list[int]:
        return [pid for pid in self.pids if pid not in self.codes]

    @property
    def text(self) -> str:
        return self.said.read_text()


def start(
    main: Callable[[], None],
    *arguments: str | Path,
    said: Path,
    world: int = 1,
    env: dict[str, str] | None = None,
    cores: int | None = None,
) -> Program:
    """Start `main` of a script of launch/ with `world` ranks, each on its first `cores` cores if given; returns at once."""
    port = free_port()
    said.parent.mkdir(parents=True, exist_ok=True)
    said.write_text("")
    pids = []
    for rank in range(world):
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                _become_rank(parent, said)
                sys.argv = [f"{main.__module__.replace('.', '/')}.py", *map(str, arguments)]
                if world > 1:
                    os.environ.update(cluster_of(rank, world, port).environment())
                os.environ.update(env or {})
                tempfile.tempdir = None  # asked for anew: TMPDIR may have changed
                if cores is not None:
                    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
                run_main(main)
                os._exit(0)
            except SystemExit as leave:
                os._exit(leave.code if isinstance(leave.code, int) else int(leave.code is not None))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        pids.append(pid)
    return Program(pids=pids, said=said, port=port)


def end_with(parent: int) -> None:
    """Let this process be killed when its parent ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(1)


def _become_rank(parent: int, said: Path) -> None:
    os.setsid()
    end_with(parent)
    gc.freeze()  # DeepSpeed collects garbage often, and each time every page that the fork shares would be copied
    output = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # Kept open when these objects go: a rank may itself fork ranks.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
