"""To and from the names of Hugging Face's ViTForImageClassification, with the config.json beside them.

naming   block i                  inside
current  vit.layers.i             attention.{q,k,v,o}_proj, mlp.fc1, mlp.fc2                            (transformers 5)
older    vit.encoder.layer.i      attention.attention.{query,key,value}, attention.output.dense,
                                    intermediate.dense, output.dense
"""

import json
from typing import Any

import torch
from torch import Tensor

from vitscale.base.errors import UsageError
from vitscale.model.config import ModelConfig
from vitscale.weights.mapping import Foreign, Row, checked, grid_of, learned_table, refuse_unless, taken
from vitscale.weights.native import Weights

BLOCKS = {"current": "vit.layers", "older": "vit.encoder.layer"}
QKV = {
    "current": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "older": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
}
INSIDE = {
    "current": {"attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
    "older": {"attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"},
}
NORMS = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
OUTSIDE = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
    "norm.weight": "vit.layernorm.weight",
    "norm.bias": "vit.layernorm.bias",
    "head.weight": "classifier.weight",
    "head.bias": "classifier.bias",
}
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def to_huggingface(weights: Weights, *, naming: str = "current") -> Foreign:
    """Raises UsageError naming what ViTForImageClassification cannot hold."""
    model = weights.model
    refuse_unless(
        "huggingface",
        model,
        norm=("pre",),
        norm_kind=("layernorm",),
        norm_bias=(True,),
        projection_bias=(True,),
        qk_norm=(False,),
        parallel=(False,),
        activation=tuple(ACTIVATIONS),
        layer_scale=(None,),
        class_token=(True,),
        registers=(0,),
        position=("learned", "sinusoidal", "sincos2d_bv", "sincos2d_mae"),
        pool=("class",),
        pre_logits_width=(None,),
    )
    table, prefix_rows, folds = learned_table(weights)
    if not prefix_rows:
        table = torch.cat([torch.zeros_like(weights.tensors["cls_token"]), table], dim=1)
        folds += ("the positions get a row of zeros for the class token",)
    ours = weights.tensors | {"pos_embed": table}
    P = model.patch_size
    ours["patch_embed.proj.weight"] = ours["patch_embed.proj.weight"].reshape(model.width, model.channels, P, P)
    tensors: dict[str, Tensor] = {}
    rows = []
    for row in _rows(naming, model.depth, model.qkv_bias):
        parts = ours[row.ours].chunk(len(row.theirs)) if len(row.theirs) > 1 else (ours[row.ours],)
        tensors |= {name: part.contiguous().clone() for name, part in zip(row.theirs, parts, strict=True)}
        rows.append(row)
    names = weights.classes or tuple(f"LABEL_{i}" for i in range(model.classes))
    description: dict[str, Any] = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": model.feedforward_width,
        "hidden_act": ACTIVATIONS[model.activation],
        "layer_norm_eps": model.norm_eps,
        "image_size": model.image_size,
        "patch_size": P,
        "num_channels": model.channels,
        "qkv_bias": model.qkv_bias,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    return Foreign(format="huggingface", tensors=tensors, description=description, rows=tuple(rows), folds=folds)


def preprocessor(weights: Weights) -> dict[str, Any]:
    """preprocessor_config.json: size and normalisation. It cannot hold a crop; eval_crop is not in it."""
    model = weights.model
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": model.image_size, "width": model.image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.pixel_mean),
        "image_std": list(model.pixel_std),
    }


def from_huggingface(
    tensors: dict[str, Tensor],
    description: dict[str, Any],
    pixels: dict[str, Any] | None = None,
    *,
    origin: str = "Hugging Face weights",
) -> Weights:
    """`pixels` is preprocessor_config.json; without it the normalisation is 0.5 and 0.5, that of Google's models."""
    if description.get("model_type") != "vit":
        raise UsageError(f"{origin}: expected model_type vit, got {description.get('model_type')!r}; give a plain ViT")
    naming = "current" if any(name.startswith("vit.layers.") for name in tensors) else "older"
    kernel_DCPP = taken(origin, tensors, OUTSIDE["patch_embed.proj.weight"])
    if kernel_DCPP.ndim != 4:
        raise UsageError(f"{origin}: expected a patch projection of 4 axes, got {kernel_DCPP.ndim}; give a plain ViT")
    D, C, P, _ = kernel_DCPP.shape
    activations = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_new": "gelu_tanh"}
    if (activation := description.get("hidden_act", "gelu")) not in activations:
        raise UsageError(f"{origin}: expected hidden_act {' or '.join(activations)}, got {activation}; give a plain ViT")
    depth, qkv_bias = int(description.get("num_hidden_layers", 12)), bool(description.get("qkv_bias", True))
    ours: dict[str, Tensor] = {}
    used: set[str] = set()
    for row in _rows(naming, depth, qkv_bias):
        parts = [taken(origin, tensors, name) for name in row.theirs]
        used.update(row.theirs)
        ours[row.ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if unknown := sorted(tensors.keys() - used):
        raise UsageError(f"{origin}: expected only the tensors of ViTForImageClassification, got {unknown[0]} too")
    ours["patch_embed.proj.weight"] = kernel_DCPP.reshape(D, -1)
    pixels = pixels or {}
    model = ModelConfig(
        image_size=grid_of(origin, ours["pos_embed"].shape[1], 1) * P,
        patch_size=P,
        width=D,
        depth=depth,
        heads=int(description.get("num_attention_heads", 12)),
        classes=ours["head.weight"].shape[0],
        mlp_width=ours["blocks.0.mlp.fc1.weight"].shape[0],
        channels=C,
        norm_eps=float(description.get("layer_norm_eps", 1e-12)),
        activation=activations[activation],  # type: ignore[arg-type]  # a Literal, looked up
        qkv_bias=qkv_bias,
        position_resize="bicubic",
        pixel_mean=tuple(pixels.get("image_mean", (0.5,) * C)),
        pixel_std=tuple(pixels.get("image_std", (0.5,) * C)),
    )
    meta = {"format": "huggingface", "huggingface_naming": naming}
    if labels := description.get("id2label"):
        meta["classes"] = json.dumps([labels[str(i)] for i in range(len(labels))])
    return checked(origin, model, ours, meta)


def _rows(naming: str, depth: int, qkv_bias: bool) -> list[Row]:
    rows = [Row(ours=ours, theirs=(theirs,)) for ours, theirs in OUTSIDE.items()]
    for i in range(depth):
        ours, theirs = f"blocks.{i}", f"{BLOCKS[naming]}.{i}"
        for kind in ("weight", "bias"):
            if kind == "weight" or qkv_bias:
                parts = tuple(f"{theirs}.{part}.{kind}" for part in QKV[naming])
                rows.append(Row(ours=f"{ours}.attn.qkv.{kind}", theirs=parts, how="cut into q, k, v"))
            for a, b in (INSIDE[naming] | NORMS).items():
                rows.append(Row(ours=f"{ours}.{a}.{kind}", theirs=(f"{theirs}.{b}.{kind}",)))
    return rows
