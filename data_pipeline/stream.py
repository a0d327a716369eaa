"""Lists of numbers to finished micro-batches, by data workers that read ahead: a torch DataLoader and its processes.

The DataLoader hands micro-batches over in the order of the lists, so the number of workers changes nothing.

slot  shared memory for the images of one micro-batch, made before the workers are forked and used again: a worker
      decodes straight into it and sends the rest of the micro-batch. Fresh shared memory for each would cost its first
      touch in two processes, and fill /dev/shm, which is small in containers; a slot has no name and no limit but the
      memory. It is free again when the rank has dropped the last tensor over it. A rank that keeps its micro-batches
      runs out of slots; what follows travels as torch sends tensors.
parcel  the rest of a micro-batch on its way: arrays, copied through a pipe. A tensor would travel as a file descriptor, for
      which its worker listens at a socket in a temporary directory, and a kill -9 would leave that directory behind.
death of a worker, as by the out-of-memory killer: what it was at is a pure function of its list, and the lists that were
      dealt and not yet handed over are remembered. All workers are started anew with those: none is lost, none comes twice.

B images of a micro-batch (BHWC: height and width image_size, 3 channels, uint8; normalised on the device)
M labels of the image that has most, at least 1
"""

import atexit
import ctypes
import dataclasses
import math
import mmap
import multiprocessing.connection
import os
import signal
import sys
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from data_pipeline.deaths import HEALS_WITHIN_STEPS, Deaths, WorkerDeath, say_death
from vitscale.base.errors import VitscaleError
from vitscale.base.faults import fault_point

PREFETCH_PER_WORKER = 2
"""Micro-batches each worker keeps ready."""

SLOTS_BESIDE_PREFETCH = 3
"""Slots for the micro-batch just handed over, the one before it that a loop still names, and one on its way to the GPU."""

LOOK_EVERY_S = 1.0
"""How often a rank that waits for a micro-batch looks whether its workers live."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """An image that could not be shown, and what stands in its place."""

    position: int
    """In the order of the run."""
    dataset: str
    """Directory or URL of its tars."""
    shard: str
    key: str
    reason: str
    """wrong-hash, short-read, or why it cannot be decoded (decode.py)."""
    detail: str
    stand_in_shard: str
    stand_in_key: str


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one rank feeds forward at once."""

    images_BHWC: torch.Tensor
    """uint8, RGB."""
    labels_B: torch.Tensor
    """int64, the first label; -1: no label."""
    labels_BM: torch.Tensor
    """int64, all labels; filled up with -1."""
    counted_B: torch.Tensor
    """bool; False: padding of an evaluation, to be left out of every sum."""
    samples_hash: int
    """Sum modulo 2^64 over the counted images of `sample_hash`: of what was shown, stand-ins included."""
    bad_images: tuple[BadSample, ...] = ()
    """Every image of these positions that was bad."""


class MicroBatches(Protocol):
    """What the workers of a stream compute: a pure function of a list of numbers. Pickles without open files."""

    batch_bytes: int
    """Bytes of the images of one micro-batch."""

    def __getitems__(self, numbers: list[int]) -> MicroBatch | VitscaleError:
        """Its images lie in `blank_images`."""
        ...

    def close(self) -> None:
        """Close the files of this process."""
        ...


def blank_images(shape: tuple[int, int, int, int], *, used: int) -> np.ndarray:
    """BHWC memory for a micro-batch: the first `used` images hold anything, the others are black."""
    size = math.prod(shape)
    images = _slot_here[:size].reshape(shape) if len(_slot_here) >= size else np.empty(shape, np.uint8)
    images[used:] = 0
    return images


_slot_here = np.empty(0, np.uint8)  # of the micro-batch this worker is at; empty in the rank itself


