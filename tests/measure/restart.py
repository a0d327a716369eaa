"""From the kill of a rank to the next new step on this machine: seconds, by phase.

    python -m tests.measure.restart [--only hand|supervise] [--repeat 3] [--rank 1] [section.key=value …]

A small training of two ranks under the real `deepspeed` is killed some steps after a checkpoint, and goes on: by hand (the same
command as soon as no process is left) and by launch/supervise.py alone. The phases between the launcher and the loop are those
that the run itself writes into events.jsonl, the steps those of metrics.jsonl; the rest is the process table. Further settings
make the model larger; `run.save_every` decides how many steps are lost.
"""

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from launch.chaos import SMALL
from launch.supervise import newest_checkpoint
from tests.helpers.program import curve
from tests.helpers.ranks import free_port
from tests.measure.stopping import ROOT, SCRIPTS, place_of
from vitscale.base.host import Process, descendants, is_alive, process_of
from vitscale.training.metrics import read_lines

ARGUMENTS = (
    *SMALL,
    "optim.schedule=constant",
    "optim.warmup=2",
    "train.length=1000000",
    "run.save_every=40",
    "run.eval_every=0",
)
STEPS_PAST_A_CHECKPOINT = 10
LOOK_EVERY_S = 0.1
PATIENCE_S = 300.0
PHASES = ("launcher", "imports", "configuration", "ranks", "verifying", "engine", "loading")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("hand", "supervise"), help="how the run goes on (default: both)")
    parser.add_argument("--repeat", type=int, default=3, help="kills of each")
    parser.add_argument("--rank", type=int, default=1, choices=(0, 1), help="the one that is killed")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    measured = {}
    for way in ("hand", "supervise") if args.only is None else (args.only,):
        with tempfile.TemporaryDirectory() as scratch:
            measured[way] = kills(way, Path(scratch), args.rank, args.repeat, [*ARGUMENTS, *args.overrides])
    print(table(measured), flush=True)


def kills(way: str, scratch: Path, rank: int, repeat: int, arguments: Sequence[str]) -> list[dict[str, float]]:
    """One training that is killed and goes on again and again; what each time took."""
    run, said = scratch / "run", scratch / "said.txt"
    command = [str(SCRIPTS / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    command += ["launch/pretrain.py", "--run", str(run), *arguments]
    if way == "supervise":
        command = [sys.executable, "launch/supervise.py", str(run), "--restarts", str(repeat), "--", *command]
    found = []
    with open(said, "w") as output, contextlib.ExitStack() as started:
        child = started.enter_context(running(command, output))
        for number in range(repeat):
            behind = newest_checkpoint(run)
            wait_for(lambda behind=behind: is_past_a_checkpoint(run, behind), child, said)
            mine = [process for process in [process_of(child.pid), *descendants(child.pid)] if process is not None]
            os.kill(place_of(f"rank {rank}", child.pid, mine), signal.SIGKILL)
            killed_s = time.time()
            gone_s = when_gone([process for process in mine if way == "hand" or process.pid != child.pid])
            saved, reached = newest_checkpoint(run), curve(run)[-1][0]
            if way == "hand":
                child = started.enter_context(running(command, output))
            wait_for(lambda count=number + 2: len(starts(run)) == count, child, said)
            wait_for(lambda reached=reached: curve(run)[-1][0] > reached, child, said)
            found.append(spans(run, killed_s=killed_s, gone_s=gone_s, saved=saved, reached=reached))
        (run / "stop").touch()
        child.wait(PATIENCE_S)
    return found


@contextlib.contextmanager
def running(command: Sequence[str], output: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A command with all that it starts, which is killed where it still runs in the end."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=env, start_new_session=True)
    try:
        yield child
    finally:
        for process in [*descendants(child.pid), child] if child.poll() is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        child.wait()


def starts(run: Path) -> list[dict[str, Any]]:
    return [event for event in read_lines(run / "events.jsonl") if event["event"] == "started"]


def is_past_a_checkpoint(run: Path, behind: int) -> bool:
    saved = newest_checkpoint(run)
    return saved > behind and curve(run)[-1][0] >= saved + STEPS_PAST_A_CHECKPOINT


def wait_for(condition: Callable[[], bool], child: subprocess.Popen[bytes], said: Path) -> None:
    limit_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert child.poll() is None and time.monotonic() < limit_s, said.read_text()[-3000:]
        time.sleep(LOOK_EVERY_S)


def when_gone(processes: Sequence[Process]) -> float:
    while any(is_alive(process) for process in processes):
        time.sleep(0.01)
    return time.time()


def spans(run: Path, *, killed_s: float, gone_s: float, saved: int, reached: int) -> dict[str, float]:
    """The seconds of one restart, each row from the end of the one before."""
    started = starts(run)[-1]
    begun_s = started["at_unix_s"] - sum(started["seconds"].values())
    at_s = {line["step"]: line["at_unix_s"] for line in read_lines(run / "metrics.jsonl") if "at_unix_s" in line}
    return {
        "kill to the last process gone": gone_s - killed_s,
        "to the start of the launcher": begun_s - gone_s,
        **{f"  {phase}": started["seconds"][phase] for phase in PHASES},
        "first step repeated": at_s[saved + 1] - started["at_unix_s"],
        "the other lost steps": at_s[reached + 1] - at_s[saved + 1],
        "kill to the next new step": at_s[reached + 1] - killed_s,
        "steps lost": reached - saved,
    }


def table(measured: dict[str, list[dict[str, float]]]) -> str:
    """A row per phase; medians, and least and most."""
    names = list(next(iter(measured.values()))[0])
    lines = [f"{'seconds: median (least, most)':<32}" + "".join(f"{way:>24}" for way in measured)]
    for name in names:
        cells = []
        for found in measured.values():
            values = [one[name] for one in found]
            cells.append(f"{statistics.median(values):.1f} ({min(values):.1f}, {max(values):.1f})")
        lines.append(f"{name:<32}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
