"""How long a run takes at an assumed share of the peak: an estimate with a shown formula, not a measurement.

    seconds = sum over the steps of (global batch x FLOPs per image) / (ranks x peak FLOP/s x MFU)

FLOPs per image are those of forward and backward without recomputation (MFU's convention, Chowdhery et al. 2022, PaLM, appendix
B), at the image size of the step.
"""

from collections.abc import Sequence

from vitscale.planning.resolution import Phase, flops_until

MFU_ASSUMED = 0.4
"""Between what NeMo publishes for ViT-g/14 on eight A100 (0.44) and on eight H100 (0.29), and ViT-22B on TPUv4 (0.55)."""


def run_seconds(
    phases: Sequence[Phase], *, total_steps: int, global_batch: int, world: int, peak_flops: float, mfu: float
) -> float:
    """Seconds of all steps; evaluations, checkpoints and restarts are not counted."""
    return global_batch * flops_until(phases, total_steps) / (world * peak_flops * mfu)
