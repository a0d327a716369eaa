"""A bad image is replaced by another one of its window and named, alike on all worlds; what is no property of an image
ends the run, and an evaluation replaces nothing."""

import dataclasses
from contextlib import closing
from pathlib import Path

import pytest
import torch

from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import eval_stream, mixture_of, sample_hash, train_stream
from data_pipeline.manifest import Manifest, read_index, read_manifest
from data_pipeline.stream import BadSample, MicroBatch
from tests.helpers.shards import numbered_images, numbered_labels, write_dataset
from vitscale.base.errors import BadDataError, HostFault

SIZES = [9, 4, 1, 17, 6, 12, 3, 8]
IMAGES = sum(SIZES)
GLOBAL_BATCH = 12
STEPS = 10  # two epochs
AUGMENT = AugmentConfig(crop_area_min=0.3)
DATA = DataConfig(lanes=2, window=8)


def steps_of(
    *manifests: Manifest, world: int = 1, workers: int = 0, micro: int = 2, start: int = 0, data: DataConfig = DATA
) -> list[list[MicroBatch]]:
    """The micro-batches of each step from step `start` on, ranks behind one another."""
    ranks = []
    for rank in range(world):
        stream = train_stream(
            manifests,
            data=dataclasses.replace(data, workers=workers),
            augment=AUGMENT,
            image_size=8,
            seed=11,
            global_batch=GLOBAL_BATCH,
            micro_batch=micro,
            rank=rank,
            world=world,
            position=start * GLOBAL_BATCH,
        )
        with closing(stream):
            per_rank = GLOBAL_BATCH // (world * micro)
            ranks.append([[next(stream) for _ in range(per_rank)] for _ in range(STEPS - start)])
    return [[batch for rank in ranks for batch in rank[step]] for step in range(STEPS - start)]


def labels_of(step: list[MicroBatch]) -> list[int]:
    return [label for batch in step for label in batch.labels_B.tolist()]


def told(steps: list[list[MicroBatch]]) -> list[BadSample]:
    return [bad for step in steps for batch in step for bad in batch.bad_images]


def shard_of(number: int) -> tuple[int, int]:
    """(shard, row) of the image with this number."""
    for shard, size in enumerate(SIZES):
        if number < size:
            return shard, number
        number -= size
    raise AssertionError


def dataset(directory: Path, *, undecodable: tuple[int, ...] = ()) -> Manifest:
    pictures: list[list] = [list(shard) for shard in numbered_images(SIZES)]
    for number in undecodable:
        shard, row = shard_of(number)
        pictures[shard][row] = b"no picture"
    return write_dataset(directory, pictures, numbered_labels(SIZES), [])


def flip(manifest: Manifest, number: int) -> None:
    """Change one byte of the stored image."""
    shard, row = shard_of(number)
    path = manifest.directory / f"{manifest.shards[shard].name}.tar"
    content = bytearray(path.read_bytes())
    content[int(read_index(manifest, shard).image_offset[row]) + 9] ^= 0x10
    path.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[list[MicroBatch]]:
    return steps_of(dataset(tmp_path_factory.mktemp("whole")))


BAD = (5, 30, 31, 58)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Manifest:
    """Two images with flipped bytes, two that are none, side by side in one shard."""
    manifest = dataset(tmp_path_factory.mktemp("damaged"), undecodable=(31, 58))
    flip(manifest, 5)
    flip(manifest, 30)
    return manifest


def test_only_the_bad_positions_change_and_each_is_named_with_its_stand_in(whole, damaged):
    steps = steps_of(damaged)
    mixture = mixture_of([damaged], data=DATA, seed=11)
    named = {bad.position: bad for bad in told(steps)}
    assert sorted(int(bad.key) for bad in named.values()) == sorted(2 * BAD)  # once in each of two epochs
    for number, (step, expected) in enumerate(zip(steps, whole, strict=True)):
        slots = mixture.slots_of_step(number * GLOBAL_BATCH, GLOBAL_BATCH)
        shown = [image for batch in step for image in batch.images_BHWC]
        wanted = [image for batch in expected for image in batch.images_BHWC]
        keys = []
        for slot, position in enumerate(slots.tolist()):
            label = labels_of(expected)[slot]
            if label not in BAD:
                assert torch.equal(shown[slot], wanted[slot]) and labels_of(step)[slot] == label
                assert position not in named
                keys.append(label)
                continue
            tries = [sum(SIZES[:shard]) + row for shard, row in mixture.stand_ins(position, 64)]
            stand_in = next(candidate for candidate in tries if candidate not in BAD)
            bad = named[position]
            assert labels_of(step)[slot] == int(bad.stand_in_key) == stand_in
            assert bad.stand_in_shard == f"train-{shard_of(stand_in)[0]:06d}"
            assert (int(bad.key), bad.shard) == (label, f"train-{shard_of(label)[0]:06d}")
            assert bad.dataset == str(damaged.directory)
            assert bad.reason == ("wrong-hash" if label in (5, 30) else "unknown-format") and bad.detail
            keys.append(stand_in)
        expected_hash = sum(sample_hash(damaged.fingerprint, f"{key:09d}".encode()) for key in keys) % 2**64
        assert sum(batch.samples_hash for batch in step) % 2**64 == expected_hash


