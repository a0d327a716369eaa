"""Peak dense bf16 speed of accelerators, the denominator of MFU. Vendor data sheets, without sparsity."""

# FLOP/s by a part of the device name.
PEAK_BF16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def peak_flops_of(device_name: str) -> float | None:
    """Peak FLOP/s of a device by its name, or None where it is not known (then MFU is null)."""
    return next((peak for part, peak in PEAK_BF16.items() if part in device_name), None)
