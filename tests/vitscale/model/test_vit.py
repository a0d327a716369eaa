"""The model: values equal the seed's formulas; recomputation, dtype and initialisation follow their contracts."""

import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vitscale.model.config import ModelConfig
from vitscale.model.flops import parameter_shapes
from vitscale.model.vit import VisionTransformer, decays, initialise


def config(**changes) -> ModelConfig:
    base = {"image_size": 8, "patch_size": 4, "width": 12, "depth": 2, "heads": 3, "classes": 5}
    return ModelConfig(**(base | changes))


def scrambled(model: VisionTransformer, seed: int = 0) -> VisionTransformer:
    """Every parameter away from zero and one, so that no term of a formula can hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shift = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            scale = 0.3 if parameter.ndim == 1 else 1.5 / math.sqrt(parameter.shape[-1])
            parameter.copy_(shift + scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def images_of(model_config: ModelConfig, batch: int = 3, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = model_config.image_size
    return torch.randn(batch, model_config.channels, size, size, generator=generator, dtype=torch.float64)


# ---- the seed mathematics in numpy: one image, one patch, one head, one token at a time ------------------------------


def seed_layer_norm(x: np.ndarray, gain: np.ndarray, shift: np.ndarray, eps: float) -> np.ndarray:
    rows = []
    for row in x:
        mean = sum(row) / len(row)
        variance = sum((row - mean) ** 2) / len(row)
        rows.append((row - mean) / math.sqrt(variance + eps) * gain + shift)
    return np.stack(rows)


def seed_softmax(row: np.ndarray) -> np.ndarray:
    e = np.exp(row - row.max())
    return e / e.sum()


def seed_gelu(x: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda value: value * 0.5 * (1 + math.erf(value / math.sqrt(2))))(x)


def seed_positions(tokens: int, width: int) -> np.ndarray:
    table = np.zeros((tokens, width))
    for position in range(tokens):
        for i in range(0, width, 2):
            angle = position / 10000 ** (i / width)
            table[position, i] = math.sin(angle)
            if i + 1 < width:
                table[position, i + 1] = math.cos(angle)
    return table


def seed_attention(z: np.ndarray, p: dict[str, np.ndarray], layer: int, c: ModelConfig) -> np.ndarray:
    D, d = c.width, c.width // c.heads
    qkv, qkv_bias = p[f"blocks.{layer}.attn.qkv.weight"], p.get(f"blocks.{layer}.attn.qkv.bias", np.zeros(3 * D))
    heads = []
    for h in range(c.heads):
        q, k, v = (
            z @ qkv[part * D + h * d : part * D + (h + 1) * d].T + qkv_bias[part * D + h * d : part * D + (h + 1) * d]
            for part in range(3)
        )
        weights = np.stack([seed_softmax(row) for row in q @ k.T / math.sqrt(d)])
        heads.append(weights @ v)
    out = np.concatenate(heads, axis=1) @ p[f"blocks.{layer}.attn.proj.weight"].T
    return out + p.get(f"blocks.{layer}.attn.proj.bias", 0.0)


def seed_probabilities(image_CHW: np.ndarray, p: dict[str, np.ndarray], c: ModelConfig) -> np.ndarray:
    side, P = c.image_size // c.patch_size, c.patch_size
    rows = [p["cls_token"][0, 0]]
    for i in range(side):
        for j in range(side):
            patch = image_CHW[:, i * P : (i + 1) * P, j * P : (j + 1) * P].flatten()
            rows.append(patch @ p["patch_embed.proj.weight"].T + p.get("patch_embed.proj.bias", 0.0))
    z = np.stack(rows)
    z = z + (p["pos_embed"][0] if c.position == "learned" else seed_positions(len(rows), c.width))

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return seed_layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"], c.norm_eps)

    def feed_forward(x: np.ndarray, layer: int) -> np.ndarray:
        name = f"blocks.{layer}.mlp"
        hidden = seed_gelu(x @ p[f"{name}.fc1.weight"].T + p[f"{name}.fc1.bias"])
        return hidden @ p[f"{name}.fc2.weight"].T + p[f"{name}.fc2.bias"]

    for layer in range(c.depth):
        norm1, norm2 = f"blocks.{layer}.norm1", f"blocks.{layer}.norm2"
        if c.norm == "post":
            z = norm(z + seed_attention(z, p, layer, c), norm1)
            z = norm(z + feed_forward(z, layer), norm2)
        else:
            z = z + seed_attention(norm(z, norm1), p, layer, c)
            z = z + feed_forward(norm(z, norm2), layer)
    if c.norm == "pre":
        z = norm(z, "norm")
    return seed_softmax(z[0] @ p["head.weight"].T + p["head.bias"])


SHAPES = [
    {},
    {"depth": 1, "heads": 1},
    {"depth": 5, "image_size": 12, "width": 24, "heads": 4},
    {"image_size": 6, "patch_size": 2, "width": 9, "channels": 1, "pixel_mean": (0.5,), "pixel_std": (0.5,)},
    {"mlp_width": 7, "classes": 1, "norm_eps": 1e-5},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
@pytest.mark.parametrize(("norm", "projection_bias"), [("post", False), ("post", True), ("pre", True), ("pre", False)])
def test_probabilities_equal_the_seed_formulas(shape, position, norm, projection_bias):
    c = config(**shape, position=position, norm=norm, projection_bias=projection_bias)
    model = scrambled(VisionTransformer(c).double())
    parameters = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    images_BCHW = images_of(c)
    expected = np.stack([seed_probabilities(image, parameters, c) for image in images_BCHW.numpy()])
    assert c.classes == 1 or np.ptp(expected, axis=0).max() > 1e-3, "the example must tell images apart"
    with torch.no_grad():
        got = model.predict_proba(images_BCHW).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13)


def test_the_seed_form_has_exactly_the_parameters_of_the_seed():
    names = set(parameter_shapes(config(norm="post", projection_bias=False, depth=1)))
    assert names == {
        *("cls_token", "pos_embed", "patch_embed.proj.weight", "head.weight", "head.bias"),
        *(f"blocks.0.norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
        *("blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight"),
        *(f"blocks.0.mlp.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
    }


# ---- recomputation, dtype, refusal -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "layers_twice"), [(1, [0, 1, 2]), (2, [0, 2]), (3, [0])])
def test_recomputation_changes_no_bit_and_runs_the_named_blocks_twice(every, layers_twice):
    c = config(depth=3, norm="pre")
    images_BCHW, labels_B = images_of(c).float(), torch.tensor([0, 1, 2])
    gradients, calls = [], []
    for recompute_every in (0, every):
        model = scrambled(VisionTransformer(c, recompute=recompute_every))
        counts = dict.fromkeys(range(3), 0)
        for layer, block in enumerate(model.blocks):
            block.attn.register_forward_pre_hook(
                lambda *_, layer=layer, counts=counts: counts.update({layer: counts[layer] + 1})
            )
        F.cross_entropy(model(images_BCHW), labels_B).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        calls.append(counts)
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name
    assert calls == [dict.fromkeys(range(3), 1), {layer: 1 + (layer in layers_twice) for layer in range(3)}]


def test_evaluation_recomputes_nothing():
    model = VisionTransformer(config(), recompute=1).eval()
    calls = []
    model.blocks[0].attn.register_forward_pre_hook(lambda *_: calls.append(1))
    model(images_of(config()).float()).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.08)])
def test_every_dtype_gives_the_float64_probabilities_within_its_precision(norm, position, dtype, error):
    c = config(norm=norm, position=position)
    images_BCHW = images_of(c)
    exact = scrambled(VisionTransformer(c).double()).predict_proba(images_BCHW)
    model = scrambled(VisionTransformer(c))
    for parameter in model.parameters():  # as DeepSpeed does: parameters are cast, buffers are not
        parameter.data = parameter.data.to(dtype)
    assert model(images_BCHW.to(dtype)).dtype == dtype
    assert (model.predict_proba(images_BCHW.to(dtype)) - exact).abs().max() < error


def test_images_that_patches_do_not_tile_are_refused_in_words():
    for shape in [(2, 3, 12, 10), (2, 1, 8, 8), (3, 8, 8)]:
        with pytest.raises(ValueError, match=r"\(batch, 3, height, width\) with sides that are multiples of 4, got"):
            VisionTransformer(config())(torch.zeros(shape))


# ---- initialisation and roles ----------------------------------------------------------------------------------------

WIDE = config(image_size=64, patch_size=8, width=192, depth=2, mlp_width=500, classes=30)


def spread_of(name: str, D: int = 192, M: int = 500, patch: int = 3 * 8 * 8) -> tuple[float, float, float]:
    """Mean, standard deviation and largest magnitude by the table in the docstring of `initialise`."""
    last = name.split(".")[-2:]
    xavier = {"fc1": math.sqrt(6 / (D + M)), "fc2": math.sqrt(6 / (D + M))}
    if name == "pos_embed":
        return 0, 0.02, 0.02 * 6
    if name == "patch_embed.proj.weight":
        return 0, 1 / math.sqrt(patch), 2 / math.sqrt(patch) / 0.8796
    if last[0].startswith("norm"):
        return float(last[1] == "weight"), 0, float(last[1] == "weight")
    if last in (["fc1", "bias"], ["fc2", "bias"]):
        return 0, 1e-6, 6e-6
    if last[1:] == ["weight"] and last[0] != "head":
        bound = xavier.get(last[0], math.sqrt(6 / (2 * D)))
        return 0, bound / math.sqrt(3), bound
    return 0, 0, 0


def test_initial_values_have_the_spread_the_table_says():
    model = VisionTransformer(WIDE)
    initialise(model, seed=0)
    for name, parameter in model.named_parameters():
        mean, std, largest = spread_of(name)
        values, n = parameter.double(), parameter.numel()
        assert abs(values.mean() - mean) <= 5 * std / math.sqrt(n), name
        assert abs(values.std(correction=0) - std) <= 5 * std / math.sqrt(n), name  # 5 sigma of a normal sample is less
        assert values.abs().max() <= largest * (1 + 1e-6), name
        if "weight" in name and std:
            assert values.abs().max() > 0.95 * largest, f"{name}: the whole range must be used"
    q, k, v = model.blocks[0].attn.qkv.weight.chunk(3)
    assert not torch.equal(q, k) and not torch.equal(k, v)


def test_fresh_models_give_every_class_the_same_probability():
    for norm in ("pre", "post"):
        model = VisionTransformer(config(norm=norm))
        initialise(model, seed=3)
        assert torch.allclose(model.predict_proba(images_of(config()).float()), torch.full((3, 5), 0.2), atol=1e-7)


def test_initial_values_are_a_function_of_seed_name_and_shape():
    torch.manual_seed(0)
    state_before = torch.get_rng_state()
    deep, shallow = VisionTransformer(config(depth=3)), VisionTransformer(config(depth=1, norm="post", projection_bias=False))
    torch.set_rng_state(state_before)
    initialise(deep, seed=7)
    initialise(shallow, seed=7)
    assert torch.equal(torch.get_rng_state(), state_before), "the global generator must not move"
    values = dict(deep.named_parameters())
    for name, parameter in shallow.named_parameters():
        assert torch.equal(parameter, values[name]), name
    assert not torch.equal(values["blocks.0.mlp.fc1.weight"], values["blocks.1.mlp.fc1.weight"])
    double = VisionTransformer(config(depth=3)).double()
    initialise(double, seed=7)
    assert all(torch.equal(parameter.float(), values[name]) for name, parameter in double.named_parameters())
    initialise(shallow, seed=8)
    assert not torch.equal(shallow.pos_embed, values["pos_embed"])


def initial_values_with(threads: int) -> dict[str, np.ndarray]:
    torch.set_num_threads(threads)
    model = VisionTransformer(WIDE)
    initialise(model, seed=0)
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def test_thread_count_does_not_change_initial_values():
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as other_process:
        of_three = other_process.submit(initial_values_with, 3).result(timeout=60)
    for name, value in initial_values_with(1).items():
        assert np.array_equal(value, of_three[name]), name


def test_weight_decay_applies_to_matrices_only():
    decayed = [name for name, parameter in VisionTransformer(config(depth=1)).named_parameters() if decays(name, parameter)]
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert decayed == ["patch_embed.proj.weight", *(f"blocks.0.{name}.weight" for name in block), "head.weight"]


def test_only_parameters_are_in_the_state():
    model = VisionTransformer(config(position="sinusoidal"))
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
    assert all(parameter.numel() for parameter in model.parameters())
