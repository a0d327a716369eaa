"""Muon's direction: the nearest (semi-)orthogonal matrix to a momentum (Jordan et al. 2024, github.com/KellerJordan/Muon).

    m <- b m + (1 - b) g;   u = b m + (1 - b) g;   w <- w - lr wd w - lr sqrt(max(1, rows / columns)) orthogonal(u)

with b = 0.95 and `orthogonal` by five steps of a quintic Newton-Schulz iteration. Matrices that stand one above the other
in one parameter (queries, keys, values; the two inputs of SwiGLU) are orthogonalised each by itself.

Where ZeRO shares matrices out, momentum and update stay in the partitions and u is put together for a moment: reduced to
one rank, orthogonalised there, broadcast; the ranks take turns. DeepSpeed 0.19.8 has a Muon too, which is not used: at
stages 1 to 3 it orthogonalises before the norm is taken, so that clipping scales its updates instead of the gradient and the
reported norm is not the gradient's; its momentum does not have the shape of the partitions; and it asks for
reduce_scatter=false at stage 3.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

MOMENTUM = 0.95
ROOM = 1 << 22
"""Numbers of whole matrices that exist at a time: 16 MiB of float32, or one larger matrix."""


def bundled(shapes: Mapping[str, Sequence[int]]) -> Iterator[list[str]]:
    """The names in their order, in bundles of about ROOM numbers; equal on all ranks."""
    bundle: list[str] = []
    numel = 0
    for name, shape in shapes.items():
        if bundle and numel + math.prod(shape) > ROOM:
            yield bundle
            bundle, numel = [], 0
        bundle.append(name)
        numel += math.prod(shape)
    if bundle:
        yield bundle


def orthogonal(momenta: Sequence[Tensor], stacks: Sequence[int], *, is_sharded: bool) -> list[Tensor]:
    """The direction of each matrix, scaled; `stacks`: how many matrices stand one above the other in each.

    With `is_sharded`, every rank gives zeros where others hold the numbers, and all get all directions. Collective then.
    """
    if not is_sharded:
        return [_orthogonal(momentum, stack) for momentum, stack in zip(momenta, stacks, strict=True)]
    rank, world = dist.get_rank(), dist.get_world_size()
    gathering = [dist.reduce(momentum, dst=n % world, async_op=True) for n, momentum in enumerate(momenta)]
    for gathered in gathering:
        gathered.wait()
    directions = [
        _orthogonal(momentum, stack) if n % world == rank else momentum
        for n, (momentum, stack) in enumerate(zip(momenta, stacks, strict=True))
    ]
    sending = [dist.broadcast(direction, src=n % world, async_op=True) for n, direction in enumerate(directions)]
    for sent in sending:
        sent.wait()
    return directions


def _orthogonal(momentum: Tensor, stack: int) -> Tensor:
    matrices = momentum.view(stack, -1, momentum.shape[-1])
    rows, columns = matrices.shape[-2:]
    return (newton_schulz(matrices) * math.sqrt(max(1.0, rows / columns))).view_as(momentum)


def newton_schulz(matrices: Tensor) -> Tensor:
    """Five quintic steps that bring all singular values of each matrix near 1, between 0.7 and 1.2; in bfloat16 on a GPU."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        product = x @ x.mT
        x = a * x + (b * product + c * product @ product) @ x
    return (x.mT if is_tall else x).to(matrices.dtype).contiguous()
