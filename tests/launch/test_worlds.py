"""Laws 1 and 2: the number of ranks and the ZeRO stage change neither which images a step sees nor what it learns."""

import pytest

from tests.helpers.program import SMALL, curve, run

pytestmark = pytest.mark.slow

# Worst seen over 20 fp32 steps of the digits recipe: 1.5e-6.
TOLERANCE = 1e-4


def test_one_two_three_ranks_and_four_stages_learn_the_same(tmp_path):
    arguments = [*SMALL, "train.length=12", "run.save_every=0", "run.eval_every=0"]
    curves = {}
    for world, stage in [(1, 2), (2, 2), (3, 2), (1, 0), (2, 1), (3, 3)]:
        directory = tmp_path / f"{world}-{stage}"
        options = ["--run", directory, f"ds.zero_optimization.stage={stage}"]
        if curves:  # the digits that the first run has built
            options += ["--data", tmp_path / "1-2" / "data" / "train", "--eval-data", tmp_path / "1-2" / "data" / "eval"]
        run("pretrain", *options, *arguments, said=tmp_path / f"{world}-{stage}.txt", world=world)
        curves[world, stage] = curve(directory, "samples_hash", "loss")
    reference = curves[1, 2]
    assert len({samples_hash for _, samples_hash, _ in reference}) == 12  # every step has images of its own
    for where, found in curves.items():
        assert [line[:2] for line in found] == [line[:2] for line in reference], f"{where}: other images"
        for (step, _, loss), (_, _, expected) in zip(found, reference, strict=True):
            assert loss == pytest.approx(expected, rel=TOLERANCE), f"{where}, step {step}"
