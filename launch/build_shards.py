"""Make a dataset of WebDataset shards from raw images. Starting the same command again continues."""

import csv
import re
import time
from pathlib import Path

from data_pipeline.build import build_dataset
from data_pipeline.config import BuildConfig
from data_pipeline.manifest import REJECTS, Manifest
from data_pipeline.processes import default_workers
from data_pipeline.workshop import finished_dataset, forget_dataset
from launch.arguments import Parser
from vitscale.base.errors import UsageError, run_main
from vitscale.base.progress import bytes_in_words, in_words

DEFAULT_SHARD_BYTES = 256_000_000
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

EPILOG = """\
SOURCE
  imagefolder:PATH    one folder per class; files may lie in folders below it
  parquet:PATH        Hugging Face image layout: a file, a directory, or a pattern such as 'DIR/train-*.parquet'
  digits:train        the handwritten digits of scikit-learn: 1438 images (digits:eval: the other 359, digits: all)

What comes out
  train-000000.tar, train-000000.parquet, ...   shards and their indices
  rejects.parquet                               every input that was not written, with its reason
  manifest.json                                 written last; its sha256 is the fingerprint of the dataset

An interrupted build continues when the same command is started again. The bytes of all files depend on the source and
the options, never on --workers.

examples
  python launch/build_shards.py imagefolder:imagenet/train --out shards/imagenet
  python launch/build_shards.py parquet:cifar10-train.parquet --out shards/cifar10 --shard-images 2400
"""


def main() -> None:
    options = _parser().parse_args()
    if options.shard_size is not None and options.shard_images is not None:
        raise UsageError("expected --shard-size or --shard-images, got both; leave one of them out")
    config = BuildConfig(
        source=options.source,
        shard_bytes=None if options.shard_images is not None else options.shard_size or DEFAULT_SHARD_BYTES,
        shard_images=options.shard_images,
        seed=options.seed,
        classes=options.classes,
        per_class=options.per_class,
        on_bad=options.on_bad,
    )
    if options.replan:
        forget_dataset(options.out)
    if (manifest := finished_dataset(config, options.out)) is not None:
        print(f"{options.out} is complete already: {manifest.images:,} images, fingerprint {manifest.fingerprint}")
        return
    started_at_s = time.monotonic()
    manifest = build_dataset(config, options.out, workers=options.workers)
    print(summary(manifest, elapsed_s=time.monotonic() - started_at_s, workers=options.workers))


def summary(manifest: Manifest, *, elapsed_s: float, workers: int) -> str:
    """What a person wants to know when a build is over."""
    tar_bytes = sum(shard.tar_bytes for shard in manifest.shards)
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest.rejected.items())
    lines = [
        f"read        {manifest.images_read:,}",
        f"written     {manifest.images:,} in {len(manifest.shards):,} shards, {bytes_in_words(tar_bytes)} of tar",
        f"rejected    {sum(manifest.rejected.values()):,}" + (f" ({reasons}); named in {REJECTS}" if reasons else ""),
        f"left out    {manifest.build['left_out']:,} not selected",
        f"duplicates  {manifest.build['exact_duplicates']:,} exact, kept",
        f"time        {in_words(elapsed_s)} with {workers} workers, {manifest.images_read / elapsed_s:,.0f} images/s",
        f"fingerprint {manifest.fingerprint}",
    ]
    return "\n".join(lines)


def _parser() -> Parser:
    parser = Parser(description=__doc__ or "", epilog=EPILOG)
    parser.add_argument("source", metavar="SOURCE", help="where the images are, see below")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="directory of the dataset, made if missing")
    parser.add_argument(
        "--shard-size", metavar="SIZE", type=_size, help="image bytes per shard, such as 256MB (default) or 1GiB"
    )
    parser.add_argument("--shard-images", metavar="N", type=_count, help="images per shard, instead of --shard-size")
    parser.add_argument(
        "--workers", metavar="N", type=_count, default=default_workers(), help="processes (default here: %(default)s)"
    )
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="seed of the permutation over shards (default: 0)")
    parser.add_argument(
        "--classes",
        metavar="A,B,...",
        type=_names,
        help="keep only these classes, the first becomes label 0; quote a name that holds a comma: '\"tench, Tinca\",goldfish'",
    )
    parser.add_argument(
        "--per-class", metavar="N", type=_count, help="keep the first N good images of each class, in the order of the source"
    )
    parser.add_argument(
        "--on-bad", choices=("skip", "stop"), default="skip", help="reject a bad image (default), or end the build, exit 78"
    )
    parser.add_argument("--replan", action="store_true", help="delete what an earlier build wrote in DIR and start over")
    return parser


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise UsageError(f"--shard-size: expected a size such as 256MB, 1GB or 64MiB, got {text!r}")
    return size


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"expected a whole number of at least 1, got {text!r}; see --help")
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(next(csv.reader([text], skipinitialspace=True), []))
    if not all(names) or not names:
        raise UsageError(f"--classes: expected class names separated by commas, got {text!r}")
    return names


if __name__ == "__main__":
    run_main(main)
