"""One folder per class; files of a class may lie in folders below it.

Listed are the files beside the class folders (rejected: they have no class), then class after class by name, inside a
class by path. Memory is that of the largest class.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.source import (
    CHUNK_ROWS,
    IMAGE_ENDINGS,
    Chunk,
    Source,
    Unusable,
    Wanted,
    is_image_name,
    not_an_image,
    packed,
    read_file,
    what_is,
)
from vitscale.base.errors import EnvironmentFault, UsageError


class FolderSource(Source):
    """Every file below ROOT/CLASS/."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise EnvironmentFault(f"expected a directory of class folders at {root}, found {what_is(root)}")
        self.root, self.where = root, str(root)
        with os.scandir(root) as entries:
            are_folders = {entry.name: entry.is_dir() for entry in entries}
        self.class_names = tuple(sorted(name for name, is_folder in are_folders.items() if is_folder))
        self.strays = sorted(name for name, is_folder in are_folders.items() if not is_folder)
        if not self.class_names:
            raise UsageError(f"expected one folder per class in {root}, found none; move the images into such")

    def list_inputs(self) -> Iterator[Chunk]:
        listed, has_images = 0, False
        for label, names in self._files_by_class():
            has_images = has_images or (label is not None and any(is_image_name(name) for name in names))
            for start in range(0, len(names), CHUNK_ROWS):
                part = packed(names[start : start + CHUNK_ROWS], where=self.where)
                numbers = np.arange(listed, listed + len(part), dtype=np.int64)
                yield Chunk(numbers=numbers, names=part, labels=pa.array([label] * len(part), pa.int32()))
                listed += len(part)
        if not has_images:
            raise UsageError(f"expected images ({' '.join(IMAGE_ENDINGS)}) in the class folders of {self.root}, found none")

    def read(self, wanted: Wanted, *, max_bytes: int | None = None) -> Iterator[bytes | Unusable]:
        for name in wanted.names:
            if not is_image_name(name):
                yield not_an_image(name)
            elif "/" not in name:
                yield Unusable(reason="no-class", detail="lies beside the class folders, not in one")
            else:
                yield read_file(self.root / name, max_bytes=max_bytes)

    def _files_by_class(self) -> Iterator[tuple[int | None, list[str]]]:
        yield None, self.strays
        for label, name in enumerate(self.class_names):
            yield label, [f"{name}/{file}" for file in sorted(_files_below(self.root / name))]


def _files_below(folder: Path) -> Iterator[str]:
    """Paths of all files below a folder, relative to it, with forward slashes."""

    def stop(error: OSError) -> None:
        raise error

    for at, _, files in os.walk(folder, onerror=stop, followlinks=True):
        below = Path(at).relative_to(folder)
        yield from ((below / file).as_posix() for file in files)