class Stream:
    """Iterator over the micro-batches of one rank. Its workers start with it and read ahead.

    Make it in the main thread: on Linux the workers end with the thread that made them.
    """

    def __init__(
        self,
        dataset: MicroBatches,
        lists: Iterable[list[int]],
        *,
        workers: int,
        step_lists: int = 1,
        on_death: Callable[[WorkerDeath], None] = say_death,
    ) -> None:
        """`step_lists`: micro-batches of a step. `on_death` is told of a worker that died and was replaced."""
        self._dataset = dataset
        self._lists = lists
        self._workers = workers
        self._deaths = Deaths(within=HEALS_WITHIN_STEPS * step_lists)
        self._on_death = on_death
        self._refused: list[VitscaleError] = []
        self._source = _heard_again(lists, signal.pthread_sigmask(signal.SIG_BLOCK, ()), self._refused)
        self._outstanding: deque[list[int]] = deque()
        self._handed_over = 0
        self._closed = False
        self._start_workers()
        _open_streams.add(self)

    def _start_workers(self) -> None:
        """Begin, or begin again, with what was dealt and not handed over."""
        workers, batch_bytes = self._workers, self._dataset.batch_bytes
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        # Memory of its own at every start: a worker killed in the middle may have left half an image in the old one.
        slots = PREFETCH_PER_WORKER * workers + SLOTS_BESIDE_PREFETCH if workers and batch_bytes else 0
        self._slots = _Slots(slots, size=batch_bytes)
        loader = DataLoader(
            cast(Any, _InSlots(self._dataset, self._slots)),
            batch_sampler=cast(Any, self._slots.dealt(self._remembered())),
            num_workers=workers,
            timeout=LOOK_EVERY_S if workers else 0,
            collate_fn=_as_it_is,
            prefetch_factor=PREFETCH_PER_WORKER if workers else None,
            worker_init_fn=partial(_begin_worker, rank_pid=os.getpid()),
            # Forked workers start in milliseconds and end with their rank; the default differs between Python versions.
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),  # torch draws a seed for the workers: not from the global generator
        )
        # Workers are born deaf to the signals by which a scheduler speaks to the rank: the rank decides what ends when.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
        try:
            self._iterator = cast(Any, iter(loader))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        if workers:
            # Else torch would raise from a handler of SIGCHLD, wherever the rank stands; here it asks when it waits.
            _remove_worker_pids(id(self._iterator))
            self._iterator._worker_pids_set = False

    def _remembered(self) -> Iterator[list[int]]:
        yield from list(self._outstanding)
        for numbers in self._source:
            self._outstanding.append(numbers)
            yield numbers

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> MicroBatch:
        """The next micro-batch. Raises what its worker met, or the lists, as itself."""
        if self._refused:
            raise self._refused[0]
        try:
            slot, batch = self._next_of_workers()
        except StopIteration:
            if self._refused:
                raise self._refused[0] from None
            self.close()
            raise
        self._outstanding.popleft()
        self._handed_over += 1
        if isinstance(batch, VitscaleError):
            self._slots.free(slot)
            raise batch
        return batch if slot is None else self._slots.joined(slot, batch)

    def _next_of_workers(self) -> tuple[int | None, MicroBatch | VitscaleError]:
        while True:
            try:
                return next(self._iterator)
            except StopIteration:
                raise
            except Exception as error:
                death = self._death()
                if death is not None:
                    self._heal(death)
                elif "DataLoader timed out" not in str(error):  # that is: still waiting, all alive
                    raise

    def _death(self) -> WorkerDeath | None:
        """A worker that is dead, or is just dying, if there is one."""
        processes = self._iterator._workers if self._workers else []
        dead = multiprocessing.connection.wait([process.sentinel for process in processes], timeout=0.1) if processes else []
        for process in processes:
            if process.sentinel in dead:
                process.join()
                return WorkerDeath(pid=process.pid, exit_code=process.exitcode)
        return None

    def _heal(self, death: WorkerDeath) -> None:
        """Start all workers anew. Raises TransientFault when that was needed too often."""
        self._deaths.add(death, at=self._handed_over)
        for process in self._iterator._workers:
            process.kill()  # they may wait for ever for a lock that the dead one held
        self._iterator._shutdown_workers()
        self._start_workers()
        self._on_death(death)

    def worker_pids(self) -> list[int]:
        """Process ids of the workers, dead ones included."""
        return [process.pid for process in self._iterator._workers] if self._workers and not self._closed else []

    def close(self) -> None:
        """End the workers and close the files. Safe to call twice."""
        if not self._closed and self._workers:
            self._iterator._shutdown_workers()
        self._closed = True
        self._dataset.close()
        if isinstance(self._lists, Generator):
            self._lists.close()  # it may hold threads and files of its own


