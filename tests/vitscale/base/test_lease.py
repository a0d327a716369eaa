"""One owner per run directory: of many takers one wins, the dead are followed at once, and who lost the lease cannot commit."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitscale.base import lease as lease_module
from vitscale.base.errors import EnvironmentFault, ExitCode
from vitscale.base.host import process_of
from vitscale.base.lease import LEASE, Lease, Owner, highest, take_lease, this_process


def elsewhere(**changes: object) -> Owner:
    """An owner on another host."""
    return dataclasses.replace(this_process(), **{"host": "other", "boot_id": "another boot", **changes})


def silent_for(run: Path, seconds: float) -> None:
    """Let the heartbeat of the ruling token be this old."""
    (token,) = run.glob(".lease-*")
    at_s = time.time() - seconds
    os.utime(token, (at_s, at_s))


def forked(function: object) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = function()  # type: ignore[operator]
        finally:
            os._exit(code)
    return pid


def code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ended_owner(run: Path) -> None:
    """A process of this host takes the lease and is gone without releasing it."""

    def take() -> int:
        take_lease(run)
        return 0

    assert code_of(forked(take)) == 0


# ---- who may take it ------------------------------------------------------------------------------------------------


def test_the_record_names_its_owner(tmp_path):
    with take_lease(tmp_path) as lease:
        record = json.loads((tmp_path / LEASE).read_text())
        me = process_of(os.getpid())
        assert (record["pid"], record["started_ticks"], record["generation"]) == (os.getpid(), me.started_ticks, 1)
        assert record["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        assert record["host"] == os.uname().nodename and record["owner_id"] == lease.owner.owner_id
        assert abs(record["heartbeat_unix_s"] - time.time()) < 5
    assert not (tmp_path / LEASE).exists()


def test_a_living_owner_on_this_host_is_named_at_once(tmp_path):
    with take_lease(tmp_path):
        started_s = time.monotonic()
        with pytest.raises(EnvironmentFault) as caught:
            take_lease(tmp_path)
        assert time.monotonic() - started_s < 1
    assert f"process {os.getpid()} on {os.uname().nodename} since 2" in str(caught.value)
    assert str(tmp_path / "stop") in str(caught.value) and caught.value.exit_code == ExitCode.ENVIRONMENT
    assert str(caught.value).count(". ") == 0


def test_a_stopped_owner_lives_and_is_said_to_be_stopped(tmp_path):
    def take_and_wait() -> int:
        take_lease(tmp_path)
        os.kill(os.getpid(), signal.SIGSTOP)
        return 0

    pid = forked(take_and_wait)
    os.waitpid(pid, os.WUNTRACED)
    with pytest.raises(EnvironmentFault, match="it is stopped: state T"):
        take_lease(tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    take_lease(tmp_path)


def test_after_a_release_the_next_generation_begins(tmp_path):
    for generation in (1, 2, 3):
        with take_lease(tmp_path) as lease:
            assert lease.generation == generation
    assert [path.name for path in tmp_path.iterdir()] == [".lease-000003"]


def test_an_owner_whose_process_is_gone_is_followed_at_once(tmp_path):
    ended_owner(tmp_path)
    said: list[str] = []
    assert take_lease(tmp_path, say=said.append, sleep=pytest.fail).generation == 2
    assert len(said) == 1 and "is gone; this process takes over" in said[0]


def test_an_owner_that_has_ended_but_was_not_waited_for_is_dead(tmp_path):
    def take() -> int:
        take_lease(tmp_path)
        return 0

    pid = forked(take)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert take_lease(tmp_path, sleep=pytest.fail).generation == 2
    os.waitpid(pid, 0)


def test_a_later_process_with_the_pid_of_the_owner_is_not_the_owner(tmp_path):
    me = this_process()
    take_lease(tmp_path, me=dataclasses.replace(me, started_ticks=me.started_ticks - 1))
    assert take_lease(tmp_path, sleep=pytest.fail).generation == 2


@pytest.mark.parametrize(
    ("owner", "dead_after_s"),
    [
        (elsewhere(), lease_module.DEAD_AFTER_S),
        (elsewhere(host=this_process().host), lease_module.REBOOTED_AFTER_S),  # the host was booted since
        (elsewhere(host=this_process().host, boot_id=this_process().boot_id, pid_namespace="of a container", pid=1), 60.0),
    ],
)
def test_an_owner_elsewhere_is_dead_after_a_time_without_heartbeat(tmp_path, monkeypatch, owner, dead_after_s):
    take_lease(tmp_path, me=owner)
    silent_s = [0.0]
    monkeypatch.setattr(lease_module, "file_system_now_ns", lambda run: highest(run).heartbeat_ns + int(silent_s[0] * 1e9))

    def sleep(seconds: float) -> None:
        silent_s[0] += seconds

    assert take_lease(tmp_path, sleep=sleep).generation == 2
    assert dead_after_s < silent_s[0] <= dead_after_s + 1


def test_a_heartbeat_seen_while_waiting_is_a_sign_of_life(tmp_path):
    take_lease(tmp_path, me=elsewhere())
    silent_for(tmp_path, 50)
    with pytest.raises(EnvironmentFault, match="on other since"):
        take_lease(tmp_path, sleep=lambda seconds: silent_for(tmp_path, 0))


def test_the_clock_of_this_host_decides_nothing(tmp_path, monkeypatch):
    take_lease(tmp_path, me=elsewhere())
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(lease_module, "file_system_now_ns", lambda run: highest(run).heartbeat_ns + 61 * 10**9)
    assert take_lease(tmp_path, sleep=pytest.fail).generation == 2


def test_an_owner_elsewhere_that_lives_refuses_within_five_seconds(tmp_path, monkeypatch):
    """The owner is a process of another host as far as its record says; the heartbeat is real."""

    def own() -> int:
        with take_lease(tmp_path, me=elsewhere()):
            time.sleep(30)
        return 0

    pid = forked(own)
    while highest(tmp_path) is None:
        time.sleep(0.01)
    said: list[str] = []
    started_s = time.monotonic()
    with pytest.raises(EnvironmentFault, match="on other since"):
        take_lease(tmp_path, say=said.append)
    assert time.monotonic() - started_s < 5
    assert "waiting for a heartbeat" in said[0]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


# ---- races ----------------------------------------------------------------------------------------------------------

TAKERS = 3


@pytest.mark.parametrize("hard_links", [True, False])
def test_of_takers_that_race_exactly_one_wins(tmp_path, monkeypatch, hard_links):
    """50 rounds of processes that start together, over a lease that is absent, released or of a dead owner."""
    if not hard_links:
        monkeypatch.setattr(os, "link", _no_links)
    for number in range(50 if hard_links else 10):
        run = tmp_path / str(number)
        run.mkdir()
        if number % 3:
            ended_owner(run) if number % 3 == 1 else take_lease(run).release()
        pids = _race(run)
        assert highest(run).owner.pid in pids
        assert len(list(run.glob(".*"))) == 1, "no other token and no temporary file is left"


def _race(run: Path) -> list[int]:
    """Let takers loose at once; one must win, and still own the run when all others have been refused."""
    begin, start = os.pipe()
    tried, won = os.pipe()
    end, finish = os.pipe()

    def take() -> int:
        os.close(start)
        os.close(finish)
        os.read(begin, 1)  # nothing comes: it returns when the other end is closed
        try:
            lease = take_lease(run, sleep=lambda seconds: time.sleep(0.01))
        except EnvironmentFault:
            return 3
        os.write(won, b"w")
        os.read(end, 1)
        return 0 if lease.is_mine() else 4

    pids = [forked(take) for _ in range(TAKERS)]
    for descriptor in (begin, end, won, start):
        os.close(descriptor)
    losers = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(TAKERS - 1)]
    os.close(finish)
    winner = os.waitstatus_to_exitcode(os.wait()[1])
    assert (os.read(tried, TAKERS), losers, winner) == (b"w", [3] * (TAKERS - 1), 0)
    os.close(tried)
    return pids


def _no_links(source: object, target: object) -> None:
    raise PermissionError(1, "no hard links here")


def test_a_generation_that_was_given_and_deleted_is_not_given_again(tmp_path, monkeypatch):
    """A taker judges, sleeps, and wakes up when two others have come and the file it makes is free again."""
    ended_owner(tmp_path)
    judge, others = lease_module.is_free, []

    def judge_and_sleep(token, me):
        verdict = judge(token, me)
        if not others and verdict:
            others.append("begun")
            take_lease(tmp_path).release()
            others.append(take_lease(tmp_path, me=this_process()))
        return verdict

    monkeypatch.setattr(lease_module, "is_free", judge_and_sleep)
    with pytest.raises(EnvironmentFault, match="is being trained"):
        take_lease(tmp_path)
    assert others[1].generation == 3 and others[1].is_mine()


# ---- who lost it ----------------------------------------------------------------------------------------------------


def test_a_fenced_owner_cannot_commit(tmp_path):
    old = take_lease(tmp_path, me=elsewhere())
    assert old.is_mine()
    silent_for(tmp_path, 61)
    new = take_lease(tmp_path)
    assert not old.is_mine() and old.is_lost and new.is_mine()
    old.release()  # takes nothing from the new one
    assert new.is_mine() and json.loads((tmp_path / LEASE).read_text())["owner_id"] == new.owner.owner_id
    new.release()
    assert not old.is_mine()


def test_an_owner_that_was_only_late_keeps_the_run(tmp_path, monkeypatch):
    """It shows a heartbeat between the judgement of the taker and the taker's token, and asks before its commit."""
    old = take_lease(tmp_path, me=elsewhere())
    silent_for(tmp_path, 61)
    answers = []
    link = os.link

    def late(source, target):
        if not answers:
            answers.append(old.is_mine())
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        os.utime(tmp_path / ".lease-000001")

    with pytest.raises(EnvironmentFault):
        take_lease(tmp_path, sleep=sleep)
    assert answers == [True] and old.is_mine()


