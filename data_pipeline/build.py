"""Raw images into WebDataset shards: list, scan, plan, write, and the manifest last (design.md 5.2).

Each shard is written under a temporary name, read back, renamed, and recorded in DIR/.build/train-000000.json: it is
finished iff that record exists and tar and index match it. The bytes of every file follow from the plan alone, so any
number of workers, and any number of kills, give the same dataset.
"""

import itertools
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from webdataset.writer import TarWriter

from data_pipeline.config import BuildConfig
from data_pipeline.decode import image_header
from data_pipeline.listing import Listing, write_listing
from data_pipeline.manifest import INDEX_SCHEMA, REJECTS, REJECTS_SCHEMA, Manifest, Shard, write_manifest, write_table
from data_pipeline.plan import BAD, GOOD, UNREAD, permutation, plan_hash, shard_bounds
from data_pipeline.processes import disk_faults, run_tasks, watched
from data_pipeline.scan import Scan, ScanSetup, scan_inputs, spill_path
from data_pipeline.source import Source, Wanted
from data_pipeline.sources.open import open_source
from data_pipeline.workshop import LIST, TIMM_INFO, WORK, begin_or_continue, claimed, finished_dataset, keep_plan, options_of
from vitscale.base.errors import BadDataError, EnvironmentFault, UsageError
from vitscale.base.faults import fault_point
from vitscale.base.files import fsync_path, publish, read_json, sha256_file, write_json, xxh3_64

MOST_INPUTS = 10**9  # a key has nine digits
TAR_HEADER_BYTES = tarfile.BLOCKSIZE


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where shards go and where their images come from; equal for all shards of a build."""

    directory: Path
    source: Source


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard of the plan; row i of every field is slot i."""

    number: int
    wanted: Wanted
    labels: np.ndarray
    sizes: np.ndarray
    hashes: np.ndarray
    pieces: np.ndarray
    offsets: np.ndarray

    @property
    def name(self) -> str:
        return f"train-{self.number:06d}"


def build_dataset(config: BuildConfig, out: Path, *, workers: int, show_progress: bool = True) -> Manifest:
    """Build the dataset, continue a build that was interrupted, or return the one that is complete.

    One worker means this process alone. Raises UsageError when the options, the source or the directory do not fit,
    EnvironmentFault and TransientFault for files and disks, BadDataError when no image is good or `on_bad` says stop.
    """
    if not 0 <= config.seed < 2**64:
        raise UsageError(f"expected a seed from 0 to 2^64 - 1, got {config.seed}")
    with disk_faults(out):
        if (finished := finished_dataset(config, out)) is not None:
            return finished
        source = open_source(config.source)
        out.mkdir(parents=True, exist_ok=True)
        with claimed(out):
            listing = write_listing(source, out / WORK / LIST)
            inputs = _selected(listing, config)
            begin_or_continue(config, out, listing)
            setup = ScanSetup(source=source, directory=out / WORK, config=config)
            scan = scan_inputs(setup, inputs, workers=workers, is_shown=show_progress)
            if not (scan.status == GOOD).any():
                reason, example = _commonest(scan, inputs)
                shutil.rmtree(out / WORK)  # nothing to continue: the next start must look at repaired images again
                raise BadDataError(f"expected good images in {config.source}, all are bad, mostly {reason}, such as {example}")
            rows, plan = _plan(config, inputs, scan)
            keep_plan(out, plan)
            output = Output(directory=out, source=source)
            written = run_tasks(write_shard, output, _tasks(config, inputs, scan, rows), workers=workers)
            counted = ((shard, shard.images) for shard in written)
            shards = watched(counted, images=len(rows), what="writing", is_shown=show_progress)
            shards.sort(key=lambda shard: (len(shard.name), shard.name))
            return _complete(config, out, inputs, scan, shards, plan=plan, listed=len(listing))


