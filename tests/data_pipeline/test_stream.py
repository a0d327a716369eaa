"""Laws of the shared slots: the same bytes with and without them, none overwritten while a tensor over it lives."""

import gc
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch

from data_pipeline.deaths import WorkerDeath
from data_pipeline.stream import PREFETCH_PER_WORKER, SLOTS_BESIDE_PREFETCH, MicroBatch, Stream, blank_images
from vitscale.base.errors import BadDataError, TransientFault, VitscaleError

SHAPE = (3, 4, 4, 3)
BYTES = int(np.prod(SHAPE))


class Painted:
    """Image k of list n is painted 5 n + k. List 13 is an error."""

    batch_bytes = BYTES

    def __getitems__(self, numbers: list[int]) -> MicroBatch | VitscaleError:
        if numbers[0] == 13:
            return BadDataError("thirteen")
        images_BHWC = blank_images(SHAPE, used=len(numbers))
        for slot, number in enumerate(numbers):
            images_BHWC[slot] = (5 * number + slot) % 256
        return MicroBatch(
            images_BHWC=torch.from_numpy(images_BHWC),
            labels_B=torch.tensor(numbers),
            labels_BM=torch.tensor(numbers)[:, None],
            counted_B=torch.arange(3) < len(numbers),
            samples_hash=os.getpid(),
        )

    def close(self) -> None:
        pass


def lists(count: int, *, used: int = 3) -> Iterator[list[int]]:
    return ([number] * used for number in range(20, 20 + count))


def expected(number: int, *, used: int = 3) -> torch.Tensor:
    images_BHWC = torch.zeros(SHAPE, dtype=torch.uint8)
    for slot in range(used):
        images_BHWC[slot] = (5 * number + slot) % 256
    return images_BHWC


def is_shared(images_BHWC: torch.Tensor) -> bool:
    """Whether the memory is one of ours: torch's own shared memory is a file of its own."""
    return not images_BHWC.is_shared()


