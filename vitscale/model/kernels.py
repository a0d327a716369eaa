"""Which kernel computes attention: measured on the device and shapes of the run, then pinned for the process.

flash, cudnn, efficient, math are torch's names for the backends of scaled_dot_product_attention (`attention.attend`). None
is the fastest everywhere: on Hopper cuDNN's beats flash by far, on Ampere it loses. B H N K: as in attention.py.
"""

import contextlib
import time
from collections.abc import Mapping

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitscale.model.attention import attend

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
REPETITIONS, WARM_UP = 10, 3


def measure_kernels(shape_BHNK: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Median milliseconds of one forward and backward pass of each kernel that can run these shapes, the fastest first."""
    times = {}
    for name in KERNELS:
        elapsed_ms = _time_ms(name, shape_BHNK, dtype, device)
        if elapsed_ms is not None:
            times[name] = elapsed_ms
    return dict(sorted(times.items(), key=lambda item: item[1]))


def _time_ms(name: str, shape_BHNK: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> float | None:
    B, H, N, K = shape_BHNK
    # Laid out as the model lays them out: views of one matrix product, so strides are those of the run.
    packed = torch.randn(B, N, 3, H, K, device=device, dtype=dtype, requires_grad=True)
    elapsed_ms = []
    try:
        with sdpa_kernel(KERNELS[name]):
            for _ in range(WARM_UP + REPETITIONS):
                _wait_for(device)
                started_s = time.perf_counter()
                q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
                attend(q, k, v).sum().backward()
                _wait_for(device)
                elapsed_ms.append(1e3 * (time.perf_counter() - started_s))
    except RuntimeError:  # torch says so when a kernel does not exist for the device, the type or the shapes
        return None
    return sorted(elapsed_ms[WARM_UP:])[REPETITIONS // 2]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(times_ms: Mapping[str, float]) -> str:
    """The name with the smallest time."""
    return min(times_ms, key=lambda name: times_ms[name])


_pinned = contextlib.ExitStack()


def pin_kernel(name: str | None) -> None:
    """From now on `attend` takes this kernel in this process, and math where it cannot; None: torch's own choice."""
    _pinned.close()
    if name is not None:
        order = [KERNELS[name]] if name == "math" else [KERNELS[name], SDPBackend.MATH]
        _pinned.enter_context(sdpa_kernel(order, set_priority=True))
