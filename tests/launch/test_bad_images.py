"""Images that are bad at run time: shown by stand-ins, counted exactly, named once, and too many of them stop the run."""

import shutil

import pytest

from data_pipeline.manifest import read_index, read_manifest
from tests.helpers.program import SMALL, curve, run, start
from vitscale.base.files import read_json
from vitscale.training.metrics import read_lines

pytestmark = pytest.mark.slow

ARGUMENTS = [*SMALL, "run.save_every=5", "run.eval_every=0", "data.window=32"]
BAD = [3, 150, 151, 222]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """359 digits in six shards, four of them with a flipped byte."""
    base = tmp_path_factory.mktemp("data")
    run("build_shards", "digits:eval", "--out", base / "set", "--shard-images", "64", "--workers", "1", said=base / "a.txt")
    manifest = read_manifest(base / "set")
    for number in BAD:
        shard, row = divmod(number, 64)
        index = read_index(manifest, shard)
        path = base / "set" / f"train-{shard:06d}.tar"
        content = bytearray(path.read_bytes())
        content[int(index.image_offset[row]) + 20] ^= 1
        path.write_bytes(content)
    return base / "set"


def events_of(directory):
    lines = [line for line in read_lines(directory / "events.jsonl") if line["event"] != "started"]
    return [{name: value for name, value in line.items() if name != "at_unix_s"} for line in lines]


@pytest.fixture(scope="module")
def quiet(data, tmp_path_factory):
    """One rank, every step logged: 24 steps of 96 images are 6.4 epochs."""
    directory = tmp_path_factory.mktemp("quiet") / "r"
    arguments = ["--run", directory, "--data", data, *ARGUMENTS, "data.bad_images_max=0.1"]
    said = run("pretrain", *arguments, said=directory.parent / "said.txt")
    assert "events.jsonl names every one" in said and "bad images" in said
    return directory


def test_every_one_is_named_in_its_step_and_the_count_adds_up(data, quiet):
    manifest, events = read_manifest(data), events_of(quiet)
    keys = {bytes(read_index(manifest, number // 64).keys[number % 64]).decode() for number in BAD}
    assert {event["key"] for event in events} == keys
    assert all(event["position"] // 96 + 1 == event["step"] for event in events)
    assert all(event["event"] == "bad_image" and event["reason"] == "wrong-hash" for event in events)
    assert all(event["dataset"] == str(data) and event["stand_in_key"] not in keys for event in events)
    # Each of the six whole epochs names each image once.
    for epoch in range(6):
        named = [event["key"] for event in events if event["position"] // manifest.images == epoch]
        assert sorted(named) == sorted(keys)
    for step, count in curve(quiet, "bad_images"):
        assert count == sum(event["step"] <= step for event in events)
    assert read_json(quiet / "FINISHED.json")["bad_images"] == len(events) > 24


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_workers_kills_and_rare_logging_change_nothing(data, quiet, tmp_path, world):
    directory = tmp_path / "r"
    arguments = ["--run", directory, "--data", data, *ARGUMENTS, "data.bad_images_max=0.1", "data.workers=1"]
    arguments += [f"run.log_every={7 if world < 3 else 1}"]
    for step in (8, 14):
        env = {"VITSCALE_FAULT": f"kill@step.end:step={step}"}
        start("pretrain", *arguments, said=tmp_path / f"{step}.txt", world=world, env=env).wait()
    run("pretrain", *arguments, said=tmp_path / "last.txt", world=world)
    assert events_of(directory) == events_of(quiet)
    steps = {step for step, *_ in curve(directory, "bad_images")}
    expected = [line for line in curve(quiet, "samples_hash", "bad_images") if line[0] in steps]
    assert curve(directory, "samples_hash", "bad_images") == expected and 24 in steps


@pytest.mark.parametrize("world", [1, 2])
def test_past_the_budget_all_ranks_stop_with_78_and_a_larger_budget_goes_on(data, quiet, tmp_path, world):
    directory = tmp_path / "r"
    arguments = ["--run", directory, "--data", data, *ARGUMENTS]
    said = run("pretrain", *arguments, said=tmp_path / "a.txt", world=world, code=78)
    (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
    stopped_at = curve(directory, "bad_images")[-1]
    assert stopped_at[1] > 10 and curve(quiet, "bad_images")[stopped_at[0] - 2][1] <= 10
    assert f"{stopped_at[1]} of {96 * stopped_at[0]} images were bad after step {stopped_at[0]}" in sentence
    assert "data.bad_images_max=0.001" in sentence and "events.jsonl" in sentence
    said = run("pretrain", *arguments, "data.bad_images_max=0.1", said=tmp_path / "b.txt", world=world)
    assert "data.bad_images_max: 0.001 -> 0.1" in said and events_of(directory) == events_of(quiet)


def test_a_budget_of_zero_stops_at_the_first(data, tmp_path):
    arguments = ["--run", tmp_path / "r", "--data", data, *ARGUMENTS, "data.bad_images_max=0"]
    run("pretrain", *arguments, said=tmp_path / "a.txt", code=78)
    steps = {event["step"] for event in events_of(tmp_path / "r")}
    assert len(steps) == 1 and curve(tmp_path / "r", "bad_images")[-1][0] in steps


def test_an_evaluation_of_a_damaged_dataset_stops_in_one_sentence(data, quiet, tmp_path):
    arguments = ["--from", quiet, "--data", data]
    said = run("evaluate", *arguments, said=tmp_path / "said.txt", code=78)
    (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "of shard train-000000" in sentence and "counts every image" in sentence


def test_a_tar_that_is_gone_is_no_bad_image(data, tmp_path):
    shutil.copytree(data, tmp_path / "set")
    (tmp_path / "set" / "train-000004.tar").unlink()
    arguments = ["--run", tmp_path / "r", "--data", tmp_path / "set", *ARGUMENTS]
    assert "train-000004.tar is missing" in run("pretrain", *arguments, said=tmp_path / "a.txt", code=3)
