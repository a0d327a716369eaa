"""What chaos.py is made of: draws that a seed fixes, evidence that notices every difference, leftovers that are found."""

import dataclasses
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from launch import chaos
from launch.trials.evidence import Account, Evidence, differences
from launch.trials.leftovers import end_sessions, forsaken, shared_memory, stays_taken, temporary_files
from launch.trials.soak import Memory, Slope, _slope
from launch.trials.storm import last_step_line
from launch.trials.strikes import AT_POINTS, FAULTS, KILLS, Draws, Pace
from vitscale.base.errors import UsageError
from vitscale.base.faults import POINTS, faults_of
from vitscale.base.host import of_sessions
from vitscale.insight.timeline import COLOURS

PACE = Pace(total_steps=24, save_every=4, eval_every=12, micro_batches=2, start_s=2.0, step_s=0.1)


def drawn(seed: str, count: int = 60, *, workers: int = 2, kinds=KILLS, done: int = 8, every_s=None):
    draws = Draws(seed, pace=PACE, world=2, workers=workers, kinds=kinds, every_s=every_s)
    return [draws.next(done, Path("hit")) for _ in range(count)]


def test_a_seed_fixes_what_is_drawn():
    assert drawn("7 1") == drawn("7 1") != drawn("8 1")


def test_every_kind_and_every_point_comes_before_any_comes_again():
    strikes = drawn("0 1")
    assert {strike.kind for strike in strikes[: len(KILLS)]} == set(KILLS)
    named = [faults_of(strike.fault)[0].point for strike in strikes if strike.fault]
    points = {point for point in POINTS if not point.startswith(("build.", "rollback."))}
    assert set(named[: len(points)]) == points


@pytest.mark.parametrize("every_s", [None, 3.0])
def test_what_is_drawn_can_still_happen(every_s):
    """Conditions lie in the steps to come, at points of rank 0 they speak of rank 0, and saving points at steps that save."""
    for strike in drawn("1 2", 400, kinds=FAULTS, every_s=every_s):
        assert strike.rank in (0, 1) and strike.worker in (0, 1)
        if not strike.fault:
            assert strike.after_step is None or 8 < strike.after_step < 24
            continue
        (fault,) = faults_of(strike.fault)
        assert fault.once == "hit" and fault.action in AT_POINTS[strike.kind]
        step = fault.conditions.get("step")
        assert step is None or 8 < step <= 24
        assert not fault.point.startswith("checkpoint.") or step % 4 == 0
        assert fault.point != "evaluate.begin" or step in (12, 24)
        assert (
            fault.point not in ("checkpoint.commit", "checkpoint.rename", "checkpoint.latest") or fault.conditions["rank"] == 0
        )
        assert strike.kind != "disk fault while saving" or fault.point.startswith("checkpoint.")


def test_every_kind_has_a_colour_of_its_own():
    assert len(FAULTS) <= len(set(COLOURS)) == len(COLOURS)


def test_without_data_workers_none_is_killed():
    strikes = drawn("2 1", workers=0)
    assert not any("worker" in strike.kind or "worker" in strike.fault for strike in strikes)


def test_the_last_step_is_read_over_torn_lines_and_evaluations(tmp_path):
    assert last_step_line(tmp_path) == {}
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 2, "eval": {}}\n{"step": 3, "lo'
    )
    assert last_step_line(tmp_path)["step"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kills", "3", "--minutes", "1"], "one of --kills and --minutes, not both"),
        (["--kills", "0"], "above 0"),
        (["--workers", "-1"], "--workers of at least 0"),
        (["--stage", "1,4"], "ZeRO stages such as 1,2,3, with --minutes one of them, got '1,4'"),
        (["--minutes", "1", "--stage", "1,2"], "with --minutes one of them"),
        (["--kill", "3"], "did you mean '--kills'"),
        (["--out", "."], "is not empty; name a new directory"),
    ],
)
def test_a_wrong_word_is_refused(monkeypatch, arguments, said):
    monkeypatch.setattr(sys, "argv", ["launch/chaos.py", *arguments])
    with pytest.raises(UsageError, match=re.escape(said)):
        chaos.main()


