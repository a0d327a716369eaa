"""Closed forms equal what the module has and what torch counts."""

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitscale.model.config import ModelConfig
from vitscale.model.flops import forward_flops, parameter_shapes, parameters, train_flops
from vitscale.model.vit import VisionTransformer

CONFIGS = [
    ModelConfig(image_size=size, patch_size=4, width=12, depth=depth, heads=3, classes=classes, **more)
    for size, depth, classes, more in [
        (8, 1, 1, {}),
        (16, 3, 10, {"norm": "post"}),
        (8, 2, 7, {"norm": "post", "projection_bias": False, "position": "sinusoidal"}),
        (12, 2, 3, {"projection_bias": False, "mlp_width": 5}),
        (8, 2, 3, {"activation": "swiglu", "mlp_width": 7, "registers": 2, "layer_scale": 0.1, "position": "rotary"}),
        (8, 2, 3, {"parallel": True, "qk_norm": True, "qkv_bias": False, "norm_kind": "rmsnorm", "pool": "average"}),
        (8, 2, 3, {"pool": "map", "class_token": False, "activation": "swiglu", "norm_bias": False}),
        (8, 2, 3, {"norm": "deepnorm", "pre_logits_width": 6, "prefix_positions": False, "position": "sincos2d_mae"}),
        (8, 2, 3, {"channels": 1, "pixel_mean": (0.5,), "pixel_std": (0.5,), "position": "sinusoidal"}),
    ]
]

# Published: millions of parameters and forward GFLOP of the 1000-class models at 224 pixels (ViT, DeiT; timm's tables).
PUBLISHED = [
    ("Ti/16", 192, 12, 3, 5.72, 2.51),
    ("S/16", 384, 12, 6, 22.05, 9.20),
    ("B/16", 768, 12, 12, 86.57, 35.13),
    ("L/16", 1024, 24, 16, 304.33, 123.1),
]


def vit(width: int, depth: int, heads: int) -> ModelConfig:
    return ModelConfig(image_size=224, patch_size=16, width=width, depth=depth, heads=heads, classes=1000)


@pytest.mark.parametrize("config", CONFIGS)
def test_shapes_are_those_of_the_module_in_its_order(config):
    module = {name: tuple(parameter.shape) for name, parameter in VisionTransformer(config).named_parameters()}
    assert list(parameter_shapes(config).items()) == list(module.items())
    assert parameters(config) == sum(parameter.numel() for parameter in VisionTransformer(config).parameters())


@pytest.mark.parametrize(("name", "width", "depth", "heads", "millions", "gflop"), PUBLISHED)
def test_published_models_have_their_published_size_and_cost(name, width, depth, heads, millions, gflop):
    config = vit(width, depth, heads)
    with torch.device("meta"):
        module = VisionTransformer(config)
    assert parameters(config) == sum(parameter.numel() for parameter in module.parameters())
    assert round(parameters(config) / 1e6, 2) == millions
    assert forward_flops(config) / 1e9 == pytest.approx(gflop, abs=0.05 if gflop > 100 else 0.005)


@pytest.mark.parametrize("config", [*CONFIGS, vit(192, 12, 3), vit(384, 12, 6)])
def test_forward_flops_are_what_torch_counts(config):
    with torch.device("meta"):
        model = VisionTransformer(config).eval().requires_grad_(False)  # the counter cannot follow views of parameters
        images = torch.empty(2, config.channels, config.image_size, config.image_size)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    assert counter.get_total_flops() == 2 * forward_flops(config)  # every product, no tolerance needed
    assert train_flops(config) == 3 * forward_flops(config)


def test_flops_need_no_torch():
    code = "import sys, vitscale.model.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
