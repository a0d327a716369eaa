"""Every ZeRO stage with every precision, recomputation, accumulation, offloading and world size, against plain torch.

    python -m tests.measure.matrix        prints the table and writes it to docs/matrix.md

A cell trains a tiny model for ten steps. Three full columns (every stage in every world) and a set of further cells that
together hold every pair of settings at least once; what is impossible is refused by name, and said so in the table.
"""

import gc
import itertools
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from tests.helpers.ranks import run_ranks
from vitscale.base.cluster import Cluster
from vitscale.base.errors import UsageError
from vitscale.config import Config, apply_overrides
from vitscale.ds_config import DsConfig, resolve_ds_config
from vitscale.model.layers import normalise_pixels
from vitscale.model.vit import VisionTransformer, initialise
from vitscale.recipes.catalog import recipe_named
from vitscale.training.engine import Engine
from vitscale.training.optim import make_optimizer
from vitscale.training.reference import Forward, Gradients, plain_model, train_plainly

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "matrix.md"
CPU = torch.device("cpu")
STEPS = 10
BATCH = 24
LR = 1e-3
WORLDS = (1, 2, 3)


@dataclass(frozen=True)
class Cell:
    world: int
    stage: int
    precision: str
    recompute: str
    accumulation: int
    offload: str


FACTORS: tuple[tuple[Any, ...], ...] = (
    WORLDS,
    (0, 1, 2, 3),
    ("fp32", "bf16"),
    ("none", "all", "selective"),
    (1, 4),
    ("none", "cpu"),
)
COLUMNS = (("fp32", "none", 1, "none"), ("bf16", "all", 4, "none"), ("fp32", "selective", 1, "cpu"))
ALL = [Cell(*values) for values in itertools.product(*FACTORS)]


def is_impossible(cell: Cell) -> bool:
    """At stage 0 the optimizer's state is not DeepSpeed's to move."""
    return cell.stage == 0 and cell.offload == "cpu"


def pairs_of(cell: Cell) -> set[tuple[tuple[int, Any], tuple[int, Any]]]:
    """Every two of its settings together."""
    return set(itertools.combinations(enumerate(astuple(cell)), 2))


def chosen() -> list[Cell]:
    """The three columns, then the cells that add most missing pairs, one after the other."""
    cells = [cell for cell in ALL if astuple(cell)[2:] in COLUMNS]
    possible = [cell for cell in ALL if not is_impossible(cell)]
    missing = set().union(*map(pairs_of, possible)) - set().union(
        *(pairs_of(cell) for cell in cells if not is_impossible(cell))
    )
    while missing:
        best = max(possible, key=lambda cell: len(pairs_of(cell) & missing))
        cells.append(best)
        missing -= pairs_of(best)
    return sorted(cells, key=astuple)


def settings(cell: Cell) -> tuple[Config, DsConfig]:
    """Raises UsageError for an impossible cell."""
    overrides = [
        f"train.precision={cell.precision}",
        f"optim.global_batch={BATCH}",
        *("model.depth=2", "model.width=32", "model.heads=2", "optim.clip=1.0"),
    ]
    config = apply_overrides(recipe_named("digits"), overrides)
    zero: dict[str, Any] = {"stage": cell.stage, "offload_optimizer": {"device": cell.offload, "pin_memory": False}}
    if cell.stage == 3:
        zero["offload_param"] = {"device": cell.offload, "pin_memory": False}
    record = {
        "zero_optimization": zero,
        "gradient_accumulation_steps": cell.accumulation,
        "vitscale": {"recompute": cell.recompute},
    }
    return config, resolve_ds_config(record, config=config, world=cell.world)


