"""Exponential moving averages of the parameters, kept where the float32 masters are and never gathered.

    average <- average + (1 - decay) (master - average)     after each applied step (Polyak & Juditsky 1992, as timm has it)

An average starts as the weights the run starts from. At stages 1 to 3 a rank keeps the averages of its own partitions:
4 bytes x decays x (parameters / ranks). At stage 0, where every rank has all parameters, every rank keeps all averages:
that costs 4 bytes x decays x parameters and no communication, and rank 0 writes them.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from vitscale.training.pieces import Partition

CHUNK = 1 << 22
"""Numbers exchanged at a time: 16 MiB of room."""


class Averages:
    """The averages of one rank's partitions, one set for each decay."""

    def __init__(self, partitions: Iterable[Partition], decays: Sequence[float]) -> None:
        self.decays = tuple(decays)
        self._masters = {partition.key: partition.master.detach() for partition in partitions}
        self._averages = {decay: {key: master.clone() for key, master in self._masters.items()} for decay in decays}

    @torch.no_grad()
    def update(self) -> None:
        """Take the masters of an applied step into every average."""
        masters = list(self._masters.values())
        for decay in self.decays:
            torch._foreach_lerp_(list(self._averages[decay].values()), masters, 1 - decay)

    @torch.no_grad()
    def swap(self, decay: float) -> None:
        """Exchange masters and averages in place, exactly; twice is nothing."""
        for key, master in self._masters.items():
            room = torch.empty(min(CHUNK, master.numel()), device=master.device)
            for ours, theirs in zip(
                master.view(-1).split(CHUNK), self._averages[decay][key].view(-1).split(CHUNK), strict=True
            ):
                kept = room[: ours.numel()].copy_(ours)
                ours.copy_(theirs)
                theirs.copy_(kept)

    def of(self, decay: float, key: str) -> Tensor:
        """The average of one partition, to be written into."""
        return self._averages[decay][key]

    def tensors(self) -> dict[str, Tensor]:
        """Every average by "decay/key of its partition"."""
        return {tensor_name(decay, key): average for decay in self.decays for key, average in self._averages[decay].items()}


def tensor_name(decay: float, key: str) -> str:
    """The name of an average in a file."""
    return f"{decay}/{key}"
