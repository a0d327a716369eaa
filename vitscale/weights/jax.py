"""To and from the arrays of the JAX ViTs: npz files of google-research/vision_transformer and of big_vision.

scheme              class token and positions        in a block
vision_transformer  concat, then add: N+1 rows       LayerNorm_0, MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3
big_vision          add, then concat: N rows         LayerNorm_0, MultiHeadDotProductAttention_0, LayerNorm_1, MlpBlock_0

Arrays are tensors here, bf16 included; npz.py reads and writes them. Names may stand behind a prefix; big_vision's blocks may
be stacked ("scan"): Transformer/encoderblock/... with a leading axis of depth.

P patch size   C channels   D width   H heads   K = D/H   M width of the feed-forward
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitscale.base.errors import UsageError
from vitscale.model.config import ModelConfig
from vitscale.weights.mapping import Foreign, Row, checked, grid_of, learned_table, refuse_unless, taken
from vitscale.weights.native import Weights

PREFIXES = ("", "opt/target/", "params/img/", "params/")
NUMBERS = {"vision_transformer": (0, 1, 2, 3), "big_vision": (0, 0, 1, 0)}
"""Of LayerNorm before attention, attention, LayerNorm before the feed-forward, feed-forward."""
OLD_POSITIONS, POSITIONS = "Transformer/posembed_input/pos_embedding", "pos_embedding"


def to_jax(weights: Weights, *, scheme: str = "big_vision", prefix: str = "", scan: bool = False) -> Foreign:
    """Raises UsageError naming what the format cannot hold; it says nothing of activation, epsilon and pixels, so these
    must be the ones its readers assume."""
    model = weights.model
    refuse_unless(
        f"npz ({scheme})",
        model,
        norm=("pre",),
        norm_kind=("layernorm",),
        norm_bias=(True,),
        norm_eps=(1e-6,),
        projection_bias=(True,),
        qkv_bias=(True,),
        qk_norm=(False,),
        parallel=(False,),
        activation=("gelu_tanh",),
        layer_scale=(None,),
        registers=(0,),
        position=("learned", "sinusoidal", "sincos2d_bv", "sincos2d_mae"),
        pool=("class", "average") if scheme == "vision_transformer" else ("class", "average", "map"),
        pool_norm=("before",),
        pixel_mean=((0.5,) * model.channels,),
        pixel_std=((0.5,) * model.channels,),
    )
    if model.class_token and model.pool != "class":
        raise UsageError("npz holds a class token only with model.pool=class; export as safetensors instead")
    if scan and scheme != "big_vision":
        raise UsageError("npz of scheme vision_transformer has no stacked blocks; use scheme big_vision")
    t = dict(weights.tensors)
    arrays: dict[str, Tensor] = {}
    rows: list[Row] = []

    def put(ours: str, parts: dict[str, Tensor], how: str = "as it is") -> None:
        arrays.update({name: part.contiguous() for name, part in parts.items()})
        rows.append(Row(ours=ours, theirs=tuple(prefix + name for name in parts), how=how))

    def linear(ours: str, theirs: str) -> None:
        put(f"{ours}.weight", {f"{theirs}/kernel": t[f"{ours}.weight"].T}, "transposed")
        put(f"{ours}.bias", {f"{theirs}/bias": t[f"{ours}.bias"]})

    def norm(ours: str, theirs: str) -> None:
        put(f"{ours}.weight", {f"{theirs}/scale": t[f"{ours}.weight"]})
        put(f"{ours}.bias", {f"{theirs}/bias": t[f"{ours}.bias"]})

    def attention(ours: Mapping[str, tuple[str, ...]], out: str, theirs: str) -> None:
        H, K, D = model.heads, model.head_width, model.width
        for name, parts in ours.items():
            kernels = t[f"{name}.weight"].chunk(len(parts))
            biases = t[f"{name}.bias"].chunk(len(parts))
            pairs = list(zip(parts, kernels, biases, strict=True))
            how = "cut into " + ", ".join(parts) + ", transposed, (D, H, K)"
            put(f"{name}.weight", {f"{theirs}/{part}/kernel": kernel.T.reshape(D, H, K) for part, kernel, _ in pairs}, how)
            put(f"{name}.bias", {f"{theirs}/{part}/bias": bias.reshape(H, K) for part, _, bias in pairs}, "cut, (H, K)")
        put(f"{out}.weight", {f"{theirs}/out/kernel": t[f"{out}.weight"].T.reshape(H, K, D)}, "transposed, (H, K, D)")
        put(f"{out}.bias", {f"{theirs}/out/bias": t[f"{out}.bias"]})

    table, prefix_rows, folds = learned_table(weights)
    if model.class_token:
        cls = t["cls_token"]
        if scheme == "big_vision" and prefix_rows:
            cls, table = cls + table[:, :1], table[:, 1:]
            folds += ("the class token's row of the positions is added to the class token",)
        elif scheme == "vision_transformer" and not prefix_rows:
            table = torch.cat([torch.zeros_like(cls), table], dim=1)
            folds += ("the positions get a row of zeros for the class token",)
        put("cls_token", {"cls": cls})
    put("pos_embed", {POSITIONS if scheme == "big_vision" else OLD_POSITIONS: table})
    P, C = model.patch_size, model.channels
    kernel_DCPP = t["patch_embed.proj.weight"].reshape(model.width, C, P, P)
    put("patch_embed.proj.weight", {"embedding/kernel": kernel_DCPP.permute(2, 3, 1, 0)}, "(P, P, C, D)")
    put("patch_embed.proj.bias", {"embedding/bias": t["patch_embed.proj.bias"]})
    first, attn, second, mlp = NUMBERS[scheme]
    for i in range(model.depth):
        ours, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        norm(f"{ours}.norm1", f"{theirs}/LayerNorm_{first}")
        qkv = {f"{ours}.attn.qkv": ("query", "key", "value")}
        attention(qkv, f"{ours}.attn.proj", f"{theirs}/MultiHeadDotProductAttention_{attn}")
        norm(f"{ours}.norm2", f"{theirs}/LayerNorm_{second}")
        for j in (1, 2):
            linear(f"{ours}.mlp.fc{j}", f"{theirs}/MlpBlock_{mlp}/Dense_{j - 1}")
    norm("norm", "Transformer/encoder_norm")
    if model.pool == "map":
        put("attn_pool.latent", {"MAPHead_0/probe": t["attn_pool.latent"]})
        halves = {"attn_pool.q": ("query",), "attn_pool.kv": ("key", "value")}
        attention(halves, "attn_pool.proj", "MAPHead_0/MultiHeadDotProductAttention_0")
        norm("attn_pool.norm", "MAPHead_0/LayerNorm_0")
        for j in (1, 2):
            linear(f"attn_pool.mlp.fc{j}", f"MAPHead_0/MlpBlock_0/Dense_{j - 1}")
    if model.pre_logits_width is not None:
        linear("pre_logits", "pre_logits")
    linear("head", "head")
    if scan:
        arrays = _stacked(arrays, model.depth)
    named = {prefix + name: array for name, array in arrays.items()}
    description: dict[str, Any] = {"scheme": scheme, "prefix": prefix, "scan": scan}
    return Foreign(format="npz", tensors=named, description=description, rows=tuple(rows), folds=folds)


def from_jax(arrays: dict[str, Tensor], *, origin: str = "npz weights") -> Weights:
    """The scheme is recognised by its names. meta keeps scheme, prefix and stacking, so that `to_jax` can repeat them.

    Raises UsageError where the arrays are not those of a plain ViT classifier.
    """
    prefix = next((p for p in PREFIXES if f"{p}embedding/kernel" in arrays), None)
    if prefix is None:
        raise UsageError(f"{origin}: expected an array embedding/kernel, got none; give the npz of a JAX ViT")
    a = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    scan = "Transformer/encoderblock/LayerNorm_0/scale" in a
    if scan:
        a = _unstacked(a)
    scheme = "vision_transformer" if OLD_POSITIONS in a else "big_vision"
    first, attn, second, mlp = NUMBERS[scheme]
    used: set[str] = set()

    def take(name: str, axes: int) -> Tensor:
        array = taken(origin, a, name)
        if array.ndim != axes:
            raise UsageError(f"{origin}: expected {name} of {axes} axes, got {array.ndim}; give the npz of a JAX ViT")
        used.add(name)
        return array

    t: dict[str, Tensor] = {}

    def linear(ours: str, theirs: str) -> None:
        t[f"{ours}.weight"], t[f"{ours}.bias"] = take(f"{theirs}/kernel", 2).T, take(f"{theirs}/bias", 1)

    def norm(ours: str, theirs: str) -> None:
        t[f"{ours}.weight"], t[f"{ours}.bias"] = take(f"{theirs}/scale", 1), take(f"{theirs}/bias", 1)

    def attention(ours: Mapping[str, tuple[str, ...]], out: str, theirs: str) -> None:
        for name, parts in ours.items():
            t[f"{name}.weight"] = torch.cat([take(f"{theirs}/{part}/kernel", 3).flatten(1).T for part in parts])
            t[f"{name}.bias"] = torch.cat([take(f"{theirs}/{part}/bias", 2).flatten() for part in parts])
        t[f"{out}.weight"] = take(f"{theirs}/out/kernel", 3).flatten(0, 1).T
        t[f"{out}.bias"] = take(f"{theirs}/out/bias", 1)

    kernel_PPCD = take("embedding/kernel", 4)
    P, _, C, D = kernel_PPCD.shape
    t["patch_embed.proj.weight"] = kernel_PPCD.permute(3, 2, 0, 1).reshape(D, -1)
    t["patch_embed.proj.bias"] = take("embedding/bias", 1)
    t["pos_embed"] = take(OLD_POSITIONS if scheme == "vision_transformer" else POSITIONS, 3)
    has_class, has_map = "cls" in a, "MAPHead_0/probe" in a
    if has_class:
        t["cls_token"] = take("cls", 3)
    depth = sum(name.startswith("Transformer/encoderblock_") and name.endswith("LayerNorm_0/scale") for name in a)
    for i in range(depth):
        ours, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        norm(f"{ours}.norm1", f"{theirs}/LayerNorm_{first}")
        qkv = {f"{ours}.attn.qkv": ("query", "key", "value")}
        attention(qkv, f"{ours}.attn.proj", f"{theirs}/MultiHeadDotProductAttention_{attn}")
        norm(f"{ours}.norm2", f"{theirs}/LayerNorm_{second}")
        for j in (1, 2):
            linear(f"{ours}.mlp.fc{j}", f"{theirs}/MlpBlock_{mlp}/Dense_{j - 1}")
    norm("norm", "Transformer/encoder_norm")
    if has_map:
        t["attn_pool.latent"] = take("MAPHead_0/probe", 3)
        halves = {"attn_pool.q": ("query",), "attn_pool.kv": ("key", "value")}
        attention(halves, "attn_pool.proj", "MAPHead_0/MultiHeadDotProductAttention_0")
        norm("attn_pool.norm", "MAPHead_0/LayerNorm_0")
        for j in (1, 2):
            linear(f"attn_pool.mlp.fc{j}", f"MAPHead_0/MlpBlock_0/Dense_{j - 1}")
    if "pre_logits/kernel" in a:
        linear("pre_logits", "pre_logits")
    linear("head", "head")
    if unknown := sorted(a.keys() - used):
        raise UsageError(f"{origin}: expected only the arrays of a plain ViT classifier, got {unknown[0]} too")
    has_prefix_rows = scheme == "vision_transformer"
    model = ModelConfig(
        image_size=grid_of(origin, t["pos_embed"].shape[1], int(has_class and has_prefix_rows)) * P,
        patch_size=P,
        width=D,
        depth=depth,
        heads=a[f"Transformer/encoderblock_0/MultiHeadDotProductAttention_{attn}/query/kernel"].shape[1],
        classes=t["head.bias"].shape[0],
        mlp_width=t["blocks.0.mlp.fc1.bias"].shape[0],
        channels=C,
        activation="gelu_tanh",
        class_token=has_class,
        prefix_positions=has_prefix_rows,
        position_resize="zoom_linear",
        pool="map" if has_map else "class" if has_class else "average",
        pre_logits_width=t["pre_logits.bias"].shape[0] if "pre_logits.bias" in t else None,
        pixel_mean=(0.5,) * C,
        pixel_std=(0.5,) * C,
    )
    meta = {"format": "npz", "npz_scheme": scheme, "npz_prefix": prefix, "npz_scan": str(int(scan))}
    return checked(origin, model, {name: tensor.contiguous() for name, tensor in t.items()}, meta)


def _stacked(arrays: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Blocks put together along a leading axis."""
    start = "Transformer/encoderblock_"
    blocks = {name: array for name, array in arrays.items() if not name.startswith(start)}
    for name in [name for name in arrays if name.startswith(f"{start}0/")]:
        rest = name.removeprefix(f"{start}0/")
        blocks[f"Transformer/encoderblock/{rest}"] = torch.stack([arrays[f"{start}{i}/{rest}"] for i in range(depth)])
    return blocks


def _unstacked(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    start = "Transformer/encoderblock/"
    single = {name: array for name, array in arrays.items() if not name.startswith(start)}
    for name in [name for name in arrays if name.startswith(start)]:
        rest = name.removeprefix(start)
        single |= {f"Transformer/encoderblock_{i}/{rest}": part for i, part in enumerate(arrays[name].unbind())}
    return single
