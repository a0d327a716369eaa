"""A checkpoint is whole or does not exist: what is chosen, what is refused, what is deleted, and what a kill leaves."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from vitscale.base.cluster import Cluster
from vitscale.base.errors import EnvironmentFault
from vitscale.base.files import sha256_file, write_json
from vitscale.training.checkpoint import (
    RECORD,
    SCHEMA_VERSION,
    TrainState,
    candidates,
    directory_name,
    find_checkpoint,
    has_rejected,
    kept_for_ever,
    newest_valid,
    sealed,
    to_delete,
    verify,
)
from vitscale.training.ema import Averages
from vitscale.training.pieces import Partition, whole
from vitscale.training.saving import save_checkpoint

SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def write_step(checkpoints: Path, step: int, **changes: Any) -> Path:
    """A committed step directory as save_checkpoint leaves it, with three small files."""
    path = checkpoints / directory_name(step)
    path.mkdir(parents=True)
    for number, name in enumerate(("mp_rank_00_model_states.pt", SHARD, "partition-00000.json")):
        (path / name).write_bytes(bytes([step % 256, number]) * 100)
    record = {
        "schema_version": SCHEMA_VERSION,
        "state": asdict(TrainState(step=step, position=96 * step, images_seen=96 * step)),
        "data": {"seed": 7},
        "world": 2,
        "zero_stage": 2,
        "files": [
            {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in sorted(path.iterdir())
        ],
    }
    write_json(path / RECORD, sealed(record | changes))
    return path


def flip_bit(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


# ---- which directories count --------------------------------------------------------------------------------------


def test_candidates_are_the_committed_directories_highest_step_first(tmp_path):
    for name in (
        "step-00000009",
        "step-00000100",
        "step-00000020",
        "step-123456789",
        "step-00000030.partial",
        "step-00000040.bad-1",
        "step-00000050.bad-12",
        "step-60",
        "step-00000070_universal",
        ".step-00000080",
        "latest",
    ):
        (tmp_path / name).mkdir()
    assert [p.name for p in candidates(tmp_path)] == ["step-123456789", "step-00000100", "step-00000020", "step-00000009"]
    assert candidates(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("name", "rejected"),
    [("step-00000040.bad-1", True), ("step-00000040.partial", False), ("step-00000040", False), ("step-40.bad-x", False)],
)
def test_only_what_was_put_aside_counts_as_rejected(tmp_path, name, rejected):
    assert not has_rejected(tmp_path / "absent")
    (tmp_path / name).mkdir()
    assert has_rejected(tmp_path) == rejected


def test_steps_sort_by_name_too():
    assert directory_name(1200) == "step-00001200"


# ---- what verification sees -----------------------------------------------------------------------------------------

DAMAGES = {
    "missing": (lambda path: (path / SHARD).unlink(), f"{SHARD} is missing"),
    "cut": (lambda path: os.truncate(path / SHARD, 199), f"{SHARD} has 199 bytes instead of 200"),
    "longer": (lambda path: os.truncate(path / SHARD, 201), f"{SHARD} has 201 bytes instead of 200"),
    "one flipped bit": (lambda path: flip_bit(path / SHARD, 120), f"{SHARD} does not have its recorded sha256"),
    "file of another step": (
        lambda path: shutil.copy(write_step(path.parent / "other", 3) / SHARD, path / SHARD),
        f"{SHARD} does not have its recorded sha256",
    ),
    "one shard too many": (
        lambda path: (path / "zero_pp_rank_2_mp_rank_00_optim_states.pt").touch(),
        "zero_pp_rank_2_mp_rank_00_optim_states.pt is not in its record",
    ),
    "one map too many": (lambda path: (path / "partition-00001.json").touch(), "partition-00001.json is not in its record"),
    "record missing": (lambda path: (path / RECORD).unlink(), f"{RECORD} is missing"),
    "record cut": (lambda path: os.truncate(path / RECORD, 300), f"{RECORD} is no valid JSON"),
    "record empty": (lambda path: os.truncate(path / RECORD, 0), f"{RECORD} is no valid JSON"),
    "record of a list": (lambda path: (path / RECORD).write_text("[]"), f"{RECORD} is not a record of schema 2"),
    "record of another step": (
        lambda path: shutil.copy(write_step(path.parent / "other", 3) / RECORD, path / RECORD),
        f"{RECORD} belongs to step-00000003",
    ),
    "record of another schema": (
        lambda path: write_json(path / RECORD, sealed({"schema_version": 3})),
        f"{RECORD} is not a record of schema 2",
    ),
    "record of an older schema, damaged": (
        lambda path: write_json(path / RECORD, {"schema_version": 1}),
        f"{RECORD} is not a record of schema 2",
    ),
    "record of an older schema": (
        lambda path: write_json(path / RECORD, sealed({"schema_version": 1})),
        f"{RECORD} is of an older schema than 2",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_seen_and_the_file_is_named(tmp_path, damage):
    path = write_step(tmp_path, 4)
    assert verify(path)[0] is None
    do, complaint = DAMAGES[damage]
    do(path)
    assert verify(path)[0] == complaint


def test_no_flipped_bit_of_the_record_goes_unseen(tmp_path):
    """One digit of `position` is another place in the order: the record must be as well guarded as the tensors."""
    path = write_step(tmp_path, 4)
    whole = (path / RECORD).read_bytes()
    for byte in range(len(whole)):
        flip_bit(path / RECORD, byte)
        assert verify(path)[0] is not None, f"byte {byte}"
        (path / RECORD).write_bytes(whole)


def test_notes_beside_a_checkpoint_do_no_harm(tmp_path):
    path = write_step(tmp_path, 4)
    (path / "README.txt").write_text("good one")
    (path / ".nfs0001").touch()
    complaint, record = verify(path)
    assert complaint is None
    assert record["state"]["position"] == 384


def test_newest_valid_takes_the_previous_one_and_renames_nothing(tmp_path):
    for step in (2, 4, 6):
        write_step(tmp_path, step)
    flip_bit(tmp_path / "step-00000006" / SHARD, 0)
    (tmp_path / "step-00000004" / RECORD).unlink()
    path, record = newest_valid(tmp_path)
    assert (path.name, record["state"]["step"]) == ("step-00000002", 2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000002", "step-00000004", "step-00000006"]


def test_newest_valid_says_what_is_wrong_with_each(tmp_path):
    with pytest.raises(EnvironmentFault, match="it is empty"):
        newest_valid(tmp_path)
    for step in (2, 4):
        (write_step(tmp_path, step) / SHARD).unlink()
    with pytest.raises(EnvironmentFault) as caught:
        newest_valid(tmp_path)
    assert f"step-00000004: {SHARD} is missing; step-00000002: {SHARD} is missing" in str(caught.value)


# ---- the choice of a start ------------------------------------------------------------------------------------------


def found_by(cluster: Cluster, checkpoints: Path) -> tuple[Any, list[str]]:
    """(chosen (directory, state, world, stage, data), None, or the error; what was said)."""
    said: list[str] = []
    try:
        saved = find_checkpoint(checkpoints, say=said.append)
    except EnvironmentFault as error:
        return str(error), said
    if saved is None:
        return None, said
    return (saved.directory.name, saved.state, saved.world, saved.zero_stage, saved.data), said


def starts(cluster: Cluster, place: Path) -> dict[str, Any]:
    """Several starts in one process group, because making one takes longer than all of them."""
    first_start, torn, ruined = place / "first", place / "torn", place / "ruined"
    return {
        "never": found_by(cluster, first_start),
        "partial": found_by(cluster, place / "partial"),
        "torn": found_by(cluster, torn),
        "torn again": found_by(cluster, torn),
        "ruined": found_by(cluster, ruined),
        "ruined again": found_by(cluster, ruined),
    }


def test_a_start_takes_the_newest_that_verifies_and_never_starts_a_damaged_run_afresh(tmp_path):
    (tmp_path / "partial" / "step-00000002.partial").mkdir(parents=True)
    for step in (2, 4, 6, 8):
        write_step(tmp_path / "torn", step)
    flip_bit(tmp_path / "torn/step-00000008" / SHARD, 7)
    os.truncate(tmp_path / "torn/step-00000006" / RECORD, 40)
    shutil.copytree(tmp_path / "torn/step-00000006", tmp_path / "torn/step-00000006.bad-1")
    for step in (2, 4):
        (write_step(tmp_path / "ruined", step) / SHARD).unlink()

    found = run_ranks(1, starts, tmp_path)[0]

    assert found["never"] == found["partial"] == (None, [])
    state = TrainState(step=4, position=384, images_seen=384)
    chosen, said = found["torn"]
    assert chosen == ("step-00000004", state, 2, 2, {"seed": 7})
    assert said == [
        f"checkpoint step-00000008 is not usable: {SHARD} does not have its recorded sha256; kept as step-00000008.bad-1",
        f"checkpoint step-00000006 is not usable: {RECORD} is no valid JSON; kept as step-00000006.bad-2",
    ]
    assert found["torn again"] == (chosen, [])
    assert sorted(os.listdir(tmp_path / "torn")) == [
        "step-00000002",
        "step-00000004",
        "step-00000006.bad-1",
        "step-00000006.bad-2",
        "step-00000008.bad-1",
    ]
    error, said = found["ruined"]
    assert "holds checkpoints but none is usable" in error
    assert [sentence.split()[1] for sentence in said] == ["step-00000004", "step-00000002"]
    assert found["ruined again"] == (error, [])


# ---- retention ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "keep_last", "keep_every", "deleted"),
    [
        ([], 2, 0, []),
        ([5], 1, 0, []),
        ([5, 4, 3, 2], 1, 0, [4, 3, 2]),
        ([5, 4, 3, 2], 2, 0, [3, 2]),
        ([5, 4, 3, 2], 9, 0, []),
        ([5, 4, 3, 2], 0, 0, [4, 3, 2]),
        ([50, 45, 40, 35, 30, 20], 2, 20, [35, 30]),
        ([50, 45, 40], 1, 1, []),
        ([7, 6, 5], 1, 100, [6, 5]),
    ],
)
def test_retention_never_takes_the_newest_nor_the_multiples(steps, keep_last, keep_every, deleted):
    committed = [Path("checkpoints") / directory_name(step) for step in steps]
    gone = to_delete(committed, keep_last=keep_last, keep_every=keep_every)
    assert gone == [Path("checkpoints") / directory_name(step) for step in deleted]


def test_a_file_beside_a_checkpoint_keeps_it(tmp_path):
    for step in (2, 4, 6):
        write_step(tmp_path, step)
    (tmp_path / "step-00000002.keep").touch()
    assert to_delete(candidates(tmp_path), keep_last=1, keep_every=0, kept=kept_for_ever(tmp_path)) == [
        tmp_path / "step-00000004"
    ]


# ---- kills ------------------------------------------------------------------------------------------------------------


class SmallEngine:
    """What save_checkpoint asks of an engine, with files like DeepSpeed's; the commit is the same for every engine."""

    def __init__(self, cluster: Cluster) -> None:
        self.rank, self.world = cluster.rank, cluster.world
        self.ds = SimpleNamespace(stage=0)
        self.partitions = [whole(name, parameter) for name, parameter in torch.nn.Linear(2, 2).named_parameters()]
        self.averages, self.averages_of = Averages(self.partitions, [0.9]), 0

    def stage_files(self, directory: Path, tag: str) -> list[tuple[str, Any]]:
        own = (f"zero_pp_rank_{self.rank}_mp_rank_00_optim_states.pt", {"flat": torch.rand(250)})
        return [own, ("mp_rank_00_model_states.pt", {"module": torch.rand(250)})] if self.rank == 0 else [own]

    def state_number(self, partition: Partition) -> int:
        return 0

    def loss_scaler(self) -> dict[str, Any]:
        return {"cur_scale": 4.0}


