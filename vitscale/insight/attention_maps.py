"""What attention looks at, computed exactly beside the fast kernel, which never shows its weights.

map       softmax(Q K^T / sqrt(K)) of one layer: row = the token that asks, column = the token that is looked at
rollout   how much each input token flows into the final class token, through all layers and residuals

B batch   H heads   N tokens (class token first)   K columns of a head   D width
"""

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from vitscale.model.attention import Attention, Watch
from vitscale.model.vit import VisionTransformer

QUERIES_AT_ONCE = 1024
"""Rows of a map computed together: bounds what is needed besides the maps themselves."""


@torch.no_grad()
def attention_maps(model: VisionTransformer, images_BCHW: Tensor, *, layers: Sequence[int] | None = None) -> dict[int, Tensor]:
    """The attention of the asked layers (None: all; 0 is the first) in one ordinary forward pass: layer -> BHNN.

    Each map is recomputed from what its own layer was given, in float32 at least; a row sums to 1.
    """
    depth = len(model.blocks)
    asked = range(depth) if layers is None else layers
    if wrong := [layer for layer in asked if not 0 <= layer < depth]:
        raise ValueError(f"there is no layer {wrong[0]} in a model of depth {depth}; layers are 0 to {depth - 1}")
    maps: dict[int, Tensor] = {}

    def watch(layer: int) -> Watch:
        def catch(q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor, out_BHNK: Tensor) -> None:
            maps[layer] = _map_of(q_BHNK, k_BHNK)

        return catch

    modules = [cast(Attention, model.get_submodule(f"blocks.{layer}.attn")) for layer in asked]
    for layer, module in zip(asked, modules, strict=True):
        module.watch = watch(layer)
    was_training = model.training
    try:
        model.eval()(images_BCHW)
    finally:
        model.train(was_training)
        for module in modules:
            module.watch = None
    return maps


def _map_of(q_BHNK: Tensor, k_BHNK: Tensor) -> Tensor:
    B, H, N, K = q_BHNK.shape
    dtype = torch.promote_types(q_BHNK.dtype, torch.float32)
    map_BHNN = torch.empty(B, H, N, N, dtype=dtype, device=q_BHNK.device)
    for head in range(H):
        q_BNK, k_BKN = q_BHNK[:, head].to(dtype), k_BHNK[:, head].to(dtype).transpose(1, 2)
        for first in range(0, N, QUERIES_AT_ONCE):
            rows = slice(first, first + QUERIES_AT_ONCE)
            map_BHNN[:, head, rows] = torch.softmax(q_BNK[:, rows] @ k_BKN / math.sqrt(K), dim=-1)
    return map_BHNN


def attention_rollout(maps: Mapping[int, Tensor]) -> Tensor:
    """Rollout of Abnar & Zuidema 2020 from the maps of all layers: BN, the row of the class token; it sums to 1.

    A_l = mean over heads / 2 + I / 2 (half for the residual), rows normalised; rollout = row 0 of A_L ... A_2 A_1.
    """
    if sorted(maps) != list(range(len(maps))) or not maps:
        raise ValueError(f"rollout needs the maps of all layers from 0 upwards, got layers {sorted(maps)}")
    row_B1N: Tensor | None = None
    # The class token's row alone is carried from the last layer down: products of a row, never of two N x N matrices.
    for layer in sorted(maps, reverse=True):
        mean_BNN = maps[layer].mean(dim=1)
        with_residual_BNN = 0.5 * mean_BNN + 0.5 * torch.eye(mean_BNN.shape[-1], dtype=mean_BNN.dtype, device=mean_BNN.device)
        flow_BNN = with_residual_BNN / with_residual_BNN.sum(dim=-1, keepdim=True)
        row_B1N = flow_BNN[:, :1] if row_B1N is None else row_B1N @ flow_BNN
    assert row_B1N is not None
    return row_B1N[:, 0]
