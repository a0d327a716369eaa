"""The measurements behind `bench.py step`: our whole loop and other loops take turns at the same model, batch and images.

ours             launch/assemble's engine in training/trainer's loop, every step logged to files and TensorBoard
bare             the same model in a plain torch loop: autocast, fused AdamW, clipping, the loss read at every step
timm             timm's model of the same sizes in the same loop; on a GPU compiled
timm-deepspeed   timm's model as a script of a few lines trains it: deepspeed.initialize with ZeRO 1, bf16, torch's AdamW

Images are uint8 and normalised on the device in every loop. All work on the same random images (or, ours alone, on those of
--data), so the losses of ours and bare must be equal: that they do the same work is checked, not assumed.
"""

import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.loader import train_stream
from data_pipeline.manifest import Manifest
from data_pipeline.stream import MicroBatch
from launch.engines import make_engine, product_dtype
from launch.job import make_plan
from launch.peers import deepspeed_step, timm_model
from vitscale.config import Config
from vitscale.ds_config import DsConfig
from vitscale.model.layers import normalise_pixels
from vitscale.model.vit import VisionTransformer, decays, initialise
from vitscale.training.checkpoint import TrainState
from vitscale.training.metrics import Metrics, read_lines
from vitscale.training.objective import objective_of
from vitscale.training.trainer import Plan, train

OURS = "ours"
WARM_STEPS = 3
"""Steps before anything is timed: caches, compilation, the allocator."""
KEPT_LOSSES = 5


@dataclass(kw_only=True)
class Result:
    """What one loop did in its turns."""

    what: str
    step_s: list[float] = field(default_factory=list)
    """Seconds per step, of each turn."""
    losses: list[float] = field(default_factory=list)
    """Of the first steps."""
    peak_bytes: int | None = None
    """Most memory of the device during its turns; None on a CPU, where all share one process."""
    data_wait: float | None = None
    """Share of the step that ours waits for images."""

    @property
    def median_s(self) -> float:
        return statistics.median(self.step_s)


Turn = Callable[[int], None]
"""Makes so many steps; what it has enqueued is done when it returns."""


def measure_steps(
    config: Config,
    ds: DsConfig,
    *,
    device: torch.device,
    peers: list[str],
    data: Manifest | None,
    seconds: float,
    rounds: int,
) -> tuple[dict[str, Result], Plan]:
    """Turns of about `seconds` each, in rotation, so that what disturbs the machine disturbs all. World of one."""
    plan, *_ = make_plan(config, ds, data.images if data else config.optim.global_batch * 1000)
    with tempfile.TemporaryDirectory() as place:
        metrics = Metrics(Path(place), total_steps=10**9)
        metrics.open(0)
        results = {OURS: Result(what="vitscale: engine, loop, metrics")}
        turns = {OURS: _ours(config, ds, plan, device=device, data=data, metrics=metrics)}
        for name in peers:
            results[name] = Result(what="")
            turns[name] = PEERS[name](config, ds, device=device, result=results[name])
        for turn in turns.values():
            turn(WARM_STEPS)
        steps = {name: max(1, round(seconds / _timed(turn, 2))) for name, turn in turns.items()}
        for number in range(rounds):
            order = list(turns) if number % 2 == 0 else list(reversed(turns))
            for name in order:
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                results[name].step_s.append(_timed(turns[name], steps[name]))
                if device.type == "cuda":
                    results[name].peak_bytes = torch.cuda.max_memory_allocated(device)
        metrics.close()
        lines = [line for line in read_lines(Path(place) / "metrics.jsonl") if "loss" in line]
        results[OURS].losses = [line["loss"] for line in lines[:KEPT_LOSSES]]
        waits = [line["data_wait_s"] / line["step_s"] for line in lines[WARM_STEPS:]]
        results[OURS].data_wait = statistics.median(waits)
    return results, plan


def _timed(turn: Turn, steps: int) -> float:
    """Seconds per step."""
    started_s = time.perf_counter()
    turn(steps)
    return (time.perf_counter() - started_s) / steps


# ---- ours -----------------------------------------------------------------------------------------------------------


