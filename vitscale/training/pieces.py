"""What the optimizer updates on this rank: the adapter to DeepSpeed's internals (checked against its version by a test).

ZeRO flattens the parameters of a group into one vector and gives every rank a slice of it, the *flat partition*, in
float32. A *piece* is the part of one parameter that lies in one partition.

stage   partitions                                        key            a rank holds
0       the parameters themselves                         name           all of them
1, 2    single_partition_of_fp32_groups[group]            group          one slice of the whole vector
3       fp32_partitioned_groups_flat[sub-group]           sub-group      an equal, padded share of every parameter
"""

from collections.abc import Mapping
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
    shapes: Mapping[str, tuple[int, ...]]
    """Of all parameters the group was made of, also of those this rank holds nothing of; equal on all ranks."""
    is_sharded: bool = False
    """Whether other ranks hold other parts of the same group."""


def partitions_of(model: nn.Module, zero: Any, *, stage: int, rank: int, world: int) -> list[Partition]:
    """The partitions of this rank after deepspeed.initialize; `zero` is DeepSpeed's wrapper of the optimizer (stage > 0)."""
    if stage == 0:
        return [whole(name, parameter) for name, parameter in model.named_parameters()]
    masters = zero.single_partition_of_fp32_groups if stage < 3 else zero.fp32_partitioned_groups_flat
    groups = zero.bit16_groups if stage < 3 else zero.fp16_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    partitions = []
    for number, (master, group) in enumerate(zip(masters, groups, strict=True)):
        shapes = {names[id(parameter)]: tuple(getattr(parameter, "ds_shape", parameter.shape)) for parameter in group}
        pieces = []
        for parameter in group:
            if stage < 3:
                mapping = parameter._hp_mapping
                if mapping is None:
                    continue
                offset = mapping.hp_fragment_address.start
                start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            else:
                _, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
                start = padded * rank  # every rank holds an equal, padded share
                numel = max(0, min(padded, parameter.ds_numel - start))
            if numel:
                name = names[id(parameter)]
                pieces.append(Piece(name=name, shape=shapes[name], start=start, numel=numel, offset=offset))
        partitions.append(Partition(key=str(number), master=master, pieces=tuple(pieces), shapes=shapes, is_sharded=world > 1))
    return partitions


def whole(name: str, parameter: Tensor) -> Partition:
    """A parameter that is its own partition."""
    piece = Piece(name=name, shape=tuple(parameter.shape), start=0, numel=parameter.numel(), offset=0)
    return Partition(key=name, master=parameter, pieces=(piece,), shapes={name: piece.shape})


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
