"""The run directory: everything one training has written, and whether a command may continue it.

RUN/
  config.json  ds_config.json       as resolved
  provenance/attempt-NNN.json       command, versions, hosts, what differed from the last attempt
  metrics.jsonl  events.jsonl  tensorboard/  log.txt  status.json
  checkpoints/step-00001200/
  stop  save                        made by anybody to steer the training (steering.py)
  lease.json  .lease-000007         who owns it (vitscale/base/lease.py)
  FINISHED.json                     the marker of a finished run, written last
"""

import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.config import DataConfig, sources_of
from vitscale.base.cluster import Cluster
from vitscale.base.credentials import masked_words
from vitscale.base.errors import EnvironmentFault, HostFault, UsageError, complain
from vitscale.base.files import read_json, remove_temporaries, write_bytes, write_json
from vitscale.base.lease import Lease, take_lease
from vitscale.config import Config, Kind, from_record, kind_of, to_record
from vitscale.ds_config import DsConfig
from vitscale.training.collectives import barrier, from_all_ranks, from_rank_zero
from vitscale.training.engine import versions

CONFIG = "config.json"
FINISHED = "FINISHED.json"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One setting that the command and the stored run do not agree on."""

    key: str
    kind: Kind
    stored: Any
    wanted: Any


def stored_config(run: Path) -> Config | None:
    """The configuration of an existing run, or None where there is no run yet."""
    path = run / CONFIG
    return from_record(read_json(path), origin=str(path)) if path.exists() else None


def differences(stored: Config, wanted: Config) -> list[Difference]:
    """Every setting with two values, in the order of the tree. Pure."""
    before, now = to_record(stored), to_record(wanted)
    found = []
    for section in before:
        if not isinstance(before[section], dict):
            pairs = [(section, before[section], now[section])]
        else:
            pairs = [(f"{section}.{name}", value, now[section][name]) for name, value in before[section].items()]
        found += [Difference(key=key, kind=kind_of(key), stored=a, wanted=b) for key, a, b in pairs if a != b]
    return found


def refuse_result_changes(run: Path, found: list[Difference]) -> None:
    """Raise UsageError when a setting that changes the result differs from the run's own."""
    changed = [d for d in found if d.kind == "result"]
    if changed:
        named = "; ".join(f"{d.key} is {d.stored!r} in the run, {d.wanted!r} in the command" for d in changed)
        raise UsageError(
            f"{run} was started with another configuration: {named}; give the same settings to continue it, "
            "or another --run directory to start a new run"
        )


@contextmanager
def leased(run: Path, cluster: Cluster) -> Iterator[Lease | None]:
    """The run belongs to this start of the program: rank 0 holds the lease, the others None. Collective.

    Raises EnvironmentFault on every rank where somebody else has it.
    """
    lease, refusal = None, ""
    if cluster.rank == 0:
        try:
            run.mkdir(parents=True, exist_ok=True)
            lease = take_lease(run, say=complain)
        except EnvironmentFault as fault:
            refusal = str(fault)
        except OSError as error:
            refusal = f"the run directory {run.resolve()} cannot be written to ({error}); expected one that can"
    refusal = from_rank_zero(refusal)
    if refusal:
        raise EnvironmentFault(refusal)
    with lease or nullcontext():
        yield lease


def require_shared_directory(run: Path, cluster: Cluster) -> None:
    """Raise HostFault on the hosts that do not see what rank 0 writes into the run directory. Collective."""
    nonce = from_rank_zero(uuid.uuid4().hex)
    path = run / ".nonce"
    if cluster.rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        write_bytes(path, nonce.encode())
    barrier()
    sees = path.is_file() and path.read_text() == nonce
    blind = [host for host, good in from_all_ranks((cluster.host, sees)) if not good]
    if cluster.rank == 0:
        path.unlink()
    if not sees:
        raise HostFault(
            f"host {cluster.host} does not see the run directory {run.resolve()} that rank 0 writes to; "
            "put --run on a file system shared by all hosts"
        )
    if blind:
        raise HostFault(f"hosts {', '.join(sorted(set(blind)))} do not see the run directory {run.resolve()}")


def begin_attempt(run: Path, *, config: Config, ds: DsConfig, cluster: Cluster, followed: list[Difference]) -> int:
    """Record what this start runs with; returns the number of the attempt. Collective; rank 0 writes."""
    hosts = from_all_ranks(cluster.host)
    number = 0
    if cluster.rank == 0:
        provenance = run / "provenance"
        provenance.mkdir(exist_ok=True)
        for directory in (run, provenance, run / "checkpoints"):
            remove_temporaries(directory)  # of an attempt that was killed
        number = 1 + len(list(provenance.glob("attempt-*.json")))
        write_json(
            provenance / f"attempt-{number:03d}.json",
            {
                "command": masked_words(sys.argv),
                "started_at_unix_s": time.time(),
                "launcher": cluster.launcher,
                "world": cluster.world,
                "hosts": hosts,
                "threads": torch.get_num_threads(),
                "versions": versions(),
                "code_revision": _code_revision(),
                "data": _data_record(config.data),
                "followed_the_command": [vars(d) for d in followed],
            },
        )
        write_json(run / CONFIG, to_record(config))
        write_json(run / "ds_config.json", ds.record)
    return from_rank_zero(number)


def _data_record(data: DataConfig) -> dict[str, Any]:
    """The datasets of an attempt, in the order in which they were named."""
    paths = [source.path for source in sources_of(data.path)] if data.path else []
    return {
        "train": {"paths": paths, "fingerprints": data.fingerprint.split(","), "weights_of_4096": list(data.weights)},
        "eval": {"path": data.eval_path, "fingerprint": data.eval_fingerprint},
    }


def _code_revision() -> str | None:
    """Commit of the source tree, with + where it has local changes; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        ask = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(ask, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def mark_finished(run: Path, record: dict[str, Any]) -> None:
    """Write FINISHED.json, the last file of a run. Rank 0 only."""
    write_json(run / FINISHED, record)
