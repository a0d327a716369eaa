"""A kernel is chosen by its time, pinned for the process, and math stands in; compiled blocks compute the same."""

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from tests.vitscale.model.test_vit import config, images_of, scrambled
from vitscale.model import kernels
from vitscale.model.attention import attend
from vitscale.model.compile import compile_blocks
from vitscale.model.kernels import fastest, measure_kernels, pin_kernel
from vitscale.model.vit import VisionTransformer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def torchs_own_choice():
    yield
    pin_kernel(None)


def test_all_that_can_run_are_measured_and_the_fastest_is_named_first():
    times_ms = measure_kernels((2, 2, 64, 16), dtype=torch.float32, device=CPU)
    assert set(times_ms) == {"flash", "math"}, "a CPU has no other"
    assert list(times_ms.values()) == sorted(times_ms.values()) and min(times_ms.values()) > 0
    assert fastest({"math": 3.0, "flash": 2.0, "cudnn": 2.5}) == "flash"


def test_a_kernel_that_raises_is_no_candidate(monkeypatch):
    def attend_or_raise(q, k, v):
        if SDPBackend.MATH not in _cur_sdpa_kernel_backends():
            raise RuntimeError("No available kernel")
        return attend(q, k, v)

    monkeypatch.setattr(kernels, "attend", attend_or_raise)
    assert list(measure_kernels((1, 1, 8, 4), dtype=torch.float32, device=CPU)) == ["math"]


def operators_of(q_BHNK: torch.Tensor) -> set[str]:
    with torch.profiler.profile() as seen:
        attend(q_BHNK, q_BHNK, q_BHNK)
    return {event.name for event in seen.events()}


def test_the_pinned_kernel_runs_until_another_is_pinned():
    q_BHNK = torch.randn(1, 2, 16, 8)
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    for name, runs_flash in (("math", False), ("flash", True), ("cudnn", False), (None, True)):
        pin_kernel(name)
        assert (flash in operators_of(q_BHNK)) == runs_flash, name  # cudnn: not on a CPU, so math stands in


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"norm": "post", "position": "rotary"}])
def test_compiled_blocks_compute_the_same(more):
    said: list[str] = []
    results = []
    for is_compiled in (False, True):
        model = scrambled(VisionTransformer(config(depth=3, **more), recompute=2, drop_path=[0.5] * 3)).train()
        if is_compiled:
            names = list(model.state_dict())
            assert compile_blocks(model, batch=4, dtype=torch.float32, say=said.append), said
            assert list(model.state_dict()) == names
        torch.manual_seed(0)
        logits = model(images_of(config(), batch=4).float())
        logits.square().sum().backward()
        results.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    assert said == []
    for plain, compiled in zip(*results, strict=True):
        # Fused sums in another order: rounding of float32 relative to the largest value.
        torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5 * max(1.0, float(plain.abs().max())))


def test_a_compiler_that_fails_is_named_in_one_sentence_and_left_out(monkeypatch):
    def broken(self, *args, **kwargs):
        raise RuntimeError("no C++ compiler\nlong story")

    monkeypatch.setattr("vitscale.model.layers.Block.forward", broken)
    said: list[str] = []
    model = VisionTransformer(config())
    assert not compile_blocks(model, batch=2, dtype=torch.float32, say=said.append)
    (sentence,) = said
    assert "torch.compile failed here (no C++ compiler)" in sentence and "\n" not in sentence
    assert all(block._compiled_call_impl is None for block in model.blocks)
