"""Bytes of samples from the tars of a local or network file system.

The index of a shard says where each image lies, so a read is one `pread`; the page cache of the system does the rest.
Every read is compared with the hash in the index before anybody decodes it.

Indexes and open files are kept per process, the least recently used dropped first. Nothing is opened before it is
needed, and a pickled or forked copy works: `pread` has no shared file position.
"""

import os
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from io import FileIO
from typing import Any, Literal

import numpy as np

from data_pipeline.manifest import Manifest, ShardIndex, read_index
from vitscale.base.errors import EnvironmentFault, HostFault, TransientFault
from vitscale.base.files import xxh3_64

INDEX_ROWS_KEPT = 2_000_000
"""Rows of shard indexes held per process, about 40 bytes each (80 MB). One rank that reads all of 128 lanes with
10,000 images per shard has 1.8 M rows in use; eight ranks have 0.2 M each."""

FILES_KEPT = 256
"""Tars held open per process: below the usual limit of 1,024 descriptors."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One sample as it lies in its shard."""

    key: bytes
    label: int
    """The first label; -1: no label."""
    labels: np.ndarray | None
    """All labels, where images may have several."""
    orientation: int
    content: bytes
    """The encoded image."""


class DamagedBytes(Exception):
    """The bytes of one image are not those that the index describes: `reason` for counting, `detail` for reading."""

    def __init__(self, key: bytes, reason: Literal["short-read", "wrong-hash"], detail: str) -> None:
        super().__init__(key, reason, detail)
        self.key = key
        self.reason: Literal["short-read", "wrong-hash"] = reason
        self.detail = detail


class LocalStorage:
    """Reads the samples of one dataset. A process that reads several shares its open files among `share` of them."""

    def __init__(self, manifest: Manifest, *, share: int = 1) -> None:
        self._manifest = manifest
        self._share = share
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._index_rows = 0
        self._files: OrderedDict[int, FileIO] = OrderedDict()

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        """Pickle without caches: open files stay with their process."""
        return partial(LocalStorage, self._manifest, share=self._share), ()

    def close(self) -> None:
        """Close the open tars. A later read opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def read(self, shard: int, row: int) -> Stored:
        """The sample in row `row` of shard number `shard`.

        Raises DamagedBytes for bytes that are not those the index describes, HostFault (exit 3, from the rank that saw
        it) for missing files and for an index that cannot be read, TransientFault (exit 75) when the file system fails.
        """
        index = self._index(shard)
        key, size = bytes(index.keys[row]), int(index.image_size[row])
        content = self._pread(shard, offset=int(index.image_offset[row]), size=size)
        if len(content) != size:
            raise DamagedBytes(key, "short-read", f"expected {size} bytes of image, the file ends after {len(content)}")
        if xxh3_64(content) != int(index.image_xxh3[row]):
            raise DamagedBytes(key, "wrong-hash", "the image bytes do not have the hash that the index holds")
        return Stored(
            key=key,
            label=int(index.label[row]),
            labels=index.labels[row] if index.labels is not None else None,
            orientation=int(index.orientation[row]),
            content=content,
        )

    def _index(self, shard: int) -> ShardIndex:
        index = self._indexes.get(shard)
        if index is not None:
            self._indexes.move_to_end(shard)
            return index
        try:
            index = read_index(self._manifest, shard)
        except EnvironmentFault as error:
            raise HostFault(str(error)) from None  # any rank may be the one that meets it
        self._indexes[shard] = index
        self._index_rows += len(index.keys)
        while self._index_rows > INDEX_ROWS_KEPT and len(self._indexes) > 1:
            self._index_rows -= len(self._indexes.popitem(last=False)[1].keys)
        return index

    def _file(self, shard: int) -> FileIO:
        file = self._files.get(shard)
        if file is not None:
            self._files.move_to_end(shard)
            return file
        path = self._manifest.directory / f"{self._manifest.shards[shard].name}.tar"
        try:
            file = FileIO(path)
        except (FileNotFoundError, PermissionError) as error:
            raise HostFault(f"expected to read the shard {path}, got: {error.strerror}; restore it from a copy") from None
        self._files[shard] = file
        if len(self._files) > max(1, FILES_KEPT // self._share):
            self._files.popitem(last=False)[1].close()
        return file

    def _pread(self, shard: int, *, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, fewer only where the file ends: a network file system may answer in pieces."""
        try:
            descriptor = self._file(shard).fileno()
            content = os.pread(descriptor, size, offset)
            while len(content) < size and (more := os.pread(descriptor, size - len(content), offset + len(content))):
                content += more
            return content
        except OSError as error:
            tar = f"{self._manifest.directory / self._manifest.shards[shard].name}.tar"
            raise TransientFault(f"reading {tar} failed ({error}); check the file system, then start again") from None


def check_files(manifest: Manifest) -> None:
    """See that every tar has the size of the manifest and every index is there: names and sizes only, no content.

    Raises EnvironmentFault that names the first file that fails and counts the others.
    """
    with os.scandir(manifest.directory) as entries:
        found = {entry.name: entry for entry in entries}
    bad = []
    for shard in manifest.shards:
        tar = found.get(f"{shard.name}.tar")
        if tar is None:
            bad.append(f"{shard.name}.tar is missing")
        elif (size := tar.stat().st_size) != shard.tar_bytes:
            bad.append(f"{shard.name}.tar has {size} bytes instead of {shard.tar_bytes}")
        if f"{shard.name}.parquet" not in found:
            bad.append(f"{shard.name}.parquet is missing")
    if bad:
        more = f", and {len(bad) - 1} more files like it" if len(bad) > 1 else ""
        raise EnvironmentFault(
            f"expected all files of the dataset at {manifest.directory}, but {bad[0]}{more}; "
            f"restore them from a copy or build the dataset again"
        )
