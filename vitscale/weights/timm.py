"""To and from the names of timm's VisionTransformer, with a config.json that `timm.create_model("local-dir:DIR")` reads.

Names are ours already, but for the patch projection, a convolution kernel (D, C, P, P), and the final norm, `fc_norm` where
it stands behind the mean of the patches.
"""

import json
from typing import Any

from torch import Tensor

from vitscale.base.errors import UsageError
from vitscale.model.config import ModelConfig
from vitscale.weights.mapping import Foreign, Row, checked, grid_of, learned_table, refuse_unless, taken
from vitscale.weights.native import Weights

ARCHITECTURE = "vit_base_patch16_224"
"""What exports are built from; every size is overridden in model_args."""
POOLS = {"class": "token", "average": "avg", "map": "map"}
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
"""Of timm's own models by width; the others have heads of 64 columns."""
KNOWN_WIDTHS = (192, 256, 320, 384, 512, 640, 768, 832, 896, 1024, *HEADS)
"""Of timm's own plain ViTs: of another width the number of heads cannot be known."""
ODD_HEADS = {"vit_base_patch16_gap_224": 16}
TANH = (
    "vit_base_patch32_siglip",
    "vit_large_patch16_siglip",
    "vit_so400m_patch16_siglip",
)
"""timm's architectures with the tanh approximation, by the start of their names."""
SAID = (
    *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "qk_norm", "init_values"),
    *("class_token", "reg_tokens", "no_embed_class", "fc_norm", "act_layer", "in_chans", "global_pool", "num_classes"),
    *("dynamic_img_size", "drop_rate", "drop_path_rate"),
)
"""Settings in model_args that are understood."""


