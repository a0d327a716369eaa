"""Engines of a model so small that fifty steps at every ZeRO stage take seconds, and the whole tensors they hold."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.config import Config, apply_overrides
from vitscale.ds_config import DsConfig, resolve_ds_config
from vitscale.model.layers import normalise_pixels
from vitscale.model.vit import VisionTransformer, initialise
from vitscale.recipes.catalog import recipe_named
from vitscale.training.collectives import from_all_ranks
from vitscale.training.engine import Engine
from vitscale.training.optim import make_optimizer
from vitscale.training.pieces import Partition

CPU = torch.device("cpu")
BATCH = 12
# Without biases on queries, keys and values: a bias on keys has no gradient but rounding, which Adam and Lion take as large.
SMALL = (
    "model.width=16",
    "model.heads=2",
    "model.depth=2",
    "model.qkv_bias=false",
    f"optim.global_batch={BATCH}",
    "optim.micro_batch_max=6",
    "train.precision=fp32",
)


def settings(stage: int, world: int, *overrides: str) -> tuple[Config, DsConfig]:
    """At stage 3 with several sub-groups, which are stepped one after the other."""
    config = apply_overrides(recipe_named("digits"), [*SMALL, *overrides])
    zero = {"stage": stage, **({"sub_group_size": 1500} if stage == 3 else {})}
    return config, resolve_ds_config({"zero_optimization": zero}, config=config, world=world)


def fresh_model(config: Config) -> VisionTransformer:
    """With a head that is not zero, so that every parameter has a gradient from the first step on."""
    model = VisionTransformer(config.model)
    initialise(model, seed=0)
    torch.nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return model


def make(config: Config, ds: DsConfig) -> Engine:
    model = fresh_model(config)
    return Engine(model, make_optimizer(model, optim=config.optim), ds=ds, device=CPU, ema=config.train.ema)


def batch_of(step: int, config: Config) -> tuple[Tensor, Tensor]:
    """(pixels BCHW, labels B) of a whole global batch."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (BATCH, 8, 8, 3), generator=generator, dtype=torch.uint8)
    pixels = normalise_pixels(images, config.model.pixel_mean, config.model.pixel_std, torch.float32)
    return pixels, torch.randint(0, 10, (BATCH,), generator=generator)


def train(
    engine: Engine,
    config: Config,
    steps: range,
    *,
    poison: int | None = None,
    after: Callable[[int], None] = lambda step: None,
    lr: float = 1e-2,
) -> list[float]:
    """Mean loss over the global batch of each step; at step `poison` the loss of the last rank is NaN."""
    share, losses = BATCH // engine.world, []
    micro = share // engine.accumulation_steps
    for step in steps:
        engine.train()
        pixels, labels = (whole[engine.rank * share :][:share] for whole in batch_of(step, config))
        engine.set_lr(lr)
        total = 0.0
        for k in range(engine.accumulation_steps):
            part = slice(k * micro, (k + 1) * micro)
            loss = F.cross_entropy(engine(pixels[part].to(engine.input_dtype)).float(), labels[part])
            total += loss.item() / engine.accumulation_steps
            if step == poison and engine.rank == engine.world - 1:
                loss = loss * float("nan")
            engine.backward_and_maybe_step(loss)
        losses.append(engine.sum_over_ranks([total])[0] / engine.world)
        after(step)
    return losses


def whole_tensors(engine: Engine, of: Callable[[Partition], Tensor] = lambda partition: partition.master) -> dict[str, Tensor]:
    """A tensor of every partition put together to whole parameters, from the pieces of all ranks. Collective."""
    mine = [
        (piece, of(partition).detach().reshape(-1)[piece.offset : piece.offset + piece.numel].clone())
        for partition in engine.partitions
        for piece in partition.pieces
    ]
    whole: dict[str, Tensor] = {}
    for pieces in from_all_ranks(mine):
        for piece, values in pieces:
            target = whole.setdefault(piece.name, torch.full(piece.shape, float("nan")))
            target.view(-1)[piece.start : piece.start + piece.numel] = values
    assert not any(values.isnan().any() for values in whole.values())
    return whole
