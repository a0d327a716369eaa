"""Checkpoints that are whole or do not exist.

RUN/checkpoints/
  step-00001200/                  one committed checkpoint, made by renaming step-00001200.partial
    zero_pp_rank_*, mp_rank_*     DeepSpeed's own sharded files
    partition-RRRRR.json          where this rank's flat partitions hold which slice of which parameter
    ema-RRRRR.safetensors         the moving averages of these partitions, where any are kept
    vitscale.json                 written last: state, world, versions, every file with size and sha256, and the sha256
                                  of the record itself
  step-00001100.bad-1/            failed its own checksums; kept to look at, never loaded
  latest                          for DeepSpeed's tools only; nothing here reads it

Saving: rank 0 clears every old .partial | all write | each hashes and flushes what it wrote | rank 0 writes vitscale.json,
renames, then replaces `latest`. Loading: rank 0 lists and chooses, all ranks hash their share of the files, the highest
step that verifies is taken. `candidates` is a pure function of the directory tree.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.base.faults import fault_point
from vitscale.base.files import (
    canonical_json,
    fsync_path,
    publish,
    read_json,
    sha256_bytes,
    sha256_file,
    write_bytes,
    write_json,
)
from vitscale.training.engine import Engine, barrier, from_all_ranks, from_rank_zero, versions
from vitscale.training.partitions import averages_name, partition_map
from vitscale.weights.tensors import load_tensors, save_tensors

SCHEMA_VERSION = 1
RECORD = "vitscale.json"
_COMMITTED = re.compile(r"step-(\d{8,})$")
_BAD = re.compile(r"step-\d{8,}\.bad-\d+$")
_OURS = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_|(?:partition|ema)-(\d+)\.(?:json|safetensors)$|mp_rank_")


@dataclass(kw_only=True)
class TrainState:
    """Where a run stands; equal on all ranks, moved at one place: the end of a step (design.md, law 2)."""

    step: int = 0
    """Steps done, skipped ones included."""
    position: int = 0
    """Next index of the endless training order."""
    images_seen: int = 0
    skipped: int = 0
    """Steps whose update was skipped."""
    bad_images: int = 0
    """Positions at which a stand-in was shown for a bad image; exact at every logged and saved step (bad_images.py)."""
    segments: list[dict[str, int]] = field(default_factory=list)
    """Append-only: ranges of the order that were jumped, and branches."""
    accepted_losses: list[float] = field(default_factory=list)
    """Of the last steps that counted, the newest last: what a spike is measured against (guard.py)."""
    bad_steps: list[int] = field(default_factory=list)
    """Steps of the rollback window that were skipped because numbers went bad (guard.py)."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A committed checkpoint as its vitscale.json describes it."""

    directory: Path
    state: TrainState
    world: int
    zero_stage: int
    data: dict[str, Any]
    record: dict[str, Any]


def directory_name(step: int) -> str:
    return f"step-{step:08d}"


