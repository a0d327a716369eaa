"""AdamW, Lion, SGD and Muon on ZeRO's flat partitions, in one parameter group whatever the layers' rates and decays.

ZeRO makes buckets, partitions and collectives per parameter group, so layer decay by groups (2 (L + 2) of them) slows it
down. Here there is one group; each number's factor of the learning rate and weight decay follow from the *piece* of a
partition it lies in (training/pieces.py), and pieces with the same two go to one call. Element-wise optimizers need no
more: a partition knows neither rows nor columns, and its padding is never touched. Muon needs whole matrices for a moment,
and has them in a group of their own (training/muon.py).

State per partition: "exp_avg" (optim.moment_dtype), with adamw also "exp_avg_sq" (float32) and "step", a counter of its own.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vitscale.config import OptimConfig
from vitscale.model.vit import VisionTransformer, decays, layer_of, matrices_in
from vitscale.training.muon import MOMENTUM, bundled, orthogonal
from vitscale.training.pieces import Partition, whole

CHUNK = 1 << 22
"""Numbers that are updated at a time where the update needs room of its own: 16 MiB of float32."""


@dataclass(frozen=True, kw_only=True)
class Role:
    """How a parameter is updated."""

    rule: Literal["adamw", "lion", "sgd", "muon"]
    lr_factor: float
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class Span:
    """Neighbouring pieces of a partition with one role."""

    role: Role
    offset: int
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        # view, not reshape: what is written here must reach the tensor.
        return tensor if self.numel == tensor.numel() else tensor.view(-1)[self.offset : self.offset + self.numel]


def role_of(name: str, parameter: Tensor, *, depth: int, optim: OptimConfig) -> Role:
    """Layer decay as BEiT (Bao et al. 2022) and MAE (He et al. 2022) have it: the embeddings (patches, class token,
    registers, positions) are layer 0, block l is layer l + 1, all behind the blocks has factor 1; layer i of the
    L + 1 has factor layer_decay^(L + 1 - i). Matrices decay, the head's by its own rate. With muon the matrices of the
    blocks are its own, and adamw has the rest."""
    factor, rule = optim.layer_decay ** (depth + 1 - layer_of(name, depth=depth)), optim.optimizer
    if rule == "muon" and not (name.startswith("blocks.") and decays(name, parameter)):
        rule, factor = "adamw", factor * (optim.adam_lr or optim.peak_lr) / optim.peak_lr
    weight_decay = optim.weight_decay if decays(name, parameter) else 0.0
    if name == "head.weight" and optim.head_weight_decay is not None:
        weight_decay = optim.head_weight_decay
    return Role(rule=rule, lr_factor=factor, weight_decay=weight_decay)


class PartitionOptimizer(torch.optim.Optimizer):
    """The update of optim.optimizer on whole parameters, or, after `attach`, on the partitions ZeRO made of them.

    adamw   torch's fused kernel; decoupled decay (Loshchilov & Hutter 2019): w <- w - lr wd w - lr m' / (sqrt(v') + eps)
    lion    Chen et al. 2023, algorithm 2: c = b1 m + (1 - b1) g;  w <- w - lr wd w - lr sign(c);  m <- b2 m + (1 - b2) g
    sgd     m <- momentum m + g;  w <- w - lr wd w - lr m: decay beside the momentum, not in it as torch.optim.SGD has it
    muon    training/muon.py, for the matrices of the blocks; collective where ZeRO shares them out

    lr is the group's times the factor of the role. Gradients of None are left alone, state and counters with them.
    """

    def __init__(self, model: VisionTransformer, *, optim: OptimConfig) -> None:
        self.optim = optim
        self._config = model.config
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._roles = {name: role_of(name, p, depth=model.config.depth, optim=optim) for name, p in named.items()}
        # Matrices first: then the pieces of a layer with one role are neighbours in the partition, and make one span.
        order = sorted(named, key=lambda name: not decays(name, named[name]))
        is_muon = [self._roles[name].rule == "muon" for name in order]
        groups = [
            [named[name] for name, is_in in zip(order, is_muon, strict=True) if is_in == wanted] for wanted in (False, True)
        ]
        super().__init__([{"params": group} for group in groups if group], {"lr": optim.peak_lr})
        self.attach([whole(name, parameter) for name, parameter in named.items()])

    def attach(self, partitions: Sequence[Partition]) -> None:
        """Say which parameters lie where in the tensors this optimizer is given from now on."""
        self._partitions = {id(partition.master): partition for partition in partitions}
        self._spans = {id(partition.master): list(self._merged(partition)) for partition in partitions}

    def _merged(self, partition: Partition) -> Iterator[Span]:
        pieces = [piece for piece in partition.pieces if piece.name in self._roles]
        at = 0
        while at < len(pieces):
            role, offset, end = self._roles[pieces[at].name], pieces[at].offset, pieces[at].offset
            while at < len(pieces) and pieces[at].offset == end and self._roles[pieces[at].name] == role:
                end += pieces[at].numel
                at += 1
            yield Span(role=role, offset=offset, numel=end - offset)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every tensor that has a gradient."""
        assert closure is None, "the loss is computed by the engine"
        by_role: dict[Role, list[tuple[Tensor, Span]]] = defaultdict(list)
        lrs: dict[Role, float] = {}
        counters: list[Tensor] = []
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is None:
                    continue
                state = self.state[tensor] or self.fresh_state(tensor)
                if "step" in state:
                    counters.append(state["step"])
                if self._is_muon(tensor):
                    # On every rank, also on one that holds nothing of these matrices.
                    self._muon(tensor, group["lr"])
                    continue
                for span in self._spans[id(tensor)]:
                    by_role[span.role].append((tensor, span))
                    lrs[span.role] = group["lr"] * span.role.lr_factor
        if counters:
            torch._foreach_add_(counters, 1)
        update = {"adamw": self._adamw, "lion": self._lion, "sgd": self._sgd}
        for role, places in by_role.items():
            update[role.rule](places, lrs[role], role.weight_decay)

    def _is_muon(self, tensor: Tensor) -> bool:
        return any(self._roles[name].rule == "muon" for name in self._partitions[id(tensor)].shapes)

    def fresh_state(self, tensor: Tensor) -> dict[str, Tensor]:
        """Make the state of a tensor that has not been stepped yet."""
        state = self.state[tensor]
        state["exp_avg"] = torch.zeros_like(tensor, dtype=self._moment_dtype)
        if self.optim.optimizer in ("adamw", "muon") and not self._is_muon(tensor):
            state["exp_avg_sq"] = torch.zeros_like(tensor)
            state["step"] = torch.zeros((), device=tensor.device)
        return state

    @property
    def _moment_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.optim.moment_dtype == "bf16" else torch.float32

    def _adamw(self, places: list[tuple[Tensor, Span]], lr: float, weight_decay: float) -> None:
        for part in [places] if self._moment_dtype == torch.float32 else in_chunks(places):
            moments, moments_fp32 = self._moments(part)
            torch._fused_adamw_(
                _weights(part),
                _gradients(part),
                moments_fp32,
                self._states(part, "exp_avg_sq"),
                [],
                [self.state[tensor]["step"] for tensor, _ in part],
                lr=lr,
                beta1=self.optim.beta1,
                beta2=self.optim.beta2,
                weight_decay=weight_decay,
                eps=self.optim.eps,
                amsgrad=False,
                maximize=False,
            )
            _round(moments, moments_fp32)

    def _lion(self, places: list[tuple[Tensor, Span]], lr: float, weight_decay: float) -> None:
        for part in in_chunks(places):
            weights, gradients = _weights(part), _gradients(part)
            moments, moments_fp32 = self._moments(part)
            directions = torch._foreach_lerp(moments_fp32, gradients, 1 - self.optim.beta1)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(weights, 1 - lr * weight_decay)
            torch._foreach_add_(weights, directions, alpha=-lr)
            torch._foreach_lerp_(moments_fp32, gradients, 1 - self.optim.beta2)
            _round(moments, moments_fp32)

    def _sgd(self, places: list[tuple[Tensor, Span]], lr: float, weight_decay: float) -> None:
        for part in in_chunks(places):
            weights = _weights(part)
            moments, moments_fp32 = self._moments(part)
            torch._foreach_mul_(moments_fp32, self.optim.momentum)
            torch._foreach_add_(moments_fp32, _gradients(part))
            torch._foreach_mul_(weights, 1 - lr * weight_decay)
            torch._foreach_add_(weights, moments_fp32, alpha=-lr)
            _round(moments, moments_fp32)

    def _muon(self, tensor: Tensor, lr: float) -> None:
        partition = self._partitions[id(tensor)]
        assert tensor.grad is not None
        weights, gradients, moments = (
            flat.view(-1) for flat in (tensor, tensor.grad.contiguous(), self.state[tensor]["exp_avg"])
        )
        held = {piece.name: piece for piece in partition.pieces}
        # Offloaded partitions stand in host memory, where neither products are fast nor NCCL reaches.
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else tensor.device
        for names in bundled(partition.shapes):
            directions = []
            for name in names:
                shape = torch.Size(partition.shapes[name])
                direction = torch.zeros(shape, device=device)
                if (piece := held.get(name)) is not None:
                    mine = slice(piece.offset, piece.offset + piece.numel)
                    moment = moments[mine].float().lerp_(gradients[mine], 1 - MOMENTUM)
                    moments[mine] = moment
                    direction.view(-1)[piece.start : piece.start + piece.numel] = gradients[mine].lerp(moment, MOMENTUM)
                directions.append(direction)
            stacks = [matrices_in(name, self._config) for name in names]
            for name, direction in zip(names, orthogonal(directions, stacks, is_sharded=partition.is_sharded), strict=True):
                if (piece := held.get(name)) is not None:
                    rate, mine = lr * self._roles[name].lr_factor, slice(piece.offset, piece.offset + piece.numel)
                    weights[mine].mul_(1 - rate * self._roles[name].weight_decay)
                    update = direction.reshape(-1)[piece.start : piece.start + piece.numel]
                    weights[mine].sub_(update.to(weights.device), alpha=rate)

    def _states(self, places: list[tuple[Tensor, Span]], key: str) -> list[Tensor]:
        return [span.of(self.state[tensor][key]) for tensor, span in places]

    def _moments(self, places: list[tuple[Tensor, Span]]) -> tuple[list[Tensor], list[Tensor]]:
        """The first moments as kept and as computed with; the same tensors where they are kept in float32."""
        kept = self._states(places, "exp_avg")
        return kept, [moment.float() for moment in kept]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would turn a bfloat16 moment into the type of its tensor."""
        super().load_state_dict(state_dict)
        for tensor, state in self.state.items():
            state["exp_avg"] = state["exp_avg"].to(self._moment_dtype)
            if "step" in state:
                # A copy: counters that share storage would count each other's steps.
                state["step"] = state["step"].to(tensor.device, torch.float32, copy=True)


def in_chunks(places: list[tuple[Tensor, Span]]) -> Iterator[list[tuple[Tensor, Span]]]:
    """The places again, cut and bundled so that a bundle has about CHUNK numbers."""
    bundle: list[tuple[Tensor, Span]] = []
    room = CHUNK
    for tensor, span in places:
        for begin in range(0, span.numel, CHUNK):
            numel = min(CHUNK, span.numel - begin)
            if numel > room and bundle:
                yield bundle
                bundle, room = [], CHUNK
            bundle.append((tensor, Span(role=span.role, offset=span.offset + begin, numel=numel)))
            room -= numel
    if bundle:
        yield bundle


def _round(kept: list[Tensor], computed: list[Tensor]) -> None:
    """Store what `_moments` gave and an update changed."""
    if kept[0].dtype != torch.float32:
        torch._foreach_copy_(kept, computed)


def _weights(places: list[tuple[Tensor, Span]]) -> list[Tensor]:
    return [span.of(tensor) for tensor, span in places]


def _gradients(places: list[tuple[Tensor, Span]]) -> list[Tensor]:
    return [span.of(tensor.grad.contiguous()) for tensor, span in places if tensor.grad is not None]


def make_optimizer(model: VisionTransformer, *, optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of the recipe for a fresh model."""
    return PartitionOptimizer(model, optim=optim)
