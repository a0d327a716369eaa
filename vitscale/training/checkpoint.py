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

  step-00001000.keep              an empty file: retention leaves that checkpoint

How they are written: saving.py. Loading: rank 0 lists and chooses, all ranks hash their share of the files, the highest step
that verifies is taken; then every rank copies what its own partitions hold, whatever world and stage wrote it (partitions.py).
`candidates` is a pure function of the directory tree.
"""

import re
from collections.abc import Callable, Container
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.base.files import canonical_json, publish, read_json, sha256_bytes, sha256_file, unsafe_name
from vitscale.training.collectives import barrier, from_all_ranks, from_rank_zero
from vitscale.training.engine import Engine
from vitscale.training.partitions import StoredState, average
from vitscale.training.pieces import Partition

SCHEMA_VERSION = 2
RECORD = "vitscale.json"
OTHER_SCHEMA = f"{RECORD} is of an older schema than {SCHEMA_VERSION}"
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


def to_delete(committed: list[Path], *, keep_last: int, keep_every: int, kept: Container[str] = ()) -> list[Path]:
    """Which committed checkpoints (highest step first) retention lets go: never the newest `keep_last`, never a
    multiple of `keep_every`, never those named in `kept`. Pure: decides by names."""
    return [
        path
        for path in committed[max(1, keep_last) :]
        if not (keep_every and int(path.name.removeprefix("step-")) % keep_every == 0) and path.name not in kept
    ]


def kept_for_ever(checkpoints: Path) -> set[str]:
    """Names of the step directories that a file NAME.keep beside them protects from retention."""
    return {path.stem for path in checkpoints.glob("step-*.keep")}


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
        if complaint == OTHER_SCHEMA:
            raise EnvironmentFault(
                f"{path} was written by another version of this program: {complaint}; continue it with that version, or start "
                "a new --run from its exported weights"
            )
        if rank == 0:
            aside = put_aside(path)
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
    if path.is_symlink() or not path.is_file():
        return f"{entry['name']} is {'no regular file' if path.is_symlink() or path.exists() else 'missing'}"
    if path.stat().st_size != entry["bytes"]:
        return f"{entry['name']} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    try:
        sha256 = sha256_file(path)
    except OSError as error:
        return f"{entry['name']} cannot be read ({error.strerror})"
    return None if sha256 == entry["sha256"] else f"{entry['name']} does not have its recorded sha256"


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
    if isinstance(record, dict) and record.get("schema_version") in range(1, SCHEMA_VERSION) and _is_sealed(path, record):
        return OTHER_SCHEMA, {}
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
        return f"{RECORD} is not a record of schema {SCHEMA_VERSION}", {}
    if not _is_sealed(path, record):
        return f"{RECORD} does not have its own recorded sha256", {}
    if not _makes_sense(record):
        return f"{RECORD} lacks a state or a list of files", {}
    if directory_name(record["state"]["step"]) != path.name:
        return f"{RECORD} belongs to {directory_name(record['state']['step'])}", {}
    if (odd := unsafe_name(entry.get("name") for entry in record["files"])) is not None:
        return f"{RECORD} names {odd}, expected plain names of files, each once", {}
    recorded = {entry["name"] for entry in record["files"]}
    # DeepSpeed and StoredState look for files by pattern: one too many would be read, or counted as a rank.
    foreign = sorted(file.name for file in path.iterdir() if _OURS.match(file.name) and file.name not in recorded)
    return (f"{foreign[0]} is not in its record", {}) if foreign else (None, record)


def _is_sealed(path: Path, record: dict[str, Any]) -> bool:
    """Byte for byte: a number spelled otherwise, a key written twice or a lost last byte is damage too."""
    unsealed = {key: value for key, value in record.items() if key != "record_sha256"}
    return canonical_json(sealed(unsealed)) == (path / RECORD).read_bytes()


def _makes_sense(record: dict[str, Any]) -> bool:
    """Whether what the checks of a checkpoint look at is there: anybody can seal a record."""
    state, files = record.get("state"), record.get("files")
    return (
        isinstance(state, dict)
        and isinstance(state.get("step"), int)
        and isinstance(files, list)
        and all(
            isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
            for entry in files
        )
    )


def put_aside(path: Path) -> Path:
    """Rename a step directory to a name nothing is loaded from: step-N.bad-K."""
    attempt = 1
    while (aside := path.with_name(f"{path.name}.bad-{attempt}")).exists():
        attempt += 1
    publish(path, aside)
    return aside


def load_checkpoint(engine: Engine, saved: Saved) -> TrainState:
    """Load a verified checkpoint into the engine, whatever world and ZeRO stage wrote it; where the run stands. Collective.

    Every rank copies the ranges its partitions hold, of the weights, of all the optimizer keeps and of the averages, from
    the mapped files of all ranks that held them. Raises UsageError when the averages are of other decays, EnvironmentFault
    when the parameters are others.
    """
    stored = StoredState(saved.directory)
    shapes = {name: shape for partition in engine.partitions for name, shape in partition.shapes.items()}
    if stored.shapes != shapes:
        odd = sorted(stored.shapes.items() ^ shapes.items())[0][0]
        raise EnvironmentFault(f"{saved.directory} holds the state of another model: {odd} is not in both, or of another shape")
    decays = set(saved.record["ema"])
    if decays != set(engine.averages.decays):
        wanted, found = (", ".join(map(str, sorted(those))) or "none" for those in (engine.averages.decays, decays))
        raise UsageError(f"{saved.directory.name} does not continue with this train.ema: it has {found}, the command {wanted}")
    engine.forget_optimizer_state()
    with torch.no_grad():
        for partition in engine.partitions:
            fill_partition(engine, partition, stored)
    engine.take_up(step=saved.state.step, loss_scaler=saved.record["loss_scaler"])
    return deepcopy(saved.state)


def fill_partition(engine: Engine, partition: Partition, stored: StoredState) -> None:
    """Masters, optimizer state and averages of one partition. Padding stays as it is: zero."""
    names = [piece.name for piece in partition.pieces] or list(partition.shapes)
    targets = {"weights": partition.master.view(-1)}
    if keys := stored.optimizer_keys(names[0]):
        state = engine.optimizer_state(partition)
        targets |= {key: state[key].view(-1) for key in keys}
        if (step := stored.optimizer_step(names[0])) is not None:
            state["step"].fill_(step)
    for decay in engine.averages.decays:
        targets[average(decay)] = engine.averages.of(decay, partition.key).view(-1)
    for piece in partition.pieces:
        for what, target in targets.items():
            stored.fill(target[piece.offset : piece.offset + piece.numel], piece.name, piece.start, what)
