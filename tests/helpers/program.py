"""Run our scripts as a user does, but forked from a process that has torch and deepspeed loaded: starts take no time."""

import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.ranks import cluster_of, free_port, load_before_forking
from vitscale.base.errors import run_main
from vitscale.training.metrics import read_lines

# Loaded before the fork.
for script in ("pretrain", "finetune", "evaluate", "export", "attention", "build_shards", "inspect_shards", "bench"):
    importlib.import_module(f"launch.{script}")


@dataclass
class Program:
    """One started script: a process per rank, one file with everything they said."""

    pids: list[int]
    said: Path

    def wait(self, timeout_s: float = 240.0) -> list[int]:
        """Exit codes in rank order; a process ended by a signal gives its negative number."""
        codes = []
        deadline_s = time.monotonic() + timeout_s
        for pid in self.pids:
            while True:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes.append(os.waitstatus_to_exitcode(status))
                    break
                if time.monotonic() > deadline_s:
                    self.kill()
                    raise TimeoutError(f"still running after {timeout_s} s:\n{self.said.read_text()}")
                time.sleep(0.01)
        return codes

    def kill(self) -> None:
        """SIGKILL to every rank, as losing the machine would do."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)

    @property
    def text(self) -> str:
        return self.said.read_text()


def start(
    script: str,
    *arguments: str | Path,
    said: Path,
    world: int = 1,
    env: dict[str, str] | None = None,
    cores: int | None = None,
) -> Program:
    """Start launch/<script>.py with `world` ranks, each on its first `cores` cores if given; returns at once."""
    load_before_forking()
    module = importlib.import_module(f"launch.{script}")
    port = free_port()
    pids = []
    said.parent.mkdir(parents=True, exist_ok=True)
    said.write_text("")
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            try:
                output = os.open(said, os.O_WRONLY | os.O_APPEND)
                os.dup2(output, 1)
                os.dup2(output, 2)
                sys.stdout = os.fdopen(1, "w", buffering=1)
                sys.stderr = os.fdopen(2, "w", buffering=1)
                sys.argv = [f"launch/{script}.py", *map(str, arguments)]
                if world > 1:
                    os.environ.update(cluster_of(rank, world, port).environment())
                os.environ.update(env or {})
                if cores is not None:
                    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
                run_main(module.main)
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(1)
        pids.append(pid)
    return Program(pids=pids, said=said)


def run(
    script: str,
    *arguments: str | Path,
    said: Path,
    world: int = 1,
    env: dict[str, str] | None = None,
    cores: int | None = None,
    code: int = 0,
) -> str:
    """Run a script to its end; all ranks must leave with `code`. Returns what was said."""
    program = start(script, *arguments, said=said, world=world, env=env, cores=cores)
    codes = program.wait()
    assert codes == [code] * world, f"exit codes {codes}, expected {code}:\n{program.text}"
    return program.text


def steps_of(run_directory: Path) -> list[dict]:
    """The step lines of metrics.jsonl, evaluations left out."""
    return [line for line in read_lines(run_directory / "metrics.jsonl") if "eval" not in line]


def curve(run_directory: Path, *names: str) -> list[tuple]:
    """The named values of every step line, in the order of the file."""
    return [tuple(line[name] for name in ("step", *names)) for line in steps_of(run_directory)]


SMALL: Sequence[str] = ("model.depth=2", "model.width=32", "model.heads=2", "train.length=24", "optim.micro_batch_max=16")
"""Overrides that make the digits recipe a matter of seconds."""
