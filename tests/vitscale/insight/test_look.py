"""A look keeps what the whole maps would give, for every kind of model; rollouts are the published products."""

import math

import pytest
import torch
import torch.nn.functional as F

from vitscale.insight import attention_maps as maps_module
from vitscale.insight.attention_maps import attention_maps
from vitscale.insight.look import LayerTally, high_norm_tokens, look, patch_distances
from vitscale.insight.parameters import patch_filters, position_similarity
from vitscale.insight.rollout import attention_rollout, gradient_rollout
from vitscale.model import attention as attention_module
from vitscale.model.config import ModelConfig
from vitscale.model.vit import VisionTransformer, initialise

KINDS = {
    "class": {},
    "post": {"norm": "post"},
    "registers": {"registers": 3, "parallel": True},
    "average": {"class_token": False, "pool": "average"},
    "average over a class token": {"pool": "average", "registers": 1},
    "map": {"class_token": False, "pool": "map", "position": "rotary", "qk_norm": True},
}
IMAGES = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(2))
EPSILON = 1e-5
"""Rounding of float32 in sums over 13 tokens."""


def model_of(kind: str) -> VisionTransformer:
    model = VisionTransformer(ModelConfig(image_size=12, patch_size=4, width=24, depth=3, heads=3, classes=5, **KINDS[kind]))
    initialise(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # not as flat as fresh weights, and with a head that says something
        for block in model.blocks:
            block.attn.qkv.weight.mul_(2)
            block.attn.qkv.bias.normal_(0, 0.8, generator=generator)
        model.head.weight.normal_(0, 0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_numbers", [1 << 20, 60])
def test_a_look_is_a_summary_of_the_whole_maps(kind, chunk_numbers, monkeypatch):
    monkeypatch.setattr(maps_module, "CHUNK_NUMBERS_MAX", chunk_numbers)
    model = model_of(kind)
    whole, seen = attention_maps(model, IMAGES), look(model, IMAGES)
    prefix, distances = model.config.prefix_tokens, patch_distances(2, 3, 4)
    assert (seen.rows, seen.columns, seen.prefix) == (2, 3, prefix)
    torch.testing.assert_close(seen.logits_BC, model(IMAGES).detach(), rtol=0, atol=EPSILON)
    for layer, map_BHNN in whole.items():
        torch.testing.assert_close(seen.mean_BNN[layer], map_BHNN.mean(1), rtol=0, atol=EPSILON)
        asking = map_BHNN[:, :, 0] if model.config.pool == "class" else map_BHNN[:, :, prefix:].mean(2)
        torch.testing.assert_close(seen.asking_BHN[layer], asking, rtol=0, atol=EPSILON)
        entropy = -(map_BHNN * map_BHNN.log()).sum(-1)[:, :, prefix:].mean(-1)
        torch.testing.assert_close(seen.entropy_BH[layer], entropy, rtol=0, atol=EPSILON)
        patches = map_BHNN[:, :, prefix:, prefix:]
        distance = ((patches * distances).sum(-1) / patches.sum(-1)).mean(-1)
        torch.testing.assert_close(seen.distance_BH[layer], distance, rtol=0, atol=4 * EPSILON)  # distances reach 9 pixels
    torch.testing.assert_close(seen.start_BN.sum(1), torch.ones(2), rtol=0, atol=EPSILON)
    torch.testing.assert_close(attention_rollout(seen.start_BN, seen.mean_BNN).sum(1), torch.ones(2), rtol=0, atol=EPSILON)
    torch.testing.assert_close(seen.norms_BN[-1], model.tokens(IMAGES).norm(dim=-1).detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_rollout_equals_eager_autograd(kind, monkeypatch):
    """Independent: attention spelled out, its maps kept in the graph, one backward pass, products of whole matrices."""
    model, labels = model_of(kind), torch.tensor([3, 1])
    found = gradient_rollout(model, IMAGES, labels)
    maps: list[torch.Tensor] = []

    def eager(q, k, v):
        maps.append(torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1))
        return maps[-1] @ v

    monkeypatch.setattr(attention_module, "attend", eager)
    chosen = model(IMAGES)[torch.arange(2), labels].sum()
    gradients = torch.autograd.grad(chosen, maps)
    relevance = [F.relu(a * g).mean(1).detach() for a, g in zip(maps, gradients, strict=True)]
    N, prefix = maps[0].shape[-1], model.config.prefix_tokens
    product = torch.eye(N).expand(2, N, N)
    for layer in range(3):
        product = product + relevance[layer] @ product
    expected = {
        "class": product[:, 0],
        "average": product[:, prefix:].mean(1),
        "map": (relevance[-1] @ product)[:, 0],
    }[model.config.pool]
    assert relevance[0].max() > 1e-4, "the example must not be empty"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rollout_of_a_chain_is_the_product_worked_by_hand():
    first, second = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    first[0] = torch.tensor([0.0, 1.0, 0.0])
    second[0] = torch.tensor([0.0, 0.5, 0.5])
    # (A_2 + I)/2 row 0 = (1/2, 1/4, 1/4); (A_1 + I)/2 row 0 = (1/2, 1/2, 0), rows 1 and 2 are unit rows.
    rollout = attention_rollout(torch.tensor([[1.0, 0, 0]], dtype=torch.float64), [first[None], second[None]])
    torch.testing.assert_close(rollout, torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64), rtol=0, atol=1e-15)


def test_a_model_built_to_attend_uniformly_is_seen_to():
    model = model_of("average")
    with torch.no_grad():
        for block in model.blocks:  # queries of zero: every score is equal
            block.attn.qkv.weight[:24] = 0
            block.attn.qkv.bias[:24] = 0
    seen = look(model, IMAGES)
    for layer in range(3):
        torch.testing.assert_close(seen.mean_BNN[layer], torch.full((2, 6, 6), 1 / 6), rtol=0, atol=EPSILON)
        torch.testing.assert_close(seen.entropy_BH[layer], torch.full((2, 3), math.log(6)), rtol=0, atol=EPSILON)
        torch.testing.assert_close(
            seen.distance_BH[layer], patch_distances(2, 3, 4).mean().expand(2, 3), rtol=0, atol=4 * EPSILON
        )
    rollout = attention_rollout(seen.start_BN, seen.mean_BNN)
    torch.testing.assert_close(rollout, torch.full((2, 6), 1 / 6), rtol=0, atol=EPSILON)


def test_a_shift_by_one_column_has_distance_of_one_patch_and_no_entropy():
    tally = LayerTally((1, 1, 5), 1, patch_distances(2, 2, 16), keep_map=True, asks_first=True)
    shift = torch.eye(5)[[0, 2, 1, 4, 3]]  # patches of a row look at each other
    tally.add(0, slice(0, 2), shift[None, :2])
    tally.add(0, slice(2, 5), shift[None, 2:])
    assert tally.distance_BH.item() == 16 and tally.entropy_BH.item() == 0
    assert (
        tally.mean_BNN is not None and torch.equal(tally.mean_BNN[0], shift) and torch.equal(tally.asking_BHN[0, 0], shift[0])
    )


def test_looking_leaves_no_trace_and_runs_the_forward_it_is_given():
    model, called = model_of("map").train(), []
    seen = look(model, IMAGES, forward=lambda images: called.append(1) or model(images), keep_maps=False)
    assert called == [1] and seen.mean_BNN == [] and model.training
    assert model.attn_pool.watch is None and not any(m._forward_hooks for m in model.modules())


def test_a_token_of_high_norm_stands_out():
    norms = torch.tensor([[50.0, 1.0, 1.1, 9.0, 0.9, 1.0]])
    assert high_norm_tokens(norms, prefix=1).tolist() == [[True, False, False, True, False, False]]


def test_positions_on_orthogonal_axes_and_filters_of_known_variance():
    model = model_of("class")
    with torch.no_grad():
        model.pos_embed.zero_()
        model.pos_embed[0, 1:, :9] = 2 * torch.eye(9)
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.weight[0, 5], model.patch_embed.proj.weight[1, 5] = -3.0, 3.0
    torch.testing.assert_close(position_similarity(model), torch.eye(9))
    filters, shares = patch_filters(model, 2)
    assert filters.shape == (2, 4, 4, 3) and filters[0, 1, 1, 0] == pytest.approx(1) and shares[0] == pytest.approx(1)
    assert position_similarity(model_of("map")) is None


@pytest.mark.parametrize("kind", ["class", "map"])
def test_the_largest_logit_is_what_enters_the_softmax(kind):
    model = model_of(kind)
    caught = []
    with blocks_watched(model, lambda q, k, v, out: caught.append((q, k))):
        model(IMAGES)
    seen = look(model, IMAGES)
    for (q, k), logit_BH in zip(caught, seen.logit_BH, strict=True):
        eager_BHNN = torch.einsum("bhik,bhjk->bhij", q, k) / math.sqrt(q.shape[-1])
        assert torch.allclose(logit_BH, eager_BHNN.abs().amax(dim=(2, 3)), atol=1e-5) and logit_BH.shape == (2, 3)


def blocks_watched(model: VisionTransformer, watch):
    return maps_module.watched({block.attn: watch for block in model.blocks})
