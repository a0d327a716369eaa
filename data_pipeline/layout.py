"""From what the scan found to the plan on disk: which image lies in which slot of which shard of which split.

DIR/.build/plan-SPLIT             one PLACE record per image, in the order in which they are stored; no header
DIR/.build/rejects-SPLIT.parquet  the rejects of the split
DIR/.build/plan.json              written last: bounds of the shards, counts and hash of each split

The plan is made once, by one rank, and read shard by shard: its length costs no memory.
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import BuildConfig
from data_pipeline.exclude import Excluded
from data_pipeline.listing import Listing
from data_pipeline.manifest import REJECTS_SCHEMA, append_tables, read_table
from data_pipeline.options import options_of, split_names
from data_pipeline.plan import (
    BAD,
    DUPLICATE,
    EXCLUDED,
    GOOD,
    UNREAD,
    duplicates,
    in_parts,
    permutation,
    plan_hash,
    shard_bounds,
    split_of,
)
from data_pipeline.scan import Scan, scan_path
from vitscale.base.errors import BadDataError, UsageError
from vitscale.base.files import fsync_path, publish, read_json, temporary_beside, write_json

PLAN = "plan.json"
PLACE = np.dtype(
    [
        ("row", "<i8"),  # in the (narrowed) list
        ("source_xxh3", "<u8"),
        ("image_xxh3", "<u8"),
        ("offset", "<i8"),  # in the spill file of the piece; -1: read from the source
        ("size", "<i4"),  # bytes to store
        ("piece", "<i4"),
    ]
)
_REJECTS_AT_ONCE = 65536


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The plan of one split."""

    split: str
    bounds: list[int]
    """Shard k holds the images [bounds[k], bounds[k + 1])."""
    rejected: dict[str, int]
    left_out: int
    exact_duplicates: int
    most_labels: int
    plan_sha256: str

    @property
    def images(self) -> int:
        return self.bounds[-1]

    def shard_name(self, shard: int) -> str:
        return f"{self.split}-{shard:06d}"

    def shard_names(self) -> list[str]:
        return [self.shard_name(shard) for shard in range(len(self.bounds) - 1)]

    def places(self, work: Path, shard: int) -> np.ndarray:
        """PLACE records of the images of one shard."""
        start, stop = self.bounds[shard : shard + 2]
        return np.fromfile(_plan_path(work, self.split), PLACE, count=stop - start, offset=start * PLACE.itemsize)


def read_layouts(work: Path) -> list[Layout]:
    return [Layout(**record) for record in read_json(work / PLAN)["splits"]]


def rejects_path(work: Path, split: str) -> Path:
    return work / f"rejects-{split}.parquet"


def lay_out(config: BuildConfig, inputs: Listing, scan: Scan, excluded: Excluded, *, work: Path, listed: int) -> None:
    """Write the plan of every split.

    Raises BadDataError when no image is good, UsageError when a split gets none.
    """
    if not (scan.status == GOOD).any():
        reason, example = _commonest(inputs, scan, excluded, work)
        raise BadDataError(f"expected good images in {config.source}, all are bad, mostly {reason}, such as {example}")
    most_labels = inputs.most_labels if inputs.classes else 0
    members = _members(config, scan)
    records = []
    for number, split in enumerate(split_names(config)):
        is_here = members == number
        rows = np.flatnonzero(is_here & (scan.status == GOOD))
        if not len(rows):
            raise UsageError(f"--split: none of the good images of {config.source} falls into {split}; give it a larger share")
        # Inputs that were not selected belong to the first split, as all without bytes.
        left_out = listed - len(inputs) + int((scan.status == UNREAD).sum()) if number == 0 else 0
        record = {
            "split": split,
            "plan_sha256": _hash(config, inputs, scan, rows, split=split, has_several=most_labels > 1),
            "exact_duplicates": _duplicates(scan, rows, int((is_here & (scan.status == DUPLICATE)).sum())),
            "rejected": _write_rejects(inputs, scan, excluded, np.flatnonzero(is_here & _is_rejected(scan)), work, split),
            "left_out": left_out,
            "most_labels": most_labels,
        }
        rows = rows[permutation(len(rows), config.seed)]
        bounds = shard_bounds(scan.sizes[rows], shard_bytes=config.shard_bytes, shard_images=config.shard_images)
        _write_places(_plan_path(work, split), scan, rows)
        records.append(record | {"bounds": bounds})
    write_json(work / PLAN, {"splits": records})


