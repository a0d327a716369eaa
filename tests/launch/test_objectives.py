"""Several labels per image, mixed, under both objectives, from the command line to the evaluation of what was trained."""

import json

import pytest

from tests.helpers.program import SMALL, curve, run
from tests.helpers.shards import numbered_images, write_dataset
from vitscale.base.files import read_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """18 images with one or two labels; class 9 is among them."""
    to = tmp_path_factory.mktemp("several")
    labels = [[[number, 9], [(number + shard) % 9]] for shard, number in enumerate(range(9))]
    write_dataset(to, numbered_images([2] * 9, side=8), labels, list("0123456789"))
    return to


SETTINGS = ["train.length=4", "train.mixup=0.8", "train.cutmix=1.0", "train.masked_classes=[9]", "run.save_every=0"]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_ranks_and_micro_batches_mix_alike_and_the_run_is_scored_by_its_own_objective(several, tmp_path, kind):
    curves = []
    for world, micro in ((1, 48), (2, 16)):
        place = tmp_path / f"{world}"
        settings = [*SETTINGS, f"train.objective={kind}", f"optim.micro_batch_max={micro}", "run.parity=never"]
        data = ["--data", several, "--eval-data", several]
        run("pretrain", *data, "--run", place, *SMALL, *settings, said=tmp_path / f"{world}.txt", world=world)
        curves.append(curve(place, "loss", "samples_hash"))
    for (step, loss, samples), (other_step, other_loss, other_samples) in zip(*curves, strict=True):
        assert (step, samples) == (other_step, other_samples)
        assert loss == pytest.approx(other_loss, rel=1e-5)  # sums in another order
    to = tmp_path / "e.json"
    run("evaluate", "--from", tmp_path / "1", "--data", several, "--json", to, said=tmp_path / "e.txt")
    expected, found = read_json(tmp_path / "1" / "FINISHED.json")["eval"], json.loads(to.read_text())
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert (found["images"], found["top1"], found["top5"]) == (18, expected["top1"], expected["top5"])
