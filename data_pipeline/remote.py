"""Datasets on object stores made readable by code that reads files.

A dataset is opened by its URL: its manifest is fetched into CACHE/FINGERPRINT/, and its shards follow as they are needed
(fetcher.py). Or its records lie in a local directory and only the tars are on a store, named by location.json.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data_pipeline.config import DataConfig, bytes_of
from data_pipeline.fetcher import Fetcher, ShardsOf
from data_pipeline.manifest import MANIFEST, Manifest, read_manifest
from data_pipeline.patience import PATIENCE
from data_pipeline.store import SCHEMES, is_url, open_store
from data_pipeline.stream import PREFETCH_PER_WORKER
from vitscale.base.credentials import masked
from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.base.files import sha256_bytes, write_bytes

OPEN_DEADLINE_S = 60.0
"""A store that does not answer at the start is a mistake in the URL rather than a bad moment."""


def open_dataset(location: str, *, cache_dir: Path) -> Manifest:
    """The manifest of a dataset in a directory or at a URL; of the latter, only the manifest is fetched here.

    Raises EnvironmentFault when there is none or it is refused, TransientFault when the store does not answer.
    """
    if not is_url(location):
        if "://" in location:
            schemes = ", ".join(f"{scheme}://" for scheme in SCHEMES)
            raise UsageError(f"expected a directory or a URL of {schemes}, got {masked(location)}")
        return read_manifest(Path(location))
    store = open_store(location, patience=dataclasses.replace(PATIENCE, deadline_s=OPEN_DEADLINE_S))
    content = store.read(MANIFEST)
    directory = cache_dir / sha256_bytes(content)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.mkdir(exist_ok=True)
        write_bytes(directory / MANIFEST, content)
    except OSError as error:
        raise EnvironmentFault(f"the cache {cache_dir} cannot be written ({error}); set data.cache_dir") from None
    return dataclasses.replace(read_manifest(directory), tars_at=store.url)


def tars_of(manifest: Manifest, cache_dir: Path) -> Path:
    """The directory in which the tars can be read, at once or once they are fetched."""
    return cache_dir / manifest.fingerprint if is_url(manifest.tars_at) else Path(manifest.tars_at)


def outstanding_lists(workers: int) -> int:
    """Lists of a stream that may have passed without being finished, the one in the hands of its reader included."""
    return workers * PREFETCH_PER_WORKER + 1


def fetched(
    lists: Iterator[list[int]],
    manifests: Sequence[Manifest],
    *,
    data: DataConfig,
    shards_of: ShardsOf,
    step_lists: int,
    say: Callable[[str], None] | None = None,
) -> Iterator[list[int]]:
    """`lists`, each once all that it needs is in the cache; as they are where all tars are on disks."""
    if not any(is_url(manifest.tars_at) for manifest in manifests):
        return lists
    fetcher = Fetcher(
        manifests,
        cache_dir=data.cache_path,
        cache_bytes=bytes_of("data.cache_bytes", data.cache_bytes),
        outstanding=outstanding_lists(data.workers),
        step_lists=step_lists,
        say=say,
    )
    return fetcher.follow(lists, shards_of)
