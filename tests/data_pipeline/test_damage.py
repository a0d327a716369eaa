"""However a shard is damaged, no image is lost in silence: shown with its right pixels + named as lost = rows of the index.

`pytest -s -m slow tests/data_pipeline/test_damage.py` prints what webdataset, reading the same files, loses without a word.
"""

import random
import warnings
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import train_stream
from data_pipeline.manifest import Manifest, read_index
from tests.helpers.shards import numbered_images, numbered_labels, write_dataset

ROWS = 10
WHOLE = 4  # images of a second shard that stays whole, so that a window always holds a stand-in
SIDE = 8
BLOCK = 512


def flip(tar: bytearray, chance: random.Random) -> None:
    tar[chance.randrange(len(tar))] ^= 1 << chance.randrange(8)


def flip_many(tar: bytearray, chance: random.Random) -> None:
    for _ in range(chance.randint(2, 40)):
        flip(tar, chance)


def cut(tar: bytearray, chance: random.Random) -> None:
    del tar[chance.randrange(len(tar)) :]


def cut_at_a_block(tar: bytearray, chance: random.Random) -> None:
    del tar[BLOCK * chance.randrange(len(tar) // BLOCK) :]


def zero_a_page(tar: bytearray, chance: random.Random) -> None:
    start = 4096 * chance.randrange(len(tar) // 4096)
    tar[start : start + 4096] = bytes(4096)


def zero_a_header(tar: bytearray, chance: random.Random) -> None:
    start = chance.choice([at for at in range(0, len(tar), BLOCK) if tar[at + 257 : at + 262] == b"ustar"])
    tar[start : start + BLOCK] = bytes(BLOCK)


def swap_blocks(tar: bytearray, chance: random.Random) -> None:
    a, b = (BLOCK * at for at in chance.sample(range(len(tar) // BLOCK), 2))
    tar[a : a + BLOCK], tar[b : b + BLOCK] = tar[b : b + BLOCK], tar[a : a + BLOCK]


def lose_a_block(tar: bytearray, chance: random.Random) -> None:
    """Everything behind it moves."""
    start = BLOCK * chance.randrange(len(tar) // BLOCK)
    del tar[start : start + BLOCK]


MUTATIONS = [flip, flip_many, cut, cut_at_a_block, zero_a_page, zero_a_header, swap_blocks, lose_a_block]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Manifest, list[np.ndarray]]:
    sizes = [ROWS, WHOLE]
    images = numbered_images(sizes, side=SIDE)
    manifest = write_dataset(tmp_path_factory.mktemp("set"), images, numbered_labels(sizes), [])
    return manifest, [image for shard in images for image in shard]


def one_epoch(manifest: Manifest, images: list[np.ndarray]) -> tuple[int, int]:
    """(positions that showed their own image, positions named as lost) of one epoch, every pixel compared."""
    # The whole picture, as it is: what is shown can be compared with what was stored.
    as_it_is = AugmentConfig(crop_area_min=1.0, crop_ratio_max=1.0, flip=0.0)
    stream = train_stream(
        [manifest],
        data=DataConfig(workers=0),
        augment=as_it_is,
        image_size=SIDE,
        seed=3,
        global_batch=manifest.images,
        micro_batch=manifest.images,
        rank=0,
        world=1,
        position=0,
    )
    with closing(stream):
        batch = next(stream)
    labels = batch.labels_B.tolist()
    for label, shown in zip(labels, batch.images_BHWC.numpy(), strict=True):
        assert np.array_equal(shown, images[label]), "an image with other pixels was shown"
    lost = [int(bad.key) for bad in batch.bad_images]
    stand_ins = [int(bad.stand_in_key) for bad in batch.bad_images]
    # Take the stand-ins out: what is left are images at their own positions, each once.
    own = Counter(labels) - Counter(stand_ins)
    assert own.total() == len(labels) - len(stand_ins) and max(own.values()) == 1
    assert sorted([*own, *lost]) == list(range(manifest.images)), "shown + named as lost is not the index"
    return own.total(), len(lost)


def webdataset_reads(path: Path, contents: list[bytes]) -> str:
    """What webdataset makes of a shard: `whole`, `raised`, `lost in silence` or `other bytes in silence`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    except Exception:
        return "raised"
    found = {sample["__key__"]: sample.get("png") for sample in samples}
    if any(found.get(f"{number:09d}") is None for number in range(len(contents))):
        return "lost in silence"
    is_right = all(found[f"{number:09d}"] == content for number, content in enumerate(contents))
    return "whole" if is_right else "other bytes in silence"


def account(whole: tuple[Manifest, list[np.ndarray]], *, copies: int) -> tuple[Counter, Counter, Counter]:
    """(copies with so many images lost and named, kinds of damage that lost any, what webdataset did)."""
    manifest, images = whole
    path = manifest.directory / f"{manifest.shards[0].name}.tar"
    original = path.read_bytes()
    index = read_index(manifest, 0)
    contents = [original[at : at + size] for at, size in zip(index.image_offset, index.image_size, strict=True)]
    chance = random.Random(20261123)
    lost_by_copy, kinds, theirs = Counter(), Counter(), Counter()
    try:
        for number in range(copies):
            tar = bytearray(original)
            mutate = MUTATIONS[number % len(MUTATIONS)]
            mutate(tar, chance)
            path.write_bytes(tar)
            shown, lost = one_epoch(manifest, images)
            assert shown + lost == manifest.images
            lost_by_copy[lost] += 1
            kinds[mutate.__name__] += lost > 0
            theirs[webdataset_reads(path, contents)] += 1
    finally:
        path.write_bytes(original)
    return lost_by_copy, kinds, theirs


def test_a_whole_shard_loses_nothing(whole):
    assert one_epoch(*whole) == (ROWS + WHOLE, 0)


def test_each_kind_of_damage_is_accounted_for(whole):
    _, kinds, _ = account(whole, copies=10 * len(MUTATIONS))
    assert set(kinds) == {mutate.__name__ for mutate in MUTATIONS}
    assert all(kinds[mutate.__name__] > 0 for mutate in MUTATIONS if mutate is not zero_a_header)
    assert kinds["zero_a_header"] == 0  # the index knows where the bytes are without it


@pytest.mark.slow
def test_two_thousand_damaged_copies_lose_nothing_in_silence(whole):
    lost_by_copy, kinds, theirs = account(whole, copies=2000)
    assert lost_by_copy.total() == 2000
    print(f"\nours: copies by images lost and named: {dict(sorted(lost_by_copy.items()))}; by damage: {dict(kinds)}")
    print(f"webdataset {webdataset.__version__}: {dict(theirs)}")
