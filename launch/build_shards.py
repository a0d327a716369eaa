"""Make a dataset of WebDataset shards from raw images. Starting the same command again continues."""

import csv
import hashlib
import os
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data_pipeline.build import build_datasets
from data_pipeline.config import BuildConfig, bytes_of
from data_pipeline.manifest import REJECTS, Manifest
from data_pipeline.options import checked_split
from data_pipeline.store import is_url
from data_pipeline.team import Team
from data_pipeline.workshop import finished_datasets
from launch.arguments import Parser
from vitscale.base.cluster import Cluster, resolve_cluster
from vitscale.base.errors import UsageError, run_main
from vitscale.base.progress import bytes_in_words, in_words

DEFAULT_SHARD_BYTES = 256_000_000

EPILOG = """\
SOURCE
  imagefolder:PATH    one folder per class; files may lie in folders below it
  tars:PATH           one tar per class, as ImageNet-21k ships
  parquet:PATH        Hugging Face image layout: a file, a directory, or a pattern such as 'DIR/train-*.parquet'
  table:FILE          CSV or Parquet with the columns path and label (or labels: several, a list or A|B); see docs/data.md
  webdataset:PATH     WebDataset tars of any maker: a directory or a pattern; they are shuffled and indexed anew
  digits:train        the handwritten digits of scikit-learn: 1438 images (digits:eval: the other 359, digits: all)

What comes out
  train-000000.tar, train-000000.parquet, ...   shards and their indices
  rejects.parquet                               every input that was not written, with its reason
  manifest.json                                 written last; its sha256 is the fingerprint of the dataset
With --split the same stands in DIR/NAME for each name. With --out URL it stands on the store (s3://, gs://, az://, http://),
and all but the tars in --work as well, where training can read it through location.json.

An interrupted build continues when the same command is started again. The bytes of all files depend on the source and
the options, never on --workers or the number of machines: start the same command under torchrun, deepspeed or srun, with
DIR on a file system that all of them see, and each rank builds its share.

examples
  python launch/build_shards.py imagefolder:imagenet/train --out shards/imagenet
  python launch/build_shards.py parquet:cifar10-train.parquet --out shards/cifar10 --shard-images 2400
  python launch/build_shards.py imagefolder:photos --out shards/photos --resize-short 256 --split train=0.99,eval=0.01 --dedup
  srun -N 8 python launch/build_shards.py imagefolder:photos --out /shared/photos --exclude shards/imagenet-eval
  python launch/build_shards.py parquet:cifar10-train.parquet --out s3://bucket/cifar10
"""


def main() -> None:
    options = _parser().parse_args()
    cluster = resolve_cluster(os.environ)
    config = _config(options)
    url = options.out.rstrip("/") if is_url(options.out) else None
    out = _work_directory(url, options.work) if url is not None else Path(options.out)
    if url is None and options.work is not None:
        raise UsageError("--work goes with --out URL: a build into a directory works in that directory; drop --work")
    if cluster.rank == 0 and not options.replan and (complete := finished_datasets(config, out)) is not None:
        for manifest in complete:
            print(f"{options.out} is complete already: {_in_brief(manifest)}")
        return
    workers = options.workers or cluster.threads()
    started_at_s = time.monotonic()
    manifests = build_datasets(config, out, workers=workers, team=Team.of(cluster), url=url, replan=options.replan)
    if cluster.rank == 0:
        print(summary(manifests, elapsed_s=time.monotonic() - started_at_s, processes=_processes(workers, cluster)))


def summary(manifests: Sequence[Manifest], *, elapsed_s: float, processes: str) -> str:
    """What a person wants to know when a build is over."""
    lines = []
    for manifest in manifests:
        tar_bytes = sum(shard.tar_bytes for shard in manifest.shards)
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest.rejected.items())
        is_deduplicated = manifest.build["options"]["dedup"]
        lines += [f"{manifest.build['split']}:"] if manifest.build["split"] else []
        lines += [
            f"read        {manifest.images_read:,}",
            f"written     {manifest.images:,} in {_counted(len(manifest.shards), 'shard')}, {bytes_in_words(tar_bytes)} of tar",
            f"rejected    {sum(manifest.rejected.values()):,}" + (f" ({reasons}); named in {REJECTS}" if reasons else ""),
            f"left out    {manifest.build['left_out']:,} not selected",
            f"duplicates  {manifest.build['exact_duplicates']:,} exact, {'rejected' if is_deduplicated else 'kept'}",
            f"fingerprint {manifest.fingerprint}",
        ]
    images = sum(manifest.images_read for manifest in manifests)
    megabytes = sum(shard.tar_bytes for manifest in manifests for shard in manifest.shards) / 1e6
    speed = f"{images / elapsed_s:,.0f} images/s read, {megabytes / elapsed_s:,.1f} MB/s written"
    return "\n".join([*lines, f"time        {in_words(elapsed_s)} with {processes}, {speed}"])


