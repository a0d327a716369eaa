"""Compare what all ranks must hold equally, bit for bit: a flipped bit in one copy is found, and the rank that has it named.

checksum   of a tensor: its bytes as 64-bit integers, added modulo 2^64, on its device and without a copy of it. One flipped
           bit changes it always; two cancel when they stand at one place of their 64 bits and one rises as the other falls
replicas   stages 0 to 2: parameters and buffers; stage 3: buffers, and the parameters that stay gathered. At stage 0 also the
           optimizer's state and the moving averages, of which every rank has all

The checksums of all tensors go around in one all-gather. Most ranks are right; without a majority the weights are made anew
from the masters (stages 1 to 3, where one rank holds each), and whose copy changes by that was wrong. At stages 1 to 3 every
update makes the weights anew anyway, so a flipped bit in a copy lives until the end of its step: it is looked for behind the
last forward pass. What only one rank holds, its share of masters and moments, has no replica and is not seen here.

A difference ends the run (exit 75) before anything is saved; the same command goes on from the last checkpoint.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.distributed
from torch import Tensor

from vitscale.base.errors import TransientFault
from vitscale.training.collectives import from_all_ranks
from vitscale.training.engine import Engine
from vitscale.training.metrics import Metrics

WORD_BYTES = 8
CHUNK_BYTES = 16 << 20
"""Copied at a time where a tensor does not begin at a multiple of a word."""


class CorruptReplica(TransientFault):
    """The copies of a tensor differ between ranks. All ranks raise it; rank 0 says it."""

    every_rank_speaks = False


class Integrity:
    """The check of one run. Collective."""

    def __init__(self, engine: Engine, *, every_steps: int, host: str, metrics: Metrics | None) -> None:
        """`every_steps` 0: never. `metrics` is there on rank 0 only."""
        self._engine = engine
        self._every_steps = every_steps
        self._host = host
        self._metrics = metrics

    def check_when_due(self, step: int) -> None:
        """`check`, every so many steps."""
        if self._every_steps and step % self._every_steps == 0:
            self.check(step)

    def check(self, step: int) -> None:
        """Raise CorruptReplica on all ranks, and note it in events.jsonl, where the replicas are not equal."""
        if not self._every_steps:
            return
        found = differing_replicas(self._engine)
        if not found:
            return
        hosts = from_all_ranks(self._host)
        tensors = [{"tensor": name, "ranks": ranks, "hosts": [hosts[rank] for rank in ranks]} for name, ranks in found.items()]
        if self._metrics is not None:
            self._metrics.log_events([{"step": step, "event": "corrupt", "tensors": tensors}])
        name, ranks = next(iter(found.items()))
        more = f", and {len(found) - 1} more tensors differ" if len(found) > 1 else ""
        whose = " or ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)
        raise CorruptReplica(
            f"at step {step} the copies of {name} are not equal on all ranks, and {whose} has the wrong bits{more}; nothing "
            "was saved since: the same command goes on from the last checkpoint, and if that host is named again, leave it out"
        )


def differing_replicas(engine: Engine) -> dict[str, list[int]]:
    """Tensors whose copies differ, each with the ranks that hold wrong ones: all ranks where nobody can tell. Collective."""
    names, sums = checksums(engine.replicas())
    if not names:  # stage 3 may keep nothing gathered
        return {}
    rows = torch.empty(engine.world * len(names), dtype=torch.int64, device=engine.device)
    torch.distributed.all_gather_into_tensor(rows, sums)
    by_rank = rows.view(engine.world, len(names))
    wrong = (by_rank != by_rank[0]).any(dim=0).nonzero().flatten().tolist()
    if not wrong:
        return {}
    found = {names[column]: minority(by_rank[:, column].tolist()) for column in wrong}
    if engine.ds.stage > 0 and any(len(ranks) == engine.world for ranks in found.values()):
        engine.publish_masters()
        _, anew = checksums(engine.replicas())
        changed = from_all_ranks((sums != anew).tolist())
        for column in wrong:
            ranks = [rank for rank in range(engine.world) if changed[rank][column]]
            if len(found[names[column]]) == engine.world and ranks:
                found[names[column]] = ranks
    return found


def minority(values: Sequence[int]) -> list[int]:
    """The ranks whose value is not that of more than half of all; every rank where there is no such value. Pure."""
    value, count = Counter(values).most_common(1)[0]
    return [rank for rank, other in enumerate(values) if 2 * count <= len(values) or other != value]


def checksums(tensors: Iterator[tuple[str, Tensor]]) -> tuple[list[str], Tensor]:
    """(names, int64 checksums on the device, in the same order)."""
    named = [(name, checksum(tensor)) for name, tensor in tensors]
    sums = torch.stack([value for _, value in named]) if named else torch.empty(0, dtype=torch.int64)
    return [name for name, _ in named], sums


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Sum of the bytes as 64-bit integers, the last few that fill none added as they are; int64, on the tensor's device."""
    octets = tensor.detach().reshape(-1).view(torch.uint8)
    end = len(octets) // WORD_BYTES * WORD_BYTES
    if octets.storage_offset() % WORD_BYTES == 0:
        sums = [octets[:end].view(torch.int64).sum()]
    else:
        # A parameter may lie anywhere in a flat buffer, and torch sees integers only at multiples of their size.
        sums = [chunk.clone().view(torch.int64).sum() for chunk in octets[:end].split(CHUNK_BYTES)]
    if end < len(octets):
        sums.append(octets[end:].sum(dtype=torch.int64))
    return torch.stack(sums).sum() if len(sums) > 1 else sums[0]
