"""Copies in host memory of what a checkpoint is made of, so that training goes on while they are written.

The memory is taken at the first save and used again by every later one: as many bytes per rank as its files have. On a GPU it
is pinned, and the copies of all tensors run before anything waits for them.
"""

import copy
from typing import Any

import torch
from torch import Tensor


class HostMemory:
    """Room for the tensors of one save at a time."""

    def __init__(self) -> None:
        self._room: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}
        self._used = 0

    def staged(self, content: Any) -> Any:
        """The same containers with copies of the tensors. What an earlier call returned is overwritten."""
        self._used = 0
        copied = self._copy(content)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _copy(self, content: Any) -> Any:
        if isinstance(content, Tensor):
            return self._copy_tensor(content.detach())
        if isinstance(content, dict):
            return type(content)((key, self._copy(value)) for key, value in content.items())
        if type(content) in (list, tuple):
            return type(content)(self._copy(value) for value in content)
        return copy.deepcopy(content)

    def _copy_tensor(self, tensor: Tensor) -> Tensor:
        key = (self._used, tensor.shape, tensor.dtype)
        self._used += 1
        if key not in self._room:
            self._room[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return self._room[key].copy_(tensor, non_blocking=tensor.is_cuda)
