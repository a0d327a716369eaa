"""Bare tensors by name in one .safetensors file, for files whose sha256 is recorded and checked elsewhere."""

import errno
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the file where it stands: whoever commits it flushes, hashes and renames. Raises OSError."""
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from None  # it has no errno of its own


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read the file to the CPU, mapped into memory."""
    return load_file(path)
