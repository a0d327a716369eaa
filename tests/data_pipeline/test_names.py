"""Positions to the keys of the images there, over several datasets, and where an index is not at hand."""

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.loader import mixture_of
from data_pipeline.names import names_at
from tests.helpers.shards import numbered_images, numbered_labels, write_dataset

SIZES = ([5, 7, 6], [4, 9])


def test_every_position_has_its_key_in_its_dataset_and_shard(tmp_path):
    manifests = [
        write_dataset(tmp_path / str(n), numbered_images(sizes), numbered_labels(sizes), [str(k) for k in range(sum(sizes))])
        for n, sizes in enumerate(SIZES)
    ]
    mixture = mixture_of(manifests, data=DataConfig(weights=(3072, 1024), window=8), seed=3)
    positions = np.arange(11, 11 + 20)
    sources, samples = mixture.samples_at(positions)
    found = names_at(manifests, mixture, positions)
    expected: dict[str, dict[str, list[str]]] = {}
    for source, shard, row in zip(sources.tolist(), samples.shard.tolist(), samples.index.tolist(), strict=True):
        shards = expected.setdefault(str(tmp_path / str(source)), {})
        shards.setdefault(f"train-{shard:06d}", []).append(f"{sum(SIZES[source][:shard]) + row:09d}")
    assert found == expected and len(found) == 2

    (tmp_path / "0" / "train-000001.parquet").unlink()
    rows = samples.index[(sources == 0) & (samples.shard == 1)].tolist()
    assert names_at(manifests, mixture, positions)[str(tmp_path / "0")]["train-000001"] == [f"row {row}" for row in rows]
