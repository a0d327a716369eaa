"""Law 5: a wrong word stops the program before a process group exists, with one sentence and the right exit code."""

import json
import shutil

import pytest

from tests.helpers.program import run
from tests.helpers.shards import numbered_images, write_dataset


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    base = tmp_path_factory.mktemp("data")
    run("build_shards", "digits:eval", "--out", base / "ten", "--shard-images", "60", "--workers", "1", said=base / "a.txt")
    for name, classes in (("three", "0,1,2"), ("others", "3,4,5")):
        options = ["--shard-images", "60", "--workers", "1", "--classes", classes]
        run("build_shards", "digits:eval", "--out", base / name, *options, said=base / f"{name}.txt")
    shutil.copytree(base / "ten", base / "twin")
    broken = base / "broken"
    run("build_shards", "digits:eval", "--out", broken, "--shard-images", "60", "--workers", "1", said=base / "c.txt")
    (broken / "train-000001.tar").unlink()
    unreadable = base / "unreadable"
    unreadable.mkdir()
    (unreadable / "manifest.json").write_text('{"schema_version": 1, "sha')
    numbers = [[number] * 2 for number in range(10)]
    write_dataset(base / "unlabelled", numbered_images([2] * 10), [[[], []] for _ in numbers], list("0123456789"))
    wrong = base / "ds.json"
    wrong.write_text(json.dumps({"zero_optimisation": {"stage": 2}}))
    return base


# (arguments, exit code, what the sentence must hold); {data} is the directory of the datasets.
WRONG = [
    (["optim.peak_lrr=1"], 2, ["'optim.peak_lrr'", "did you mean 'optim.peak_lr'"]),
    (["model.norm=pots"], 2, ["model.norm", "'pre', 'post'", "did you mean 'post'"]),
    (["model.depth=deep"], 2, ["model.depth: expected a whole number, got 'deep'"]),
    (["modle.depth=3"], 2, ["there is no setting 'modle.depth'", "did you mean 'model.depth'"]),
    (["model.image_size=9"], 2, ["model.image_size=9 is not a multiple of model.patch_size=2", "8 and 10"]),
    (["model.heads=5"], 2, ["model.width=64 is not a multiple of model.heads=5"]),
    (["train.length=soon"], 2, ["train.length", "'soon'"]),
    (["train.length=0"], 2, ["train.length=0 is no step"]),
    (["optim.warmup=2000"], 2, ["longer than the run"]),
    (["--recipe", "digit"], 2, ["'digit'", "did you mean 'digits'"]),
    (["--recipee", "digits"], 2, ["--recipee", "--recipe"]),
    (["--recipe", "cifar10"], 2, ["needs a training dataset", "--data DIR"]),
    (["--world", "2"], 2, ["--dry-run"]),
    (["--dry-run", "--world", "5"], 2, ["optim.global_batch=96 cannot be shared equally by 5 ranks", "1, 2, 3, 4, 6, 8"]),
    (["ds.train_batch_size=64"], 2, ["train_batch_size=64", "optim.global_batch=96"]),
    (["ds.train_micro_batch_size_per_gpu=7"], 2, ["7 does not divide the 96 images", "1, 2, 3, 4, 6, 8"]),
    (["ds.gradient_clipping=0.5"], 2, ["gradient_clipping=0.5", "optim.clip=1.0"]),
    (["ds.bf16.enabled=true"], 2, ["bf16.enabled=true", "train.precision=fp32"]),
    (["ds.zero_optimization.stage=4"], 2, ["expected 0, 1, 2 or 3, got 4"]),
    (["ds.zero_optimization.stagee=1"], 2, ["'zero_optimization.stagee'", "did you mean 'stage'"]),
    (["ds.elasticity.enabled=true"], 2, ["'elasticity' is refused"]),
    (["ds.zero_optimization.reduce_bucket_size=auto"], 2, ['cannot be "auto"']),
    (["ds.vitscale.recompute=some"], 2, ["vitscale.recompute", "'some'"]),
    (["--deepspeed_config", "{data}/ds.json"], 2, ["'zero_optimisation'", "did you mean 'zero_optimization'"]),
    (["--deepspeed_config", "{data}/none.json"], 2, ["expected a DeepSpeed configuration at"]),
    (["--data", "{data}/none"], 3, ["expected a dataset at", "manifest.json"]),
    (["--data", "{data}/broken"], 3, ["train-000001.tar"]),
    (["--data", "{data}/unreadable"], 3, ["manifest.json cannot be read as JSON"]),
    (["--data", "{data}/three"], 2, ["model.classes=10", "3 classes", "set model.classes=3"]),
    (["--data", "{data}/three", "--eval-data", "{data}/others", "model.classes=3"], 2, ["otherwise than"]),
    (
        ["--data", "{data}/three,{data}/others", "model.classes=3"],
        2,
        ["training dataset", "others names its classes otherwise"],
    ),
    (["--data", "{data}/ten=3,{data}/twin"], 2, ["the same dataset", "sum of its weights"]),
    (["--data", "{data}/ten=9000,{data}/three"], 2, ["a weight of 1 in 9001 rounds to 0/4096", "leave the dataset out"]),
    (["--data", "{data}/ten=0,{data}/three"], 2, ["the weight of {data}/ten must be above 0, got 0"]),
    (["--data", "{data}/ten,"], 2, ["--data", "between the commas, got ''"]),
    (["data.path=a=0"], 2, ["the weight of a must be above 0"]),
    (["--data", "{data}/ten", "--eval-data", "{data}/ten,{data}/three"], 2, ["expected one dataset", "only --data mixes"]),
    (["--data", "{data}/unlabelled"], 2, ["need labels", "has none"]),
    (["train.masked_classes=[3,10]"], 2, ["names class 10", "model.classes=10", "at least 11"]),
    (["train.mixup=0.8", "train.mix_group=5"], 2, ["train.mix_group=5", "48 images", "one of 2, 3, 4, 6, 8, 12, 16, 24, 48"]),
    (["data.bad_images_max=2"], 2, ["data.bad_images_max must be within 0 and 1, got 2"]),
    (["--config", "{data}/none.json"], 3, ["expected a file at"]),
]


