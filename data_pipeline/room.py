"""What the ranks of a node need of the cache at once, training and evaluating, found before the first step.

The order is known, so the need of any step is. Of a long run some steps are looked at, those where epochs end among them,
because all lanes turn to other shards there; the need in between may be higher by MARGIN.

span  steps that may be due at one time on any rank of the node: from the oldest list in work to the newest that is due
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_pipeline.cache import CacheTooSmall
from data_pipeline.config import DataConfig, bytes_of
from data_pipeline.entries import has_remote_index, most_bytes
from data_pipeline.loader import mixture_of
from data_pipeline.manifest import MANIFEST, Manifest
from data_pipeline.mixture import SLOTS, Mixture, rank_slots
from data_pipeline.order import locate
from data_pipeline.remote import outstanding_lists
from data_pipeline.store import is_url

STEPS_LOOKED_AT = 2000
"""Longer runs are sampled: a few seconds at the start."""
MARGIN = 8
"""One part in so many on top of the need that samples show."""


def require_room(
    train_data: Sequence[Manifest],
    eval_data: Manifest | None,
    *,
    data: DataConfig,
    seed: int,
    global_batch: int,
    micro_batch: int,
    steps: int,
    ranks: range,
    world: int,
) -> None:
    """Raise CacheTooSmall unless `data.cache_bytes` holds what the `ranks` of this node need at once in all `steps`."""
    limit = bytes_of("data.cache_bytes", data.cache_bytes)
    datasets = {manifest.fingerprint: manifest for manifest in (*train_data, *([eval_data] if eval_data else []))}
    sizes = {name: _sizes_of(manifest, data.cache_path) for name, manifest in datasets.items()}
    everything = int(sum(size.sum() for size in sizes.values()))
    if not everything:
        return
    manifests = sum(path.stat().st_size for path in data.cache_path.glob(f"*/{MANIFEST}"))
    if everything + manifests <= limit:
        return
    training = evaluation = 0
    if any(sizes[manifest.fingerprint].any() for manifest in train_data):
        training = _need_of_training(
            mixture_of(train_data, data=data, seed=seed),
            [sizes[manifest.fingerprint] for manifest in train_data],
            global_batch=global_batch,
            step_lists=global_batch // (world * micro_batch),
            outstanding=outstanding_lists(data.workers),
            steps=steps,
            ranks=ranks,
            world=world,
        )
    if eval_data is not None:
        evaluation = _need_of_evaluation(
            eval_data,
            sizes[eval_data.fingerprint],
            micro_batch=micro_batch,
            outstanding=outstanding_lists(data.workers),
            ranks=ranks,
            world=world,
        )
    need = min(training + evaluation, everything) + manifests
    if need > limit:
        during = f", {evaluation:,} of them during an evaluation" if training and evaluation else ""
        raise CacheTooSmall(
            f"expected data.cache_bytes to hold what the ranks of this node need at once, got {limit:,} bytes for {need:,}"
            f"{during}; set it to at least {need}, better twice that, so that shards come before they are needed"
        )


def _sizes_of(manifest: Manifest, cache: Path) -> np.ndarray:
    """Bytes that each shard takes in the cache, never too few; 0: it is on a disk."""
    with_index = has_remote_index(manifest, cache)
    sizes = [most_bytes(shard, with_index=with_index) if is_url(manifest.tars_at) else 0 for shard in manifest.shards]
    return np.array(sizes, dtype=np.int64)


def _need_of_training(
    mixture: Mixture,
    sizes: Sequence[np.ndarray],
    *,
    global_batch: int,
    step_lists: int,
    outstanding: int,
    steps: int,
    ranks: range,
    world: int,
) -> int:
    all_sizes = np.concatenate(sizes)
    first_of_source = np.cumsum([0, *map(len, sizes)])
    in_work = -(-(outstanding - 1) // step_lists)
    # A rank that has left the exchange of one step may be at its next one while another still ends the first.
    before, behind = in_work, in_work + 1 + (len(ranks) > 1)
    span = before + behind + 1

    @lru_cache(maxsize=4 * span)
    def shards_at(step: int) -> np.ndarray:
        slots = mixture.slots_of_step(step * global_batch, global_batch)
        mine = np.concatenate([rank_slots(slots, rank=rank, world=world) for rank in ranks])
        return np.array([first_of_source[source] + shard for source, shard in mixture.shards_near(mine)], dtype=np.int64)

    most, is_sampled = 0, steps > STEPS_LOOKED_AT
    looked_at = range(steps)
    for step in _samples(mixture, steps, global_batch=global_batch, count=STEPS_LOOKED_AT // span) if is_sampled else looked_at:
        due = [shards_at(other) for other in range(max(0, step - before), step + behind + 1)]
        most = max(most, int(all_sizes[np.unique(np.concatenate(due))].sum()))
    return most + most // MARGIN if is_sampled else most


def _samples(mixture: Mixture, steps: int, *, global_batch: int, count: int) -> Iterator[int]:
    """Rising numbers of steps: evenly spread, and around the ends of epochs; about `count`."""
    chosen = set(np.linspace(0, steps - 1, max(8, count // 2)).astype(int).tolist())
    for order, weight in zip(mixture.orders, mixture.weights, strict=True):
        epoch_steps = order.images * SLOTS / weight / global_batch
        ends = int(steps / epoch_steps)
        for epoch in np.unique(np.linspace(1, ends, min(ends, max(2, count // 4 // len(mixture.orders)))).astype(int)).tolist():
            step = int(epoch * epoch_steps)
            chosen |= {max(0, step - 1), min(step, steps - 1)}
    return iter(sorted(chosen))


def _need_of_evaluation(
    manifest: Manifest, sizes: np.ndarray, *, micro_batch: int, outstanding: int, ranks: range, world: int
) -> int:
    """Most bytes for `outstanding` lists in a row of each rank, wherever the others are."""
    ends = np.cumsum([shard.images for shard in manifest.shards])
    bytes_before = np.cumsum([0, *sizes])
    need = 0
    for rank in ranks:
        begin, end = rank * manifest.images // world, (rank + 1) * manifest.images // world
        firsts = np.arange(begin, end, micro_batch)
        lasts = np.minimum(firsts + outstanding * micro_batch, end) - 1
        first_shard, last_shard = locate(ends, firsts)[0], locate(ends, lasts)[0]
        need += int((bytes_before[last_shard + 1] - bytes_before[first_shard]).max(initial=0))
    return need
