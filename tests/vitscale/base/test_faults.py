"""A fault point does what VITSCALE_FAULT says, there and nowhere else; a wrong word in it is refused."""

import ast
import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from vitscale.base.errors import UsageError
from vitscale.base.faults import ACTIONS, POINTS, changes_at, fault_point

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("order", "where", "here", "fires"),
    [
        (None, "step.end", {}, False),
        ("", "step.end", {}, False),
        ("raise@step.end", "step.end", {"rank": 0, "step": 4}, True),
        ("raise@step.end", "build.shard", {"shard": 1}, False),
        ("raise@step.end:rank=1:step=4", "step.end", {"rank": 1, "step": 4}, True),
        ("raise@step.end:rank=1:step=4", "step.end", {"rank": 0, "step": 4}, False),
        ("raise@step.end:rank=1:step=4", "step.end", {"rank": 1, "step": 5}, False),
        ("raise@step.end:step=3;raise@step.end:step=4", "step.end", {"rank": 1, "step": 4}, True),
        ("raise@step.end:step=3; raise@data.batch:step=4;", "step.end", {"rank": 1, "step": 4}, False),
    ],
)
def test_it_fires_where_every_condition_holds(monkeypatch, order, where, here, fires):
    if order is None:
        monkeypatch.delenv("VITSCALE_FAULT", raising=False)
    else:
        monkeypatch.setenv("VITSCALE_FAULT", order)
    if fires:
        with pytest.raises(RuntimeError, match=where):
            fault_point(where, **here)
    else:
        fault_point(where, **here)


@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_kill_and_stop_are_signals_nobody_can_catch(monkeypatch, action, number):
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, what: sent.append((pid, what)))
    monkeypatch.setenv("VITSCALE_FAULT", f"{action}@checkpoint.rename")
    fault_point("checkpoint.rename", rank=0, step=1)
    assert sent == [(os.getpid(), number)]


@pytest.mark.parametrize(("action", "number"), [("enospc", errno.ENOSPC), ("eio", errno.EIO)])
def test_a_full_or_failing_disk_is_an_oserror_with_its_number(monkeypatch, action, number):
    monkeypatch.setenv("VITSCALE_FAULT", f"{action}@checkpoint.files:rank=0")
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        fault_point("checkpoint.files", rank=0, step=1)
    assert caught.value.errno == number


def test_slow_sleeps_as_long_as_it_says(monkeypatch):
    monkeypatch.setenv("VITSCALE_FAULT", "slow@data.batch:seconds=0.05")
    began_s = time.monotonic()
    fault_point("data.batch", rank=0, step=1, micro_batch=0)
    assert 0.05 <= time.monotonic() - began_s < 5


def test_once_is_one_process_of_all_and_never_again(monkeypatch, tmp_path):
    """Eight processes meet the same fault at once, and one of them again: one has it, and a restart has not."""
    monkeypatch.setenv("VITSCALE_FAULT", f"raise@step.end:once={tmp_path / 'hit'}")

    def meet(_number):
        for _ in range(2):
            try:
                fault_point("step.end", rank=0, step=1)
            except RuntimeError:
                os._exit(1)
        os._exit(0)

    processes = [multiprocessing.get_context("fork").Process(target=meet, args=(number,)) for number in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(process.exitcode for process in processes) == [0] * 7 + [1]


def test_a_change_is_handed_to_who_has_the_number(monkeypatch):
    monkeypatch.setenv(
        "VITSCALE_FAULT", "nan@step.loss:step=2;bitflip@step.weights:bit=30:tensor=3:element=7;nan@step.loss:step=3"
    )
    assert [(f.action, f.conditions) for f in changes_at("step.loss", rank=0, step=2)] == [("nan", {"step": 2})]
    (flip,) = changes_at("step.weights", rank=0, step=9)
    assert (flip.action, flip.bit, flip.tensor, flip.element) == ("bitflip", 30, 3, 7)
    monkeypatch.setenv("VITSCALE_FAULT", "raise@step.loss")
    with pytest.raises(RuntimeError, match=r"step\.loss"):
        changes_at("step.loss", rank=0, step=2)


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("kil@step.end", "did you mean 'kill'"),
        ("kill@step.ends", "did you mean 'step.end'"),
        ("kill", "there is no fault point ''"),
        ("kill@step.end:rank", "expected NAME=NUMBER after the point, got 'rank'"),
        ("kill@step.end:rank=one", "got 'rank=one'"),
        ("slow@step.end", "slow, and nothing else, takes seconds=S"),
        ("kill@step.end:seconds=3", "slow, and nothing else, takes seconds=S"),
        ("nan@step.end", "step.end has no number that nan could change; expected step.loss or step.weights"),
        ("kill@step.loss:bit=3", "bit= goes with nan and bitflip only"),
        ("kill@step.end:once=/absent/place/hit", "its directory must exist"),
        ("raise@data.batch;kil@step.end", "did you mean 'kill'"),
        ("kill@step.end:stpe=3", "step.end has no 'stpe', it has rank, step; did you mean 'step'"),
    ],
)
def test_a_wrong_word_is_refused(monkeypatch, order, said):
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("fired on a wrong word"))
    monkeypatch.setenv("VITSCALE_FAULT", order)
    with pytest.raises(UsageError, match=said):
        fault_point("step.end", rank=0, step=1)


def calls():
    """(function, point) of every call in the source that names a fault point."""
    for path in (file for package in ("vitscale", "data_pipeline", "launch") for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                name = node.func.id if isinstance(node.func, ast.Name) else ""
                if name in ("fault_point", "changes_at"):
                    yield name, node.args[0].value


def test_every_point_has_a_call_and_every_call_a_point():
    assert {point for _, point in calls()} == set(POINTS)


def test_the_manual_names_every_point_and_every_action():
    text = (ROOT / "docs" / "reliability.md").read_text()
    assert [word for word in (*POINTS, *ACTIONS) if f"`{word}`" not in text] == []
