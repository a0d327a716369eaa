"""Every recipe resolves without a GPU and without data, and says what it will need and take."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.command import run_training, training_parser
from launch.plan import EPILOG
from launch.plan import main as plan_main
from vitscale.base.errors import UsageError
from vitscale.recipes.catalog import RECIPES, recipe_named, source_of

ROOT = Path(__file__).resolve().parents[2]
COUNTED = [name for name in RECIPES if source_of(name) is not None]


def dry_run(capsys, *arguments: str) -> dict[str, str]:
    """The rows that pretrain.py --dry-run prints, by name; lines without a name are added to the row above."""
    run_training(training_parser("").parse_intermixed_args([*arguments, "--dry-run"]), default_recipe="digits")
    rows: dict[str, str] = {}
    for line in capsys.readouterr().out.splitlines():
        if not line.startswith(" "):
            name, _, text = re.match(r"(\S+(?: \S+)*)(\s{2,})(.*)", line).groups()  # type: ignore[union-attr]
            rows[name] = rows.get(name, "") + text
        else:
            rows[name] += "\n" + line.strip()
    return rows


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", COUNTED)
def test_every_recipe_dry_runs_without_data_and_without_a_gpu(name, capsys, tmp_path):
    source, config = source_of(name), recipe_named(name)
    world = 32 if config.optim.global_batch > 96 else 8
    rows = dry_run(capsys, "--recipe", name, "--world", str(world))
    assert source is not None
    assert rows["data"] == f"none given; counted as {source.name}, {source.images:,} images, {source.classes:,} classes"
    assert rows["global batch"].startswith(f"{config.optim.global_batch} = {world} ranks")
    assert re.match(r"[\d,]+ steps = [\d.]+ epochs", rows["length"])
    for row in ("model", "training", "memory", "time"):
        assert rows[row]
    assert "suspicious" not in rows
    assert list(tmp_path.iterdir()) == []


def test_the_numbers_of_a_dry_run_are_those_of_the_source(capsys):
    rows = dry_run(capsys, "--recipe", "augreg_i21k_l16", "--world", "256")
    assert rows["length"] == "1,039,829 steps = 300 epochs; warm-up 10,000 to lr 0.001"
    assert "325,690,707 parameters" in rows["model"]
    # 352.3 GFLOP for what stochastic depth of 0.1 (linear, images left out whole) keeps of 3 x 123.1, by images of 300 epochs.
    assert "352 GFLOP per image at 224 px" in rows["training"] and "1.5e+21 FLOP in all" in rows["training"]
    # 1.5e21 / (256 x 989e12 x 0.4) = 14,812 s
    assert rows["time"].startswith("4.1 hours at an assumed MFU of 40% of 989 TFLOP/s on 256 x H100")
    assert "fits H100 (80 GB)" in rows["memory"]


def test_the_terms_of_memory_add_up_to_what_is_printed(capsys):
    rows = dry_run(capsys, "--recipe", "scaling_g", "--world", "64", "ds.zero_optimization.stage=1")
    first, *terms = rows["memory"].splitlines()
    sums = {"held": 0.0, "backward": 0.0, "update": 0.0}
    for term in terms:
        amount, unit, when = re.match(r"([\d.]+) (GB|MB|kB) +(held|backward|update) +\S.* = \S", term).groups()  # type: ignore[union-attr]
        sums[when] += float(amount) * {"GB": 1, "MB": 1e-3, "kB": 1e-6}[unit]
    printed = float(re.match(r"([\d.]+) GB", first)[1])  # type: ignore[index]
    assert printed == pytest.approx(sums["held"] + max(sums["backward"], sums["update"]), rel=0.01)


def test_what_does_not_fit_is_said(capsys):
    rows = dry_run(capsys, "--recipe", "vit_22b", "--world", "8", "ds.zero_optimization.stage=2")
    assert "does not fit H100 (80 GB)" in rows["memory"]
    assert "host memory" not in rows
    stage_3 = ["ds.zero_optimization.stage=3", "ds.zero_optimization.offload_optimizer.device=cpu"]
    rows = dry_run(capsys, "--recipe", "vit_22b", "--world", "8", *stage_3)
    assert "; fits H100 (80 GB)" in rows["memory"]
    assert "masters = 4 P / N" in rows["host memory"]


def test_without_a_world_no_gpu_is_assumed(capsys):
    rows = dry_run(capsys, "--recipe", "plain_s16")
    assert "time" not in rows and "H100" not in rows["memory"]
    assert rows["global batch"].startswith("1024 = 1 ranks")


def test_float32_has_no_time(capsys):
    rows = dry_run(capsys, "--recipe", "plain_s16", "--world", "8", "train.precision=fp32")
    assert rows["time"].startswith("not estimated")


def test_suspicious_settings_are_rows_and_stop_nothing(capsys):
    rows = dry_run(capsys, "--recipe", "augreg_i21k_b16", "--world", "8", "model.classes=21841", "train.head_bias=0")
    assert "recipe augreg_i21k_b16 is for 21843" in rows["suspicious"]
    assert "starts at a loss of 15,136" in rows["suspicious"]


def test_data_that_is_given_is_counted_itself(capsys):
    rows = dry_run(capsys, "--data", "digits:train", "--recipe", "cifar10")
    assert re.match(r"1,43\d images in \d+ shards, 10 classes", rows["data"])


def test_a_real_start_still_asks_for_data():
    args = training_parser("").parse_intermixed_args(["--recipe", "plain_s16"])
    with pytest.raises(UsageError, match="needs a training dataset; add --data DIR"):
        run_training(args, default_recipe="digits")


# ---- plan.py --------------------------------------------------------------------------------------------------------


def planned(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["launch/plan.py", *arguments])
    plan_main()
    return capsys.readouterr().out


def test_a_plan_is_a_dry_run_for_any_gpu_and_any_number_of_images(monkeypatch, capsys):
    said = planned(monkeypatch, capsys, "--recipe", "scaling_g", "--gpus", "256", "--gpu", "h200", "--mfu", "0.5")
    assert "fits H200 (141 GB)" in said
    # 1e6 steps x 16,384 images x 1.602 TFLOP / (256 x 989e12 x 0.5) = 207,400 s
    assert re.search(r"^time +2\.4 days at an assumed MFU of 50% of 989 TFLOP/s on 256 x H200", said, re.MULTILINE)
    said = planned(monkeypatch, capsys, "--recipe", "plain_s16", "--gpus", "8", "--images", "512000")
    assert "45,000 steps = 90 epochs" in said and "counted as --images, 512,000 images" in said
    assert "suspicious" not in planned(monkeypatch, capsys, "--recipe", "finetune", "--gpus", "8", "--images", "1200")


def test_the_example_of_the_help_works(monkeypatch, capsys):
    command = EPILOG.splitlines()[-1].split()
    assert command[:2] == ["python", "launch/plan.py"]
    assert "recipe        scaling_g" in planned(monkeypatch, capsys, *command[2:])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "h1000"], "--gpu: expected one of a100, h100, h200, b200, got 'h1000'"),
        (["--mfu", "40"], "--mfu: expected a share above 0 and at most 1, got 40.0"),
        (["--gpus", "0"], "--gpus: expected at least 1, got 0"),
        (["--images", "0"], "--images: expected at least 1, got 0"),
        (["--gpus", "7"], "cannot be shared equally by 7 ranks"),
        (["--recipe", "finetune", "--gpus", "2"], "is for any data, so its epochs have no length; add --images N"),
    ],
)
def test_a_wrong_word_is_one_sentence(monkeypatch, arguments, said):
    monkeypatch.setattr(sys, "argv", ["launch/plan.py", "--recipe", "plain_s16", "--gpus", "8", *arguments])
    with pytest.raises(UsageError) as caught:
        plan_main()
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_as_a_user_starts_it():
    """In a process of its own, from another directory, without anything that this process has loaded or set."""
    command = [sys.executable, ROOT / "launch/plan.py", "--recipe", "deit3_i1k_h14", "--gpus", "64", "--gpu", "a100"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert ended.returncode == 0, ended.stderr
    assert "500,456 steps = 800 epochs" in ended.stdout and "64 x A100" in ended.stdout
