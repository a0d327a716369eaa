"""Is a dataset what its manifest says? Every file by its sha256, every image by the hash in its index.

damage    one sentence that names a file, or an image by key and file
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.manifest import MANIFEST, REJECTS, Manifest, Shard, read_table
from data_pipeline.places import ReadAt, local_copy, reading, record_of
from data_pipeline.processes import disk_faults, run_tasks, watched
from data_pipeline.tar_index import image_member, sample_labels
from data_pipeline.tar_labels import BadLabel
from data_pipeline.tars import BLOCK_BYTES, BadTar, TarSample, key_and_ending, members, samples
from vitscale.base.errors import EnvironmentFault
from vitscale.base.files import sha256_file, xxh3_64


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What checking any shard needs of the manifest."""

    directory: Path
    """Of the indices."""
    at: str
    """Directory or URL of the tars."""
    number_of: dict[str, int]
    """Class names, where the labels of foreign tars may be names; else empty."""
    is_foreign: bool
    """Indexed, not built: what the tars hold besides stands in the rejects."""


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What was found in one shard."""

    shard: Shard
    damage: tuple[str, ...]
    """Empty: the shard is whole."""


def verify_dataset(manifest: Manifest, *, workers: int, show_progress: bool = True) -> list[str]:
    """Every damage of a dataset, by shard and then by place in it; an empty list when it is whole.

    Tars on an object store are fetched one by one into the temporary directory.
    """
    is_foreign = "indexed_tars" in manifest.build
    names = manifest.classes if is_foreign else ()
    dataset = Dataset(
        directory=manifest.directory,
        at=manifest.tars_at,
        number_of={name: number for number, name in enumerate(names)},
        is_foreign=is_foreign,
    )
    with disk_faults(manifest.directory):
        checked = run_tasks(verify_shard, dataset, manifest.shards, workers=workers)
        reports = watched(
            ((report, report.shard.images) for report in checked),
            images=manifest.images,
            what="verifying",
            is_shown=show_progress,
        )
        by_name = {report.shard.name: report.damage for report in reports}
        found = [damage for shard in manifest.shards for damage in by_name[shard.name]]
        return found + _rejects_damage(manifest)


def verify_shard(dataset: Dataset, shard: Shard) -> ShardReport:
    """Compare tar and index with the manifest, and every sample in the tar with its row in the index."""
    index = dataset.directory / f"{shard.name}.parquet"
    try:
        index_damage = _file_damage(record_of(dataset.directory, dataset.at, index.name), shard.index_sha256, None)
    except EnvironmentFault as fault:  # of the store
        index_damage = [f"{index.name}: {fault}"]
    try:
        rows = read_table(index) if index.is_file() else {}
    except EnvironmentFault:
        rows = {}  # its sha256 has told so already
    if rows and len(rows["key"]) != shard.images:
        index_damage.append(f"{index.name}: {len(rows['key'])} rows, {shard.images} in {MANIFEST}")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with local_copy(dataset.at, shard.name, scratch=Path(scratch)) as tar:
                damage = _file_damage(tar, shard.tar_sha256, shard.tar_bytes, name=f"{shard.name}.tar")
                damage += index_damage
                if rows and tar.is_file():
                    with reading(tar) as read_at:
                        found = _samples_damage(read_at, tar.stat().st_size, rows, dataset)
                        damage += [f"{shard.name}.tar: {what}" for what in found]
        except EnvironmentFault as fault:  # of the store
            damage = [f"{shard.name}.tar: {fault}", *index_damage]
    return ShardReport(shard=shard, damage=tuple(damage))


def _file_damage(path: Path, sha256: str, size: int | None, *, name: str = "") -> list[str]:
    name = name or path.name
    if not path.is_file():
        return [f"{name}: missing"]
    if size is not None and path.stat().st_size != size:
        return [f"{name}: {path.stat().st_size:,} bytes, {size:,} in {MANIFEST}"]
    found = sha256_file(path)
    return [] if found == sha256 else [f"{name}: sha256 {found[:12]}…, {sha256[:12]}… in {MANIFEST}"]


def _samples_damage(read_at: ReadAt, size: int, rows: dict[str, np.ndarray], dataset: Dataset) -> Iterator[str]:
    """What is wrong with single samples of an open tar, each named."""
    walked: dict[int, TarSample] = {}
    broken: BadTar | None = None
    try:
        for sample in samples(members(read_at, size)):
            if (image := image_member(sample)) is not None:
                walked[image.offset] = sample
    except BadTar as bad:
        broken = bad
    is_broken_told = False
    # The header that is damaged belongs to the last image that begins before it or right behind it.
    beside = int((rows["image_offset"] <= broken.offset + BLOCK_BYTES).sum()) - 1 if broken is not None else -1
    for number in range(len(rows["key"])):
        row = {name: column[number] for name, column in rows.items()}
        found = walked.pop(int(row["image_offset"]), None)
        if what := _content_damage(read_at, row):
            is_broken_told |= found is None
        elif found is not None:
            what = _labels_damage(read_at, row, found, dataset)
        elif broken is None:
            what = "the tar has no member there"
        elif number == beside:
            what = f"a header beside it is damaged ({broken}); from here on keys and labels were not compared"
            is_broken_told = True
        if what:
            yield f"image {row['key']}: {what}"
    if broken is not None and not is_broken_told:
        yield str(broken)
    if not dataset.is_foreign:
        yield from (f"image {sample.key}: not in the index" for sample in walked.values())


def _content_damage(read_at: ReadAt, row: dict[str, Any]) -> str:
    """What is wrong with the bytes of an image, or an empty string."""
    offset, size = int(row["image_offset"]), int(row["image_size"])
    image = read_at(offset, size)
    if len(image) != size:
        return f"the tar ends before byte {offset + size:,}"
    return "" if xxh3_64(image) == int(row["image_xxh3"]) else "its bytes do not have the hash of the index"


def _labels_damage(read_at: ReadAt, row: dict[str, Any], sample: TarSample, dataset: Dataset) -> str:
    """How key, ending and labels in the tar differ from the index, or an empty string."""
    image = image_member(sample)
    assert image is not None
    expected_labels = [int(label) for label in ([row["label"]] if row["labels"] is None else row["labels"]) if label >= 0]
    expected = f"{row['key']}.{row['format']} with {_words(expected_labels)}"
    try:
        found_labels = sample_labels(read_at, sample, number_of=dataset.number_of)
    except BadLabel as bad:
        return f"expected {expected} in the tar, found a damaged label ({bad})"
    parts = key_and_ending(image.name)
    assert parts is not None
    ending = row["format"] if dataset.is_foreign else parts[1]
    if (sample.key, ending, found_labels) == (row["key"], row["format"], expected_labels):
        return ""
    return f"expected {expected} in the tar, found {image.name} with {_words(found_labels)}"


def _words(labels: list[int]) -> str:
    return f"label {', '.join(map(str, labels))}" if labels else "no label"


def _rejects_damage(manifest: Manifest) -> list[str]:
    """rejects.parquet has no hash of its own; its rows must add up to what the manifest counts by reason."""
    try:
        rows = read_table(record_of(manifest.directory, manifest.tars_at, REJECTS), columns=["reason"])
        reasons, counts = np.unique(rows["reason"].astype(str), return_counts=True)
    except (EnvironmentFault, KeyError) as error:
        return [f"{REJECTS}: {error}"]
    found = dict(zip(reasons.tolist(), counts.tolist(), strict=True))
    return [] if found == manifest.rejected else [f"{REJECTS}: {found} rejects by reason, {manifest.rejected} in {MANIFEST}"]