def _processes(workers: int, cluster: Cluster) -> str:
    return _counted(workers, "worker") + (f" in each of {cluster.world} ranks" if cluster.world > 1 else "")


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _in_brief(manifest: Manifest) -> str:
    name = f"{manifest.build['split']}, " if manifest.build["split"] else ""
    return f"{name}{manifest.images:,} images, fingerprint {manifest.fingerprint}"


def _config(options: Namespace) -> BuildConfig:
    if options.shard_size is not None and options.shard_images is not None:
        raise UsageError("expected --shard-size or --shard-images, got both; leave one of them out")
    if options.quality is not None and options.resize_short is None:
        raise UsageError("--quality goes with --resize-short: other images keep their bytes; drop it, or give --resize-short")
    if options.quality is not None and options.quality > 100:
        raise UsageError(f"--quality: expected a JPEG quality from 1 to 100, got {options.quality}")
    for dataset in options.exclude:
        if is_url(dataset):
            raise UsageError(f"--exclude: expected a directory, got {dataset}; name the --work directory of its build")
    return BuildConfig(
        source=options.source,
        shard_bytes=None if options.shard_images is not None else options.shard_size or DEFAULT_SHARD_BYTES,
        shard_images=options.shard_images,
        resize_short=options.resize_short,
        quality=options.quality or BuildConfig.quality,
        seed=options.seed,
        labels=options.labels,
        classes=options.classes,
        per_class=options.per_class,
        split=options.split,
        dedup=options.dedup,
        exclude=tuple(options.exclude),
        on_bad=options.on_bad,
        max_pixels=options.max_pixels,
        max_bytes=options.max_bytes,
    )


def _work_directory(url: str, given: Path | None) -> Path:
    """The local place of a build that goes to a store. Under the home, because a temporary directory may be gone, or lie
    in memory, when the build is to continue."""
    if given is not None:
        return given
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "vitscale" / "builds" / hashlib.sha256(url.encode()).hexdigest()[:16]


def _parser() -> Parser:
    parser = Parser(description=__doc__ or "", epilog=EPILOG)
    parser.add_argument("source", metavar="SOURCE", help="where the images are, see below")
    parser.add_argument("--out", metavar="DIR|URL", required=True, help="directory of the dataset, made if missing, or a store")
    parser.add_argument(
        "--work",
        metavar="DIR",
        type=Path,
        help="with --out URL: local directory of the build (default: below ~/.cache/vitscale)",
    )
    parser.add_argument(
        "--shard-size",
        metavar="SIZE",
        type=partial(_size, "--shard-size"),
        help="image bytes per shard, such as 256MB (default) or 1GiB",
    )
    parser.add_argument("--shard-images", metavar="N", type=_count, help="images per shard, instead of --shard-size")
    parser.add_argument(
        "--resize-short", metavar="N", type=_count, help="shrink images whose short side is above N to N, stored as JPEG"
    )
    parser.add_argument(
        "--quality", metavar="Q", type=_count, help=f"JPEG quality of --resize-short (default: {BuildConfig.quality})"
    )
    parser.add_argument(
        "--workers", metavar="N", type=_count, help="processes of each rank (default: the cores of the machine / its ranks)"
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
        "--labels", metavar="FILE", help="lines source_class,name: labels count the names; classes without a line are left out"
    )
    parser.add_argument(
        "--split", metavar="NAME=SHARE,...", type=checked_split, help="several datasets, divided by the hash of the image bytes"
    )
    parser.add_argument("--dedup", action="store_true", help="reject images whose bytes occur before")
    parser.add_argument(
        "--exclude", metavar="DATASET_DIR", action="append", default=[], help="reject the images of that dataset (repeatable)"
    )
    parser.add_argument(
        "--max-pixels", metavar="N", type=_count, default=BuildConfig.max_pixels, help="reject larger images (%(default)s)"
    )
    parser.add_argument(
        "--max-bytes",
        metavar="SIZE",
        type=partial(_size, "--max-bytes"),
        default=BuildConfig.max_bytes,
        help="reject larger files (%(default)s)",
    )
    parser.add_argument(
        "--on-bad",
        choices=("skip", "stop"),
        default="skip",
        help="reject what cannot be used (default), or end the build, exit 78; files that are no images by name never end it",
    )
    parser.add_argument("--local_rank", type=int, help="set by launchers; ignored")
    parser.add_argument("--replan", action="store_true", help="delete what an earlier build wrote in DIR and start over")
    return parser


def _size(flag: str, text: str) -> int:
    try:
        return bytes_of(flag, text)
    except ValueError as error:
        raise UsageError(str(error)) from None


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
