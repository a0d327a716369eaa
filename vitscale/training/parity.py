"""Are the gradients right? One step of the real engine against plain torch on the same weights and images.

    given      the gradient the engine's optimizer is handed (probe.py)
    reference  plain torch in float32 over the same micro-batches, averaged over the ranks by one all-reduce (reference.py)
    yardstick  plain torch again, as coarse as the run: what rounding alone does to these gradients of this model

Compared are, parameter by parameter, the gradient; then the update, given that gradient, with the same optimizer on whole
parameters; then the weights the next forward pass uses with the masters. The classes of error this finds move a gradient
by tens of percent (a micro-batch lost, a block without gradient, a sum for a mean, a rank left out); rounding moves it by
what the yardstick shows.
"""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from vitscale.base.errors import EnvironmentFault
from vitscale.base.files import xxh3_64
from vitscale.config import Config
from vitscale.ds_config import DsConfig
from vitscale.model.config import ModelConfig
from vitscale.model.vit import VisionTransformer
from vitscale.training.collectives import from_all_ranks
from vitscale.training.engine import Engine
from vitscale.training.optim import make_optimizer
from vitscale.training.probe import Probe
from vitscale.training.reference import Forward, Gradients, Loss, mean_gradients, plain_model

MARGIN = 4.0
"""Times the yardstick's own deviation: it and the engine round the same numbers in another order."""
FLOOR = {"fp32": 2e-5, "bf16": 2**-7, "fp16": 2**-7}
"""What is allowed on top: other orders of sums, and communication in the precision of the run."""
FAINT = 1e-3
"""Gradients below this share of the typical number's size are measured at that size: some are zero but for rounding (a
bias on all keys moves no attention)."""
UPDATE_ALLOWED = 1e-3
"""Of an update given the same gradient: fused kernels differ by single roundings."""
SKIPS_MAX = 40
"""Steps that a falling loss scale may skip before one is taken."""