@pytest.mark.parametrize("used", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_images_arrive_whole_with_black_padding(workers, used):
    with closing(Stream(Painted(), lists(40, used=used), workers=workers)) as stream:
        for number, batch in enumerate(stream, start=20):
            assert torch.equal(batch.images_BHWC, expected(number, used=used))
            assert batch.labels_B.tolist() == [number] * used
            assert (batch.samples_hash == os.getpid()) == (workers == 0)
    assert number == 59


def test_a_loop_that_drops_its_micro_batches_always_gets_slots():
    with closing(Stream(Painted(), lists(60), workers=2)) as stream:
        pointers = set()
        for batch in stream:
            assert is_shared(batch.images_BHWC)
            pointers.add(batch.images_BHWC.data_ptr())
    assert len(pointers) <= 2 * PREFETCH_PER_WORKER + SLOTS_BESIDE_PREFETCH


def test_what_is_kept_is_never_overwritten_and_comes_another_way_when_slots_run_out():
    with closing(Stream(Painted(), lists(60), workers=2)) as stream:
        kept = list(stream)
    for number, batch in enumerate(kept, start=20):
        assert torch.equal(batch.images_BHWC, expected(number))
    in_slots = sum(is_shared(batch.images_BHWC) for batch in kept)
    assert in_slots == 2 * PREFETCH_PER_WORKER + SLOTS_BESIDE_PREFETCH < 60


def test_a_view_keeps_its_slot():
    with closing(Stream(Painted(), lists(80), workers=1)) as stream:
        row = next(stream).images_BHWC[1, 2].view(-1)
        for _ in range(70):
            next(stream)
        gc.collect()
        assert torch.equal(row, expected(20)[1, 2].view(-1))


def test_tensors_outlive_their_stream():
    stream = Stream(Painted(), lists(5), workers=1)
    batch = next(stream)
    stream.close()
    del stream
    gc.collect()
    assert torch.equal(batch.images_BHWC, expected(20))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_errors_arrive_in_order_and_return_their_slots(workers):
    numbers = [[number] for _ in range(20) for number in (1, 13, 2)]
    said = []
    with closing(Stream(Painted(), numbers, workers=workers)) as stream:
        for _ in numbers:
            try:
                batch = next(stream)
                said.append(int(batch.labels_B[0]))
                assert workers == 0 or is_shared(batch.images_BHWC)
            except BadDataError as error:
                said.append(str(error))
    assert said == [1, "thirteen", 2] * 20


@pytest.mark.parametrize("good", [0, 1, 7])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_lists_comes_out_of_the_stream_and_leaves_no_worker(workers, good):
    def refused() -> Iterator[list[int]]:
        yield from lists(good)
        raise BadDataError("no more")

    before = set(multiprocessing.active_children())
    stream = Stream(Painted(), refused(), workers=workers)  # the lists are asked for here already
    with closing(stream), pytest.raises(BadDataError, match="no more"):
        seen = [next(stream).labels_B[0].item() for _ in range(good + 1)]
        assert seen == []
    assert set(multiprocessing.active_children()) <= before


# ---- workers that die -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("after", [0, 17])
def test_a_killed_worker_costs_no_micro_batch_and_doubles_none(workers, after):
    deaths: list[WorkerDeath] = []
    with closing(Stream(Painted(), lists(30), workers=workers, on_death=deaths.append)) as stream:
        for number in range(20, 20 + after):
            assert next(stream).labels_B.tolist() == [number] * 3
        victim = stream.worker_pids()[-1]
        os.kill(victim, signal.SIGKILL)
        for number, batch in enumerate(stream, start=20 + after):
            assert batch.labels_B.tolist() == [number] * 3
            assert torch.equal(batch.images_BHWC, expected(number))
    assert number == 49
    assert deaths == [WorkerDeath(pid=victim, exit_code=-signal.SIGKILL)]


def test_what_was_handed_over_before_a_death_stays_as_it_was():
    with closing(Stream(Painted(), lists(30), workers=2, on_death=lambda death: None)) as stream:
        kept = [next(stream) for _ in range(5)]
        os.kill(stream.worker_pids()[0], signal.SIGKILL)
        kept += stream
    assert all(torch.equal(batch.images_BHWC, expected(number)) for number, batch in enumerate(kept, start=20))


def test_a_fourth_death_within_a_hundred_steps_ends_the_run():
    words = r"was killed by SIGKILL.*the 4th within 100 steps; expected at most 3"
    with (
        closing(Stream(Painted(), lists(10**6), workers=1, on_death=lambda death: None)) as stream,
        pytest.raises(TransientFault, match=words),
    ):
        for _ in range(50):
            os.kill(stream.worker_pids()[0], signal.SIGKILL)
            for _ in range(PREFETCH_PER_WORKER + 1):
                next(stream)


def test_deaths_far_apart_are_borne():
    deaths: list[WorkerDeath] = []
    with closing(Stream(Painted(), lists(10**6), workers=1, on_death=deaths.append)) as stream:
        for _ in range(4):
            os.kill(stream.worker_pids()[0], signal.SIGKILL)
            for _ in range(60):
                next(stream)
    assert len(deaths) == 4


def test_a_defect_inside_a_worker_is_no_death():
    class Broken(Painted):
        def __getitems__(self, numbers: list[int]) -> MicroBatch | VitscaleError:
            raise KeyError("a defect")

    with closing(Stream(Broken(), lists(3), workers=1)) as stream, pytest.raises(KeyError, match="a defect"):
        next(stream)


def test_workers_that_are_killed_leave_no_file_behind(tmp_path, monkeypatch):
    """Neither in the temporary directory nor in shared memory: nobody would ever clear it away."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delitem(multiprocessing.process.current_process()._config, "tempdir", raising=False)  # remembered there
    stream = Stream(Painted(), lists(60), workers=2)
    for _ in range(10):
        next(stream)
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    assert list(tmp_path.iterdir()) == []
    stream.close()
