"""What is fetched: the shards of datasets on stores as entries of the cache, their sizes, bytes and hashes.

entry     a tar, and its index where the records of the dataset are on the store too; its key is FINGERPRINT/NAME
"""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from data_pipeline.cache import Cache, Part
from data_pipeline.manifest import Manifest, Shard
from data_pipeline.patience import Patience
from data_pipeline.store import Store, is_url, open_store
from vitscale.base.errors import HostFault
from vitscale.base.files import sha256_file


@dataclass(frozen=True, kw_only=True)
class _Remote:
    """A dataset whose tars are on a store."""

    manifest: Manifest
    store: Store
    has_remote_index: bool
    """The records were fetched too: an index lies in the cache, beside its tar."""


def has_remote_index(manifest: Manifest, cache_dir: Path) -> bool:
    """Whether the dataset was opened by its URL (remote.py), so that its indices are fetched with the tars."""
    return manifest.directory == cache_dir / manifest.fingerprint


def most_bytes(shard: Shard, *, with_index: bool) -> int:
    """Bytes of a tar, with those of its index guessed from above: 128 a row."""
    return shard.tar_bytes + (128 * shard.images + 32_768 if with_index else 0)


class Entries:
    """The shards of those of `manifests` whose tars are on stores. Use from any thread."""

    def __init__(self, manifests: Sequence[Manifest], *, cache_dir: Path, patience: Patience) -> None:
        self._remotes = {
            number: _Remote(
                manifest=manifest,
                store=open_store(manifest.tars_at, patience=patience),
                has_remote_index=has_remote_index(manifest, cache_dir),
            )
            for number, manifest in enumerate(manifests)
            if is_url(manifest.tars_at)
        }
        self._places: dict[str, tuple[_Remote, Shard]] = {}
        self._index_bytes: dict[str, int] = {}
        self._is_second_try: set[str] = set()
        self.fetched_bytes = 0
        """Bytes received, those of damaged copies included."""

    def key_of(self, source: int, shard: int) -> str | None:
        """Key of shard number `shard` of the dataset number `source`; None: its tars are on a disk."""
        remote = self._remotes.get(source)
        if remote is None:
            return None
        record = remote.manifest.shards[shard]
        key = f"{remote.manifest.fingerprint}/{record.name}"
        self._places[key] = (remote, record)
        return key

    def size(self, key: str) -> int:
        """Bytes of tar and index. The latter is guessed from above until the store has said."""
        remote, shard = self._places[key]
        if key in self._index_bytes:
            return shard.tar_bytes + self._index_bytes[key]
        return most_bytes(shard, with_index=remote.has_remote_index)

    def is_guessed(self, key: str) -> bool:
        return self._places[key][0].has_remote_index and key not in self._index_bytes

    def sizes(self, key: str) -> tuple[int, int | None]:
        """(bytes of the tar, bytes of the index to be fetched), as the store says. Raises HostFault for a tar that is not
        as long as in the manifest."""
        remote, shard = self._places[key]
        path = f"{shard.name}.tar"
        size = remote.store.size(path)
        if size != shard.tar_bytes:
            raise HostFault(
                f"{remote.store.url_of(path)} has {size} bytes, but the manifest says {shard.tar_bytes}; "
                "upload the dataset again, or index it again"
            )
        if remote.has_remote_index:
            self._index_bytes[key] = remote.store.size(f"{shard.name}.parquet")
        return size, self._index_bytes.get(key)

    def fetch(self, key: str, part: Part, *, stop: threading.Event) -> bool:
        """Fill the files of `part` and keep it; False: what came has another hash. Raises HostFault when it is so twice."""
        remote, shard = self._places[key]
        wanted = [(f"{shard.name}.tar", part.tar, shard.tar_sha256)]
        if part.index is not None:
            wanted.append((f"{shard.name}.parquet", part.index, shard.index_sha256))
        is_kept = False
        try:
            for path, file, sha256 in wanted:
                if self._copy(remote.store, path, file, stop=stop) != sha256:
                    if key in self._is_second_try:
                        raise HostFault(
                            f"{remote.store.url_of(path)} does not have the sha256 that the manifest holds, twice in a row; "
                            "upload it again"
                        )
                    self._is_second_try.add(key)
                    return False
            part.keep()
            is_kept = True
        finally:
            if not is_kept:
                part.drop()
        self._is_second_try.discard(key)
        return True

    def _copy(self, store: Store, path: str, file: FileIO, *, stop: threading.Event) -> str:
        """The sha256 of what came."""
        digest = hashlib.sha256()
        for chunk in store.chunks(path, stop=stop):
            written = 0
            while written < len(chunk):
                written += file.write(memoryview(chunk)[written:])
            digest.update(chunk)
            self.fetched_bytes += len(chunk)
        return digest.hexdigest()

    def is_good(self, key: str, cache: Cache, *, since_s: float) -> bool:
        """Whether the files in the cache are those of the manifest; whoever fetched one after `since_s` has verified it.

        Raises FileNotFoundError for an entry that is gone, or lacks its index.
        """
        remote, shard = self._places[key]
        files = [(cache.tar(key), shard.tar_sha256)]
        if remote.has_remote_index:
            files.append((cache.index(key), shard.index_sha256))
        return all(path.stat().st_mtime > since_s or sha256_file(path) == expected for path, expected in files)