EVIDENCE = Evidence(
    steps=((1, 2.5, 0.5, 0.1, "aa", 24, 0), (2, 2.25, 0.5, 0.1, "bb", 48, 0)),
    scores=({"step": 2, "eval": {"top1": 0.5}},),
    weights_sha256={"weights": "11", "ema 0.9": "22"},
    account=Account(due=48, lost=0, twice=0),
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": (EVIDENCE.steps[0], (2, np.nextafter(2.25, 3), 0.5, 0.1, "bb", 48, 0))}, "line 2 on, first in loss"),
        ({"steps": (EVIDENCE.steps[0], (2, 2.25, 0.5, 0.1, "bc", 48, 1))}, "first in samples_hash, skipped"),
        ({"steps": EVIDENCE.steps[:1]}, "1 lines of steps instead of 2"),
        ({"scores": ()}, "scores"),
        ({"weights_sha256": {"weights": "11", "ema 0.9": "23"}}, "ema 0.9 of the last checkpoint"),
        ({"weights_sha256": {"weights": "11"}}, "ema 0.9 of the last checkpoint"),
        ({"account": Account(due=48, lost=24, twice=0)}, "24 lost, 0 twice"),
    ],
)
def test_every_difference_is_named(change, said):
    assert differences(EVIDENCE, EVIDENCE) == []
    (words,) = differences(EVIDENCE, dataclasses.replace(EVIDENCE, **change))
    assert said in words


def test_the_slope_of_memory_is_taken_inside_attempts():
    """Each attempt starts at another height; 5 bytes a step is the slope of both."""
    attempts = np.repeat([1.0, 2.0], 20)
    steps = np.concatenate([np.arange(20.0), np.arange(10.0, 30.0)])
    assert _slope(attempts, steps, 5 * steps + np.where(attempts == 1, 1e6, 3e6)) == pytest.approx(5000.0)
    assert _slope(attempts[:5], steps[:5], steps[:5]) is None


def test_workers_of_an_evaluation_are_no_growth():
    memory = Memory()
    memory._samples = [(1, step, 100 + step, 400 if step % 5 == 0 else 200, 4 if step % 5 == 0 else 2) for step in range(50)]
    slope = memory.slope()
    assert (slope.rank_0, slope.workers_of_rank_0, slope.samples) == (pytest.approx(1000.0), 0.0, 50)
    assert Memory().slope() == Slope(rank_0=None, workers_of_rank_0=None, samples=0)


def test_a_process_is_found_by_its_session_and_ended(monkeypatch):
    monkeypatch.setattr("launch.trials.leftovers.GRACE_S", 0.2)
    child = subprocess.Popen([sys.executable, "-c", "import os, time; os.fork(); time.sleep(60)"], start_new_session=True)
    give_up_at_s = time.monotonic() + 20
    while len(of_sessions([child.pid])) < 2:  # the second is the child of a child
        assert time.monotonic() < give_up_at_s
        time.sleep(0.01)
    assert len(end_sessions([child.pid])) == 2
    child.wait()
    assert end_sessions([child.pid]) == []


def test_a_port_that_stays_taken_is_found_and_one_that_is_just_being_closed_is_not(monkeypatch):
    monkeypatch.setattr("launch.trials.leftovers.GRACE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert stays_taken(port)
        closing = threading.Timer(0.2, server.close)
        closing.start()
        assert not stays_taken(port)
        closing.join()


def test_shared_memory_is_left_when_nobody_holds_it_and_nobody_cleans_up(monkeypatch):
    monkeypatch.setattr("launch.trials.leftovers.GRACE_S", 0.5)
    before = shared_memory()
    path = Path(f"/dev/shm/vitscale-test-{os.getpid()}")
    path.write_bytes(b"x")
    try:
        with open(path):
            assert str(path) not in forsaken(shared_memory() - before)
        assert str(path) in forsaken(shared_memory() - before)
        cleaning = threading.Timer(0.2, path.unlink)
        cleaning.start()
        assert str(path) not in forsaken(shared_memory() - before)
        cleaning.join()
    finally:
        path.unlink(missing_ok=True)


def test_temporary_files_of_a_run_are_found(tmp_path):
    (tmp_path / "checkpoints" / "step-00000004.partial").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000008").mkdir()
    for name in (".status.json.tmp-0123456789ab", "status.json", ".nonce"):
        (tmp_path / name).write_text("")
    assert [Path(path).name for path in temporary_files(tmp_path)] == [
        ".nonce",
        ".status.json.tmp-0123456789ab",
        "step-00000004.partial",
    ]
