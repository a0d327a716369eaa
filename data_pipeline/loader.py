"""Shards to micro-batches: order, storage, decoding and augmentation joined by a torch DataLoader.

The main process deals out lists of positions, data workers turn each list into a finished micro-batch, and the
DataLoader hands the micro-batches over in the order of the lists. A worker is a pure function of positions, so their
number changes nothing, and what was prefetched but not trained on never counts: the only state is `position`, which
the caller owns.

B images of a micro-batch (BHWC: height and width image_size, 3 channels, uint8; normalised on the device)
"""

import atexit
import ctypes
import os
import signal
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data_pipeline.augment import eval_view, train_view
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.decode import BadImage, decode
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order, locate, rank_slots
from data_pipeline.storage import LocalStorage, Stored
from vitscale.base.errors import BadDataError, UsageError, VitscaleError
from vitscale.base.files import xxh3_64

PREFETCH_PER_WORKER = 2
"""Micro-batches each worker keeps ready."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one rank feeds forward at once."""

    images_BHWC: torch.Tensor
    """uint8, RGB."""
    labels_B: torch.Tensor
    """int64; -1: no label."""
    counted_B: torch.Tensor
    """bool; False: padding of an evaluation, to be left out of every sum."""
    samples_hash: int
    """Sum modulo 2^64 over the counted images of `sample_hash`."""


def sample_hash(fingerprint: str, key: bytes) -> int:
    """64-bit name of one image of one dataset: xxh3_64(fingerprint as 64 hex digits ‖ key)."""
    return xxh3_64(fingerprint.encode("ascii") + key)


class Stream:
    """Iterator over the micro-batches of one rank. Its workers start with it and read ahead.

    Make it in the main thread: on Linux the workers end with the thread that made them.
    """

    def __init__(self, dataset: "_Images", lists: Iterable[list[int]], *, workers: int) -> None:
        self._dataset = dataset
        self._workers = workers
        loader = DataLoader(
            dataset,
            batch_sampler=lists,
            num_workers=workers,
            collate_fn=_as_it_is,
            prefetch_factor=PREFETCH_PER_WORKER if workers else None,
            worker_init_fn=partial(_begin_worker, rank_pid=os.getpid()),
            # Forked workers start in milliseconds and end with their rank; the default differs between Python versions.
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),  # torch draws a seed for the workers: not from the global generator
        )
        # Workers are born deaf to the signals by which a scheduler speaks to the rank: the rank decides what ends when.
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
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
        self._dataset.storage.close()


_open_streams: weakref.WeakSet[Stream] = weakref.WeakSet()


@atexit.register
def _close_open_streams() -> None:
    """Workers do not hear the SIGTERM by which Python ends daemons at exit, and Python would then wait for them for ever."""
    for stream in list(_open_streams):
        stream.close()


def train_stream(
    manifest: Manifest,
    *,
    data: DataConfig,
    augment: AugmentConfig,
    image_size: int,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    position: int,
) -> Stream:
    """The micro-batches of one rank from the step that starts at `position`, for ever.

    Each step has global_batch / (world * micro_batch) of them: consecutive pieces of the rank's slots (order.py).
    Raises UsageError when the batch cannot be shared evenly; see `Order` for its errors. Iterating raises HostFault
    for missing or damaged files, TransientFault for failing ones, BadDataError for bytes that are no image.
    """
    share = world * micro_batch
    if global_batch % share:
        below = global_batch // share * share
        raise UsageError(
            f"a global batch of {global_batch} is not a multiple of {world} ranks x {micro_batch} images = {share}; "
            f"nearest valid sizes: {below or share} and {below + share}"
        )
    order = Order([shard.images for shard in manifest.shards], seed=seed, lanes=data.lanes, window=data.window)

    def lists_of_positions() -> Iterator[list[int]]:
        start = position
        while True:
            slots = rank_slots(order.slots_of_step(start, global_batch), rank=rank, world=world)
            for first in range(0, len(slots), micro_batch):
                yield slots[first : first + micro_batch].tolist()
            start += global_batch

    dataset = _TrainImages(manifest, order=order, augment=augment, image_size=image_size, micro_batch=micro_batch)
    return Stream(dataset, lists_of_positions(), workers=data.workers)


