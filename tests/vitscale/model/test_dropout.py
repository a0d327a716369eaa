"""Dropout stands where the ViT code has it, is off in evaluation, and recomputed blocks draw the same masks."""

import pytest
import torch

from vitscale.model.config import ModelConfig
from vitscale.model.vit import VisionTransformer, initialise

CONFIG = ModelConfig(image_size=8, patch_size=4, width=16, depth=2, heads=2, classes=3)
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def model_of(rate: float, **settings) -> VisionTransformer:
    model = VisionTransformer(CONFIG, dropout=rate, **settings)
    initialise(model, seed=0)
    with torch.no_grad():
        model.head.weight.normal_(0, 1, generator=torch.Generator().manual_seed(1))
    return model


def gradients(model: VisionTransformer) -> list[torch.Tensor]:
    torch.manual_seed(5)
    model.train()
    model(IMAGES).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("recompute", [1, 2, "selective"])
def test_recomputed_blocks_drop_the_same_numbers(recompute):
    plain, again = gradients(model_of(0.3)), gradients(model_of(0.3, recompute=recompute))
    assert all(a.equal(b) for a, b in zip(plain, again, strict=True))


def test_it_is_off_in_evaluation_and_at_rate_zero():
    assert model_of(0.5).eval()(IMAGES).equal(model_of(0.0).train()(IMAGES))
    torch.manual_seed(0)
    assert not model_of(0.5).train()(IMAGES).equal(model_of(0.0).train()(IMAGES))


def test_it_is_applied_once_to_the_positions_and_three_times_in_a_block(monkeypatch):
    rates = []
    honest = torch.native_dropout

    def counted(x, rate, train):
        rates.append((rate, tuple(x.shape)))
        return honest(x, rate, train)

    monkeypatch.setattr(torch, "native_dropout", counted)
    model_of(0.1).train()(IMAGES)
    width, hidden = (3, 5, 16), (3, 5, 64)
    assert rates == [(0.1, width)] + 2 * [(0.1, width), (0.1, hidden), (0.1, width)]
