"""The loop and nothing else. What a step means lives in the engine, the objective and the stream."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vitscale.base.faults import fault_point
from vitscale.evaluation.classification import Scores
from vitscale.planning.resolution import Phase, phase_at
from vitscale.training.bad_images import SETTLE_EVERY_STEPS, BadImages
from vitscale.training.checkpoint import TrainState
from vitscale.training.clock import StepClock
from vitscale.training.engine import Engine
from vitscale.training.faulty import damage_weights, faulty_loss
from vitscale.training.guard import Screen, Unguarded
from vitscale.training.metrics import Metrics
from vitscale.training.objective import Objective
from vitscale.training.steering import Steering
from vitscale.training.watch import UNWATCHED, Beats


class MicroBatch(Protocol):
    """What a training stream yields."""

    @property
    def images_BHWC(self) -> Tensor: ...

    @property
    def labels_BM(self) -> Tensor: ...

    @property
    def samples_hash(self) -> int: ...

    @property
    def bad_images(self) -> Sequence[Any]:
        """Dataclasses that say which images were bad and what stands in for them."""
        ...


class Saver(Protocol):
    """Writes checkpoints beside the training (saving.py)."""

    def is_due(self, step: int) -> bool:
        """Whether a save is due after this step, besides those at fixed steps; the same on all ranks."""
        ...

    def begin(self, state: TrainState) -> None: ...

    def poll(self) -> None: ...

    def wait(self, *, required: bool = False) -> None: ...


class UpdateWatcher(Protocol):
    """Looks at how far a step moves the parameters."""

    def before_step(self) -> None: ...

    def after_step(self, step: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The steps of a run, all lengths already converted."""

    total_steps: int
    global_batch: int
    log_every_steps: int
    eval_every_steps: int
    save_every_steps: int
    bad_images_max: float
    """Share of the images seen that may be bad; see bad_images.py."""
    seed: int
    """Of what is drawn on the device."""
    phases: tuple[Phase, ...]
    """Image sizes, from which step on, and what an image costs."""
    peak_flops: float | None
    """Of one device; None where unknown."""
    attention_every_steps: int = 0
    """Matters only where `train` is given `watch_attention`."""
    histograms_every_steps: int = 0
    """Matters only where `train` is given `watch_updates`."""
    integrity_every_steps: int = 0
    """Matters only where `train` is given `check_replicas`."""


UNGUARDED = Unguarded()

GARBAGE_EVERY_STEPS = 150
"""Python's collector stops a rank for tens of milliseconds whenever it likes, and all others wait: here all do it at once."""


def train(
    state: TrainState,
    *,
    plan: Plan,
    engine: Engine,
    objective: Objective,
    stream: Iterator[MicroBatch],
    lr_at_step: Callable[[int], float],
    evaluate: Callable[[], Scores] | None,
    saver: Saver | None,
    metrics: Metrics | None,
    watch_attention: Callable[[int], None] | None = None,
    watch_updates: UpdateWatcher | None = None,
    guard: Screen = UNGUARDED,
    check_replicas: Callable[[int], None] = lambda step: None,
    steering: Steering | None = None,
    watch: Beats = UNWATCHED,
) -> None:
    """Train from `state` to the last step, or until `steering` says otherwise. Collective; `metrics` on rank 0 only.

    `check_replicas` is asked once in each step, after its last forward pass. Raises RollBack where `guard` does.
    """
    engine.train()
    bad_images = BadImages(engine, share_max=plan.bad_images_max)
    meter = _Meter(engine, watch)
    with _no_garbage_collection(), steering or nullcontext():
        while state.step < plan.total_steps:
            meter.start(state.step + 1)
            lr = lr_at_step(state.step)
            engine.set_lr(lr)
            is_watched = watch_updates is not None and due(state.step + 1, plan.histograms_every_steps, plan.total_steps)
            if watch_updates is not None and is_watched:
                watch_updates.before_step()
            for micro_batch in range(engine.accumulation_steps):
                batch = meter.next_of(stream, micro_batch)
                engine.seed_micro_batch(plan.seed, state.step, micro_batch)
                slot = first_slot(plan.global_batch, engine, micro_batch)
                loss = objective(engine, batch.images_BHWC, batch.labels_BM, step=state.step, first_slot=slot)
                loss = faulty_loss(loss, rank=engine.rank, step=state.step + 1, micro_batch=micro_batch)
                meter.add(loss.reported, batch)
                bad_images.add(state.step + 1, batch.bad_images)
                trained = guard.screened(loss, state.step + 1)
                if micro_batch == engine.accumulation_steps - 1:
                    check_replicas(state.step + 1)
                engine.backward_and_maybe_step(trained, meter.passed)
            damage_weights(engine, step=state.step + 1)
            state.step += 1
            state.position += plan.global_batch
            state.images_seen += plan.global_batch
            state.skipped += engine.last_step_skipped
            guard.settle(state, metrics)
            fault_point("step.end", rank=engine.rank, step=state.step)
            is_logged = due(state.step, plan.log_every_steps, plan.total_steps)
            is_saved = saver is not None and (
                due(state.step, plan.save_every_steps, plan.total_steps) or saver.is_due(state.step)
            )
            if is_logged or is_saved or state.step % SETTLE_EVERY_STEPS == 0:
                bad_images.settle(state, metrics)
            if is_logged:
                line = meter.line(state, plan, lr)
                if metrics is not None:
                    metrics.log_step(line)
            if watch_updates is not None and is_watched:
                watch_updates.after_step(state.step)
            bad_images.check(state)
            if evaluate is not None and due(state.step, plan.eval_every_steps, plan.total_steps):
                fault_point("evaluate.begin", rank=engine.rank, step=state.step)
                watch.beat("evaluate")
                scores = evaluate()
                engine.train()
                if metrics is not None:
                    metrics.log_eval(state.step, scores.as_record())
            if watch_attention is not None and due(state.step, plan.attention_every_steps, plan.total_steps):
                watch_attention(state.step)
                engine.train()
            if saver is not None:
                saver.poll()
                if is_saved:
                    saver.begin(state)
            if steering is not None:
                order = steering.agree(state.step)
                if saver is not None and (order.save or order.stop) and not is_saved:
                    bad_images.settle(state, metrics)
                    saver.begin(state)
                if saver is not None and order.stop:
                    saver.wait(required=True)
                steering.obey(order, state.step, metrics)
            if state.step % GARBAGE_EVERY_STEPS == 0:
                gc.collect()
        if saver is not None:
            saver.wait(required=True)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def due(step: int, every_steps: int, total_steps: int) -> bool:
    """Whether something that happens every so many steps, and after the last one, happens now. 0: only after the last."""
    return step == total_steps or (every_steps > 0 and step % every_steps == 0)


