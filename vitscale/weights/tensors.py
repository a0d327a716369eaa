"""Bare tensors by name in one .safetensors file, for files whose sha256 is recorded and checked elsewhere."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the file where it stands: whoever commits it flushes, hashes and renames."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read the file to the CPU, mapped into memory."""
    return load_file(path)
