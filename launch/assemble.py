"""Put a run together: configuration → streams, model, engine. With datasets.py the only place where data and training meet.

make_plan      before a process group exists: lengths in steps
require_cache  the same time: what the datasets need of the cache is there
carry_out      start the ranks, make the engine, restore, train, evaluate, mark as finished
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.cache import CacheTooSmall
from data_pipeline.deaths import WorkerDeath
from data_pipeline.loader import eval_stream, mixture_of, train_stream
from data_pipeline.manifest import Manifest
from data_pipeline.names import names_at
from data_pipeline.order import ORDER_VERSION
from data_pipeline.room import require_room
from data_pipeline.stream import worker_pids
from launch.branch import Parent, load_parent
from launch.engines import evaluate_engine, make_engine, pin_attention, silent
from launch.gate import prove_gradients
from launch.phased import PhasedStream
from launch.trained import load_weights_of
from vitscale.base.cluster import Cluster
from vitscale.base.errors import UsageError
from vitscale.config import Config, check_mix_group, steps_of
from vitscale.ds_config import DsConfig
from vitscale.evaluation.classification import Scores
from vitscale.insight.board import IMAGES, attention_watcher
from vitscale.insight.updates import UpdateWatcher
from vitscale.model.vit import kept_images
from vitscale.planning.cadence import between_failures_s
from vitscale.planning.peaks import peak_flops_of
from vitscale.planning.resolution import flops_until, phases_of
from vitscale.training.ahead import ahead_of
from vitscale.training.checkpoint import Saved, TrainState, find_checkpoint, load_checkpoint
from vitscale.training.engine import Engine, from_all_ranks, from_rank_zero, leave_ranks, start_ranks
from vitscale.training.guard import Guard, RollBack
from vitscale.training.integrity import Integrity
from vitscale.training.metrics import Metrics, append_event, complain
from vitscale.training.objective import objective_of
from vitscale.training.peers import Peer, lost_ranks_are_transient, meet
from vitscale.training.preflight import require_equal_hosts
from vitscale.training.rollback import finish_rollbacks, roll_back, taken_up, tell
from vitscale.training.rundir import Difference, begin_attempt, leased, mark_finished, require_shared_directory
from vitscale.training.saving import Outcome, Retention, Saver
from vitscale.training.schedule import Schedule
from vitscale.training.steering import Steering, steering_of
from vitscale.training.trainer import Plan, train
from vitscale.training.watch import Watch

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


def carry_out(job: Job) -> None:
    """Run the job to its end, or continue it where its newest usable checkpoint stands."""
    device = start_ranks(job.cluster)
    require_equal_hosts(job.cluster, say=complain)
    peers = meet(job.cluster)
    with lost_ranks_are_transient(peers, job.cluster.rank), leased(job.run, job.cluster) as lease:
        stop_after, total = job.config.run.stop_after, job.plan.total_steps
        steering = steering_of(job.run, job.cluster, total_steps=total, stop_after=stop_after, lease=lease)
        _carry_out(job, device, steering, peers)
    leave_ranks()


def _carry_out(job: Job, device: torch.device, steering: Steering, peers: tuple[Peer, ...]) -> None:
    config = job.config
    require_shared_directory(job.run, job.cluster)
    finish_rollbacks(job.run, rank=job.cluster.rank)
    saved = find_checkpoint(job.run / "checkpoints", say=complain)
    attempt = begin_attempt(job.run, config=config, ds=job.ds, cluster=job.cluster, followed=job.followed)

    initial = load_weights_of(job.source) if job.source is not None and saved is None else None
    order = order_record(config, job.train_data)
    if saved is not None and saved.data != order:
        raise UsageError(
            f"{saved.directory} stands in another order than this program would read: {saved.data} against {order}; "
            "continue it with the version it was started with"
        )
    pin_attention(job.run, config, job.ds, device=device)
    if config.run.parity == "first":
        prove_gradients(config, job.ds, run=job.run, device=device)
    engine = make_engine(config, job.ds, initial=initial, device=device, say=complain if job.cluster.rank == 0 else silent)
    if saved is not None:
        state = load_checkpoint(engine, saved)
    else:
        state = load_parent(engine, job.parent, config) if job.parent is not None else TrainState()
    state, rollbacks = taken_up(job.run, state, rank=job.cluster.rank)
    metrics = None
    if job.cluster.rank == 0:
        metrics = Metrics(job.run, total_steps=job.plan.total_steps, work_until=lambda step: flops_until(job.plan.phases, step))
        metrics.open(state.step)
        metrics.say(_banner(job, saved, state))
        tell(metrics, rollbacks)

    watch = Watch(
        job.run,
        attempt=attempt,
        peers=peers,
        rank=job.cluster.rank,
        timeout_s=config.run.step_timeout,
        workers=worker_pids,
    )
    objective = objective_of(config, device=device, dtype=engine.input_dtype)
    integrity = Integrity(engine, every_steps=job.plan.integrity_every_steps, host=job.cluster.host, metrics=metrics)
    last_scores: list[Scores] = []

    def evaluate() -> Scores:
        assert job.eval_data is not None
        score = functools.partial(
            evaluate_engine, engine, objective, job.eval_data, config=config, micro_batch=job.ds.micro_batch, watch=watch
        )
        scores, averages = score(), {}
        for decay in engine.averages.decays:
            with engine.averaged(decay):
                averages[decay] = score()
        last_scores.append(dataclasses.replace(scores, averages=averages))
        return last_scores[-1]

    def told(outcome: Outcome) -> None:
        steering.note_save(outcome.blocked_s + outcome.flush_s)
        if metrics is None:
            return
        if outcome.complaint is None:
            metrics.log_saved(outcome.step, blocked_s=outcome.blocked_s, flush_s=outcome.flush_s, bytes_=outcome.bytes)
            return
        metrics.log_trouble(
            {"step": outcome.step, "event": "save_failed", "why": outcome.complaint},
            f"the checkpoint of step {outcome.step} could not be saved: {outcome.complaint}; training goes on and the one "
            "before stays; free room or mend the file system before the next save",
        )

    saver = Saver(
        engine,
        job.run / "checkpoints",
        data=order,
        retention=Retention(last=config.run.keep_last, every=job.keep_every_steps),
        start_step=state.step,
        between_failures_s=between_failures_s(len(set(from_all_ranks(job.cluster.host))), config.run.failures_per_host_day)
        if config.run.save_every == AUTO
        else None,
        check=integrity.check,
        told=told,
        may_commit=steering.may_commit,
    )

    # Once, and again after each rollback.
    while True:
        stream = ahead_of(stream_from(job, state, watch), device)
        try:
            with watch:
                train(
                    state,
                    plan=job.plan,
                    engine=engine,
                    objective=objective,
                    stream=stream,
                    lr_at_step=job.schedule.lr_at,
                    evaluate=evaluate if job.eval_data is not None else None,
                    saver=saver,
                    metrics=metrics,
                    watch=watch,
                    watch_attention=attention_watcher(engine, watched_images(job), metrics=metrics)
                    if job.plan.attention_every_steps
                    else None,
                    watch_updates=UpdateWatcher(engine, depth=config.model.depth, metrics=metrics)
                    if job.plan.histograms_every_steps
                    else None,
                    guard=guard_of(job, engine, state),
                    check_replicas=integrity.check_when_due,
                    steering=steering,
                )
        except RollBack as wanted:
            stream.close()
            saver.wait()
            state, rollbacks = roll_back(
                engine, job.run, wanted, train=config.train, global_batch=config.optim.global_batch, say=complain
            )
            if metrics is not None:
                metrics.reopen(state.step)
                tell(metrics, rollbacks)
            continue
        break
    stream.close()
    # A run killed between its last checkpoint and this marker has nothing left to train but its scores are not known.
    if job.eval_data is not None and not last_scores:
        evaluate()
    if metrics is not None:
        scores = last_scores[-1].as_record() if last_scores else None
        record = {
            "step": state.step,
            "images_seen": state.images_seen,
            "skipped": state.skipped,
            "bad_images": state.bad_images,
            "eval": scores,
        }
        metrics.finish(record)
        mark_finished(job.run, record)
    engine.close()


def stream_from(job: Job, state: TrainState, watch: Watch) -> PhasedStream:
    """The micro-batches of this rank from where the run stands."""
    config = job.config
    return PhasedStream(
        lambda image_size, position: train_stream(
            job.train_data,
            data=config.data,
            augment=config.augment,
            image_size=image_size,
            seed=config.train.seed,
            global_batch=config.optim.global_batch,
            micro_batch=job.ds.micro_batch,
            rank=job.cluster.rank,
            world=job.cluster.world,
            position=position,
            on_death=lambda death: _tell_of_death(job, death, step=watch.step),
        ),
        job.plan.phases,
        step=state.step,
        position=state.position,
        global_batch=config.optim.global_batch,
        accumulation=job.ds.accumulation,
    )


def guard_of(job: Job, engine: Engine, state: TrainState) -> Guard:
    """What decides about the steps from `state` on."""
    config = job.config
    mixture = mixture_of(job.train_data, data=config.data, seed=config.train.seed)
    return Guard(
        engine,
        train=config.train,
        phases=job.plan.phases,
        global_batch=config.optim.global_batch,
        state=state,
        names_of=lambda first, end: names_at(job.train_data, mixture, np.arange(first, end)),
    )


def _tell_of_death(job: Job, death: WorkerDeath, *, step: int) -> None:
    """On the rank whose worker died: the stream has put another in its place."""
    complain(f"rank {job.cluster.rank} on {job.cluster.host}, step {step}: {death}; its workers were started anew")
    where = {"rank": job.cluster.rank, "host": job.cluster.host}
    append_event(job.run, {"step": step, "event": "worker_died", **where, **dataclasses.asdict(death)})


def _banner(job: Job, saved: Saved | None, state: TrainState) -> str:
    if saved is not None:
        return f"continuing after step {state.step} from {saved.directory}"
    if job.parent is not None:
        return f"starting {job.run} as a branch of {job.parent.name}, at position {state.position:,} of the data"
    return f"starting {job.run} at step 0"


def watched_images(job: Job) -> torch.Tensor:
    """The first images of the evaluation data, else of the training data, on every rank: BHWC of uint8. Collective."""
    images_BHWC = None
    if job.cluster.rank == 0:
        stream = eval_stream(
            job.eval_data or job.train_data[0],
            data=dataclasses.replace(job.config.data, workers=0),
            augment=job.config.augment,
            image_size=job.config.model.image_size,
            micro_batch=IMAGES,
            rank=0,
            world=1,
        )
        batch = next(iter(stream))
        images_BHWC = batch.images_BHWC[batch.counted_B].clone()
        stream.close()
    return from_rank_zero(images_BHWC)


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
