"""The plain reference is what it says: the mean over the global batch, whatever its pieces, and torch's own steps."""

import pytest
import torch
import torch.nn.functional as F

from vitscale.model.config import ModelConfig
from vitscale.training.reference import mean_gradients, plain_model, train_plainly

CONFIG = ModelConfig(image_size=8, patch_size=4, width=16, depth=2, heads=2, classes=5)
GENERATOR = torch.Generator().manual_seed(0)
PIXELS = torch.randn(3, 8, 3, 8, 8, generator=GENERATOR)  # step, image, channel, row, column
LABELS = torch.randint(0, 5, (3, 8), generator=GENERATOR)


def loss_of(pieces: int):
    def loss(forward, step: int, k: int):
        part = slice(k * 8 // pieces, (k + 1) * 8 // pieces)
        return F.cross_entropy(forward(PIXELS[step, part]), LABELS[step, part])

    return loss


@pytest.mark.parametrize("pieces", [2, 4])
def test_gradients_are_the_mean_over_the_global_batch_however_it_is_cut(pieces):
    def gradients(n: int):
        return mean_gradients(plain_model(CONFIG, seed=0), lambda f, k: loss_of(n)(f, 0, k), micro_batches=n)

    cut, whole = gradients(pieces), gradients(1)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-6) and len(cut.losses) == pieces
    assert cut.norm == pytest.approx(whole.norm, rel=1e-5)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(cut.gradients[name], gradient, rtol=1e-4, atol=1e-8)


def test_a_parameter_without_a_gradient_has_zeros():
    model = plain_model(CONFIG, seed=0)
    model.extra = torch.nn.Parameter(torch.ones(3))
    found = mean_gradients(model, lambda f, k: loss_of(1)(f, 0, k), micro_batches=1)
    assert found.gradients["extra"].tolist() == [0.0, 0.0, 0.0]


def test_steps_are_those_of_a_loop_written_out():
    model, other = plain_model(CONFIG, seed=0), plain_model(CONFIG, seed=0)
    seeds: list[tuple[int, int]] = []
    steps = train_plainly(
        model,
        loss_of(2),
        steps=3,
        micro_batches=2,
        optimizer=torch.optim.SGD(model.parameters(), lr=9.0),
        clip=0.5,
        lr_at_step=lambda step: 0.1 * (step + 1),
        seed_micro_batch=lambda step, k: seeds.append((step, k)),
    )
    assert seeds == [(step, k) for step in range(3) for k in range(2)]
    for step in range(3):
        other.zero_grad()
        whole = F.cross_entropy(other(PIXELS[step]), LABELS[step])
        whole.backward()
        assert steps[step].loss == pytest.approx(whole.item(), rel=1e-5)
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        assert steps[step].norm == pytest.approx(float(norm), rel=1e-4) and float(norm) > 0.5, "clipping takes no part in it"
        with torch.no_grad():
            for parameter in other.parameters():
                parameter -= 0.1 * (step + 1) * parameter.grad
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7, msg=name)