def save(cluster: Cluster, checkpoints: Path, step: int, fault: str = "") -> str:
    os.environ["VITSCALE_FAULT"] = fault
    engine: Any = SmallEngine(cluster)
    return save_checkpoint(engine, checkpoints, state=TrainState(step=step), data={"seed": 7}, last=2).name


@pytest.mark.slow
def test_two_ranks_commit_one_whole_checkpoint(tmp_path):
    assert run_ranks(2, save, tmp_path, 1) == ["step-00000001", "step-00000001"]
    assert verify(tmp_path / "step-00000001")[0] is None
    record = json.loads((tmp_path / "step-00000001" / RECORD).read_text())
    assert [entry["name"] for entry in record["files"]] == [
        "ema-00000.safetensors",
        "mp_rank_00_model_states.pt",
        "partition-00000.json",
        "partition-00001.json",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "zero_pp_rank_1_mp_rank_00_optim_states.pt",
    ]
    assert (record["world"], record["zero_stage"], record["data"]) == (2, 0, {"seed": 7})
    assert (record["ema"], record["loss_scaler"]) == ([0.9], {"cur_scale": 4.0})
    assert record["versions"].keys() == {"python", "torch", "deepspeed"}
    assert (tmp_path / "latest").read_text() == "step-00000001"
    for step in (2, 3):
        run_ranks(2, save, tmp_path, step)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000002", "step-00000003"]  # keep_last=2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "rank", "chosen"),
    [
        ("begin", 0, 1),
        ("begin", 1, 1),
        ("staged", 1, 1),
        ("files", 0, 1),
        ("files", 1, 1),
        ("commit", 0, 1),
        ("rename", 0, 1),
        ("latest", 0, 2),
    ],
)
def test_a_kill_during_the_second_save_leaves_a_whole_checkpoint(tmp_path, point, rank, chosen):
    run_ranks(2, save, tmp_path, 1)
    with pytest.raises(RuntimeError):
        run_ranks(2, save, tmp_path, 2, f"kill@checkpoint.{point}:rank={rank}:step=2")
    (found, said), (found_by_other, _) = run_ranks(2, found_by, tmp_path)
    assert found == found_by_other
    assert (found[0], said) == (directory_name(chosen), [])
    # The next start goes on: the same step is saved, and nothing half-written stays behind.
    run_ranks(2, save, tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == ["latest", directory_name(chosen), "step-00000003"]
    assert verify(tmp_path / "step-00000003")[0] is None
