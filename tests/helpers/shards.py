"""Small datasets written by hand, without the builder: tars by tarfile, records by data_pipeline.manifest."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.decode import encode_png
from data_pipeline.manifest import INDEX_SCHEMA, Manifest, Shard, write_manifest
from vitscale.base.files import sha256_file, xxh3_64

Picture = np.ndarray | bytes
"""Pixels (stored as PNG), or the bytes of a JPEG."""


def write_dataset(
    directory: Path,
    images: Sequence[Sequence[Picture]],
    labels: Sequence[Sequence[int | list[int]]],
    classes: Sequence[str],
) -> Manifest:
    """Write shard s with images[s] and labels[s]: numbers, or lists of numbers where images have several labels.

    Keys are nine digits that count over all shards.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards, first = [], 0
    for number, (pictures, marks) in enumerate(zip(images, labels, strict=True)):
        keys = [f"{first + i:09d}" for i in range(len(pictures))]
        shards.append(_write_shard(directory, f"train-{number:06d}", keys, pictures, marks))
        first += len(pictures)
    most_labels = max((len(mark) for marks in labels for mark in marks if isinstance(mark, list)), default=1)
    record = {"classes": list(classes), "images_read": first, "rejected": {}, "build": {}}
    return write_manifest(directory, shards=shards, most_labels=most_labels, **record)


def numbered_images(sizes: Sequence[int], *, side: int = 12) -> list[list[np.ndarray]]:
    """Shards of the given sizes; no two of the smooth coloured pictures are alike."""
    generator = np.random.default_rng(5)
    return [[smooth_image(generator, side, side) for _ in range(size)] for size in sizes]


def numbered_labels(sizes: Sequence[int]) -> list[list[int]]:
    """Label of an image: its number over all shards."""
    starts = np.cumsum([0, *sizes])
    return [list(range(start, start + size)) for start, size in zip(starts.tolist(), sizes, strict=False)]


def smooth_image(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Colours that change slowly, as in photographs: H,W,3."""
    coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def _write_shard(
    directory: Path, name: str, keys: list[str], pictures: Sequence[Picture], labels: Sequence[int | list[int]]
) -> Shard:
    rows = []
    tar_path, index_path = directory / f"{name}.tar", directory / f"{name}.parquet"
    with tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, picture, label in zip(keys, pictures, labels, strict=True):
            content, ending = (picture, "jpg") if isinstance(picture, bytes) else (encode_png(picture), "png")
            first, several = (label, None) if isinstance(label, int) else ((label or [-1])[0], label)
            marks = ("cls", str(first)) if several is None else ("json", json.dumps({"labels": several}))
            for suffix, member in ((ending, content), (marks[0], marks[1].encode())):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(member)
                if suffix == ending:
                    offset = tar.offset + tarfile.BLOCKSIZE
                tar.addfile(info, io.BytesIO(member))
            height, width = (0, 0) if isinstance(picture, bytes) else picture.shape[:2]
            image_hash = xxh3_64(content)
            rows.append((key, offset, len(content), first, several, width, height, 1, ending, image_hash, key, image_hash))
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in INDEX_SCHEMA]
    pq.write_table(pa.table(dict(zip(INDEX_SCHEMA.names, columns, strict=True)), schema=INDEX_SCHEMA), index_path)
    return Shard(
        name=name,
        images=len(keys),
        tar_bytes=tar_path.stat().st_size,
        tar_sha256=sha256_file(tar_path),
        index_sha256=sha256_file(index_path),
    )
