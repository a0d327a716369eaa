"""Measure what vitscale costs on this machine: `loader` compares loaders and `step` training loops, taking turns with others;
`checkpoint` says how long training stands still for a save."""

import os
import shutil
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path

import torch

from data_pipeline.config import AugmentConfig
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.processes import default_workers
from data_pipeline.store import is_url
from launch.arguments import Parser
from launch.bench_checkpoint import checkpoint_table, measure_checkpoints
from launch.bench_loader import CEILING, OURS, Result, measure_loaders, measure_stages
from launch.bench_step import OURS as OURS_STEP
from launch.bench_step import PEERS as STEP_PEERS
from launch.bench_step import Result as StepResult
from launch.bench_step import measure_steps
from launch.command import DEFAULT_DS_CONFIG
from launch.datasets import require_fit
from launch.peers import PEERS
from vitscale.base.cluster import resolve_cluster
from vitscale.base.credentials import masked_words
from vitscale.base.errors import UsageError, run_main
from vitscale.base.files import write_json
from vitscale.base.progress import bytes_in_words
from vitscale.config import Config, apply_overrides, to_record
from vitscale.ds_config import DsConfig, read_ds_config, resolve_ds_config
from vitscale.model.flops import parameters
from vitscale.recipes.catalog import recipe_named
from vitscale.training.engine import leave_ranks, start_ranks
from vitscale.training.trainer import Plan

EPILOG = """\
loader    images per second of our stream, of the loaders of others (--peers timm,webdataset; timm-float,webdataset-float
          with normalisation as documented) and of decoding alone, at equal worker processes, crop, flip and antialiasing,
          taking turns; then the time of one image in one thread
step      seconds per step, images per second, MFU and memory of our whole training loop on random images (or those of --data),
          beside other loops (--peers bare,timm,timm-deepspeed) at the same sizes and batch, taking turns; one process

checkpoint  seconds that training stands still for an asynchronous save, against one waited for; speed of a step while files are
          written; verifying and loading, compared bit for bit; on as many ranks as it is started with

examples
  python launch/bench.py loader --data shards/imagenet --workers 2 --peers timm,webdataset --json loader.json
  python launch/bench.py step --peers bare model.preset=B/16 optim.global_batch=256 ds.zero_optimization.stage=0
  python launch/bench.py checkpoint --dir runs/here model.preset=L/16
"""


def main() -> None:
    parser = Parser(description=__doc__ or "", epilog=EPILOG)
    parser.add_argument("--local_rank", type=int, help=SUPPRESS)  # launchers put it first; ignored
    kinds = parser.add_subparsers(dest="what", required=True, metavar="loader|step|checkpoint")
    _add_loader(kinds.add_parser("loader", description="Compare loaders over the same shards."))
    _add_step(kinds.add_parser("step", description="Compare training loops at the same model and batch."))
    _add_checkpoint(kinds.add_parser("checkpoint", description="Save and load the state of a model."))
    options, rest = parser.parse_known_args()
    settings = [word for word in rest if not word.startswith("-")] if options.what != "loader" else []
    if len(settings) < len(rest):
        parser.error(f"unrecognized arguments: {' '.join(word for word in rest if word not in settings)}")
    if settings:  # argparse takes them only where they stand together
        options.overrides = [*options.overrides, *settings]
    record = {"loader": bench_loader, "step": bench_step, "checkpoint": bench_checkpoint}[options.what](options)
    if options.json and resolve_cluster(os.environ).rank == 0:
        write_json(options.json, {**record, "command": " ".join(["python", "launch/bench.py", *masked_words(sys.argv[1:])])})


