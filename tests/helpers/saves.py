"""Checkpoints that two ranks of a tiny real training have saved, at each ZeRO stage; made in seconds."""

import os
from pathlib import Path

from tests.helpers import small_engine
from tests.helpers.ranks import run_ranks
from vitscale.base.cluster import Cluster
from vitscale.training.checkpoint import TrainState
from vitscale.training.engine import Engine
from vitscale.training.saving import save_checkpoint

STAGES = (0, 1, 2, 3)
TINY = ("model.depth=1", "train.ema=[0.9]")


def save(engine: Engine, checkpoints: Path, *, step: int, keep_last: int = 2) -> None:
    """One committed checkpoint. Collective."""
    state = TrainState(step=step, position=96 * step, images_seen=96 * step)
    save_checkpoint(engine, checkpoints, state=state, data={"seed": 7}, last=keep_last)


def train_and_save(cluster: Cluster, checkpoints: Path, stage: int, steps: tuple[int, ...]) -> None:
    """Train and save after each of `steps`."""
    config, ds = small_engine.settings(stage, cluster.world, *TINY)
    engine = small_engine.make(config, ds)
    done = 0
    for step in steps:
        small_engine.train(engine, config, range(done, step))
        save(engine, checkpoints, step=step)
        done = step
    engine.close()


def _every_stage(cluster: Cluster, place: Path, steps: tuple[int, ...]) -> None:
    for stage in STAGES:
        train_and_save(cluster, place / str(stage), stage, steps)


def real_checkpoints(place: Path, *, steps: tuple[int, ...] = (2, 4)) -> dict[int, Path]:
    """By ZeRO stage a `checkpoints` directory with the given steps."""
    run_ranks(2, _every_stage, place, steps)
    return {stage: place / str(stage) for stage in STAGES}


def linked(source: Path, target: Path) -> Path:
    """A copy that shares its files: replace them, never write into them."""
    for folder, _, names in os.walk(source):
        there = target / Path(folder).relative_to(source)
        there.mkdir(parents=True)
        for name in names:
            os.link(Path(folder) / name, there / name)
    return target
