"""Progressive resolution: which image size is trained on from which step, and what an image costs there.

    ["128@0", "160@40%", "224@80%"]  ->  phases that start at steps 0, 0.4 T, 0.8 T of a run of T steps

The order of the images does not know of it: a step shows the same images at every size (Tan & Le 2021, EfficientNetV2,
section 4; Touvron et al. 2019, FixRes). Without `train.resolutions` a run has one phase at model.image_size.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vitscale.model.config import ModelConfig, Recompute
from vitscale.model.flops import recomputed_flops, train_flops


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps of one image size."""

    first_step: int
    """0-based: the number of steps done before the first one of the phase."""
    image_size: int
    flops_per_image: float
    """Model FLOPs of forward and backward at this size, without recomputation."""
    recomputed_flops_per_image: float
    """What the backward pass computes again."""


def phases_of(
    model: ModelConfig,
    resolutions: Sequence[str],
    *,
    steps_of_length: Callable[[str], int],
    total_steps: int,
    recompute: Recompute,
    kept: float,
) -> tuple[Phase, ...]:
    """The phases of a run, first one first. `kept` is the share of branches that stochastic depth leaves.

    Raises ValueError for what is no `SIZE@LENGTH`, sizes the patch does not divide, a first phase that is not at 0, phases that
    do not follow one another within the run, and a last size other than model.image_size, which is what is evaluated.
    """
    starts = [_parsed(text, steps_of_length) for text in resolutions] or [(model.image_size, 0)]
    shown = ", ".join(resolutions)
    if starts[0][1] != 0:
        raise ValueError(f"expected the first size from step 0 on, such as {starts[0][0]}@0, got {shown}")
    for (_, before), (size, first) in pairwise(starts):
        if not before < first < total_steps:
            raise ValueError(
                f"{size} would start at step {first}: expected a later step than the size before it ({before}) and one of the "
                f"{total_steps} steps of the run, got {shown}"
            )
    if starts[-1][0] != model.image_size:
        raise ValueError(
            f"expected the last size to be model.image_size={model.image_size}, at which the model is evaluated, got {shown}"
        )
    phases = []
    for size, first in starts:
        sized = dataclasses.replace(model, image_size=size)  # raises where the patch does not divide it
        phases.append(
            Phase(
                first_step=first,
                image_size=size,
                flops_per_image=train_flops(sized, kept=kept),
                recomputed_flops_per_image=recomputed_flops(sized, recompute, kept=kept),
            )
        )
    return tuple(phases)


def _parsed(text: str, steps_of_length: Callable[[str], int]) -> tuple[int, int]:
    size, at, length = text.partition("@")
    if not at or not size.strip().isdigit():
        raise ValueError(f"expected an image size and from when, such as 160@40% or 160@30ep, got {text!r}")
    return int(size), steps_of_length(length)


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase of the step that follows `step` steps."""
    return next(phase for phase in reversed(phases) if phase.first_step <= step)


def flops_until(phases: Sequence[Phase], step: int) -> float:
    """Model FLOPs for one image in every one of the first `step` steps; what an ETA counts instead of steps."""
    ends = [*(phase.first_step for phase in phases[1:]), step]
    return sum(
        phase.flops_per_image * max(0, min(end, step) - phase.first_step) for phase, end in zip(phases, ends, strict=True)
    )