def eval_stream(
    manifest: Manifest,
    *,
    data: DataConfig,
    augment: AugmentConfig,
    image_size: int,
    micro_batch: int,
    rank: int,
    world: int,
) -> Stream:
    """Every image of the dataset once, over all ranks together, in the order of the manifest.

    Rank r takes images [rN/R, (r+1)N/R). All ranks get equally many micro-batches of `micro_batch` images, because
    their forwards are collective; what is missing is filled with black images that are not counted.
    Raises what `train_stream` raises while iterating.
    """
    images = manifest.images
    numbers = range(rank * images // world, (rank + 1) * images // world)
    most_of_a_rank = -(-images // world)
    lists = [list(numbers[first : first + micro_batch]) for first in range(0, most_of_a_rank, micro_batch)]
    dataset = _EvalImages(manifest, augment=augment, image_size=image_size, micro_batch=micro_batch)
    return Stream(dataset, lists, workers=data.workers)


class _Images(Dataset[MicroBatch]):
    """Lists of numbers to micro-batches; what a number means is up to the child. Pickles without open files."""

    def __init__(self, manifest: Manifest, *, augment: AugmentConfig, image_size: int, micro_batch: int) -> None:
        self.storage = LocalStorage(manifest)
        self._fingerprint = manifest.fingerprint
        self._augment = augment
        self._image_size = image_size
        self._micro_batch = micro_batch

    def __getitems__(self, numbers: Sequence[int]) -> "MicroBatch | VitscaleError":
        # torch would wrap an exception in its own text and traceback; a value comes through as it is.
        try:
            return self._micro_batch_of(numbers)
        except VitscaleError as error:
            return error

    def _micro_batch_of(self, numbers: Sequence[int]) -> MicroBatch:
        images_BHWC = np.zeros((self._micro_batch, self._image_size, self._image_size, 3), dtype=np.uint8)
        labels_B = np.full(self._micro_batch, -1, dtype=np.int64)
        hashes = 0
        shards, rows = self._places(np.array(numbers, dtype=np.int64))
        for slot, (number, shard, row) in enumerate(zip(numbers, shards.tolist(), rows.tolist(), strict=True)):
            stored = self.storage.read(shard, row)
            images_BHWC[slot] = self._view(self._decode(stored, shard), number)
            labels_B[slot] = stored.label
            hashes += sample_hash(self._fingerprint, stored.key)
        return MicroBatch(
            images_BHWC=torch.from_numpy(images_BHWC),
            labels_B=torch.from_numpy(labels_B),
            counted_B=torch.arange(self._micro_batch) < len(numbers),
            samples_hash=hashes % 2**64,
        )

    def _decode(self, stored: Stored, shard: int) -> np.ndarray:
        try:
            return decode(stored.content)
        except BadImage as error:
            raise BadDataError(
                f"expected an image that can be decoded, but {self.storage.name(shard, stored.key)} is bad ({error}); "
                "build the dataset again, which rejects such images"
            ) from None

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row) of each number."""
        raise NotImplementedError

    def _view(self, image: np.ndarray, number: int) -> np.ndarray:
        """image_size,image_size,3."""
        raise NotImplementedError


class _TrainImages(_Images):
    """Numbers are positions of the order."""

    def __init__(self, manifest: Manifest, *, order: Order, augment: AugmentConfig, image_size: int, micro_batch: int) -> None:
        super().__init__(manifest, augment=augment, image_size=image_size, micro_batch=micro_batch)
        self._order = order

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        samples = self._order.samples_at(numbers)
        return samples.shard, samples.index

    def _view(self, image: np.ndarray, number: int) -> np.ndarray:
        seed = self._order.seed
        return train_view(image, augment=self._augment, image_size=self._image_size, seed=seed, position=number)


class _EvalImages(_Images):
    """Numbers count the images of the manifest from its first shard on."""

    def __init__(self, manifest: Manifest, *, augment: AugmentConfig, image_size: int, micro_batch: int) -> None:
        super().__init__(manifest, augment=augment, image_size=image_size, micro_batch=micro_batch)
        self._ends = np.cumsum([shard.images for shard in manifest.shards])

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return locate(self._ends, numbers)

    def _view(self, image: np.ndarray, number: int) -> np.ndarray:
        return eval_view(image, augment=self._augment, image_size=self._image_size)


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
