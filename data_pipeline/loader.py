"""Shards to micro-batches: order, storage, decoding and augmentation joined by a torch DataLoader.

The main process deals out lists of positions, data workers turn each list into a finished micro-batch, and the
DataLoader hands the micro-batches over in the order of the lists. A worker is a pure function of positions, so their
number changes nothing, and what was prefetched but not trained on never counts: the only state is `position`, which
the caller owns.

B images of a micro-batch (BHWC: height and width image_size, 3 channels, uint8; normalised on the device)
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from data_pipeline.augment import fill_eval, fill_train
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.decode import BadImage
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order, locate, rank_slots
from data_pipeline.storage import LocalStorage, Stored
from data_pipeline.stream import MicroBatch, Stream
from vitscale.base.errors import BadDataError, UsageError, VitscaleError
from vitscale.base.files import xxh3_64


def sample_hash(fingerprint: str, key: bytes) -> int:
    """64-bit name of one image of one dataset: xxh3_64(fingerprint as 64 hex digits ‖ key)."""
    return xxh3_64(fingerprint.encode("ascii") + key)


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


class _Images:
    """Lists of numbers to micro-batches; what a number means is up to the child. Pickles without open files."""

    def __init__(self, manifest: Manifest, *, augment: AugmentConfig, image_size: int, micro_batch: int) -> None:
        self.storage = LocalStorage(manifest)
        self._fingerprint = manifest.fingerprint
        self._augment = augment
        self._image_size = image_size
        self._micro_batch = micro_batch

    def close(self) -> None:
        """Close the tars this process has open."""
        self.storage.close()

    def __getitems__(self, numbers: Sequence[int]) -> MicroBatch | VitscaleError:
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
            try:
                self._fill(images_BHWC[slot], stored, number)
            except BadImage as error:
                raise BadDataError(
                    f"expected an image that can be decoded, but {self.storage.name(shard, stored.key)} is bad ({error}); "
                    "build the dataset again, which rejects such images"
                ) from None
            labels_B[slot] = stored.label
            hashes += sample_hash(self._fingerprint, stored.key)
        return MicroBatch(
            images_BHWC=torch.from_numpy(images_BHWC),
            labels_B=torch.from_numpy(labels_B),
            counted_B=torch.arange(self._micro_batch) < len(numbers),
            samples_hash=hashes % 2**64,
        )

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row) of each number."""
        raise NotImplementedError

    def _fill(self, out_HWC: np.ndarray, stored: Stored, number: int) -> None:
        """Decode and put the view into its slot of the batch. Raises BadImage."""
        raise NotImplementedError


class _TrainImages(_Images):
    """Numbers are positions of the order."""

    def __init__(self, manifest: Manifest, *, order: Order, augment: AugmentConfig, image_size: int, micro_batch: int) -> None:
        super().__init__(manifest, augment=augment, image_size=image_size, micro_batch=micro_batch)
        self._order = order

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        samples = self._order.samples_at(numbers)
        return samples.shard, samples.index

    def _fill(self, out_HWC: np.ndarray, stored: Stored, number: int) -> None:
        seed, orientation = self._order.seed, stored.orientation
        fill_train(out_HWC, stored.content, orientation=orientation, augment=self._augment, seed=seed, position=number)


class _EvalImages(_Images):
    """Numbers count the images of the manifest from its first shard on."""

    def __init__(self, manifest: Manifest, *, augment: AugmentConfig, image_size: int, micro_batch: int) -> None:
        super().__init__(manifest, augment=augment, image_size=image_size, micro_batch=micro_batch)
        self._ends = np.cumsum([shard.images for shard in manifest.shards])

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return locate(self._ends, numbers)

    def _fill(self, out_HWC: np.ndarray, stored: Stored, number: int) -> None:
        fill_eval(out_HWC, stored.content, orientation=stored.orientation, augment=self._augment)
