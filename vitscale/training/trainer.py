"""The loop and nothing else. What a step means lives in the engine, the objective and the stream."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vitscale.base.faults import fault_point
from vitscale.evaluation.classification import Scores
from vitscale.training.bad_images import SETTLE_EVERY_STEPS, BadImages
from vitscale.training.checkpoint import TrainState
from vitscale.training.engine import Engine
from vitscale.training.metrics import Metrics
from vitscale.training.objective import Objective


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
    flops_per_image: float
    """Model FLOPs of forward and backward, without recomputation."""
    recomputed_flops_per_image: float
    """What the backward pass computes again."""
    peak_flops: float | None
    """Of one device; None where unknown."""
    attention_every_steps: int = 0
    """Matters only where `train` is given `watch_attention`."""


def train(
    state: TrainState,
    *,
    plan: Plan,
    engine: Engine,
    objective: Objective,
    stream: Iterator[MicroBatch],
    lr_at_step: Callable[[int], float],
    evaluate: Callable[[], Scores] | None,
    save: Callable[[TrainState], None],
    metrics: Metrics | None,
    watch_attention: Callable[[int], None] | None = None,
) -> None:
    """Train from `state` to the last step. Collective; `metrics` is there on rank 0 only."""
    engine.train()
    bad_images = BadImages(engine, share_max=plan.bad_images_max)
    while state.step < plan.total_steps:
        meter = _Meter(engine)
        lr = lr_at_step(state.step)
        engine.set_lr(lr)
        for micro_batch in range(engine.accumulation_steps):
            batch = meter.next_of(stream)
            engine.seed_micro_batch(plan.seed, state.step, micro_batch)
            slot = first_slot(plan.global_batch, engine, micro_batch)
            loss = objective(engine, batch.images_BHWC, batch.labels_BM, step=state.step, first_slot=slot)
            meter.add(loss.reported, batch)
            bad_images.add(state.step + 1, batch.bad_images)
            engine.backward_and_maybe_step(loss.trained)
        state.step += 1
        state.position += plan.global_batch
        state.images_seen += plan.global_batch
        state.skipped += engine.last_step_skipped
        fault_point("step.end", rank=engine.rank, step=state.step)
        is_logged, is_saved = (due(state.step, n, plan.total_steps) for n in (plan.log_every_steps, plan.save_every_steps))
        if is_logged or is_saved or state.step % SETTLE_EVERY_STEPS == 0:
            bad_images.settle(state, metrics)
        if is_logged:
            line = meter.line(state, plan, lr)
            if metrics is not None:
                metrics.log_step(line)
        bad_images.check(state)
        if evaluate is not None and due(state.step, plan.eval_every_steps, plan.total_steps):
            scores = evaluate()
            engine.train()
            if metrics is not None:
                metrics.log_eval(state.step, scores.as_record())
        if watch_attention is not None and due(state.step, plan.attention_every_steps, plan.total_steps):
            watch_attention(state.step)
            engine.train()
        if is_saved:
            save(state)


def due(step: int, every_steps: int, total_steps: int) -> bool:
    """Whether something that happens every so many steps, and after the last one, happens now. 0: only after the last."""
    return step == total_steps or (every_steps > 0 and step % every_steps == 0)


def first_slot(global_batch: int, engine: Engine, micro_batch: int) -> int:
    """Slot of the first image of a micro-batch of this rank: its micro-batches are consecutive slots (design.md 5.3)."""
    share = global_batch // engine.world
    return engine.rank * share + micro_batch * (share // engine.accumulation_steps)


class _Meter:
    """What one step took and gave, on this rank; summed over the ranks when the step is logged."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.started_s = time.perf_counter()
        self.data_wait_s = 0.0
        self.samples_hash = 0
        self.losses: list[Tensor] = []

    def next_of(self, stream: Iterator[MicroBatch]) -> MicroBatch:
        before_s = time.perf_counter()
        batch = next(stream)
        self.data_wait_s += time.perf_counter() - before_s
        return batch

    def add(self, loss: Tensor, batch: MicroBatch) -> None:
        self.losses.append(loss.detach())  # stays on the device: reading it here would wait for the forward pass
        self.samples_hash += batch.samples_hash

    def line(self, state: TrainState, plan: Plan, lr: float) -> dict[str, float | int | str | None]:
        """One line of metrics.jsonl. Collective, and waits for the device."""
        engine = self.engine
        mean_loss = torch.stack(self.losses).double().mean().item()
        loss_sum, wait_sum = engine.sum_over_ranks([mean_loss, self.data_wait_s])
        step_s = time.perf_counter() - self.started_s
        images_per_s = plan.global_batch / step_s
        peak = plan.peak_flops * engine.world if plan.peak_flops else None
        return {
            "step": state.step,
            "images_seen": state.images_seen,
            "loss": loss_sum / engine.world,
            "lr": lr,
            "grad_norm": engine.grad_norm(),
            "images_per_s": images_per_s,
            "mfu": images_per_s * plan.flops_per_image / peak if peak else None,
            "hfu": images_per_s * (plan.flops_per_image + plan.recomputed_flops_per_image) / peak if peak else None,
            "data_wait_s": wait_sum / engine.world,
            "step_s": step_s,
            "samples_hash": f"{engine.sum_modulo_2_64(self.samples_hash % (1 << 64)):016x}",
            "skipped": state.skipped,
            "bad_images": state.bad_images,
            "at_unix_s": time.time(),
        }