@pytest.mark.parametrize(("world", "workers", "micro"), [(1, 1, 3), (2, 0, 1), (3, 1, 2), (4, 0, 3), (6, 0, 2)])
def test_every_world_shows_the_same_stand_ins(damaged, world, workers, micro):
    expected, found = steps_of(damaged), steps_of(damaged, world=world, workers=workers, micro=micro)
    assert told(found) == told(expected)
    for step, wanted in zip(found, expected, strict=True):
        assert labels_of(step) == labels_of(wanted)
        assert torch.equal(*(torch.cat([batch.images_BHWC for batch in batches]) for batches in (step, wanted)))


def test_a_resumed_stream_shows_the_same_stand_ins(damaged):
    expected = steps_of(damaged)
    assert told(steps_of(damaged, start=3)) == told(expected[3:])


def test_a_short_tar_names_what_is_missing_and_the_rest_is_shown(tmp_path, whole):
    manifest = dataset(tmp_path)
    path = tmp_path / "train-000003.tar"
    index = read_index(manifest, 3)
    path.write_bytes(path.read_bytes()[: int(index.image_offset[11]) + 20])
    steps = steps_of(manifest)
    assert sorted({(bad.shard, int(bad.key), bad.reason) for bad in told(steps)}) == [
        ("train-000003", number, "short-read") for number in range(14 + 11, 14 + 17)
    ]
    assert "expected" in told(steps)[0].detail and "the file ends after" in told(steps)[0].detail


def test_a_stand_in_comes_from_the_same_dataset_of_a_mixture(tmp_path, damaged):
    other = write_dataset(tmp_path, numbered_images([20, 20], side=9), [[100] * 20] * 2, [])
    steps = steps_of(other, damaged, data=dataclasses.replace(DATA, weights=(1024, 3072)))
    assert told(steps) and {bad.dataset for bad in told(steps)} == {str(damaged.directory)}
    assert sum(labels_of(step).count(100) for step in steps) == STEPS * GLOBAL_BATCH // 4
    assert told(steps_of(other, damaged, world=3, data=dataclasses.replace(DATA, weights=(1024, 3072)))) == told(steps)


def test_a_window_without_a_good_image_ends_the_run(tmp_path):
    manifest = write_dataset(tmp_path, [[b"no picture"] * 24], [[0] * 24], [])
    with pytest.raises(BadDataError, match=r"unknown-format.*so are all \d+ images of its window.*verify") as caught:
        steps_of(manifest)
    assert caught.value.exit_code == 78


@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_a_missing_file_is_no_bad_image(tmp_path, ending):
    manifest = dataset(tmp_path)
    (tmp_path / f"train-000003.{ending}").unlink()
    with pytest.raises(HostFault, match=f"train-000003.{ending}") as caught:
        steps_of(manifest)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("at", [-9, 40, 700, 1500])
def test_a_damaged_index_is_no_bad_image(tmp_path, at):
    """Whatever the flipped bit would have made of keys, labels and offsets: the run ends, and says which file it is."""
    manifest = dataset(tmp_path)
    path = tmp_path / "train-000003.parquet"
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)
    with pytest.raises(HostFault, match=r"train-000003\.parquet does not have the sha256 of manifest\.json") as caught:
        steps_of(manifest)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(("number", "reason"), [(30, "wrong-hash"), (31, "unknown-format")])
def test_an_evaluation_stops_at_a_bad_image(tmp_path, number, reason):
    manifest = dataset(tmp_path, undecodable=(31,) if number == 31 else ())
    if number == 30:
        flip(manifest, 30)
    stream = eval_stream(read_manifest(tmp_path), data=DATA, augment=AUGMENT, image_size=8, micro_batch=5, rank=0, world=1)
    said = rf"image 0000000{number} of shard train-00000[34] in {tmp_path} is bad \({reason}: .*evaluation counts every image"
    with closing(stream), pytest.raises(BadDataError, match=said):
        list(stream)
