"""Bytes of samples from the tars of a local or network file system, or from the cache of an object store.

The index of a shard says where each image lies, so a read is one `pread`; the page cache of the system does the rest.
Every read is compared with the hash in the index before anybody decodes it.

Indexes and open files are kept per process, the least recently used dropped first. Nothing is opened before it is
needed, and a pickled or forked copy works: `pread` has no shared file position. A network file system that fails is
asked again, with the file opened anew, until a deadline.
"""

import os
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_pipeline.manifest import Manifest, ShardIndex, read_index
from data_pipeline.store import is_url
from vitscale.base.errors import EnvironmentFault, HostFault, TransientFault
from vitscale.base.files import xxh3_64

INDEX_ROWS_KEPT = 2_000_000
"""Rows of shard indexes held per process, about 40 bytes each (80 MB). One rank that reads all of 128 lanes with
10,000 images per shard has 1.8 M rows in use; eight ranks have 0.2 M each."""

FILES_KEPT = 256
"""Tars held open per process: below the usual limit of 1,024 descriptors."""

READS_PER_LOOK = 512
"""Reads between two looks for open tars that the cache has evicted: until closed, they keep their place on the disk."""

IO_DEADLINE_S = 120.0
"""How long a file system may fail before the run ends. A failover of an NFS server takes up to 90 s (its grace period)."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 5.0


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
    """Reads the samples of one dataset. `tars`: where its tars are, if not where the manifest says.

    A process that reads several datasets shares its open files among `share` of them.
    """

    def __init__(
        self, manifest: Manifest, *, tars: Path | None = None, share: int = 1, io_deadline_s: float = IO_DEADLINE_S
    ) -> None:
        self._manifest = manifest
        self._tars = tars or Path(manifest.tars_at)
        self._share = share
        self._io_deadline_s = io_deadline_s
        self._is_cached = is_url(manifest.tars_at)
        self._reads_until_look = READS_PER_LOOK
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._index_rows = 0
        self._files: OrderedDict[int, FileIO] = OrderedDict()

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        """Pickle without caches: open files stay with their process."""
        return partial(LocalStorage, self._manifest, tars=self._tars, share=self._share, io_deadline_s=self._io_deadline_s), ()

    def close(self) -> None:
        """Close the open tars. A later read opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def read(self, shard: int, row: int) -> Stored:
        """The sample in row `row` of shard number `shard`.

        Raises DamagedBytes for bytes that are not those the index describes, HostFault (exit 3, from the rank that saw
        it) for missing files and for an index that is damaged, TransientFault (exit 75) when the file system fails.
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
            index = read_index(self._manifest, shard, read=self._read_whole)
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
        path = self._tar(shard)
        try:
            file = FileIO(path)
        except (FileNotFoundError, PermissionError) as error:
            raise HostFault(f"expected to read the shard {path}, got: {error.strerror}; restore it from a copy") from None
        self._files[shard] = file
        if len(self._files) > max(1, FILES_KEPT // self._share):
            self._files.popitem(last=False)[1].close()
        return file

    def _tar(self, shard: int) -> Path:
        return self._tars / f"{self._manifest.shards[shard].name}.tar"

    def _read_whole(self, path: Path) -> bytes:
        return self._patiently(path, path.read_bytes)

    def _pread(self, shard: int, *, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, fewer only where the file ends."""
        self._close_evicted()

        def reopen() -> None:  # its handle may be what is stale
            file = self._files.pop(shard, None)
            if file is not None:
                with suppress(OSError):
                    file.close()

        return self._patiently(self._tar(shard), partial(self._pread_once, shard, offset=offset, size=size), reopen)

    def _patiently(self, path: Path, read: Callable[[], bytes], reopen: Callable[[], None] = lambda: None) -> bytes:
        """Faults that may pass are met with further tries."""
        give_up_at_s, longest_wait_s = time.monotonic() + self._io_deadline_s, _FIRST_WAIT_S
        while True:
            try:
                return read()
            except (FileNotFoundError, PermissionError):
                raise
            except OSError as error:
                reopen()
                if time.monotonic() > give_up_at_s:
                    raise TransientFault(
                        f"reading {path} failed for {self._io_deadline_s:.0f} s ({error}); "
                        "check the file system, then start again"
                    ) from None
            time.sleep(random.uniform(0, longest_wait_s))  # spread out: many workers fail together
            longest_wait_s = min(2 * longest_wait_s, _LONGEST_WAIT_S)

    def _pread_once(self, shard: int, *, offset: int, size: int) -> bytes:
        descriptor = self._file(shard).fileno()
        content = os.pread(descriptor, size, offset)
        # A network file system may answer in pieces.
        while len(content) < size and (more := os.pread(descriptor, size - len(content), offset + len(content))):
            content += more
        return content

    def _close_evicted(self) -> None:
        self._reads_until_look -= 1
        if self._is_cached and self._reads_until_look < 0:
            self._reads_until_look = READS_PER_LOOK
            for shard in [shard for shard, file in self._files.items() if not os.fstat(file.fileno()).st_nlink]:
                self._files.pop(shard).close()


def check_files(manifest: Manifest, *, local_rank: int = 0, local_world: int = 1) -> None:
    """See that every tar has the size of the manifest and every index is there: names and sizes only, no content.

    The ranks of a node share the work: each lists the directory, but asks only for its own share of the sizes. What is on
    a store is not asked for: what is missing there ends the run when it is first needed.
    Raises HostFault that names the first file that fails and counts the others.
    """
    is_remote = is_url(manifest.tars_at)
    tars = _names_in(manifest.directory if is_remote else Path(manifest.tars_at))
    indexes = tars if str(manifest.directory) == manifest.tars_at else _names_in(manifest.directory)
    has_local_index = not is_remote or manifest.directory.name != manifest.fingerprint
    bad = []
    for shard in manifest.shards[local_rank::local_world]:
        tar = tars.get(f"{shard.name}.tar")
        if is_remote:
            pass
        elif tar is None:
            bad.append(f"{shard.name}.tar is missing")
        elif (size := tar.stat().st_size) != shard.tar_bytes:
            bad.append(f"{shard.name}.tar has {size} bytes instead of {shard.tar_bytes}")
        if has_local_index and f"{shard.name}.parquet" not in indexes:
            bad.append(f"{shard.name}.parquet is missing")
    if bad:
        more = f", and {len(bad) - 1} more files like it" if len(bad) > 1 else ""
        raise HostFault(
            f"expected all files of the dataset at {manifest.directory}, but {bad[0]}{more}; "
            f"restore them from a copy or build the dataset again"
        )


def _names_in(directory: Path) -> dict[str, os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return {entry.name: entry for entry in entries}
    except OSError as error:
        raise HostFault(f"expected a directory with shards at {directory}, got: {error.strerror}") from None
