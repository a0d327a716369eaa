"""Maps of attention, computed beside the fast kernel, which never shows its weights; a few rows at a time.

map      A = softmax(Q K^T / sqrt(K)) of one layer and head: row = the token that asks, column = the token looked at
chunk    some rows of one head's map: never more than CHUNK_NUMBERS_MAX numbers exist at once, unless a whole map is asked for

B batch   H heads   M some queries   N tokens (prefix first)   K columns of a head
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from vitscale.model.attention import Attention, Watch
from vitscale.model.vit import VisionTransformer

CHUNK_NUMBERS_MAX = 1 << 20
"""Numbers of a chunk (4 MiB in float32); at least one row per image."""

Forward = Callable[[Tensor], Tensor]


def chunks(q_BHNK: Tensor, k_BHNK: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """(head, queries, rows A_BMN) over the whole map, head after head, in float32 at least; each row sums to 1."""
    B, H, N, K = q_BHNK.shape
    dtype = torch.promote_types(q_BHNK.dtype, torch.float32)
    at_once = max(1, CHUNK_NUMBERS_MAX // (B * k_BHNK.shape[2]))
    for head in range(H):
        q_BNK, k_BKN = q_BHNK[:, head].to(dtype), k_BHNK[:, head].to(dtype).transpose(1, 2)
        for first in range(0, N, at_once):
            queries = slice(first, min(N, first + at_once))
            yield head, queries, torch.softmax(q_BNK[:, queries] @ k_BKN / math.sqrt(K), dim=-1)


def whole_map(q_BHNK: Tensor, k_BHNK: Tensor) -> Tensor:
    """All rows of all heads: BHNN, the one thing here whose memory grows with H N^2."""
    B, H, N, _ = q_BHNK.shape
    dtype = torch.promote_types(q_BHNK.dtype, torch.float32)
    map_BHNN = torch.empty(B, H, N, k_BHNK.shape[2], dtype=dtype, device=q_BHNK.device)
    for head, queries, rows_BMN in chunks(q_BHNK, k_BHNK):
        map_BHNN[:, head, queries] = rows_BMN
    return map_BHNN


@contextmanager
def watched(watches: Mapping[nn.Module, Watch]) -> Iterator[None]:
    """Set the watch of attention modules, and take it away again whatever happens."""
    modules = [cast(Attention, module) for module in watches]
    try:
        for module, watch in zip(modules, watches.values(), strict=True):
            module.watch = watch
        yield
    finally:
        for module in modules:
            module.watch = None


def attention_of(model: VisionTransformer, layer: int) -> nn.Module:
    """The attention module of one block."""
    return model.get_submodule(f"blocks.{layer}.attn")


@torch.no_grad()
def attention_maps(
    model: VisionTransformer,
    images_BCHW: Tensor,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> dict[int, Tensor]:
    """Full maps of the asked layers and heads (None: all; 0 is the first) in one forward pass: layer -> BHNN.

    Memory: len(layers) len(heads) N^2 numbers per image; `look` keeps far less when a summary is enough.
    """
    depth, all_heads = model.config.depth, model.config.heads
    asked_layers = range(depth) if layers is None else layers
    asked_heads = list(range(all_heads)) if heads is None else list(heads)
    for what, asked, count in (("layer", asked_layers, depth), ("head", asked_heads, all_heads)):
        if wrong := [one for one in asked if not 0 <= one < count]:
            of = f"of depth {depth}" if what == "layer" else f"with {all_heads} heads"
            raise ValueError(f"there is no {what} {wrong[0]} in a model {of}; {what}s are 0 to {count - 1}")
    maps: dict[int, Tensor] = {}

    def watch(layer: int) -> Watch:
        def catch(q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor, out_BHNK: Tensor) -> None:
            maps[layer] = whole_map(q_BHNK[:, asked_heads], k_BHNK[:, asked_heads])

        return catch

    was_training = model.training
    try:
        with watched({attention_of(model, layer): watch(layer) for layer in asked_layers}):
            model.eval()(images_BCHW)
    finally:
        model.train(was_training)
    return maps
