"""A directory of fetched shards that never grows above its limit, shared by all ranks of a node.

CACHE/
  lock                       flock: one process at a time takes room or makes it, for milliseconds
  leases/PID-XXXX            what one rank needs, under flock while that rank lives
  FINGERPRINT/
    manifest.json            of a dataset that was opened by its URL
    NAME.tar                 a shard, whole and verified
    NAME.parquet             its index, where the records of the dataset are on the store too
    NAME.tar.part            being fetched, under flock while its rank lives; also NAME.parquet.part

entry     one shard here: its tar and its index, under the key FINGERPRINT/NAME
limit     most bytes of all files together, at every instant: a .part has its final length before its first byte comes,
          so the sizes in the directory are the account, and no record of it can be wrong after a kill
due       what the ranks must have at once: never evicted
distance  lists of images until a rank needs an entry; 0: due

What a killed rank leaves is recognised by its flock, which the system takes back, and removed by the next who looks.
Keep CACHE on a disk of the node: flock and speed are those of its file system.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Literal
from uuid import uuid4

from data_pipeline.eviction import Held, Need, UsesOf, victims
from vitscale.base.errors import HostFault, UsageError

Answer = Literal["whole", "busy", "full"]


class CacheTooSmall(UsageError):
    """The limit is below what the ranks of this node need at once. Exit 2, printed by the rank that found it."""

    every_rank_speaks = True


class Part:
    """Room for one entry, and the only permission to fetch it. Ends by `keep` or `drop`."""

    def __init__(self, cache: "Cache", key: str, *, tar: FileIO, index: FileIO | None) -> None:
        self.tar, self.index = tar, index
        self._cache, self._key = cache, key

    def keep(self) -> None:
        """The files are whole and verified: name them as such."""
        with self._cache.locked():
            if self.index is not None:
                os.replace(_part(self._cache.index(self._key)), self._cache.index(self._key))
            os.replace(_part(self._cache.tar(self._key)), self._cache.tar(self._key))
            self._close()

    def drop(self) -> None:
        with self._cache.locked():
            for path in (self._cache.tar(self._key), self._cache.index(self._key)):
                _part(path).unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        # A process forked meanwhile holds the file open as well: closing alone would not give the lock back.
        fcntl.flock(self.tar, fcntl.LOCK_UN)
        self.tar.close()
        if self.index is not None:
            self.index.close()


class Cache:
    """One rank's hold on the directory. Use from any thread of the process that made it."""

    def __init__(self, directory: Path, *, limit_bytes: int) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes
        self.evicted: list[str] = []
        """Keys this rank has evicted."""
        self._is_shrunk = False
        self._mine: dict[str, Need] = {}
        self._leases = directory / "leases"
        try:
            self._leases.mkdir(parents=True, exist_ok=True, mode=0o700)
            if directory.stat().st_uid != os.getuid():
                raise HostFault(f"the cache {directory} belongs to another user; set data.cache_dir to a directory of your own")
            self._lock_path = directory / "lock"
            self._lock_path.touch()
            with self.locked():
                self._lease_path = self._leases / f"{os.getpid()}-{uuid4().hex[:8]}"
                self._lease = FileIO(self._lease_path, "w+")
                fcntl.flock(self._lease, fcntl.LOCK_EX)
                self._survey()  # removes what killed ranks have left
        except OSError as error:
            raise HostFault(
                f"the cache {directory} cannot be used ({error}); set data.cache_dir to a local directory"
            ) from None

    def tar(self, key: str) -> Path:
        return self.directory / f"{key}.tar"

    def index(self, key: str) -> Path:
        return self.directory / f"{key}.parquet"

    def close(self) -> None:
        """Need nothing any more."""
        with self.locked():
            self._lease_path.unlink(missing_ok=True)
            fcntl.flock(self._lease, fcntl.LOCK_UN)
            self._lease.close()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among all threads and processes that use the directory."""
        with open(self._lock_path, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)

    def publish(self, needs: Mapping[str, Need], *, uses_of: UsesOf) -> set[str]:
        """Tell the other ranks what this one needs; returns what of it is there.

        From here on nobody evicts what is due. Raises CacheTooSmall when all that is due on this node exceeds the limit.
        The first call makes a directory smaller that an earlier run has filled up to a higher limit.
        """
        record = json.dumps({key: [need.distance, need.size] for key, need in needs.items()}).encode()
        with self.locked():
            self._mine = dict(needs)
            os.ftruncate(self._lease.fileno(), 0)
            os.pwrite(self._lease.fileno(), record, 0)
            self._check_limit()
            if not self._is_shrunk:
                held, total = self._survey()
                missing = total - self.limit_bytes
                for key in self._victims(held, distance=0, uses_of=uses_of, size=missing) or ():
                    self._evict(key, held[key])
                self._is_shrunk = True
            return {key for key in needs if self.tar(key).exists()}

    def begin(
        self,
        key: str,
        *,
        tar_bytes: int,
        index_bytes: int | None,
        distance: int,
        uses_of: UsesOf,
    ) -> Part | Answer:
        """Take room for an entry that is `distance` lists away, evicting what is needed later.

        "whole": it is there; "busy": another rank or thread fetches it; "full": no room for it as yet.
        Raises CacheTooSmall, or HostFault when the disk is full or fails.
        """
        with self.locked():
            tar = self.tar(key)
            if tar.exists():
                return "whole"
            if _is_locked(_part(tar)):
                return "busy"
            held, total = self._survey()
            orphan = held.pop(key, None)  # an index without its tar
            if orphan is not None:
                total -= self._evict(key, orphan)
            size = tar_bytes + (index_bytes or 0)
            needs = self._needs()
            reserve = 0
            if distance:  # what is fetched ahead leaves room for what is due or needed sooner, and not there
                absent = [
                    k
                    for k, need in needs.items()
                    if k not in held and k != key and (not need.distance or uses_of(k, distance)[0] < distance)
                ]
                reserve = sum(needs[k].size for k in absent)
                held |= {k: Held(is_coming=True) for k in absent}
            missing, is_disk_full = total + size + reserve - self.limit_bytes, False
            while True:
                chosen = self._victims(held, distance=distance, uses_of=uses_of, size=missing)
                if chosen is None:
                    if not distance:
                        self._check_limit()
                        if is_disk_full:
                            raise HostFault(
                                f"the disk of the cache {self.directory} is full with {size:,} bytes still to come; "
                                "free some of it, or set data.cache_dir to another disk"
                            )
                    return "full"
                for victim in chosen:
                    self._evict(victim, held.pop(victim))
                part = self._take(key, tar_bytes=tar_bytes, index_bytes=index_bytes)
                if part is not None:
                    return part
                missing, is_disk_full = size, True  # the disk is smaller than the limit

    def discard(self, key: str) -> None:
        """Remove an entry that was found damaged."""
        with self.locked():
            for path in (self.tar(key), self.index(key)):
                path.unlink(missing_ok=True)

    def touch(self, key: str) -> None:
        """Note that an entry was in use until now."""
        try:
            stat = os.stat(self.tar(key))
            os.utime(self.tar(key), ns=(time.time_ns(), stat.st_mtime_ns))
        except FileNotFoundError:
            pass

    # ---- under the lock -----------------------------------------------------------------------------------------

    def _take(self, key: str, *, tar_bytes: int, index_bytes: int | None) -> Part | None:
        """Make the .part files at their final length. None: the disk has no room."""
        tar_path, index_path = _part(self.tar(key)), _part(self.index(key))
        tar_path.parent.mkdir(exist_ok=True)
        tar = FileIO(tar_path, "w")
        fcntl.flock(tar, fcntl.LOCK_EX)
        index = FileIO(index_path, "w") if index_bytes is not None else None
        part = Part(self, key, tar=tar, index=index)
        try:
            for file, size in ((tar, tar_bytes), (index, index_bytes or 0)):
                if file is not None and size:
                    os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            tar_path.unlink()
            index_path.unlink(missing_ok=True)
            part._close()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise HostFault(f"the cache {self.directory} cannot be written ({error}); set data.cache_dir") from None
            return None
        return part

    def _survey(self) -> tuple[dict[str, Held], int]:
        """All entries, and the bytes of all files. Parts without a living owner are removed."""
        held: dict[str, Held] = {}
        total = 0
        for folder in self.directory.iterdir():
            if not folder.is_dir() or folder == self._leases:
                continue
            with os.scandir(folder) as entries:
                files = {entry.name: entry for entry in entries}
            for name, file in files.items():
                path = Path(file.path)
                if name.endswith(".part"):
                    owner = path.with_name(
                        name.removesuffix(".part").removesuffix(".parquet").removesuffix(".tar") + ".tar.part"
                    )
                    if not _is_locked(owner):
                        path.unlink(missing_ok=True)
                        continue
                try:
                    stat = path.stat()
                except FileNotFoundError:  # the temporary file of a manifest
                    continue
                total += stat.st_size
                whole = path.with_suffix("") if path.suffix == ".part" else path
                if whole.suffix in (".tar", ".parquet"):
                    entry = held.setdefault(f"{folder.name}/{whole.stem}", Held())
                    entry.is_coming |= path is not whole
                    entry.files.append(path)
                    entry.size += stat.st_size
                    entry.used_at_ns = max(entry.used_at_ns, stat.st_atime_ns)
        return held, total

    def _needs(self) -> dict[str, Need]:
        """The soonest need of each entry over all living ranks."""
        needs = self._needs_of_others()
        for key, need in self._mine.items():
            if key not in needs or need.distance < needs[key].distance:
                needs[key] = need
        return needs

    def _needs_of_others(self) -> dict[str, Need]:
        needs: dict[str, Need] = {}
        for path in self._leases.iterdir():
            if path == self._lease_path:
                continue
            if not _is_locked(path):
                path.unlink(missing_ok=True)
                continue
            for key, (distance, size) in json.loads(path.read_bytes() or b"{}").items():
                if key not in needs or distance < needs[key].distance:
                    needs[key] = Need(distance=distance, size=size)
        return needs

    def _victims(self, held: dict[str, Held], *, distance: int, uses_of: UsesOf, size: int) -> list[str] | None:
        others = self._needs_of_others() if size > 0 else {}
        return victims(held, mine=self._mine, others=others, distance=distance, uses_of=uses_of, size=size)

    def _check_limit(self) -> None:
        needs = self._needs()
        due = sum(need.size for need in needs.values() if not need.distance)
        if due <= self.limit_bytes // 2:
            return
        held, total = self._survey()
        due += total - sum(entry.size for entry in held.values())  # manifests
        if due > self.limit_bytes:
            raise CacheTooSmall(
                f"expected data.cache_bytes to hold what the ranks of this node need at once, got {self.limit_bytes:,} bytes "
                f"for {due:,}; set it to at least {due}, better twice that, so that shards come before they are needed"
            )

    def _evict(self, key: str, entry: Held) -> int:
        for path in sorted(entry.files, reverse=True):  # the tar before its index
            path.unlink(missing_ok=True)
        self.evicted.append(key)
        return entry.size


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _is_locked(path: Path) -> bool:
    """Whether a living process holds the file's flock."""
    try:
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            fcntl.flock(file, fcntl.LOCK_UN)
            return False
    except FileNotFoundError:
        return False
