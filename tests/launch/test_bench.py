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


# ---- step -----------------------------------------------------------------------------------------------------------

SMALL_STEP = (
    *("--seconds", "0.1", "--rounds", "2", "model.width=32", "model.depth=2", "model.heads=2", "train.precision=fp32"),
    *("optim.global_batch=16", "optim.micro_batch_max=8", "ds.vitscale.recompute=none"),
)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_loops_are_timed_at_the_same_work(tmp_path, stage):
    """Ours and a bare torch loop see the same losses: neither leaves out a micro-batch, the clipping or the update."""
    record_path = tmp_path / "step.json"
    options = [*SMALL_STEP, "--peers", "bare", "--json", record_path, f"ds.zero_optimization.stage={stage}"]
    text = run("bench", "step", *options, said=tmp_path / "said")
    record = json.loads(record_path.read_text())
    ours, bare = record["loops"]["ours"], record["loops"]["bare"]
    assert len(ours["losses"]) == 5 and len(set(ours["losses"])) == 5
    assert ours["losses"] == pytest.approx(bare["losses"], rel=2e-5)
    for loop in (ours, bare):
        assert len(loop["step_s"]) == 2 and min(loop["step_s"]) > 0 and loop["mfu"] is None
        middle = sorted(loop["step_s"])
        assert loop["images_per_s"] == pytest.approx(16 / ((middle[0] + middle[1]) / 2))
    assert 0 <= ours["data_wait"] < 1 and "bare torch loop, our model" in text and "ours waits" in text


@pytest.mark.slow
def test_our_loop_is_timed_on_a_dataset(tmp_path):
    options = ["--shard-images", "120", "--workers", "1"]
    run("build_shards", "digits:train", "--out", tmp_path / "data", *options, said=tmp_path / "build")
    options = [*SMALL_STEP, "--data", tmp_path / "data", "--recipe", "digits", "data.workers=1"]
    text = run("bench", "step", *options, said=tmp_path / "said")
    assert "vitscale: engine, loop, metrics" in text and "8 px, batch 16" in text
    said = run("bench", "step", *options, "model.classes=5", said=tmp_path / "b", code=2)
    assert "set model.classes=10" in said


def test_a_wrong_word_about_steps_is_one_sentence(dataset, tmp_path):
    said = run("bench", "step", "--peers", "keras", said=tmp_path / "a", code=2)
    assert "--peers: expected some of bare, timm, timm-deepspeed, got 'keras'" in said and "Traceback" not in said
    said = run("bench", "step", "--rounds", "0", said=tmp_path / "b", code=2)
    assert "--rounds: expected at least 1, got 0" in said


# ---- checkpoint -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_save_is_timed_and_what_comes_back_is_compared(tmp_path):
    record_path = tmp_path / "record.json"
    where = (
        "--local_rank=0",
        "checkpoint",
        "--dir",
        tmp_path,
        "--rounds",
        "1",
        "--json",
        record_path,
        "model.width=32",
        "train.ema=[0.9]",
    )
    said = run("bench", *where, "ds.zero_optimization.stage=3", said=tmp_path / "said", world=2)
    record = json.loads(record_path.read_text())
    assert "what comes back     every bit" in said and "2 ranks, ZeRO stage 3" in said
    assert record["equal"] is True and record["world"] == 2 and len(record["blocked_s"]) == len(record["synchronous_s"]) == 1
    assert record["blocked_s"][0] > 0 and record["load_s"][0] > 0 and record["bytes"] > 100_000
    assert not (tmp_path / "bench-checkpoints").exists()
