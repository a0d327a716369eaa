"""Every variant equals its formula, written again here in float64; stochastic depth and gradients keep their laws."""

import math
import time

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.vitscale.model.test_vit import config, images_of, scrambled, seed_probabilities
from vitscale.config import TrainConfig
from vitscale.model.config import ModelConfig
from vitscale.model.position import rotary_angles, sincos2d_bv, sincos2d_mae
from vitscale.model.vit import VisionTransformer, initialise, kept_images

# ---- the formulas ----------------------------------------------------------------------------------------------------


def normed(x: Tensor, p: dict[str, Tensor], name: str, c: ModelConfig) -> Tensor:
    if c.norm_kind == "rmsnorm":
        return x / ((x * x).mean(-1, keepdim=True) + c.norm_eps).sqrt() * p[f"{name}.weight"]
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / ((centred * centred).mean(-1, keepdim=True) + c.norm_eps).sqrt() * p[f"{name}.weight"]
    return scaled + p.get(f"{name}.bias", torch.tensor(0.0))


def mapped(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    return torch.einsum("...i,oi->...o", x, p[f"{name}.weight"]) + p.get(f"{name}.bias", torch.tensor(0.0))


def activated(x: Tensor, c: ModelConfig) -> Tensor:
    if c.activation == "swiglu":
        half = x.shape[-1] // 2
        return x[..., :half] * torch.sigmoid(x[..., :half]) * x[..., half:]
    if c.activation == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def turned(x: Tensor, token: int, c: ModelConfig) -> Tensor:
    """One token's query or key of one head: pairs (i, i + K/2) turned by the angles of its patch."""
    if token < c.prefix_tokens:
        return x
    row, column = divmod(token - c.prefix_tokens, c.grid)
    K = c.head_width
    out = x.clone()
    for i in range(K // 2):
        place = (2 * (row if i < K // 4 else column) + 1) / c.grid - 1
        angle = 2 * math.pi * place / 100 ** ((i % (K // 4)) * 2 / (K // 2))
        a, b = x[i], x[i + K // 2]
        out[i], out[i + K // 2] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return out


def attended(x: Tensor, p: dict[str, Tensor], block: str, c: ModelConfig) -> Tensor:
    q, k, v = mapped(x, p, f"{block}.attn.qkv").chunk(3, dim=-1)
    heads = []
    for head in range(c.heads):
        columns = slice(head * c.head_width, (head + 1) * c.head_width)
        qh, kh, vh = q[:, columns], k[:, columns], v[:, columns]
        if c.qk_norm:
            qh, kh = normed(qh, p, f"{block}.attn.q_norm", c), normed(kh, p, f"{block}.attn.k_norm", c)
        if c.position == "rotary":
            qh, kh = (torch.stack([turned(row, t, c) for t, row in enumerate(rows)]) for rows in (qh, kh))
        e = torch.exp(qh @ kh.T / math.sqrt(c.head_width))
        heads.append(e / e.sum(-1, keepdim=True) @ vh)
    out = mapped(torch.cat(heads, dim=-1), p, f"{block}.attn.proj")
    return out * p.get(f"{block}.ls1.gamma", torch.tensor(1.0))


def fed(x: Tensor, p: dict[str, Tensor], block: str, c: ModelConfig) -> Tensor:
    return mapped(activated(mapped(x, p, f"{block}.fc1"), c), p, f"{block}.fc2")


def formula_logits(image_CHW: Tensor, p: dict[str, Tensor], c: ModelConfig) -> Tensor:
    P = c.patch_size
    patches = [image_CHW[:, i * P : (i + 1) * P, j * P : (j + 1) * P].reshape(-1) for i in range(c.grid) for j in range(c.grid)]
    x = mapped(torch.stack(patches), p, "patch_embed.proj")
    prefix = [p[name][0] for name in ("cls_token", "reg_token") if name in p]
    tables = {"sincos2d_bv": sincos2d_bv, "sincos2d_mae": sincos2d_mae}
    if c.position == "learned" and c.prefix_positions:
        z = torch.cat([*prefix, x]) + p["pos_embed"][0]
    else:
        add = p["pos_embed"][0] if c.position == "learned" else 0.0
        add = tables[c.position](c.grid, c.grid, c.width)[0] if c.position in tables else add
        z = torch.cat([*prefix, x + add])
    alpha = (2 * c.depth) ** 0.25 if c.norm == "deepnorm" else 1.0
    for layer in range(c.depth):
        b = f"blocks.{layer}"
        gamma = p.get(f"{b}.ls2.gamma", torch.tensor(1.0))
        if c.parallel and c.norm == "pre":
            y = normed(z, p, f"{b}.norm1", c)
            z = z + attended(y, p, b, c) + fed(y, p, f"{b}.mlp", c) * gamma
        elif c.parallel:
            z = normed(alpha * z + attended(z, p, b, c) + fed(z, p, f"{b}.mlp", c) * gamma, p, f"{b}.norm1", c)
        elif c.norm == "respost":
            z = z + normed(attended(z, p, b, c), p, f"{b}.norm1", c)
            z = z + normed(fed(z, p, f"{b}.mlp", c) * gamma, p, f"{b}.norm2", c)
        elif c.norm == "pre":
            z = z + attended(normed(z, p, f"{b}.norm1", c), p, b, c)
            z = z + fed(normed(z, p, f"{b}.norm2", c), p, f"{b}.mlp", c) * gamma
        else:
            z = normed(alpha * z + attended(z, p, b, c), p, f"{b}.norm1", c)
            z = normed(alpha * z + fed(z, p, f"{b}.mlp", c) * gamma, p, f"{b}.norm2", c)

    def final(y: Tensor) -> Tensor:
        return normed(y, p, "norm", c) if c.norm in ("pre", "respost") else y

    if c.pool == "class":
        pooled = final(z)[0]
    elif c.pool == "average":
        kept = z[c.prefix_tokens :]
        pooled = final(kept.mean(0)) if c.pool_norm == "after" else final(kept).mean(0)
    else:
        y, query = final(z), mapped(p["attn_pool.latent"][0], p, "attn_pool.q")
        k, v = mapped(y, p, "attn_pool.kv").chunk(2, dim=-1)
        out = []
        for head in range(c.heads):
            columns = slice(head * c.head_width, (head + 1) * c.head_width)
            e = torch.exp(query[:, columns] @ k[:, columns].T / math.sqrt(c.head_width))
            out.append(e / e.sum(-1, keepdim=True) @ v[:, columns])
        seen = mapped(torch.cat(out, dim=-1), p, "attn_pool.proj")
        pooled = (seen + fed(normed(seen, p, "attn_pool.norm", c), p, "attn_pool.mlp", c))[0]
    if c.pre_logits_width:
        pooled = torch.tanh(mapped(pooled, p, "pre_logits"))
    return mapped(pooled, p, "head")


VARIANTS = [
    {"norm": "deepnorm", "depth": 3},
    {"norm": "respost", "layer_scale": 0.5},
    {"norm_kind": "rmsnorm", "qk_norm": True},
    {"norm_bias": False, "qkv_bias": False},
    {"qk_norm": True, "parallel": True},
    {"parallel": True, "norm": "post"},
    {"parallel": True, "norm": "deepnorm", "layer_scale": 0.5},
    {"activation": "gelu_tanh"},
    {"activation": "swiglu", "mlp_width": 7, "layer_scale": 0.1},
    {"registers": 2},
    {"registers": 3, "prefix_positions": False},
    {"class_token": False, "pool": "average"},
    {"pool": "average", "pool_norm": "after", "registers": 1},
    {"class_token": False, "pool": "map", "activation": "swiglu"},
    {"pool": "map", "norm": "post"},
    {"pool": "average", "norm": "deepnorm"},
    {"position": "sincos2d_bv"},
    {"position": "sincos2d_mae", "class_token": False, "pool": "average"},
    {"position": "rotary", "registers": 1, "qk_norm": True},
    {"pre_logits_width": 9},
]


@pytest.mark.parametrize("more", VARIANTS)
@torch.no_grad()
def test_every_variant_equals_its_formula(more):
    c = config(**({"image_size": 12} | more))
    model = scrambled(VisionTransformer(c).double())
    p = dict(model.named_parameters())
    images_BCHW = images_of(c)
    expected = torch.stack([formula_logits(image, p, c) for image in images_BCHW])
    # Rotations are kept in float32.
    error = 1e-5 if c.position == "rotary" else 1e-12
    torch.testing.assert_close(model(images_BCHW), expected, rtol=0, atol=error * float(expected.abs().max()))
    plain = {"norm", "registers"} - set(more)
    assert plain or (expected[0] - expected[1]).abs().max() > 1e-3, "the example must tell images apart"


def test_rows_and_columns_of_rotations_are_told_apart():
    angles = rotary_angles(2, 3, 8)
    assert angles.shape == (6, 4)
    assert torch.equal(angles[0, :2], angles[2, :2]) and not torch.equal(angles[0, 2:], angles[2, 2:])
    assert torch.equal(angles[0, 2:], angles[3, 2:]) and not torch.equal(angles[0, :2], angles[3, :2])


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "sincos2d_bv", "rotary"])
def test_images_of_any_sides_that_the_patch_divides(position):
    c = config(image_size=16, position=position)
    model = scrambled(VisionTransformer(c).double()).eval()
    generator = torch.Generator().manual_seed(0)
    for height, width in [(16, 8), (8, 24), (16, 16)]:
        assert model(torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)).isfinite().all()


# ---- gradients of the seed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_gradients_equal_finite_differences_of_the_seed_formulas(position):
    c = config(norm="post", projection_bias=False, position=position, width=6, heads=2, depth=2, classes=3)
    model = scrambled(VisionTransformer(c).double())
    images_BCHW = images_of(c, batch=1)
    model.predict_proba(images_BCHW)[0, 1].log().backward()
    p = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    generator = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.numpy()
        for place in generator.choice(parameter.numel(), size=min(4, parameter.numel()), replace=False):
            where, step = np.unravel_index(place, parameter.shape), 1e-6
            sides = []
            for sign in (1, -1):
                moved = p | {name: p[name].copy()}
                moved[name][where] += sign * step
                sides.append(math.log(seed_probabilities(images_BCHW[0].numpy(), moved, c)[1]))
            difference = (sides[0] - sides[1]) / (2 * step)
            # Central differences of step h err by h^2 and by rounding over h: 1e-9 at values of order 1.
            assert gradient[where] == pytest.approx(difference, abs=1e-8, rel=1e-7), (name, where)


# ---- recomputation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"norm": "post"}, {"parallel": True, "qk_norm": True}, {"position": "rotary"}])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_no_policy_changes_a_bit_of_a_gradient(more, drop_path):
    c = config(depth=3, **more)
    gradients = []
    for recompute in (0, 1, 2, "selective"):
        model = scrambled(VisionTransformer(c, recompute=recompute, drop_path=[drop_path] * 3)).train()
        torch.manual_seed(5)
        model(images_of(c, batch=4).float()).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert torch.equal(other[name], gradient), name


def test_selective_recomputation_repeats_the_cheap_parts_alone(monkeypatch):
    calls = {"norm": 0, "product": 0}
    layer_norm, linear = F.layer_norm, F.linear

    def counted_norm(*args, **kwargs):
        calls["norm"] += 1
        return layer_norm(*args, **kwargs)

    monkeypatch.setattr(F, "layer_norm", counted_norm)
    for recompute, norms in ((0, 5), ("selective", 9)):  # two blocks and the final norm
        calls["norm"] = 0
        VisionTransformer(config(), recompute=recompute).train()(images_of(config()).float()).sum().backward()
        assert calls["norm"] == norms, recompute
    assert F.linear is linear


# ---- stochastic depth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("parallel", [False, True])
@torch.no_grad()
def test_a_dropped_branch_leaves_the_image_and_a_kept_one_is_scaled_up(norm, parallel):
    c = config(depth=1, norm=norm, parallel=parallel)
    model = scrambled(VisionTransformer(c, drop_path=[0.5]).double())
    block, z = model.blocks[0], torch.randn(4, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = (torch.tensor([0, 2]), torch.tensor([2, 3]))

    def branch(f, x, norm_module):
        return f(x) if norm == "post" else f(norm_module(x))

    def after(x, norm_module):
        return norm_module(x) if norm == "post" else x

    for image in range(4):
        x = z[image : image + 1]
        if parallel:
            both = branch(lambda y: block.attn(y) + block.mlp(y), x, block.norm1)
            expected = after(x + (2 * both if image in (0, 2) else 0), block.norm1)
        else:
            expected = after(x + (2 * branch(block.attn, x, block.norm1) if image in (0, 2) else 0), block.norm1)
            more = 2 * branch(block.mlp, expected, block.norm2) if image in (2, 3) else 0
            expected = after(expected + more, block.norm2)
        torch.testing.assert_close(block(z, None, kept)[image : image + 1], expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_expectation_over_draws_is_the_undropped_branch():
    c = config(depth=1, parallel=True)  # one branch, so that the expectation is exact
    model = scrambled(VisionTransformer(c, drop_path=[0.4]).double())
    images_BCHW = images_of(c, batch=5)
    assert kept_images(5, 0.4) == 3
    torch.manual_seed(0)
    draws = torch.stack([model.train().tokens(images_BCHW) for _ in range(4000)])
    # A mean of n draws deviates by about its spread / sqrt(n): 5 times that is allowed.
    deviation = (draws.mean(0) - model.eval().tokens(images_BCHW)).abs()
    assert (deviation <= 5 * draws.std(0) / math.sqrt(4000) + 1e-12).all()
    assert draws.std(0).max() > 0.1


def test_evaluation_drops_nothing_and_draws_follow_the_seed():
    c = config(depth=2)
    plain, dropping = (scrambled(VisionTransformer(c, drop_path=rates)) for rates in ((), [0.5, 0.5]))
    images_BCHW = images_of(c, batch=8).float()
    assert torch.equal(plain.eval()(images_BCHW), dropping.eval()(images_BCHW))
    outcomes = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outcomes.append(dropping.train()(images_BCHW))
    assert torch.equal(outcomes[0], outcomes[1]) and not torch.equal(outcomes[0], outcomes[2])
    assert not torch.equal(outcomes[0], plain(images_BCHW))


def test_rates_follow_their_rule():
    assert TrainConfig(length=1, drop_path=0.4).drop_rates(3) == (0.4, 0.4, 0.4)
    assert TrainConfig(length=1, drop_path=0.4, drop_path_rule="linear").drop_rates(3) == (0.0, 0.2, 0.4)
    assert [kept_images(batch, 0.4) for batch in (1, 2, 10)] == [1, 1, 6]


@pytest.mark.slow
def test_a_rate_of_0_4_saves_30_percent_of_the_time_of_the_blocks():
    c = ModelConfig(image_size=64, patch_size=8, width=384, depth=4, heads=6, classes=10)
    models = [VisionTransformer(c, drop_path=rates).train() for rates in ((), [0.4] * 4)]
    z_BND = torch.randn(20, 65, 384)
    elapsed_s: list[list[float]] = [[], []]
    for _ in range(9):
        for number, model in enumerate(models):
            started_s = time.perf_counter()
            z = z_BND.clone().requires_grad_()
            kept = model._draw_kept(20, z.device)
            y = z
            for layer, block in enumerate(model.blocks):
                y = block(y, None, kept[layer] if kept else None)
            y.sum().backward()
            elapsed_s[number].append(time.perf_counter() - started_s)
    ratio = float(np.median(elapsed_s[1]) / np.median(elapsed_s[0]))
    print(f"time of the blocks at rate 0.4: {ratio:.3f} of that without")
    assert ratio <= 0.7


# ---- initial values of what the seed does not have -------------------------------------------------------------------


def test_deepnorm_shrinks_values_and_what_follows_them():
    deep, post = (VisionTransformer(config(depth=4, norm=norm, pool="map")) for norm in ("deepnorm", "post"))
    initialise(deep, seed=0)
    initialise(post, seed=0)
    beta = (8 * 4) ** -0.25
    for (name, a), (_, b) in zip(deep.named_parameters(), post.named_parameters(), strict=True):
        factor = torch.ones_like(b)
        if name.startswith("blocks.") and name.endswith(("proj.weight", "fc1.weight", "fc2.weight")):
            factor *= beta
        if name.endswith("qkv.weight"):
            factor[24:] = beta
        torch.testing.assert_close(a, b * factor, rtol=1e-6, atol=0)


def test_tokens_factors_and_queries_start_as_the_table_says():
    c = config(registers=2, layer_scale=0.3, pool="map", qk_norm=True, norm_bias=False, pre_logits_width=5)
    model = VisionTransformer(c)
    initialise(model, seed=0)
    assert torch.equal(model.blocks[0].ls2.gamma, torch.full((12,), 0.3))
    assert 0 < model.reg_token.abs().max() < 1e-5
    assert 0.1 < model.attn_pool.latent.abs().max() <= math.sqrt(6 / 13)
    assert torch.equal(model.blocks[1].attn.k_norm.weight, torch.ones(4))
    assert model.pre_logits.weight.std() > 0.1 and not model.head.weight.any()
