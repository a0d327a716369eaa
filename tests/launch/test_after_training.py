"""Export, evaluate, attention and fine-tuning take up what pretraining left, and agree with each other."""

import json

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.helpers.program import SMALL, run, steps_of
from vitscale.base.files import read_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    base = tmp_path_factory.mktemp("trained")
    settings = ["ds.zero_optimization.stage=3", "train.ema=[0.5, 0.9]"]
    run("pretrain", "--run", base / "run", *SMALL, *settings, said=base / "a.txt", world=2)
    return base / "run"


def test_evaluate_gives_what_training_measured_on_any_number_of_ranks(trained, tmp_path):
    expected = read_json(trained / "FINISHED.json")["eval"]
    for world in (1, 2, 3):
        to = tmp_path / f"{world}.json"
        run(
            "evaluate",
            "--from",
            trained,
            "--data",
            trained / "data" / "eval",
            "--json",
            to,
            said=tmp_path / "e.txt",
            world=world,
        )
        found = json.loads(to.read_text())
        assert (found["images"], found["top1"], found["top5"]) == (359, expected["top1"], expected["top5"])
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_an_exported_file_stands_for_the_run(trained, tmp_path):
    said = run("export", "--from", trained, "--to", tmp_path / "w.safetensors", said=tmp_path / "x.txt")
    assert "differ by at most 0.0" in said
    answers = []
    for source in (trained, tmp_path / "w.safetensors", f"{trained}@24"):
        to = tmp_path / "e.json"
        run("evaluate", "--from", source, "--data", trained / "data" / "eval", "--json", to, said=tmp_path / "e.txt")
        answers.append([json.loads(to.read_text())[name] for name in ("top1", "top5", "loss")])
    assert answers[0] == answers[1] == answers[2]


def test_a_moving_average_is_exported_and_scores_as_in_training(trained, tmp_path):
    measured = read_json(trained / "FINISHED.json")["eval"]
    assert measured["ema"].keys() == {"0.5", "0.9"} and measured["ema"]["0.9"]["loss"] != measured["loss"]
    file = tmp_path / "w.safetensors"
    said = run("export", "--from", trained, "--ema", "0.9", "--to", file, said=tmp_path / "x.txt")
    assert "moving average 0.9 at step 24" in said and "differ by at most 0.0" in said
    for flags in (["--from", file], ["--from", trained, "--ema", "0.9"]):
        to = tmp_path / "e.json"
        run("evaluate", *flags, "--data", trained / "data" / "eval", "--json", to, said=tmp_path / "e.txt")
        found = json.loads(to.read_text())
        assert (found["top1"], found["top5"]) == (measured["ema"]["0.9"]["top1"], measured["ema"]["0.9"]["top5"])
        assert found["loss"] == pytest.approx(measured["ema"]["0.9"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("source", "flags", "words"),
    [
        ("run", ["--ema"], "keeps several moving averages; name one: --ema with 0.5, 0.9"),
        ("run", ["--ema", "0.99"], "keeps no moving average with the decay 0.99; it keeps 0.5, 0.9"),
        ("w.safetensors", ["--ema"], "holds one set of weights; --ema needs a run"),
    ],
)
def test_a_moving_average_that_is_not_there_is_refused(trained, tmp_path, source, flags, words):
    flags = ["--from", trained.parent / source, *flags, "--to", tmp_path / "to.safetensors"]
    assert words in run("export", *flags, said=tmp_path / "x.txt", code=2)


def test_attention_is_drawn(trained, tmp_path):
    for number, image in enumerate(load_digits().images[:3]):
        Image.fromarray((image * 255 / 16).astype("uint8")).save(tmp_path / f"{number}.png")
    run("attention", "--from", trained, "--images", tmp_path, "--out", tmp_path / "out", said=tmp_path / "out.txt")
    with Image.open(tmp_path / "out" / "attention.png") as picture:
        assert picture.width > 300 and len(picture.convert("L").getcolors(1 << 20)) > 50


def test_fine_tuning_takes_the_body_and_another_resolution(trained, tmp_path):
    data = tmp_path / "data"
    options = ["--classes", "5,6,7,8,9", "--per-class", "20", "--shard-images", "30", "--workers", "1"]
    run("build_shards", "digits:train", "--out", data, *options, said=tmp_path / "b.txt")
    common = ["--data", data, "model.image_size=16", "train.length=6", "optim.global_batch=24"]
    run("finetune", "--from", trained, "--run", tmp_path / "f", *common, said=tmp_path / "f.txt", world=2)
    config = read_json(tmp_path / "f" / "config.json")
    assert config["model"]["classes"] == 5 and config["model"]["image_size"] == 16 and config["model"]["width"] == 32
    assert len(steps_of(tmp_path / "f")) == 6
    assert steps_of(tmp_path / "f")[0]["loss"] == pytest.approx(1.6094, abs=1e-3)  # ln 5: the new head knows nothing
    again = run("finetune", "--from", trained, "--run", tmp_path / "f", *common, said=tmp_path / "g.txt", world=2)
    assert "is finished" in again
    said = run(
        "finetune", "--from", trained, "--run", tmp_path / "h", *common, "model.depth=3", said=tmp_path / "h.txt", code=2
    )
    assert "depth" in said and "Traceback" not in said
