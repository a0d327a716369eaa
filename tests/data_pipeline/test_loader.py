"""Laws of the stream: the same images, pixels and hashes on any ranks, workers and micro-batches, from any start."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.augment import eval_view
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import eval_stream, mixture_of, sample_hash, train_stream
from data_pipeline.manifest import Manifest
from data_pipeline.stream import MicroBatch, Stream
from tests.helpers.shards import numbered_images, numbered_labels, write_dataset
from vitscale.base.errors import HostFault, UsageError
from vitscale.base.files import xxh3_64

SIZES = [9, 4, 1, 17, 6, 12, 3, 8, 10, 5, 11]
IMAGES = sum(SIZES)  # 86, no multiple of the batch: steps run over the end of an epoch
GLOBAL_BATCH = 24
STEPS = 8  # 192 positions: over two epochs and into the third
AUGMENT = AugmentConfig(crop_area_min=0.3)
DATA = DataConfig(lanes=2, window=8)
GOLDEN_HASHES = [
    0x98D1923C90CF0338,
    0x7F49FA1FFE76EFEB,
    0x1B1E0F8C8A6A9BA3,
    0xBF44C1F5B2A9F851,
    0x72C2F6A4E926F685,
    0xFF09F9710A77C439,
    0x3B3AD335825A018F,
    0x9C41EE741723D7FC,
]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    written = write_dataset(tmp_path_factory.mktemp("set"), numbered_images(SIZES), numbered_labels(SIZES), [])
    # The real fingerprint follows the version of pyarrow, by the bytes of the indexes; the golden hashes must not.
    return dataclasses.replace(written, fingerprint="0" * 64)


def stream_of(
    manifest: Manifest, *, workers: int = 0, micro: int = 3, rank: int = 0, world: int = 1, position: int = 0
) -> Stream:
    return train_stream(
        [manifest],
        data=dataclasses.replace(DATA, workers=workers),
        augment=AUGMENT,
        image_size=8,
        seed=11,
        global_batch=GLOBAL_BATCH,
        micro_batch=micro,
        rank=rank,
        world=world,
        position=position,
    )


def steps_of(stream: Stream, *, micro_batches: int, steps: int = STEPS) -> list[list[MicroBatch]]:
    found = [[next(stream) for _ in range(micro_batches)] for _ in range(steps)]
    stream.close()
    return found


def world_steps(manifest: Manifest, *, world: int, workers: int = 0, micro: int = 3) -> list[list[MicroBatch]]:
    """The micro-batches of each step, ranks behind one another."""
    per_rank = GLOBAL_BATCH // (world * micro)
    ranks = [
        steps_of(stream_of(manifest, workers=workers, micro=micro, rank=rank, world=world), micro_batches=per_rank)
        for rank in range(world)
    ]
    return [[batch for rank in ranks for batch in rank[step]] for step in range(STEPS)]


def pixels_and_labels(step: list[MicroBatch]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([batch.images_BHWC for batch in step]), torch.cat([batch.labels_B for batch in step])


def assert_equal_steps(steps: list[list[MicroBatch]], expected: list[list[MicroBatch]]) -> None:
    for step, wanted in zip(steps, expected, strict=True):
        for found, reference in zip(pixels_and_labels(step), pixels_and_labels(wanted), strict=True):
            assert torch.equal(found, reference)


def hashes_of(steps: list[list[MicroBatch]]) -> list[int]:
    return [sum(batch.samples_hash for batch in step) % 2**64 for step in steps]


@pytest.fixture(scope="module")
def reference(manifest) -> list[list[MicroBatch]]:
    return world_steps(manifest, world=1)


def test_a_micro_batch_is_bytes_labels_and_a_hash(manifest, reference):
    batch = reference[0][0]
    assert batch.images_BHWC.shape == (3, 8, 8, 3) and batch.images_BHWC.dtype == torch.uint8
    assert batch.labels_BM.tolist() == [[label] for label in batch.labels_B.tolist()] and batch.bad_images == ()
    assert batch.labels_B.shape == (3,) and batch.labels_B.dtype == torch.int64
    assert batch.counted_B.tolist() == [True] * 3
    # The label is the image's number and the key is that number in nine digits.
    keys = [f"{label:09d}".encode() for label in batch.labels_B.tolist()]
    assert batch.samples_hash == sum(xxh3_64(manifest.fingerprint.encode() + key) for key in keys) % 2**64
    assert sample_hash("0" * 64, b"000000007") == 0x3BE834BC77CA643F  # docs/formats.md


def labels_by_position(manifest: Manifest, steps: list[list[MicroBatch]]) -> list[int]:
    """What was shown at positions 0, 1, 2, …: the slots of a step are its positions in another order."""
    mixture = mixture_of([manifest], data=DATA, seed=11)
    shown = {}
    for number, step in enumerate(steps):
        slots = mixture.slots_of_step(number * GLOBAL_BATCH, GLOBAL_BATCH).tolist()
        shown.update(zip(slots, pixels_and_labels(step)[1].tolist(), strict=True))
    return [shown[position] for position in range(len(steps) * GLOBAL_BATCH)]


def assert_each_image_once_per_epoch(manifest: Manifest, steps: list[list[MicroBatch]]) -> None:
    labels = labels_by_position(manifest, steps)
    for epoch in range(2):
        assert sorted(labels[epoch * IMAGES : (epoch + 1) * IMAGES]) == list(range(IMAGES))  # cover is the law here


def test_every_epoch_delivers_every_image_once(manifest, reference):
    assert_each_image_once_per_epoch(manifest, reference)
    labels = labels_by_position(manifest, reference)
    assert labels[:IMAGES] != labels[IMAGES : 2 * IMAGES]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
def test_hashes_pixels_and_labels_are_golden_on_every_world(manifest, reference, world):
    steps = world_steps(manifest, world=world, micro=1)
    assert hashes_of(steps) == GOLDEN_HASHES
    assert_equal_steps(steps, reference)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(manifest, reference, workers):
    steps = world_steps(manifest, world=2, workers=workers)
    assert hashes_of(steps) == GOLDEN_HASHES
    assert_equal_steps(steps, reference)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_no_world_and_no_workers_change_what_two_epochs_show(manifest, reference, workers, world):
    steps = world_steps(manifest, world=world, workers=workers, micro=1)
    assert_each_image_once_per_epoch(manifest, steps)
    assert hashes_of(steps) == GOLDEN_HASHES
    assert_equal_steps(steps, reference)


@pytest.mark.parametrize("micro", [1, 2, 4, 6, 12, 24])
def test_the_micro_batch_does_not_change_the_images_of_a_step(manifest, reference, micro):
    steps = world_steps(manifest, world=1, micro=micro)
    assert [len(step) for step in steps] == [GLOBAL_BATCH // micro] * STEPS
    assert_equal_steps(steps, reference)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_started_at_a_position_is_the_tail_of_the_stream_from_zero(manifest, workers):
    whole = steps_of(stream_of(manifest, rank=1, world=2), micro_batches=4)
    for skipped in (1, 3, 4, 7):  # step 3 runs over the end of the first epoch, step 7 of the second
        stream = stream_of(manifest, workers=workers, rank=1, world=2, position=skipped * GLOBAL_BATCH)
        tail = steps_of(stream, micro_batches=4, steps=STEPS - skipped)
        for found, wanted in zip(tail, whole[skipped:], strict=True):
            for batch, expected in zip(found, wanted, strict=True):
                assert torch.equal(batch.images_BHWC, expected.images_BHWC)
                assert torch.equal(batch.labels_B, expected.labels_B)
                assert batch.samples_hash == expected.samples_hash


def test_the_same_image_is_seen_differently_in_the_next_epoch(reference):
    views: dict[int, list[torch.Tensor]] = {}
    for step in reference:
        for image, label in zip(*pixels_and_labels(step), strict=True):
            views.setdefault(int(label), []).append(image)
    equal = [torch.equal(first, second) for first, second, *_ in views.values()]
    assert len(equal) == IMAGES and sum(equal) == 0


def test_a_batch_that_cannot_be_shared_is_refused_with_the_nearest_sizes(manifest):
    with pytest.raises(UsageError, match=r"24 is not a multiple of 2 ranks x 5 images = 10; nearest valid sizes: 20 and 30"):
        stream_of(manifest, micro=5, world=2)


def test_torch_and_numpy_generators_are_left_alone(manifest):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    steps_of(stream_of(manifest), micro_batches=8, steps=1)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]


# ---- evaluation -----------------------------------------------------------------------------------------------------


def evaluate(manifest: Manifest, *, rank: int, world: int, workers: int = 0, micro: int = 5) -> list[MicroBatch]:
    data = DataConfig(workers=workers)
    return list(eval_stream(manifest, data=data, augment=AUGMENT, image_size=8, micro_batch=micro, rank=rank, world=world))


@pytest.mark.parametrize("world", [1, 2, 3, 7, 100])
def test_evaluation_counts_each_image_once_in_order_with_equal_work_for_all_ranks(manifest, world):
    ranks = [evaluate(manifest, rank=rank, world=world) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {math.ceil(math.ceil(IMAGES / world) / 5)}
    assert {batch.images_BHWC.shape for rank in ranks for batch in rank} == {(5, 8, 8, 3)}
    labels = [batch.labels_B[batch.counted_B].tolist() for rank in ranks for batch in rank]
    assert [label for batch in labels for label in batch] == list(range(IMAGES))
    total = sum(batch.samples_hash for rank in ranks for batch in rank) % 2**64
    assert total == sum(sample_hash(manifest.fingerprint, f"{i:09d}".encode()) for i in range(IMAGES)) % 2**64


def test_evaluation_sees_the_central_view_and_black_padding(manifest):
    pictures = [picture for shard in numbered_images(SIZES) for picture in shard]
    batches = evaluate(manifest, rank=0, world=1, workers=1)
    shown = torch.cat([batch.images_BHWC for batch in batches])
    for picture, image in zip(pictures, shown, strict=False):
        assert torch.equal(image, torch.from_numpy(eval_view(picture, augment=AUGMENT, image_size=8).copy()))
    padding = torch.cat([~batch.counted_B for batch in batches])
    assert padding.sum() == 4 and (shown[padding] == 0).all()
    assert (torch.cat([batch.labels_B for batch in batches])[padding] == -1).all()


def test_images_without_a_label_keep_minus_one_and_count(tmp_path):
    manifest = write_dataset(tmp_path, numbered_images([3]), [[-1, -1, -1]], [])
    (batch,) = evaluate(manifest, rank=0, world=1, micro=3)
    assert batch.labels_B.tolist() == [-1, -1, -1] and batch.counted_B.all()


# ---- errors and processes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_arrives_as_itself_when_its_turn_comes(tmp_path, workers):
    manifest = write_dataset(tmp_path, numbered_images([20, 20]), numbered_labels([20, 20]), [])
    (good,) = steps_of(stream_of(manifest, workers=workers), micro_batches=8, steps=1)
    shards = [{label // 20 for label in batch.labels_B.tolist()} for batch in good]
    later = next(iter({0, 1} - shards[0]))  # the shard that the first micro-batch has nothing of
    turn = [later in met for met in shards].index(True)
    (tmp_path / f"train-{later:06d}.tar").unlink()
    with closing(stream_of(manifest, workers=workers)) as stream:
        for _ in range(turn):
            next(stream)
        with pytest.raises(HostFault) as caught:
            next(stream)
    assert f"expected to read the shard {tmp_path}/train-{later:06d}.tar" in str(caught.value)
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)


def test_several_labels_come_as_rows_filled_up_with_minus_one(tmp_path):
    labels = [[[4, 1, 7], [2], []], [[0, 9], [5, 6, 8]]]
    manifest = write_dataset(tmp_path, numbered_images([3, 2]), labels, [])
    assert manifest.most_labels == 3
    (batch,) = evaluate(manifest, rank=0, world=1, micro=6, workers=1)
    assert batch.labels_BM.tolist() == [[4, 1, 7], [2, -1, -1], [-1, -1, -1], [0, 9, -1], [5, 6, 8], [-1, -1, -1]]
    assert batch.labels_BM.dtype == torch.int64 and batch.labels_B.tolist() == [4, 2, -1, 0, 5, -1]


def test_workers_do_not_hear_the_signals_of_the_rank_and_close_ends_them(manifest):
    others = children_of(os.getpid())  # of other tests: the server that builds fork from
    with closing(stream_of(manifest, workers=2)) as stream:
        next(stream)
        workers = sorted(set(children_of(os.getpid())) - set(others))
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
            os.kill(worker, signal.SIGINT)
            os.kill(worker, signal.SIGUSR1)
        for _ in range(20):
            next(stream)
        assert children_of(os.getpid()) == sorted([*others, *workers])
        stream.close()
        assert children_of(os.getpid()) == others


def test_a_finished_evaluation_leaves_no_worker(manifest):
    others = children_of(os.getpid())
    evaluate(manifest, rank=0, world=1, workers=2)
    assert children_of(os.getpid()) == others


RANK = """
import sys, time
from pathlib import Path
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import train_stream
from data_pipeline.manifest import read_manifest

