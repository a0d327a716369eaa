"""The maps are the attention the model used."""

import math

import pytest
import torch

from vitscale.insight import attention_maps as module_under_test
from vitscale.insight.attention_maps import attention_maps
from vitscale.model.config import ModelConfig
from vitscale.model.vit import VisionTransformer, initialise

DTYPES = [(torch.float64, 1e-13), (torch.float32, 1e-6)]
"""With the largest error that rounding explains; queries and keys are of order 1."""


def model_of(norm: str, dtype: torch.dtype = torch.float32) -> VisionTransformer:
    config = ModelConfig(image_size=12, patch_size=4, width=24, depth=3, heads=3, classes=5, norm=norm)
    model = VisionTransformer(config)
    initialise(model, seed=0)
    with torch.no_grad():  # not as flat as fresh weights, so that rows differ
        for block in model.blocks:
            block.attn.qkv.bias.normal_(0, 0.8, generator=torch.Generator().manual_seed(1))
    return model.to(dtype)


IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(2))


def eager_maps(model: VisionTransformer, images_BCHW: torch.Tensor) -> list[torch.Tensor]:
    """The map of each layer, from the weights by plain formulas, layer after layer."""
    z = model.patch_embed(images_BCHW)
    z = torch.cat([model.cls_token.expand(len(z), -1, -1), z], dim=1) + model.pos_embed
    results = []
    for block in model.blocks:
        pre = model.config.norm == "pre"
        x = block.norm1(z) if pre else z
        weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
        maps, heads = [], []
        for head in range(3):
            q, k, v = (
                x @ weight[part * 24 + head * 8 : part * 24 + head * 8 + 8].T
                + bias[part * 24 + head * 8 : part * 24 + head * 8 + 8]
                for part in range(3)
            )
            scores = torch.exp(q @ k.mT / math.sqrt(8))
            maps.append(scores / scores.sum(-1, keepdim=True))
            heads.append(maps[-1] @ v)
        results.append(torch.stack(maps, dim=1))
        out = torch.cat(heads, dim=-1) @ block.attn.proj.weight.T + block.attn.proj.bias
        if pre:
            z = z + out
            z = z + block.mlp(block.norm2(z))
        else:
            z = block.norm1(z + out)
            z = block.norm2(z + block.mlp(z))
    return results


@pytest.mark.parametrize(("dtype", "error"), DTYPES)
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("chunk_numbers", [1 << 20, 40])
@torch.no_grad()
def test_maps_equal_an_independent_computation(norm, chunk_numbers, dtype, error, monkeypatch):
    monkeypatch.setattr(module_under_test, "CHUNK_NUMBERS_MAX", chunk_numbers)
    model, images_BCHW = model_of(norm, dtype), IMAGES.to(dtype)
    maps = attention_maps(model, images_BCHW)
    expected = eager_maps(model, images_BCHW)
    assert list(maps) == [0, 1, 2]
    for layer, map_BHNN in enumerate(expected):
        assert maps[layer].shape == (2, 3, 10, 10)
        torch.testing.assert_close(maps[layer], map_BHNN, rtol=0, atol=error)
        torch.testing.assert_close(maps[layer].sum(-1), torch.ones(2, 3, 10, dtype=dtype), rtol=0, atol=error)
        assert map_BHNN.max() > 0.3, "the example must not be uniform"


@pytest.mark.parametrize(("dtype", "error"), DTYPES)
@pytest.mark.parametrize("norm", ["pre", "post"])
@torch.no_grad()
def test_the_kernel_of_the_model_weighs_values_by_these_maps(norm, dtype, error):
    model, outputs = model_of(norm, dtype), []
    maps = attention_maps(model, IMAGES.to(dtype))
    for block in model.blocks:  # what enters W_O is what the kernel gave
        block.attn.proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0]))
        block.attn.register_forward_pre_hook(lambda module, inputs: outputs.append(module.queries_keys_values(inputs[0])[2]))
    model(IMAGES.to(dtype))
    for layer in range(3):
        v_BHNK, kernel_BND = outputs[2 * layer], outputs[2 * layer + 1]
        weighed_BND = (maps[layer] @ v_BHNK).transpose(1, 2).flatten(2)
        torch.testing.assert_close(weighed_BND, kernel_BND, rtol=0, atol=5 * error)  # values are of order 5


def test_looking_leaves_the_model_as_it_was():
    model = model_of("pre").train()
    before = model(IMAGES)
    maps = attention_maps(model, IMAGES, layers=[2, 0])
    assert sorted(maps) == [0, 2] and model.training
    assert all(block.attn.watch is None for block in model.blocks)
    assert torch.equal(model(IMAGES), before)
    with pytest.raises(ValueError, match="no layer 3 in a model of depth 3"):
        attention_maps(model, IMAGES, layers=[3])


def test_bfloat16_maps_are_float32_and_sum_to_one():
    model = model_of("pre", torch.bfloat16)
    for map_BHNN in attention_maps(model, IMAGES.bfloat16()).values():
        assert map_BHNN.dtype == torch.float32
        torch.testing.assert_close(map_BHNN.sum(-1), torch.ones(2, 3, 10), rtol=0, atol=1e-6)


def test_one_head_of_one_layer_is_a_slice_of_all():
    model = model_of("pre")
    one = attention_maps(model, IMAGES, layers=[1], heads=[2])
    assert list(one) == [1] and torch.equal(one[1], attention_maps(model, IMAGES)[1][:, 2:])
    with pytest.raises(ValueError, match="no head 3 in a model with 3 heads"):
        attention_maps(model, IMAGES, heads=[3])
