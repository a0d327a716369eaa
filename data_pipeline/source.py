"""Where images come from: a sorted, numbered list of inputs, and the bytes of each.

input    one candidate image; its *number* is fixed by the sorted source alone and becomes its key
name     what a person calls the input: a path below the source, a row of a Parquet file
group    neighbouring inputs that are read together (a Parquet row group)
place    where the bytes of an input lie inside a large file: file number, offset, size
chunk    a run of the list, short enough for memory; listing.py writes them to disk one after the other

A kind of source is one class with `list_inputs` and `read` in data_pipeline/sources/, and one line in `open_source`.
"""

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from vitscale.base.errors import UsageError

CHUNK_ROWS = 65536
NOT_AN_IMAGE = "not-an-image"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A run of inputs; row i of every field describes one input, in ascending order of number."""

    numbers: np.ndarray
    """int64."""
    names: pa.LargeStringArray
    labels: pa.Array | None = None
    """As the source has them: whole numbers, class names, or lists of either; null: no class. None: there are no labels."""
    groups: np.ndarray | None = None
    """int32, not decreasing: inputs with equal value are read together. None: each by itself."""
    places: np.ndarray | None = None
    """(rows, 3) int64: number of the file, offset, size; for sources that need them to read."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Inputs to read; row i of every field describes one. Small: it travels to a worker."""

    numbers: np.ndarray
    names: list[str]
    places: np.ndarray | None

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, kw_only=True)
class Unusable:
    """Stands for the bytes of an input that is rejected before anybody decodes it."""

    reason: str
    """Short, for counting: not-an-image, no-label, not-a-file, missing-file, no-class, no-image, bad-label, too-many-bytes."""
    detail: str


class Source(ABC):
    """A sorted list of inputs. Instances travel to worker processes: they hold no open files."""

    is_random_access = True
    """False: bytes come cheaply only group by group, so the scan spills them (design.md 5.2)."""
    class_names: tuple[str, ...] = ()
    """Name of class i at place i, where the source knows them; else the labels themselves tell the classes."""
    where: str
    """What messages call the source."""

    @abstractmethod
    def list_inputs(self) -> Iterator[Chunk]:
        """The complete list, equal on every call while the source is unchanged."""

    @abstractmethod
    def read(self, wanted: Wanted, *, max_bytes: int | None = None) -> Iterator[bytes | Unusable]:
        """Bytes of some inputs in the given order; Unusable where there are none to decode.

        Without random access they must be of one group, in ascending order. What is longer than `max_bytes` need not be
        read into memory: too-many-bytes. A file that cannot be read at all raises OSError or EnvironmentFault: that is no
        verdict on the image.
        """


def packed(names: list[str], *, where: str) -> pa.LargeStringArray:
    """Raises UsageError for names of files that are not in UTF-8."""
    try:
        return pa.array(names, pa.large_string())
    except UnicodeEncodeError as error:
        raise UsageError(f"expected names in UTF-8 in {where}, got {error.object!r}; rename it") from None


def read_file(path: Path, *, max_bytes: int | None) -> bytes | Unusable:
    """The content of a regular file. Raises OSError."""
    no_file = Unusable(reason="not-a-file", detail="a directory, a pipe or a device")
    try:
        # Without blocking: opening a pipe would wait for somebody to write into it.
        with open(path, "rb", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            return too_long(status.st_size, max_bytes) or file.readall() if stat.S_ISREG(status.st_mode) else no_file
    except IsADirectoryError:
        return no_file


def too_long(size: int, max_bytes: int | None) -> Unusable | None:
    if max_bytes is None or size <= max_bytes:
        return None
    return Unusable(reason="too-many-bytes", detail=f"{size} bytes are more than {max_bytes}")


def is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS)


def not_an_image(name: str) -> Unusable:
    return Unusable(reason=NOT_AN_IMAGE, detail=f"the ending {Path(name).suffix!r} is not one of an image")


def what_is(path: Path) -> str:
    return "a file" if path.is_file() else "nothing" if not path.exists() else "no plain file"
