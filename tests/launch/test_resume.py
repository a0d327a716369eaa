"""Law 2: a run killed at any moment and started again by the same command gives the same losses, bit for bit."""

import random
import time
from pathlib import Path

import pytest

from tests.helpers.program import SMALL, curve, run, start
from vitscale.training.metrics import read_lines

pytestmark = pytest.mark.slow

CADENCE = ("run.save_every=5", "run.eval_every=12", "run.log_every=1")


def kill_after(seconds: float, run_directory: Path, said: Path, world: int, arguments: list[str]) -> None:
    """Start, wait for the first new step line, then a while, and kill every rank."""
    lines_before = len(curve(run_directory))
    program = start("pretrain", *arguments, said=said, world=world)
    while len(curve(run_directory)) <= lines_before:
        time.sleep(0.01)
        assert "error:" not in program.text and "Traceback" not in program.text, program.text
    time.sleep(seconds)
    program.kill()
    program.wait()


# Everything that has a state or a rate of its own.
RICH = (
    "train.ema=[0.9, 0.99]",
    "optim.layer_decay=0.7",
    "optim.head_weight_decay=0.3",
    "optim.moment_dtype=bf16",
    "optim.schedule=wsd",
    "optim.cooldown=25%",
)


@pytest.mark.parametrize(("world", "stage", "precision", "more"), [(1, 0, "fp32", ()), (2, 2, "bf16", RICH)])
def test_three_kills_leave_no_trace(tmp_path, world, stage, precision, more):
    arguments = [*SMALL, *CADENCE, f"ds.zero_optimization.stage={stage}", f"train.precision={precision}", *more]
    quiet, stormy = tmp_path / "quiet", tmp_path / "stormy"
    run("pretrain", "--run", quiet, *arguments, said=tmp_path / "quiet.txt", world=world)
    moments = random.Random(f"{world}{stage}")
    for attempt in range(3):
        delay_s = moments.uniform(0.0, 0.6)
        kill_after(delay_s, stormy, tmp_path / f"kill{attempt}.txt", world, ["--run", str(stormy), *arguments])
    said = run("pretrain", "--run", stormy, *arguments, said=tmp_path / "last.txt", world=world)
    names = ("loss", "grad_norm", "lr", "samples_hash", "images_seen", "skipped")
    assert curve(stormy, *names) == curve(quiet, *names), said
    assert [step for step, _ in curve(quiet, "loss")] == list(range(1, 25))
    scores = [[line for line in read_lines(place / "metrics.jsonl") if "eval" in line] for place in (quiet, stormy)]
    assert scores[0] == scores[1] and len(scores[0]) == 2 and all(("ema" in line) == bool(more) for line in scores[0])
    averages = [path.relative_to(quiet) for path in quiet.glob("checkpoints/step-*/ema-*")]
    assert len(averages) == (2 * world if more else 0)  # of the two checkpoints that are kept
    assert all((quiet / path).read_bytes() == (stormy / path).read_bytes() for path in averages)


def test_what_a_kill_right_after_the_last_commit_left_undone_is_done_by_the_next_start(tmp_path):
    arguments = ("--run", tmp_path / "r", *SMALL, *CADENCE, "run.keep_last=1")
    env = {"VITSCALE_FAULT": "kill@checkpoint.latest:step=24"}
    start("pretrain", *arguments, said=tmp_path / "a.txt", env=env).wait()
    checkpoints = tmp_path / "r" / "checkpoints"
    assert (checkpoints / "latest").read_text() == "step-00000020" and (checkpoints / "step-00000020").is_dir()
    said = run("pretrain", *arguments, said=tmp_path / "b.txt")
    assert "continuing after step 24" in said and "finished after 24 steps" in said
    assert (checkpoints / "latest").read_text() == "step-00000024"
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-00000024"]


def test_starting_a_finished_run_says_so_and_changes_nothing(tmp_path):
    run("pretrain", "--run", tmp_path / "r", *SMALL, said=tmp_path / "a.txt")
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    said = run("pretrain", "--run", tmp_path / "r", *SMALL, said=tmp_path / "b.txt")
    assert "is finished" in said and (tmp_path / "r" / "metrics.jsonl").read_bytes() == before


def test_a_run_goes_on_without_its_flags_and_refuses_other_results(tmp_path):
    """The stored configuration is taken where the command names none; a result key that differs is refused with both
    values; machine and watching keys follow the command."""
    directory = tmp_path / "r"
    env = {"VITSCALE_FAULT": "kill@step.end:step=8"}
    start("pretrain", "--run", directory, *SMALL, *CADENCE, said=tmp_path / "a.txt", env=env).wait()
    said = run("pretrain", "--run", directory, "optim.peak_lr=0.5", said=tmp_path / "b.txt", code=2)
    assert "optim.peak_lr is 0.004 in the run, 0.5 in the command" in said and "Traceback" not in said
    said = run("pretrain", "--run", directory, "--recipe", "digits", said=tmp_path / "c.txt", code=2)
    assert "train.length is 24 in the run, '60ep' in the command" in said
    said = run("pretrain", "--run", directory, "data.workers=1", "run.eval_every=0", said=tmp_path / "d.txt")
    assert "continuing after step 5" in said and "data.workers: 0 -> 1" in said
    assert [step for step, _ in curve(directory, "loss")] == list(range(1, 25))
    starts = [line for line in read_lines(directory / "events.jsonl") if line["event"] == "started"]
    assert [(line["attempt"], line["step"], line["world"]) for line in starts] == [(1, 0, 1), (2, 5, 1)]
    assert all({"imports", "ranks", "verifying", "engine", "loading"} <= line["seconds"].keys() for line in starts)
    assert "the start took" in said
