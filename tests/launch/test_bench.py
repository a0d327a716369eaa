"""Laws of bench.py: every loader is measured and checked, the table says it, a wrong word is one sentence."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import AugmentConfig
from data_pipeline.manifest import Manifest
from launch.bench_loader import CEILING, OURS, measure_stages
from launch.peers import timm_batches
from tests.helpers.program import run
from tests.helpers.shards import numbered_images, numbered_labels, write_dataset
from vitscale.base.errors import EnvironmentFault

SIZES = [9, 12, 8, 11]
FEW = ("--workers", "1", "--seconds", "0.2", "--rounds", "2", "--image-size", "24", "--batch", "8")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Manifest:
    return write_dataset(tmp_path_factory.mktemp("set"), numbered_images(SIZES, side=40), numbered_labels(SIZES), [])


def bench(manifest: Manifest, *arguments: str | Path, said: Path, code: int = 0) -> str:
    return run("bench", "loader", "--data", manifest.directory, *arguments, said=said, code=code)


def test_stages_cover_the_way_from_shard_to_slot(dataset):
    stages = measure_stages(dataset, augment=AugmentConfig(), image_size=24)
    assert next(iter(stages)) == "read and hash" and all(value >= 0 for value in stages.values())
    assert 5 < sum(stages.values()) < 100_000 and np.isfinite(list(stages.values())).all()


@pytest.mark.slow
def test_the_table_and_the_record_hold_every_loader(dataset, tmp_path):
    record_path = tmp_path / "record.json"
    text = bench(dataset, *FEW, "--json", record_path, said=tmp_path / "said")
    record = json.loads(record_path.read_text())
    assert set(record["loaders"]) == {OURS, CEILING} and record["fingerprint"] == dataset.fingerprint
    for result in record["loaders"].values():
        assert len(result["images_per_s"]) == len(result["cpu_us_per_image"]) == 2
        assert min(result["images_per_s"]) > 1 and result["checked"] >= 2 * 8
    for word in (
        "vitscale",
        "decode only",
        "CPU us/image",
        "of the ceiling",
        "read and hash",
        "resize",
        "batch, transport, loop",
    ):
        assert word in text


@pytest.mark.slow
def test_peers_see_the_same_shards(dataset, tmp_path):
    for name in ("timm", "torchvision"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    names = [f"{shard.name}.tar" for shard in dataset.shards]
    split = {"name": "train", "num_samples": dataset.images, "filenames": names, "shard_lengths": SIZES}
    (dataset.directory / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    text = bench(dataset, *FEW, "--peers", "timm,webdataset", said=tmp_path / "said")
    for name in ("timm", "webdataset"):
        (line,) = [line for line in text.splitlines() if line.startswith(name)]
        assert int(line.split()[-1].replace(",", "")) >= 2 * 8  # images checked
    assert "bicubic, antialiased, crop and flip alike" in text


def test_wrong_words_are_one_sentence(dataset, tmp_path):
    text = bench(dataset, "--peers", "ffcv", said=tmp_path / "a", code=2)
    assert text == "error: --peers: expected some of timm, timm-float, webdataset, webdataset-float, got 'ffcv'\n"
    text = bench(dataset, "--workers", "0", said=tmp_path / "b", code=2)
    assert text == "error: --workers: expected at least 1, got 0\n"


def test_a_peer_that_is_missing_is_named(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.data", None)
    batches = timm_batches(dataset, augment=AugmentConfig(), image_size=24, batch=8, workers=1)
    with pytest.raises(
        EnvironmentFault, match=r"--peers timm cannot be imported .*; install it with `pip install -e '.\[peers\]'`"
    ):
        next(batches)