def _add_loader(parser: ArgumentParser) -> None:
    parser.add_argument("--data", metavar="DIR", required=True, help="dataset, made by launch/build_shards.py")
    workers = default_workers()
    parser.add_argument(
        "--workers", metavar="N", type=int, default=workers, help="worker processes (default here: %(default)s)"
    )
    parser.add_argument("--seconds", metavar="S", type=float, default=5.0, help="of each turn (default: %(default)s)")
    parser.add_argument("--rounds", metavar="N", type=int, default=3, help="turns of each loader (default: %(default)s)")
    parser.add_argument("--image-size", metavar="N", type=int, default=224, help="default: %(default)s")
    parser.add_argument("--batch", metavar="N", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--peers", metavar="A,B", default="", help="others to compare with: " + ", ".join(PEERS))
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers here too")


def _add_step(parser: ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="NAME", default="cifar10", help="sizes and settings (default: %(default)s)")
    parser.add_argument("--data", metavar="DIR", help="ours reads this dataset instead of random images")
    parser.add_argument("--seconds", metavar="S", type=float, default=10.0, help="of each turn (default: %(default)s)")
    parser.add_argument("--rounds", metavar="N", type=int, default=5, help="turns of each loop (default: %(default)s)")
    parser.add_argument("--peers", metavar="A,B", default="", help="others to compare with: " + ", ".join(STEP_PEERS))
    parser.add_argument("--deepspeed_config", type=Path, default=DEFAULT_DS_CONFIG, metavar="FILE")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers here too")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def _add_checkpoint(parser: ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="NAME", default="digits", help="sizes and settings (default: %(default)s)")
    parser.add_argument("--dir", metavar="DIR", type=Path, required=True, help="on the file system to measure")
    parser.add_argument("--rounds", metavar="N", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--deepspeed_config", type=Path, default=DEFAULT_DS_CONFIG, metavar="FILE")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers here too")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def _require(options: Namespace, **least: float) -> None:
    for name, smallest in least.items():
        if getattr(options, name) < smallest:
            raise UsageError(f"--{name.replace('_', '-')}: expected at least {smallest}, got {getattr(options, name)}")


def _peers_of(options: Namespace, known: Iterable[str]) -> list[str]:
    peers = [name for name in options.peers.split(",") if name]
    for name in peers:
        if name not in known:
            raise UsageError(f"--peers: expected some of {', '.join(known)}, got {name!r}")
    return peers


def _dataset(path: str) -> Manifest:
    manifest = None if is_url(path) else read_manifest(Path(path))
    if manifest is None or is_url(manifest.tars_at):
        raise UsageError(f"--data: expected a dataset with its tars on a disk, got {path}; copy them to one")
    return manifest


def _settings_of(options: Namespace, *, world: int) -> tuple[Config, DsConfig]:
    ds_overrides = [text.removeprefix("ds.") for text in options.overrides if text.startswith("ds.")]
    config = apply_overrides(recipe_named(options.recipe), [text for text in options.overrides if not text.startswith("ds.")])
    return config, resolve_ds_config(read_ds_config(options.deepspeed_config, ds_overrides), config=config, world=world)


# ---- loader ---------------------------------------------------------------------------------------------------------


def bench_loader(options: Namespace) -> dict[str, object]:
    """Measure, print a table, return the numbers."""
    _require(options, workers=1, rounds=1, image_size=1, batch=1, seconds=0.01)
    peers = _peers_of(options, PEERS)
    manifest = _dataset(options.data)
    augment = AugmentConfig()
    results = measure_loaders(
        manifest,
        augment=augment,
        image_size=options.image_size,
        batch=options.batch,
        workers=options.workers,
        seconds=options.seconds,
        rounds=options.rounds,
        peers={name: PEERS[name] for name in peers},
    )
    stages = measure_stages(manifest, augment=augment, image_size=options.image_size)
    print(loader_table(results, peers=peers, workers=options.workers))
    print()
    print(stage_table(stages, results[OURS]))
    return {
        "data": str(options.data),
        "fingerprint": manifest.fingerprint,
        "images": manifest.images,
        "workers": options.workers,
        "image_size": options.image_size,
        "batch": options.batch,
        "loaders": {name: vars(result) for name, result in results.items()},
        "stage_us": stages,
    }


def loader_table(results: dict[str, Result], *, peers: list[str], workers: int) -> str:
    """One line per loader: medians over its turns, and our ratio to each of the others by wall clock and by CPU time."""
    ours = results[OURS]
    heads = ("images/s", "spread", "per worker", "CPU us/image", "ours is x", "by CPU", "checked")
    widths = (9, 13, 10, 12, 9, 7, 8)
    lines = [" " * 34 + "".join(f" {head:>{width}}" for head, width in zip(heads, widths, strict=True))]
    for result in results.values():
        cells = (
            f"{result.median:.0f}",
            f"{min(result.images_per_s):.0f} .. {max(result.images_per_s):.0f}",
            f"{result.median / workers:.0f}",
            f"{result.cpu_us:.0f}",
            f"{ours.median / result.median:.2f}",
            f"{result.cpu_us / ours.cpu_us:.2f}",
            f"{result.checked:,}",
        )
        lines.append(f"{result.what:<34}" + "".join(f" {cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    lines.append(
        f"ours is {ours.median / results[CEILING].median:.0%} of the ceiling by wall clock, "
        f"{results[CEILING].cpu_us / ours.cpu_us:.0%} by CPU time; batches of uint8, of floats where the name says so"
        + ("; bicubic, antialiased, crop and flip alike" if peers else "")
    )
    return "\n".join(lines)


def stage_table(stage_us: dict[str, float], ours: Result) -> str:
    """Where the CPU time of one image goes; what no stage explains is the batch, its transport and the loop."""
    rest = ours.cpu_us - sum(stage_us.values())
    rows = [*stage_us.items(), ("batch, transport, loop", rest), ("sum", ours.cpu_us)]
    return "\n".join(["CPU us per image, one thread", *(f"  {name:<28} {value:8.1f}" for name, value in rows)])


# ---- step -----------------------------------------------------------------------------------------------------------


def bench_step(options: Namespace) -> dict[str, object]:
    """Measure, print a table, return the numbers."""
    _require(options, rounds=1, seconds=0.01)
    peers = _peers_of(options, STEP_PEERS)
    cluster = resolve_cluster(os.environ)
    if cluster.world > 1:
        raise UsageError(f"bench.py step measures one process, got {cluster.world} ranks; start it with plain python")
    config, ds = _settings_of(options, world=1)
    data = _dataset(options.data) if options.data else None
    if data is not None:
        require_fit(data, classes=config.model.classes)
    device = start_ranks(cluster)
    results, plan = measure_steps(
        config, ds, device=device, peers=peers, data=data, seconds=options.seconds, rounds=options.rounds
    )
    leave_ranks()
    print(step_table(results, config=config, plan=plan, ds=ds))
    flops = plan.phases[-1].flops_per_image
    return {
        "model": to_record(config)["model"],
        "ds_config": ds.record,
        "global_batch": plan.global_batch,
        "flops_per_image": flops,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "peak_flops": plan.peak_flops,
        "loops": {
            name: {
                **vars(result),
                "images_per_s": plan.global_batch / result.median_s,
                "mfu": plan.global_batch * flops / result.median_s / plan.peak_flops if plan.peak_flops else None,
            }
            for name, result in results.items()
        },
    }


def step_table(results: dict[str, StepResult], *, config: Config, plan: Plan, ds: DsConfig) -> str:
    """One line per loop: medians over its turns, and the ratio of our time to each of the others."""
    ours, flops = results[OURS_STEP], plan.phases[-1].flops_per_image
    heads = ("s/step", "spread", "images/s", "MFU", "memory", "ours takes x", "first losses")
    widths = (8, 17, 9, 6, 9, 12, 26)
    lines = [
        f"width {config.model.width} depth {config.model.depth}, {config.model.image_size} px, batch {plan.global_batch} = "
        f"micro-batch {ds.micro_batch} x accumulation {ds.accumulation}, ZeRO stage {ds.stage}, {ds.mechanism}; "
        f"{flops / 1e9:.3g} GFLOP an image",
        " " * 42 + "".join(f" {head:>{width}}" for head, width in zip(heads, widths, strict=True)),
    ]
    for result in results.values():
        images_per_s = plan.global_batch / result.median_s
        cells = (
            f"{result.median_s:.4f}",
            f"{min(result.step_s):.4f} .. {max(result.step_s):.4f}",
            f"{images_per_s:.1f}",
            f"{images_per_s * flops / plan.peak_flops:.1%}" if plan.peak_flops else "?",
            bytes_in_words(result.peak_bytes) if result.peak_bytes else "?",
            f"{ours.median_s / result.median_s:.3f}",
            " ".join(f"{loss:.5f}" for loss in result.losses[:3]),
        )
        lines.append(f"{result.what:<42}" + "".join(f" {cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    if ours.data_wait is not None:
        lines.append(f"ours waits {ours.data_wait:.2%} of a step for images")
    return "\n".join(lines)


# ---- checkpoint -----------------------------------------------------------------------------------------------------


def bench_checkpoint(options: Namespace) -> dict[str, object]:
    """Measure, print a table on rank 0, return the numbers of rank 0."""
    _require(options, rounds=1)
    cluster = resolve_cluster(os.environ)
    config, ds = _settings_of(options, world=cluster.world)
    place = options.dir / "bench-checkpoints"
    if place.exists():
        raise UsageError(f"--dir: expected no {place.name} in {options.dir} yet; delete it or give another directory")
    device = start_ranks(cluster)
    times = measure_checkpoints(config, ds, device=device, directory=place, rounds=options.rounds)
    leave_ranks()
    if cluster.rank == 0:
        shutil.rmtree(place)
        print(checkpoint_table(times, parameters=parameters(config.model), world=cluster.world, stage=ds.stage))
    return {"model": to_record(config)["model"], "world": cluster.world, "ds_config": ds.record, **vars(times)}


if __name__ == "__main__":
    run_main(main)