def to_timm(weights: Weights) -> Foreign:
    """Raises UsageError naming what timm's VisionTransformer cannot hold."""
    model = weights.model
    refuse_unless(
        "timm",
        model,
        norm=("pre",),
        norm_kind=("layernorm",),
        norm_bias=(True,),
        norm_eps=(1e-6,),
        projection_bias=(True,),
        parallel=(False,),
        activation=("gelu", "gelu_tanh"),
        position=("learned", "sinusoidal", "sincos2d_bv", "sincos2d_mae"),
        pre_logits_width=(None,),
    )
    table, prefix, folds = learned_table(weights)
    is_after = model.pool == "average" and model.pool_norm == "after"
    tensors, rows = {}, []
    for name, tensor in (weights.tensors | {"pos_embed": table}).items():
        theirs, how = name, "as it is"
        if name == "patch_embed.proj.weight":
            P = model.patch_size
            tensor, how = tensor.reshape(model.width, model.channels, P, P), "reshaped to a convolution kernel"
        elif is_after and name.startswith("norm."):
            theirs = f"fc_{name}"
        tensors[theirs] = tensor.contiguous()
        rows.append(Row(ours=name, theirs=(theirs,), how=how))
    arguments = {
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.heads,
        "mlp_ratio": model.feedforward_width / model.width,
        "qkv_bias": model.qkv_bias,
        "qk_norm": model.qk_norm,
        "init_values": model.layer_scale,
        "class_token": model.class_token,
        "reg_tokens": model.registers,
        "no_embed_class": prefix == 0,
        "fc_norm": is_after,
        "act_layer": model.activation,
    }
    pretrained = {
        "mean": list(model.pixel_mean),
        "std": list(model.pixel_std),
        "input_size": [model.channels, model.image_size, model.image_size],
        "num_classes": model.classes,
        "crop_pct": weights.eval_crop,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    description: dict[str, Any] = {
        "architecture": ARCHITECTURE,
        "num_classes": model.classes,
        "num_features": model.width,
        "global_pool": POOLS[model.pool],
        "model_args": arguments | {"in_chans": model.channels, "global_pool": POOLS[model.pool]},
        "pretrained_cfg": pretrained,
    }
    if weights.classes:
        description["label_names"] = list(weights.classes)
    return Foreign(format="timm", tensors=tensors, description=description, rows=tuple(rows), folds=folds)


def from_timm(tensors: dict[str, Tensor], description: dict[str, Any], *, origin: str = "timm weights") -> Weights:
    """Sizes come from the tensors, all else from config.json; raises UsageError where the model is not a plain ViT."""
    architecture = str(description.get("architecture", ""))
    arguments: dict[str, Any] = dict(description.get("model_args") or {})
    pretrained: dict[str, Any] = dict(description.get("pretrained_cfg") or {})
    if not architecture.startswith(("vit_", "deit")):
        raise UsageError(f"{origin}: expected a timm architecture vit_* or deit*, got {architecture!r}; give a plain ViT")
    if any(word in architecture for word in ("clip", "dino", "swiglu", "parallel", "rope", "radio", "tips", "giantopt")):
        raise UsageError(f"{origin}: timm's {architecture} is not among the plain ViTs that can be imported; give another")
    if unknown := sorted(arguments.keys() - set(SAID)):
        raise UsageError(f"{origin}: timm's setting {unknown[0]} in model_args is not understood; give a plain ViT")
    kernel_DCPP = taken(origin, tensors, "patch_embed.proj.weight")
    if kernel_DCPP.ndim != 4:
        raise UsageError(f"{origin}: expected patch_embed.proj.weight of 4 axes, got {kernel_DCPP.ndim}; give a plain ViT")
    D, C, P, _ = kernel_DCPP.shape
    has_class, registers = "cls_token" in tensors, tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    rows, prefix = taken(origin, tensors, "pos_embed").shape[1], int(has_class) + registers
    has_prefix_rows = not arguments.get("no_embed_class", round(rows**0.5) ** 2 == rows)
    pool = str(description.get("global_pool") or arguments.get("global_pool") or ("token" if has_class else "avg"))
    pools = {theirs: ours for ours, theirs in POOLS.items()}
    if pool not in pools:
        raise UsageError(f"{origin}: expected global_pool token, avg or map, got {pool}; give a plain ViT")
    activation = arguments.get("act_layer") or ("gelu_tanh" if architecture.startswith(TANH) else "gelu")
    if activation not in ("gelu", "gelu_tanh"):
        raise UsageError(f"{origin}: expected act_layer gelu or gelu_tanh, got {activation}; give a plain ViT")
    fc1 = taken(origin, tensors, "blocks.0.mlp.fc1.weight")
    ours = {name.removeprefix("fc_") if name.startswith("fc_norm.") else name: value for name, value in tensors.items()}
    ours["patch_embed.proj.weight"] = kernel_DCPP.reshape(D, -1)
    if "num_heads" not in arguments and D not in KNOWN_WIDTHS:
        raise UsageError(f"{origin}: width {D} is none of timm's own, so its heads are unknown; add num_heads to model_args")
    model = ModelConfig(
        image_size=grid_of(origin, rows, prefix if has_prefix_rows else 0) * P,
        patch_size=P,
        width=D,
        depth=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
        heads=int(arguments.get("num_heads") or ODD_HEADS.get(architecture) or HEADS.get(D, D // 64)),
        classes=taken(origin, tensors, "head.weight").shape[0],
        mlp_width=fc1.shape[0],
        channels=C,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        qk_norm="blocks.0.attn.q_norm.weight" in tensors,
        activation=activation,  # type: ignore[arg-type]  # one of two, checked above
        layer_scale=(arguments.get("init_values") or 1e-5) if "blocks.0.ls1.gamma" in tensors else None,
        class_token=has_class,
        registers=registers,
        prefix_positions=has_prefix_rows,
        pool=pools[pool],  # type: ignore[arg-type]  # a Literal, looked up
        pool_norm="after" if "fc_norm.weight" in tensors else "before",
        pixel_mean=tuple(pretrained.get("mean", (0.5,) * C)),
        pixel_std=tuple(pretrained.get("std", (0.5,) * C)),
    )
    meta = {"format": "timm", "eval_crop": str(pretrained.get("crop_pct", 1.0)), "architecture": architecture}
    if names := description.get("label_names"):
        meta["classes"] = json.dumps(names)
    return checked(origin, model, ours, meta)
