"""Bytes per rank in closed form: what ZeRO keeps of the model by stage and precision, and what a micro-batch adds.

held       all the time
backward   besides, while a micro-batch is between its forward and the end of its backward
update     besides, while the optimizer updates: never together with `backward`

The peak is held + max(backward, update). Not counted: what the allocator rounds up and fragments, the workspaces of kernels and
NCCL, the CUDA context (together one or a few GB), and what stochastic depth saves.

P parameters   N ranks   B micro-batch   R image size   C channels   S tokens   D width   M feed-forward width   L depth
K classes
w bytes of a weight   a bytes of an accumulated gradient   m bytes of the moments of a parameter   e bytes of an activation
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from vitscale.config import Config, OptimConfig
from vitscale.ds_config import DsConfig
from vitscale.model.config import ModelConfig, Recompute
from vitscale.model.flops import parameter_shapes, parameters
from vitscale.planning.activations import saved_bytes

When = Literal["held", "backward", "update"]

# DeepSpeed's defaults where ds_config.json says nothing (zero/config.py).
BUCKET_NUMBERS = 500_000_000
LIVE_NUMBERS = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Term:
    """One line of the sum."""

    what: str
    formula: str
    bytes: int
    when: When
    on_host: bool = False
    """In the memory of the host, not of the accelerator."""


def memory_terms(config: Config, ds: DsConfig, *, image_size: int) -> tuple[Term, ...]:
    """Every term for one rank; `image_size` is the largest the run trains on."""
    model = dataclasses.replace(config.model, image_size=image_size)
    return (*_states(config, ds), *_micro_batch(model, config, ds))


def peak_bytes(terms: tuple[Term, ...], *, on_host: bool = False) -> int:
    """held + max(backward, update), of the accelerator or of the host's memory that one rank needs."""
    sums = {when: total(terms, when, on_host=on_host) for when in ("held", "backward", "update")}
    return sums["held"] + max(sums["backward"], sums["update"])


def total(terms: tuple[Term, ...], when: str, *, on_host: bool = False) -> int:
    """Sum of the terms of one kind."""
    return sum(term.bytes for term in terms if term.when == when and term.on_host == on_host)


