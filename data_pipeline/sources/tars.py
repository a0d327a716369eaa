"""One tar per class, as ImageNet-21k ships: n01440764.tar holds the images of class n01440764.

Listed are the tars by name, their members in the order of the tar. An input is called n01440764.tar:n01440764_36.JPEG.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.source import IMAGE_ENDINGS, Chunk, Source, Unusable, Wanted, is_image_name, not_an_image, packed
from data_pipeline.sources.packed import find_tars, in_chunks, read_places, reading, tar_members
from data_pipeline.tars import Member
from vitscale.base.errors import UsageError


class TarsSource(Source):
    """Every regular file in the tars; those whose names do not end like an image are rejected."""

    def __init__(self, pattern: str) -> None:
        self.where = pattern
        self.files = sorted(find_tars(pattern), key=lambda file: (file.stem, str(file)))
        self.class_names = tuple(sorted({file.stem for file in self.files}))

    def list_inputs(self) -> Iterator[Chunk]:
        listed, has_images = 0, False
        numbers = {name: number for number, name in enumerate(self.class_names)}
        for number, file in enumerate(self.files):
            for part in in_chunks(_images(file)):
                names = [f"{file.name}:{member.name}" for member in part]
                has_images = has_images or any(map(is_image_name, names))
                yield Chunk(
                    numbers=np.arange(listed, listed + len(part), dtype=np.int64),
                    names=packed(names, where=self.where),
                    labels=pa.array(np.full(len(part), numbers[file.stem], np.int32)),
                    places=np.array([(number, member.offset, member.size) for member in part], np.int64),
                )
                listed += len(part)
        if not has_images:
            raise UsageError(f"expected images ({' '.join(IMAGE_ENDINGS)}) in the tars of {self.where}, found none")

    def read(self, wanted: Wanted, *, max_bytes: int | None = None) -> Iterator[bytes | Unusable]:
        assert wanted.places is not None, "listed with places"
        contents = read_places(self.files, wanted.places, max_bytes=max_bytes)
        for name, content in zip(wanted.names, contents, strict=True):
            yield content if is_image_name(name) else not_an_image(name)


def _images(file: Path) -> Iterator[Member]:
    with reading(file) as read_at:
        for member in tar_members(file, read_at):
            if member.name.lower().endswith(".tar"):
                raise UsageError(
                    f"{file} holds tars such as {member.name}, expected the images of one class; "
                    "unpack it and name the directory with its tars"
                )
            yield member
