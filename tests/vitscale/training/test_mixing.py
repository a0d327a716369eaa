"""What images are mixed with what, and how much, follows from (seed, step, slot) alone; mixed targets are mixed alike."""

import numpy as np
import pytest
import torch

from vitscale.base.errors import UsageError
from vitscale.config import apply_overrides, check_mix_group
from vitscale.recipes.catalog import recipe_named
from vitscale.training.losses import sparse_targets
from vitscale.training.mixing import Mixing, draw, mix

MIXES = {"mixup": Mixing(mixup=0.8, cutmix=0.0, group=4, seed=1), "cutmix": Mixing(mixup=0.0, cutmix=1.0, group=4, seed=1)}
MIXES["both"] = Mixing(mixup=0.8, cutmix=1.0, group=4, seed=1)
IMAGES = torch.rand(24, 3, 12, 10, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24)[:, None]


def mixed(mixing: Mixing, images: torch.Tensor, labels: torch.Tensor, *, step: int = 3, first_slot: int = 0):
    return mix(images, sparse_targets(labels, share=True, masked_C=None), mixing, step=step, first_slot=first_slot)


@pytest.mark.parametrize("kind", MIXES)
@pytest.mark.parametrize("micro", [4, 8, 12, 24])
def test_no_micro_batch_and_no_rank_changes_what_is_mixed(kind, micro):
    """24 slots as one piece, or cut into micro-batches of any ranks."""
    whole, targets = mixed(MIXES[kind], IMAGES, LABELS)
    for first in range(0, 24, micro):
        part = slice(first, first + micro)
        images, t = mixed(MIXES[kind], IMAGES[part], LABELS[part], first_slot=first)
        assert images.equal(whole[part]) and t.labels_BK.equal(targets.labels_BK[part])
        assert t.weights_BK.equal(targets.weights_BK[part])


@pytest.mark.parametrize("kind", MIXES)
def test_images_and_targets_are_mixed_by_one_share(kind):
    whole, targets = mixed(MIXES[kind], IMAGES, LABELS)
    for i in range(24):
        partner = i // 4 * 4 + 3 - i % 4
        assert targets.labels_BK[i].tolist() == [i, partner]
        share = float(targets.weights_BK[i, 0])
        assert float(targets.weights_BK[i, 1]) == pytest.approx(1 - share, abs=1e-6)
        own = (whole[i] == IMAGES[i]).all(0)
        if kind == "mixup":
            assert torch.allclose(whole[i], share * IMAGES[i] + (1 - share) * IMAGES[partner], atol=1e-6)
        elif kind == "cutmix":
            assert ((whole[i] == IMAGES[partner]).all(0) | own).all()
            assert float(own.float().mean()) == pytest.approx(share, abs=1e-6)  # the true share of the pixels
            rows, columns = (~own).any(1).nonzero(), (~own).any(0).nonzero()
            if len(rows):  # one box
                assert (~own).sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)


def test_every_step_seed_and_group_draws_anew():
    draws = [draw(MIXES["mixup"], step=step, first_group=0, groups=6, height=8, width=8).lambda_n for step in range(50)]
    draws.append(
        draw(Mixing(mixup=0.8, cutmix=0, group=4, seed=2), step=0, first_group=0, groups=6, height=8, width=8).lambda_n
    )
    assert len(np.unique(np.concatenate(draws))) == 51 * 6


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 3.0])
def test_the_share_has_the_moments_of_its_beta_distribution(alpha):
    n = 200_000
    mixing = Mixing(mixup=alpha, cutmix=0.0, group=2, seed=0)
    drawn = draw(mixing, step=0, first_group=0, groups=n, height=8, width=8).lambda_n
    variance = 1 / (4 * (2 * alpha + 1))
    assert drawn.min() >= 0 and drawn.max() <= 1
    assert drawn.mean() == pytest.approx(0.5, abs=5 * (variance / n) ** 0.5)
    assert drawn.var() == pytest.approx(variance, rel=0.02)
    if alpha == 1.0:  # the uniform distribution
        assert np.quantile(drawn, [0.25, 0.75]) == pytest.approx([0.25, 0.75], abs=0.01)


def test_both_are_drawn_at_even_odds_and_cutmix_tells_the_share_that_is_left():
    drawn = draw(MIXES["both"], step=0, first_group=0, groups=20_000, height=32, width=32)
    area_n = (drawn.box_n4[:, 1] - drawn.box_n4[:, 0]) * (drawn.box_n4[:, 3] - drawn.box_n4[:, 2])
    is_cutmix = drawn.blend_n == 1.0
    assert is_cutmix.mean() == pytest.approx(0.5, abs=0.02)
    assert np.allclose(drawn.lambda_n[is_cutmix], 1 - area_n[is_cutmix] / 32**2) and (area_n[~is_cutmix] == 0).all()
    assert (drawn.box_n4 >= 0).all() and (drawn.box_n4 <= 32).all()


def test_no_global_generator_is_moved():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    mixed(MIXES["both"], IMAGES, LABELS)
    assert torch.get_rng_state().equal(before) and (np.random.get_state()[1] == numpy_before).all()


def test_groups_that_do_not_fit_are_refused_with_what_fits():
    config = apply_overrides(recipe_named("digits"), ["train.mixup=0.2", "train.mix_group=5"])
    with pytest.raises(UsageError, match=r"train.mix_group=5 does not divide the micro-batch of 6 images.*one of 2, 3, 6"):
        check_mix_group(config, micro_batch=6, accumulation=2)
    check_mix_group(apply_overrides(config, ["train.mixup=0"]), micro_batch=6, accumulation=2)
