"""Put a run together: configuration → streams, model, engine. With datasets.py the only place where data and training meet.

carry_out    start the ranks, own the run directory, restore, train (again after a rollback), evaluate, mark as finished
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from data_pipeline.deaths import WorkerDeath
from data_pipeline.loader import eval_stream, mixture_of, train_stream
from data_pipeline.names import names_at
from data_pipeline.stream import worker_pids
from launch.branch import load_parent
from launch.engines import evaluate_engine, make_engine, pin_attention, silent
from launch.gate import prove_gradients
from launch.job import AUTO, Job, order_record
from launch.phased import PhasedStream
from launch.trained import load_weights_of
from vitscale.base.errors import DivergedError, UsageError, complain
from vitscale.base.startup import Startup
from vitscale.evaluation.classification import Scores
from vitscale.insight.updates import UpdateWatcher
from vitscale.planning.cadence import between_failures_s
from vitscale.planning.resolution import flops_until
from vitscale.planning.room import checkpoint_size, room_at, shortage
from vitscale.training.ahead import ahead_of
from vitscale.training.checkpoint import Saved, TrainState, candidates, find_checkpoint, load_checkpoint
from vitscale.training.collectives import from_all_ranks, from_rank_zero
from vitscale.training.engine import Engine, leave_ranks, start_ranks
from vitscale.training.guard import Guard, RollBack
from vitscale.training.integrity import CorruptReplica, Integrity
from vitscale.training.metrics import Metrics, append_event
from vitscale.training.objective import Objective, objective_of
from vitscale.training.peers import Peer, lost_ranks_are_transient, meet
from vitscale.training.preflight import require_equal_hosts
from vitscale.training.rollback import Record, finish_rollbacks, roll_back, taken_up, tell
from vitscale.training.rundir import begin_attempt, leased, mark_finished, require_shared_directory
from vitscale.training.saving import Outcome, Retention, Saver, tidy
from vitscale.training.steering import Steering, steering_of
from vitscale.training.trainer import train
from vitscale.training.watch import Beats, Watch


def carry_out(job: Job, startup: Startup) -> None:
    """Run the job to its end, or continue it where its newest usable checkpoint stands. `startup`: of this process so far."""
    startup.ends("configuration")
    device = start_ranks(job.cluster)
    require_equal_hosts(job.cluster, say=complain)
    peers = meet(job.cluster)
    with lost_ranks_are_transient(peers, job.cluster.rank), leased(job.run, job.cluster) as lease:
        stop_after, total = job.config.run.stop_after, job.plan.total_steps
        steering = steering_of(job.run, job.cluster, total_steps=total, stop_after=stop_after, lease=lease)
        startup.ends("ranks")
        _carry_out(job, peers, device, steering, startup)
    leave_ranks()


def _carry_out(job: Job, peers: tuple[Peer, ...], device: torch.device, steering: Steering, startup: Startup) -> None:
    config = job.config
    require_shared_directory(job.run, job.cluster)
    finish_rollbacks(job.run, rank=job.cluster.rank)
    saved = find_checkpoint(job.run / "checkpoints", say=complain)
    startup.ends("verifying")
    attempt = begin_attempt(job.run, config=config, ds=job.ds, cluster=job.cluster, followed=job.followed)
    engine, state, rollbacks = _restored(job, saved, device, startup)
    retention = Retention(last=config.run.keep_last, every=job.keep_every_steps)
    metrics = None
    if job.cluster.rank == 0:
        if saved is not None:
            tidy(job.run / "checkpoints", retention)
        metrics = Metrics(job.run, total_steps=job.plan.total_steps, work_until=lambda step: flops_until(job.plan.phases, step))
        metrics.open(state.step)
        metrics.say(_banner(job, saved, state))
        seconds = startup.as_record()
        started = {"step": state.step, "event": "started", "attempt": attempt, "world": job.cluster.world, "seconds": seconds}
        metrics.log_events([started])
        metrics.say(startup.in_words())
        tell(metrics, rollbacks)
        if said := _shortage(job):
            metrics.say(said)

    watch = Watch(
        job.run,
        attempt=attempt,
        peers=peers,
        rank=job.cluster.rank,
        timeout_s=config.run.step_timeout,
        workers=worker_pids,
    )
    objective = objective_of(config, device=device, dtype=engine.input_dtype)
    evaluation = Evaluation(job, engine, objective, watch) if job.eval_data is not None else None
    integrity = Integrity(engine, every_steps=job.plan.integrity_every_steps, host=job.cluster.host, metrics=metrics)
    saver = _saver(job, engine, retention, state=state, integrity=integrity, steering=steering, watch=watch, metrics=metrics)
    # Once, and again after each rollback.
    while True:
        stream = ahead_of(_stream(job, state, watch), device)
        try:
            with lost_ranks_are_transient(peers, job.cluster.rank, told=watch.note_dead), watch:
                train(
                    state,
                    plan=job.plan,
                    engine=engine,
                    objective=objective,
                    stream=stream,
                    lr_at_step=job.schedule.lr_at,
                    evaluate=evaluation,
                    saver=saver,
                    metrics=metrics,
                    watch_attention=_attention_watcher(job, engine, metrics) if job.plan.attention_every_steps else None,
                    watch_updates=UpdateWatcher(engine, depth=config.model.depth, metrics=metrics)
                    if job.plan.histograms_every_steps
                    else None,
                    guard=_guard(job, engine, state),
                    check_replicas=integrity.check_when_due,
                    steering=steering,
                    watch=watch,
                )
            break
        except (CorruptReplica, DivergedError):
            saver.wait()  # what is being written was good, and nothing newer will come
            raise
        except RollBack as wanted:
            stream.close()
            saver.wait()
            state, rollbacks = roll_back(
                engine, job.run, wanted, train=config.train, global_batch=config.optim.global_batch, say=complain
            )
            if metrics is not None:
                metrics.reopen(state.step)
                tell(metrics, rollbacks)
    stream.close()
    # A run killed between its last checkpoint and this marker has nothing left to train but its scores are not known.
    if evaluation is not None and evaluation.last is None:
        with watch:
            evaluation()
    if metrics is not None:
        record = {
            "step": state.step,
            "images_seen": state.images_seen,
            "skipped": state.skipped,
            "bad_images": state.bad_images,
            "eval": evaluation.last.as_record() if evaluation is not None and evaluation.last is not None else None,
        }
        metrics.finish(record)
        mark_finished(job.run, record)
    engine.close()


def _restored(job: Job, saved: Saved | None, device: torch.device, startup: Startup) -> tuple[Engine, TrainState, list[Record]]:
    """The engine with the state this start goes on from, and the rollbacks that count from there on."""
    config, rank = job.config, job.cluster.rank
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
        startup.ends("gradients")
    engine = make_engine(config, job.ds, initial=initial, device=device, say=complain if rank == 0 else silent)
    startup.ends("engine")
    if saved is not None:
        state = load_checkpoint(engine, saved)
    else:
        state = load_parent(engine, job.parent, config) if job.parent is not None else TrainState()
    startup.ends("loading")
    return engine, *taken_up(job.run, state, rank=rank)


class Evaluation:
    """Scores the engine's present weights, and every average of them, on the evaluation data. Collective."""

    def __init__(self, job: Job, engine: Engine, objective: Objective, watch: Beats) -> None:
        self._job, self._engine, self._objective, self._watch = job, engine, objective, watch
        self.last: Scores | None = None

    def __call__(self) -> Scores:
        scores, averages = self._score(), {}
        for decay in self._engine.averages.decays:
            with self._engine.averaged(decay):
                averages[decay] = self._score()
        self.last = dataclasses.replace(scores, averages=averages)
        return self.last

    def _score(self) -> Scores:
        job = self._job
        assert job.eval_data is not None
        micro_batch = job.ds.micro_batch
        return evaluate_engine(
            self._engine, self._objective, job.eval_data, config=job.config, micro_batch=micro_batch, watch=self._watch
        )


