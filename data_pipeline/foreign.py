"""Tars of others, readable as a dataset without rewriting them: an index beside or apart from them, and a manifest.

OUT/
  NAME.parquet           index of NAME.tar, in the order of the tar
  rejects.parquet        every sample that cannot be used, with its reason
  location.json          where the tars are, when they are elsewhere
  manifest.json          last
  .index/NAME.json       while unfinished: what was found in NAME.tar, with its size and time; NAME.rejects.parquet likewise

Of every tar each member is looked at: a sample is used when it has one image with a readable header and, where the
dataset has labels, a label. Whether all pixels decode is seen at run time, or here by `is_full`.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.manifest import (
    INDEX_SCHEMA,
    LOCATION,
    MANIFEST,
    REJECTS,
    REJECTS_SCHEMA,
    Manifest,
    Shard,
    append_tables,
    read_manifest,
    read_table,
    write_manifest,
    write_table,
)
from data_pipeline.places import Tars, local_copy, reading, stamp_of
from data_pipeline.processes import disk_faults, run_tasks
from data_pipeline.tar_index import Reject, contents_of
from data_pipeline.tars import BadTar
from data_pipeline.workshop import WORK as BUILD
from vitscale.base.errors import BadDataError, EnvironmentFault, UsageError
from vitscale.base.files import fsync_path, publish, read_json, sha256_bytes, sha256_file, write_json
from vitscale.base.progress import progress

WORK = ".index"
NO_LABEL = ("no-label", "the sample has no label, others of the dataset have")


@dataclass(frozen=True, kw_only=True)
class IndexSetup:
    """What indexing any tar of the dataset needs."""

    at: str
    """Directory or URL of the tars."""
    out: Path
    classes: tuple[str, ...]
    """Names given by the user; empty: numbers serve as names."""
    is_full: bool
    """Decode every image completely."""


@dataclass(frozen=True, kw_only=True)
class TarReport:
    """What was found in one tar."""

    shard: dict[str, Any]
    """Fields of `Shard`; images: those that can be used."""
    stamp: dict[str, int]
    """Fields of `Stamp`, by which an unchanged tar is known."""
    options: str
    """Hash of what changes an index: classes and depth of the check."""
    read: int
    """Samples found, used or not."""
    rejected: dict[str, int]
    unlabelled: int
    """Used images without a label."""
    highest_label: int
    """-1: no labels."""
    most_labels: int
    damage: str
    """Empty, or why the tar cannot be walked to its end."""


def index_dataset(
    tars: Tars,
    *,
    out: Path,
    classes: tuple[str, ...] = (),
    is_full: bool = False,
    skip_damaged: bool = False,
    workers: int = 1,
    show_progress: bool = True,
) -> Manifest:
    """Index the tars, continue where an earlier start ended, or return the dataset that is complete.

    Raises UsageError where `out` holds another dataset, EnvironmentFault for tars that are damaged (unless they are to be
    skipped) or missing, BadDataError when no image can be used.
    """
    setup = IndexSetup(at=tars.at, out=out, classes=classes, is_full=is_full)
    with disk_faults(out):
        if (out / MANIFEST).exists():
            return _complete_already(setup, tars)
        if (out / BUILD).exists():
            raise UsageError(f"{out} holds an unfinished build; let launch/build_shards.py finish it, or choose another --out")
        (out / WORK).mkdir(parents=True, exist_ok=True)
        finished = run_tasks(index_tar, setup, tars.names, workers=workers)
        reports = list(progress(finished, total=len(tars.names), what="indexing", unit=" tars") if show_progress else finished)
        reports.sort(key=lambda report: report.shard["name"])
        damaged = [f"{report.shard['name']}.tar: {report.damage}" for report in reports if report.damage]
        if damaged and not skip_damaged:
            more = f" (and {len(damaged) - 3:,} more tars)" if len(damaged) > 3 else ""
            raise EnvironmentFault(
                f"expected plain tars, but {' | '.join(damaged[:3])}{more}; fetch them again, or leave them out by "
                "--skip-damaged; what was indexed is kept"
            )
        if any(report.highest_label >= 0 for report in reports):
            reports = [_without_unlabelled(setup, report) if report.unlabelled else report for report in reports]
        return _complete(setup, reports)


def index_tar(setup: IndexSetup, name: str) -> TarReport:
    """Write the index of one tar and what is to be rejected of it; an index that is still right is kept."""
    stamp = asdict(stamp_of(setup.at, name))
    options = _options_hash(setup)
    if (kept := _kept(setup, name, stamp, options)) is not None:
        return kept
    damage = ""
    with local_copy(setup.at, name, scratch=setup.out / WORK) as path, reading(path) as read_at:
        try:
            rows, rejects = contents_of(read_at, stamp["size"], tar=f"{name}.tar", classes=setup.classes, is_full=setup.is_full)
        except BadTar as bad:
            damage, rows, rejects = str(bad), [], [Reject(f"{name}.tar", "damaged-tar", str(bad))]
        tar_sha256 = sha256_file(path)
    labels = [row["labels"] for row in rows]
    report = TarReport(
        shard={"name": name, "images": len(rows), "tar_bytes": stamp["size"], "tar_sha256": tar_sha256},
        stamp=stamp,
        options=options,
        read=len(rows) + len(rejects),
        rejected=dict(Counter(reject.reason for reject in rejects)),
        unlabelled=sum(not marks for marks in labels),
        highest_label=max((max(marks) for marks in labels if marks), default=-1),
        most_labels=max(map(len, labels), default=0),
        damage=damage,
    )
    columns: dict[str, Any] = {column: [row[column] for row in rows] for column in INDEX_SCHEMA.names}
    return _written(setup, report, columns, rejects)


def _options_hash(setup: IndexSetup) -> str:
    return sha256_bytes("\0".join([str(setup.is_full), *setup.classes]).encode())


def _record(setup: IndexSetup, name: str) -> Path:
    return setup.out / WORK / f"{name}.json"


def _rejects(setup: IndexSetup, name: str) -> Path:
    return setup.out / WORK / f"{name}.rejects.parquet"


def _kept(setup: IndexSetup, name: str, stamp: dict[str, int], options: str) -> TarReport | None:
    """The report of an earlier start, if tar, options and index are those it speaks of."""
    index, record = setup.out / f"{name}.parquet", _record(setup, name)
    if not (record.exists() and index.exists() and _rejects(setup, name).exists()):
        return None
    report = TarReport(**read_json(record))
    is_right = report.stamp == stamp and report.options == options and not report.damage
    return report if is_right and sha256_file(index) == report.shard["index_sha256"] else None


def _written(setup: IndexSetup, report: TarReport, columns: dict[str, Any], rejects: list[Reject]) -> TarReport:
    """Publish index, rejects and report, in this order: an index without its report is written again."""
    name = report.shard["name"]
    index = setup.out / f"{name}.parquet"
    write_table(index, columns, schema=INDEX_SCHEMA)
    text = {column: [row[place] for row in rejects] for place, column in enumerate(("source", "reason", "detail"))}
    write_table(_rejects(setup, name), {"input": np.zeros(len(rejects), np.int64), **text}, schema=REJECTS_SCHEMA)
    report = TarReport(**vars(report) | {"shard": report.shard | {"index_sha256": sha256_file(index)}})
    write_json(_record(setup, name), vars(report))
    return report


def _without_unlabelled(setup: IndexSetup, report: TarReport) -> TarReport:
    """The same tar with its unlabelled images rejected."""
    name = report.shard["name"]
    rows = read_table(setup.out / f"{name}.parquet")
    earlier = read_table(_rejects(setup, name))
    is_labelled = rows["label"] >= 0
    rejects = [Reject(*row) for row in zip(earlier["source"], earlier["reason"], earlier["detail"], strict=True)]
    rejects += [Reject(source, *NO_LABEL) for source in rows["source"][~is_labelled]]
    report = TarReport(
        **vars(report)
        | {
            "shard": report.shard | {"images": int(is_labelled.sum())},
            "rejected": report.rejected | {NO_LABEL[0]: report.unlabelled},
            "unlabelled": 0,
        }
    )
    return _written(setup, report, {column: values[is_labelled] for column, values in rows.items()}, rejects)


def _complete(setup: IndexSetup, reports: list[TarReport]) -> Manifest:
    """Write rejects, location and manifest, in this order, and clear the workshop. Tars without images are left out."""
    rejected = sum((Counter(report.rejected) for report in reports), Counter[str]())
    read = sum(report.read for report in reports)
    if rejected.total() == read:
        reason = rejected.most_common(1)[0][0] if rejected else "no samples"
        raise BadDataError(f"expected images in the {len(reports):,} tars at {setup.at}, none can be used, mostly {reason}")
    temporary = setup.out / WORK / REJECTS
    append_tables(temporary, _numbered_rejects(setup, reports), schema=REJECTS_SCHEMA)
    fsync_path(temporary)
    publish(temporary, setup.out / REJECTS)
    if os.path.realpath(setup.at) != os.path.realpath(setup.out):
        write_json(setup.out / LOCATION, {"tars_at": setup.at})
    for report in reports:
        if not report.shard["images"]:
            (setup.out / f"{report.shard['name']}.parquet").unlink()
    highest = max(report.highest_label for report in reports)
    manifest = write_manifest(
        setup.out,
        shards=[Shard(**report.shard) for report in reports if report.shard["images"]],
        classes=list(setup.classes) or [str(number) for number in range(highest + 1)],
        images_read=read,
        rejected=dict(sorted(rejected.items())),
        build={"indexed_tars": len(reports), "decoded_fully": setup.is_full},
        most_labels=max(report.most_labels for report in reports),
    )
    shutil.rmtree(setup.out / WORK)
    return manifest


def _numbered_rejects(setup: IndexSetup, reports: list[TarReport]) -> Iterator[dict[str, Any]]:
    """The rejects of one tar after another, counted through all of them."""
    number = 0
    for report in reports:
        if report.rejected:
            rows = read_table(_rejects(setup, report.shard["name"]))
            count = len(rows["reason"])
            yield rows | {"input": np.arange(number, number + count)}
            number += count


def _complete_already(setup: IndexSetup, tars: Tars) -> Manifest:
    """The dataset at `out`, if it is the index of these tars."""
    manifest = read_manifest(setup.out)
    if "indexed_tars" not in manifest.build:
        raise UsageError(f"{setup.out} holds a dataset that was built, not indexed; choose another --out")
    if list(setup.classes or manifest.classes) != list(manifest.classes) or setup.is_full > manifest.build["decoded_fully"]:
        raise UsageError(
            f"{setup.out} was indexed with other --classes or without --full; choose another --out, or delete "
            f"{setup.out / MANIFEST} to index anew"
        )
    if manifest.build["indexed_tars"] != len(tars.names) or {shard.name for shard in manifest.shards} - set(tars.names):
        raise UsageError(
            f"{setup.out} holds the index of {manifest.build['indexed_tars']:,} tars, {setup.at} has {len(tars.names):,}; "
            f"choose another --out, or delete {setup.out / MANIFEST} to index anew"
        )
    for shard in manifest.shards:
        if stamp_of(setup.at, shard.name).size != shard.tar_bytes:
            raise UsageError(
                f"{shard.name}.tar has changed since {setup.out} was indexed; delete {setup.out / MANIFEST} to index anew"
            )
    return manifest
