"""The records that make a directory of tars a dataset.

DIR/
  train-000000.tar       plain USTAR shard
  train-000000.parquet   its index: one row per sample
  ...
  rejects.parquet        every input that was not written, with its reason
  manifest.json          written last: a directory without it is no dataset; its sha256 is the fingerprint

The index of a shard is loaded on demand: memory does not grow with the dataset.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitscale.base.errors import EnvironmentFault
from vitscale.base.files import canonical_json, read_json, sha256_bytes, unsafe_name, write_bytes

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
REJECTS = "rejects.parquet"
LOCATION = "location.json"
TIMM_INFO = "_info.json"

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image_offset", pa.int64()),  # of the image bytes in the tar
        ("image_size", pa.int64()),  # bytes
        ("label", pa.int32()),  # the first label; -1: no label
        ("labels", pa.list_(pa.int32())),  # all labels, where images may have several; else null
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("orientation", pa.int8()),  # EXIF: 1 as stored, 2 to 8 mirrored or turned for display
        ("format", pa.string()),  # jpg, png, webp: the member's extension
        ("image_xxh3", pa.uint64()),  # of the stored image bytes
        ("source", pa.string()),  # where the input came from, as the source names it
        ("source_xxh3", pa.uint64()),  # of the bytes that were read there
    ]
)

REJECTS_SCHEMA = pa.schema([("input", pa.int64()), ("source", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar as the manifest records it."""

    name: str
    """File name without ending: train-000000."""
    images: int
    tar_bytes: int
    tar_sha256: str
    index_sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A dataset: its shards in their order, its class names, and where it came from."""

    directory: Path
    fingerprint: str
    """sha256 of manifest.json."""
    tars_at: str
    """Directory or URL that holds the tars: the directory itself, unless its location.json names another."""
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    """Name of label i at position i; empty for images without labels."""
    most_labels: int
    """Labels of the image that has most: 0 (no labels), 1, or more."""
    images_read: int
    """Inputs found; images_read = images + rejected."""
    rejected: dict[str, int]
    """Inputs not written, by reason."""
    build: dict[str, Any]
    """Options of the build and its plan hash."""

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The index of one shard in memory; row i describes sample i."""

    keys: np.ndarray
    """Fixed-width bytes (dtype S)."""
    image_offset: np.ndarray
    image_size: np.ndarray
    label: np.ndarray
    """The first label of each image; -1: none."""
    labels: list[np.ndarray] | None
    """All labels of each image, where images may have several."""
    orientation: np.ndarray
    image_xxh3: np.ndarray


def write_manifest(
    directory: Path,
    *,
    shards: list[Shard],
    classes: list[str],
    images_read: int,
    rejected: dict[str, int],
    build: dict[str, Any],
    most_labels: int = 1,
) -> Manifest:
    """Write manifest.json atomically, as the last act of a build, and return it as read back."""
    images = sum(shard.images for shard in shards)
    assert images_read == images + sum(rejected.values()), "read = written + rejected"
    record = {
        "schema_version": SCHEMA_VERSION,
        "shards": [vars(shard) for shard in shards],
        "images": images,
        "classes": classes,
        "most_labels": most_labels,
        "images_read": images_read,
        "rejected": rejected,
        "build": build,
    }
    write_bytes(directory / MANIFEST, canonical_json(record))
    return read_manifest(directory)


