"""The directory of a build: who may work in it, what a continuation must match, and how to start over.

DIR/manifest.json         the build is complete; nothing below exists any more
DIR/.build/lock           held by the process at work
DIR/.build/build.json     options of the build and hash of the list of inputs: what a continuation must match
DIR/.build/list/               the list of inputs (listing.py)
DIR/.build/plan.json      hash of the plan, once the scan is complete
DIR/.build/...            results of the scan (scan.py), records of finished shards (build.py)
"""

import dataclasses
import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.config import BuildConfig
from data_pipeline.listing import Listing
from data_pipeline.manifest import MANIFEST, REJECTS, Manifest, read_manifest
from data_pipeline.processes import disk_faults
from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.base.files import read_json, write_json

WORK = ".build"
LIST = "list"
TIMM_INFO = "_info.json"

_FLAG = {
    "source": "SOURCE",
    "shard_bytes": "--shard-size",
    "shard_images": "--shard-images",
    "classes": "--classes",
    "per_class": "--per-class",
    "on_bad": "--on-bad",
}


def finished_dataset(config: BuildConfig, out: Path) -> Manifest | None:
    """The complete dataset in `out`, or None where a build can begin or continue.

    Raises UsageError when the directory holds something else, or was built with other options.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"expected a directory for --out, got the file {out}; name another one")
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        _refuse_foreign(out, manifest)
        _refuse_other_options(config, manifest.build["options"], f"{out} holds a dataset built")
        shutil.rmtree(out / WORK, ignore_errors=True)  # a build killed in its last instant left it
        return manifest
    if (out / WORK / "build.json").exists():
        _refuse_other_options(config, read_json(out / WORK / "build.json")["options"], f"{out} holds an unfinished build begun")
    elif out.exists() and any(entry.name != WORK for entry in out.iterdir()):
        raise UsageError(f"{out} is not empty and holds no dataset of ours; choose another --out or empty it")
    return None


def forget_dataset(out: Path) -> None:
    """Delete everything a build wrote into `out`, and nothing else; a directory without a build is left alone.

    Raises UsageError when the dataset there was not built here.
    """
    with disk_faults(out):
        if (out / MANIFEST).exists():
            _refuse_foreign(out, read_manifest(out))
        elif not (out / WORK / "build.json").exists():
            return
        with claimed(out):
            out.joinpath(MANIFEST).unlink(missing_ok=True)  # first: what remains is no dataset
            for pattern in ("train-[0-9]*.tar", "train-[0-9]*.parquet", REJECTS, TIMM_INFO, ".*.tmp-*"):
                for path in out.glob(pattern):
                    path.unlink()
            shutil.rmtree(out / WORK)


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Hold the directory against a second build: each would delete the temporary files of the other."""
    (out / WORK).mkdir(exist_ok=True)
    with open(out / WORK / "lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnvironmentFault(f"another build is at work in {out}; wait for it, or choose another --out") from None
        yield


def begin_or_continue(config: BuildConfig, out: Path, inputs: Listing) -> None:
    work = out / WORK
    for leftover in (*out.glob(".*.tmp-*"), *work.glob("*.tmp"), *work.glob(".*.tmp-*")):
        leftover.unlink()
    begun = {"options": options_of(config), "inputs": len(inputs), "inputs_sha256": inputs.sha256}
    if not (work / "build.json").exists():
        write_json(work / "build.json", begun)
        return
    stored = read_json(work / "build.json")
    if stored != begun:
        raise UsageError(
            f"{config.source} lists {begun['inputs']} inputs, and they are not the {stored['inputs']} the unfinished build "
            f"in {out} began with; restore the source, or start over with --replan"
        )


def keep_plan(out: Path, plan: dict[str, Any]) -> None:
    path = out / WORK / "plan.json"
    if path.exists() and read_json(path) != plan:
        raise UsageError(f"the scan in {out} gives another plan than the shards already there; start over with --replan")
    write_json(path, plan)


def options_of(config: BuildConfig) -> dict[str, Any]:
    """The options as JSON gives them back. Of the source only kind and last name: the same images read from another
    place are the same dataset."""
    kind, _, place = config.source.partition(":")
    options = dataclasses.asdict(config) | {"source": f"{kind}:{Path(place).name}"}
    return json.loads(json.dumps(options))


def _refuse_foreign(out: Path, manifest: Manifest) -> None:
    if "options" not in manifest.build:
        raise UsageError(f"{out} holds a dataset that was not built here; choose another --out")


def _refuse_other_options(config: BuildConfig, stored: dict[str, Any], beginning: str) -> None:
    wanted = options_of(config)
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


def _shown(value: Any) -> str:
    return "none" if value is None else ",".join(value) if isinstance(value, list) else str(value)
