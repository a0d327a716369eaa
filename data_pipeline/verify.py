"""Is a dataset on disk what its manifest says? Every file by its sha256, every image by the hash in its index.

damage    one sentence that names a file, or an image by key and file
"""

import functools
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.manifest import MANIFEST, REJECTS, Manifest, Shard, read_table
from data_pipeline.processes import disk_faults, run_tasks, watched
from vitscale.base.errors import EnvironmentFault
from vitscale.base.files import sha256_file, xxh3_64

_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What was found in one shard."""

    shard: Shard
    damage: tuple[str, ...]
    """Empty: the shard is whole."""


def verify_dataset(manifest: Manifest, *, workers: int, show_progress: bool = True) -> list[str]:
    """Every damage of a dataset, by shard and then by place in it; an empty list when it is whole."""
    with disk_faults(manifest.directory):
        checked = run_tasks(verify_shard, manifest.directory, manifest.shards, workers=workers)
        reports = watched(
            ((report, report.shard.images) for report in checked),
            images=manifest.images,
            what="verifying",
            is_shown=show_progress,
        )
        by_name = {report.shard.name: report.damage for report in reports}
        found = [damage for shard in manifest.shards for damage in by_name[shard.name]]
        return found + _rejects_damage(manifest)


def verify_shard(directory: Path, shard: Shard) -> ShardReport:
    """Compare tar and index with the manifest, and every sample in the tar with its row in the index."""
    tar, index = (directory / f"{shard.name}{ending}" for ending in (".tar", ".parquet"))
    damage = [*_file_damage(tar, shard.tar_sha256, shard.tar_bytes), *_file_damage(index, shard.index_sha256, None)]
    if tar.is_file() and index.is_file():
        try:
            rows = read_table(index)
        except EnvironmentFault:
            return ShardReport(shard=shard, damage=tuple(damage))  # its sha256 has told so already
        if len(rows["key"]) != shard.images:
            damage.append(f"{index.name}: {len(rows['key'])} rows, {shard.images} in {MANIFEST}")
        with open(tar, "rb", buffering=0) as file:
            for row in range(len(rows["key"])):
                what = _sample_damage(file.fileno(), {name: column[row] for name, column in rows.items()})
                damage += [f"{tar.name}: image {rows['key'][row]}: {what}"] if what else []
    return ShardReport(shard=shard, damage=tuple(damage))


def _file_damage(path: Path, sha256: str, size: int | None) -> list[str]:
    if not path.is_file():
        return [f"{path.name}: missing"]
    if size is not None and path.stat().st_size != size:
        return [f"{path.name}: {path.stat().st_size:,} bytes, {size:,} in {MANIFEST}"]
    found = sha256_file(path)
    return [] if found == sha256 else [f"{path.name}: sha256 {found[:12]}…, {sha256[:12]}… in {MANIFEST}"]


def _sample_damage(tar: int, row: dict[str, np.generic | str]) -> str:
    """What is wrong with one sample of an open tar, or an empty string."""
    read = functools.partial(os.pread, tar)
    offset, size, label = int(row["image_offset"]), int(row["image_size"]), int(row["label"])
    image = read(size, offset)
    if len(image) != size:
        return f"the tar ends before byte {offset + size:,}"
    if xxh3_64(image) != int(row["image_xxh3"]):
        return "its bytes do not have the hash of the index"
    label_header = offset + -(-size // _BLOCK) * _BLOCK
    try:
        member = tarfile.TarInfo.frombuf(read(_BLOCK, offset - _BLOCK), "utf-8", "surrogateescape")
        expected = [f"{row['key']}.{row['format']}"]
        found = [member.name]
        if label >= 0:
            member = tarfile.TarInfo.frombuf(read(_BLOCK, label_header), "utf-8", "surrogateescape")
            content = read(member.size, label_header + _BLOCK).decode("utf-8", "replace")
            expected += [f"{row['key']}.cls", str(label)]
            found += [member.name, content]
    except tarfile.HeaderError as error:
        return f"a header beside it is damaged ({error})"
    return "" if found == expected else f"expected {' '.join(expected)} in the tar, found {' '.join(found)}"


def _rejects_damage(manifest: Manifest) -> list[str]:
    """rejects.parquet has no hash of its own; its rows must add up to what the manifest counts by reason."""
    try:
        rows = read_table(manifest.directory / REJECTS)
        reasons, counts = np.unique(rows["reason"].astype(str), return_counts=True)
    except (EnvironmentFault, KeyError) as error:
        return [f"{REJECTS}: {error}"]
    found = dict(zip(reasons.tolist(), counts.tolist(), strict=True))
    return [] if found == manifest.rejected else [f"{REJECTS}: {found} rejects by reason, {manifest.rejected} in {MANIFEST}"]
