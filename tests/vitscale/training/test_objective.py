"""From a micro-batch to a loss: what is trained on, what is reported, and that a world of several ranks sees the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.base.errors import UsageError
from vitscale.config import Config, apply_overrides
from vitscale.model.layers import normalise_pixels
from vitscale.model.vit import VisionTransformer, initialise
from vitscale.recipes.catalog import recipe_named
from vitscale.training.objective import Loss, objective_of

CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (12, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = torch.randint(0, 10, (12, 1), generator=torch.Generator().manual_seed(1))


def digits(*overrides: str) -> Config:
    return apply_overrides(recipe_named("digits"), ["model.depth=1", "model.width=16", "model.heads=2", *overrides])


def forward(images_BCHW: Tensor) -> Tensor:
    """Any map of pixels to ten logits."""
    weights = torch.randn(images_BCHW[0].numel(), 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 14
    return images_BCHW.flatten(1).double() @ weights


def loss_of(*overrides: str, labels: Tensor = LABELS, part: slice = slice(None), step: int = 0) -> Loss:
    objective = objective_of(digits(*overrides), device=CPU, dtype=torch.float32)
    return objective(forward, IMAGES[part], labels[part], step=step, first_slot=part.start or 0)


def plain_logits() -> Tensor:
    return forward(normalise_pixels(IMAGES, (0.5,) * 3, (0.5,) * 3, torch.float32)).float()


def test_softmax_is_torchs_own_and_the_reported_loss_has_no_smoothing():
    expected = F.cross_entropy(plain_logits(), LABELS[:, 0])
    assert loss_of() == (expected, expected)
    smoothed = loss_of("train.label_smoothing=0.1")
    right = F.cross_entropy(plain_logits(), LABELS[:, 0], label_smoothing=0.1)
    assert smoothed.trained.item() == pytest.approx(right.item(), rel=1e-6)
    assert smoothed.reported.item() == pytest.approx(expected.item(), rel=1e-6) != smoothed.trained.item()


def test_sigmoid_sums_over_classes_and_averages_over_images():
    target = F.one_hot(LABELS[:, 0], 10).float()
    expected = F.binary_cross_entropy_with_logits(plain_logits(), target, reduction="sum") / 12
    assert loss_of("train.objective=sigmoid").trained.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_several_labels_are_all_wanted(kind):
    labels = torch.cat([LABELS, (LABELS + 3) % 10], dim=1)
    labels[0, 1] = -1
    target = torch.zeros(12, 10).scatter_add_(1, labels.clamp(min=0), (labels >= 0).float())
    if kind == "softmax":
        expected = F.cross_entropy(plain_logits(), target / target.sum(1, keepdim=True))
    else:
        expected = F.binary_cross_entropy_with_logits(plain_logits(), target, reduction="sum") / 12
    assert loss_of(f"train.objective={kind}", labels=labels).trained.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_mean_over_micro_batches_of_mixed_images_is_that_of_the_whole_batch(kind):
    overrides = [f"train.objective={kind}", "train.mixup=0.8", "train.cutmix=1", "train.mix_group=4"]
    whole = loss_of(*overrides).trained.item()
    parts = [loss_of(*overrides, part=slice(first, first + 4)).trained.item() for first in (0, 4, 8)]
    assert sum(parts) / 3 == pytest.approx(whole, rel=1e-6)
    assert loss_of(*overrides, step=1).trained.item() != pytest.approx(whole, rel=1e-3)


def test_masked_classes_are_never_predicted_and_take_no_part():
    masked = "train.masked_classes=[0,4]"
    labels = torch.tensor([[1], [2], [3], [5], [6], [7], [8], [9], [1], [2], [3], [4]])  # the last one is masked
    kept = [c for c in range(10) if c not in (0, 4)]
    to_kept = {c: i for i, c in enumerate(kept)}
    expected = F.cross_entropy(plain_logits()[:11][:, kept], torch.tensor([to_kept[c] for c in labels[:11, 0].tolist()]))
    assert loss_of(masked, labels=labels).trained.item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(UsageError, match="masked_classes"):
        digits("train.masked_classes=[10]")


def test_nothing_but_masked_labels_is_a_loss_of_zero():
    labels = torch.full((12, 1), 4)
    assert loss_of("train.masked_classes=[4]", labels=labels).trained.item() == 0.0


def test_the_head_starts_at_its_bias():
    model = VisionTransformer(digits().model)
    initialise(model, seed=0, head_bias=-10.0)
    assert (model.head.bias == -10).all() and (model.head.weight == 0).all()
    images = normalise_pixels(IMAGES, (0.5,) * 3, (0.5,) * 3, torch.float32)
    assert torch.sigmoid(model(images)).max() < 5e-5  # "none of them", not one half of each
