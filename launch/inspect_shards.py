"""Look at a dataset of shards: `info` says what is in it, `verify` whether it is whole."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline.manifest import Manifest, read_index, read_manifest
from data_pipeline.processes import default_workers
from data_pipeline.verify import verify_dataset
from launch.arguments import Parser
from vitscale.base.errors import EnvironmentFault, UsageError, run_main
from vitscale.base.progress import bytes_in_words

EPILOG = """\
info      counts, images per class, shard sizes, rejects, build options, fingerprint; reads the indices, no image
verify    every file against the manifest, every image, key and label against the index; exit 3 names all damage
"""
MOST_CLASSES_SHOWN = 40
BAR_WIDTH = 40


def main() -> None:
    parser = Parser(description=__doc__ or "", epilog=EPILOG)
    parser.add_argument("action", choices=("info", "verify"))
    parser.add_argument("directory", metavar="DIR", type=Path, help="directory of the dataset (holds manifest.json)")
    parser.add_argument(
        "--workers", metavar="N", type=int, default=default_workers(), help="processes of verify (default here: %(default)s)"
    )
    options = parser.parse_args()
    if options.workers < 1:
        raise UsageError(f"--workers: expected at least 1, got {options.workers}")
    manifest = read_manifest(options.directory)
    if options.action == "info":
        print(info(manifest))
        return
    damage = verify_dataset(manifest, workers=options.workers)
    for line in damage:
        print(line)
    if damage:
        raise EnvironmentFault(
            f"{options.directory} is damaged in {len(damage):,} places, named above; restore those files from a copy or rebuild"
        )
    print(f"whole: {manifest.images:,} images in {len(manifest.shards):,} shards, fingerprint {manifest.fingerprint}")


def info(manifest: Manifest) -> str:
    """The dataset in words and numbers."""
    indices = [read_index(manifest, shard) for shard in range(len(manifest.shards))]
    labels = np.concatenate([index.label for index in indices])
    sizes = np.concatenate([index.image_size for index in indices])
    shard_images = np.array([shard.images for shard in manifest.shards])
    shard_bytes = np.array([index.image_size.sum() for index in indices])
    rejected = sum(manifest.rejected.values())
    lines = [
        f"images       {manifest.images:,} written of {manifest.images_read:,} read, {rejected:,} rejected",
        *(f"  rejected   {count:,} {reason}" for reason, count in manifest.rejected.items()),
        f"image bytes  {bytes_in_words(int(sizes.sum()))}; per image {_spread(sizes, bytes_in_words)}",
        f"shards       {len(manifest.shards):,}; images {_spread(shard_images, '{:,}'.format)}; "
        f"image bytes {_spread(shard_bytes, bytes_in_words)}",
        f"fingerprint  {manifest.fingerprint}",
        *(f"  build      {name} = {value}" for name, value in _options(manifest)),
        *_classes(manifest.classes, labels),
    ]
    return "\n".join(lines)


def _spread(values: np.ndarray, words: Callable[[int], str]) -> str:
    return f"min {words(int(values.min()))}, mean {words(round(values.mean()))}, max {words(int(values.max()))}"


def _options(manifest: Manifest) -> list[tuple[str, object]]:
    options = manifest.build.get("options", {})
    others = {name: value for name, value in manifest.build.items() if name != "options"}
    return [(name, value) for name, value in {**options, **others}.items() if value is not None]


def _classes(classes: tuple[str, ...], labels: np.ndarray) -> list[str]:
    """Images of every class as bars, or of the smallest and largest when there are many."""
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    lines = [f"classes      {len(classes):,}" + (f"; images {_spread(counts, '{:,}'.format)}" if len(counts) else "")]
    if (labels < 0).any():
        lines.append(f"  no label   {int((labels < 0).sum()):,}")
    shown = np.arange(len(classes))
    if len(classes) > MOST_CLASSES_SHOWN:
        by_count = np.argsort(-counts, kind="stable")
        shown = np.concatenate([by_count[: MOST_CLASSES_SHOWN // 2], by_count[-MOST_CLASSES_SHOWN // 2 :]])
        lines[0] += f"; the {MOST_CLASSES_SHOWN // 2} largest and smallest:"
    width = max((len(classes[label]) for label in shown), default=0)
    for label in shown:
        bar = "█" * round(BAR_WIDTH * int(counts[label]) / max(1, int(counts.max())))
        lines.append(f"  {label:>6} {classes[label]:<{width}} {counts[label]:>9,} {bar}".rstrip())
    return lines


if __name__ == "__main__":
    run_main(main)
