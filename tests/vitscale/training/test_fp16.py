"""fp16: losses are scaled, overflows are skipped steps, gradient norms are unscaled, and a resume keeps the scale.

DeepSpeed finds fp16 unsupported on most CPUs, though torch computes in it (slowly); the ranks here tell it otherwise.
"""

from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.measure.matrix import CPU, LR, Cell, engine_of, loss_of, reference, settings
from vitscale.base.cluster import Cluster
from vitscale.base.errors import DivergedError, EnvironmentFault, UsageError
from vitscale.config import Config, apply_overrides
from vitscale.ds_config import DsConfig, resolve_ds_config
from vitscale.training.checkpoint import TrainState, find_checkpoint, load_checkpoint
from vitscale.training.engine import Engine, get_accelerator
from vitscale.training.saving import save_checkpoint

GENTLE = {"initial_scale_power": 8}
# 2^30 times a gradient of 1e-2 is above fp16's 65504, 2^8 times it is not.
HARSH = {"initial_scale_power": 30, "hysteresis": 1}


def fp16_settings(stage: int, world: int, **fp16: int) -> tuple[Config, DsConfig]:
    config, _ = settings(Cell(world, 1, "fp32", "none", 1, "none"))
    config = apply_overrides(config, ["train.precision=fp16"])
    record = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 2, "fp16": fp16}
    return config, resolve_ds_config(record, config=config, world=world)


def train(engine: Engine, config: Config, steps: range) -> list[tuple[float, float, bool, float]]:
    """(loss, gradient norm, skipped, loss scale after it) of each step."""
    lines = []
    share = 24 // engine.world
    for step in steps:
        engine.set_lr(LR)
        total = 0.0
        for k in range(2):
            start = engine.rank * share + k * share // 2
            loss = loss_of(engine, config, step, slice(start, start + share // 2), engine.input_dtype)
            total += loss.item() / 2
            engine.backward_and_maybe_step(loss)
        mean = engine.sum_over_ranks([total])[0] / engine.world
        lines.append((mean, engine.grad_norm(), bool(engine.last_step_skipped), engine.loss_scale()))
    return lines


def on_ranks(cluster: Cluster, place: Path) -> dict:
    get_accelerator().is_fp16_supported = lambda: True
    found = {}
    for stage in (1, 2, 3):
        config, ds = fp16_settings(stage, cluster.world, **GENTLE)
        engine = engine_of(config, ds)
        assert engine.input_dtype == torch.float16
        gentle = train(engine, config, range(4))
        engine.close()

        config, ds = fp16_settings(stage, cluster.world, **HARSH)
        engine = engine_of(config, ds)
        first = train(engine, config, range(4))
        save_checkpoint(engine, place / f"{stage}", state=TrainState(step=4), data={}, last=1)
        rest = train(engine, config, range(4, 6))
        engine.close()
        engine = engine_of(config, ds)
        saved = find_checkpoint(place / f"{stage}", say=print)
        assert saved is not None
        load_checkpoint(engine, saved)
        again = train(engine, config, range(4, 6))
        engine.close()

        config, ds = fp16_settings(stage, cluster.world, **HARSH, min_loss_scale=2**30)
        engine = engine_of(config, ds)
        try:
            train(engine, config, range(2))
            diverged = ""
        except DivergedError as error:
            diverged = str(error)
        engine.close()
        found[stage] = (gentle, first, rest, again, diverged)
    return found


@pytest.mark.slow
def test_fp16_trains_like_plain_torch_skips_overflows_and_keeps_its_scale(tmp_path):
    expected = reference()
    by_rank = run_ranks(2, on_ranks, tmp_path)
    assert by_rank[0] == by_rank[1]
    for stage, (gentle, first, rest, again, diverged) in by_rank[0].items():
        for (loss, norm, skipped, scale), wanted in zip(gentle, expected, strict=False):
            assert loss == pytest.approx(wanted.loss, rel=2e-4) and not skipped and scale == 2**8, stage
            assert norm == pytest.approx(wanted.norm, rel=2e-3), f"stage {stage}: the norm is not that of the unscaled gradient"
        # A skipped step is a step: the same weights see the next images, and the scale is halved.
        assert [line[2] for line in first] == [True] * 4, stage
        assert [line[3] for line in first] == [2.0**29, 2.0**28, 2.0**27, 2.0**26], stage
        assert first[0][0] == pytest.approx(expected[0].loss, rel=2e-4), stage
        assert again == rest, f"stage {stage}: another loss scale after the resume"
        assert "overflow fp16 at the smallest loss scale" in diverged, stage


def refused(cluster: Cluster) -> str:
    config, ds = fp16_settings(2, cluster.world)
    get_accelerator().is_fp16_supported = lambda: False
    with pytest.raises(EnvironmentFault) as caught:
        engine_of(config, ds)
    return str(caught.value)


def test_a_device_without_fp16_is_named():
    said = run_ranks(1, refused)[0]
    assert "train.precision=fp16 needs a device that computes in it" in said and f"which {CPU.type} here does not" in said
    assert "bf16 or fp32" in said
    with pytest.raises(UsageError, match="not offered at ZeRO stage 0"):
        fp16_settings(0, 1)