def write_shard(output: Output, task: ShardTask) -> Shard:
    """Write, prove and publish the tar and the index of one shard; a finished one is kept."""
    work = output.directory / WORK
    tar, index = (output.directory / f"{task.name}{ending}" for ending in (".tar", ".parquet"))
    record = work / f"{task.name}.json"
    if (kept := _kept(record, tar, index)) is not None:
        return kept
    temporary = work / f"{task.name}.tar.tmp"
    rows: list[dict[str, Any]] = []
    with open(temporary, "wb", buffering=1 << 20) as file:
        writer = _tar_writer(file)
        for slot, content in enumerate(_contents(output, task)):
            rows.append(_write_sample(writer, task, slot, content))
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    _prove(temporary, rows)
    tar_sha256 = sha256_file(temporary)
    publish(temporary, tar)
    write_table(index, {name: [row[name] for row in rows] for name in INDEX_SCHEMA.names}, schema=INDEX_SCHEMA)
    shard = Shard(
        name=task.name,
        images=len(rows),
        tar_bytes=tar.stat().st_size,
        tar_sha256=tar_sha256,
        index_sha256=sha256_file(index),
    )
    write_json(record, vars(shard))
    fault_point("build.shard", shard=task.number)
    return shard


def _tar_writer(file: BinaryIO) -> TarWriter:
    """Plain USTAR, and nothing of this machine or this minute in the headers."""
    writer = TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False)
    # webdataset 1.0.2 takes `format` and drops it, so tarfile's own default, PAX, would decide.
    writer.tarstream.format = tarfile.USTAR_FORMAT
    return writer


def _write_sample(writer: TarWriter, task: ShardTask, slot: int, content: bytes) -> dict[str, Any]:
    """Append KEY.ext and KEY.cls, and return the row of the index."""
    key = f"{task.wanted.numbers[slot]:09d}"
    header = image_header(content)
    offset = writer.tarstream.offset + TAR_HEADER_BYTES
    # Two calls, because one would sort the members and put the label first.
    writer.write({"__key__": key, header.format: content})
    label = int(task.labels[slot])
    if label >= 0:
        writer.write({"__key__": key, "cls": str(label).encode("ascii")})
    image_hash = xxh3_64(content)
    return {
        "key": key,
        "image_offset": offset,
        "image_size": len(content),
        "label": label,
        "labels": None,
        "width": header.width,
        "height": header.height,
        "orientation": header.orientation,
        "format": header.format,
        "image_xxh3": image_hash,
        "source": task.wanted.names[slot],
        "source_xxh3": image_hash,
    }


def _contents(output: Output, task: ShardTask) -> Iterator[bytes]:
    """Source bytes of the shard's images in the order of their slots, compared with the hash of the scan."""
    contents = output.source.read(task.wanted) if output.source.is_random_access else _spilled(output, task)
    for slot, (name, content) in enumerate(zip(task.wanted.names, contents, strict=True)):
        if not isinstance(content, bytes) or xxh3_64(content) != task.hashes[slot]:
            raise UsageError(f"{name} has changed since the build began; start over with --replan")
        yield content


def _spilled(output: Output, task: ShardTask) -> Iterator[bytes]:
    for slot in range(len(task.wanted)):
        path = spill_path(output.directory / WORK, int(task.pieces[slot]))
        yield _pread(path, int(task.offsets[slot]), int(task.sizes[slot]))


def _pread(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)


def _prove(tar: Path, rows: list[dict[str, Any]]) -> None:
    """Read every image back from the place the index gives, before either file has its name."""
    with open(tar, "rb", buffering=0) as file:
        for row in rows:
            stored = os.pread(file.fileno(), row["image_size"], row["image_offset"])
            if xxh3_64(stored) != row["image_xxh3"]:
                raise EnvironmentFault(f"{tar} does not give back what was written (image {row['key']}); check the disk")


def _kept(record: Path, tar: Path, index: Path) -> Shard | None:
    """The record of a shard an earlier start finished, if its files are what the record says."""
    if not (record.exists() and tar.exists() and index.exists()):
        return None
    shard = Shard(**read_json(record))
    is_whole = tar.stat().st_size == shard.tar_bytes and sha256_file(tar) == shard.tar_sha256
    return shard if is_whole and sha256_file(index) == shard.index_sha256 else None


