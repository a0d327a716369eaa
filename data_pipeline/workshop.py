"""The directory of a build: what a continuation must match, what a finished build leaves, and how to start over.

DIR/manifest.json          the build is complete (with --split: DIR/train/manifest.json, DIR/eval/manifest.json, ...)
DIR/.build/lock            held by the ranks at work (team.py)
DIR/.build/build.json      options of the build and hash of the list of inputs: what a continuation must match
DIR/.build/list/           the list of inputs (listing.py)
DIR/.build/scan-*, spill-* results of the scan (scan.py)
DIR/.build/plan.json       the plan, once the scan is complete, and its files (layout.py)
DIR/.build/train-*.json    records of finished shards (write.py)
"""

import contextlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from data_pipeline.config import BuildConfig
from data_pipeline.listing import Listing
from data_pipeline.manifest import LOCATION, MANIFEST, REJECTS, TIMM_INFO, Manifest, read_manifest
from data_pipeline.options import ALL, dataset_directory, options_of, refuse_other_options, split_names
from data_pipeline.processes import disk_faults
from data_pipeline.team import START, Team
from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.base.files import read_json, write_json

WORK = ".build"
LIST = "list"
BUILD = "build.json"


def finished_datasets(config: BuildConfig, out: Path) -> tuple[Manifest, ...] | None:
    """The complete datasets in `out`, in the order of the splits, or None where a build can begin or continue.

    Raises UsageError when the directory holds something else, or was built with other options.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"expected a directory for --out, got the file {out}; name another one")
    found = {manifest.directory: manifest for manifest in _manifests(out)}
    wanted = [dataset_directory(config, out, split) for split in split_names(config)]
    for manifest in found.values():
        _refuse_foreign(manifest)
        refuse_other_options(options_of(config), manifest.build["options"], f"{out} holds a dataset built")
    if found.keys() >= set(wanted):
        return tuple(found[directory] for directory in wanted)
    if (out / WORK / BUILD).exists():
        stored = read_json(out / WORK / BUILD)["options"]
        refuse_other_options(options_of(config), stored, f"{out} holds an unfinished build begun")
    elif out.exists() and any(not entry.name.startswith(WORK) for entry in out.iterdir()):
        raise UsageError(f"{out} is not empty and holds no dataset of ours; choose another --out or empty it")
    return None


def is_complete(config: BuildConfig, out: Path) -> bool:
    """Whether all manifests are there; nothing is read."""
    return all((dataset_directory(config, out, split) / MANIFEST).exists() for split in split_names(config))


def forget_dataset(out: Path) -> None:
    """Delete everything a build wrote into `out`, and nothing else; a directory without a build is left alone.

    Raises UsageError when the dataset there was not built here, EnvironmentFault when a build is at work.
    """
    with disk_faults(out):
        if holds_build(out):
            with Team().leading(out / WORK, None):
                forget_files(out)
            shutil.rmtree(out / WORK)


def forget_files(out: Path) -> None:
    """What forget_dataset does, for the one who holds the workshop and goes on to use it."""
    if not holds_build(out):
        return
    directories = {out, *(manifest.directory for manifest in _manifests(out))}
    build = out / WORK / BUILD
    if build.exists():
        directories |= {out / split for split, _ in read_json(build)["options"]["split"] or []}
    for directory in directories:
        directory.joinpath(MANIFEST).unlink(missing_ok=True)  # first: what remains is no dataset
    for directory in directories:
        name = ALL if directory == out else directory.name
        for pattern in (f"{name}-[0-9]*.tar", f"{name}-[0-9]*.parquet", REJECTS, TIMM_INFO, LOCATION, ".*.tmp-*"):
            for path in directory.glob(pattern):
                _remove(path)
        if directory != out and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
    for entry in (out / WORK).iterdir():
        if entry.name != "lock" and START not in entry.name:
            _remove(entry)


def begin_or_continue(config: BuildConfig, out: Path, inputs: Listing) -> None:
    """Record what this build is about, or compare it with the record. Raises UsageError when the inputs have changed.

    The caller is alone in the directory: what earlier starts left half-written is removed.
    """
    work = out / WORK
    _sweep(out)
    for split in split_names(config):
        for leftover in dataset_directory(config, out, split).glob(".*.tmp-*"):
            _remove(leftover)
    for leftover in (*work.glob(".*.tmp-*"), *work.glob("claims-*")):
        if START not in leftover.name:
            _remove(leftover)
    begun = {"options": options_of(config), "inputs": len(inputs), "inputs_sha256": inputs.sha256}
    if not (work / BUILD).exists():
        write_json(work / BUILD, begun)
        return
    stored = read_json(work / BUILD)
    if stored != begun:
        raise UsageError(
            f"{config.source} lists {begun['inputs']} inputs, and they are not the {stored['inputs']} the unfinished build "
            f"in {out} began with; restore the source, or start over with --replan"
        )


def withdraw(out: Path, *, is_mine: bool) -> None:
    """Leave no trace of a command that cannot be carried out; an unfinished build stays. `is_mine`: it made `out`."""
    if not (out / WORK / BUILD).exists():
        clear(out)
        if is_mine:
            out.rmdir()


def clear(out: Path) -> None:
    """Remove the workshop of a complete build, under the eyes of ranks that may still look at it."""
    gone = out / f"{WORK}-done-{secrets.token_hex(6)}"
    os.replace(out / WORK, gone)  # at once: a rank sees all of it or nothing
    shutil.rmtree(gone, ignore_errors=True)


def tidy(out: Path) -> None:
    """Remove what a build that was killed in its last instant left beside its manifest, unless somebody is at work."""
    _sweep(out)
    if (out / WORK).exists():
        with contextlib.suppress(EnvironmentFault), Team().leading(out / WORK, None):
            shutil.rmtree(out / WORK, ignore_errors=True)


def _sweep(out: Path) -> None:
    """Remove workshops that a kill left half removed."""
    for gone in out.glob(f"{WORK}-done-*"):
        shutil.rmtree(gone, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def holds_build(out: Path) -> bool:
    """Whether a build of ours, finished or not, is in `out`. Raises UsageError for a dataset that was not built here."""
    manifests = _manifests(out)
    for manifest in manifests:
        _refuse_foreign(manifest)
    return bool(manifests) or (out / WORK / BUILD).exists()


def _manifests(out: Path) -> list[Manifest]:
    """Of `out` itself, or of the splits below it."""
    if (out / MANIFEST).exists():
        return [read_manifest(out)]
    below = [read_manifest(path.parent) for path in sorted(out.glob(f"*/{MANIFEST}"))]
    return [manifest for manifest in below if _options(manifest).get("split")]


def _options(manifest: Manifest) -> dict[str, Any]:
    options: dict[str, Any] = manifest.build.get("options", {})
    return options


def _refuse_foreign(manifest: Manifest) -> None:
    if "options" not in manifest.build:
        raise UsageError(f"{manifest.directory} holds a dataset that was not built here; choose another --out")
