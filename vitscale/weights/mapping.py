"""What a converter gives: foreign tensors, the description beside them, and how each came from ours."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vitscale.base.errors import UsageError
from vitscale.model.config import ModelConfig
from vitscale.model.flops import parameter_shapes
from vitscale.model.position import fixed_positions
from vitscale.weights.native import Weights


@dataclass(frozen=True, kw_only=True)
class Row:
    """One tensor of ours, the foreign ones that hold it, and the change of layout between them (exact in both ways)."""

    ours: str
    theirs: tuple[str, ...]
    how: str = "as it is"


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """Weights as another library names them."""

    format: str
    tensors: dict[str, Tensor]
    description: dict[str, Any]
    rows: tuple[Row, ...]
    folds: tuple[str, ...] = field(default=())
    """What was computed on the way instead of being copied, as sentences."""


def refuse_unless(format_name: str, model: ModelConfig, **allowed: tuple[Any, ...]) -> None:
    """Raise UsageError naming the first field of the model whose value the format cannot hold."""
    for name, values in allowed.items():
        got = getattr(model, name)
        if got not in values:
            raise UsageError(
                f"{format_name} holds model.{name}={' or '.join(map(str, values))}, these weights have {got}; "
                "export them as safetensors instead"
            )


def checked(origin: str, model: ModelConfig, tensors: dict[str, Tensor], meta: dict[str, str]) -> Weights:
    """Weights whose tensors are exactly those of the model, else UsageError that names the first difference."""
    expected = parameter_shapes(model)
    for name in sorted({*expected, *tensors}):
        got = tuple(tensors[name].shape) if name in tensors else "none"
        if got != expected.get(name, "none"):
            raise UsageError(
                f"{origin}: expected {name} of shape {expected.get(name, 'none')}, got {got}; only plain ViTs can be imported"
            )
    return Weights(model=model, tensors=tensors, meta=meta)


def taken(origin: str, tensors: dict[str, Tensor], name: str) -> Tensor:
    """The named tensor, or UsageError."""
    if name not in tensors:
        raise UsageError(f"{origin}: expected a tensor {name}, got none; give the weights of a plain ViT classifier")
    return tensors[name]


def grid_of(origin: str, rows: int, prefix: int) -> int:
    """Patches per side of a table of positions with `prefix` rows before them."""
    grid = math.isqrt(max(0, rows - prefix))
    if grid < 1 or grid * grid != rows - prefix:
        raise UsageError(f"{origin}: expected positions of a square grid after {prefix} rows, got {rows} rows in all")
    return grid


def learned_table(weights: Weights) -> tuple[Tensor, int, tuple[str, ...]]:
    """(positions 1ND, how many of the first rows are of prefix tokens, folds); a fixed encoding becomes its table."""
    model = weights.model
    if model.position == "learned":
        return weights.tensors["pos_embed"], model.prefix_tokens if model.prefix_positions else 0, ()
    like = weights.tensors["patch_embed.proj.weight"]
    table = fixed_positions(model, model.grid, model.grid, like.device, like.dtype)
    prefix = model.prefix_tokens if model.position == "sinusoidal" else 0
    return table, prefix, (f"model.position={model.position} is written as a learned table",)


def grouped(rows: Iterable[Row]) -> list[str]:
    """The mapping as lines, blocks that differ only in their number put together."""
    blocks: dict[tuple[str, str, str], set[int]] = {}
    for row in rows:
        found = re.match(r"blocks\.(\d+)\.", row.ours)
        theirs = " + ".join(row.theirs)
        number = int(found[1]) if found else -1
        if found:
            theirs = re.sub(rf"(layers?\.|blocks\.|encoderblock_){number}(?=[./])", r"\1{i}", theirs)
        ours = re.sub(r"^blocks\.\d+\.", "blocks.{i}.", row.ours)
        blocks.setdefault((ours, theirs, row.how), set()).add(number)
    return [
        f"{ours} <- {theirs} ({how})" + (f", i = {min(numbers)}..{max(numbers)}" if min(numbers) >= 0 else "")
        for (ours, theirs, how), numbers in blocks.items()
    ]
