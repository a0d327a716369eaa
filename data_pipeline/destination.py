"""Where finished files go: a directory, or an object store with a directory that keeps all but the tars.

A dataset on a store is complete there (tars, indices, rejects, manifest last). The local directory holds the same small
files and location.json, which names the store: both places are the dataset.
"""

import functools
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.manifest import LOCATION, MANIFEST, REJECTS, TIMM_INFO
from data_pipeline.options import refuse_other_options
from data_pipeline.store import Store, open_store
from vitscale.base.errors import EnvironmentFault
from vitscale.base.files import fsync_path, publish, sha256_file, temporary_beside, unsafe_name, write_bytes, write_json


@dataclass(frozen=True, kw_only=True)
class Destination:
    """The place of one dataset."""

    directory: Path
    url: str | None
    """Of the dataset on a store; None: the directory holds everything."""

    def take_tar(self, temporary: Path, name: str) -> None:
        """Give a tar that is written and flushed its final name; on a store, and no longer here, if there is one."""
        if self.url is None:
            publish(temporary, self.directory / name)
        else:
            store_of(self.url).write(name, temporary)
            temporary.unlink()

    def take(self, temporary: Path, name: str) -> None:
        """Give a small file that is written and flushed its final name, here and on the store."""
        if self.url is not None:
            store_of(self.url).write(name, temporary)
        publish(temporary, self.directory / name)

    def copy(self, file: Path, name: str) -> None:
        """The same for a file that stays where it is."""
        with temporary_beside(self.directory / name) as temporary:
            shutil.copyfile(file, temporary)
            fsync_path(temporary)
            self.take(temporary, name)

    def write_json(self, name: str, record: Any) -> None:
        with temporary_beside(self.directory / name) as temporary:
            write_json(temporary, record)
            self.take(temporary, name)

    def take_over(self, wanted_options: dict[str, Any]) -> bool:
        """Bring all but the tars of a dataset that is complete on the store here, the manifest last.

        False: there is none. Raises UsageError when it was built with other options.
        """
        if self.url is None or (manifest := self._read(MANIFEST)) is None:
            return False
        record = json.loads(manifest)
        refuse_other_options(wanted_options, record["build"].get("options", {}), f"{self.url} holds a dataset built")
        if (odd := unsafe_name(shard["name"] for shard in record["shards"])) is not None:
            raise EnvironmentFault(f"{self.url}/{MANIFEST} names a shard {odd}; expected plain file names, each once")
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in (*(f"{shard['name']}.parquet" for shard in record["shards"]), REJECTS, TIMM_INFO):
            write_bytes(self.directory / name, store_of(self.url).read(name))
        self.say_where()
        write_bytes(self.directory / MANIFEST, manifest)
        return True

    def say_where(self) -> None:
        """Leave the record that leads readers of the directory to the store, if there is one."""
        if self.url is not None:
            write_json(self.directory / LOCATION, {"tars_at": self.url})

    def forget(self, split: str) -> None:
        """Delete the dataset on the store, its manifest first. Over http(s), which cannot list, the manifest alone."""
        if self.url is None or self._read(MANIFEST) is None:
            return
        store = store_of(self.url)
        store.delete(MANIFEST)
        if not self.url.startswith("http"):
            ours = re.compile(rf"{re.escape(split)}-\d+\.(tar|parquet)|{re.escape(REJECTS)}|{re.escape(TIMM_INFO)}")
            for name in store.list(""):
                if ours.fullmatch(name):
                    store.delete(name)

    def _read(self, name: str) -> bytes | None:
        assert self.url is not None
        try:
            return store_of(self.url).read(name)
        except EnvironmentFault:  # not there; or not ours to see, and then writing says so
            return None

    def holds_tar(self, name: str, size: int, sha256: str) -> bool:
        """Whether the tar is there as recorded. On a store its size is compared: what was sent was proved before."""
        if self.url is not None:
            try:
                return store_of(self.url).size(name) == size
            except EnvironmentFault:  # not there; or not ours to see, and then writing says so
                return False
        path = self.directory / name
        return path.exists() and path.stat().st_size == size and sha256_file(path) == sha256

    def holds(self, name: str, sha256: str) -> bool:
        path = self.directory / name
        return path.exists() and sha256_file(path) == sha256


@functools.lru_cache(maxsize=4)
def store_of(url: str) -> Store:
    """One per process: the threads of a store do not survive a fork, so none is made before the workers are."""
    return open_store(url)
