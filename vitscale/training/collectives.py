"""What the ranks tell each other beside the training: values, barriers, and groups in host memory for one thread of each.

Objects travel pickled, between the ranks of one run only.
"""

import datetime
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed

PROCESS_GROUP_TIMEOUT = datetime.timedelta(minutes=30)


def barrier() -> None:
    """Wait until every rank is here."""
    torch.distributed.barrier()


def from_rank_zero(value: Any, group: Any = None) -> Any:
    """The value rank 0 has, on every rank. Collective."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, group=group)
    return box[0]


def from_all_ranks(value: Any, group: Any = None) -> list[Any]:
    """The values of all ranks, in rank order, on every rank. Collective."""
    box: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(box, value, group=group)
    return box


def new_control_group(timeout: datetime.timedelta = PROCESS_GROUP_TIMEOUT) -> Any:
    """A gloo group of all ranks for one thread of each that speaks beside the training. Collective."""
    return torch.distributed.new_group(backend="gloo", timeout=timeout)


@functools.cache
def control_group() -> Any:
    """The control group of the main thread. Collective at the first call."""
    return new_control_group()


def max_over_ranks(values: Sequence[int]) -> list[int]:
    """Largest of each whole number over the ranks, past the device. Collective; main thread only."""
    largest = torch.tensor(values, dtype=torch.int64)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=control_group())
    return largest.tolist()
