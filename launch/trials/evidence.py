"""What a finished run shows, to be compared bit by bit with another: steps, scores, weights, and the account of its samples.

The account is taken from the order and the indexes of the datasets alone: which images belong to which step, by key. The
hash of a step in metrics.jsonl is the sum over the images that were delivered, so equal sums mean the same images.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.loader import mixture_of, sample_hash
from data_pipeline.manifest import Manifest, read_index
from launch.datasets import open_datasets
from launch.forked import cluster_of
from launch.trained import find_trained, load_weights_of
from vitscale.base.errors import EnvironmentFault
from vitscale.base.files import sha256_bytes
from vitscale.config import Config
from vitscale.training.metrics import read_lines
from vitscale.training.rundir import stored_config

NUMBERS = ("loss", "grad_norm", "lr", "samples_hash", "images_seen", "skipped")
"""What of a step has to be equal; the rest of its line are times."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """Images by what became of them. An image is counted each time its turn comes."""

    due: int
    lost: int
    twice: int


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Equal evidence is equal training."""

    steps: tuple[tuple[Any, ...], ...]
    scores: tuple[dict[str, Any], ...]
    weights_sha256: dict[str, str]
    """Of the last checkpoint, put together: the weights and each moving average."""
    account: Account


def evidence_of(run: Path) -> Evidence:
    """Read a finished run. Raises EnvironmentFault where something of it cannot be read."""
    config = stored_config(run)
    if config is None:
        raise EnvironmentFault(f"expected a finished run at {run}, found no configuration")
    lines = read_lines(run / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    _, _, record = find_trained(str(run))
    hashes = {"weights": weights_sha256(str(run), ema=None)}
    for decay in config.train.ema:
        hashes[f"ema {decay}"] = weights_sha256(str(run), ema=str(decay))
    return Evidence(
        steps=tuple(tuple(line[name] for name in ("step", *NUMBERS)) for line in steps),
        scores=tuple(line for line in lines if "eval" in line),
        weights_sha256=hashes,
        account=account_of(run, config, steps, position=record["state"]["position"]),
    )


def weights_sha256(run: str, *, ema: str | None) -> str:
    """One hash over all names and numbers."""
    tensors = load_weights_of(run, ema=ema).tensors
    parts = [name.encode() + tensors[name].detach().contiguous().numpy().tobytes() for name in sorted(tensors)]
    return sha256_bytes(b"\0".join(parts))


def account_of(run: Path, config: Config, steps: Sequence[dict[str, Any]], *, position: int) -> Account:
    """Which images of the steps were not delivered, and which were counted twice."""
    _, manifests, _ = open_datasets(config, run=run, cluster=cluster_of(0, 1, 0))
    batch = config.optim.global_batch
    total = position // batch
    times = Counter(line["step"] for line in steps)
    found = {line["step"]: line["samples_hash"] for line in steps}
    expected = expected_hashes(config, manifests, total)
    lost = sum(batch for step in range(1, total + 1) if found.get(step) != expected[step - 1])
    twice = sum(batch * (count - 1) for count in times.values()) + sum(batch for step in times if step > total)
    return Account(due=total * batch, lost=lost, twice=twice)


def expected_hashes(config: Config, manifests: Sequence[Manifest], total_steps: int) -> list[str]:
    """The samples_hash of each step, from the order and the keys in the indexes: no image is read."""
    batch = config.optim.global_batch
    mixture = mixture_of(manifests, data=config.data, seed=config.train.seed)
    known: dict[tuple[int, int], np.ndarray] = {}

    def hashes_of(source: int, shard: int) -> np.ndarray:
        if (source, shard) not in known:
            manifest = manifests[source]
            keys = read_index(manifest, shard).keys
            known[source, shard] = np.array([sample_hash(manifest.fingerprint, bytes(key)) for key in keys], np.uint64)
        return known[source, shard]

    sums = []
    for step in range(total_steps):
        source, samples = mixture.samples_at(np.arange(step * batch, (step + 1) * batch))
        places = zip(source.tolist(), samples.shard.tolist(), samples.index.tolist(), strict=True)
        total = sum(int(hashes_of(source, shard)[row]) for source, shard, row in places)
        sums.append(f"{total % 2**64:016x}")
    return sums


def differences(reference: Evidence, found: Evidence) -> list[str]:
    """What differs, in words; nothing when all is equal."""
    words = []
    for number, (expected, got) in enumerate(zip(reference.steps, found.steps, strict=False), start=1):
        if expected != got:
            names = [name for name, a, b in zip(("step", *NUMBERS), expected, got, strict=True) if a != b]
            words.append(f"from line {number} on, first in {', '.join(names)}: {got} instead of {expected}")
            break
    if len(reference.steps) != len(found.steps):
        words.append(f"{len(found.steps)} lines of steps instead of {len(reference.steps)}")
    if reference.scores != found.scores:
        words.append("scores of the evaluations")
    words += [
        f"{name} of the last checkpoint"
        for name, sha in reference.weights_sha256.items()
        if found.weights_sha256.get(name) != sha
    ]
    if found.account.lost or found.account.twice:
        words.append(f"images: {found.account.lost} lost, {found.account.twice} twice")
    return words
