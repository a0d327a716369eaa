"""Count the images that turned out to be bad, exactly over all ranks, name each in events.jsonl, and stop at too many.

The data pipeline puts a stand-in where an image is bad and says so in its micro-batch. Each rank keeps what it was told
until the ranks settle: they add up, rank 0 writes. That happens whenever a step is logged or saved, so no checkpoint knows
of an image that events.jsonl does not name, and at least every SETTLE_EVERY_STEPS, so that a budget is noticed.

The rule: a run stops (exit 78) when its bad images are more than data.bad_images_max of the images seen, and more than
BAD_IMAGES_ALLOWED; with data.bad_images_max=0 the first one stops it. Every position counts: an image that is bad in each
of three epochs counts three times.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vitscale.base.errors import BadDataError
from vitscale.training.checkpoint import TrainState
from vitscale.training.collectives import from_all_ranks
from vitscale.training.engine import Engine
from vitscale.training.metrics import Metrics

BAD_IMAGES_ALLOWED = 10
"""One bad image in the first step is no share to judge by."""

SETTLE_EVERY_STEPS = 50


class TooManyBadImages(BadDataError):
    """All ranks raise it at the same step; rank 0 says it."""

    every_rank_speaks = False


class BadImages:
    """What this rank was told and the others do not know yet."""

    def __init__(self, engine: Engine, *, share_max: float) -> None:
        self._engine = engine
        self._share_max = share_max
        self._untold: list[dict[str, Any]] = []

    def add(self, step: int, samples: Sequence[Any]) -> None:
        """Keep the records (dataclasses with a `position`) of one micro-batch of the step that ends as `step`."""
        self._untold += [{"step": step, "event": "bad_image", **asdict(sample)} for sample in samples]

    def settle(self, state: TrainState, metrics: Metrics | None) -> None:
        """Bring `state.bad_images` up to date and write what happened. Collective."""
        (count,) = self._engine.sum_over_ranks([len(self._untold)])
        if count:
            told = [event for events in from_all_ranks(self._untold) for event in events]
            if metrics is not None:
                metrics.log_events(sorted(told, key=lambda event: (event["step"], event["position"])))
            state.bad_images += len(told)
            self._untold = []

    def check(self, state: TrainState) -> None:
        """Raise TooManyBadImages past the budget: the same answer on every rank, because `state` is."""
        allowed = max(BAD_IMAGES_ALLOWED, self._share_max * state.images_seen) if self._share_max else 0
        if state.bad_images > allowed:
            raise TooManyBadImages(
                f"{state.bad_images} of {state.images_seen} images were bad after step {state.step}, but "
                f"data.bad_images_max={self._share_max:g} allows {int(allowed)} by then; events.jsonl in the run directory "
                "names each: restore the shards from a copy, or raise data.bad_images_max and start again"
            )
