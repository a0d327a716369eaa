"""What layer decay costs a step, and what evaluating a moving average costs in memory: measured, not assumed."""

import time
from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.small_engine import batch_of, make, settings, train
from vitscale.base.cluster import Cluster
from vitscale.ds_config import resolve_ds_config
from vitscale.training.collectives import from_rank_zero

pytestmark = pytest.mark.slow
TURNS_MIN, TURNS_MAX, RATIO_MAX = 8, 60, 1.1


def shortest_steps(cluster: Cluster) -> dict[float, float]:
    """Seconds of the shortest step with each layer decay, the two taking turns in one process. Other work on the machine
    only makes steps longer, so there are more turns until the law holds, up to a number."""
    engines = {}
    for decay in (1.0, 0.75):
        config, ds = settings(2, cluster.world, "model.depth=24", "model.width=64", f"optim.layer_decay={decay}")
        engines[decay] = make(config, ds), config
    seconds: dict[float, list[float]] = {decay: [] for decay in engines}
    for turn in range(TURNS_MAX):
        for decay, (engine, config) in engines.items():
            started_s = time.perf_counter()
            train(engine, config, range(turn, turn + 1))
            seconds[decay].append(time.perf_counter() - started_s)
        shortest = from_rank_zero({decay: min(of_decay) for decay, of_decay in seconds.items()})
        if turn >= TURNS_MIN and shortest[0.75] / shortest[1.0] <= RATIO_MAX:
            break
    return shortest


def test_layer_decay_at_depth_24_costs_at_most_a_tenth_of_a_step():
    seconds = run_ranks(2, shortest_steps)[0]
    assert seconds[0.75] / seconds[1.0] <= RATIO_MAX, seconds


def peak_bytes(act) -> int:
    """How much the resident memory of this process rises at most while it acts, by the kernel's own high-water mark."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    act()
    return status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def peaks(cluster: Cluster) -> dict[str, int]:
    """Peak rise while evaluating the weights, and the average; stage 3 told to keep nothing gathered."""
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 1,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    config, _ = settings(3, cluster.world, "model.depth=8", "model.width=512", "train.ema=[0.9]")
    ds = resolve_ds_config({"zero_optimization": zero}, config=config, world=cluster.world)
    engine = make(config, ds)
    train(engine, config, range(1))
    pixels, _ = batch_of(0, config)
    engine.eval()

    def plain() -> None:
        with torch.no_grad():
            engine(pixels)

    def averaged() -> None:
        with engine.averaged(0.9):
            plain()

    plain()
    rises = {"weights": peak_bytes(plain), "average": peak_bytes(averaged)}
    numbers = sum(p.ds_numel for p in engine.module.parameters())
    engine.close()
    return {**rises, "model": 4 * numbers}


def test_an_average_is_evaluated_without_gathering_the_model():
    for found in run_ranks(2, peaks):
        print(found)
        # Swapping needs one chunk of 16 MiB at a time; a gathered model would be all of its bytes.
        assert found["average"] - found["weights"] < found["model"] / 3, found