Weights = dict[str, Tensor]
MicroBatchLoss = Callable[[Forward, Tensor, Tensor, int], Tensor]
"""(forward, images_BHWC of uint8, labels_B, slot of the first image) to the mean loss."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison."""

    name: str
    deviation: float
    """||given - reference|| / ||reference||."""
    allowed: float

    @property
    def is_wrong(self) -> bool:
        return not self.deviation <= self.allowed  # also where it is no number


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The comparisons of one step, equal on all ranks."""

    settings: str
    blocks: int
    whole: Row
    """All gradients as one vector."""
    gradients: tuple[Row, ...]
    """By parameter, the one that is farthest outside first."""
    updates: tuple[Row, ...]
    stale: dict[str, int]
    """Parameters whose weights are not the updated masters, and how many numbers of them."""
    elapsed_s: float

    @property
    def fault(self) -> str | None:
        """What is wrong in one sentence, or None."""
        worst, update = self.gradients[0], self.updates[0]
        if self.whole.is_wrong or worst.is_wrong:
            row = worst if worst.is_wrong else self.whole
            what = (
                f"the gradient of {row.name} differs by {_percent(row.deviation)} from plain torch, allowed is "
                f"{_percent(row.allowed)} (all gradients together: {_percent(self.whole.deviation)})"
            )
        elif update.is_wrong:
            what = (
                f"the update of {update.name} differs by {_percent(update.deviation)} from the same optimizer in plain torch "
                f"on the same gradient, allowed is {_percent(update.allowed)}"
            )
        elif self.stale:
            name, count = next(iter(self.stale.items()))
            what = f"{count} numbers of {name} that the next forward pass would use are not the updated ones"
        else:
            return None
        return (
            f"{what}, with {self.settings}: a run would learn something else than the recipe says; try another "
            "zero_optimization.stage, vitscale.compile=none or vitscale.recompute=none and compare with --check "
            "(run.parity=never trains all the same)"
        )

    def raise_fault(self) -> None:
        """Raise EnvironmentFault where something is wrong: the recipe is sound, this machine does not carry it out."""
        if self.fault is not None:
            raise EnvironmentFault(self.fault)

    def sentence(self) -> str:
        return (
            f"gradients of {self.blocks} blocks with {self.settings}: within {_percent(self.whole.deviation)} of plain torch "
            f"(allowed {_percent(self.whole.allowed)}), {self.elapsed_s:.1f} s"
        )

    def table(self, rows: int = 10) -> str:
        """The parameters whose gradients come nearest to what is allowed, or go beyond."""
        shown = [self.whole, *self.gradients[:rows]]
        width = max(len(row.name) for row in shown)
        lines = [f"{'gradient of':<{width}}  deviation    allowed"]
        for row in shown:
            mark = "  WRONG" if row.is_wrong else ""
            lines.append(f"{row.name:<{width}}  {_percent(row.deviation):>9}  {_percent(row.allowed):>9}{mark}")
        return "\n".join(lines)


def check_gradients(
    make_engine: Callable[[Weights], Engine],
    loss_of: Callable[[torch.dtype], MicroBatchLoss],
    *,
    config: Config,
    ds: DsConfig,
    device: torch.device,
) -> Verdict:
    """One step of the engine that `make_engine` makes with the given weights, compared with plain torch. Collective.

    `config` must not clip (a gradient that is wrong by a factor would be clipped to the right one) and have no dropout;
    stochastic depth is drawn alike on both sides. `loss_of` gives the objective for images of a dtype.
    """
    assert config.optim.clip == 0 and config.train.dropout == 0
    started_s = time.perf_counter()
    rates = config.train.drop_rates(config.model.depth)
    plain = plain_model(config.model, seed=config.train.seed, drop_path=rates)
    awaken(plain, seed=config.train.seed)
    engine = make_engine(plain.state_dict())
    plain.to(device)
    batches = [synthetic_batch(config, ds.micro_batch, rank=engine.rank, number=k) for k in range(ds.accumulation)]

    def loss_in(dtype: torch.dtype) -> Loss:
        objective = loss_of(dtype)
        first = engine.rank * ds.micro_batch * ds.accumulation
        return lambda forward, k: objective(forward, *batches[k], first + k * ds.micro_batch)

    def seed(k: int) -> None:
        engine.seed_micro_batch(config.train.seed, 0, k)

    probe = Probe(engine)
    start = dict(probe.masters())  # where parameters are bf16, DeepSpeed's masters begin as those, rounded
    _one_step(engine, loss_in(engine.input_dtype), seed)
    probe.close()
    reference = _over_ranks(mean_gradients(plain, loss_in(torch.float32), micro_batches=ds.accumulation, seed_micro_batch=seed))
    own = _over_ranks(_yardstick(plain, loss_in, seed, config=config, ds=ds, device=device))

    floor = FLOOR[config.train.precision]
    typical = _root_mean_square(reference.values())
    sizes = {name: max(float(r.norm()), FAINT * typical * math.sqrt(r.numel())) for name, r in reference.items()}
    given_rows, squares, own_squares = [], 0.0, 0.0
    optimizer = make_optimizer(plain, optim=config.optim)
    parameters = dict(plain.named_parameters())
    for name, given in probe.gradients():
        away, own_away = float((given - reference[name]).norm()), float((own[name] - reference[name]).norm())
        squares, own_squares = squares + away**2, own_squares + own_away**2
        allowed = floor + MARGIN * own_away / sizes[name]
        given_rows.append(Row(name=name, deviation=away / sizes[name], allowed=allowed))
        parameters[name].grad = given
    norm = typical * math.sqrt(sum(r.numel() for r in reference.values()))
    whole = Row(
        name="all parameters", deviation=math.sqrt(squares) / norm, allowed=floor + MARGIN * math.sqrt(own_squares) / norm
    )
    del own, reference
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])
    optimizer.step()
    updates = _compare_updates(probe.masters(), start, {name: p.detach() for name, p in parameters.items()})
    stale = probe.stale_weights()
    engine.close()
    whole, *rest = _worst_of_ranks([whole, *given_rows, *updates])
    n = len(given_rows)
    return Verdict(
        settings=settings_of(config, ds),
        blocks=config.model.depth,
        whole=whole,
        gradients=tuple(sorted(rest[:n], key=_excess, reverse=True)),
        updates=tuple(sorted(rest[n:], key=_excess, reverse=True)),
        stale=_union(stale),
        elapsed_s=time.perf_counter() - started_s,
    )


def settings_of(config: Config, ds: DsConfig) -> str:
    """What the gradients depend on besides the recipe, in words."""
    blocks = {0: "", 1: ", recomputing every block", "selective": ", recomputing what is cheap"}
    recompute = blocks.get(ds.recompute, f", recomputing every {ds.recompute}th block")
    compiled = ", compiled blocks" if ds.compile_blocks else ""
    return (
        f"ZeRO stage {ds.stage}, {ds.mechanism}{recompute}{compiled}, {ds.world} ranks x micro-batch {ds.micro_batch} x "
        f"accumulation {ds.accumulation}"
    )


def _one_step(engine: Engine, loss: Loss, seed: Callable[[int], None]) -> None:
    """One step that is taken: a first loss scale may be too large for the first gradients."""
    engine.train()
    for _ in range(SKIPS_MAX):
        for k in range(engine.accumulation_steps):
            seed(k)
            engine.backward_and_maybe_step(loss(engine, k))
        if not engine.last_step_skipped:
            return


def _yardstick(
    plain: VisionTransformer,
    loss_in: Callable[[torch.dtype], Loss],
    seed: Callable[[int], None],
    *,
    config: Config,
    ds: DsConfig,
    device: torch.device,
) -> Gradients:
    """The gradients of this rank's micro-batches in plain torch, rounded as in the run: by autocast at stages 0 and 1, of
    rounded weights at 2 and 3. fp16 rounds finer than bf16, which has its range without a loss scale. In float32 the
    weights are moved by a unit in the last place instead, which stands for another order of sums."""
    coarse = VisionTransformer(config.model, drop_path=plain.drop_path).to(device).train()
    coarse.load_state_dict(plain.state_dict())
    dtype, autocast = torch.float32, False
    if config.train.precision == "fp32":
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in coarse.parameters():
                sign = torch.randint(0, 2, parameter.shape, generator=generator).to(device) * 2 - 1
                parameter.mul_(1 + sign * 2.0**-23)
    elif ds.stage <= 1:
        autocast = True
    else:
        dtype = torch.bfloat16
        coarse.to(dtype)
    with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
        return mean_gradients(coarse, loss_in(dtype), micro_batches=ds.accumulation, seed_micro_batch=seed)


def _compare_updates(masters: Iterable[tuple[str, Tensor]], before: Weights, after: Weights) -> list[Row]:
    typical = _root_mean_square(after[name] - before[name] for name in before)
    rows = []
    for name, master in masters:
        size = max(float((after[name] - before[name]).norm()), FAINT * typical * math.sqrt(master.numel()), 1e-30)
        rounding = 2.0**-22 * float(after[name].norm()) / size  # a small step on a large weight
        rows.append(Row(name=name, deviation=float((master - after[name]).norm()) / size, allowed=UPDATE_ALLOWED + rounding))
    return rows


# ---- over the ranks -------------------------------------------------------------------------------------------------


def _over_ranks(gradients: Gradients) -> Weights:
    """The mean over the ranks, by torch alone."""
    world = torch.distributed.get_world_size()
    for gradient in gradients.gradients.values():
        torch.distributed.all_reduce(gradient)
        gradient /= world
    return gradients.gradients


def _worst_of_ranks(rows: list[Row]) -> list[Row]:
    """Each comparison as the rank sees it that is farthest away: at stage 0 every rank has gradients of its own."""
    mine = [row.deviation if math.isfinite(row.deviation) else math.inf for row in rows]
    worst = [max(deviations) for deviations in zip(*from_all_ranks(mine), strict=True)]
    return [Row(name=row.name, deviation=away, allowed=row.allowed) for row, away in zip(rows, worst, strict=True)]


def _union(stale: dict[str, int]) -> dict[str, int]:
    return {name: count for of_rank in from_all_ranks(stale) for name, count in of_rank.items()}


def _root_mean_square(tensors: Iterable[Tensor]) -> float:
    squares, numbers = 0.0, 0
    for tensor in tensors:
        squares += float(tensor.norm()) ** 2
        numbers += tensor.numel()
    return math.sqrt(squares / numbers)


def _excess(row: Row) -> float:
    return row.deviation / row.allowed


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


# ---- weights and images ---------------------------------------------------------------------------------------------


@torch.no_grad()
def awaken(model: VisionTransformer, *, seed: int) -> None:
    """Move every parameter that starts at one value off it: behind a head of zeros no block has a gradient, and behind a
    small LayerScale none that a comparison would see."""
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1 and bool((parameter != parameter.flatten()[0]).any()):
            continue
        generator = torch.Generator().manual_seed(xxh3_64(f"awake {seed} {name}".encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            parameter.copy_(noise / math.sqrt(parameter.shape[1]))
        elif name.endswith(".gamma"):
            parameter.copy_(1 + 0.1 * noise)
        else:
            parameter.add_(0.02 * noise)


def synthetic_batch(config: Config, images: int, *, rank: int, number: int) -> tuple[Tensor, Tensor]:
    """(images_BHWC of uint8, labels_B) of one micro-batch: blobs of colour under noise, any class that is not masked."""
    model: ModelConfig = config.model
    generator = torch.Generator().manual_seed(xxh3_64(f"parity {config.train.seed} {rank} {number}".encode()))
    blobs = torch.randn(images, model.channels, 4, 4, generator=generator)
    side = (model.image_size, model.image_size)
    colour = torch.nn.functional.interpolate(blobs, side, mode="bilinear")
    noise = torch.randn(colour.shape, generator=generator)
    pixels = (128 + 60 * colour + 20 * noise).clamp(0, 255).to(torch.uint8)
    classes = torch.tensor([c for c in range(model.classes) if c not in set(config.train.masked_classes)])
    labels = classes[torch.randint(0, len(classes), (images,), generator=generator)]
    return pixels.permute(0, 2, 3, 1).contiguous(), labels
