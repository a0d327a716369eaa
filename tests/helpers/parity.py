"""The gradient check on a tiny model, with an engine that may have been spoiled."""

from collections.abc import Callable

import torch

from vitscale.config import Config, apply_overrides
from vitscale.ds_config import DsConfig, resolve_ds_config
from vitscale.model.compile import compile_blocks
from vitscale.model.vit import VisionTransformer
from vitscale.recipes.catalog import recipe_named
from vitscale.training.engine import Engine, checkpoint_function
from vitscale.training.objective import Objective
from vitscale.training.optim import make_optimizer
from vitscale.training.parity import MicroBatchLoss, Verdict, Weights, check_gradients

CPU = torch.device("cpu")
TINY = ("model.depth=2", "model.width=32", "model.heads=2", "optim.clip=0", "optim.micro_batch_max=4")


def settings(world: int, *overrides: str, accumulation: int = 2, **sections: dict) -> tuple[Config, DsConfig]:
    """The digits recipe on a tiny model, and ds_config's sections resolved for it."""
    batch = f"optim.global_batch={4 * accumulation * world}"
    config = apply_overrides(recipe_named("digits"), [*TINY, batch, *overrides])
    return config, resolve_ds_config(sections, config=config, world=world)


def loss_of(config: Config) -> Callable[[torch.dtype], MicroBatchLoss]:
    def of_dtype(dtype: torch.dtype) -> MicroBatchLoss:
        objective = Objective(model=config.model, label_smoothing=0.1, device=CPU, dtype=dtype)
        return lambda f, images, labels, slot: objective(f, images, labels[:, None], step=0, first_slot=slot).trained

    return of_dtype


def check(config: Config, ds: DsConfig, spoil: Callable[[Engine], None] = lambda engine: None) -> Verdict:
    """Collective. `spoil` may change the engine before its step."""

    def make_engine(weights: Weights) -> Engine:
        model = VisionTransformer(
            config.model,
            recompute=ds.recompute,
            drop_path=config.train.drop_rates(config.model.depth),
            checkpoint_function=checkpoint_function(ds, CPU),
        )
        model.load_state_dict(weights)
        if ds.compile_blocks:
            assert compile_blocks(model, batch=ds.micro_batch, dtype=torch.float32, say=print)
        engine = Engine(model, make_optimizer(model, optim=config.optim), ds=ds, device=CPU)
        spoil(engine)
        return engine

    return check_gradients(make_engine, loss_of(config), config=config, ds=ds, device=CPU)
