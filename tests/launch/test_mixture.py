"""Training on several datasets: the same images on any number of ranks, from any start, and shares that cannot move."""

import json
import shutil

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.loader import mixture_of, sample_hash
from data_pipeline.manifest import read_index, read_manifest
from tests.helpers.program import SMALL, curve, run, start
from vitscale.base.files import read_json

STEPS = 20
ARGUMENTS = [*SMALL, f"train.length={STEPS}", "run.save_every=5", "run.eval_every=0", "run.log_every=1", "data.window=16"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two datasets of all ten classes, with equally large shards."""
    base = tmp_path_factory.mktemp("sets")
    for name, half in (("a", "digits:train"), ("b", "digits:eval")):
        options = ["--shard-images", "30", "--per-class", "20", "--workers", "1"]
        run("build_shards", half, "--out", base / name, *options, said=base / f"{name}.txt")
    return base


@pytest.fixture(scope="module")
def reference(sets, tmp_path_factory):
    """The hashes of a run on one rank."""
    directory = tmp_path_factory.mktemp("one") / "r"
    data = f"{sets}/a=3,{sets}/b=1"
    run("pretrain", "--run", directory, "--data", data, *ARGUMENTS, said=directory.parent / "said.txt")
    return curve(directory, "samples_hash", "images_seen"), directory


def test_the_table_before_the_first_step_names_every_source_and_its_exact_share(sets, tmp_path):
    said = run("pretrain", "--dry-run", "--data", f"{sets}/a=3,{sets}/b", *ARGUMENTS, said=tmp_path / "said.txt")
    rows = [line for line in said.splitlines() if "/4096" in line]
    # 20 steps of 96 images, of which 3/4 come from 200 images: 7.2 epochs.
    assert rows == [
        f"data          {sets}/a: weight 3072/4096, 200 images in 7 shards, 10 classes, 7.2 epochs",
        f"              {sets}/b: weight 1024/4096, 200 images in 7 shards, 10 classes, 2.4 epochs",
    ]


@pytest.mark.slow
def test_each_step_shows_the_images_that_the_order_names(sets, reference):
    manifests = [read_manifest(sets / name) for name in "ab"]
    assert [shard.images for shard in manifests[0].shards] == [shard.images for shard in manifests[1].shards]
    mixture = mixture_of(manifests, data=DataConfig(window=16, weights=(3072, 1024)), seed=0)
    keys = [[read_index(manifest, shard).keys for shard in range(len(manifest.shards))] for manifest in manifests]
    for step, found, _ in reference[0]:
        source, samples = mixture.samples_at(mixture.slots_of_step(96 * (step - 1), 96))
        places = zip(source.tolist(), samples.shard.tolist(), samples.index.tolist(), strict=True)
        expected = sum(sample_hash(manifests[k].fingerprint, bytes(keys[k][shard][row])) for k, shard, row in places)
        assert found == f"{expected % 2**64:016x}"


@pytest.mark.slow
def test_the_run_remembers_all_its_sources(sets, reference):
    fingerprints = [read_manifest(sets / name).fingerprint for name in "ab"]
    directory = reference[1]
    config = read_json(directory / "config.json")["data"]
    assert config["weights"] == [3072, 1024] and config["fingerprint"] == ",".join(fingerprints)
    assert config["path"] == f"{sets}/a=3,{sets}/b=1"
    attempt = read_json(directory / "provenance" / "attempt-001.json")["data"]["train"]
    assert attempt == {
        "paths": [f"{sets}/a", f"{sets}/b"],
        "fingerprints": fingerprints,
        "weights_of_4096": [3072, 1024],
    }
    record = json.loads((directory / "checkpoints" / "step-00000020" / "vitscale.json").read_text())["data"]
    assert [(source["fingerprint"], source["weight_of_4096"]) for source in record["sources"]] == [
        (fingerprints[0], 3072),
        (fingerprints[1], 1024),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_two_and_three_ranks_see_the_same_images_also_after_a_kill(sets, reference, tmp_path, world):
    directory, data = tmp_path / "r", f"{sets}/a=6,{sets}/b=2"  # the same shares in other words
    arguments = ["--run", directory, "--data", data, *ARGUMENTS]
    start("pretrain", *arguments, said=tmp_path / "a.txt", world=world, env={"VITSCALE_FAULT": "kill@step.end:step=13"}).wait()
    said = run("pretrain", *arguments, said=tmp_path / "b.txt", world=world)
    assert "continuing after step 10" in said
    assert curve(directory, "samples_hash", "images_seen") == reference[0]


@pytest.mark.slow
def test_other_weights_or_datasets_are_refused_and_other_paths_are_followed(sets, tmp_path):
    directory = tmp_path / "r"
    arguments = ["--run", directory, *ARGUMENTS]
    env = {"VITSCALE_FAULT": "kill@step.end:step=7"}
    start("pretrain", *arguments, "--data", f"{sets}/a=3,{sets}/b=1", said=tmp_path / "a.txt", env=env).wait()
    for data, key in [
        (f"{sets}/a=2,{sets}/b=1", "data.weights is [3072, 1024] in the run, [2731, 1365] in the command"),
        (f"{sets}/b=3,{sets}/a=1", "data.fingerprint is"),
        (f"{sets}/a", "data.weights is [3072, 1024] in the run, [] in the command"),
    ]:
        said = run("pretrain", *arguments, "--data", data, said=tmp_path / "b.txt", code=2)
        assert key in said and "Traceback" not in said
    shutil.copytree(sets / "a", tmp_path / "moved")
    said = run("pretrain", *arguments, "--data", f"{tmp_path}/moved=3,{sets}/b=1", said=tmp_path / "c.txt")
    assert "continuing after step 5" in said and "follows the command" in said


@pytest.mark.slow
def test_fine_tuning_takes_a_mixture_too(sets, reference, tmp_path):
    arguments = ["--from", reference[1], "--run", tmp_path / "f", "--data", f"{sets}/a,{sets}/b=2", "train.length=3"]
    run("finetune", *arguments, "optim.global_batch=24", said=tmp_path / "said.txt")
    assert read_json(tmp_path / "f" / "config.json")["data"]["weights"] == [1365, 2731]
