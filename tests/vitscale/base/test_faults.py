"""A fault point does what VITSCALE_FAULT says, there and nowhere else; a wrong word in it is refused."""

import os
import signal

import pytest

from vitscale.base.errors import UsageError
from vitscale.base.faults import fault_point


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


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("kil@step.end", "did you mean 'kill'"),
        ("kill@step.ends", "did you mean 'step.end'"),
        ("kill", "there is no fault point ''"),
        ("kill@step.end:rank", "expected NAME=NUMBER after the point, got 'rank'"),
        ("kill@step.end:rank=one", "got 'rank=one'"),
        ("kill@step.end:stpe=3", "step.end has no 'stpe', it has rank, step; did you mean 'step'"),
    ],
)
def test_a_wrong_word_is_refused(monkeypatch, order, said):
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("fired on a wrong word"))
    monkeypatch.setenv("VITSCALE_FAULT", order)
    with pytest.raises(UsageError, match=said):
        fault_point("step.end", rank=0, step=1)
