"""What the optimizer updates on this rank: the adapter to DeepSpeed's internals (checked against its version by a test).

ZeRO flattens the parameters of a group into one vector and gives every rank a slice of it, the *flat partition*, in
float32. A *piece* is the part of one parameter that lies in one partition.

stage   partitions                                        key            a rank holds
0       the parameters themselves                         name           all of them
1, 2    single_partition_of_fp32_groups[group]            group          one slice of the whole vector
3       fp32_partitioned_groups_flat[sub-group]           sub-group      an equal, padded share of every parameter
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Piece:
    """`numel` consecutive numbers of a flattened parameter."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """Where the piece begins in the flattened parameter."""
    numel: int
    offset: int
    """Where it begins in the partition."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """One float32 tensor the optimizer is given, and whose numbers it holds; between and behind the pieces is padding."""

    key: str
    """The parameter's name at stage 0, else the number of the group or sub-group."""
    master: Tensor
    pieces: tuple[Piece, ...]


def partitions_of(model: nn.Module, zero: Any, *, stage: int, rank: int) -> list[Partition]:
    """The partitions of this rank after deepspeed.initialize; `zero` is DeepSpeed's wrapper of the optimizer (stage > 0)."""
    if stage == 0:
        return [whole(name, parameter) for name, parameter in model.named_parameters()]
    masters = zero.single_partition_of_fp32_groups if stage < 3 else zero.fp32_partitioned_groups_flat
    pieces: list[list[Piece]] = [[] for _ in masters]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage < 3:
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue
            group, offset = mapping.param_group_index, mapping.hp_fragment_address.start
            start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            shape = tuple(parameter.shape)
        else:
            group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
            start = padded * rank  # every rank holds an equal, padded share
            numel = max(0, min(padded, parameter.ds_numel - start))  # type: ignore[attr-defined]
            shape = tuple(parameter.ds_shape)  # type: ignore[attr-defined]
        if numel:
            pieces[group].append(Piece(name=name, shape=shape, start=start, numel=numel, offset=offset))
    return [
        Partition(key=str(group), master=master, pieces=tuple(sorted(held, key=lambda piece: piece.offset)))
        for group, (master, held) in enumerate(zip(masters, pieces, strict=True))
    ]


def whole(name: str, parameter: Tensor) -> Partition:
    """A parameter that is its own partition."""
    piece = Piece(name=name, shape=tuple(parameter.shape), start=0, numel=parameter.numel(), offset=0)
    return Partition(key=name, master=parameter, pieces=(piece,))


def publish_masters(zero: Any, *, stage: int) -> None:
    """Make the weights the model computes with those of the masters, on all ranks. Collective; nothing is gathered that
    is not kept gathered between steps anyway."""
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        zero.checkpoint_event_prologue()  # lets go of everything gathered
        for weights, master in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
            weights.data.copy_(master.data)
        zero.checkpoint_event_epilogue()  # gathers again what stays gathered
