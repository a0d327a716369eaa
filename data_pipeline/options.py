"""The options of a build as they are recorded: what a continuation, and a finished dataset, must match."""

import dataclasses
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

from data_pipeline.config import BuildConfig
from data_pipeline.exclude import dataset_name
from data_pipeline.manifest import read_manifest
from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.base.files import sha256_bytes

ALL = "train"
"""Name of the one dataset of a build without --split."""
_FLAG = {
    "source": "SOURCE",
    "shard_bytes": "--shard-size",
    "shard_images": "--shard-images",
    "resize_short": "--resize-short",
    "per_class": "--per-class",
    "on_bad": "--on-bad",
    "max_pixels": "--max-pixels",
    "max_bytes": "--max-bytes",
}


def options_of(config: BuildConfig) -> dict[str, Any]:
    """The options as JSON gives them back. Of the source only kind and last name: the same images read from another
    place are the same dataset. A file of labels and excluded datasets stand with the hash of their content."""
    kind, _, place = config.source.partition(":")
    options = dataclasses.asdict(config) | {"source": f"{kind}:{Path(place).name}"}
    if config.labels is not None:
        try:
            options["labels"] = f"{Path(config.labels).name} {sha256_bytes(Path(config.labels).read_bytes())[:16]}"
        except OSError as error:
            raise EnvironmentFault(f"--labels: {config.labels} cannot be read ({error.strerror}); name another file") from None
    options["exclude"] = [f"{dataset_name(path)} {read_manifest(Path(path)).fingerprint[:16]}" for path in config.exclude]
    return json.loads(json.dumps(options))


def refuse_other_options(wanted: dict[str, Any], stored: dict[str, Any], beginning: str) -> None:
    """Raise UsageError that names every option that differs. `beginning`: of the sentence, up to `with`."""
    names = [name for name in wanted if wanted[name] != stored.get(name)]
    if names:
        before, now = (
            ", ".join(f"{_FLAG.get(name, '--' + name)}={_shown(options.get(name))}" for name in names)
            for options in (stored, wanted)
        )
        raise UsageError(
            f"{beginning} with {before}, this command says {now}; repeat the former, choose another --out, "
            "or start over with --replan"
        )


def split_names(config: BuildConfig) -> list[str]:
    """Names of the datasets of a build, in the order of the command."""
    return [ALL] if config.split is None else [name for name, _ in config.split]


def dataset_directory(config: BuildConfig, out: Path, split: str) -> Path:
    """DIR, or DIR/SPLIT where there are several."""
    return out if config.split is None else out / split


def checked_split(text: str) -> tuple[tuple[str, str], ...]:
    """`train=0.9,eval=0.1` as pairs. Raises UsageError for anything that is not names with shares that add up to 1."""
    parts = [part.strip() for part in text.split(",")]
    pairs = []
    for part in parts:
        match = re.fullmatch(r"([a-z][a-z0-9_-]*)\s*=\s*(0?\.\d+)", part)
        if match is None or Fraction(match[2]) == 0:
            raise UsageError(f"--split: expected NAME=SHARE such as eval=0.1, small letters first, got {part!r}")
        pairs.append((match[1], match[2]))
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise UsageError(f"--split: expected each name once, got {', '.join(names)}")
    total = sum(Fraction(share) for _, share in pairs)
    if total != 1:
        raise UsageError(f"--split: expected shares that add up to 1, got {' + '.join(s for _, s in pairs)} = {float(total):g}")
    return tuple(pairs)


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        return ",".join("=".join(item) if isinstance(item, list) else str(item) for item in value)
    return str(value)
