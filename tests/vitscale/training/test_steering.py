"""Why a run stops or saves: each reason, what of several is told, when a look is due, and what a signal does when."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from tests.helpers.ranks import run_ranks
from vitscale.base.errors import LeaseLost, StopRequested
from vitscale.base.host import process_of
from vitscale.training import steering as steering_module
from vitscale.training.steering import Order, Steering, seconds_left

TOTAL = 100


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def alone(run, clock=time.monotonic, **changes) -> Steering:
    settings = {"rank": 0, "total_steps": TOTAL, "agree": list, "clock": clock, **changes}
    return Steering(run, **settings)


@pytest.fixture(autouse=True)
def handlers_stay_as_they_were():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_an_order_and_a_second_one_is_harmless(tmp_path, name):
    steering = alone(tmp_path)
    with steering:
        assert steering.agree(1) == Order()
        for _ in range(2):
            os.kill(os.getpid(), signal.Signals[name])
        assert steering.agree(2) == Order(stop=f"{name} came to rank 0")
        os.kill(os.getpid(), signal.Signals[name])
        assert steering.agree(3).stop == f"{name} came to rank 0"


def test_rank_0_says_at_once_that_it_has_heard(tmp_path, capfd):
    with alone(tmp_path):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    with alone(tmp_path, rank=1):
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == "SIGINT: saving and stopping after this step\n"


def test_signals_mean_what_they_meant_before_and_after_the_training(tmp_path):
    def hears(number: int, frame: object) -> None: ...

    signal.signal(signal.SIGUSR1, hears)
    before = signal.getsignal(signal.SIGTERM)
    steering = alone(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before
    for _ in range(2):  # a training that rolls back begins again
        with steering:
            assert signal.getsignal(signal.SIGTERM) not in (before, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) == before and signal.getsignal(signal.SIGUSR1) is hears
    with pytest.raises(KeyError), alone(tmp_path):
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == before


def test_who_leaves_on_request_hears_no_more_signals(tmp_path):
    """A launcher that ends the ranks because the first has left must not replace their exit code."""
    steering = alone(tmp_path)
    with pytest.raises(StopRequested), steering:
        os.kill(os.getpid(), signal.SIGTERM)
        steering.obey(steering.agree(1), 1, None)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        os.kill(os.getpid(), signal.Signals[name])


def test_a_system_call_is_not_broken_off(tmp_path):
    """A library that does not expect it would take it for an error."""
    libc, buffer = ctypes.CDLL(None), ctypes.create_string_buffer(1)
    reader, writer = os.pipe()

    def signal_and_write() -> None:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        os.write(writer, b"x")

    with alone(tmp_path) as steering:
        thread = threading.Thread(target=signal_and_write)
        thread.start()
        assert libc.read(reader, buffer, 1) == 1 and buffer.raw == b"x"
        assert steering.agree(1).stop == "SIGTERM came to rank 0"
    thread.join()


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_stop_file_is_obeyed_and_removed(tmp_path):
    steering = alone(tmp_path)
    (tmp_path / "stop").write_text("SIGUSR1 to the\nwrapper\n")
    order = steering.agree(1)
    assert order.stop == f"the file {tmp_path / 'stop'} asked for it (SIGUSR1 to the wrapper)"
    assert (tmp_path / "stop").exists(), "a kill during the save must not lose the order"
    with pytest.raises(StopRequested, match="asked for it"):
        steering.obey(order, 1, None)
    assert not (tmp_path / "stop").exists()


@pytest.mark.parametrize(("content", "keep"), [("", False), ("now\n", False), ("please keep it", True)])
def test_a_save_file_saves_without_stopping(tmp_path, content, keep):
    steering = alone(tmp_path)
    (tmp_path / "save").write_text(content)
    order = steering.agree(7)
    assert order == Order(save=True, keep=keep)
    steering.obey(order, 7, None)
    assert not (tmp_path / "save").exists()
    assert [path.name for path in tmp_path.glob("checkpoints/*")] == (["step-00000007.keep"] if keep else [])


def test_a_save_asked_for_during_the_save_is_not_lost(tmp_path):
    clock = Clock()
    steering = alone(tmp_path, clock)
    (tmp_path / "save").touch()
    order = steering.agree(1)
    (tmp_path / "save").unlink()
    (tmp_path / "another").touch()
    (tmp_path / "save").write_text("again")
    steering.obey(order, 1, None)
    clock.now_s += 1
    assert steering.agree(2).save


def test_rank_0_looks_once_a_second_and_the_others_never(tmp_path):
    clock = Clock()
    first, second = alone(tmp_path, clock), alone(tmp_path, clock, rank=1)
    assert first.agree(1) == second.agree(1) == Order()
    (tmp_path / "stop").touch()
    clock.now_s += 0.9
    assert first.agree(2).stop is None
    clock.now_s += 0.1
    assert first.agree(3).stop and second.agree(3).stop is None


def test_a_file_that_cannot_be_read_is_obeyed_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "stop").touch()

    def refuse(*words):
        raise PermissionError(13, "not for you")

    monkeypatch.setattr("builtins.open", refuse)
    assert alone(tmp_path).agree(1).stop == f"the file {tmp_path / 'stop'} asked for it"


def test_after_the_last_step_there_is_nothing_left_to_stop(tmp_path):
    (tmp_path / "stop").touch()
    steering = alone(tmp_path)
    with steering:
        os.kill(os.getpid(), signal.SIGTERM)
        order = steering.agree(TOTAL)
        assert order.stop is None
        steering.obey(order, TOTAL, None)
    assert not (tmp_path / "stop").exists(), "or the next run in this directory would stop at once"


# ---- time -----------------------------------------------------------------------------------------------------------


def steps_until_stop(steering: Steering, clock: Clock, seconds: list[float]) -> int:
    with steering:
        for number, step_s in enumerate(seconds, start=1):
            clock.now_s += step_s
            if (stop := steering.agree(number).stop) is not None:
                assert "time limit" in stop
                return number
    raise AssertionError("never stopped")


def test_the_time_limit_leaves_room_for_a_step_and_two_saves(tmp_path):
    clock = Clock()
    steering = alone(tmp_path, clock, seconds_left=100)
    steering.note_save(20)
    steering.note_save(9)
    # After step 5 it is second 50; another step, the end of a save that is on its way and one more would end at 100.
    assert steps_until_stop(steering, clock, [10] * 20) == 5


def test_the_longest_step_counts_but_not_the_first(tmp_path):
    clock = Clock()
    # 40 s of compiling, then steps of 5 s with one of 12 s (an evaluation): after 40 + 5 + 12 + 6 * 5 = 87 s no other fits.
    assert steps_until_stop(alone(tmp_path, clock, seconds_left=99), clock, [40, 5, 12, 5, 5, 5, 5, 5, 5, 5]) == 9


def test_as_long_as_no_other_step_is_known_the_first_one_counts(tmp_path):
    clock = Clock()
    assert steps_until_stop(alone(tmp_path, clock, seconds_left=99), clock, [60, 60]) == 1


@pytest.mark.parametrize(
    ("limit_s", "age_s", "environ", "left_s"),
    [
        (0, 100, {}, None),
        (3600, 100, {}, 3600 - 100 - 60),
        (100, 10, {}, 100 - 10 - 5),
        (0, 100, {"SLURM_JOB_END_TIME": "5000"}, 5000 - 2000 - 60),
        (3600, 100, {"SLURM_JOB_END_TIME": "5000"}, 5000 - 2000 - 60),
        (600, 100, {"SLURM_JOB_END_TIME": "5000"}, 600 - 100 - 30),
        (0, 100, {"SLURM_JOB_END_TIME": "Unknown"}, None),
    ],
)
def test_the_nearest_limit_counts(limit_s, age_s, environ, left_s):
    assert seconds_left(stop_after_s=limit_s, age_s=age_s, environ=environ, now_unix_s=2000) == left_s


# ---- launcher and lease ---------------------------------------------------------------------------------------------


def test_a_launcher_that_is_gone_is_noticed(tmp_path):
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    clock = Clock()
    steering = alone(tmp_path, clock, rank=1, launchers=[process_of(os.getpid()), process_of(launcher.pid)])
    assert steering.agree(1) == Order()
    launcher.kill()
    os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOWAIT)  # a launcher that nobody waits for is gone as well
    assert steering.agree(2) == Order()
    clock.now_s += 1
    assert steering.agree(3).stop == "the launcher above rank 1 is gone"
    launcher.wait()


def test_a_lost_lease_ends_the_run_unsaved_whatever_else_is_asked(tmp_path):
    (tmp_path / "stop").touch()
    lease = SimpleNamespace(is_lost=False)
    steering = alone(tmp_path, lease=lease)
    lease.is_lost = True
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(LeaseLost, match="another owner") as caught, steering:
        steering.agree(5)
    assert int(caught.value.exit_code) == 75 and not caught.value.every_rank_speaks
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN != before


def test_only_who_holds_the_lease_may_commit(tmp_path):
    answers = [True, False]
    assert alone(tmp_path, rank=1).may_commit()
    steering = alone(tmp_path, lease=SimpleNamespace(is_lost=False, is_mine=lambda: answers.pop(0)))
    assert steering.may_commit() and not steering.may_commit()


# ---- over ranks -----------------------------------------------------------------------------------------------------


def _steered(cluster, run) -> list:
    steering = Steering(run, rank=cluster.rank, total_steps=TOTAL)
    orders = [steering.agree(1)]
    if cluster.rank == 0:
        (run / "save").write_text("keep")
    steering._looked_at_s = -10.0
    orders.append(steering.agree(2))
    steering.obey(orders[-1], 2, None)
    with steering:
        if cluster.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        orders.append(steering.agree(3))
    started_s = time.perf_counter()
    for step in range(200):
        steering.agree(step)
    return [orders, (time.perf_counter() - started_s) / 200]


@pytest.mark.slow
def test_all_ranks_have_the_same_order(tmp_path):
    answers = run_ranks(2, _steered, tmp_path)
    orders = [Order(), Order(save=True, keep=True), Order(stop="SIGUSR1 came to rank 1")]
    assert [answer[0] for answer in answers] == [orders, orders]
    assert max(answer[1] for answer in answers) < 0.05, "a step must not feel it"
    assert (tmp_path / "checkpoints" / "step-00000002.keep").read_bytes() == b""


def test_reasons_fit_into_one_number():
    highest = max(steering_module.Why)
    assert (highest << 32 | 0xFFFF_FFFF) < 1 << 63 and highest is steering_module.Why.LEASE_LOST
