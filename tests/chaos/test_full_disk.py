"""Really full disks, of bytes or of inodes: a run goes on past a save without room, or leaves with the code for a requeue."""

import contextlib
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.program import SMALL, curve, run, start
from tests.helpers.small_disk import mount, on_small_disk, require_mounts
from vitscale.training.checkpoint import newest_valid
from vitscale.training.metrics import read_lines

pytestmark = pytest.mark.slow

TINY = (*SMALL, "optim.micro_batch_max=96", "run.eval_every=0", "run.log_every=1", "run.keep_last=1")
"""Its checkpoints have about 0.4 MB."""
LIMITS = {"bytes": ("size=600k", "size=9m"), "inodes": ("nr_inodes=10", "nr_inodes=60")}
"""Of two starts: room for a checkpoint and half of the next, then for both."""


@pytest.fixture(scope="module", autouse=True)
def allowed():
    require_mounts()


class Start(NamedTuple):
    """What was said by one of several starts, and what was there when it had ended."""

    said: str
    newest: str
    directories: list[str]
    failed: list[tuple[int, str]]
    """Step and reason of every save that failed."""
    steps: list[int]


def start_twice(directory: Path, said: Path, what: str) -> list[Start]:
    found = []
    checkpoints = directory / "checkpoints"
    for number, limits in enumerate(LIMITS[what]):
        mount("-o", f"remount,{limits}", checkpoints)
        words = ("--run", directory, *TINY, "train.length=12", "run.save_every=5")
        text = run("pretrain", *words, said=said / f"{number}.txt", cores=1, code=0 if number else 75)
        events = [event for event in read_lines(directory / "events.jsonl") if event["event"] == "save_failed"]
        found.append(
            Start(
                said=text,
                newest=newest_valid(checkpoints)[0].name,
                directories=sorted(path.name for path in checkpoints.iterdir() if path.is_dir()),
                failed=[(event["step"], event["why"]) for event in events],
                steps=[step for step, _ in curve(directory, "loss")],
            )
        )
    return found


@pytest.mark.parametrize("what", LIMITS)
def test_a_run_trains_on_past_a_failed_save_asks_to_be_requeued_after_a_failed_last_one_and_goes_on_with_room(tmp_path, what):
    directory = tmp_path / "run"
    starts = on_small_disk(directory / "checkpoints", LIMITS[what][0], start_twice, directory, tmp_path, what)
    short, last = starts
    assert [step for step, _ in short.failed] == [10, 12], "the next save that is due is tried"
    assert all(why.startswith("rank 0: No space left on device (ENOSPC) at ") for _, why in short.failed)
    assert short.steps == list(range(1, 13)), "training went on"
    assert short.newest == "step-00000005" and short.directories == ["step-00000005"], "the one before, nothing else"
    said = [line for line in short.said.splitlines() if "could not be saved" in line]
    assert said[0].startswith("the checkpoint of step 10 could not be saved: rank 0: No space left")
    assert "error: the last checkpoint, of step 12, could not be saved" in said[-1] and "Traceback" not in short.said
    assert "continuing after step 5" in last.said and "finished after 12 steps" in last.said
    assert last.newest == "step-00000012" and last.directories == ["step-00000012"]
    assert last.failed == short.failed, "what the disk did outlives the resume, and no save failed since"
    assert last.steps == list(range(1, 13))


def fill_the_disk_of_a_run(directory: Path, said: Path) -> tuple[list[int], str]:
    """Not a byte is free from its first steps on."""
    program = start("pretrain", "--run", directory, *TINY, "train.length=2000", "run.save_every=0", said=said, cores=1)
    while len(read_lines(directory / "metrics.jsonl")) < 2 and "error" not in program.text:
        time.sleep(0.05)
    with open(directory / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(4096))
    return program.wait(), program.text


def test_a_run_that_cannot_even_write_its_metrics_is_one_sentence_and_a_requeue(tmp_path):
    codes, said = on_small_disk(tmp_path / "run", "size=8m", fill_the_disk_of_a_run, tmp_path / "run", tmp_path / "said.txt")
    assert codes == [75], said
    assert said.count("error: ") == 1 and "error: No space left on device" in said and "Traceback" not in said
