"""Sizes and costs of a model in closed form, from its configuration alone: no torch, no weights.

N patches   S = N + 1 tokens   D width   M feed-forward width   L depth   P patch side   C channels
"""

from math import prod

from vitscale.config import ModelConfig


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of VisionTransformer(model), in the order of its `named_parameters()`."""
    D, M = model.width, model.feedforward_width
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, D)}
    if model.position == "learned":
        shapes["pos_embed"] = (1, model.tokens, D)

    def linear(name: str, rows: int, columns: int, *, bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (D,)

    linear("patch_embed.proj", D, model.channels * model.patch_size**2, bias=model.projection_bias)
    for layer in range(model.depth):
        norm(f"blocks.{layer}.norm1")
        linear(f"blocks.{layer}.attn.qkv", 3 * D, D, bias=model.projection_bias)
        linear(f"blocks.{layer}.attn.proj", D, D, bias=model.projection_bias)
        norm(f"blocks.{layer}.norm2")
        linear(f"blocks.{layer}.mlp.fc1", M, D, bias=True)
        linear(f"blocks.{layer}.mlp.fc2", D, M, bias=True)
    if model.norm == "pre":
        norm("norm")
    linear("head", model.classes, D, bias=True)
    return shapes


def parameters(model: ModelConfig) -> int:
    """Trained numbers of the model, exactly."""
    return sum(prod(shape) for shape in parameter_shapes(model).values())


def forward_flops(model: ModelConfig) -> int:
    """Floating-point operations of the matrix products for one image, a multiply-add counted as two.

    2 N (C P^2) D                      patches
    + L [2 S (4 D^2 + 2 D M)           W_Q, W_K, W_V, W_O and the feed-forward
         + 4 S^2 D]                    Q K^T and the weighted sum of V
    + 2 D classes                      head, on the class token alone
    """
    N, S, D, M = model.patches, model.tokens, model.width, model.feedforward_width
    patches = 2 * N * model.channels * model.patch_size**2 * D
    layer = 2 * S * (4 * D * D + 2 * D * M) + 4 * S * S * D
    return patches + model.depth * layer + 2 * D * model.classes


def train_flops(model: ModelConfig) -> int:
    """Forward and backward for one image, the backward counted as two forwards; recomputation is not counted (MFU)."""
    return 3 * forward_flops(model)
