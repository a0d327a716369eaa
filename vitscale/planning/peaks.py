"""Accelerators by name: peak dense bf16 speed, the denominator of MFU, and memory. Vendor data sheets, without sparsity."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One accelerator."""

    peak_bf16: float
    """FLOP/s."""
    memory_bytes: float


# By a part of the device name.
GPUS = {
    "A100": Gpu(312e12, 80e9),
    "H100": Gpu(989e12, 80e9),
    "H200": Gpu(989e12, 141e9),
    "B200": Gpu(2250e12, 180e9),
}


def peak_flops_of(device_name: str) -> float | None:
    """Peak FLOP/s of a device by its name, or None where it is not known (then MFU is null)."""
    return next((gpu.peak_bf16 for part, gpu in GPUS.items() if part in device_name), None)