def _shortage(job: Job) -> str | None:
    """A warning where the disk will not hold the checkpoints to come."""
    where = job.run / "checkpoints"
    size, present = checkpoint_size(job.config, job.ds), len(candidates(where))
    return shortage(size, room_at(where), keep_last=job.config.run.keep_last, present=present, where=where)


def _saver(
    job: Job,
    engine: Engine,
    retention: Retention,
    *,
    state: TrainState,
    integrity: Integrity,
    steering: Steering,
    watch: Watch,
    metrics: Metrics | None,
) -> Saver:
    config = job.config

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

    hosts = len(set(from_all_ranks(job.cluster.host)))
    is_automatic = config.run.save_every == AUTO
    return Saver(
        engine,
        job.run / "checkpoints",
        data=order_record(config, job.train_data),
        retention=retention,
        start_step=state.step,
        between_failures_s=between_failures_s(hosts, config.run.failures_per_host_day) if is_automatic else None,
        check=integrity.check,
        told=told,
        may_commit=steering.may_commit,
        beat=watch.beat,
    )


def _stream(job: Job, state: TrainState, watch: Watch) -> PhasedStream:
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


def _guard(job: Job, engine: Engine, state: TrainState) -> Guard:
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


def _attention_watcher(job: Job, engine: Engine, metrics: Metrics | None) -> Callable[[int], None]:
    # Imported here because it brings matplotlib, which every start of every run would wait for.
    from vitscale.insight.board import IMAGES, attention_watcher

    return attention_watcher(engine, watched_images(job, IMAGES), metrics=metrics)


def watched_images(job: Job, count: int) -> torch.Tensor:
    """The first images of the evaluation data, else of the training data, on every rank: BHWC of uint8. Collective."""
    images_BHWC = None
    if job.cluster.rank == 0:
        stream = eval_stream(
            job.eval_data or job.train_data[0],
            data=dataclasses.replace(job.config.data, workers=0),
            augment=job.config.augment,
            image_size=job.config.model.image_size,
            micro_batch=count,
            rank=0,
            world=1,
        )
        batch = next(iter(stream))
        images_BHWC = batch.images_BHWC[batch.counted_B].clone()
        stream.close()
    return from_rank_zero(images_BHWC)
