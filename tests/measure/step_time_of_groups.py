"""What layer decay costs a step of ZeRO at depth 24: factors inside one group against torch's AdamW with a group per factor.

    python -m tests.measure.step_time_of_groups [--width 64] [--stage 2] [--turns 40]

Two ranks on the CPU; the four ways take turns in one process, so that other work on the machine meets all of them.
"""

import argparse
import statistics
import time

import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.small_engine import CPU, fresh_model, make, settings, train
from vitscale.base.cluster import Cluster
from vitscale.config import Config
from vitscale.model.vit import VisionTransformer
from vitscale.training.engine import Engine
from vitscale.training.optim import role_of

WAYS = [("one group", 1.0), ("one group", 0.75), ("a group per factor", 1.0), ("a group per factor", 0.75)]


def grouped(model: VisionTransformer, config: Config) -> torch.optim.Optimizer:
    groups: dict = {}
    for name, parameter in model.named_parameters():
        role = role_of(name, parameter, depth=config.model.depth, optim=config.optim)
        groups.setdefault(role, []).append(parameter)
    return torch.optim.AdamW([{"params": held, "weight_decay": role.weight_decay} for role, held in groups.items()], fused=True)


def measure(cluster: Cluster, width: int, stage: int, turns: int) -> dict:
    engines = {}
    for way in WAYS:
        overrides = ["model.depth=24", f"model.width={width}", f"optim.layer_decay={way[1]}"]
        config, ds = settings(stage, cluster.world, *overrides)
        model = fresh_model(config)
        is_ours = way[0] == "one group"
        engine = make(config, ds) if is_ours else Engine(model, grouped(model, config), ds=ds, device=CPU)
        engines[way] = engine, config
        train(engine, config, range(2))
    seconds: dict = {way: [] for way in WAYS}
    for turn in range(turns):
        for way in WAYS[turn % 4 :] + WAYS[: turn % 4]:
            started_s = time.perf_counter()
            train(*engines[way], range(turn, turn + 1))
            seconds[way].append(time.perf_counter() - started_s)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("width", 64), ("stage", 2), ("turns", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    seconds = run_ranks(2, measure, args.width, args.stage, args.turns, timeout_s=3000)[0]
    for (way, decay), taken in seconds.items():
        base = seconds[WAYS[0]]
        print(
            f"{way}, layer decay {decay}: median {statistics.median(taken) * 1e3:.1f} ms "
            f"({statistics.median(taken) / statistics.median(base):.3f}), shortest {min(taken) * 1e3:.1f} ms "
            f"({min(taken) / min(base):.3f})"
        )


if __name__ == "__main__":
    main()
