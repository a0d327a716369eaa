"""Days follow from FLOPs, ranks, peak and an assumed MFU."""

import pytest

from vitscale.config import apply_overrides
from vitscale.model.flops import train_flops
from vitscale.planning.peaks import GPUS, peak_flops_of
from vitscale.planning.resolution import Phase, phases_of
from vitscale.planning.time import run_seconds
from vitscale.recipes.catalog import recipe_named


def seconds(name: str, *, world: int, gpu: str, mfu: float, resolutions: tuple[str, ...] = (), steps: int = 1000) -> float:
    config = apply_overrides(recipe_named(name), [])
    phases = phases_of(
        config.model,
        resolutions,
        steps_of_length=lambda length: round(steps * float(length.rstrip("%")) / 100),
        total_steps=steps,
        recompute=0,
        kept=1.0,
    )
    peak = GPUS[gpu].peak_bf16
    return run_seconds(phases, total_steps=steps, global_batch=config.optim.global_batch, world=world, peak_flops=peak, mfu=mfu)


def test_a_published_throughput_gives_its_own_time():
    """NeMo's ViT-g/14 on eight H100: 1,428 images/s, which is an MFU of 28.9 % (1.602 TFLOP an image)."""
    config = apply_overrides(recipe_named("scaling_g"), ["model.classes=1000", "model.pool=class", "model.class_token=true"])
    phase = Phase(first_step=0, image_size=224, flops_per_image=train_flops(config.model), recomputed_flops_per_image=0)
    took = run_seconds([phase], total_steps=1, global_batch=1428, world=8, peak_flops=989e12, mfu=0.289)
    assert took == pytest.approx(1.0, rel=5e-3)


def test_time_falls_with_ranks_peak_and_mfu():
    base = seconds("plain_s16", world=8, gpu="A100", mfu=0.4)
    assert seconds("plain_s16", world=16, gpu="A100", mfu=0.4) == pytest.approx(base / 2)
    assert seconds("plain_s16", world=8, gpu="A100", mfu=0.2) == pytest.approx(base * 2)
    assert seconds("plain_s16", world=8, gpu="H100", mfu=0.4) == pytest.approx(base * 312 / 989)


def test_small_images_at_first_save_time():
    whole = seconds("plain_s16", world=8, gpu="H100", mfu=0.4)
    phased = seconds("plain_s16", world=8, gpu="H100", mfu=0.4, resolutions=("112@0%", "224@50%"))
    assert 0.5 < phased / whole < 0.65


def test_a_device_is_known_by_a_part_of_its_name():
    assert peak_flops_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops_of("Some CPU") is None
