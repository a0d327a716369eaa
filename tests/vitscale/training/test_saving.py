"""A save beside the training: what it holds, what a failure leaves, when the next one is due."""

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.vitscale.training.test_checkpoint import SmallEngine
from vitscale.base.cluster import Cluster
from vitscale.base.errors import TransientFault
from vitscale.base.files import sha256_file
from vitscale.training.checkpoint import RECORD, TrainState, candidates, verify
from vitscale.training.saving import FIRST_SAVE_AFTER_STEPS, Outcome, Retention, Saver
from vitscale.training.staging import HostMemory

# ---- copies -----------------------------------------------------------------------------------------------------------


def test_copies_are_equal_have_memory_of_their_own_and_use_it_again():
    memory = HostMemory()
    flat = torch.arange(12.0)
    content = {"a": flat[2:6], "b": [flat.view(3, 4).t(), {"c": torch.tensor(3, dtype=torch.bfloat16)}], "d": ("text", 7)}
    first = memory.staged(content)
    assert torch.equal(first["a"], flat[2:6]) and first["a"].untyped_storage().nbytes() == 16  # not of the whole flat
    assert torch.equal(first["b"][0], flat.view(3, 4).t()) and first["b"][1]["c"].dtype == torch.bfloat16
    assert first["d"] == ("text", 7)
    flat.zero_()
    assert first["a"].tolist() == [2.0, 3.0, 4.0, 5.0]
    again = memory.staged(content)
    assert again["a"].data_ptr() == first["a"].data_ptr() and not again["a"].any()


# ---- saves --------------------------------------------------------------------------------------------------------------


