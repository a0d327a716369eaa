"""Progressive resolution: sizes from steps on, what they cost, and what is refused."""

import dataclasses

import pytest

from vitscale.model.config import ModelConfig
from vitscale.model.flops import recomputed_flops, train_flops
from vitscale.planning.resolution import Phase, flops_until, phase_at, phases_of

MODEL = ModelConfig(image_size=32, patch_size=4, width=16, depth=2, heads=2, classes=3)


def phases(*resolutions: str, kept: float = 1.0) -> tuple[Phase, ...]:
    return phases_of(
        MODEL,
        resolutions,
        steps_of_length=lambda length: int(length.rstrip("%")),
        total_steps=100,
        recompute=1,
        kept=kept,
    )


def test_without_resolutions_a_run_has_one_phase_at_the_size_of_the_model():
    (phase,) = phases(kept=0.5)
    assert phase == Phase(
        first_step=0,
        image_size=32,
        flops_per_image=train_flops(MODEL, kept=0.5),
        recomputed_flops_per_image=recomputed_flops(MODEL, 1, kept=0.5),
    )


def test_each_step_has_the_size_and_the_cost_of_its_phase():
    found = phases("16@0", "24@40%", "32@80%")
    assert [(p.first_step, p.image_size) for p in found] == [(0, 16), (40, 24), (80, 32)]
    for p in found:
        assert p.flops_per_image == train_flops(dataclasses.replace(MODEL, image_size=p.image_size))
    assert [phase_at(found, step).image_size for step in (0, 39, 40, 79, 80, 99)] == [16, 16, 24, 24, 32, 32]


def test_work_is_the_sum_over_the_steps():
    found = phases("16@0", "24@40%", "32@80%")
    one_by_one = [0.0]
    for step in range(100):
        one_by_one.append(one_by_one[-1] + phase_at(found, step).flops_per_image)
    assert [flops_until(found, step) for step in range(101)] == pytest.approx(one_by_one, rel=1e-12)


@pytest.mark.parametrize(
    ("resolutions", "said"),
    [
        (["16@5", "32@50"], "expected the first size from step 0 on, such as 16@0, got 16@5, 32@50"),
        (["16@0", "24@50", "32@50"], "32 would start at step 50: expected a later step than the size before it (50)"),
        (["16@0", "32@100"], "one of the 100 steps of the run"),
        (["32@0", "16@50"], "expected the last size to be model.image_size=32"),
        (["18@0", "32@50"], "model.image_size=18 is not a multiple of model.patch_size=4"),
        (["16", "32@50"], "expected an image size and from when, such as 160@40% or 160@30ep, got '16'"),
        (["big@0"], "expected an image size"),
    ],
)
def test_what_is_no_plan_of_sizes_is_refused(resolutions, said):
    with pytest.raises(ValueError) as caught:
        phases(*resolutions)
    assert said in str(caught.value)
