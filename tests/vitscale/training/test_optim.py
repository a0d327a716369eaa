"""The learning rate is a pure function of the step; exactly the matrices decay."""

import math
from itertools import pairwise

import pytest
import torch

from vitscale.config import ModelConfig, OptimConfig
from vitscale.model.vit import VisionTransformer
from vitscale.training.optim import lr_at, make_optimizer

PEAK, END, WARMUP, TOTAL = 0.4, 0.1, 10, 110
OPTIM = OptimConfig(global_batch=96, peak_lr=PEAK, end_lr=END, weight_decay=0.05, beta1=0.8, beta2=0.95, eps=1e-6)


def lr(step: int, *, warmup: int = WARMUP, total: int = TOTAL) -> float:
    return lr_at(step, optim=OPTIM, warmup_steps=warmup, total_steps=total)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, PEAK / WARMUP),
        (1, 2 * PEAK / WARMUP),
        (WARMUP - 1, PEAK),
        (WARMUP, PEAK),
        (WARMUP + 25, END + (PEAK - END) * (1 + math.sqrt(0.5)) / 2),  # a quarter of the cosine
        (WARMUP + 50, (PEAK + END) / 2),
        (TOTAL, END),
        (TOTAL + 150, END),
    ],
)
def test_the_schedule_at_its_key_steps(step, rate):
    assert lr(step) == pytest.approx(rate, rel=1e-12)


def test_it_rises_to_the_peak_and_then_only_falls():
    rates = [lr(step) for step in range(TOTAL + 1)]
    assert all(a < b for a, b in pairwise(rates[:WARMUP]))
    assert all(a > b for a, b in pairwise(rates[WARMUP:]))
    assert max(rates) == PEAK
    # The last update that is made lies one step before the end of the cosine.
    assert END < rates[TOTAL - 1] < END + 1e-3 * PEAK


def test_it_depends_on_the_step_alone():
    forwards = [lr(step) for step in range(TOTAL)]
    assert [lr(step) for step in reversed(range(TOTAL))] == forwards[::-1]


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (5, 5), (0, 3)])
def test_the_shortest_runs_have_a_rate_above_zero_at_every_step(warmup, total):
    rates = [lr(step, warmup=warmup, total=total) for step in range(total)]
    assert all(0 < rate <= PEAK for rate in rates)
    assert rates[warmup - 1 if warmup else 0] == PEAK


# The parameters that decay, by hand: every weight of a linear map, nothing else.
DECAYED = [
    "patch_embed.proj.weight",
    *[f"blocks.{n}.{name}.weight" for n in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")],
    "head.weight",
]


def model_of() -> VisionTransformer:
    return VisionTransformer(ModelConfig(image_size=8, patch_size=2, width=8, depth=2, heads=2, classes=3))


def test_exactly_the_matrices_decay():
    model = model_of()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = make_optimizer(model, optim=OPTIM).param_groups
    assert [names[id(p)] for p in decayed["params"]] == DECAYED
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias", "blocks.0.norm1.weight"} <= {
        names[id(p)] for p in plain["params"]
    }
    assert sorted(names[id(p)] for p in [*decayed["params"], *plain["params"]]) == sorted(names.values())
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    for group in (decayed, plain):
        assert (group["lr"], group["betas"], group["eps"]) == (PEAK, (0.8, 0.95), 1e-6)


def test_frozen_parameters_are_left_out():
    model = model_of()
    model.head.weight.requires_grad = False
    optimizer = make_optimizer(model, optim=OPTIM)
    assert not any(p is model.head.weight for group in optimizer.param_groups for p in group["params"])


def test_one_update_is_adamw_with_decoupled_decay():
    torch.manual_seed(0)
    model = model_of()
    optimizer = make_optimizer(model, optim=OPTIM)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    for name, parameter in model.named_parameters():
        # First step: m/(1-beta1) = g and v/(1-beta2) = g^2, so the update is lr * g / (|g| + eps).
        shrunk = before[name] * (1 - PEAK * 0.05) if name in DECAYED else before[name]
        expected = shrunk - PEAK * 3.0 / (3.0 + 1e-6)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6, msg=name)
