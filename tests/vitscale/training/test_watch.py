"""The watch of one rank ends a process that does not move, and only that one."""

import ctypes
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.ranks import run_ranks
from vitscale.base.cluster import Cluster
from vitscale.base.errors import EnvironmentFault
from vitscale.base.host import is_alive, process_of
from vitscale.training import preflight
from vitscale.training import watch as watch_module
from vitscale.training.metrics import drop_lines_past, read_lines
from vitscale.training.peers import Peer
from vitscale.training.watch import Watch

HERE = (Peer(rank=0, host="alpha", process=None),)


def watched(run: Path, act: Callable[[Watch], None], *, timeout_s: float) -> tuple[int, str]:
    """(exit code, what was said on stderr) of a process that does `act` under a watch."""
    said = run / "said.txt"
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
            watch = Watch(run, attempt=3, peers=HERE, rank=0, timeout_s=timeout_s, workers=list)
            watch.start()  # without the barrier at the end of `with`
            act(watch)
            os._exit(0)
        finally:
            os._exit(99)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), said.read_text()


def stands_still(watch: Watch) -> None:
    watch.beat("forward", step=4, micro_batch=1)
    time.sleep(60)


def moves(watch: Watch) -> None:
    for number in range(30):
        watch.beat("data" if number % 2 else "forward", step=number // 10)
        time.sleep(0.1)


def waits_for_files(watch: Watch) -> None:
    watch.beat("flush", step=4)
    time.sleep(2.5)


def holds_the_interpreter(watch: Watch) -> None:
    watch.beat("forward", step=4)
    time.sleep(0.2)  # the thread looks at least once
    ctypes.PyDLL(None).sleep(60)


def stops(watch: Watch) -> None:
    watch.beat("forward", step=4)
    os.kill(os.getpid(), signal.SIGSTOP)


def never_begins(watch: Watch) -> None:
    time.sleep(1.5)


def test_what_does_not_move_ends_with_75_and_leaves_its_stacks(tmp_path):
    started_s = time.monotonic()
    code, said = watched(tmp_path, stands_still, timeout_s=1.0)
    assert code == 75 and 1.0 < time.monotonic() - started_s < 10
    assert "error: rank 0 on alpha has been in forward of step 4 for 1 s; stacks" in said
    stacks = (tmp_path / "stacks" / "attempt-003" / "rank-00000.txt").read_text()
    assert "micro_batch: 1\n" in stacks and "in stands_still" in stacks
    assert json.loads((tmp_path / "status.json").read_text())["phase"] == "hung"


@pytest.mark.parametrize(("act", "timeout_s"), [(moves, 1.5), (never_begins, 0.5), (waits_for_files, 0.8)])
def test_what_moves_or_has_not_begun_goes_on(tmp_path, act, timeout_s):
    assert watched(tmp_path, act, timeout_s=timeout_s) == (0, "")
    assert not (tmp_path / "stacks").exists()


def test_files_that_are_waited_for_have_a_limit_too(tmp_path):
    assert watched(tmp_path, waits_for_files, timeout_s=0.1)[0] == 75


def test_a_lock_of_the_interpreter_that_is_never_free_ends_the_process_too(tmp_path, monkeypatch):
    monkeypatch.setattr(watch_module, "ANSWER_S", (0.5, 60.0))
    started_s = time.monotonic()
    code, said = watched(tmp_path, holds_the_interpreter, timeout_s=1.0)
    assert code == 1 and 1.4 < time.monotonic() - started_s < 10
    assert "in holds_the_interpreter" in said


def test_a_stopped_process_is_killed_by_its_guardian(tmp_path, monkeypatch):
    monkeypatch.setattr(watch_module, "ANSWER_S", (0.5, 60.0))
    code, said = watched(tmp_path, stops, timeout_s=1.0)
    assert code == -signal.SIGKILL
    assert "error: rank 0 on alpha gave no sign of life for 2 s" in said


def names_its_guardian(watch: Watch) -> None:
    assert watch._guardian is not None
    os.write(2, str(watch._guardian.pid).encode())


def test_a_guardian_ends_with_its_process(tmp_path):
    code, said = watched(tmp_path, names_its_guardian, timeout_s=60.0)
    assert code == 0
    deadline_s = time.monotonic() + 5
    while (process := process_of(int(said))) is not None and is_alive(process):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_guardian_takes_its_leave_while_a_worker_still_lives(tmp_path):
    """A forked process holds the pipe to the guardian open."""

    def forks_and_ends(watch: Watch) -> None:
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        watch.__exit__(ValueError, None, None)  # as after an error: without the barrier
        os.kill(worker, signal.SIGKILL)

    started_s = time.monotonic()
    assert watched(tmp_path, forks_and_ends, timeout_s=60.0) == (0, "")
    assert time.monotonic() - started_s < 10


def test_a_step_timeout_of_zero_watches_nothing(tmp_path):
    with Watch(tmp_path, attempt=1, peers=HERE, rank=0, timeout_s=0, workers=list) as watch:
        watch.beat("data", step=1)
    assert watch._thread is None and watch._guardian is None


def test_events_of_the_machine_outlive_a_resume(tmp_path):
    path = tmp_path / "events.jsonl"
    events = [{"step": 9, "event": event} for event in ("bad_image", "hung", "worker_died")]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    drop_lines_past(path, 5)
    assert [line["event"] for line in read_lines(path)] == ["hung", "worker_died"]


def _with_other_code(cluster: Cluster) -> str:
    if cluster.rank == 1:
        preflight.program_versions = lambda: {"python": "3", "torch": "2", "deepspeed": "0", "code": "bb"}
    else:
        preflight.program_versions = lambda: {"python": "3", "torch": "2", "deepspeed": "0", "code": "aa"}
    try:
        preflight.require_equal_hosts(cluster, say=lambda sentence: None)
    except EnvironmentFault as fault:
        return str(fault)
    return ""


@pytest.mark.slow
def test_ranks_with_other_code_are_refused_on_all_ranks():
    said = run_ranks(2, _with_other_code)
    assert said[0] == said[1] and "expected one source code of vitscale (its hash) on all hosts, got aa on" in said[0]