def images_and_labels(step: int, part: slice) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (BATCH, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return images[part], torch.randint(0, 10, (BATCH,), generator=generator)[part]


def loss_of(forward: Forward, config: Config, step: int, part: slice, dtype: torch.dtype) -> Tensor:
    images, labels = images_and_labels(step, part)
    pixels = normalise_pixels(images, config.model.pixel_mean, config.model.pixel_std, dtype)
    return F.cross_entropy(forward(pixels).float(), labels)


def reference() -> list[Gradients]:
    """Ten steps of plain torch in float32: four micro-batches in one process."""
    config, _ = settings(Cell(1, 0, "fp32", "none", 4, "none"))
    model = plain_model(config.model, seed=0)
    part = BATCH // 4
    return train_plainly(
        model,
        lambda forward, step, k: loss_of(forward, config, step, slice(k * part, (k + 1) * part), torch.float32),
        steps=STEPS,
        micro_batches=4,
        optimizer=make_optimizer(model, optim=config.optim),
        clip=config.optim.clip,
        lr_at_step=lambda step: LR,
    )


@dataclass(frozen=True)
class Outcome:
    """Largest differences from the reference over the steps."""

    loss: float
    """|loss - reference| / reference."""
    norm: float
    """The same of the norm of the gradient."""
    gradient: float
    """Norm of the difference of one parameter's gradient, by the norm of the whole gradient; largest over parameters."""


def engine_of(config: Config, ds: DsConfig) -> Engine:
    model = VisionTransformer(config.model, recompute=ds.recompute)
    initialise(model, seed=0)
    return Engine(model, make_optimizer(model, optim=config.optim), ds=ds, device=CPU)


def run_cell(cell: Cell, expected: list[Gradients]) -> Outcome:
    """Train the cell on its ranks and compare. Collective."""
    config, ds = settings(cell)
    engine = engine_of(config, ds)
    taken: dict[str, Tensor] = {}
    step_of_deepspeed = engine._engine.step

    def look_and_step() -> None:
        """Read the gradients where they are complete and not clipped yet."""
        if engine._engine.is_gradient_accumulation_boundary():
            for name, parameter in engine.module.named_parameters():
                found = before_clipping.get(name) if cell.stage == 0 else safe_get_full_grad(parameter)
                assert found is not None, name
                taken[name] = found.detach().float().clone()
        step_of_deepspeed()

    before_clipping: dict[str, Tensor] = {}
    clip_or_skip = engine._clip_or_skip_at_stage_0

    def look_and_clip() -> None:
        before_clipping.update({n: p.grad.clone() for n, p in engine.module.named_parameters() if p.grad is not None})
        clip_or_skip()

    engine._engine.step = look_and_step
    engine._clip_or_skip_at_stage_0 = look_and_clip  # type: ignore[method-assign]
    engine.train()
    share, micro = BATCH // cell.world, ds.micro_batch
    worst = [0.0, 0.0, 0.0]
    for step, wanted in enumerate(expected):
        engine.set_lr(LR)
        total = 0.0
        for k in range(cell.accumulation):
            start = engine.rank * share + k * micro
            loss = loss_of(engine, config, step, slice(start, start + micro), engine.input_dtype)
            total += loss.item() / cell.accumulation
            engine.backward_and_maybe_step(loss)
        mean = engine.sum_over_ranks([total])[0] / cell.world
        assert taken.keys() == wanted.gradients.keys()
        differences = [
            abs(mean - wanted.loss) / wanted.loss,
            abs(engine.grad_norm() - wanted.norm) / wanted.norm,
            max(float((taken[name] - gradient).norm()) for name, gradient in wanted.gradients.items()) / wanted.norm,
        ]
        worst = [max(pair) for pair in zip(worst, differences, strict=True)]
    del engine._engine.step, engine._clip_or_skip_at_stage_0
    engine.close()
    return Outcome(*worst)


def run_world(cluster: Cluster, expected: list[Gradients]) -> tuple[dict[Cell, Outcome], list[int]]:
    """All possible cells of one world in one process, and how many tensors were alive after each."""
    torch.set_num_threads(1)  # a second thread only waits, with so little to do
    outcomes, alive = {}, []
    for cell in chosen():
        if cell.world == cluster.world and not is_impossible(cell):
            outcomes[cell] = run_cell(cell, expected)
            alive.append(tensors_left())
    return outcomes, alive


def tensors_left(patience_s: float = 10.0) -> int:
    """How many tensors are alive, when `patience_s` seconds have passed or none is."""
    until_s = time.monotonic() + patience_s
    while True:
        gc.collect()
        count = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
        if not count or time.monotonic() > until_s:
            return count
        time.sleep(0.05)  # gloo's threads let go of what they have sent a little after the wait for it has ended


def refusal(cell: Cell) -> str:
    try:
        settings(cell)
    except UsageError as error:
        return str(error)
    return ""


def table(outcomes: dict[Cell, Outcome]) -> Iterator[str]:
    yield "| ranks | ZeRO | precision | recomputed | accumulation | offload | loss | norm | gradient |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for cell in chosen():
        row = " | ".join(map(str, astuple(cell)))
        found = outcomes.get(cell)
        yield f"| {row} | " + (f"{found.loss:.1e} | {found.norm:.1e} | {found.gradient:.1e} |" if found else "refused | | |")


PREAMBLE = f"""# Everything against plain torch

Written by `python -m tests.measure.matrix`; `tests/vitscale/training/test_matrix.py` runs the same cells and holds them
to a tolerance. A ViT of width 32 and depth 2 on 8 px images, {STEPS} steps of {BATCH} images with AdamW and clipping, on gloo
ranks of one machine without a GPU, against `vitscale/training/reference.py` in float32. All cells of one world run in one
process, one engine after the other.

loss, norm: largest relative difference of a step's loss and gradient norm. gradient: the norm of the difference of one
parameter's gradient by the norm of the whole gradient, largest over parameters and steps. Offload means the optimizer's
state, and at stage 3 the parameters too. fp32 differs by the order of sums; bf16 by its 8 bits of mantissa.

"""


def main() -> None:
    torch.set_num_threads(1)  # a pool of threads does not survive the fork that starts the ranks
    expected = reference()
    outcomes: dict[Cell, Outcome] = {}
    for world in WORLDS:
        outcomes |= run_ranks(world, run_world, expected)[0][0]
    lines = [*table(outcomes), "", f"refused: {refusal(Cell(1, 0, 'fp32', 'none', 1, 'cpu'))}"]
    print("\n".join(lines))
    DOCUMENT.write_text(PREAMBLE + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
