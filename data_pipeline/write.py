"""One shard of the plan: its tar, its index, and the record that says it is finished.

DIR/train-000000.tar, DIR/train-000000.parquet, DIR/.build/train-000000.json

A shard is written under temporary names in the workshop, read back, put in its place and recorded: it is finished iff the
record exists and tar and index match it. Its bytes follow from the plan alone.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from webdataset.writer import TarWriter

from data_pipeline.decode import image_header
from data_pipeline.destination import Destination
from data_pipeline.manifest import INDEX_SCHEMA, Shard, write_table
from data_pipeline.scan import spill_path
from data_pipeline.source import Source, Wanted
from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.base.faults import fault_point
from vitscale.base.files import read_json, sha256_file, temporary_beside, write_json, xxh3_64

TAR_HEADER_BYTES = tarfile.BLOCKSIZE


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where the images of a build come from, and the workshop; equal for all shards."""

    work: Path
    source: Source


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard of the plan; row i of every field is slot i."""

    number: int
    name: str
    destination: Destination
    wanted: Wanted
    labels: np.ndarray
    """int32, the first label of each image; -1: none."""
    all_labels: list[list[int]] | None
    """All labels of each image; None where images have one at most."""
    places: np.ndarray
    """PLACE records of layout.py."""


def record_path(work: Path, name: str) -> Path:
    return work / f"{name}.json"


@dataclass(frozen=True, kw_only=True)
class Written:
    """What became of a task."""

    name: str
    images: int
    image_bytes: int
    """0 where an earlier start wrote them."""


def write_shard(output: Output, task: ShardTask) -> Written:
    """Write, prove and publish tar and index of one shard; a finished one is kept."""
    if _is_finished(output.work, task):
        return Written(name=task.name, images=len(task.wanted), image_bytes=0)
    with (
        temporary_beside(output.work / f"{task.name}.tar") as tar,
        temporary_beside(output.work / f"{task.name}.parquet") as index,
    ):
        return _write_shard(output, task, tar, index)


def _write_shard(output: Output, task: ShardTask, tar: Path, index: Path) -> Written:
    """The same under the given temporary names."""
    rows: list[dict[str, Any]] = []
    with open(tar, "wb", buffering=1 << 20) as file:
        writer = _tar_writer(file)
        for slot, content in enumerate(_contents(output, task)):
            rows.append(_write_sample(writer, task, slot, content))
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    _prove(tar, rows)
    write_table(index, {name: [row[name] for row in rows] for name in INDEX_SCHEMA.names}, schema=INDEX_SCHEMA)
    shard = Shard(
        name=task.name,
        images=len(rows),
        tar_bytes=tar.stat().st_size,
        tar_sha256=sha256_file(tar),
        index_sha256=sha256_file(index),
    )
    task.destination.take_tar(tar, f"{task.name}.tar")
    task.destination.take(index, f"{task.name}.parquet")
    write_json(record_path(output.work, task.name), vars(shard))
    fault_point("build.shard", shard=task.number)
    return Written(name=task.name, images=len(rows), image_bytes=sum(row["image_size"] for row in rows))


def _is_finished(work: Path, task: ShardTask) -> bool:
    """Whether an earlier start finished the shard, and its files are still what the record says."""
    record = record_path(work, task.name)
    if not record.exists():
        return False
    shard = Shard(**read_json(record))
    is_whole = task.destination.holds_tar(f"{task.name}.tar", shard.tar_bytes, shard.tar_sha256)
    return is_whole and task.destination.holds(f"{task.name}.parquet", shard.index_sha256)


def _tar_writer(file: BinaryIO) -> TarWriter:
    """Plain USTAR, and nothing of this machine or this minute in the headers."""
    writer = TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False)
    # webdataset 1.0.2 takes `format` and drops it, so tarfile's own default, PAX, would decide.
    writer.tarstream.format = tarfile.USTAR_FORMAT
    return writer


def _write_sample(writer: TarWriter, task: ShardTask, slot: int, content: bytes) -> dict[str, Any]:
    """Append KEY.ext and KEY.cls or KEY.json, and return the row of the index."""
    key = f"{task.wanted.numbers[slot]:09d}"
    header = image_header(content)
    offset = writer.tarstream.offset + TAR_HEADER_BYTES
    # Two calls, because one would sort the members and put the label first.
    writer.write({"__key__": key, header.format: content})
    label = int(task.labels[slot])
    labels = None if task.all_labels is None else task.all_labels[slot]
    if labels is not None:
        writer.write({"__key__": key, "json": json.dumps({"labels": labels}).encode("ascii")})
    elif label >= 0:
        writer.write({"__key__": key, "cls": str(label).encode("ascii")})
    return {
        "key": key,
        "image_offset": offset,
        "image_size": len(content),
        "label": label,
        "labels": labels,
        "width": header.width,
        "height": header.height,
        "orientation": header.orientation,
        "format": header.format,
        "image_xxh3": int(task.places["image_xxh3"][slot]),
        "source": task.wanted.names[slot],
        "source_xxh3": int(task.places["source_xxh3"][slot]),
    }


def _contents(output: Output, task: ShardTask) -> Iterator[bytes]:
    """Bytes to store, slot by slot, compared with the hash of the scan: spilled ones and those of the source."""
    is_spilled = task.places["offset"] >= 0
    wanted = task.wanted
    again = np.flatnonzero(~is_spilled)
    from_source = output.source.read(
        Wanted(
            numbers=wanted.numbers[again],
            names=[wanted.names[slot] for slot in again.tolist()],
            places=None if wanted.places is None else wanted.places[again],
        )
    )
    for slot, name in enumerate(wanted.names):
        place = task.places[slot]
        content = _spilled(output.work, place) if is_spilled[slot] else next(from_source)
        if not isinstance(content, bytes) or xxh3_64(content) != place["image_xxh3"]:
            raise UsageError(f"{name} has changed since the build began; start over with --replan")
        yield content


def _spilled(work: Path, place: np.void) -> bytes:
    with open(spill_path(work, int(place["piece"])), "rb", buffering=0) as file:
        return os.pread(file.fileno(), int(place["size"]), int(place["offset"]))


def _prove(tar: Path, rows: list[dict[str, Any]]) -> None:
    """Read every image back from the place the index gives, before either file has its name."""
    with open(tar, "rb", buffering=0) as file:
        for row in rows:
            stored = os.pread(file.fileno(), row["image_size"], row["image_offset"])
            if xxh3_64(stored) != row["image_xxh3"]:
                raise EnvironmentFault(f"{tar} does not give back what was written (image {row['key']}); check the disk")
