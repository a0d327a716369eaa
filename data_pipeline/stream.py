"""Lists of numbers to finished micro-batches, by data workers that read ahead: a torch DataLoader and its processes.

The DataLoader hands micro-batches over in the order of the lists, so the number of workers changes nothing.

B images of a micro-batch (BHWC: height and width image_size, 3 channels, uint8; normalised on the device)
M labels of the image that has most, at least 1
"""

import atexit
import ctypes
import os
import signal
import sys
import weakref
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch.utils.data import DataLoader

from vitscale.base.errors import VitscaleError

PREFETCH_PER_WORKER = 2
"""Micro-batches each worker keeps ready."""

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

    def __getitems__(self, numbers: list[int]) -> MicroBatch | VitscaleError: ...

    def close(self) -> None:
        """Close the files of this process."""
        ...


class Stream:
    """Iterator over the micro-batches of one rank. Its workers start with it and read ahead.

    Make it in the main thread: on Linux the workers end with the thread that made them.
    """

    def __init__(self, dataset: MicroBatches, lists: Iterable[list[int]], *, workers: int) -> None:
        self._dataset = dataset
        self._lists = lists
        self._workers = workers
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        loader = DataLoader(
            cast(Any, dataset),
            batch_sampler=_heard_again(lists, heard),
            num_workers=workers,
            collate_fn=_as_it_is,
            prefetch_factor=PREFETCH_PER_WORKER if workers else None,
            worker_init_fn=partial(_begin_worker, rank_pid=os.getpid()),
            # Forked workers start in milliseconds and end with their rank; the default differs between Python versions.
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),  # torch draws a seed for the workers: not from the global generator
        )
        # Workers are born deaf to the signals by which a scheduler speaks to the rank: the rank decides what ends when.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._iterator = cast(Any, iter(loader))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        self._closed = False
        _open_streams.add(self)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> MicroBatch:
        """The next micro-batch. Raises what its worker met, as itself."""
        try:
            batch = next(self._iterator)
        except StopIteration:
            self.close()
            raise
        if isinstance(batch, VitscaleError):
            raise batch
        return batch

    def close(self) -> None:
        """End the workers and close the files. Safe to call twice."""
        if not self._closed and self._workers:
            self._iterator._shutdown_workers()
        self._closed = True
        self._dataset.close()
        if isinstance(self._lists, Generator):
            self._lists.close()  # it may hold threads and files of its own


_open_streams: weakref.WeakSet[Stream] = weakref.WeakSet()


@atexit.register
def _close_open_streams() -> None:
    """Workers do not hear the SIGTERM by which Python ends daemons at exit, and Python would then wait for them for ever."""
    for stream in list(_open_streams):
        stream.close()


def _heard_again(lists: Iterable[list[int]], heard: Iterable[int]) -> Iterator[list[int]]:
    """The DataLoader asks for the first lists once its workers live, and they may be long in coming."""
    signal.pthread_sigmask(signal.SIG_SETMASK, heard)
    yield from lists


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
