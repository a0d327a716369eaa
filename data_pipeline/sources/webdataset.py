"""Foreign WebDataset tars, to be sharded anew.

Understood: KEY.jpg, .jpeg, .png or .webp (the first of these a sample has) beside KEY.cls with a number or a name, or
KEY.json with {"label": ...}, {"labels": [...]}, a number or a list; class names from manifest.json or classnames.txt.

Listed are the tars by name, their samples in the order of the tar. An input is called train-000000.tar:KEY.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipeline.source import Chunk, Source, Unusable, Wanted, packed
from data_pipeline.sources.packed import ReadAt, find_tars, in_chunks, read_places, reading, tar_members
from data_pipeline.tars import TarSample, samples
from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.base.files import read_json

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
LABEL_BYTES_MAX = 1 << 20
# Sizes that stand for a reason why there is nothing to read.
_NO_IMAGE, _BAD_LABEL = -1, -2


class WebDatasetSource(Source):
    """The samples of the tars; those without an image, or with a label nobody can read, are rejected."""

    def __init__(self, pattern: str) -> None:
        self.where = pattern
        self.files = find_tars(pattern)
        self.class_names = _class_names(self.files[0].parent)

    def list_inputs(self) -> Iterator[Chunk]:
        listed, has_images = 0, False
        for number, file in enumerate(self.files):
            for part in in_chunks(_found(file)):
                names, labels, places = zip(*part, strict=True)
                has_images = has_images or any(size >= 0 for _, size in places)
                yield Chunk(
                    numbers=np.arange(listed, listed + len(part), dtype=np.int64),
                    names=packed(list(names), where=self.where),
                    labels=pa.array(labels, pa.list_(pa.string())),
                    places=np.array([(number, *place) for place in places], np.int64),
                )
                listed += len(part)
        if not has_images:
            endings = ", ".join(f".{ending}" for ending in IMAGE_MEMBERS)
            raise UsageError(f"expected WebDataset samples with images ({endings}) in the tars of {self.where}, found none")

    def read(self, wanted: Wanted, *, max_bytes: int | None = None) -> Iterator[bytes | Unusable]:
        assert wanted.places is not None, "listed with places"
        contents = read_places(self.files, wanted.places, max_bytes=max_bytes)
        for size, content in zip(wanted.places[:, 2].tolist(), contents, strict=True):
            if size == _NO_IMAGE:
                yield Unusable(reason="no-image", detail=f"no member ends in {' '.join(IMAGE_MEMBERS)}")
            elif size == _BAD_LABEL:
                yield Unusable(reason="bad-label", detail="its .cls or .json holds no number, name or list of them")
            else:
                yield content


def _found(file: Path) -> Iterator[tuple[str, list[str], tuple[int, int]]]:
    """Name, labels, and offset and size of the image of every sample."""
    with reading(file) as read_at:
        for sample in samples(tar_members(file, read_at)):
            image = next((sample.members[ending] for ending in IMAGE_MEMBERS if ending in sample.members), None)
            place = (image.offset, image.size) if image else (0, _NO_IMAGE)
            try:
                labels = _labels(sample, read_at)
            except (RecursionError, TypeError, ValueError):
                labels = []
                place = (0, _BAD_LABEL) if image else place
            yield f"{file.name}:{sample.key}", labels, place


def _labels(sample: TarSample, read_at: ReadAt) -> list[str]:
    """Raises ValueError or TypeError for what is no label."""
    member = sample.members.get("cls") or sample.members.get("json")
    if member is None:
        return []
    if member.size > LABEL_BYTES_MAX:
        raise ValueError("longer than any label")
    text = read_at(member.offset, member.size).decode()
    if "cls" in sample.members:
        return [text]
    found = json.loads(text)
    if isinstance(found, dict):
        found = found.get("labels", found.get("label"))
    return [_label(one) for one in found] if isinstance(found, list) else [] if found is None else [_label(found)]


def _label(found: Any) -> str:
    if isinstance(found, bool) or not isinstance(found, int | str):
        raise TypeError("neither a number nor a name")
    return str(found)


def _class_names(directory: Path) -> tuple[str, ...]:
    """From our manifest or from classnames.txt beside the tars; empty without either."""
    if (directory / "manifest.json").is_file():
        record = read_json(directory / "manifest.json")
        classes = record.get("classes") if isinstance(record, dict) else None
        if isinstance(classes, list) and all(isinstance(name, str) for name in classes):
            return tuple(classes)
    names = directory / "classnames.txt"
    if not names.is_file():
        return ()
    try:
        return tuple(line.strip() for line in names.read_text("utf-8").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise EnvironmentFault(f"{names} is not in UTF-8 ({error.reason}); write it anew") from None
