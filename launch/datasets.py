"""Find and check the datasets that a command names, before any process group exists.

A name is a directory with a manifest, the URL of one on an object store, or `digits:train` / `digits:eval`: scanned
digits that come with scikit-learn and are built in passing under RUN/data.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.build import build_dataset
from data_pipeline.config import BuildConfig, sources_of
from data_pipeline.manifest import MANIFEST, Manifest
from data_pipeline.mixture import quotas
from data_pipeline.remote import open_dataset as open_location
from data_pipeline.storage import check_files
from vitscale.base.cluster import Cluster
from vitscale.base.errors import HostFault, UsageError
from vitscale.config import Config

EMBEDDED = "digits:"
EMBEDDED_WAIT_S = 120.0
# About 120 bytes an image: at least eight shards, uneven because images differ in size.
EMBEDDED_SHARD_BYTES = 12_000


def open_datasets(config: Config, *, run: Path, cluster: Cluster) -> tuple[Config, tuple[Manifest, ...], Manifest | None]:
    """Read all manifests, check that their files are there and fit the model, and fill in fingerprints and weights.

    Embedded digits are built under RUN/data by rank 0 while the others wait for their manifest.
    """
    if not config.data.path:
        raise UsageError(
            f"recipe {config.recipe!r} needs a training dataset; add --data DIR (launch/build_shards.py makes one)"
        )
    sources, cache = sources_of(config.data.path), config.data.cache_path
    weights = quotas([source.weight for source in sources]) if len(sources) > 1 else ()
    train_data = tuple(open_dataset(source.path, run=run, cluster=cluster, cache_dir=cache) for source in sources)
    _refuse_twins(train_data)
    eval_data = None
    if config.data.eval_path:
        eval_data = open_dataset(config.data.eval_path, run=run, cluster=cluster, cache_dir=cache)
    for manifest in (*train_data, *([eval_data] if eval_data is not None else [])):
        require_fit(manifest, classes=config.model.classes)
        if manifest.classes != train_data[0].classes:
            kind = "evaluation" if manifest is eval_data else "training"
            raise UsageError(
                f"the {kind} dataset {manifest.directory} names its classes otherwise than {train_data[0].directory}; "
                "build both with the same --classes"
            )
    data = dataclasses.replace(
        config.data,
        fingerprint=",".join(manifest.fingerprint for manifest in train_data),
        weights=weights,
        eval_fingerprint=eval_data.fingerprint if eval_data is not None else "",
    )
    return dataclasses.replace(config, data=data), train_data, eval_data


def require_fit(manifest: Manifest, *, classes: int) -> None:
    """Raise UsageError where a model of so many classes has no use for the labels of a dataset."""
    if len(manifest.classes) != classes:
        raise UsageError(
            f"the model has model.classes={classes} but the dataset {manifest.directory} has "
            f"{len(manifest.classes)} classes; set model.classes={len(manifest.classes)} or name another dataset"
        )
    if manifest.most_labels == 0:
        raise UsageError(
            f"training and scoring need labels, but the dataset {manifest.directory} has none; "
            "build it with labels or name another dataset"
        )


def open_dataset(path: str, *, run: Path, cluster: Cluster, cache_dir: Path) -> Manifest:
    """One dataset by its name, its local files checked by name and size."""
    location = path
    if path.startswith(EMBEDDED):
        directory = run / "data" / path.removeprefix(EMBEDDED)
        _provide_embedded(path, directory, cluster)
        location = str(directory)
    manifest = open_location(location, cache_dir=cache_dir)
    check_files(manifest, local_rank=cluster.local_rank, local_world=cluster.local_world)
    return manifest


def absolute(path: str) -> str:
    """A name that means the same in every working directory."""
    return path if path.startswith(EMBEDDED) or "://" in path else str(Path(path).resolve())


def _refuse_twins(manifests: Sequence[Manifest]) -> None:
    """One dataset under two names would be read in two orders at once, its images twice as often as its epochs say."""
    seen: dict[str, Path] = {}
    for manifest in manifests:
        twin = seen.setdefault(manifest.fingerprint, manifest.directory)
        if twin is not manifest.directory:
            raise UsageError(
                f"{twin} and {manifest.directory} are the same dataset (fingerprint {manifest.fingerprint[:12]}…); "
                "expected different ones: name it once, with the sum of its weights"
            )


def _provide_embedded(source: str, directory: Path, cluster: Cluster) -> None:
    """Rank 0 builds the embedded dataset; the others wait until its manifest, the last file, is there."""
    if cluster.rank == 0:
        options = BuildConfig(source=source, shard_bytes=EMBEDDED_SHARD_BYTES)
        build_dataset(options, directory, workers=1, show_progress=False)
        return
    give_up_at_s = time.monotonic() + EMBEDDED_WAIT_S
    while not (directory / MANIFEST).is_file():
        if time.monotonic() > give_up_at_s:
            raise HostFault(
                f"host {cluster.host} waited {EMBEDDED_WAIT_S:.0f} s for rank 0 to build {directory.resolve()}; "
                "put --run on a file system shared by all hosts"
            )
        time.sleep(0.1)
