"""A rank or a data worker that dies or stops is no silent hang: the run heals or ends with 75, and says who it was."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.trials.attempts import workers_of
from tests.helpers.program import SMALL, Program, curve, run, start
from vitscale.base.host import is_alive, process_of
from vitscale.training.metrics import read_lines

pytestmark = pytest.mark.slow

ARGUMENTS = (*SMALL, "train.length=14", "run.save_every=5", "run.eval_every=12", "run.log_every=1", "run.step_timeout=10")
NAMES = ("loss", "grad_norm", "samples_hash", "images_seen")
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """The curve of an undisturbed run on two ranks."""
    base = tmp_path_factory.mktemp("quiet")
    run("pretrain", "--run", base / "r", *ARGUMENTS, said=base / "said.txt", world=2)
    return curve(base / "r", *NAMES)


def events_of(directory: Path, event: str) -> list[dict]:
    return [line for line in read_lines(directory / "events.jsonl") if line["event"] == event]


def wait_for(condition: Callable[[], object], program: Program) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s and "error:" not in program.text, program.text
        time.sleep(0.005)


def test_a_stopped_rank_is_named_and_the_same_command_goes_on(tmp_path, quiet):
    directory = tmp_path / "r"
    started_at_s = time.monotonic()
    env = {"VITSCALE_FAULT": "stop@step.end:rank=1:step=7"}
    program = start("pretrain", "--run", directory, *ARGUMENTS, said=tmp_path / "said.txt", world=2, env=env)
    codes = program.wait()
    assert codes == [75, -signal.SIGKILL] and time.monotonic() - started_at_s < 30, program.text
    assert f"error: rank 1 on {HOST} did not answer when step 7 had not ended in time" in program.text
    assert program.text.count("error:") == 1 and "Traceback" not in program.text
    stacks = (directory / "stacks" / "attempt-001" / "rank-00000.txt").read_text()
    assert 'phase: "end"' in stacks and "step: 7\n" in stacks and "in train" in stacks and "in all_reduce" in stacks
    assert not (directory / "stacks" / "attempt-001" / "rank-00001.txt").exists()
    status = json.loads((directory / "status.json").read_text())
    assert status["phase"] == "hung" and status["late"] == [{"rank": 1, "host": HOST}]
    said = run("pretrain", "--run", directory, *ARGUMENTS, said=tmp_path / "again.txt", world=2)
    assert "continuing after step 5" in said
    assert curve(directory, *NAMES) == quiet
    assert [event["late"] for event in events_of(directory, "hung")] == [[{"rank": 1, "host": HOST}]]


def test_files_that_are_not_written_in_time_end_the_run_and_their_rank_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("vitscale.training.watch.FLUSH_FACTOR", 1)
    env = {"VITSCALE_FAULT": "slow@checkpoint.files:rank=1:step=14:seconds=60"}
    directory = tmp_path / "r"
    program = start(
        "pretrain", "--run", directory, *ARGUMENTS, "run.step_timeout=5", said=tmp_path / "said.txt", world=2, env=env
    )
    assert program.wait() == [75, 75], program.text
    (sentence,) = [line for line in program.text.splitlines() if line.startswith("error:")]
    assert f"rank 1 on {HOST} has been in flush of step 14" in sentence and "while the others wait in flush" in sentence
    assert "in _write" in (directory / "stacks" / "attempt-001" / "rank-00001.txt").read_text()


def test_a_killed_rank_ends_the_other_with_one_sentence(tmp_path, quiet):
    directory = tmp_path / "r"
    env = {"VITSCALE_FAULT": "kill@step.end:rank=0:step=7"}
    program = start("pretrain", "--run", directory, *ARGUMENTS, said=tmp_path / "said.txt", world=2, env=env)
    wait_for(lambda: len(curve(directory)) >= 6, program)
    started_at_s = time.monotonic()
    assert program.wait() == [-signal.SIGKILL, 75]
    assert time.monotonic() - started_at_s < 10
    (sentence,) = [line for line in program.text.splitlines() if line.startswith("error:")]
    assert f"rank 1 on {HOST} lost its connection" in sentence and f"rank 0 on {HOST} is gone" in sentence
    assert "the same command continues" in sentence and "Traceback" not in program.text
    (died,) = events_of(directory, "died")
    assert died["step"] in (7, 8) and died["dead"] == [{"rank": 0, "host": HOST}]
    assert died["message"] == sentence.removeprefix("error: ")
    assert json.loads((directory / "status.json").read_text())["phase"] == "died"
    run("pretrain", "--run", directory, *ARGUMENTS, said=tmp_path / "again.txt", world=2)
    assert curve(directory, *NAMES) == quiet
    assert events_of(directory, "died") == [died]


def test_a_killed_data_worker_is_replaced_and_no_image_is_lost(tmp_path, quiet):
    directory = tmp_path / "r"
    program = start("pretrain", "--run", directory, *ARGUMENTS, "data.workers=2", said=tmp_path / "said.txt", world=2)
    wait_for(lambda: len(curve(directory)) >= 3, program)
    victim = workers_of(program.pids[1])[0]
    os.kill(victim, signal.SIGKILL)
    assert program.wait() == [0, 0], program.text
    (event,) = events_of(directory, "worker_died")
    assert (event["rank"], event["pid"], event["exit_code"]) == (1, victim, -signal.SIGKILL)
    assert f"data worker {victim} was killed by SIGKILL" in program.text
    assert curve(directory, *NAMES) == quiet


def test_a_stopped_data_worker_is_named(tmp_path):
    directory = tmp_path / "r"
    program = start("pretrain", "--run", directory, *ARGUMENTS, "data.workers=1", said=tmp_path / "said.txt", world=2)
    wait_for(lambda: len(curve(directory)) >= 3, program)
    (victim,) = workers_of(program.pids[0])
    os.kill(victim, signal.SIGSTOP)
    assert program.wait() == [75, 75], program.text
    (sentence,) = [line for line in program.text.splitlines() if line.startswith("error:")]
    assert f"rank 0 on {HOST} has been in data of step" in sentence and f"its data worker {victim} is stopped" in sentence
    left = process_of(victim)
    assert left is None or not is_alive(left)
