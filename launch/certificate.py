"""Proof of an export: the same batch through our model and through the library the file is for, where it is installed."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launch.peers import mend_torchvision
from vitscale.model.vit import VisionTransformer
from vitscale.weights.foreign import read_npz
from vitscale.weights.native import Weights

IMAGES = 8
LIBRARIES = {"timm": "timm", "huggingface": "transformers", "npz": "timm"}
"""By format. Nothing of JAX is needed to prove an npz: timm reads both schemes by a loader of its own."""


def fixed_images(weights: Weights) -> Tensor:
    """A batch of seeded noise of the model's own resolution: BCHW."""
    generator = torch.Generator().manual_seed(0)
    size = weights.model.image_size
    return torch.randn(IMAGES, weights.model.channels, size, size, generator=generator)


@torch.no_grad()
def our_logits(weights: Weights) -> Tensor:
    """Logits of our model for the fixed batch, in the type of the weights."""
    model = VisionTransformer(weights.model)
    model.load_state_dict(weights.tensors)
    return model.eval()(fixed_images(weights))


@torch.no_grad()
def their_logits(path: Path, format_name: str, weights: Weights) -> Tensor:
    """Logits of the library's own model, made from the written file by the library's own loader.

    Raises ModuleNotFoundError where the library is not installed.
    """
    mend_torchvision()  # both libraries import it
    if format_name == "huggingface":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import ViTForImageClassification  # late: heavy, and only there for this proof

        model: nn.Module = ViTForImageClassification.from_pretrained(path)
        return model.eval()(fixed_images(weights), interpolate_pos_encoding=False).logits
    import timm  # late: as above

    if format_name == "timm":
        model = timm.create_model(f"local-dir:{path}", pretrained=True)
    else:
        has_prefix_rows = "pos_embedding" not in read_npz(path)
        model = timm.create_model("vit_base_patch16_224", no_embed_class=not has_prefix_rows, **_timm_arguments(weights))
        model.load_pretrained(str(path))  # type: ignore[operator]  # a method, which mypy takes for a tensor
    return model.eval()(fixed_images(weights))


def _timm_arguments(weights: Weights) -> dict[str, Any]:
    model = weights.model
    return {
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "in_chans": model.channels,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.heads,
        "mlp_ratio": model.feedforward_width / model.width,
        "num_classes": model.classes,
        "class_token": model.class_token,
        "global_pool": {"class": "token", "average": "avg", "map": "map"}[model.pool],
        "fc_norm": False,
        "act_layer": "gelu_tanh" if model.activation == "gelu_tanh" else None,
    }


def sentence(path: Path, format_name: str, weights: Weights) -> str:
    """What the comparison shows, or why there is none."""
    library = LIBRARIES[format_name]
    if format_name == "npz" and (weights.model.pre_logits_width is not None or weights.model.position == "sincos2d_bv"):
        return "certificate: timm reads neither a pre-logits layer nor fixed positions, so it was not asked about this npz"
    try:
        theirs = their_logits(path, format_name, weights)
    except ModuleNotFoundError as error:
        return f"certificate: {error.name or library} is not installed, so logits were not compared with {library}"
    ours = our_logits(weights)
    largest = ours.abs().max().item()
    difference = (theirs - ours).abs().max().item()
    return (
        f"certificate: logits of {IMAGES} fixed images in {library} differ from ours by at most {difference:.2g}, "
        f"{difference / largest:.2g} of the largest"
    )
