"""Real full disks: a run goes on past a save that had no room, or leaves with the code that says: requeue."""

import contextlib
import time
from pathlib import Path

import pytest

from tests.helpers.program import SMALL, curve, run, start
from tests.helpers.small_disk import mount, on_small_disk, require_mounts
from vitscale.training.checkpoint import newest_valid
from vitscale.training.metrics import read_lines

pytestmark = pytest.mark.slow

TINY = (*SMALL, "optim.micro_batch_max=96", "run.parity=never", "run.eval_every=0", "run.log_every=1", "run.keep_last=1")
"""Its checkpoints have about 0.4 MB."""


@pytest.fixture(scope="module", autouse=True)
def allowed():
    require_mounts()


def directories(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir() if path.is_dir())


def train_while_the_disk_is_full(directory: Path, said: Path) -> tuple[list[int], str, list[dict], list[str]]:
    """The disk has room again as soon as a failure is reported."""
    ballast = directory / "checkpoints" / "ballast"
    ballast.write_bytes(bytes(3_900_000))
    program = start("pretrain", "--run", directory, *TINY, "train.length=120", "run.save_every=20", said=said)
    while not (events := read_lines(directory / "events.jsonl")) and "error" not in program.text:
        time.sleep(0.01)
    ballast.unlink()
    codes = program.wait()
    return codes, program.text, events, directories(directory / "checkpoints")


def test_a_save_without_room_is_reported_once_and_training_goes_on(tmp_path):
    directory = tmp_path / "run"
    found = on_small_disk(directory / "checkpoints", "size=4m", train_while_the_disk_is_full, directory, tmp_path / "said.txt")
    codes, said, events, kept = found
    assert codes == [0], said
    failed = [event for event in events if event["event"] == "save_failed"]
    assert len(failed) >= 1 and failed[0]["step"] == 20 and "ENOSPC" in failed[0]["why"]
    sentences = [line for line in said.splitlines() if "could not be saved" in line]
    assert sentences[0].startswith("the checkpoint of step 20 could not be saved: rank 0: No space left on device (ENOSPC) at ")
    assert "finished after 120 steps" in said and "Traceback" not in said
    assert kept == ["step-00000120"]
    assert [step for step, _ in curve(directory, "loss")] == list(range(1, 121))


def train_twice(directory: Path, said: Path) -> tuple[str, str, str, list[str], list[str], str]:
    """The second start finds more room."""
    words = ("--run", directory, *TINY, "train.length=12", "run.save_every=5")
    first = run("pretrain", *words, said=said / "1.txt", code=75)
    between, left = newest_valid(directory / "checkpoints")[0].name, directories(directory / "checkpoints")
    mount("-o", "remount,nr_inodes=100,size=9m", directory / "checkpoints")
    second = run("pretrain", *words, said=said / "2.txt")
    after = directories(directory / "checkpoints")
    return first, second, between, left, after, newest_valid(directory / "checkpoints")[0].name


# Room for one checkpoint and half of the next.
@pytest.mark.parametrize(("options", "code"), [("nr_inodes=11", "ENOSPC"), ("size=600k", "ENOSPC")])
def test_when_the_last_save_fails_the_code_says_requeue_and_the_next_start_goes_on(tmp_path, options, code):
    directory = tmp_path / "run"
    found = on_small_disk(directory / "checkpoints", options, train_twice, directory, tmp_path)
    first, second, between, left, after, newest = found
    assert first.count("error: ") == 1 and "error: the last checkpoint, of step 12, could not be saved: rank 0" in first
    assert code in first and "Traceback" not in first
    assert between == "step-00000005" and left == [between], "the one before stays, and nothing half-written"
    assert "continuing after step 5" in second and newest == "step-00000012"
    assert after == ["step-00000012"]


def fill_the_disk_of_a_run(directory: Path, said: Path) -> tuple[list[int], str]:
    """Not a byte is free from its first steps on."""
    program = start("pretrain", "--run", directory, *TINY, "train.length=2000", "run.save_every=0", said=said)
    while len(read_lines(directory / "metrics.jsonl")) < 2 and "error" not in program.text:
        time.sleep(0.01)
    with open(directory / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(4096))
    return program.wait(), program.text


def test_a_run_that_cannot_even_write_its_metrics_is_one_sentence_and_a_requeue(tmp_path):
    codes, said = on_small_disk(tmp_path / "run", "size=8m", fill_the_disk_of_a_run, tmp_path / "run", tmp_path / "said.txt")
    assert codes == [75], said
    assert said.count("error: ") == 1 and "error: No space left on device" in said and "Traceback" not in said
