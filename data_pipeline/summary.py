"""What is in a dataset, from its indices alone: counts, sizes, formats, labels. No image is read.

tally    sums and histograms of one shard or of several; adding two gives that of both, so memory does not grow with
         the number of shards
"""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np

from data_pipeline.manifest import Manifest, Shard, read_table
from data_pipeline.places import record_of
from data_pipeline.processes import run_tasks
from vitscale.base.errors import EnvironmentFault
from vitscale.base.progress import bytes_in_words, progress

FEW_SHARDS = 64
"""Up to here one process has read all indices before others have started."""
MOST_CLASSES_SHOWN = 40
BAR_WIDTH = 40

# Lower edges of the bins; the first bin begins at 0.
_SQUARES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_BYTES = tuple(4**power * 1000 for power in range(8))
_ASPECTS = ((1, 3), (1, 2), (3, 4), (4, 3), (2, 1), (3, 1))
_LABELS = (1, 2, 3, 4, 8, 16)
_COLUMNS = ["image_size", "label", "width", "height", "orientation", "format"]


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Sums over images."""

    images: int = 0
    image_bytes: int = 0
    bytes_min: int = 2**63 - 1
    bytes_max: int = 0
    shard_images: tuple[int, int] = (2**63 - 1, 0)
    """Least and most images of a shard."""
    shard_bytes: tuple[int, int] = (2**63 - 1, 0)
    unlabelled: int = 0
    histograms: dict[str, Counter[int]] = field(default_factory=dict)
    """Images by bin, of `pixels`, `bytes`, `aspect` and `labels`."""
    formats: Counter[str] = field(default_factory=Counter)
    orientations: Counter[int] = field(default_factory=Counter)
    classes: np.ndarray
    """int64: images of each class; an image with several labels counts for each."""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            images=self.images + other.images,
            image_bytes=self.image_bytes + other.image_bytes,
            bytes_min=min(self.bytes_min, other.bytes_min),
            bytes_max=max(self.bytes_max, other.bytes_max),
            shard_images=_wider(self.shard_images, other.shard_images),
            shard_bytes=_wider(self.shard_bytes, other.shard_bytes),
            unlabelled=self.unlabelled + other.unlabelled,
            histograms={
                name: self.histograms.get(name, Counter()) + other.histograms.get(name, Counter())
                for name in ("pixels", "bytes", "aspect", "labels")
            },
            formats=self.formats + other.formats,
            orientations=self.orientations + other.orientations,
            classes=self.classes + other.classes,
        )


def tally_dataset(manifest: Manifest, *, workers: int, show_progress: bool = True) -> Tally:
    """Read every index once. Raises EnvironmentFault naming one that is missing or damaged."""
    shards = len(manifest.shards)
    tallies = run_tasks(tally_shard, manifest, range(shards), workers=workers if shards > FEW_SHARDS else 1)
    if show_progress and shards > FEW_SHARDS:
        tallies = progress(tallies, total=shards, what="reading", unit=" indices")
    return reduce(Tally.__add__, tallies, Tally(classes=np.zeros(len(manifest.classes), np.int64)))


def tally_shard(manifest: Manifest, number: int) -> Tally:
    """The tally of one shard."""
    shard: Shard = manifest.shards[number]
    path = record_of(manifest.directory, manifest.tars_at, f"{shard.name}.parquet")
    several = manifest.most_labels > 1
    rows = read_table(path, columns=[*_COLUMNS, "labels"] if several else _COLUMNS)
    if len(rows["label"]) != shard.images:
        raise EnvironmentFault(f"{path}: expected {shard.images} rows, got {len(rows['label'])}; see inspect_shards.py verify")
    if several:
        lists = [np.zeros(0, np.int32) if labels is None else labels for labels in rows["labels"]]
        labels, per_image = np.concatenate(lists), np.array([len(labels) for labels in lists])
    else:
        labels, per_image = rows["label"][rows["label"] >= 0], (rows["label"] >= 0).astype(np.int64)
    if labels.max(initial=-1) >= len(manifest.classes):
        raise EnvironmentFault(
            f"{path}: expected labels below {len(manifest.classes)}, the count of classes, got {labels.max()}"
        )
    sizes, height, width = rows["image_size"], rows["height"].astype(np.int64), rows["width"].astype(np.int64)
    is_turned = rows["orientation"] >= 5
    aspect = np.where(is_turned, height, width) / np.maximum(np.where(is_turned, width, height), 1)
    total = int(sizes.sum())
    return Tally(
        images=shard.images,
        image_bytes=total,
        bytes_min=int(sizes.min()),
        bytes_max=int(sizes.max()),
        shard_images=(shard.images, shard.images),
        shard_bytes=(total, total),
        unlabelled=int((per_image == 0).sum()),
        histograms={
            "pixels": _binned(width * height, [side**2 for side in _SQUARES]),
            "bytes": _binned(sizes, _BYTES),
            "aspect": _binned(aspect, [a / b for a, b in _ASPECTS]),
            "labels": _binned(per_image, _LABELS),
        },
        formats=Counter(rows["format"].tolist()),
        orientations=_counted(rows["orientation"]),
        classes=np.bincount(labels, minlength=len(manifest.classes)),
    )


def described(manifest: Manifest, tally: Tally) -> str:
    """The dataset in words and numbers."""
    rejected = sum(manifest.rejected.values())
    images, total = max(1, tally.images), tally.image_bytes
    per_shard = max(1, len(manifest.shards))
    lines = [
        f"images       {manifest.images:,} written of {manifest.images_read:,} read, {rejected:,} rejected",
        *(f"  rejected   {count:,} {reason}" for reason, count in manifest.rejected.items()),
        f"image bytes  {bytes_in_words(total)}; per image "
        f"{_spread(bytes_in_words, tally.bytes_min, total / images, tally.bytes_max)}",
        f"shards       {len(manifest.shards):,}; images "
        f"{_spread('{:,}'.format, tally.shard_images[0], tally.images / per_shard, tally.shard_images[1])}; "
        f"image bytes {_spread(bytes_in_words, tally.shard_bytes[0], total / per_shard, tally.shard_bytes[1])}",
        *([f"tars at      {manifest.tars_at}"] if manifest.tars_at != str(manifest.directory) else []),
        f"fingerprint  {manifest.fingerprint}",
        *(f"  build      {name} = {value}" for name, value in _options(manifest)),
        "formats      " + ", ".join(f"{name} {count:,}" for name, count in tally.formats.most_common()),
        "orientation  " + ", ".join(f"{turn} {count:,}" for turn, count in sorted(tally.orientations.items())),
        *_bars("pixels", tally.histograms["pixels"], [f"{side}²" for side in _SQUARES]),
        *_bars("bytes", tally.histograms["bytes"], [bytes_in_words(edge).replace(".0 ", " ") for edge in _BYTES]),
        *_bars("aspect w:h", tally.histograms["aspect"], [f"{a}:{b}" for a, b in _ASPECTS]),
    ]
    if manifest.most_labels > 1:
        lines += _bars("labels", tally.histograms["labels"], [str(edge) for edge in _LABELS])
    return "\n".join(lines + _classes(manifest.classes, tally))


def as_record(manifest: Manifest, tally: Tally) -> dict[str, Any]:
    """The same for programs: JSON."""
    edges = {"pixels": [side**2 for side in _SQUARES], "bytes": list(_BYTES), "labels": list(_LABELS)}
    edges_all: dict[str, list[Any]] = {**edges, "aspect": [f"{a}:{b}" for a, b in _ASPECTS]}
    return {
        "fingerprint": manifest.fingerprint,
        "images": manifest.images,
        "images_read": manifest.images_read,
        "rejected": manifest.rejected,
        "shards": len(manifest.shards),
        "image_bytes": tally.image_bytes,
        "most_labels": manifest.most_labels,
        "unlabelled": tally.unlabelled,
        "formats": dict(sorted(tally.formats.items())),
        "orientations": {str(turn): count for turn, count in sorted(tally.orientations.items())},
        "histograms": {
            name: {"lower_edges": [0, *edges_all[name]], "images": [counts[i] for i in range(len(edges_all[name]) + 1)]}
            for name, counts in tally.histograms.items()
        },
        "images_by_class": dict(zip(manifest.classes, tally.classes.tolist(), strict=True)),
    }


def _wider(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return min(a[0], b[0]), max(a[1], b[1])


def _binned(values: np.ndarray, edges: Any) -> Counter[int]:
    return _counted(np.searchsorted(np.asarray(edges), values, side="right"))


def _counted(values: np.ndarray) -> Counter[int]:
    found, counts = np.unique(values, return_counts=True)
    return Counter(dict(zip(found.tolist(), counts.tolist(), strict=True)))


def _spread(words: Callable[[int], str], least: int, mean: float, most: int) -> str:
    return f"min {words(least)}, mean {words(round(mean))}, max {words(most)}"


def _options(manifest: Manifest) -> list[tuple[str, object]]:
    options = manifest.build.get("options", {})
    others = {name: value for name, value in manifest.build.items() if name != "options"}
    return [(name, value) for name, value in {**options, **others}.items() if value is not None]


def _bars(title: str, counts: Counter[int], edges: list[str]) -> list[str]:
    """One line per bin, from the first to the last that has images."""
    names = [f"< {edges[0]}", *(f"{low} to {high}" for low, high in itertools.pairwise(edges)), f"≥ {edges[-1]}"]
    shown = range(min(counts, default=0), max(counts, default=-1) + 1)
    width = max((len(names[number]) for number in shown), default=0)
    most = max(counts.values(), default=1)
    bars = [(names[number], counts[number], _bar(counts[number], most)) for number in shown]
    return [title, *(f"  {name:<{width}} {count:>12,} {bar}".rstrip() for name, count, bar in bars)]


def _bar(count: int, most: int) -> str:
    return "█" * round(BAR_WIDTH * count / most) or ("▏" if count else "")


def _classes(classes: tuple[str, ...], tally: Tally) -> list[str]:
    """Images of every class as bars, or of the smallest and largest when there are many."""
    counts = tally.classes
    spread = _spread("{:,}".format, int(counts.min()), float(counts.mean()), int(counts.max())) if len(counts) else ""
    lines = [f"classes      {len(classes):,}" + (f"; images {spread}" if spread else "")]
    if tally.unlabelled:
        lines.append(f"  no label   {tally.unlabelled:,}")
    shown = np.arange(len(classes))
    if len(classes) > MOST_CLASSES_SHOWN:
        by_count = np.argsort(-counts, kind="stable")
        shown = np.concatenate([by_count[: MOST_CLASSES_SHOWN // 2], by_count[-MOST_CLASSES_SHOWN // 2 :]])
        lines[0] += f"; the {MOST_CLASSES_SHOWN // 2} largest and smallest:"
    width = max((len(classes[label]) for label in shown), default=0)
    most = max(1, int(counts.max(initial=0)))
    for label in shown:
        lines.append(f"  {label:>6} {classes[label]:<{width}} {counts[label]:>9,} {_bar(int(counts[label]), most)}".rstrip())
    return lines
