"""What DeepSpeed gives the optimizer, and the weights there are after it, as whole parameters.

The gradient is read in the moment the optimizer's own step begins: behind accumulation, reduction, loss scale and every
cast, from the very tensor the update will use. Nothing before that is right or wrong by itself.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from vitscale.training.engine import Engine
from vitscale.training.pieces import Partition


class Probe:
    """Watches the steps of one engine; make it before the first. Every method is collective."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.partitions = engine.partitions
        self._given: dict[int, Tensor] = {}
        wrapper: Any = engine.zero_optimizer
        # DeepSpeed wraps our optimizer, but for stage 0 in float32. Of a split offload some partitions are stepped by a second.
        inner = getattr(wrapper, "optimizer", wrapper)
        watched = [inner, *([wrapper.backup_optimizer] if getattr(wrapper, "backup_optimizer", None) is not None else [])]
        self._hooks = [optimizer.register_step_pre_hook(self._record) for optimizer in watched]

    def _record(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._given[id(tensor)] = tensor.grad.detach().clone()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole gradient in float32) of every parameter, as this rank sees it; zeros where nothing was given."""
        return self._whole([self._given.get(id(partition.master)) for partition in self.partitions])

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole weight in float32) of every parameter, as this rank sees it."""
        return self._whole([partition.master.detach() for partition in self.partitions])

    def _whole(self, tensors: list[Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        """One parameter at a time, so that no more than one is gathered. At stage 0 every rank has its own, unreduced."""
        held = pieces_by_name(self.partitions, tensors)
        for name, parameter in self.engine.module.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            flat = torch.zeros(shape.numel(), device=self.engine.device)
            for start, values in held.get(name, []):
                flat[start : start + values.numel()] = values.to(flat.device, torch.float32)
            if self.engine.ds.stage > 0:
                torch.distributed.all_reduce(flat)
            yield name, flat.view(shape)  # of its own memory, which no later step changes

    def stale_weights(self) -> dict[str, int]:
        """How many numbers of each parameter that this rank computes with are not its masters, rounded; none: no entry."""
        if self.engine.ds.stage == 0:
            return {}  # masters and weights are one
        stale = {}
        masters: dict[str, Any] = dict(self.engine.module.named_parameters())
        if self.engine.ds.stage < 3:
            for name, master in self.masters():
                weight = masters[name].detach()
                stale[name] = int((weight != master.to(weight.dtype)).sum())
        else:
            held = pieces_by_name(self.partitions, [partition.master.detach() for partition in self.partitions])
            for name, pieces in held.items():
                share = masters[name].ds_tensor.detach().flatten()
                for _, values in pieces:  # one: a rank holds one share of a parameter
                    unequal = share[: values.numel()] != values.to(share.device, share.dtype)
                    stale[name] = int(unequal.sum())
        return {name: count for name, count in stale.items() if count}


def pieces_by_name(partitions: list[Partition], tensors: list[Tensor | None]) -> dict[str, list[tuple[int, Tensor]]]:
    """Where each piece of a parameter starts in it, and its numbers in the tensors that stand for the partitions."""
    held: dict[str, list[tuple[int, Tensor]]] = {}
    for partition, tensor in zip(partitions, tensors, strict=True):
        if tensor is None:
            continue
        flat = tensor.flatten()
        for piece in partition.pieces:
            held.setdefault(piece.name, []).append((piece.start, flat[piece.offset : piece.offset + piece.numel]))
    return held
