"""Predicted bytes are what a forward pass leaves allocated; predicted recomputation is what torch counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from vitscale.model.config import ModelConfig
from vitscale.model.flops import forward_flops, recomputed_flops, train_flops
from vitscale.model.vit import VisionTransformer, initialise
from vitscale.planning.activations import saved_bytes

BATCH = 4
VARIANTS = [
    {},
    {"norm": "post"},
    {"norm": "deepnorm"},
    {"norm": "respost"},
    {"parallel": True},
    {"parallel": True, "norm": "post"},
    {"qk_norm": True},
    {"position": "rotary", "registers": 4},
    {"activation": "swiglu", "mlp_width": 512},
    {"layer_scale": 0.1},
    {"norm_kind": "rmsnorm"},
    {"pool": "average", "class_token": False},
    {"pool": "average", "class_token": False, "pool_norm": "after"},
    {"pool": "map", "class_token": False, "qkv_bias": False},
]


def config(**more) -> ModelConfig:
    return ModelConfig(**({"image_size": 64, "patch_size": 8, "width": 192, "depth": 4, "heads": 3, "classes": 100} | more))


def left_allocated(model: VisionTransformer, images_BCHW: torch.Tensor) -> int:
    """Bytes that the forward pass allocates and does not free, by torch's own account of every allocation."""
    model(images_BCHW)  # tables that are kept for ever
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as account:
        logits = model(images_BCHW)
    assert logits.requires_grad
    return sum(event.nbytes() for event in account.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize("more", VARIANTS)
@pytest.mark.parametrize("recompute", [0, 1, 2, "selective"])
def test_predicted_bytes_are_those_left_allocated(more, recompute):
    c = config(**more)
    model = VisionTransformer(c, recompute=recompute).train()
    measured = left_allocated(model, torch.randn(BATCH, 3, 64, 64)) / BATCH
    # 5 %: a state of the generator per recomputed block (5 kB) is not counted.
    assert saved_bytes(c, recompute, element_bytes=4) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("more", [{}, {"norm": "post"}, {"parallel": True}, {"activation": "swiglu", "mlp_width": 512}])
@pytest.mark.parametrize("recompute", [0, 1, 2, "selective"])
def test_dropout_keeps_a_byte_per_element(more, recompute):
    c = config(**more)
    model = VisionTransformer(c, recompute=recompute, dropout=0.1).train()
    measured = left_allocated(model, torch.randn(BATCH, 3, 64, 64)) / BATCH
    assert saved_bytes(c, recompute, element_bytes=4, dropout=0.1) == pytest.approx(measured, rel=0.05)


def test_policies_keep_what_their_names_say():
    none, selective, every_other, all_blocks = (saved_bytes(config(), r, element_bytes=2) for r in (0, "selective", 2, 1))
    assert none > selective > every_other > all_blocks


@pytest.mark.parametrize(
    "more", [{}, {"norm": "post"}, {"norm": "respost"}, {"parallel": True}, {"layer_scale": 0.1}, {"activation": "swiglu"}]
)
@pytest.mark.parametrize("recompute", [0, 1, 3, "selective"])
def test_recomputed_operations_are_those_torch_counts(more, recompute):
    c = config(**more)
    model = VisionTransformer(c, recompute=recompute).train()
    initialise(model, seed=0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 64, 64)).sum().backward()
    patches = 2 * c.patches * 3 * c.patch_size**2 * c.width  # images need no gradient
    assert counter.get_total_flops() == train_flops(c) - patches + recomputed_flops(c, recompute)


def test_stochastic_depth_saves_the_operations_of_the_dropped_images():
    c = config()
    model = VisionTransformer(c, drop_path=[0.5] * 4).train()
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(4, 3, 64, 64))
    assert counter.get_total_flops() == 4 * forward_flops(c, kept=0.5)