def _selected(inputs: Listing, config: BuildConfig) -> Listing:
    """The inputs of the wanted classes."""
    if inputs.numbers[-1] >= MOST_INPUTS:
        raise UsageError(f"expected at most {MOST_INPUTS:,} inputs, {config.source} lists {len(inputs):,}; split the source")
    if config.per_class is not None and not inputs.classes:
        raise UsageError(f"--per-class needs classes, and {config.source} has no labels; drop --per-class")
    if config.classes is None:
        return inputs
    narrowed = inputs.narrowed(config.classes)
    if not len(narrowed):
        raise UsageError(f"--classes: {config.source} has no image of {', '.join(config.classes)}; name other classes")
    return narrowed


def _plan(config: BuildConfig, inputs: Listing, scan: Scan) -> tuple[np.ndarray, dict[str, Any]]:
    """Rows of the survivors in the order they are stored, and the record of the plan."""
    survivors = np.flatnonzero(scan.status == GOOD)
    sha256 = plan_hash(options_of(config), inputs.numbers[survivors], scan.hashes[survivors], inputs.labels[survivors])
    return survivors[permutation(len(survivors), config.seed)], {"plan_sha256": sha256, "images": len(survivors)}


def _tasks(config: BuildConfig, inputs: Listing, scan: Scan, rows: np.ndarray) -> Iterator[ShardTask]:
    bounds = shard_bounds(scan.sizes[rows], shard_bytes=config.shard_bytes, shard_images=config.shard_images)
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        part = rows[start:stop]
        yield ShardTask(
            number=number,
            wanted=inputs.wanted(part),
            labels=inputs.labels[part],
            sizes=scan.sizes[part],
            hashes=scan.hashes[part],
            pieces=scan.pieces[part],
            offsets=scan.offsets[part],
        )


def _complete(
    config: BuildConfig, out: Path, inputs: Listing, scan: Scan, shards: list[Shard], *, plan: dict[str, Any], listed: int
) -> Manifest:
    """Write rejects, timm's list and the manifest, in this order, and clear the workshop."""
    bad = np.flatnonzero(scan.status == BAD)
    names = inputs.names_of(bad)
    reasons = [scan.reasons[row][0] for row in bad.tolist()]
    details = [scan.reasons[row][1] for row in bad.tolist()]
    columns = {"input": inputs.numbers[bad], "source": names, "reason": reasons, "detail": details}
    write_table(out / REJECTS, columns, schema=REJECTS_SCHEMA)
    split = {
        "name": "train",
        "num_samples": sum(shard.images for shard in shards),
        "filenames": [f"{shard.name}.tar" for shard in shards],
        "shard_lengths": [shard.images for shard in shards],
    }
    write_json(out / TIMM_INFO, {"splits": {"train": split}})
    images_read = int(np.count_nonzero(scan.status != UNREAD))
    hashes = scan.hashes[scan.status == GOOD]
    manifest = write_manifest(
        out,
        shards=shards,
        classes=list(inputs.classes),
        images_read=images_read,
        rejected={reason: reasons.count(reason) for reason in sorted(set(reasons))},
        build={
            "options": options_of(config),
            "plan_sha256": plan["plan_sha256"],
            "left_out": listed - images_read,
            "exact_duplicates": len(hashes) - len(np.unique(hashes)),
        },
    )
    shutil.rmtree(out / WORK)
    fsync_path(out)
    return manifest


def _commonest(scan: Scan, inputs: Listing) -> tuple[str, str]:
    """The most frequent reason of a reject, and an input that has it."""
    reasons = [reason for reason, _ in scan.reasons.values()]
    reason = max(sorted(set(reasons)), key=reasons.count)
    row = next(row for row, (found, _) in scan.reasons.items() if found == reason)
    return reason, inputs.names_of(np.array([row]))[0]
