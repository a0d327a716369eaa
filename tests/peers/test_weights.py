"""Our model and theirs give the same logits from the same weights, whichever way these went."""

import pytest
import torch
from torch import nn

from launch.certificate import our_logits, sentence, their_logits
from launch.export import write
from tests.helpers.peers import peer
from vitscale.model.config import ModelConfig
from vitscale.model.flops import parameter_shapes
from vitscale.weights.foreign import load_any, save_directory
from vitscale.weights.mapping import Foreign
from vitscale.weights.native import Weights
from vitscale.weights.timm import from_timm

# The same operations in another order, in float32: 1e-5 of the largest logit is allowed, about 1e-6 is seen.
TOLERANCE = 1e-5


def scramble(shape: tuple[int, ...], generator: torch.Generator, name: str) -> torch.Tensor:
    """Away from zero and one, and of a size that keeps activations of order 1."""
    shift = 1.0 if "norm" in name and name.endswith("weight") else 0.0
    scale = 0.3 if len(shape) == 1 else 1 / shape[-1] ** 0.5 if len(shape) == 2 else 0.1
    return shift + scale * torch.randn(shape, generator=generator)


def weights_of(model: ModelConfig, **meta: str) -> Weights:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: scramble(shape, generator, name) for name, shape in parameter_shapes(model).items()}
    return Weights(model=model, tensors=tensors, meta=meta)


def close(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    largest, difference = ours.abs().max().item(), (theirs - ours).abs().max().item()
    assert (ours[0] - ours[1]).abs().max() > 1e-3 * largest, "the example must tell images apart"
    assert difference <= TOLERANCE * largest
    return difference / largest


# ---- timm ------------------------------------------------------------------------------------------------------------

TIMM = [
    ("vit_tiny_patch16_224", {}),
    ("vit_small_patch16_224", {"depth": 2}),
    ("vit_base_patch16_224", {"depth": 2}),
    ("vit_base_patch16_reg4_gap_256", {"depth": 2}),
    ("vit_so400m_patch14_siglip_224", {"depth": 1, "num_classes": 10}),
    ("vit_small_patch16_224", {"depth": 2, "qk_norm": True}),
    ("deit3_small_patch16_224", {"depth": 2}),
    ("vit_large_patch16_224", {"depth": 1}),
]
FULL = [
    ("vit_small_patch16_224", {}),
    ("vit_base_patch16_224", {}),
    ("vit_large_patch16_224", {}),
    ("vit_base_patch16_reg4_gap_256", {}),
    ("vit_so400m_patch14_siglip_224", {"num_classes": 1000}),
    ("vit_base_patch16_224", {"qk_norm": True}),
    ("deit3_base_patch16_224", {}),
]


@torch.no_grad()
def there_and_back(name: str, more: dict, place) -> None:
    """timm's model to ours, and the same weights from ours to a model timm makes of the written directory."""
    timm = peer("timm")
    model = timm.create_model(name, **more)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        parameter.copy_(scramble(tuple(parameter.shape), generator, key.replace("fc_norm", "norm")))
    description = {"architecture": name, "num_classes": model.num_classes, "global_pool": model.global_pool, "model_args": more}
    save_directory(place / "timm", Foreign(format="timm", tensors=dict(model.state_dict()), description=description, rows=()))
    weights = load_any(place / "timm")
    ours = our_logits(weights)
    in_there = model.eval()(fixed(weights))
    write(place / "back", weights, "timm", None)
    print(
        f"{name} {more}: in {close(in_there, ours):.2g}, out {close(their_logits(place / 'back', 'timm', weights), ours):.2g}"
    )


def fixed(weights: Weights) -> torch.Tensor:
    from launch.certificate import fixed_images

    return fixed_images(weights)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), TIMM)
def test_timm_both_ways(name, more, tmp_path):
    there_and_back(name, more, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), FULL)
def test_timm_both_ways_at_full_size(name, more, tmp_path):
    there_and_back(name, more, tmp_path)


def test_a_timm_model_that_is_no_plain_vit_is_refused():
    from vitscale.base.errors import UsageError

    with pytest.raises(UsageError, match="clip"):
        from_timm({}, {"architecture": "vit_base_patch16_clip_224"})


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def hugging_face_model(**more) -> tuple[nn.Module, dict]:
    transformers = peer("transformers")
    config = transformers.ViTConfig(num_labels=10, **more)
    model = transformers.ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(scramble(tuple(parameter.shape), generator, key.replace("layer_norm", "norm")))
    return model.eval(), config.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 100, "image_size": 64},
        {"num_hidden_layers": 1, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    ],
)
@torch.no_grad()
def test_hugging_face_both_ways_in_both_namings(more, tmp_path):
    model, _ = hugging_face_model(**more)
    model.save_pretrained(tmp_path / "theirs")
    weights = load_any(tmp_path / "theirs")
    ours = our_logits(weights)
    in_there = close(model(fixed(weights)).logits, ours)
    for naming in ("current", "older"):
        write(tmp_path / naming, weights, "huggingface", naming)
        out = close(their_logits(tmp_path / naming, "huggingface", weights), ours)
        again = load_any(tmp_path / naming)
        assert again.model == weights.model and all(torch.equal(again.tensors[n], t) for n, t in weights.tensors.items())
        print(f"{more} {naming}: in {in_there:.2g}, out {out:.2g}")


# ---- npz, through timm's own loader ----------------------------------------------------------------------------------

SMALL = {"image_size": 32, "patch_size": 8, "width": 96, "depth": 2, "heads": 3, "classes": 7, "activation": "gelu_tanh"}


@pytest.mark.parametrize(
    ("scheme", "more"),
    [
        ("vision_transformer", {}),
        ("big_vision", {"prefix_positions": False}),
        ("big_vision", {"class_token": False, "prefix_positions": False, "pool": "average"}),
        ("big_vision", {"class_token": False, "prefix_positions": False, "pool": "map"}),
        ("big_vision", {}),  # folds the class token's position
        ("vision_transformer", {"position": "sincos2d_mae", "activation": "gelu_tanh"}),
    ],
)
def test_timm_loads_our_npz_by_its_own_loader(scheme, more, tmp_path):
    peer("timm")
    weights = weights_of(ModelConfig(**(SMALL | more)))
    write(tmp_path / "w.npz", weights, "npz", scheme)
    ours = our_logits(weights)
    print(f"{scheme} {more}: {close(their_logits(tmp_path / 'w.npz', 'npz', weights), ours):.2g}")
    assert "in timm differ from ours by at most" in sentence(tmp_path / "w.npz", "npz", weights)