def test_a_lost_lease_is_noticed_by_the_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.02)
    with take_lease(tmp_path, me=elsewhere()) as old:
        time.sleep(0.1)
        assert not old.is_lost
        os.link(_written(tmp_path / "foreign", elsewhere()), tmp_path / ".lease-000002")
        limit_s = time.monotonic() + 5
        while not old.is_lost and time.monotonic() < limit_s:
            time.sleep(0.01)
        assert old.is_lost


def _written(path: Path, owner: Owner) -> Path:
    path.write_text(json.dumps(dataclasses.asdict(owner)))
    return path


def test_the_heartbeat_goes_on_and_is_told_in_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(lease_module, "RECORD_EVERY_S", 0.1)
    with take_lease(tmp_path):
        told = json.loads((tmp_path / LEASE).read_text())["heartbeat_unix_s"]
        silent_for(tmp_path, 1000)
        time.sleep(0.3)
        assert lease_module.file_system_now_ns(tmp_path) - highest(tmp_path).heartbeat_ns < 10**9
        assert json.loads((tmp_path / LEASE).read_text())["heartbeat_unix_s"] > told


def test_an_unreadable_token_is_waited_for(tmp_path):
    (tmp_path / ".lease-000004").write_text("{")
    silent_for(tmp_path, 61)
    assert take_lease(tmp_path, sleep=pytest.fail).generation == 5


def test_the_lease_needs_no_torch():
    code = "import sys, vitscale.base.lease, vitscale.base.host; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)}, timeout=30)


def test_a_lease_is_a_context_that_gives_the_run_back(tmp_path):
    with pytest.raises(KeyError), take_lease(tmp_path) as lease:
        assert isinstance(lease, Lease)
        raise KeyError("what ended the run")
    assert highest(tmp_path).owner.released
