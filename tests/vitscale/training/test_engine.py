"""The engine does what bare torch does, at every ZeRO stage, precision and world size, and its files bring it back."""

import contextlib
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from tests.helpers.ranks import run_ranks
from vitscale.base.cluster import Cluster
from vitscale.base.errors import EnvironmentFault
from vitscale.config import Config, apply_overrides
from vitscale.ds_config import DsConfig, resolve_ds_config
from vitscale.model.layers import normalise_pixels
from vitscale.model.vit import VisionTransformer, initialise
from vitscale.recipes.catalog import recipe_named
from vitscale.training.checkpoint import TrainState, find_checkpoint, load_checkpoint
from vitscale.training.engine import Engine, checkpoint_function
from vitscale.training.objective import Objective
from vitscale.training.optim import make_optimizer
from vitscale.training.partitions import consolidate
from vitscale.training.saving import save_checkpoint

CPU = torch.device("cpu")
STEPS = 6
BATCH = 24  # bfloat16 is slow without a GPU
CELLS = [(stage, precision) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
# Worst relative difference seen against the reference, of a loss and of a norm: fp32 7e-8 and 1.4e-7 (other order of
# sums), bf16 1.1e-4 and 3.7e-3 (8 bits of mantissa).
TOLERANCE = {"fp32": 2e-6, "bf16": 6e-4}


def settings(stage: int, precision: str, world: int, **sections: dict) -> tuple[Config, DsConfig]:
    overrides = [f"train.precision={precision}", f"optim.global_batch={BATCH}", "optim.micro_batch_max=4", "model.depth=2"]
    config = apply_overrides(recipe_named("digits"), overrides)
    record = {"zero_optimization": {"stage": stage}, "vitscale": {"recompute": "all"}, **sections}
    return config, resolve_ds_config(record, config=config, world=world)


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (BATCH, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 10, (BATCH,), generator=generator)


def make(config: Config, ds: DsConfig) -> Engine:
    model = VisionTransformer(config.model, recompute=ds.recompute, checkpoint_function=checkpoint_function(ds, CPU))
    initialise(model, seed=0)
    return Engine(model, make_optimizer(model, optim=config.optim), ds=ds, device=CPU)


def run(engine: Engine, config: Config, steps: range, *, poison: tuple[int, int] | None = None) -> list[tuple[float, float]]:
    """(mean loss over the global batch, gradient norm) of each step; `poison` = (rank, step) gets a NaN loss there."""
    objective = Objective(model=config.model, label_smoothing=0.0, device=CPU, dtype=engine.input_dtype)
    share, micro = BATCH // engine.world, engine.ds.micro_batch
    results = []
    engine.train()
    for step in steps:
        images, labels = (whole[engine.rank * share :][:share] for whole in batch_of(step))
        engine.set_lr(1e-3)
        total = 0.0
        for k in range(engine.accumulation_steps):
            part = slice(k * micro, (k + 1) * micro)
            loss = objective(engine, images[part], labels[part, None], step=step, first_slot=0).trained
            if poison == (engine.rank, step) and k == 0:
                loss = loss * float("nan")
            engine.backward_and_maybe_step(loss)
            total += loss.item() / engine.accumulation_steps
        results.append((engine.sum_over_ranks([total])[0] / engine.world, engine.grad_norm()))
    return results


def bare_torch() -> list[tuple[float, float]]:
    """The same steps without DeepSpeed, in one process and one batch."""
    config, _ = settings(0, "fp32", 1)
    model = VisionTransformer(config.model)
    initialise(model, seed=0)
    optimizer = make_optimizer(model, optim=config.optim)
    results = []
    for step in range(STEPS):
        images, labels = batch_of(step)
        pixels = normalise_pixels(images, config.model.pixel_mean, config.model.pixel_std, torch.float32)
        optimizer.param_groups[0]["lr"] = 1e-3
        optimizer.zero_grad()
        loss = F.cross_entropy(model(pixels), labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        results.append((loss.item(), float(norm)))
    return results


def one_cell(cluster: Cluster, stage: int, precision: str, place: Path) -> dict:
    config, ds = settings(stage, precision, cluster.world)
    checkpoints = place / f"{cluster.world}-{stage}-{precision}"
    engine = make(config, ds)
    first = run(engine, config, range(3))
    save_checkpoint(engine, checkpoints, state=TrainState(step=3), data={}, last=1, every=0)
    rest = run(engine, config, range(3, STEPS))
    engine.close()

    engine = make(config, ds)
    saved = find_checkpoint(checkpoints, say=print)
    assert saved is not None
    load_checkpoint(engine, saved)
    rest_again = run(engine, config, range(3, STEPS))
    engine.close()

    whole = consolidate(saved.directory)
    same_as_deepspeed = None
    if stage > 0 and cluster.rank == 0:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            theirs = get_fp32_state_dict_from_zero_checkpoint(str(checkpoints), saved.directory.name)
        same_as_deepspeed = whole.keys() == theirs.keys() and all(torch.equal(whole[n], theirs[n].float()) for n in whole)
    return {"losses": first + rest, "resumed": rest_again, "same_as_deepspeed": same_as_deepspeed}


def all_cells(cluster: Cluster, place: Path) -> dict:
    return {(stage, precision): one_cell(cluster, stage, precision, place) for stage, precision in CELLS}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_stage_trains_like_bare_torch_and_resumes_bit_for_bit(world, tmp_path):
    reference = bare_torch()
    by_rank = run_ranks(world, all_cells, tmp_path)
    for (stage, precision), cell in by_rank[0].items():
        where = f"world {world}, stage {stage}, {precision}"
        for (loss, norm), (loss_reference, norm_reference) in zip(cell["losses"], reference, strict=True):
            assert loss == pytest.approx(loss_reference, rel=TOLERANCE[precision]), where
            assert norm == pytest.approx(norm_reference, rel=30 * TOLERANCE[precision]), where
        assert cell["resumed"] == cell["losses"][3:], f"{where}: the restored engine went another way"
        assert cell["same_as_deepspeed"] in (None, True), f"{where}: the partition maps give other weights than DeepSpeed"
        assert all(other[stage, precision]["losses"] == cell["losses"] for other in by_rank), f"{where}: ranks disagree"


WAYS = {
    "selective": {"vitscale": {"recompute": "selective"}},
    "deepspeed": {"activation_checkpointing": {"synchronize_checkpoint_boundary": True}},
}


def all_ways(cluster: Cluster) -> dict:
    losses = {}
    for way, sections in WAYS.items():
        for stage in (0, 1, 2, 3):
            config, ds = settings(stage, "fp32", cluster.world, **sections)
            engine = make(config, ds)
            losses[way, stage] = run(engine, config, range(STEPS))
            engine.close()
    return losses


@pytest.mark.slow
def test_every_way_to_recompute_trains_like_bare_torch():
    reference = bare_torch()
    for (way, stage), results in run_ranks(2, all_ways)[0].items():
        for (loss, norm), (loss_reference, norm_reference) in zip(results, reference, strict=True):
            assert loss == pytest.approx(loss_reference, rel=TOLERANCE["fp32"]), (way, stage)
            assert norm == pytest.approx(norm_reference, rel=30 * TOLERANCE["fp32"]), (way, stage)


def test_checkpointing_in_host_memory_needs_an_accelerator():
    _, ds = settings(2, "fp32", 1, activation_checkpointing={"cpu_checkpointing": True})
    with pytest.raises(EnvironmentFault, match="cpu_checkpointing needs an accelerator"):
        checkpoint_function(ds, CPU)


def draws(cluster: Cluster) -> list[list[float]]:
    config, ds = settings(2, "fp32", cluster.world)
    engine = make(config, ds)
    rows = []
    for seed, step, micro_batch in [(1, 2, 0), (1, 2, 1), (1, 3, 0), (2, 2, 0), (1, 2, 0)]:
        engine.seed_micro_batch(seed, step, micro_batch)
        rows.append(torch.rand(3).tolist())
    return rows


@pytest.mark.slow
def test_generators_are_keyed_by_seed_step_rank_and_micro_batch():
    by_rank = run_ranks(2, draws)
    for rows in by_rank:
        assert rows[0] == rows[4] and len({tuple(row) for row in rows}) == 4
    assert by_rank[0][0] != by_rank[1][0]


def poisoned(cluster: Cluster, place: Path) -> dict:
    """Per stage: losses with a NaN at step 1 on the last rank, whether it was skipped, and losses that never saw step 1."""
    results = {}
    for stage in (0, 1, 2, 3):
        config, ds = settings(stage, "fp32", cluster.world)
        engine = make(config, ds)
        run(engine, config, range(1))
        run(engine, config, range(1, 2), poison=(cluster.world - 1, 1))
        skipped = engine.last_step_skipped
        after = run(engine, config, range(2, 4))
        engine.close()
        engine = make(config, ds)
        run(engine, config, range(1))
        without = run(engine, config, range(2, 4))
        engine.close()
        results[stage] = (skipped, after, without)
    return results


@pytest.mark.slow
def test_a_nan_on_one_rank_is_skipped_by_all_and_leaves_no_trace(tmp_path):
    for of_rank in run_ranks(2, poisoned, tmp_path):
        for stage, (skipped, after, without) in of_rank.items():
            assert skipped, f"stage {stage} took a non-finite step"
            assert after == without, f"stage {stage}: the skipped step changed parameters or optimizer state"
