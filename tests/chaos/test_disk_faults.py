"""A disk that is full, broken or closed at any call of a save: the checkpoint before stays and training goes on."""

import secrets
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed

from tests.helpers import small_engine
from tests.helpers.ranks import run_ranks
from tests.helpers.saves import TINY
from tests.helpers.strace import attached, require_strace
from vitscale.base.cluster import Cluster
from vitscale.training.checkpoint import TrainState, candidates, directory_name, newest_valid
from vitscale.training.collectives import from_rank_zero
from vitscale.training.saving import Outcome, Retention, Saver

pytestmark = pytest.mark.slow

WRITES = "write,writev,pwrite64,pwritev"
OPENS, RENAMES, REMOVES = "openat,open,creat", "rename,renameat,renameat2", "unlink,unlinkat,rmdir"


class Fault(NamedTuple):
    """System calls of one rank that fail while a save is made."""

    rank: int
    calls: str
    error: str
    of: str
    """Path below `checkpoints`; NEW stands for the directory of the step."""
    saved: bool | None = False
    """Whether a checkpoint comes of it all the same; None: it may or may not."""


RECORD_PART = "NEW.partial/.vitscale.json.tmp-abab"
SHARDS = {rank: f"NEW.partial/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)}
FAULTS = [
    *[Fault(0, "mkdir,mkdirat", error, "NEW.partial") for error in ("EACCES", "EROFS", "ENOSPC", "EDQUOT", "EIO")],
    *[
        Fault(rank, OPENS, error, shard)
        for rank, shard in SHARDS.items()
        for error in ("EACCES", "EROFS", "ENOSPC", "EDQUOT", "EIO")  # ENOSPC here: no inodes
    ],
    *[Fault(rank, WRITES, error, shard) for rank, shard in SHARDS.items() for error in ("ENOSPC", "EDQUOT", "EIO")],
    *[Fault(0, WRITES, error, "NEW.partial/mp_rank_00_model_states.pt") for error in ("ENOSPC", "EDQUOT", "EIO")],
    *[Fault(1, WRITES, error, "NEW.partial/partition-00001.json") for error in ("ENOSPC", "EDQUOT", "EIO")],
    *[Fault(rank, "fsync", error, shard) for rank, shard in SHARDS.items() for error in ("ENOSPC", "EDQUOT", "EIO")],
    Fault(1, "fsync", "EIO", "NEW.partial/ema-00001.safetensors"),
    Fault(1, "read", "EIO", SHARDS[1]),
    Fault(0, OPENS, "ENOSPC", RECORD_PART),
    Fault(0, WRITES, "ENOSPC", RECORD_PART),
    Fault(0, "fsync", "EIO", RECORD_PART),
    Fault(0, RENAMES, "EIO", RECORD_PART),
    Fault(0, "fsync", "EIO", "NEW.partial"),
    *[Fault(0, RENAMES, error, "NEW.partial") for error in ("EACCES", "EROFS", "ENOSPC", "EDQUOT", "EIO")],
    Fault(0, "fsync", "EIO", ".", saved=None),
    Fault(0, OPENS, "ENOSPC", ".latest.tmp-abab", saved=True),
    Fault(0, RENAMES, "EIO", ".latest.tmp-abab", saved=True),
    Fault(0, RENAMES, "EACCES", "OLDEST", saved=True),
    Fault(0, REMOVES, "EACCES", "OLDEST.partial", saved=True),
]


class Seen(NamedTuple):
    """What rank 0 sees after a save that met a fault, and after the next one."""

    outcomes: tuple[Outcome, Outcome]
    newest: tuple[str, str]
    leftovers: tuple[list[str], list[str]]
    losses: list[float]


def meet(cluster: Cluster, checkpoints: Path, faults: list[Fault]) -> list[Seen]:
    """One fault after the other, each followed by a step of training and a save without fault."""
    config, ds = small_engine.settings(2, cluster.world, *TINY)
    engine = small_engine.make(config, ds)
    told: list[Outcome] = []
    saver = Saver(engine, checkpoints, data={"seed": 7}, retention=Retention(last=2), told=told.append)
    step = 0

    def save_next() -> None:
        nonlocal step
        step += 1
        losses.extend(small_engine.train(engine, config, range(step - 1, step)))
        saver.begin(TrainState(step=step))
        saver.wait()
        if cluster.rank == 0:  # the only one that clears, so nothing goes away while it looks
            newest.append(newest_valid(checkpoints)[0].name)
            leftovers.append(sorted(p.name for p in checkpoints.rglob("*") if ".partial" in p.name or ".tmp-" in p.name))
        torch.distributed.barrier()

    losses: list[float] = []
    newest: list[str] = []
    leftovers: list[list[str]] = []
    save_next()
    save_next()
    found = []
    for fault in faults:
        losses, newest, leftovers = [], [], []
        names = {"NEW": directory_name(step + 1), "OLDEST": candidates(checkpoints)[-1].name}
        path = checkpoints / fault.of.replace("NEW", names["NEW"]).replace("OLDEST", names["OLDEST"])
        inject = (
            "-o",
            "/dev/null",
            "-P",
            str(path),
            "-e",
            f"trace={fault.calls}",
            "-e",
            f"inject={fault.calls}:error={fault.error}",
        )
        if cluster.rank == fault.rank:
            with attached(*inject):
                save_next()
        else:
            save_next()
        save_next()
        if cluster.rank == 0:
            found.append(Seen((told[-2], told[-1]), (newest[0], newest[1]), (leftovers[0], leftovers[1]), losses))
    assert [o.complaint for o in from_rank_zero(told)] == [o.complaint for o in told], "all ranks hear the same"
    engine.close()
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    require_strace()
    place = tmp_path_factory.mktemp("faults") / "checkpoints"
    patch = pytest.MonkeyPatch()
    patch.setattr(secrets, "token_hex", lambda count: "abab")  # names of temporary files, known beforehand
    found = run_ranks(2, meet, place, FAULTS)[0]
    patch.undo()
    return found


def test_there_are_forty_of_them():
    assert len(FAULTS) >= 40


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=lambda n: "-".join(map(str, FAULTS[n][:4])))
def test_the_checkpoint_before_stays_and_the_next_save_works(seen, number):
    fault, (outcomes, newest, leftovers, losses) = FAULTS[number], seen[number]
    failed, good = outcomes
    this, before = directory_name(failed.step), directory_name(failed.step - 1)
    if fault.saved is not None:
        assert (failed.complaint is None) == fault.saved
        assert newest[0] == (this if fault.saved else before)
    else:
        assert newest[0] in (this, before)
    if failed.complaint is not None:
        assert failed.complaint.startswith(f"rank {fault.rank}: ") and fault.error in failed.complaint
        name = fault.of.replace("NEW", this).rpartition("/")[2].removeprefix(".").partition(".tmp-")[0]
        assert name in failed.complaint, f"expected the file in {failed.complaint!r}"
    assert len({name.partition("/")[0] for name in leftovers[0]}) <= 1, leftovers[0]
    assert good.complaint is None and newest[1] == directory_name(good.step) and leftovers[1] == []
    assert all(loss == loss for loss in losses) and len(losses) == 2, "training went on"
