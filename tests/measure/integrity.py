"""Does the comparison of replicas ever alarm for nothing, does it find every flipped bit, and what does it cost?

    python -m tests.measure.integrity [--checks 10000] [--flips 50] [--skip-cost]

checks  on 2 ranks with a tiny model, at ZeRO stages 0 to 3 and with Muon at stage 0, within and between real steps
flips   random bits of random numbers of random replicas, on 2 and on 3 ranks: sign, exponent and mantissa in turn
cost    the checksums of a ViT-B, against a step of it with one image: real steps have more images and take longer, so
            share of the time  <=  time of a check / (run.integrity_every x time of that step)
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.ranks import run_ranks
from tests.helpers.small_engine import BATCH, batch_of, make, settings
from vitscale.base.cluster import Cluster
from vitscale.config import RunConfig
from vitscale.model.config import ModelConfig
from vitscale.model.presets import preset
from vitscale.model.vit import VisionTransformer, initialise
from vitscale.training.integrity import checksums, differing_replicas

CELLS = ((0, ()), (0, ("optim.optimizer=muon",)), (1, ()), (2, ()), (3, ()))
"""(ZeRO stage, more settings)."""
CHECKS_PER_STEP = 20
CLASSES: dict[str, Callable[[random.Random], int]] = {
    "sign": lambda chance: 31,
    "exponent": lambda chance: chance.randrange(23, 31),
    "mantissa": lambda chance: chance.randrange(23),
}
"""Bits of a float32."""


def flip(tensor: Tensor, place: int, bit: int) -> None:
    """One bit of one number."""
    words = tensor.data.view(-1).view(torch.int32)
    words[place] ^= torch.tensor(1, dtype=torch.int32) << bit


def quiet_checks(cluster: Cluster, checks: int) -> dict[str, tuple[int, int, int]]:
    """By cell: checks, steps, alarms."""
    found = {}
    for stage, more in CELLS:
        config, ds = settings(stage, cluster.world, "train.ema=[0.9]", *more)
        engine = make(config, ds)
        share = BATCH // engine.world
        alarms = done = step = 0
        while done < checks // len(CELLS):
            pixels, labels = (whole[engine.rank * share :][:share] for whole in batch_of(step, config))
            engine.set_lr(1e-3)
            loss = F.cross_entropy(engine(pixels), labels)
            for _ in range(CHECKS_PER_STEP // 2):
                alarms += bool(differing_replicas(engine))
            engine.backward_and_maybe_step(loss)
            for _ in range(CHECKS_PER_STEP // 2):
                alarms += bool(differing_replicas(engine))
            done, step = done + CHECKS_PER_STEP, step + 1
        found[f"stage {stage}{' muon' if more else ''}"] = (done, step, alarms)
        engine.close()
    return found


def found_flips(cluster: Cluster, flips: int) -> dict[str, dict[str, list[int]]]:
    """By stage and class of the bit: flipped, found, found with exactly the right rank."""
    found: dict[str, dict[str, list[int]]] = {}
    for stage in (0, 1, 2, 3):
        config, ds = settings(stage, cluster.world)
        engine = make(config, ds)
        pixels, labels = batch_of(0, config)
        engine.backward_and_maybe_step(F.cross_entropy(engine(pixels), labels))
        chance = random.Random(f"{stage} {cluster.world}")
        replicas = dict(engine.replicas())
        names = sorted(name for name, tensor in replicas.items() if tensor.dtype == torch.float32)
        counts = {name: [0, 0, 0] for name in CLASSES}
        for number in range(flips):
            kind = list(CLASSES)[number % len(CLASSES)]
            name, victim, bit = chance.choice(names), chance.randrange(cluster.world), CLASSES[kind](chance)
            place = chance.randrange(replicas[name].numel())
            before = replicas[name].data.clone()
            if cluster.rank == victim:
                flip(replicas[name], place, bit)
            verdict = differing_replicas(engine)
            counts[kind][0] += 1
            counts[kind][1] += list(verdict) == [name]
            counts[kind][2] += verdict == {name: [victim]}
            replicas[name].data.copy_(before)
        found[f"stage {stage}"] = counts
        engine.close()
    return found


def median_s(act: Callable[[], Any], times: int) -> float:
    """Seconds of the processor, not of the clock: others may be at work on the machine."""
    seconds = []
    for _ in range(times):
        before_s = time.process_time()
        act()
        seconds.append(time.process_time() - before_s)
    return statistics.median(seconds)


def cost() -> dict[str, float]:
    """Processor seconds of the checksums of a ViT-B and of one of its steps with one image, one thread."""
    config = ModelConfig(**{**preset("B/16"), "image_size": 224, "classes": 1000})
    model = VisionTransformer(config)
    initialise(model, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    images, labels = torch.randn(1, 3, 224, 224), torch.zeros(1, dtype=torch.int64)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    weights = list(model.named_parameters())
    numbers = sum(tensor.numel() for _, tensor in weights)
    check_s = median_s(lambda: checksums(iter(weights)), 15)
    every = int(RunConfig().integrity_every)
    step_s = median_s(step, 5)
    return {"parameters": numbers, "check_s": check_s, "step_s": step_s, "share": check_s / (every * step_s), "every": every}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", type=int, default=10_000)
    parser.add_argument("--flips", type=int, default=50)
    parser.add_argument("--skip-cost", action="store_true")
    args = parser.parse_args()
    if args.checks:
        by_cell = run_ranks(2, quiet_checks, args.checks, timeout_s=3600)[0]
        for name, (checks, steps, alarms) in by_cell.items():
            print(f"{name:<14} {checks:>6} checks in {steps:>4} steps: {alarms} alarms", flush=True)
        print(
            f"together {sum(cell[0] for cell in by_cell.values())} checks, {sum(cell[2] for cell in by_cell.values())} alarms"
        )
    for world in (2, 3) if args.flips else ():
        for stage, counts in run_ranks(world, found_flips, args.flips, timeout_s=3600)[0].items():
            said = ", ".join(f"{kind} {found}/{flips} found, {named} named" for kind, (flips, found, named) in counts.items())
            print(f"{world} ranks, {stage}: {said}", flush=True)
    if not args.skip_cost:
        torch.set_num_threads(1)
        found = cost()
        check_ms, step_ms = found["check_s"] * 1e3, found["step_s"] * 1e3
        print(
            f"ViT-B, {found['parameters'] / 1e6:.1f} M parameters in float32, one thread: check {check_ms:.1f} ms, step with "
            f"one image {step_ms:.0f} ms: {check_ms:.1f} / ({found['every']} x {step_ms:.0f}) = {found['share']:.4%}"
        )


if __name__ == "__main__":
    main()
