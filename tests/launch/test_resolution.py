"""Progressive resolution: the same images in the same order at other sizes, and a resume in any phase leaves no trace."""

import pytest

from tests.helpers.program import SMALL, curve, run, start

pytestmark = pytest.mark.slow

ARGUMENTS = [*SMALL, "run.log_every=1", "run.save_every=5", "run.eval_every=0"]
SIZES = 'train.resolutions=["4@0","6@25%","8@12"]'


def test_images_change_size_at_their_steps_and_nothing_else_changes(tmp_path):
    run("pretrain", "--run", tmp_path / "plain", *ARGUMENTS, said=tmp_path / "a.txt")
    run("pretrain", "--run", tmp_path / "quiet", *ARGUMENTS, SIZES, "data.workers=1", said=tmp_path / "b.txt", world=2)
    for step in (8, 14):  # in the second phase, and in the third from a checkpoint of the second
        env = {"VITSCALE_FAULT": f"kill@step.end:step={step}"}
        killed = start("pretrain", "--run", tmp_path / "r", *ARGUMENTS, SIZES, said=tmp_path / "c.txt", env=env, world=2)
        assert killed.wait() == [-9, -9]
    run("pretrain", "--run", tmp_path / "r", *ARGUMENTS, SIZES, said=tmp_path / "d.txt", world=2)
    names = ("loss", "grad_norm", "image_size", "samples_hash")
    found = curve(tmp_path / "r", *names)
    assert found == curve(tmp_path / "quiet", *names)
    assert [size for _, _, _, size, _ in found] == [4] * 6 + [6] * 6 + [8] * 12
    plain = curve(tmp_path / "plain", *names)
    assert [line[-1] for line in found] == [line[-1] for line in plain]  # the same images
    assert found[1][1] != plain[1][1]  # seen at another size


def test_sizes_that_do_not_fit_are_refused_before_anything_starts(tmp_path):
    said = run("pretrain", "--run", tmp_path / "x", *SMALL, 'train.resolutions=["5@0","8@4"]', said=tmp_path / "a.txt", code=2)
    assert "train.resolutions: model.image_size=5 is not a multiple of model.patch_size=2" in said
    assert not (tmp_path / "x" / "config.json").exists()
