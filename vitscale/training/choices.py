"""Choices made by measurement: rank 0 makes them once, RUN/choices.json keeps them, a resume takes them from there.

{"attention": {"kernel": "cudnn", "device": "NVIDIA H200", "shape_BHNK": [64, 16, 197, 64], "dtype": "bfloat16",
               "times_ms": {"cudnn": 1.2, ...}}}
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vitscale.base.files import read_json, write_json
from vitscale.model.kernels import fastest, measure_kernels, pin_kernel
from vitscale.training.collectives import from_rank_zero

CHOICES = "choices.json"
TORCH, MEASURED = "torch", "measured"


def choose_attention(
    run: Path,
    wanted: str,
    *,
    shape_BHNK: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    rank: int,
    say: Callable[[str], None],
) -> str | None:
    """Pin the attention kernel of this run and return its name, None where torch chooses. Collective.

    wanted: "torch", "measured", or a kernel by its name. A measured choice is made once per device, shape and type. A
    named kernel that cannot run gives way to the fastest that can, in one sentence. A CPU has one fast kernel, which
    torch takes: nothing is measured there, and equal runs stay equal bit for bit.
    """
    if wanted == TORCH or (wanted == MEASURED and device.type == "cpu"):
        pin_kernel(None)
        if wanted == MEASURED and rank == 0:
            say("attention kernel: torch's own; nothing is measured on a CPU")
        return None
    kernel, sentence = from_rank_zero(
        _decide(run, wanted, shape_BHNK=shape_BHNK, dtype=dtype, device=device) if rank == 0 else None
    )
    pin_kernel(kernel)
    if rank == 0:
        say(sentence)
    return kernel


def _decide(
    run: Path, wanted: str, *, shape_BHNK: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[str, str]:
    """(kernel, what to say). Rank 0."""
    path = run / CHOICES
    stored: dict[str, Any] = read_json(path) if path.is_file() else {}
    where = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "shape_BHNK": list(shape_BHNK),
        "dtype": str(dtype).removeprefix("torch."),
    }
    known = stored.get("attention", {})
    if any(known.get(key) != value for key, value in where.items()):
        known = {**where, "times_ms": measure_kernels(shape_BHNK, dtype=dtype, device=device)}
        known["kernel"] = fastest(known["times_ms"])
        write_json(path, {**stored, "attention": known})
    table = ", ".join(f"{name} {elapsed_ms:.3g} ms" for name, elapsed_ms in known["times_ms"].items())
    measured = f"{table} for {'x'.join(map(str, shape_BHNK))} {where['dtype']} on {where['device']}"
    if wanted == MEASURED:
        return known["kernel"], f"attention kernel: {known['kernel']} ({measured})"
    if wanted not in known["times_ms"]:
        return known["kernel"], f"attention kernel {wanted} cannot run here, {known['kernel']} takes its place ({measured})"
    return wanted, f"attention kernel: {wanted}, as ds_config says ({measured})"
