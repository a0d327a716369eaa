"""The names of images by their positions: for records of what went wrong, never on the way of the data."""

from collections.abc import Sequence

import numpy as np

from data_pipeline.manifest import Manifest, read_index
from data_pipeline.mixture import Mixture
from vitscale.base.errors import EnvironmentFault


def names_at(manifests: Sequence[Manifest], mixture: Mixture, positions: np.ndarray) -> dict[str, dict[str, list[str]]]:
    """Keys of the images at `positions`, by the place of their dataset and by shard, each list in the order of the positions.

    Where an index is not at hand (the cache of another node has it), `row N` of the shard stands for the key.
    """
    sources, samples = mixture.samples_at(positions)
    names: dict[str, dict[str, list[str]]] = {}
    for source, shard in sorted(set(zip(sources.tolist(), samples.shard.tolist(), strict=True))):
        manifest = manifests[source]
        rows = samples.index[(sources == source) & (samples.shard == shard)].tolist()
        try:
            keys = read_index(manifest, shard).keys
            named = [bytes(keys[row]).decode() for row in rows]
        except EnvironmentFault:
            named = [f"row {row}" for row in rows]
        names.setdefault(manifest.tars_at, {})[manifest.shards[shard].name] = named
    return names
