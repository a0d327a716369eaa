"""Sizes and costs of a model in closed form, from its configuration alone: no torch, no weights.

N patches   S tokens (prefix and patches)   D width   M feed-forward width   L depth   P patch side   C channels
"""

from math import prod

from vitscale.model.config import ModelConfig, Recompute


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of VisionTransformer(model), in the order of its `named_parameters()`."""
    D, M = model.width, model.feedforward_width
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int, *, bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def norm(name: str, width: int = D) -> None:
        shapes[f"{name}.weight"] = (width,)
        if model.norm_kind == "layernorm" and model.norm_bias:
            shapes[f"{name}.bias"] = (width,)

    def feed_forward(name: str) -> None:
        linear(f"{name}.fc1", 2 * M if model.activation == "swiglu" else M, D, bias=True)
        linear(f"{name}.fc2", D, M, bias=True)

    if model.class_token:
        shapes["cls_token"] = (1, 1, D)
    if model.registers:
        shapes["reg_token"] = (1, model.registers, D)
    if model.position == "learned":
        shapes["pos_embed"] = (1, model.patches + (model.prefix_tokens if model.prefix_positions else 0), D)
    linear("patch_embed.proj", D, model.channels * model.patch_size**2, bias=model.projection_bias)
    for layer in range(model.depth):
        block = f"blocks.{layer}"
        norm(f"{block}.norm1")
        linear(f"{block}.attn.qkv", 3 * D, D, bias=model.projection_bias and model.qkv_bias)
        if model.qk_norm:
            norm(f"{block}.attn.q_norm", model.head_width)
            norm(f"{block}.attn.k_norm", model.head_width)
        linear(f"{block}.attn.proj", D, D, bias=model.projection_bias)
        if model.layer_scale is not None:
            shapes[f"{block}.ls1.gamma"] = (D,)
        if not model.parallel:
            norm(f"{block}.norm2")
        feed_forward(f"{block}.mlp")
        if model.layer_scale is not None:
            shapes[f"{block}.ls2.gamma"] = (D,)
    if not model.is_post_norm:
        norm("norm")
    if model.pool == "map":
        shapes["attn_pool.latent"] = (1, 1, D)
        linear("attn_pool.q", D, D, bias=True)
        linear("attn_pool.kv", 2 * D, D, bias=True)
        linear("attn_pool.proj", D, D, bias=True)
        norm("attn_pool.norm")
        feed_forward("attn_pool.mlp")
    if model.pre_logits_width is not None:
        linear("pre_logits", model.pre_logits_width, D, bias=True)
    linear("head", model.classes, model.pre_logits_width or D, bias=True)
    return shapes


def parameters(model: ModelConfig) -> int:
    """Trained numbers of the model, exactly."""
    return sum(prod(shape) for shape in parameter_shapes(model).values())


def forward_flops(model: ModelConfig, *, kept: float = 1.0) -> int:
    """Floating-point operations of the matrix products for one image, a multiply-add counted as two.

    2 N (C P^2) D                      patches
    + L [2 S (4 D^2 + F)               W_Q, W_K, W_V, W_O and the feed-forward, F = 2 D M (swiglu: 3 D M)
         + 4 S^2 D] kept               Q K^T and the weighted sum of V; `kept`: share of images stochastic depth keeps
    + 4 S D^2 + 4 S D + 4 D^2 + 2 F    attention pooling, where there is one
    + 2 D W + 2 W classes              tanh layer of width W, if any, and head, on one vector (W = D without it)
    """
    N, D, W = model.patches, model.width, model.pre_logits_width
    patches = 2 * N * model.channels * model.patch_size**2 * D
    blocks = round(model.depth * block_flops(model) * kept)
    head = 2 * (W or D) * model.classes + (2 * D * W if W else 0)
    return patches + blocks + _pool_flops(model) + head


def block_flops(model: ModelConfig) -> int:
    """Forward operations of one encoder layer for one image."""
    S, D = model.tokens, model.width
    return 2 * S * (4 * D * D + _feed_forward(model)) + 4 * S * S * D


def _feed_forward(model: ModelConfig) -> int:
    return (3 if model.activation == "swiglu" else 2) * model.width * model.feedforward_width


def _pool_flops(model: ModelConfig) -> int:
    S, D = model.tokens, model.width
    return 4 * S * D * D + 4 * S * D + 4 * D * D + 2 * _feed_forward(model) if model.pool == "map" else 0


def train_flops(model: ModelConfig, *, kept: float = 1.0) -> int:
    """Forward and backward for one image, the backward counted as two forwards; recomputation is not counted (MFU)."""
    return 3 * forward_flops(model, kept=kept)


def recomputed_flops(model: ModelConfig, recompute: Recompute, *, kept: float = 1.0) -> int:
    """Operations per image that the backward pass does again; added to `train_flops` they give HFU.

    A block recomputed whole repeats its forward, less W_2 where nothing behind it is needed again: the recomputation
    stops at the last tensor that the backward pass asks for, which is the input of W_2 unless a norm or a factor follows.
    Selective recomputation repeats no product.
    """
    if recompute in (0, "selective"):
        return 0
    assert isinstance(recompute, int)
    blocks = -(-model.depth // recompute)
    last = (
        0 if model.norm != "pre" or model.layer_scale is not None else 2 * model.tokens * model.feedforward_width * model.width
    )
    return round(blocks * (block_flops(model) - last) * kept)