def _members(config: BuildConfig, scan: Scan) -> np.ndarray:
    """int8 number of the split of every row; the first for those without bytes."""
    if config.split is None:
        return np.zeros(len(scan.status), np.int8)
    members = split_of(scan.hashes, [share for _, share in config.split])
    members[scan.source_sizes == 0] = 0
    return members


def _is_rejected(scan: Scan) -> np.ndarray:
    return (scan.status == BAD) | (scan.status == EXCLUDED) | (scan.status == DUPLICATE)


def _duplicates(scan: Scan, rows: np.ndarray, rejected: int) -> int:
    """Images that occur before in the split, kept or rejected."""
    return rejected or len(duplicates(scan.hashes[rows], scan.source_sizes[rows])[0])


def _hash(config: BuildConfig, inputs: Listing, scan: Scan, rows: np.ndarray, *, split: str, has_several: bool) -> str:
    parts = (inputs.labels_of(rows[part]) or [] for part in in_parts(len(rows))) if has_several else ()
    options = options_of(config) | {"of_split": split}
    return plan_hash(
        options, inputs.numbers[rows], scan.hashes[rows], inputs.labels[rows], itertools.chain.from_iterable(parts)
    )


def _write_places(path: Path, scan: Scan, rows: np.ndarray) -> None:
    with temporary_beside(path) as temporary:
        with open(temporary, "wb") as file:
            for part in in_parts(len(rows)):
                these = rows[part]
                places = np.empty(len(these), PLACE)
                places["row"], places["piece"], places["offset"] = these, scan.pieces[these], scan.offsets[these]
                places["source_xxh3"], places["image_xxh3"] = scan.hashes[these], scan.image_hashes[these]
                places["size"] = scan.sizes[these]
                places.tofile(file)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)


def _write_rejects(inputs: Listing, scan: Scan, excluded: Excluded, rows: np.ndarray, work: Path, split: str) -> dict[str, int]:
    """The rejects of one split, by input number. Returns how many there are of each reason."""
    counts: Counter[str] = Counter()

    def counted() -> Iterator[dict[str, Any]]:
        for part in _reject_parts(inputs, scan, excluded, rows, work):
            counts.update(part["reason"])
            yield part

    with temporary_beside(rejects_path(work, split)) as temporary:
        append_tables(temporary, counted(), schema=REJECTS_SCHEMA)
        fsync_path(temporary)
        publish(temporary, rejects_path(work, split))
    return dict(sorted(counts.items()))


def _reject_parts(inputs: Listing, scan: Scan, excluded: Excluded, rows: np.ndarray, work: Path) -> Iterator[dict[str, Any]]:
    """Columns of rejects.parquet, part by part: reasons and details of bad images stay in the scan files until now."""
    for start in range(0, len(rows), _REJECTS_AT_ONCE):
        part = rows[start : start + _REJECTS_AT_ONCE]
        numbers, status = inputs.numbers[part], scan.status[part]
        reasons, details = np.full(len(part), "", object), np.full(len(part), "", object)
        for piece in np.unique(scan.pieces[part][status == BAD]).tolist():
            table = read_table(scan_path(work, piece), columns=["number", "reason", "detail"])
            places = np.flatnonzero((status == BAD) & (scan.pieces[part] == piece))
            at = np.searchsorted(table["number"], numbers[places])
            reasons[places], details[places] = table["reason"][at], table["detail"][at]
        places = np.flatnonzero(status == EXCLUDED)
        reasons[places] = "excluded"
        details[places] = [excluded.name_of(place) for place in scan.causes[part[places]].tolist()]
        places = np.flatnonzero(status == DUPLICATE)
        kept = scan.causes[part[places]]
        reasons[places] = "duplicate"
        details[places] = [
            f"the bytes of input {number}, {name}"
            for number, name in zip(inputs.numbers[kept].tolist(), inputs.names_of(kept), strict=True)
        ]
        yield {
            "input": np.array(numbers),
            "source": inputs.names_of(part),
            "reason": reasons.tolist(),
            "detail": details.tolist(),
        }


def _commonest(inputs: Listing, scan: Scan, excluded: Excluded, work: Path) -> tuple[str, str]:
    """The most frequent reason of a reject, and an input that has it."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for part in _reject_parts(inputs, scan, excluded, np.flatnonzero(_is_rejected(scan)), work):
        counts.update(part["reason"])
        for name, reason in zip(part["source"], part["reason"], strict=True):
            examples.setdefault(reason, name)
    reason = max(sorted(counts), key=counts.__getitem__)
    return reason, examples[reason]


def _plan_path(work: Path, split: str) -> Path:
    return work / f"plan-{split}"
