"""Steps that must not count: those a run was told to leave out, and those in which numbers went bad.

There is one mechanism. The loss of such a step is multiplied by NaN on the device, on every rank, before the backward pass of
its last micro-batch. Then the engine does what it does at every ZeRO stage and precision with a gradient that is not finite
(engine.backward_and_maybe_step): all ranks leave the update out, and parameters, optimizer counters and averages keep their
values. So a step that went bad leaves the same bits behind as one that train.skip_steps names. Under fp16 the loss scale
falls, as at any overflow.

why        who decides
told       train.skip_steps
loss       the loss is not finite on some rank
spike      the loss, a mean over all ranks and micro-batches, is more than train.spike_sigmas standard deviations, and more than
           SPIKE_MIN_NATS, above the mean of the last WINDOW accepted losses, of which at least KNOWN_MIN are known. OLMo-core's
           SkipStepOptimizer has 6 sigma over 128 losses, from 64 on; there a loss that was skipped widens the window, here only
           what was accepted is in it
gradient   the engine itself: a gradient that is not finite on some rank

Nothing here makes the host wait: the limit comes from steps that are over, the comparison runs on the device behind one small
all-reduce, and the loss is read once the engine has waited for the step.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vitscale.config import TrainConfig
from vitscale.planning.resolution import Phase, phase_at
from vitscale.training.checkpoint import TrainState
from vitscale.training.engine import Engine
from vitscale.training.metrics import Metrics
from vitscale.training.objective import Loss

WINDOW = 128
"""Accepted losses that are remembered."""
KNOWN_MIN = WINDOW // 2
"""With fewer nothing is a spike."""
SPIKE_MIN_NATS = 0.5
"""Late in training losses differ so little that six deviations are no harm."""

NamesOf = Callable[[int, int], Any]
"""(first position, position behind the last) to the names of the images there, as plain JSON values."""


class RollBack(Exception):
    """Too many steps went bad together: all ranks raise it after the same step. `state` is that of its end."""

    def __init__(self, state: TrainState) -> None:
        super().__init__(f"steps {state.bad_steps} went bad")
        self.state = state


class Screen(Protocol):
    """What the loop asks about every step."""

    def screened(self, loss: Loss, step: int) -> Tensor: ...

    def settle(self, state: TrainState, metrics: Metrics | None) -> None: ...


class Unguarded:
    """Lets every step through but those the engine skips."""

    def screened(self, loss: Loss, step: int) -> Tensor:
        return loss.trained

    def settle(self, state: TrainState, metrics: Metrics | None) -> None:
        pass


class Guard:
    """Decides about each step on all ranks alike, from `TrainState` and the losses alone: a resumed run decides the same."""

    def __init__(
        self,
        engine: Engine,
        *,
        train: TrainConfig,
        phases: Sequence[Phase],
        global_batch: int,
        state: TrainState,
        names_of: NamesOf,
    ) -> None:
        """`state` is where the run stands; `names_of` is asked on rank 0 when a step was skipped."""
        self._engine = engine
        self._train = train
        self._phases = phases
        self._global_batch = global_batch
        self._names_of = names_of
        self._told = frozenset(train.skip_steps)
        self._losses: list[Tensor] = []
        self._limit = limit_of(state.accepted_losses, train.spike_sigmas)

    def screened(self, loss: Loss, step: int) -> Tensor:
        """What the gradient of a micro-batch of the step that ends as `step` is taken of. Collective at the last one."""
        self._losses.append(loss.reported.detach())
        if len(self._losses) < self._engine.accumulation_steps:
            return loss.trained
        self._loss = self._engine.mean_over_ranks(torch.stack(self._losses).double().mean())
        self._losses = []
        is_bad = ~torch.isfinite(self._loss) | (self._loss > self._limit)
        if step in self._told:
            is_bad = torch.ones_like(is_bad)
        return loss.trained * torch.where(is_bad, math.nan, 1.0)

    def settle(self, state: TrainState, metrics: Metrics | None) -> None:
        """Take the step that has just ended into `state`; say why where it was skipped. Raises RollBack on all ranks."""
        loss = self._loss.item()
        if self._engine.last_step_skipped:
            why = self._why(state.step, loss)
            # Overflows are how fp16 finds its loss scale, and the engine ends a run that cannot find one.
            is_overflow = why == "gradient" and self._train.precision == "fp16"
            if metrics is not None:
                metrics.log_events([self._event(state, why, loss, names_images=not is_overflow)])
                metrics.say(f"step {state.step} was skipped ({why}), its loss was {loss:.4f}; see {metrics.events_path}")
            if why != "told" and not is_overflow:
                state.bad_steps = [*state.bad_steps, state.step]
        else:
            assert math.isfinite(loss) and loss <= self._limit and state.step not in self._told
            state.accepted_losses = [*state.accepted_losses, loss][-WINDOW:]
        before, after = (phase_at(self._phases, step).image_size for step in (state.step - 1, state.step))
        if before != after:
            state.accepted_losses = []  # losses at another image size are no measure
        self._limit = limit_of(state.accepted_losses, self._train.spike_sigmas)
        state.bad_steps = [step for step in state.bad_steps if step > state.step - self._train.rollback_window]
        # Counted after a bad step only: a restored state may hold as many, from which it has just gone on.
        if state.step in state.bad_steps and 0 < self._train.rollback_skips <= len(state.bad_steps):
            raise RollBack(state)

    def _why(self, step: int, loss: float) -> str:
        if step in self._told:
            return "told"
        if not math.isfinite(loss):
            return "loss"
        return "spike" if loss > self._limit else "gradient"

    def _event(self, state: TrainState, why: str, loss: float, *, names_images: bool) -> dict[str, Any]:
        first, end = state.position - self._global_batch, state.position
        return {
            "step": state.step,
            "event": "skipped_step",
            "why": why,
            "loss": loss,
            "spike_above": self._limit,
            "grad_norm": self._engine.grad_norm(),
            "first_position": first,
            "end_position": end,
            "images": self._names_of(first, end) if names_images else None,
        }


def limit_of(losses: Sequence[float], sigmas: float) -> float:
    """The loss above which a step is a spike; infinite where that is off or too little is known. Pure."""
    if sigmas == 0 or len(losses) < KNOWN_MIN:
        return math.inf
    mean = math.fsum(losses) / len(losses)
    deviation = math.sqrt(math.fsum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1))
    return mean + max(sigmas * deviation, SPIKE_MIN_NATS)
