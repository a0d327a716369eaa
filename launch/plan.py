"""Plan a run before there is data or a cluster: steps, memory per GPU, days. `python launch/plan.py --recipe NAME --gpus N`."""

import dataclasses
import os
from argparse import Namespace
from pathlib import Path

from launch.arguments import Parser
from launch.command import DEFAULT_DS_CONFIG, derived_rows, table
from launch.estimates import DEFAULT_GPU, estimate_rows, suspicious_rows
from launch.job import Job, make_plan
from vitscale.base.cluster import resolve_cluster
from vitscale.base.errors import UsageError, run_main
from vitscale.config import apply_overrides
from vitscale.ds_config import read_ds_config, resolve_ds_config
from vitscale.planning.peaks import GPUS
from vitscale.planning.time import MFU_ASSUMED
from vitscale.recipes.catalog import Source, recipe_named, source_of

EPILOG = """\
The same rows as `pretrain.py --dry-run --world N`, for any GPU, number of images and MFU. Every setting can follow as
section.key=value, keys of ds_config.json as ds.PATH=value.

example
  python launch/plan.py --recipe scaling_g --gpus 256 --gpu h200 ds.zero_optimization.stage=1 optim.micro_batch_max=64
"""


def main() -> None:
    parser = Parser(description=__doc__ or "", epilog=EPILOG)
    parser.add_argument("--recipe", metavar="NAME", required=True)
    parser.add_argument("--gpus", metavar="N", type=int, required=True, help="ranks, one GPU each")
    names = ", ".join(name.lower() for name in GPUS)
    parser.add_argument("--gpu", metavar="NAME", default=DEFAULT_GPU, help=f"one of {names} (default: {DEFAULT_GPU.lower()})")
    parser.add_argument("--images", metavar="N", type=int, help="of the training data (default: those of the recipe's source)")
    parser.add_argument("--mfu", metavar="SHARE", type=float, default=MFU_ASSUMED, help="to assume (default: %(default)s)")
    parser.add_argument("--deepspeed_config", type=Path, default=DEFAULT_DS_CONFIG, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    print(plan_of(parser.parse_intermixed_args()))


def plan_of(args: Namespace) -> str:
    """The table for parsed flags; raises UsageError."""
    gpu = args.gpu.upper()
    if gpu not in GPUS:
        raise UsageError(f"--gpu: expected one of {', '.join(name.lower() for name in GPUS)}, got {args.gpu!r}")
    if not 0 < args.mfu <= 1:
        raise UsageError(f"--mfu: expected a share above 0 and at most 1, got {args.mfu}")
    for name in ("gpus", "images"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    config = apply_overrides(recipe_named(args.recipe), [text for text in args.overrides if not text.startswith("ds.")])
    overrides = [text.removeprefix("ds.") for text in args.overrides if text.startswith("ds.")]
    ds = resolve_ds_config(read_ds_config(args.deepspeed_config, overrides), config=config, world=args.gpus)
    source = source_of(config.recipe)
    counted = source
    if args.images is not None:
        counted = Source(name="--images", images=args.images, classes=config.model.classes)
    if counted is None:
        raise UsageError(f"recipe {config.recipe!r} is for any data, so its epochs have no length; add --images N")
    plan, schedule, keep_every_steps = make_plan(config, ds, counted.images)
    job = Job(
        run=Path("runs") / args.recipe,
        config=config,
        ds=ds,
        cluster=dataclasses.replace(resolve_cluster(os.environ), world=args.gpus, local_world=1),
        train_data=(),
        eval_data=None,
        plan=plan,
        schedule=schedule,
        keep_every_steps=keep_every_steps,
        followed=[],
        source=None,
    )
    rows = [*derived_rows(job, counted=counted), *estimate_rows(job, gpu=gpu, mfu=args.mfu)]
    return table([*rows, *suspicious_rows(job, source=source)])


if __name__ == "__main__":
    run_main(main)
