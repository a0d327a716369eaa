"""The measurement behind `bench.py checkpoint`: how long training stands still for a save, and what comes back.

Each round: steps alone | a save beside steps (asynchronous) | a save waited for (synchronous: the same save, and the wait) |
the newest checkpoint verified and loaded into an engine whose numbers were spoilt, then compared bit for bit.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from launch.engines import make_engine, silent
from vitscale.base.files import xxh3_64
from vitscale.base.progress import bytes_in_words
from vitscale.config import Config
from vitscale.ds_config import DsConfig
from vitscale.training.checkpoint import Saved, TrainState, find_checkpoint, load_checkpoint
from vitscale.training.engine import Engine
from vitscale.training.objective import objective_of
from vitscale.training.saving import Outcome, Retention, Saver

T = TypeVar("T")
STEPS_ALONE = 3


@dataclass(kw_only=True)
class Times:
    """Seconds of each round on this rank, and the bytes of one checkpoint of all ranks."""

    step_s: list[float] = field(default_factory=list)
    step_beside_s: list[float] = field(default_factory=list)
    """Of a step while a save is written."""
    blocked_s: list[float] = field(default_factory=list)
    """Training stands still for an asynchronous save."""
    flush_s: list[float] = field(default_factory=list)
    synchronous_s: list[float] = field(default_factory=list)
    verify_s: list[float] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)
    bytes: int = 0
    equal: bool = True
    """Whether every load gave back every bit."""


def measure_checkpoints(config: Config, ds: DsConfig, *, device: torch.device, directory: Path, rounds: int) -> Times:
    """Save and load in `directory`, `rounds` times after one that warms up. Collective."""
    engine = make_engine(config, ds, initial=None, device=device, say=silent)
    objective = objective_of(config, device=device, dtype=engine.input_dtype)
    generator = torch.Generator().manual_seed(engine.rank)
    side = config.model.image_size
    shape = (ds.micro_batch, side, side, config.model.channels)
    images_BHWC = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels_BM = torch.randint(0, config.model.classes, (ds.micro_batch, 1), generator=generator)

    def step() -> float:
        began_s = time.perf_counter()
        engine.set_lr(config.optim.peak_lr)
        for _ in range(engine.accumulation_steps):
            loss = objective(engine, images_BHWC, labels_BM, step=0, first_slot=0)
            engine.backward_and_maybe_step(loss.trained)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began_s

    outcomes: list[Outcome] = []
    saver = Saver(engine, directory, data={}, retention=Retention(last=1), told=outcomes.append)

    def save(number: int, *, wait: bool) -> None:
        saver.begin(TrainState(step=number))
        if wait:
            saver.wait(required=True)

    def verified() -> Saved:
        saved = find_checkpoint(directory, say=print)
        assert saved is not None
        return saved

    times = Times()
    for number in range(rounds + 1):
        alone_s = [step() for _ in range(STEPS_ALONE)]
        blocked_s, _ = timed(partial(save, 2 * number + 1, wait=False))
        beside_s = [step()]
        while engine.sum_over_ranks([saver.is_writing])[0]:  # all ranks take the same number of steps
            beside_s.append(step())
        saver.wait(required=True)
        synchronous_s, _ = timed(partial(save, 2 * number + 2, wait=True))
        before = fingerprint(engine)
        spoil(engine)
        assert fingerprint(engine) != before
        verify_s, saved = timed(verified)
        load_s, _ = timed(partial(load_checkpoint, engine, saved))
        times.equal &= fingerprint(engine) == before
        if number == 0:
            continue  # memory is taken at the first save
        times.step_s += alone_s
        times.step_beside_s += beside_s
        times.blocked_s.append(blocked_s)
        times.flush_s.append(outcomes[-2].flush_s)
        times.synchronous_s.append(synchronous_s)
        times.verify_s.append(verify_s)
        times.load_s.append(load_s)
    times.bytes = outcomes[-1].bytes
    engine.close()
    return times


def timed(action: Callable[[], T]) -> tuple[float, T]:
    """(seconds, what came of it)."""
    began_s = time.perf_counter()
    found = action()
    return time.perf_counter() - began_s, found


def live_tensors(engine: Engine) -> list[torch.Tensor]:
    """Everything a checkpoint holds of this rank."""
    found = []
    for partition in engine.partitions:
        found.append(partition.master.detach())
        found += list(engine.optimizer_state(partition).values())
        found += [engine.averages.of(decay, partition.key) for decay in engine.averages.decays]
    return found


def fingerprint(engine: Engine) -> list[int]:
    return [xxh3_64(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for tensor in live_tensors(engine)]


def spoil(engine: Engine) -> None:
    with torch.no_grad():
        for tensor in live_tensors(engine):
            tensor.fill_(3.0)


def checkpoint_table(times: Times, *, parameters: int, world: int, stage: int) -> str:
    """What a save and a load take, with the ratios that matter."""
    median = statistics.median
    blocked, synchronous, flush = median(times.blocked_s), median(times.synchronous_s), median(times.flush_s)
    step, beside = median(times.step_s), median(times.step_beside_s)
    rows = [
        ("checkpoint", f"{bytes_in_words(times.bytes)}: {parameters:,} parameters, {world} ranks, ZeRO stage {stage}"),
        ("asynchronous save", f"training stands still {blocked:.3f} s, files are written in {flush:.2f} s"),
        ("synchronous save", f"{synchronous:.2f} s: the asynchronous one holds up {blocked / synchronous:.3f} of it"),
        ("step while writing", f"{beside:.3f} s, {beside / step:.2f} of a step alone ({step:.3f} s)"),
        ("verify, load", f"{median(times.verify_s):.2f} s, {median(times.load_s):.2f} s"),
        ("what comes back", "every bit" if times.equal else "NOT WHAT WAS SAVED"),
    ]
    return "\n".join(f"{name:<20}{text}" for name, text in rows)
