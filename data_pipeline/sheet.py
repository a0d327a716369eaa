"""What a contact sheet of a dataset shows: some images of a shard, and the inputs that were rejected. Drawn elsewhere.

picture    a thumbnail with its key and its labels, or its source and the reason why it was rejected
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.decode import BadImage, decode, decode_damaged, oriented, resize
from data_pipeline.manifest import REJECTS, Manifest, read_index, read_table
from data_pipeline.places import pieces_of, record_of, stamp_of
from data_pipeline.tar_index import IMAGE_BYTES_MAX, PIXELS_MAX, image_member
from data_pipeline.tars import BadTar, members, samples
from vitscale.base.files import xxh3_64

THUMBNAIL = 336
"""Pixels of the longer side, at most."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One cell of a sheet."""

    image_HWC: np.ndarray | None
    """uint8, RGB; None: it cannot be shown."""
    heading: str
    words: str
    remark: str = ""


def shard_pictures(manifest: Manifest, shard: int, *, count: int) -> list[Picture]:
    """Up to `count` images of a shard, evenly spaced from its first to its last."""
    record_of(manifest.directory, manifest.tars_at, f"{manifest.shards[shard].name}.parquet")
    index = read_index(manifest, shard)
    read_at = pieces_of(manifest.tars_at, manifest.shards[shard].name)
    rows = np.unique(np.linspace(0, len(index.keys) - 1, min(count, len(index.keys))).round().astype(int))
    pictures = []
    for row in rows.tolist():
        labels = [index.label[row]] if index.labels is None else index.labels[row]
        words = ", ".join(_label_words(manifest.classes, int(label)) for label in labels if label >= 0) or "no label"
        content = read_at(int(index.image_offset[row]), int(index.image_size[row]))
        image = None
        if xxh3_64(content) != int(index.image_xxh3[row]):
            words = "damaged: wrong hash"
        else:
            try:
                image = oriented(_thumbnail(decode(content)), int(index.orientation[row]))
            except BadImage as bad:
                words = str(bad)
        pictures.append(Picture(image_HWC=image, heading=bytes(index.keys[row]).decode(), words=words))
    return pictures


def rejected_pictures(manifest: Manifest, *, count: int, originals: Path | None) -> tuple[list[Picture], int]:
    """Up to `count` rejects, the reasons by turns, and how many there are.

    Their bytes come from the tars of an indexed dataset. Of a built one the inputs are below `originals`, if they are files;
    else there is nothing to see but name and reason.
    """
    rejects = read_table(record_of(manifest.directory, manifest.tars_at, REJECTS))
    rows = _by_turns(rejects["reason"].astype(str))[:count]
    names = rejects["source"][rows].tolist()
    if "indexed_tars" in manifest.build:
        contents = _from_tars(manifest, names)
    else:
        paths = {} if originals is None else {name: originals / name for name in names}
        contents = {name: path.read_bytes() for name, path in paths.items() if _is_small_file(path)}
    pictures = [
        Picture(image_HWC=_glimpse(contents.get(name)), heading=name, words=reason, remark=detail)
        for name, reason, detail in zip(names, rejects["reason"][rows], rejects["detail"][rows], strict=True)
    ]
    return pictures, len(rejects["reason"])


def _is_small_file(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= IMAGE_BYTES_MAX


def _label_words(classes: tuple[str, ...], label: int) -> str:
    name = classes[label] if label < len(classes) else ""
    return str(label) if name in ("", str(label)) else f"{label} {name}"


def _thumbnail(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    scale = min(1.0, THUMBNAIL / max(height, width))
    return resize(image, width=max(1, round(width * scale)), height=max(1, round(height * scale))).copy()


def _glimpse(content: bytes | None) -> np.ndarray | None:
    """What can be seen of an image that was rejected."""
    if content is None:
        return None
    try:
        return _thumbnail(decode_damaged(content, max_pixels=PIXELS_MAX))
    except BadImage:
        return None


def _by_turns(reasons: np.ndarray) -> np.ndarray:
    """Rows so that the rare reasons are not behind the common ones: the first of each, the second of each, ..."""
    turn = np.zeros(len(reasons), np.int64)
    for reason in np.unique(reasons):
        is_it = reasons == reason
        turn[is_it] = np.arange(is_it.sum())
    return np.lexsort((reasons, turn))


def _from_tars(manifest: Manifest, names: list[str]) -> dict[str, bytes]:
    """Bytes of the rejected samples `TAR:MEMBER` that have an image, as far as their tars can be walked."""
    contents: dict[str, bytes] = {}
    for tar in sorted({name.partition(":")[0] for name in names}):
        contents.update(_wanted(manifest.tars_at, tar.removesuffix(".tar"), set(names)))
    return contents


def _wanted(at: str, tar: str, names: set[str]) -> Iterator[tuple[str, bytes]]:
    read_at = pieces_of(at, tar)
    try:
        for sample in samples(members(read_at, stamp_of(at, tar).size)):
            image = image_member(sample)
            if image is not None and (name := f"{tar}.tar:{image.name}") in names and image.size <= IMAGE_BYTES_MAX:
                yield name, read_at(image.offset, image.size)
    except BadTar:
        return
