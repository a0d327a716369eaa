"""How far one step moves the weights, per block: |w' - w| / |w|, as histograms of its decimal logarithm and as norms.

A step that moves weights by about a thousandth of themselves is the usual healthy one; blocks far above or below the others,
or a second hump, show a layer that learns at another pace. Computed on the float32 masters where ZeRO keeps them: each rank
looks at its own part, only counts are added up. Costs a copy of the masters for the one step that is looked at.
"""

import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vitscale.training.engine import Engine
from vitscale.training.metrics import Metrics

EDGES = np.linspace(-8.0, 1.0, 73)
"""Of the bins, in decades; what lies outside counts in the outermost bins."""


class UpdateWatcher:
    """Look before a step and after it. Collective; rank 0, which has `metrics`, writes."""

    def __init__(self, engine: Engine, *, depth: int, metrics: Metrics | None) -> None:
        self.engine = engine
        self.depth = depth
        self.metrics = metrics
        self._before: dict[str, Tensor] = {}

    def before_step(self) -> None:
        """Keep the masters."""
        self._before = {partition.key: partition.master.detach().clone() for partition in self.engine.partitions}

    def after_step(self, step: int) -> None:
        """Compare, add up over the ranks, and write."""
        names = places_of(self.depth)
        table = np.zeros((len(names), len(EDGES) + 1))  # counts of the bins, sum of squares of updates, of weights
        for place, before, after in self._pairs():
            table[names.index(place)] += row_of(before, after)
        self._before = {}
        table = np.array(self.engine.sum_over_ranks(table.flatten().tolist())).reshape(table.shape)
        if self.metrics is None:
            return
        counts = {f"updates/log10_of_ratio_{name}": row[:-2] for name, row in zip(names, table, strict=True)}
        ratios = {
            f"update_ratio/{name}": float(np.sqrt(row[-2] / row[-1])) for name, row in zip(names, table, strict=True) if row[-1]
        }
        self.metrics.log_histograms(step, counts, EDGES, ratios)

    def _pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(place, weights before, weights after) of every piece that this rank answers for."""
        if self.engine.ds.stage == 0 and self.engine.rank > 0:
            return  # every rank has all of them
        for partition in self.engine.partitions:
            before, after = self._before[partition.key].flatten(), partition.master.detach().flatten()
            for piece in partition.pieces:
                part = slice(piece.offset, piece.offset + piece.numel)
                yield place_of(piece.name), before[part], after[part]


def places_of(depth: int) -> list[str]:
    """What a histogram is of: the embeddings, each block, the head with all behind the blocks."""
    return ["embedding", *(f"block_{number:02d}" for number in range(1, depth + 1)), "head"]


def place_of(name: str) -> str:
    """The place of a parameter; the first block is 1."""
    if found := re.match(r"blocks\.(\d+)\.", name):
        return f"block_{int(found[1]) + 1:02d}"
    is_embedding = name.startswith("patch_embed.") or name in ("cls_token", "reg_token", "pos_embed")
    return "embedding" if is_embedding else "head"


def row_of(before: Tensor, after: Tensor) -> np.ndarray:
    """Counts per bin, then the sums of squares of updates and of weights. Weights of 0 have no ratio and no count."""
    moved = (after - before).abs()
    size = before.abs()
    ratios = (moved[size > 0] / size[size > 0]).clamp(10 ** EDGES[0], 10 ** EDGES[-1]).log10()
    counts = torch.histc(ratios, bins=len(EDGES) - 1, min=EDGES[0], max=EDGES[-1]).cpu().numpy()
    return np.concatenate([counts, [float(moved.double().square().sum()), float(size.double().square().sum())]])