def read_manifest(directory: Path) -> Manifest:
    """Read DIR/manifest.json. Raises EnvironmentFault when it is missing, damaged, or of another schema."""
    path = directory / MANIFEST
    if not path.is_file():
        what = (
            "an unfinished build: run the same launch/build_shards.py command again"
            if any(directory.glob("*.tar"))
            else "no dataset; make one with launch/build_shards.py"
        )
        raise EnvironmentFault(f"expected a dataset at {directory}, found no {MANIFEST} there ({what})")
    record = read_json(path)
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
        found = record.get("schema_version") if isinstance(record, dict) else None
        raise EnvironmentFault(f"{path}: expected schema_version {SCHEMA_VERSION}, got {found!r}; rebuild the dataset")
    try:
        # Names become paths, and a manifest may come from elsewhere.
        if (odd := unsafe_name(shard["name"] for shard in record["shards"])) is not None:
            raise EnvironmentFault(f"{path} names a shard {odd}; expected plain file names, each once: rebuild the dataset")
        return Manifest(
            directory=directory,
            fingerprint=sha256_bytes(path.read_bytes()),
            shards=tuple(Shard(**shard) for shard in record["shards"]),
            classes=tuple(record["classes"]),
            most_labels=record["most_labels"],
            tars_at=_tars_at(directory),
            images_read=record["images_read"],
            rejected=dict(record["rejected"]),
            build=dict(record["build"]),
        )
    except (KeyError, TypeError) as error:
        raise EnvironmentFault(f"{path} is damaged ({error}); restore it from a copy or rebuild the dataset") from None


def read_index(manifest: Manifest, shard: int, *, read: Callable[[Path], bytes] = Path.read_bytes) -> ShardIndex:
    """Read the index of shard number `shard`. Raises EnvironmentFault naming a missing or damaged file.

    The hash of the manifest is compared: Parquet has no checksums of its own here, and of 600 flipped bits 24 gave other
    keys or labels without a word.
    """
    record = manifest.shards[shard]
    path = manifest.directory / f"{record.name}.parquet"
    columns = ["key", "image_offset", "image_size", "label", "labels", "orientation", "image_xxh3"]
    try:
        content = read(path)
        if sha256_bytes(content) != record.index_sha256:
            raise EnvironmentFault(
                f"the index {path} does not have the sha256 of {MANIFEST}; restore it from a copy or rebuild the dataset"
            )
        # In the calling thread: data workers are forked, and pq.read_table would start threads in each of them.
        with pq.ParquetFile(pa.BufferReader(content)) as file:
            table = file.read(columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise EnvironmentFault(f"the index {path} cannot be read ({error}); restore it from a copy or rebuild") from None
    if table.num_rows != record.images:
        raise EnvironmentFault(
            f"{path}: expected {record.images} rows as in {MANIFEST}, got {table.num_rows}; rebuild the dataset"
        )
    numbers = {name: table[name].to_numpy() for name in columns[1:] if name != "labels"}
    labels = None
    if table["labels"].null_count == 0 and manifest.most_labels > 1:
        lists = table["labels"].combine_chunks()
        values, ends = lists.values.to_numpy(), lists.offsets.to_numpy()
        labels = [values[start:end] for start, end in itertools.pairwise(ends.tolist())]
    return ShardIndex(keys=np.array(table["key"].to_pylist(), dtype="S"), labels=labels, **numbers)


def _tars_at(directory: Path) -> str:
    location = directory / LOCATION
    return str(read_json(location)["tars_at"]) if location.exists() else str(directory)


def write_table(path: Path, columns: Mapping[str, Any], *, schema: pa.Schema | None = None) -> None:
    """Write columns (arrays or lists of equal length) as a Parquet file, whole or not at all.

    Equal columns give equal bytes under one version of pyarrow.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(dict(columns), schema=schema), sink, compression="zstd")
    write_bytes(path, sink.getvalue().to_pybytes())


def append_tables(path: Path, parts: Iterable[Mapping[str, Any]], *, schema: pa.Schema) -> None:
    """Write a Parquet file part by part, for tables too long for memory. The caller gives the file its final name."""
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for part in parts:
            writer.write_table(pa.table(dict(part), schema=schema))


def read_table(path: Path, *, columns: list[str] | None = None) -> dict[str, np.ndarray]:
    """Read the (given) columns of a Parquet file; text becomes object arrays. Raises EnvironmentFault naming the file."""
    try:
        # Not pq.read_table: it takes a folder named `a=b` above the file for one more column.
        with pq.ParquetFile(path) as file:
            table = file.read(columns=columns, use_threads=False)
    except FileNotFoundError:
        raise EnvironmentFault(f"expected a file at {path}, found none") from None
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise EnvironmentFault(f"{path} cannot be read as Parquet ({reason}); restore it from a copy or rebuild") from None
    return {name: table[name].to_numpy() for name in table.column_names}