stream = train_stream([read_manifest(Path(sys.argv[1]))], data=DataConfig(workers=2), augment=AugmentConfig(), image_size=8,
                      seed=0, global_batch=8, micro_batch=8, rank=0, world=1, position=0)
next(stream)
print("ready", flush=True)
if sys.argv[2] == "wait":
    time.sleep(60)
raise RuntimeError("the rank fails without closing its stream")
"""


@pytest.mark.slow
def test_workers_do_not_survive_a_killed_rank(manifest):
    rank = subprocess.Popen([sys.executable, "-c", RANK, str(manifest.directory), "wait"], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
    workers = children_of(rank.pid)
    assert len(workers) == 2
    rank.kill()
    rank.wait()
    deadline_s = time.monotonic() + 2.0  # before torch's own watch, which looks every 5 s
    while any(is_running(worker) for worker in workers) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not any(is_running(worker) for worker in workers)


@pytest.mark.slow
def test_a_rank_that_fails_without_closing_its_stream_still_ends(manifest):
    command = [sys.executable, "-c", RANK, str(manifest.directory), "fail"]
    rank = subprocess.run(command, capture_output=True, text=True, timeout=40)
    assert rank.returncode == 1 and "RuntimeError: the rank fails" in rank.stderr


def children_of(pid: int) -> list[int]:
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return sorted(int(child) for children in lists for child in children)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
