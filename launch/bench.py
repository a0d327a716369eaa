"""Measure what vitscale costs on this machine: `loader` compares loaders over the same shards and says where our time goes."""

import sys
from argparse import Namespace
from pathlib import Path

from data_pipeline.config import AugmentConfig
from data_pipeline.manifest import read_manifest
from data_pipeline.processes import default_workers
from data_pipeline.store import is_url
from launch.arguments import Parser
from launch.bench_loader import CEILING, OURS, Result, measure_loaders, measure_stages
from launch.peers import PEERS
from vitscale.base.errors import UsageError, run_main
from vitscale.base.files import write_json

EPILOG = """\
loader    images per second of our stream, of the loaders of others (--peers timm,webdataset; timm-float,webdataset-float
          with normalisation as documented) and of decoding alone, at equal worker processes, crop, flip and antialiasing,
          taking turns; then the time of one image in one thread

example
  python launch/bench.py loader --data shards/imagenet --workers 2 --peers timm,webdataset --json loader.json
"""


def main() -> None:
    parser = Parser(description=__doc__ or "", epilog=EPILOG)
    parser.add_argument("what", choices=("loader",))
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
    options = parser.parse_args()
    for name, least in (("workers", 1), ("rounds", 1), ("image_size", 1), ("batch", 1), ("seconds", 0.01)):
        if getattr(options, name) < least:
            raise UsageError(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(options, name)}")
    record = bench_loader(options)
    if options.json:
        write_json(options.json, record)


def bench_loader(options: Namespace) -> dict[str, object]:
    """Measure, print a table, return the numbers."""
    peers = [name for name in options.peers.split(",") if name]
    for name in peers:
        if name not in PEERS:
            raise UsageError(f"--peers: expected some of {', '.join(PEERS)}, got {name!r}")
    manifest = None if is_url(options.data) else read_manifest(Path(options.data))
    if manifest is None or is_url(manifest.tars_at):
        raise UsageError(f"--data: expected a dataset with its tars on a disk, got {options.data}; copy them to one")
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
        "command": " ".join(["python", "launch/bench.py", *sys.argv[1:]]),
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


if __name__ == "__main__":
    run_main(main)