def candidates(checkpoints: Path) -> list[Path]:
    """Committed step directories, the highest step first. Partial and bad ones are none."""
    if not checkpoints.is_dir():
        return []
    found = [(int(match.group(1)), path) for path in checkpoints.iterdir() if (match := _COMMITTED.match(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def has_rejected(checkpoints: Path) -> bool:
    """Whether a checkpoint was put aside as bad here: then an empty list of candidates is no fresh start."""
    return checkpoints.is_dir() and any(_BAD.match(path.name) for path in checkpoints.iterdir())


def save_checkpoint(
    engine: Engine, checkpoints: Path, *, state: TrainState, data: dict[str, Any], keep_last: int, keep_every: int
) -> Path:
    """Write and commit one checkpoint; returns its directory. Collective."""
    final = checkpoints / directory_name(state.step)
    partial = final.with_name(final.name + ".partial")
    if engine.rank == 0:
        checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in [*checkpoints.glob("step-*.partial"), final]:
            if leftover.exists():
                shutil.rmtree(leftover)
    barrier()
    fault_point("checkpoint.begin", rank=engine.rank, step=state.step)
    engine.save_files(checkpoints, partial.name)
    write_json(partial / f"partition-{engine.rank:05d}.json", partition_map(engine))
    if engine.averages.decays and engine.averages_of == engine.rank:
        save_tensors(partial / averages_name(engine.rank), engine.averages.tensors())
    barrier()
    mine = [path for path in sorted(partial.iterdir()) if writer_of(path.name, world=engine.world) == engine.rank]
    fault_point("checkpoint.files", rank=engine.rank, step=state.step)
    for path in mine:
        fsync_path(path)
    lists = from_all_ranks([{"name": p.name, "bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in mine])
    if engine.rank == 0:
        fault_point("checkpoint.commit", rank=0, step=state.step)
        record = {
            "schema_version": SCHEMA_VERSION,
            "state": asdict(state),
            "data": data,
            "world": engine.world,
            "zero_stage": engine.ds.stage,
            "groups": [
                {key: value for key, value in group.items() if key != "params"} for group in engine.zero_optimizer.param_groups
            ],
            "versions": versions(),
            "files": sorted((entry for entries in lists for entry in entries), key=lambda entry: entry["name"]),
        }
        write_json(partial / RECORD, sealed(record))
        fsync_path(partial)
        fault_point("checkpoint.rename", rank=0, step=state.step)
        publish(partial, final)
        fault_point("checkpoint.latest", rank=0, step=state.step)
        write_bytes(checkpoints / "latest", final.name.encode())
        for path in to_delete(candidates(checkpoints), keep_last=keep_last, keep_every=keep_every):
            # Renamed first: a kill in mid-deletion must not leave half a checkpoint under a good name.
            shutil.rmtree(path.rename(path.with_name(path.name + ".partial")))
    barrier()
    return final


def writer_of(name: str, *, world: int) -> int:
    """The rank that wrote a file of a checkpoint: the number in its name, or 0 for what rank 0 writes for all."""
    match = _OURS.match(name)
    rank = int(match.group(1) or match.group(2) or 0) if match else 0
    assert rank < world, f"{name} was written by no rank of this world"
    return rank


def to_delete(committed: list[Path], *, keep_last: int, keep_every: int) -> list[Path]:
    """Which committed checkpoints (highest step first) retention lets go: never the newest `keep_last`, never a
    multiple of `keep_every`. Pure: decides by names."""
    return [
        path
        for path in committed[max(1, keep_last) :]
        if not (keep_every and int(path.name.removeprefix("step-")) % keep_every == 0)
    ]


def find_checkpoint(checkpoints: Path, *, say: Callable[[str], None]) -> Saved | None:
    """The highest committed step that verifies, or None where nothing was ever committed. Collective.

    A directory that fails is renamed to step-N.bad-K and named through `say`. Raises EnvironmentFault when there were
    checkpoints and none is usable: a damaged run is never silently started afresh.
    """
    rank = torch.distributed.get_rank()
    paths, rejected_before = from_rank_zero((candidates(checkpoints), has_rejected(checkpoints)) if rank == 0 else None)
    for path in paths:
        complaint, saved = checked(path)
        if saved is not None:
            return saved
        if rank == 0:
            aside = _put_aside(path)
            say(f"checkpoint {path.name} is not usable: {complaint}; kept as {aside.name}")
        barrier()
    if paths or rejected_before:
        raise EnvironmentFault(
            f"{checkpoints} holds checkpoints but none is usable; expected at least one that passes its own checksums: "
            "restore one from a copy, or start again with another --run directory"
        )
    return None


def checked(path: Path) -> tuple[str | None, Saved | None]:
    """(what is wrong with a step directory, or None; the checkpoint, or None). Collective: every file is hashed by one rank."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    complaint, record = from_rank_zero(read_record(path) if rank == 0 else None)
    if complaint is None:
        verdicts = from_all_ranks([check_file(path, entry) for entry in record["files"][rank::world]])
        complaint = next((verdict for verdicts_of_rank in verdicts for verdict in verdicts_of_rank if verdict), None)
    if complaint is not None:
        return complaint, None
    return None, Saved(
        directory=path,
        state=TrainState(**record["state"]),
        world=record["world"],
        zero_stage=record["zero_stage"],
        data=record["data"],
        record=record,
    )


def newest_valid(checkpoints: Path) -> tuple[Path, dict[str, Any]]:
    """The highest committed step that verifies and its record, for reading only: nothing is renamed. One process.

    Raises EnvironmentFault when there is none, with what is wrong with each.
    """
    complaints = []
    for path in candidates(checkpoints):
        complaint, record = verify(path)
        if complaint is None:
            return path, record
        complaints.append(f"{path.name}: {complaint}")
    raise EnvironmentFault(f"{checkpoints} holds no usable checkpoint ({'; '.join(complaints) or 'it is empty'})")


def verify(path: Path) -> tuple[str | None, dict[str, Any]]:
    """(complaint or None, record) of one step directory, every file hashed. One process."""
    complaint, record = read_record(path)
    if complaint is None:
        complaint = next((found for entry in record["files"] if (found := check_file(path, entry))), None)
    return complaint, record


def check_file(directory: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with one recorded file, or None."""
    path = directory / entry["name"]
    if not path.is_file():
        return f"{entry['name']} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{entry['name']} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    if sha256_file(path) != entry["sha256"]:
        return f"{entry['name']} does not have its recorded sha256"
    return None


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its own sha256: a flipped digit of `position` would else be read as another position."""
    return {**record, "record_sha256": sha256_bytes(canonical_json(record))}


def read_record(path: Path) -> tuple[str | None, dict[str, Any]]:
    """(complaint, record) of vitscale.json and of the names in the directory; what is in the files is not looked at."""
    if not (path / RECORD).is_file():
        return f"{RECORD} is missing", {}
    try:
        record = read_json(path / RECORD)
    except EnvironmentFault:
        return f"{RECORD} is no valid JSON", {}
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
        return f"{RECORD} is not a record of schema {SCHEMA_VERSION}", {}
    if record != sealed({key: value for key, value in record.items() if key != "record_sha256"}):
        return f"{RECORD} does not have its own recorded sha256", {}
    if directory_name(record["state"]["step"]) != path.name:
        return f"{RECORD} belongs to {directory_name(record['state']['step'])}", {}
    # DeepSpeed and `consolidate` look for files by pattern: one too many would be read, or counted as a rank.
    recorded = {entry["name"] for entry in record["files"]}
    foreign = sorted(file.name for file in path.iterdir() if _OURS.match(file.name) and file.name not in recorded)
    return (f"{foreign[0]} is not in its record", {}) if foreign else (None, record)


def _put_aside(path: Path) -> Path:
    attempt = 1
    while (aside := path.with_name(f"{path.name}.bad-{attempt}")).exists():
        attempt += 1
    publish(path, aside)
    return aside


def load_checkpoint(engine: Engine, saved: Saved) -> TrainState:
    """Load a verified checkpoint into the engine and return where the run stands. Collective.

    Raises UsageError when it was written by another number of ranks, at another ZeRO stage or with other averages.
    """
    if (saved.world, saved.zero_stage) != (engine.world, engine.ds.stage):
        raise UsageError(
            f"{saved.directory.name} was written by {saved.world} ranks at ZeRO stage {saved.zero_stage}, "
            f"this start has {engine.world} ranks at stage {engine.ds.stage}; start it as it was written"
        )
    averages = saved.directory / averages_name(engine.averages_of)
    try:
        engine.averages.load(load_tensors(averages) if averages.is_file() else {})
    except ValueError as error:
        raise UsageError(f"{saved.directory.name} does not continue with this train.ema: {error}") from None
    engine.load_files(saved.directory.parent, saved.directory.name)
    return saved.state