def _states(config: Config, ds: DsConfig) -> list[Term]:
    """What does not depend on the images."""
    P, N, stage = parameters(config.model), ds.world, ds.stage
    zero: dict[str, Any] = ds.engine["zero_optimization"]
    is_low = config.train.precision == "fp16" or (config.train.precision == "bf16" and stage >= 2)
    w = 2 if is_low else 4
    a = 2 if ds.engine.get("bf16", {}).get("enabled") and not ds.engine.get("data_types") else 4
    shared = N if stage >= 1 else 1
    per = " / N" if stage >= 1 else ""
    host = ds.offload_optimizer
    moments = moment_bytes(config.model, config.optim)

    weights_share = w * P // N if stage == 3 else w * P
    terms = [
        Term(
            what="weights",
            formula=f"{w} P{' / N' if stage == 3 else ''}",
            bytes=weights_share,
            when="held",
            on_host=ds.offload_param,
        )
    ]
    if stage >= 1 or w == 2:
        # ZeRO updates a float32 copy of its partition, also of float32 weights.
        terms.append(Term(what="masters", formula=f"4 P{per}", bytes=4 * P // shared, when="held", on_host=host))
    terms.append(
        Term(
            what=f"{config.optim.optimizer}'s moments",
            formula=f"{moments / P:.3g} P{per}",
            bytes=moments // shared,
            when="held",
            on_host=host,
        )
    )
    gradients = (a * P // N, f"{a} P / N") if stage >= 2 else (4 * P, "4 P")
    terms.append(Term(what="gradients", formula=gradients[1], bytes=gradients[0], when="held", on_host=host and stage >= 2))
    if config.train.ema:
        k = len(config.train.ema)
        terms.append(Term(what="averages", formula=f"{k} x 4 P{per}", bytes=k * 4 * P // shared, when="held", on_host=host))
    if config.train.precision == "bf16" and not is_low:
        terms.append(Term(what="bf16 copies of weights", formula="2 P", bytes=2 * P, when="backward"))
    if stage == 3:
        live = min(P, int(zero.get("stage3_max_live_parameters", LIVE_NUMBERS)))
        terms.append(Term(what="gathered weights", formula=f"{w} min(P, max_live_parameters)", bytes=w * live, when="backward"))
    if stage >= 1 and zero.get("contiguous_gradients", True):
        # One for each type that gradients are sent in, of which autocast has two, and twice with overlap_comm.
        buffers = 2 if "torch_autocast" in ds.engine else 1
        buffers *= 2 if stage < 3 and zero.get("overlap_comm", False) else 1
        bucket = int(zero.get("reduce_bucket_size", BUCKET_NUMBERS))
        terms.append(
            Term(
                what="reduction buffer",
                formula=f"{buffers} x {w} reduce_bucket_size",
                bytes=buffers * w * bucket,
                when="held" if stage == 3 else "backward",
            )
        )
    if stage >= 1:
        terms.append(Term(what="flat gradient", formula="4 P / N", bytes=4 * P // N, when="update", on_host=host))
    return terms


def moment_bytes(model: ModelConfig, optim: OptimConfig) -> int:
    """Bytes of the moments of all parameters: adamw a first and a second (float32), lion, sgd and muon's matrices one."""
    first = 2 if optim.moment_dtype == "bf16" else 4
    if optim.optimizer in ("lion", "sgd"):
        return first * parameters(model)
    if optim.optimizer == "adamw":
        return (first + 4) * parameters(model)
    shapes = parameter_shapes(model)
    matrices = sum(prod(shape) for name, shape in shapes.items() if name.startswith("blocks.") and len(shape) == 2)
    return first * matrices + (first + 4) * (parameters(model) - matrices)


def _micro_batch(model: ModelConfig, config: Config, ds: DsConfig) -> list[Term]:
    """What forward and backward of one micro-batch keep."""
    B, e = ds.micro_batch, 4 if config.train.precision == "fp32" else 2
    pixels = model.channels * model.image_size**2

    def saved(depth: int, recompute: Recompute) -> int:
        sized = dataclasses.replace(model, depth=depth)
        return saved_bytes(sized, recompute, element_bytes=e, dropout=config.train.dropout)

    terms = [
        Term(what="images", formula=f"{6 + e} B C R^2", bytes=(6 + e) * B * pixels, when="backward"),
        Term(
            what="activations",
            formula=f"B x {saved(model.depth, ds.recompute):,} (planning/activations.py)",
            bytes=B * saved(model.depth, ds.recompute),
            when="backward",
        ),
    ]
    if config.train.precision == "bf16" and ds.stage <= 1:
        # Under autocast the sums of the residual path are float32: the inputs of the norms, or of recomputed blocks.
        kept = 1 if model.parallel or ds.recompute != 0 else 2
        terms.append(
            Term(
                what="float32 residual path",
                formula=f"{2 * kept} B L S D",
                bytes=2 * kept * B * model.depth * model.tokens * model.width,
                when="backward",
            )
        )
    if again := _computed_again(model, ds.recompute, saved):
        terms.append(Term(what="one block computed again", formula=f"B x {again:,}", bytes=B * again, when="backward"))
    in_flight = B * model.tokens * model.feedforward_width * e
    terms.append(Term(what="gradient inside a block", formula=f"{e} B S M", bytes=in_flight, when="backward"))
    copies = e + 8 + (4 if config.train.objective == "softmax" else 0)
    parts = "logits, in float32, their gradient" + (", log-softmax" if config.train.objective == "softmax" else "")
    terms.append(Term(what=parts, formula=f"{copies} B K", bytes=copies * B * model.classes, when="backward"))
    return terms


def _computed_again(model: ModelConfig, recompute: Recompute, saved: Callable[[int, Recompute], int]) -> int:
    """Bytes per image of the last recomputed block, while nothing behind it has been given back yet."""
    if recompute == 0 or (isinstance(recompute, int) and (model.depth - 1) % recompute):
        return 0  # the last block is kept whole, and is gone before another one is computed again
    whole = saved(2, 0) - saved(1, 0)
    return whole - (saved(2, recompute) - saved(1, recompute)) if recompute == "selective" else whole
