"""A branch goes on with the whole state of its parent, and equals the run that had planned the same schedule."""

import pytest

from launch.branch import has_same_losses
from tests.helpers.program import SMALL, curve, run, start
from vitscale.base.files import read_json
from vitscale.config import apply_overrides
from vitscale.recipes.catalog import recipe_named

NAMES = ("loss", "grad_norm", "lr", "samples_hash", "images_seen", "skipped")
WSD = [
    *SMALL,
    "run.log_every=1",
    "run.eval_every=0",
    "run.save_every=8",
    "run.keep_last=9",
    "optim.schedule=wsd",
    "optim.warmup=4",
]


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    base = tmp_path_factory.mktemp("parent")
    run("pretrain", "--run", base / "p", *WSD, "train.length=20", said=base / "p.txt")
    return base / "p"


@pytest.mark.slow
def test_a_branch_with_a_cooldown_equals_the_run_that_planned_it_bit_for_bit(parent, tmp_path):
    cooled = ["train.length=24", "optim.cooldown=8"]
    run("pretrain", "--run", tmp_path / "planned", *WSD, *cooled, said=tmp_path / "planned.txt")
    branch = ["--from", f"{parent}@16", "--run", tmp_path / "branch", *cooled]
    killed = start("pretrain", *branch, said=tmp_path / "a.txt", env={"VITSCALE_FAULT": "kill@step.end:step=19"})
    assert killed.wait() == [-9]  # before its first checkpoint: it starts at its parent again
    said = run("pretrain", *branch, said=tmp_path / "b.txt")
    assert f"as a branch of {parent.resolve()}@16, at position 1,536 of the data" in said
    planned = curve(tmp_path / "planned", *NAMES)
    assert curve(tmp_path / "branch", *NAMES) == planned[16:]  # steps 17 to 24
    assert curve(parent, *NAMES)[:16] == planned[:16]  # the shared part
    assert planned[16][3] > planned[-1][3] > 0  # and the rate did fall
    final = "checkpoints/step-00000024/vitscale.json"
    record = read_json(tmp_path / "branch" / final)
    assert record["state"]["segments"] == [{"branch_step": 16, "position": 16 * 96}]
    digests = [
        {entry["name"]: entry["sha256"] for entry in read_json(tmp_path / name / final)["files"] if "optim" in entry["name"]}
        for name in ("branch", "planned")
    ]
    assert digests[0] == digests[1] != {}
    assert read_json(tmp_path / "branch" / "config.json")["train"]["branch"] == f"{parent.resolve()}@16"


@pytest.mark.slow
def test_what_a_branch_may_not_is_one_sentence(parent, tmp_path):
    def refused(*arguments, code=2):
        return run("pretrain", *arguments, said=tmp_path / "x.txt", code=code)

    new = ["--run", tmp_path / "new"]
    assert "model.depth is 2 there, 3 in the command" in refused("--from", f"{parent}@16", *new, "model.depth=3")
    assert "there are: 8, 16, 20" in refused("--from", f"{parent}@17", *new, code=3)
    assert "leave out --recipe" in refused("--from", f"{parent}@16", *new, "--recipe", "digits")
    assert "is no branch, so it cannot start from" in refused("--from", f"{parent}@16", "--run", parent)
    assert "expected a run directory" in refused("--from", tmp_path / "nowhere", *new, code=3)
    assert not (tmp_path / "new").exists()


def test_losses_of_the_parent_measure_those_of_a_branch_only_where_they_mean_the_same():
    before = recipe_named("digits")
    same = [
        "train.length=7",
        "train.skip_steps=[3]",
        "optim.peak_lr=1",
        "optim.schedule=wsd",
        "run.log_every=9",
        "data.workers=2",
    ]
    assert has_same_losses(before, apply_overrides(before, same))
    for other in (
        "train.label_smoothing=0.1",
        "train.mixup=0.2",
        "augment.flip=0.1",
        "train.objective=sigmoid",
        "data.lanes=3",
    ):
        assert not has_same_losses(before, apply_overrides(before, [other])), other
