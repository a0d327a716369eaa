"""Settings of building and streaming. Plain frozen dataclasses, standard library only: vitscale may import them.

Each field says in its metadata what a resume does with it (design.md 4): the default kind is *result* (it changes what
is learned, so it must be equal), *machine* follows the command.
"""

import os
import re
import tempfile
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def bytes_of(name: str, size: int | str) -> int:
    """A size such as 1000000, "500MB" or "1.5TiB" in bytes. Raises ValueError that names the setting."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Z]*)", str(size).strip().upper())
    number = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if number < 1:
        raise ValueError(f"{name}: expected a size above 0 such as 500GB, 1.5TB or 64MiB, got {size!r}")
    return number


def machine(default: Any) -> Any:
    """A field that says how the machine works, not what comes out of it."""
    return field(default=default, metadata={"kind": "machine"})


@dataclass(frozen=True, kw_only=True)
class Source:
    """One of the datasets a training reads, as it is named on the command line."""

    path: str
    weight: Decimal


_WEIGHT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def sources_of(text: str) -> tuple[Source, ...]:
    """The sources of `DIR[=WEIGHT],DIR[=WEIGHT],...`; a plain DIR has weight 1.

    A number behind the last = is a weight, so a directory that is itself called `a=1` is written `a=1=1`; one with a
    comma in its name needs another name. Raises ValueError for a weight that is not above 0 and for an empty DIR.
    """
    found = []
    for part in text.split(","):
        path, equals, number = part.rpartition("=")
        if not equals or not _WEIGHT.fullmatch(number):
            path, number = part, "1"
        if not path:
            raise ValueError(f"expected DIR or DIR=WEIGHT between the commas, got {part!r} in {text!r}")
        weight = Decimal(number)
        if weight <= 0:
            raise ValueError(f"the weight of {path} must be above 0, got {number}; leave the dataset out instead")
        found.append(Source(path=path, weight=weight))
    return tuple(found)


def spelled(sources: tuple[Source, ...]) -> str:
    """The text that `sources_of` reads as these sources: weights only where they say something."""
    if len(sources) == 1 and not _WEIGHT.fullmatch(sources[0].path.rpartition("=")[2]):
        return sources[0].path
    return ",".join(f"{source.path}={source.weight}" for source in sources)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, in which order. Paths may change between starts; fingerprints and weights may not."""

    path: str = machine("")
    """Training data: a directory that holds manifest.json, or several with weights: DIR=3,DIR=1."""
    eval_path: str = machine("")
    """Directory of the evaluation dataset; empty: no evaluation."""
    fingerprint: str = ""
    """sha256 of the training manifest, of several joined by commas; filled in when the run starts."""
    weights: tuple[int, ...] = ()
    """Share of each of several training datasets in 4096ths, none for one; filled in when the run starts."""
    eval_fingerprint: str = ""
    """sha256 of the evaluation manifest; filled in when the run starts."""
    lanes: int = 128
    """Most lanes of the order (order.py); fewer when the dataset has fewer than 4 shards per lane."""
    window: int | Literal["full"] = 4096
    """Rows of a lane shuffled together, or "full": one permutation of the whole epoch (up to 50 M images)."""
    workers: int = machine(1)
    """Processes per rank that read and decode; 0: in the rank itself. Never changes the order."""
    bad_images_max: float = machine(0.001)
    """Share of the images seen that may be bad before the run stops; the first ten are always allowed. 0: none at all."""
    cache_dir: str = machine("")
    """Directory on a disk of the node for shards of datasets that are given by URL, shared by the node's ranks; empty:
    vitscale-cache-UID in $TMPDIR, else in /tmp."""
    cache_bytes: int | str = machine("200GB")
    """Most bytes of that directory, at every instant: a number, or a text such as "500GB"."""

    def __post_init__(self) -> None:
        if self.path:
            sources_of(self.path)
        if not 0 <= self.bad_images_max <= 1:
            raise ValueError(f"data.bad_images_max must be within 0 and 1, got {self.bad_images_max}")
        bytes_of("data.cache_bytes", self.cache_bytes)
        if self.lanes < 1:
            raise ValueError(f"data.lanes must be at least 1, got {self.lanes}")
        if self.window != "full" and self.window < 1:
            raise ValueError(f'data.window must be at least 1 or "full", got {self.window}')
        if self.workers < 0:
            raise ValueError(f"data.workers must be 0 or more, got {self.workers}")

    @property
    def cache_path(self) -> Path:
        """`cache_dir`, or where it is by default."""
        return Path(self.cache_dir) if self.cache_dir else Path(tempfile.gettempdir()) / f"vitscale-cache-{os.getuid()}"


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What happens to a training image between decoding and the batch; keyed to (seed, position)."""

    crop_area_min: float = 0.05
    """Smallest share of the image area a random resized crop keeps (Inception crop; Szegedy et al. 2015: 0.08, ViT: 0.05)."""
    crop_area_max: float = 1.0
    crop_ratio_max: float = 4 / 3
    """Widest aspect ratio of the crop; the narrowest is its inverse. 1.0: square."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    policy: Literal["none", "randaugment", "trivialaugment", "3augment"] = "none"
    """Operations on colours and geometry after crop and flip (policies.py names the papers)."""
    randaugment_ops: int = 2
    """RandAugment: operations per image."""
    randaugment_magnitude: int = 9
    """RandAugment: their strength, 0 to 30."""
    colour_jitter: float = 0.0
    """Brightness, contrast and saturation change by up to this share. 3-Augment: 0.3."""
    hue_jitter: float = 0.0
    """The colour circle turns by up to this share of its whole, at most 0.5."""
    erase: float = 0.0
    """Probability that a random rectangle is erased (2 to 33 % of the area)."""
    erase_with: Literal["noise", "zero"] = "noise"
    """What replaces it: a random value for each pixel and channel, or 0."""
    eval_crop: float = 0.875
    """Evaluation: the short side is resized to image_size / eval_crop, then the centre is cut out."""

    def __post_init__(self) -> None:
        if not 0 < self.crop_area_min <= self.crop_area_max <= 1:
            raise ValueError(
                "augment.crop_area_min and crop_area_max must satisfy 0 < min <= max <= 1, "
                f"got {self.crop_area_min} and {self.crop_area_max}"
            )
        if self.crop_ratio_max < 1:
            raise ValueError(f"augment.crop_ratio_max must be at least 1, got {self.crop_ratio_max}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"augment.flip must be within 0 and 1, got {self.flip}")
        if self.policy not in ("none", "randaugment", "trivialaugment", "3augment"):
            raise ValueError(f"augment.policy must be none, randaugment, trivialaugment or 3augment, got {self.policy!r}")
        if self.erase_with not in ("noise", "zero"):
            raise ValueError(f"augment.erase_with must be noise or zero, got {self.erase_with!r}")
        if self.randaugment_ops < 1:
            raise ValueError(f"augment.randaugment_ops must be at least 1, got {self.randaugment_ops}")
        if not 0 <= self.randaugment_magnitude <= 30:
            raise ValueError(f"augment.randaugment_magnitude must be within 0 and 30, got {self.randaugment_magnitude}")
        if self.colour_jitter < 0:
            raise ValueError(f"augment.colour_jitter must be 0 or more, got {self.colour_jitter}")
        if not 0 <= self.hue_jitter <= 0.5:
            raise ValueError(f"augment.hue_jitter must be within 0 and 0.5, got {self.hue_jitter}")
        if not 0 <= self.erase <= 1:
            raise ValueError(f"augment.erase must be within 0 and 1, got {self.erase}")
        if not 0 < self.eval_crop <= 1:
            raise ValueError(f"augment.eval_crop must be above 0 and at most 1, got {self.eval_crop}")


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """How raw images become shards. Everything here goes into the plan hash: a build continues only with equal options.
    Of files and datasets named here their content counts, not their place."""

    source: str
    """SOURCE as on the command line, such as imagefolder:PATH, parquet:PATH or digits:."""
    shard_bytes: int | None = 256_000_000
    """Close a shard when its image bytes would pass this; None: cut by shard_images."""
    shard_images: int | None = None
    """Images per shard; None: cut by shard_bytes."""
    resize_short: int | None = None
    """Pixels of the short side above which an image is shrunk to this and stored as JPEG; None: store what was read."""
    quality: int = 90
    """JPEG quality of shrunk images, 1 to 100."""
    seed: int = 0
    """Seed of the global permutation of the images over (shard, slot)."""
    labels: str | None = None
    """File of lines `source_class,name`: its names become the labels, in order of first appearance. None: source's own."""
    classes: tuple[str, ...] | None = None
    """Keep only these classes, in this order: the first becomes label 0. None: all."""
    per_class: int | None = None
    """Keep at most this many images of each class, the lowest input numbers first. None: all."""
    split: tuple[tuple[str, str], ...] | None = None
    """Names of several datasets and their shares as decimal numbers that add up to 1. None: one dataset, `train`."""
    dedup: bool = False
    """Reject an image whose bytes equal those of an input with a lower number."""
    exclude: tuple[str, ...] = ()
    """Directories of datasets whose images are rejected."""
    on_bad: Literal["skip", "stop"] = "skip"
    """What cannot be used goes to rejects.parquet (skip), or ends the build with exit 78 (stop); files that are no images
    by name go there either way."""
    max_pixels: int = 100_000_000
    """Images with more pixels than this are rejected before they are decoded."""
    max_bytes: int = 64_000_000
    """Images with more bytes than this are rejected before they are decoded."""

    def __post_init__(self) -> None:
        if (self.shard_bytes is None) == (self.shard_images is None):
            raise ValueError("give exactly one of --shard-size and --shard-images")
        for name in ("shard_bytes", "shard_images", "resize_short", "per_class", "max_pixels", "max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be within 1 and 100, got {self.quality}")
