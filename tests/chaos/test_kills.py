"""Law 2 under a storm: kill -9 at named and random moments leaves no trace in losses, weights, samples, or on the machine.

The long forms are `python launch/chaos.py --kills 60`, and `--kills 9 --real-launcher`.
"""

import json

import pytest

from launch import assemble
from launch.trials.evidence import Account, account_of
from launch.trials.strikes import Draws, Strike
from tests.helpers.program import run, steps_of
from vitscale.base.files import read_json
from vitscale.training.rundir import stored_config

pytestmark = pytest.mark.slow

PATIENCE_S = 900.0
"""Half a minute each on two idle cores, much more where many tests share them."""


def test_two_kills_per_stage_leave_no_trace(tmp_path):
    report = tmp_path / "report.json"
    short = ("train.length=8", "run.save_every=2", "run.eval_every=4")
    said = run(
        "chaos", "--kills", "6", "--workers", "1", "--json", report, *short, said=tmp_path / "said.txt", timeout_s=PATIENCE_S
    )
    record = json.loads(report.read_text())
    assert all(f"kill of {whom} " in said for whom in ("one rank", "a data worker", "all ranks"))
    assert record["passed"] and "0 lost, 0 twice; 0 things left behind" in said
    for number, stage in enumerate(record["stages"], start=1):
        assert (stage["stage"], stage["passed"], stage["steps"], stage["left"]) == (number, True, 8, [])
        hits = [attempt for attempt in stage["attempts"] if attempt["has_hit"]]
        assert len(hits) == 2 <= len(stage["attempts"])
        assert all(-9 in attempt["codes"] or "data worker" in attempt["strike"] for attempt in hits), stage["attempts"]
        assert stage["differences"] and not any(stage["differences"].values())  # runs, each with what differs in it
        assert stage["account"] == {"due": 8 * 24, "lost": 0, "twice": 0}


def test_a_kill_under_the_real_launcher_leaves_no_trace(tmp_path):
    options = ("--kills", "1", "--stage", "2", "--workers", "1", "--real-launcher", "--out", tmp_path / "out")
    said = run("chaos", *options, "train.length=8", "run.eval_every=0", said=tmp_path / "said.txt", timeout_s=PATIENCE_S)
    assert "all                         1       1       1" in said, said
    directory = tmp_path / "out" / "stage-2" / "run-1"
    attempts = [read_json(path) for path in sorted(directory.glob("provenance/attempt-*.json"))]
    assert [attempt["launcher"] for attempt in attempts] == ["deepspeed", "deepspeed"]
    # The account of this run, and of one with a step too many, a step too few, and a step of other images.
    steps, config = steps_of(directory), stored_config(directory)
    wrong = [*steps[:3], steps[2], *steps[4:7], {**steps[7], "samples_hash": "0123456789abcdef"}]
    accounts = [account_of(directory, config, lines, position=8 * 24) for lines in (steps, wrong)]
    assert accounts == [Account(due=192, lost=0, twice=0), Account(due=192, lost=48, twice=24)]


def test_a_restart_that_loses_a_batch_is_found(tmp_path, monkeypatch):
    """The tool can fail: a checkpoint that is loaded with the position of the next step loses one batch of images."""
    load = assemble.load_checkpoint

    def load_and_skip(engine, saved):
        state = load(engine, saved)
        state.position += 24
        return state

    def after_the_first_checkpoint(self, done_steps, marker):
        return Strike(kind="kill at a fault point", rank=0, fault=f"kill@step.end:step=6:once={marker}")

    monkeypatch.setattr(assemble, "load_checkpoint", load_and_skip)
    monkeypatch.setattr(Draws, "next", after_the_first_checkpoint)
    options = ("--kills", "1", "--stage", "1", "--world", "1", "--workers", "0", "--out", tmp_path / "out")
    said = run("chaos", *options, "train.length=12", "run.eval_every=0", said=tmp_path / "said.txt", code=1)
    assert "0 of 1 runs equal" in said and "from line 5 on, first in loss" in said
    assert f"images: {9 * 24} lost, 0 twice" in said  # steps 5 to 12 had those of the step after, and a 13th counts as had