class LiveEngine(SmallEngine):
    """Its state is one tensor, which DeepSpeed's file shows as it is."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.weights = torch.full((1000,), float(self.rank))

    def stage_files(self, directory: Path, tag: str) -> list[tuple[str, Any]]:
        return [(f"zero_pp_rank_{self.rank}_mp_rank_00_optim_states.pt", {"flat": self.weights})]


def saver_of(engine: Any, place: Path, **more: Any) -> tuple[Saver, list[Outcome]]:
    told: list[Outcome] = []
    return Saver(engine, place, data={}, retention=Retention(last=2), told=told.append, **more), told


def stored(place: Path, step: int, rank: int) -> float:
    path = place / f"step-{step:08d}" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    return float(torch.load(path, weights_only=True)["flat"].unique().item())


def updated_meanwhile(cluster: Cluster, place: Path) -> dict[str, Any]:
    engine = LiveEngine(cluster)
    saver, told = saver_of(engine, place)
    go_on = threading.Event()
    write = saver._write

    def late(*args: Any) -> Any:
        go_on.wait()
        return write(*args)

    saver._write = late  # type: ignore[method-assign]
    state = TrainState(step=1, segments=[{"from": 0}])
    saver.begin(state)
    engine.weights.fill_(77.0)  # the next update
    engine.averages.of(0.9, engine.partitions[0].key).fill_(77.0)
    state.step, state.segments[0]["from"] = 2, 9
    writing = saver.is_writing, candidates(place)
    go_on.set()
    saver.wait(required=True)
    record = json.loads((place / "step-00000001" / RECORD).read_text())
    # Waited for at once: the same files but for what has changed.
    saver.begin(state)
    saver.wait(required=True)
    return {
        "writing": writing,
        "state": (record["state"]["step"], record["state"]["segments"]),
        "values": [stored(place, step, engine.rank) for step in (1, 2)],
        "told": [(outcome.step, outcome.complaint) for outcome in told],
        "times": all(outcome.blocked_s > 0 and outcome.flush_s > 0 and outcome.bytes > 8000 for outcome in told),
        "averages": sha256_file(place / "step-00000001" / "ema-00000.safetensors"),
        "valid": [verify(path)[0] for path in candidates(place)],
    }


@pytest.mark.slow
def test_an_update_while_files_are_written_does_not_reach_them(tmp_path):
    for rank, found in enumerate(run_ranks(2, updated_meanwhile, tmp_path)):
        assert found["writing"] == (True, []) and found["state"] == (1, [{"from": 0}])
        assert found["values"] == [float(rank), 77.0] and found["valid"] == [None, None]
        assert found["told"] == [(1, None), (2, None)] and found["times"]


def failing_on(cluster: Cluster, place: Path, where: str, failing_rank: int) -> dict[str, Any]:
    """Three saves, the second of which fails on one rank."""
    engine: Any = LiveEngine(cluster)
    saver, told = saver_of(engine, place)
    saver.begin(TrainState(step=1))
    saver.wait(required=True)
    whole = getattr(saver, where)

    def fail(*args: Any) -> Any:
        if where == "_write":
            whole(*args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place / "disk"))

    if engine.rank == failing_rank:
        setattr(saver, where, fail)
    saver.begin(TrainState(step=2))
    saver.wait()  # training goes on
    left = sorted(os.listdir(place))
    with pytest.raises(TransientFault) as caught:
        saver.wait(required=True)
    setattr(saver, where, whole)
    saver.begin(TrainState(step=3))
    saver.wait(required=True)
    return {"told": told, "left": left, "said": str(caught.value), "newest": candidates(place)[0].name}


@pytest.mark.slow
@pytest.mark.parametrize(("where", "failing_rank"), [("_prepare", 0), ("_write", 0), ("_write", 1), ("_commit", 0)])
def test_a_failed_save_is_told_on_all_ranks_and_replaces_nothing(tmp_path, where, failing_rank):
    by_rank = run_ranks(2, failing_on, tmp_path, where, failing_rank)
    assert by_rank[0]["left"] == ["latest", "step-00000001"]  # nothing half-written stays
    for found in by_rank:
        first, second, third = found["told"]
        assert (first.complaint, third.complaint) == (None, None)
        assert second.complaint == f"rank {failing_rank}: No space left on device (ENOSPC) at {tmp_path / 'disk'}"
        assert found["said"].startswith(f"the last checkpoint, of step 2, could not be saved: {second.complaint}; mend that")
        assert found["newest"] == "step-00000003"


def defect(cluster: Cluster, place: Path) -> str:
    engine: Any = LiveEngine(cluster)
    saver, told = saver_of(engine, place)
    if engine.rank == 1:
        saver._write = lambda *args: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    saver.begin(TrainState(step=1))
    try:
        saver.wait()
    except ZeroDivisionError:
        return "raised"
    return str(told[0].complaint)


@pytest.mark.slow
def test_a_defect_is_raised_where_it_is_and_told_elsewhere(tmp_path):
    assert run_ranks(2, defect, tmp_path) == ["rank 1: ZeroDivisionError('division by zero')", "raised"]
    assert candidates(tmp_path) == []


def fenced(cluster: Cluster, place: Path) -> Outcome:
    engine: Any = LiveEngine(cluster)
    saver, told = saver_of(engine, place, may_commit=lambda: False)
    saver.begin(TrainState(step=1))
    saver.wait()
    return told[0]


@pytest.mark.slow
def test_who_has_lost_the_run_commits_nothing(tmp_path):
    for outcome in run_ranks(2, fenced, tmp_path):
        assert "another start has taken over this run" in str(outcome.complaint)
    assert candidates(tmp_path) == [] and not (tmp_path / "latest").exists()


def replaced(cluster: Cluster, place: Path, fault: str) -> None:
    """The same step again, as after a rollback."""
    os.environ["VITSCALE_FAULT"] = ""
    engine: Any = LiveEngine(cluster)
    saver, _ = saver_of(engine, place)
    saver.begin(TrainState(step=1, position=5))
    saver.wait(required=True)
    os.environ["VITSCALE_FAULT"] = fault
    saver.begin(TrainState(step=1, position=9))
    saver.wait(required=True)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "position"), [("", 9), ("kill@checkpoint.rename", 5), ("kill@checkpoint.latest", 9)])
def test_a_step_saved_again_is_the_old_one_or_the_new_one(tmp_path, fault, position):
    if fault:
        with pytest.raises(RuntimeError):
            run_ranks(1, replaced, tmp_path, fault)
    else:
        run_ranks(1, replaced, tmp_path, fault)
    (path,) = candidates(tmp_path)
    complaint, record = verify(path)
    assert complaint is None and record["state"]["position"] == position


# ---- when -----------------------------------------------------------------------------------------------------------


def due_steps(cluster: Cluster, place: Path) -> list[int]:
    engine: Any = LiveEngine(cluster)
    saver, _ = saver_of(engine, place, start_step=100, between_failures_s=1e5)
    saved = []
    for step in range(101, 140):
        if saver.is_due(step):
            saver.begin(TrainState(step=step))
            saved.append(step)
    saver.wait(required=True)
    return saved


@pytest.mark.slow
def test_an_automatic_save_comes_soon_after_the_start_and_on_all_ranks_alike(tmp_path):
    first, second = run_ranks(2, due_steps, tmp_path)
    assert first == second
    assert first == [100 + FIRST_SAVE_AFTER_STEPS]  # the next one pays after minutes of steps