class _Slots:
    """Shared memory in pieces of `size` bytes. Workers see it because they are forked after it was made."""

    def __init__(self, count: int, *, size: int) -> None:
        self._size = size
        self._memory = mmap.mmap(-1, max(1, count * size))  # anonymous and shared
        self._free = deque(range(count))

    def dealt(self, lists: Iterable[list[int]]) -> Iterator[tuple[int | None, list[int]]]:
        """Each list with a free slot, or None when there is none. The DataLoader draws it as it gives work to a worker."""
        for numbers in lists:
            yield (self._free.popleft() if self._free else None), numbers

    def array(self, slot: int) -> np.ndarray:
        return np.frombuffer(self._memory, np.uint8, count=self._size, offset=slot * self._size)

    def joined(self, slot: int, batch: MicroBatch) -> MicroBatch:
        """The micro-batch with its images, which stand in the slot; in `batch` only their shape is left."""
        array = self.array(slot)
        weakref.finalize(array, self.free, slot)  # tensors hold the array, and views of them
        shape = batch.images_BHWC.shape
        images_BHWC = torch.from_numpy(array)[: shape.numel()].view(shape)
        return dataclasses.replace(batch, images_BHWC=images_BHWC)

    def free(self, slot: int | None) -> None:
        if slot is not None:
            self._free.append(slot)


class _InSlots:
    """What a worker runs: (slot, numbers) to (slot, micro-batch)."""

    def __init__(self, dataset: MicroBatches, slots: _Slots) -> None:
        self._dataset = dataset
        self._slots = slots
        self._made = 0

    def __getitems__(self, dealt: tuple[int | None, list[int]]) -> tuple[int | None, Any]:
        global _slot_here
        slot, numbers = dealt
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            return None, self._dataset.__getitems__(numbers)
        self._made += 1  # by this worker: all were forked after this object was made
        fault_point("worker.batch", rank=int(os.environ.get("RANK", 0)), worker=worker.id, batch=self._made)
        _slot_here = self._slots.array(slot) if slot is not None else _slot_here[:0]
        try:
            batch = self._dataset.__getitems__(numbers)
        finally:
            _slot_here = _slot_here[:0]
        return slot, batch if isinstance(batch, VitscaleError) else _Parcel(batch, is_in_slot=slot is not None)


class _Parcel:
    """A micro-batch that comes out of the pipe as one again; without memory for its images if they stand in a slot."""

    def __init__(self, batch: MicroBatch, *, is_in_slot: bool) -> None:
        self._batch, self._is_in_slot = batch, is_in_slot

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        batch = self._batch
        arrays = {name: getattr(batch, name).numpy() for name in ("labels_B", "labels_BM", "counted_B")}
        images = tuple(batch.images_BHWC.shape) if self._is_in_slot else batch.images_BHWC
        return _opened, (images, arrays, batch.samples_hash, batch.bad_images)


def _opened(
    images: torch.Tensor | tuple[int, ...],
    arrays: dict[str, np.ndarray],
    samples_hash: int,
    bad_images: tuple[BadSample, ...],
) -> MicroBatch:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    # A tensor without memory of its own: four strides of nothing over one byte.
    images_BHWC = images if isinstance(images, torch.Tensor) else torch.zeros(1, dtype=torch.uint8).expand(images)
    return MicroBatch(images_BHWC=images_BHWC, samples_hash=samples_hash, bad_images=bad_images, **tensors)


_open_streams: weakref.WeakSet[Stream] = weakref.WeakSet()


def worker_pids() -> list[int]:
    """Process ids of the data workers of all open streams of this process."""
    return [pid for stream in list(_open_streams) for pid in stream.worker_pids()]


@atexit.register
def _close_open_streams() -> None:
    """Workers do not hear the SIGTERM by which Python ends daemons at exit, and Python would then wait for them for ever."""
    for stream in list(_open_streams):
        stream.close()


def _heard_again(lists: Iterable[list[int]], heard: Iterable[int], refused: list[VitscaleError]) -> Iterator[list[int]]:
    """The DataLoader asks for the first lists once its workers live, and they may be long in coming.

    An error of the lists goes to `refused`: raised here, it would leave a DataLoader half made, and its workers alone.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, heard)
    try:
        yield from lists
    except VitscaleError as error:
        refused.append(error)


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin_worker(_worker: int, *, rank_pid: int) -> None:
    """First act of a worker: one thread, and gone when the rank is gone."""
    torch.set_num_threads(1)
    # torch's own watch over the parent looks every 5 s; until then a killed rank would keep the memory of its GPU,
    # which a forked worker holds open, from the rank that is started in its place.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != rank_pid:
            os._exit(1)
