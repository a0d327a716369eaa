"""Parts of a step add up to the step; waiting for a collective is counted, also when it runs beside other work."""

import time
from types import SimpleNamespace

import pytest
import torch

from vitscale.training.clock import StepClock


@pytest.fixture
def clock(monkeypatch):
    """A clock whose time moves only by `sleep`."""
    now_s = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])
    clock = StepClock(torch.device("cpu"))
    return SimpleNamespace(clock=clock, sleep=lambda seconds: now_s.__setitem__(0, now_s[0] + seconds))


def test_parts_add_up_and_a_restart_forgets(clock):
    for seconds in (1.0, 2.0):
        clock.sleep(seconds)
        clock.clock.passed("forward")
        clock.sleep(0.5)
        clock.clock.passed("backward")
    assert [clock.clock.seconds(part) for part in ("forward", "backward", "optimizer")] == [3.0, 1.0, 0.0]
    clock.sleep(7)
    clock.clock.restart()
    clock.sleep(1)
    clock.clock.passed("forward")
    assert clock.clock.seconds("forward") == 1.0 and clock.clock.seconds("backward") == 0.0


def test_collectives_and_the_waiting_for_them_are_communication(clock):
    class Backend:
        def all_reduce(self, tensor, async_op=False):
            clock.sleep(2.0)
            return SimpleNamespace(wait=lambda: clock.sleep(3.0), is_completed=lambda: False) if async_op else "done"

    backend = Backend()
    stop = clock.clock.watch_collectives(backend)
    assert backend.all_reduce(0) == "done"
    handle = backend.all_reduce(0, async_op=True)
    clock.sleep(10)  # what runs beside it does not count
    assert handle.is_completed() is False
    handle.wait()
    assert clock.clock.seconds("communication") == 2.0 + 2.0 + 3.0
    stop()
    backend.all_reduce(0)
    assert clock.clock.seconds("communication") == 7.0
