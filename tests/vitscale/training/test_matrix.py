"""Every pair of settings trains like plain torch, and engines leave nothing behind (tests/measure/matrix.py)."""

import gc
import itertools
import weakref

import pytest

from tests.helpers.ranks import run_ranks
from tests.measure.matrix import (
    ALL,
    COLUMNS,
    WORLDS,
    Cell,
    chosen,
    engine_of,
    is_impossible,
    loss_of,
    pairs_of,
    reference,
    refusal,
    run_world,
    settings,
)
from vitscale.base.cluster import Cluster

# Three times the worst seen (docs/matrix.md). fp32: another order of sums, which ten steps of AdamW carry on; bf16: products
# with 8 bits of mantissa, and a gradient's small parts suffer first.
LOSS = {"fp32": 5e-7, "bf16": 6e-4}
NORM = {"fp32": 1e-6, "bf16": 1.8e-2}
GRADIENT = {"fp32": 3e-6, "bf16": 7e-2}


def test_the_chosen_cells_hold_every_possible_pair():
    possible = set().union(*(pairs_of(cell) for cell in ALL if not is_impossible(cell)))
    cells = chosen()
    assert set().union(*(pairs_of(cell) for cell in cells if not is_impossible(cell))) == possible
    for column, stage, world in itertools.product(COLUMNS, range(4), WORLDS):
        assert Cell(world, stage, *column) in cells


def test_what_is_impossible_is_refused_by_name_and_nothing_else():
    for cell in ALL:
        assert ("offload_optimizer.device=cpu would have no effect at stage 0" in refusal(cell)) == is_impossible(cell)
        assert bool(refusal(cell)) == is_impossible(cell)


@pytest.mark.slow
def test_every_pair_of_settings_trains_like_plain_torch():
    expected = reference()
    for world in WORLDS:
        for outcomes, alive in run_ranks(world, run_world, expected):
            assert outcomes.keys() == {cell for cell in chosen() if cell.world == world and not is_impossible(cell)}
            for cell, found in outcomes.items():
                assert found.loss <= LOSS[cell.precision], (cell, found)
                assert found.norm <= NORM[cell.precision], (cell, found)
                assert found.gradient <= GRADIENT[cell.precision], (cell, found)
            assert not any(alive), f"tensors outlive their engines: {alive}"


def what_is_left(cluster: Cluster) -> dict[int, list[bool]]:
    """Per stage: whether engine, optimizer wrapper and model are still there after `close`."""
    left = {}
    for stage in (0, 1, 2, 3):
        cell = Cell(1, stage, "fp32", "none", 1, "none")
        config, ds = settings(cell)
        engine = engine_of(config, ds)
        engine.backward_and_maybe_step(loss_of(engine, config, 0, slice(0, 24), engine.input_dtype))
        watched = [weakref.ref(thing) for thing in (engine._engine, engine.zero_optimizer, engine.module)]
        engine.close()
        del engine
        gc.collect()
        left[stage] = [reference() is not None for reference in watched]
    return left


def test_a_closed_engine_is_gone_at_every_stage():
    for stage, left in run_ranks(1, what_is_left)[0].items():
        assert not any(left), f"stage {stage}: DeepSpeed keeps engine, optimizer or model: {left}"
