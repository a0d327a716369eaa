"""The sizes of the literature have their published numbers."""

import pytest
import torch

from vitscale.base.errors import UsageError
from vitscale.config import apply_overrides
from vitscale.model.config import ModelConfig
from vitscale.model.flops import forward_flops, parameters
from vitscale.model.presets import SIZES, preset, preset_names
from vitscale.model.vit import VisionTransformer
from vitscale.recipes.demo import digits

# Millions of parameters and forward GFLOP at 224 pixels with 1000 classes, class token and learned positions: the published
# counts (vision_transformer, big_vision, timm's tables) where there are any. 22B: 21,743 in the paper, without the head.
TABLE = """
Ti/16      5.72    2.51
S/32       22.88   2.29
S/16       22.05   9.20
M/16       38.84   15.98
B/32       88.22   8.82
B/16       86.57   35.13
B/8        86.58   156.3
L/32       306.54  30.75
L/16       304.33  123.1
L/14       304.20  162.0
So400m/14  413.6   219.9
H/14       632.05  334.6
g/14       1012.6  534.1
g-opt/16   1136.3  456.2
G/14       1844.4  967.5
G-opt/16   1665.0  666.3
e/14       3807    1981
22B/14     21750   11212
"""
ROWS = [(name, float(millions), float(gflop)) for name, millions, gflop in (row.split() for row in TABLE.split("\n") if row)]


def model_of(name: str) -> ModelConfig:
    pool = {"pool": "average", "class_token": False} if name.startswith("22B") else {}
    return ModelConfig(image_size=224, classes=1000, **pool, **preset(name))


@pytest.mark.parametrize(("name", "millions", "gflop"), ROWS)
def test_published_sizes_and_costs(name, millions, gflop):
    config = model_of(name)
    with torch.device("meta"):
        module = VisionTransformer(config)
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters(config)
    assert parameters(config) / 1e6 == pytest.approx(millions, rel=1e-3)
    assert forward_flops(config) / 1e9 == pytest.approx(gflop, rel=1e-2)


def test_the_table_has_every_size():
    assert {name.partition("/")[0] for name, _, _ in ROWS} == set(SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("name", preset_names())
def test_every_name_builds_without_memory(name):
    settings = preset(name)
    config = ModelConfig(image_size=settings["patch_size"] * 16, classes=10, **settings)
    with torch.device("meta"):
        assert VisionTransformer(config)(torch.empty(1, 3, config.image_size, config.image_size)).shape == (1, 10)
    if name.endswith("-gpu"):
        plain = preset(name.removesuffix("-gpu"))
        assert config.head_width in (64, 128) and config.feedforward_width % 128 == 0
        assert (settings["width"], settings["depth"]) == (plain["width"], plain["depth"])
        assert 0 <= settings["mlp_width"] - plain["mlp_width"] < 128


def test_a_preset_is_an_override_and_what_follows_it_wins():
    model = apply_overrides(digits(), ["model.preset=22B/14", "model.image_size=28", "model.depth=2"]).model
    assert (model.width, model.heads, model.depth, model.patch_size) == (6144, 48, 2, 14)
    assert model.parallel and model.qk_norm and not model.qkv_bias and model.classes == 10
    with pytest.raises(UsageError, match=r"model.preset: expected SIZE/PATCH.*got 'So40m/14'; did you mean 'So400m/14'"):
        apply_overrides(digits(), ["model.preset=So40m/14"])
    with pytest.raises(UsageError, match="got 'L/15'"):
        apply_overrides(digits(), ["model.preset=L/15"])
