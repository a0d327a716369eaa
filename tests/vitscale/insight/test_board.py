"""Attention is watched through the engine on any number of ranks, at any ZeRO stage, and changes nothing."""

import pytest
import torch

from tests.helpers.ranks import run_ranks
from vitscale.base.cluster import Cluster
from vitscale.config import apply_overrides
from vitscale.ds_config import resolve_ds_config
from vitscale.insight.board import attention_watcher, scalars_of
from vitscale.insight.look import look
from vitscale.model.layers import normalise_pixels
from vitscale.model.vit import VisionTransformer, initialise
from vitscale.recipes.catalog import recipe_named
from vitscale.training.engine import Engine
from vitscale.training.optim import make_optimizer

CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (3, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
CONFIG = apply_overrides(recipe_named("digits"), ["model.depth=2", "optim.micro_batch_max=16"])


class Kept:
    """Takes the place of Metrics."""

    def log_attention(self, step, picture_HWC, scalars):
        self.step, self.picture_HWC, self.scalars = step, picture_HWC, scalars


def fresh_model() -> VisionTransformer:
    model = VisionTransformer(CONFIG.model)
    initialise(model, seed=0)
    return model


def watch_once(cluster: Cluster, stage: int):
    ds = resolve_ds_config({"zero_optimization": {"stage": stage}}, config=CONFIG, world=cluster.world)
    model = fresh_model()
    engine = Engine(model, make_optimizer(model, optim=CONFIG.optim), ds=ds, device=CPU)
    kept = Kept() if cluster.rank == 0 else None
    attention_watcher(engine, IMAGES, metrics=kept)(7)
    # A step afterwards: watching left nothing behind that a backward pass trips over.
    engine.train()
    for _ in range(engine.accumulation_steps):
        pixels = normalise_pixels(IMAGES, (0.5,) * 3, (0.5,) * 3, engine.input_dtype)
        engine.backward_and_maybe_step(engine(pixels).square().mean())
    return (kept.step, kept.picture_HWC, kept.scalars) if kept is not None else None


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (1, 1), (2, 1), (2, 2), (3, 1), (3, 2)])
def test_the_engine_shows_what_the_model_shows(stage, world):
    first, *others = run_ranks(world, watch_once, stage)
    assert others == [None] * (world - 1)
    step, picture_HWC, scalars = first
    expected = scalars_of(look(fresh_model(), normalise_pixels(IMAGES, (0.5,) * 3, (0.5,) * 3, torch.float32)))
    assert step == 7 and scalars == pytest.approx(expected, rel=1e-5)
    kinds = ("entropy_nats", "distance_pixels", "largest_logit", "patch_norm")
    assert set(scalars) == {f"{what}/block_0{n}" for what in kinds for n in (1, 2)}
    assert picture_HWC.shape == (3 * 112 + 2 * 4, 3 * 112 + 2 * 4, 3) and picture_HWC.dtype.name == "uint8"
