"""What a run needs, resolved and checked before any process group exists: lengths in steps, datasets, room in the cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.cache import CacheTooSmall
from data_pipeline.loader import mixture_of
from data_pipeline.manifest import Manifest
from data_pipeline.order import ORDER_VERSION
from data_pipeline.room import require_room
from launch.branch import Parent
from vitscale.base.cluster import Cluster
from vitscale.base.errors import UsageError
from vitscale.config import Config, check_mix_group, steps_of
from vitscale.ds_config import DsConfig
from vitscale.model.vit import kept_images
from vitscale.planning.peaks import peak_flops_of
from vitscale.planning.resolution import phases_of
from vitscale.training.rundir import Difference
from vitscale.training.schedule import Schedule
from vitscale.training.trainer import Plan

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a run needs, resolved and checked; equal on all ranks but for the cluster."""

    run: Path
    config: Config
    ds: DsConfig
    cluster: Cluster
    train_data: tuple[Manifest, ...]
    eval_data: Manifest | None
    plan: Plan
    schedule: Schedule
    keep_every_steps: int
    followed: list[Difference]
    """Machine and watching settings that differ from the stored run."""
    source: str | None
    """Weights a fine-tuning starts from, as `load_weights_of` takes them."""
    parent: Parent | None = None
    """Where a branch starts from; needed until it has a checkpoint of its own."""


def make_plan(config: Config, ds: DsConfig, epoch_images: int) -> tuple[Plan, Schedule, int]:
    """All lengths in steps: (plan, schedule, keep-every steps).

    Raises UsageError for a length that is none, and for groups of mixup that do not fit the micro-batch.
    """
    check_mix_group(config, micro_batch=ds.micro_batch, accumulation=ds.accumulation)

    def steps(name: str, length: int | str, total: int | None) -> int:
        try:
            batch = config.optim.global_batch
            return steps_of(length, global_batch=batch, epoch_images=epoch_images, total_steps=total)
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from None

    total = steps("train.length", config.train.length, None)
    if total < 1:
        raise UsageError(f"train.length={config.train.length!r} is no step at all; expected at least one step")
    optim = config.optim
    warmup, cooldown, timescale = (
        steps(f"optim.{name}", getattr(optim, name), total) for name in ("warmup", "cooldown", "timescale")
    )
    if warmup > total:
        raise UsageError(
            f"optim.warmup={optim.warmup!r} is {warmup} steps, longer than the run of {total} steps; "
            "shorten optim.warmup or lengthen train.length"
        )
    if warmup + cooldown > total:
        raise UsageError(
            f"optim.warmup={optim.warmup!r} and optim.cooldown={optim.cooldown!r} are {warmup} + {cooldown} steps, longer than "
            f"the run of {total} steps; shorten one of them or lengthen train.length"
        )
    if timescale < 1:
        raise UsageError(f"optim.timescale={optim.timescale!r} is no step at all; expected at least one step")
    schedule = Schedule(optim=optim, warmup_steps=warmup, cooldown_steps=cooldown, timescale_steps=timescale, total_steps=total)
    watch = {
        name: steps(f"run.{name}", getattr(config.run, name), total)
        for name in ("log_every", "eval_every", "save_every", "attention_every", "histograms_every", "integrity_every")
        if not (name == "save_every" and config.run.save_every == AUTO)
    }
    rates, micro = config.train.drop_rates(config.model.depth), ds.micro_batch
    try:
        phases = phases_of(
            config.model,
            config.train.resolutions,
            steps_of_length=lambda length: steps("train.resolutions", length, total),
            total_steps=total,
            recompute=ds.recompute,
            kept=sum(kept_images(micro, rate) / micro for rate in rates) / len(rates),
        )
    except ValueError as error:
        raise UsageError(f"train.resolutions: {error}") from None
    plan = Plan(
        total_steps=total,
        global_batch=config.optim.global_batch,
        log_every_steps=watch["log_every"],
        eval_every_steps=watch["eval_every"],
        save_every_steps=watch.get("save_every", 0),
        attention_every_steps=watch["attention_every"],
        histograms_every_steps=watch["histograms_every"],
        integrity_every_steps=watch["integrity_every"],
        bad_images_max=config.data.bad_images_max,
        seed=config.train.seed,
        phases=phases,
        peak_flops=peak_flops_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None,
    )
    return plan, schedule, steps("run.keep_every", config.run.keep_every, total)


def require_cache(job: Job) -> None:
    """Raise CacheTooSmall, from one rank of each node with its words, where datasets on a store need a larger cache."""
    config, cluster = job.config, job.cluster
    first = cluster.rank - cluster.local_rank
    try:
        require_room(
            job.train_data,
            job.eval_data,
            data=config.data,
            seed=config.train.seed,
            global_batch=config.optim.global_batch,
            micro_batch=job.ds.micro_batch,
            steps=job.plan.total_steps,
            ranks=range(first, first + cluster.local_world),
            world=cluster.world,
        )
    except CacheTooSmall as error:
        error.every_rank_speaks = cluster.local_rank == 0
        raise


def order_record(config: Config, manifests: Sequence[Manifest]) -> dict[str, Any]:
    """What fixes the order of the images, besides the position: equal at every start of a run."""
    mixture = mixture_of(manifests, data=config.data, seed=config.train.seed)
    return {
        "order_version": ORDER_VERSION,
        "seed": config.train.seed,
        "classes": list(manifests[0].classes),
        "sources": [
            {"fingerprint": manifest.fingerprint, "weight_of_4096": weight, "lanes": order.lanes, "window": order.window}
            for manifest, weight, order in zip(manifests, mixture.weights, mixture.orders, strict=True)
        ],
    }