def first_slot(global_batch: int, engine: Engine, micro_batch: int) -> int:
    """Slot of the first image of a micro-batch of this rank: its micro-batches are consecutive slots (design.md 5.3)."""
    share = global_batch // engine.world
    return engine.rank * share + micro_batch * (share // engine.accumulation_steps)


class _Meter:
    """What one step took and gave, on this rank; summed over the ranks when the step is logged."""

    def __init__(self, engine: Engine, watch: Beats) -> None:
        self.engine = engine
        self.watch = watch
        self.clock = StepClock(engine.device)
        engine.time_collectives(self.clock)

    def start(self, step: int) -> None:
        self.step = step
        self.started_s = time.perf_counter()
        self.data_wait_s = 0.0
        self.samples_hash = 0
        self.losses: list[Tensor] = []
        self.clock.restart()

    def next_of(self, stream: Iterator[MicroBatch], micro_batch: int) -> MicroBatch:
        self.micro_batch = micro_batch
        self._enter("data")
        fault_point("data.batch", **self._here)
        before_s = time.perf_counter()
        batch = next(stream)
        self.data_wait_s += time.perf_counter() - before_s
        self.clock.passed("data")
        self._enter("forward")
        fault_point("step.forward", **self._here)
        return batch

    def add(self, loss: Tensor, batch: MicroBatch) -> None:
        self.losses.append(loss.detach())  # stays on the device: reading it here would wait for the forward pass
        self.samples_hash += batch.samples_hash
        self.passed("forward")

    def passed(self, part: str) -> None:
        """A part of a micro-batch is done, and the next one begins."""
        self.clock.passed(part)
        self._enter({"forward": "backward", "backward": "optimizer", "optimizer": "end"}[part])
        if part == "forward":
            fault_point("step.backward", **self._here)
        elif part == "backward":
            fault_point("step.optimizer", **self._here)

    @property
    def _here(self) -> dict[str, int]:
        return {"rank": self.engine.rank, "step": self.step, "micro_batch": self.micro_batch}

    def _enter(self, phase: str) -> None:
        self.watch.beat(phase, step=self.step, micro_batch=self.micro_batch)

    def line(self, state: TrainState, plan: Plan, lr: float) -> dict[str, float | int | str | None]:
        """One line of metrics.jsonl. Collective, and waits for the device."""
        engine = self.engine
        mean_loss = torch.stack(self.losses).double().mean().item()
        step_s = time.perf_counter() - self.started_s
        parts = [self.clock.seconds(part) for part in PARTS]
        loss_sum, wait_sum, *part_sums = engine.sum_over_ranks([mean_loss, self.data_wait_s, *parts])
        images_per_s = plan.global_batch / step_s
        peak = plan.peak_flops * engine.world if plan.peak_flops else None
        phase = phase_at(plan.phases, state.step - 1)
        flops, again = phase.flops_per_image, phase.recomputed_flops_per_image
        return {
            "step": state.step,
            "images_seen": state.images_seen,
            "loss": loss_sum / engine.world,
            "lr": lr,
            "grad_norm": engine.grad_norm(),
            "images_per_s": images_per_s,
            "image_size": phase.image_size,
            "mfu": images_per_s * flops / peak if peak else None,
            "hfu": images_per_s * (flops + again) / peak if peak else None,
            "data_wait_s": wait_sum / engine.world,
            "step_s": step_s,
            **{f"{part}_s": part_sum / engine.world for part, part_sum in zip(PARTS, part_sums, strict=True)},
            "memory_bytes": engine.memory_bytes(),
            "samples_hash": f"{engine.sum_modulo_2_64(self.samples_hash % (1 << 64)):016x}",
            "skipped": state.skipped,
            "bad_images": state.bad_images,
            "at_unix_s": time.time(),
        }


PARTS = ("forward", "backward", "optimizer", "communication")
"""Times of a step in metrics.jsonl: means over the ranks, of all micro-batches. Communication is a part of the other three."""