def _ours(config: Config, ds: DsConfig, plan: Plan, *, device: torch.device, data: Manifest | None, metrics: Metrics) -> Turn:
    engine = make_engine(config, ds, initial=None, device=device, say=print)
    objective = objective_of(config, device=device, dtype=engine.input_dtype)
    state = TrainState()
    if data is None:
        stream: Iterator[MicroBatch] = _random_stream(config, ds)
    else:
        stream = train_stream(
            (data,),
            data=config.data,
            augment=config.augment,
            image_size=config.model.image_size,
            seed=config.train.seed,
            global_batch=config.optim.global_batch,
            micro_batch=ds.micro_batch,
            rank=0,
            world=1,
            position=0,
        )

    def turn(steps: int) -> None:
        until = dataclasses.replace(
            plan, total_steps=state.step + steps, log_every_steps=1, eval_every_steps=0, save_every_steps=0
        )
        train(
            state,
            plan=until,
            engine=engine,
            objective=objective,
            stream=stream,
            lr_at_step=lambda step: config.optim.peak_lr,
            evaluate=None,
            saver=None,
            metrics=metrics,
        )

    return turn


def _random_images(config: Config, ds: DsConfig) -> tuple[Tensor, Tensor]:
    """(images of one micro-batch, uint8 BHWC, labels B), the same in every loop and step."""
    generator = torch.Generator().manual_seed(config.train.seed)
    side = config.model.image_size
    shape = (ds.micro_batch, side, side, config.model.channels)
    images_BHWC = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return images_BHWC, torch.randint(0, config.model.classes, (ds.micro_batch,), generator=generator)


def _random_stream(config: Config, ds: DsConfig) -> Iterator[MicroBatch]:
    images_BHWC, labels_B = _random_images(config, ds)
    while True:
        yield MicroBatch(
            images_BHWC=images_BHWC,
            labels_B=labels_B,
            labels_BM=labels_B[:, None],
            counted_B=torch.ones_like(labels_B, dtype=torch.bool),
            samples_hash=0,
        )


# ---- others ---------------------------------------------------------------------------------------------------------


def _bare(config: Config, ds: DsConfig, *, device: torch.device, result: Result) -> Turn:
    result.what = "bare torch loop, our model"
    model = VisionTransformer(config.model)
    initialise(model, seed=config.train.seed)
    return _plain_loop(model.to(device), config, ds, device=device, result=result)


def _timm(config: Config, ds: DsConfig, *, device: torch.device, result: Result) -> Turn:
    model: nn.Module = timm_model(config.model).to(device)
    result.what = "bare torch loop, timm's model"
    if device.type == "cuda":
        model, result.what = torch.compile(model), f"{result.what}, compiled"  # type: ignore[assignment]
    return _plain_loop(model, config, ds, device=device, result=result)


def _plain_loop(model: nn.Module, config: Config, ds: DsConfig, *, device: torch.device, result: Result) -> Turn:
    images_BHWC, labels_B = _random_images(config, ds)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if decays(n, p)], "weight_decay": config.optim.weight_decay},
        {"params": [p for n, p in named.items() if not decays(n, p)], "weight_decay": 0.0},
    ]
    optim = config.optim
    optimizer = torch.optim.AdamW(groups, lr=optim.peak_lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
    dtype = product_dtype(config)
    model.train()

    def turn(steps: int) -> None:
        for _ in range(steps):
            total = torch.zeros((), device=device)
            for _ in range(ds.accumulation):
                images = images_BHWC.to(device, non_blocking=True)
                images_BCHW = normalise_pixels(images, config.model.pixel_mean, config.model.pixel_std, torch.float32)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    logits_BC = model(images_BCHW)
                loss = F.cross_entropy(logits_BC.float(), labels_B.to(device, non_blocking=True))
                (loss / ds.accumulation).backward()
                total += loss.detach() / ds.accumulation
            if optim.clip:
                torch.nn.utils.clip_grad_norm_(named.values(), optim.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value = total.item()
            if len(result.losses) < KEPT_LOSSES:
                result.losses.append(value)

    return turn


def _timm_deepspeed(config: Config, ds: DsConfig, *, device: torch.device, result: Result) -> Turn:
    result.what = "DeepSpeed ZeRO 1, timm's model"
    images_BHWC, labels_B = _random_images(config, ds)
    step = deepspeed_step(timm_model(config.model), config=config, ds=ds, device=device)

    def turn(steps: int) -> None:
        for _ in range(steps):
            value = step(images_BHWC, labels_B)
            if len(result.losses) < KEPT_LOSSES:
                result.losses.append(value)

    return turn


PEERS = {"bare": _bare, "timm": _timm, "timm-deepspeed": _timm_deepspeed}
"""Loops by the name of `--peers`."""
