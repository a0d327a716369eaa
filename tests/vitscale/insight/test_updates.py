"""How far a step moves the weights is counted on the partitions of any ZeRO stage, and changes nothing."""

import numpy as np
import pytest
import torch

from tests.helpers.ranks import run_ranks
from vitscale.base.cluster import Cluster
from vitscale.config import apply_overrides
from vitscale.ds_config import resolve_ds_config
from vitscale.insight.updates import EDGES, UpdateWatcher, place_of, places_of, row_of
from vitscale.model.layers import normalise_pixels
from vitscale.model.vit import VisionTransformer, initialise
from vitscale.recipes.catalog import recipe_named
from vitscale.training.engine import Engine
from vitscale.training.optim import make_optimizer

CPU = torch.device("cpu")
CONFIG = apply_overrides(recipe_named("digits"), ["model.depth=2", "optim.micro_batch_max=16", "optim.clip=0"])
IMAGES = torch.randint(0, 256, (16, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Kept:
    """Takes the place of Metrics."""

    def log_histograms(self, step, counts, edges, scalars):
        self.step, self.counts, self.edges, self.scalars = step, counts, edges, scalars


def masters(engine: Engine) -> list[torch.Tensor]:
    return [partition.master.detach().clone() for partition in engine.partitions]


def watch_once(cluster: Cluster, stage: int):
    ds = resolve_ds_config({"zero_optimization": {"stage": stage}}, config=CONFIG, world=cluster.world)
    model = VisionTransformer(CONFIG.model)
    initialise(model, seed=0)
    engine = Engine(model, make_optimizer(model, optim=CONFIG.optim), ds=ds, device=CPU)
    kept = Kept() if cluster.rank == 0 else None
    watcher = UpdateWatcher(engine, depth=2, metrics=kept)
    engine.train()
    pixels = normalise_pixels(IMAGES, (0.5,) * 3, (0.5,) * 3, engine.input_dtype)
    for step in (1, 2):  # the head starts at 0, so the second step is the first to move what lies below it
        if step == 2:
            watcher.before_step()
        for _ in range(engine.accumulation_steps):
            engine.backward_and_maybe_step((engine(pixels) - 1).square().mean())
    before = masters(engine)
    watcher.after_step(2)
    assert all(a.equal(b) for a, b in zip(before, masters(engine), strict=True)) and not watcher._before
    return (kept.step, kept.counts, kept.scalars) if kept is not None else None


def test_counts_are_the_same_at_every_stage_and_on_any_number_of_ranks():
    results = {(stage, world): run_ranks(world, watch_once, stage)[0] for stage, world in [(0, 1), (0, 2), (2, 2), (3, 2)]}
    step, counts, ratios = results[0, 1]
    assert step == 2 and set(ratios) == {f"update_ratio/{place}" for place in ("embedding", "block_01", "block_02", "head")}
    assert all(1e-5 < ratio < 1 for ratio in ratios.values())
    sizes = {name: numbers.sum() for name, numbers in counts.items()}
    block = sum(p.numel() for p in VisionTransformer(CONFIG.model).blocks[0].parameters())
    assert 0.9 * block < sizes["updates/log10_of_ratio_block_01"] <= block  # biases and the like may still be 0
    for where, (_, others, other_ratios) in results.items():
        assert other_ratios == pytest.approx(ratios, rel=1e-4), where
        for name, numbers in others.items():
            assert np.abs(numbers - counts[name]).sum() <= 0.002 * sizes[name], (where, name)  # neighbours of an edge


def test_a_row_counts_ratios_by_decade_and_leaves_out_weights_of_zero():
    before = torch.tensor([1.0, -2.0, 0.0, 5.0])
    after = torch.tensor([1.01, -2.02, 3.0, 5.0])
    row = row_of(before, after)
    counts, (moved, size) = row[:-2], row[-2:]
    in_bin = int((counts > 0).argmax())
    assert counts[0] == 1 and counts.sum() == 3  # what did not move stands in the lowest bin
    (middle,) = np.flatnonzero(counts == 2)
    assert in_bin == 0 and EDGES[middle] <= -2 + 1e-6 and EDGES[middle + 1] >= -2 - 1e-6
    assert moved == pytest.approx(0.01**2 + 0.02**2 + 9, rel=1e-5) and size == 1 + 4 + 25


def test_every_parameter_has_a_place():
    model = VisionTransformer(CONFIG.model)
    places = [place_of(name) for name, _ in model.named_parameters()]
    assert set(places) == set(places_of(2))
    assert place_of("attn_pool.latent") == place_of("norm.weight") == "head" and place_of("blocks.10.ls1.gamma") == "block_11"