@pytest.mark.parametrize(
    ("arguments", "code", "parts"), WRONG, ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None
)
def test_a_wrong_word_is_one_sentence(datasets, tmp_path, monkeypatch, arguments, code, parts):
    monkeypatch.chdir(tmp_path)
    given = [text.format(data=datasets) for text in arguments]
    said = run("pretrain", *given, said=tmp_path / "said.txt", code=code)
    lines = said.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), said
    for part in parts:
        part = part.replace("{data}", str(datasets))
        assert part in lines[0], f"{part!r} is not in {lines[0]!r}"


def test_a_dry_run_on_several_ranks_is_said_once_and_waits_for_nobody(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run("pretrain", "--dry-run", said=tmp_path / "said.txt", world=2)
    assert said.count("global batch") == 1 and "96 = 2 ranks" in said


def test_a_wrong_flag_of_attention_is_one_sentence(tmp_path):
    said = run("attention", "--form", "x", said=tmp_path / "said.txt", code=2)
    assert len(said.splitlines()) == 1 and said.startswith("error: ")


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run("pretrain", "--dry-run", "--world", "8", said=tmp_path / "said.txt")
    assert "96 = 8 ranks x micro-batch 12 x accumulation 1" in said
    assert [path.name for path in tmp_path.iterdir()] == ["said.txt"]


@pytest.mark.slow
def test_another_dataset_on_resume_is_refused(datasets, tmp_path):
    directory = tmp_path / "r"
    run("pretrain", "--run", directory, "train.length=2", said=tmp_path / "a.txt")
    said = run("pretrain", "--run", directory, "--data", datasets / "ten", said=tmp_path / "b.txt", code=2)
    assert "data.fingerprint is" in said and "Traceback" not in said
