"""Trainings that are asked to stop, and what became of them: for the tests and for tests/measure/stopping.py."""

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.supervise import newest_checkpoint
from tests.helpers.program import SMALL, Program, curve, start
from vitscale.base.host import Process, descendants, is_alive, process_of

# With a constant rate the first steps do not depend on the length: a run that has no end has the curve of a short one.
STEPS = 24
ARGUMENTS = (
    *SMALL,
    "optim.schedule=constant",
    "optim.warmup=2",
    "run.log_every=1",
    "run.save_every=0",
    "run.eval_every=0",
    "run.parity=never",
)
ENDLESS = "train.length=1000000"
NUMBERS = ("loss", "grad_norm", "lr", "samples_hash", "images_seen", "skipped")
"""What must be equal to the undisturbed run, bit for bit."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One start that was asked to stop."""

    codes: list[int]
    logged: int
    """Last step in metrics.jsonl."""
    saved: int
    """Newest checkpoint."""
    status: dict
    alive: list[Process]
    """Processes of the start that outlive it."""

    @property
    def steps_lost(self) -> int:
        return self.logged - self.saved


def asked_to_stop(
    run: Path,
    ask: Callable[[Program], None],
    *more: str,
    said: Path,
    world: int = 2,
    steps: int = 3,
    alive_after_s: float = 10.0,
) -> Outcome:
    """Start or continue the training, let it do some steps, ask it to stop, and wait for its end."""
    before = len(curve(run))
    program = start("pretrain", "--run", run, *ARGUMENTS, *more, said=said, world=world)
    wait_for_steps(run, before + steps, program)
    processes = [process for pid in program.pids for process in descendants(pid)]
    ask(program)
    codes = program.wait()
    return outcome_of(run, codes, processes, alive_after_s=alive_after_s)


def wait_for_steps(run: Path, steps: int, program: Program) -> None:
    limit_s = time.monotonic() + 400
    while len(curve(run)) < steps:
        time.sleep(0.01)
        assert "error:" not in program.text and "Traceback" not in program.text, program.text
        is_running = any((process := process_of(pid)) and is_alive(process) for pid in program.pids)
        assert (is_running or len(curve(run)) >= steps) and time.monotonic() < limit_s, program.text


def outcome_of(run: Path, codes: list[int], processes: Sequence[Process], *, alive_after_s: float) -> Outcome:
    limit_s = time.monotonic() + alive_after_s
    while (alive := [process for process in processes if is_alive(process)]) and time.monotonic() < limit_s:
        time.sleep(0.05)
    lines = curve(run)
    return Outcome(
        codes=codes,
        logged=lines[-1][0] if lines else 0,
        saved=newest_checkpoint(run),
        status=json.loads((run / "status.json").read_text()),
        alive=alive,
    )


def signal_to(rank: int, name: str) -> Callable[[Program], None]:
    """A signal to one rank, and once more at once."""

    def ask(program: Program) -> None:
        for _ in range(2):
            os.kill(program.pids[rank], signal.Signals[name])
            time.sleep(0.01)

    return ask


def stop_file(run: Path) -> Callable[[Program], None]:
    return lambda program: (run / "stop").touch()


def nothing(program: Program) -> None:
    """For a run that stops by itself."""


def is_undisturbed(run: Path, quiet: Path) -> bool:
    """Whether the steps of a run, up to the length of the quiet one, are those of the quiet one, each once."""
    lines, expected = curve(run, *NUMBERS), curve(quiet, *NUMBERS)
    shared = min(len(lines), len(expected))
    return lines[:shared] == expected[:shared] and [line[0] for line in lines] == list(range(1, len(lines) + 1))


def summary(outcome: Outcome) -> str:
    return json.dumps(dataclasses.asdict(outcome), default=str)
