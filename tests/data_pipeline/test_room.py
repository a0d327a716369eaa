"""Laws of the room a run needs: the number that is named suffices to its end, evaluations included; less is refused at once."""

import dataclasses
import re
import time
from contextlib import ExitStack, closing

import pytest

from data_pipeline import room
from data_pipeline.cache import CacheTooSmall
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import eval_stream, train_stream
from data_pipeline.manifest import Manifest
from data_pipeline.room import require_room
from tests.helpers.object_store import serve
from tests.helpers.shards import numbered_images, numbered_labels, write_dataset

STEPS, BATCH, MICRO = 24, 24, 6  # over an epoch of 414 images
TRAIN = 3 * [9, 4, 1, 17, 6, 12, 3, 8, 10, 5, 11, 16, 14, 2, 13, 7]
EVAL = [7, 21, 3, 9]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Datasets of which the records are local and the tars on a store: sizes are known to the byte."""
    base = tmp_path_factory.mktemp("sets")
    with serve() as server:
        manifests = []
        for name, sizes in (("train", TRAIN), ("eval", EVAL)):
            manifest = write_dataset(base / name, numbered_images(sizes), numbered_labels(sizes), [])
            for file in manifest.directory.glob("*.tar"):
                server.objects[f"{name}/{file.name}"] = file.read_bytes()
            manifests.append(dataclasses.replace(manifest, tars_at=f"{server.url}/{name}"))
        yield manifests


def data_of(cache, limit: int, *, workers: int = 0) -> DataConfig:
    return DataConfig(lanes=4, window=8, workers=workers, cache_dir=str(cache), cache_bytes=limit)


def check(sets: list[Manifest], data: DataConfig, *, world: int, steps: int = STEPS, with_evaluation: bool = True) -> None:
    require_room(
        sets[:1],
        sets[1] if with_evaluation else None,
        data=data,
        seed=11,
        global_batch=BATCH,
        micro_batch=MICRO,
        steps=steps,
        ranks=range(world),
        world=world,
    )


def named_number(sets: list[Manifest], cache, **options) -> int:
    with pytest.raises(CacheTooSmall, match=r"data\.cache_bytes .* set it to at least \d+") as caught:
        check(sets, data_of(cache, 1), **options)
    assert caught.value.exit_code == 2
    return int(re.findall(r"at least (\d+)", str(caught.value))[0])


def run_to_the_end(sets: list[Manifest], data: DataConfig, *, world: int) -> list[int]:
    """The hash of each step, with an evaluation behind every third; two ranks take turns."""
    common = {"data": data, "augment": AugmentConfig(), "image_size": 8, "micro_batch": MICRO, "world": world}
    hashes = []
    with ExitStack() as stack:
        streams = [
            stack.enter_context(closing(train_stream(sets[:1], seed=11, global_batch=BATCH, rank=rank, position=0, **common)))
            for rank in range(world)
        ]
        for step in range(STEPS):
            step_lists = BATCH // MICRO // world
            hashes.append(sum(next(stream).samples_hash for _ in range(step_lists) for stream in streams) % 2**64)
            if step % 3 == 2:
                evaluations = [stack.enter_context(closing(eval_stream(sets[1], rank=rank, **common))) for rank in range(world)]
                assert sum(int(batch.counted_B.sum()) for batches in zip(*evaluations, strict=True) for batch in batches) == 40
    return hashes


@pytest.mark.parametrize("world", [1, 2])
def test_the_named_number_suffices_to_the_end_and_less_is_refused(sets, tmp_path, world):
    named = named_number(sets, tmp_path / "cache", world=world)
    check(sets, data_of(tmp_path / "cache", named), world=world)
    with pytest.raises(CacheTooSmall):
        check(sets, data_of(tmp_path / "cache", named - 1), world=world)
    everything = sum(shard.tar_bytes for manifest in sets for shard in manifest.shards)
    assert named < everything
    on_disk = [dataclasses.replace(manifest, tars_at=str(manifest.directory)) for manifest in sets]
    expected = run_to_the_end(on_disk, data_of(tmp_path / "none", 1), world=world)
    assert run_to_the_end(sets, data_of(tmp_path / "cache", named), world=world) == expected


def test_what_would_end_the_run_at_its_first_evaluation_is_refused_before_its_first_step(sets, tmp_path):
    training = named_number(sets, tmp_path / "cache", world=1, with_evaluation=False)
    data = data_of(tmp_path / "cache", training)
    with pytest.raises(CacheTooSmall, match=r"of them during an evaluation"):
        check(sets, data, world=1)
    shard_of = [shard for shard, size in enumerate(EVAL) for _ in range(size)]
    lists = [set(shard_of[first : first + MICRO]) for first in range(0, len(shard_of), MICRO)]
    largest = max(sum(sets[1].shards[shard].tar_bytes for shard in shards) for shards in lists)
    assert named_number(sets, tmp_path / "cache", world=1) == training + largest


def test_more_workers_and_ranks_need_more_and_a_node_needs_its_own_share(sets, tmp_path):
    data = data_of(tmp_path / "cache", 1)

    def need(ranks: range, world: int, *, workers: int = 0, steps: int = STEPS) -> int:
        with pytest.raises(CacheTooSmall) as caught:
            require_room(
                sets[:1],
                None,
                data=dataclasses.replace(data, workers=workers),
                seed=11,
                global_batch=BATCH,
                micro_batch=MICRO,
                steps=steps,
                ranks=ranks,
                world=world,
            )
        return int(re.findall(r"at least (\d+)", str(caught.value))[0])

    assert need(range(1), 1) < need(range(1), 1, workers=2)
    assert need(range(2, 4), 4) < need(range(4), 4)
    assert need(range(1), 1) <= need(range(1), 1, steps=10 * STEPS)


def test_a_long_run_is_sampled_with_a_margin(sets, tmp_path, monkeypatch):
    exact = named_number(sets, tmp_path / "cache", world=1, steps=1000, with_evaluation=False)
    monkeypatch.setattr(room, "STEPS_LOOKED_AT", 300)
    sampled = named_number(sets, tmp_path / "cache", world=1, steps=1000, with_evaluation=False)
    assert exact <= sampled <= exact + exact // room.MARGIN
    begun_s = time.process_time()
    named_number(sets, tmp_path / "cache", world=1, steps=10**7)
    assert time.process_time() - begun_s < 2


def test_what_holds_everything_or_nothing_remote_is_not_asked(sets, tmp_path):
    everything = sum(shard.tar_bytes for manifest in sets for shard in manifest.shards)
    check(sets, data_of(tmp_path / "cache", everything), world=1)
    on_disk = [dataclasses.replace(manifest, tars_at=str(manifest.directory)) for manifest in sets]
    check(on_disk, data_of(tmp_path / "cache", 1), world=1)
