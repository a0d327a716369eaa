"""Shards to micro-batches: order, storage, decoding and augmentation joined into a stream.

The main process deals out lists of positions, data workers turn each list into a finished micro-batch, and the stream
hands the micro-batches over in the order of the lists. A worker is a pure function of positions, so their number changes
nothing, and what was prefetched but not trained on never counts: the only state is `position`, which the caller owns.

bad image  its bytes are not those of the index, or cannot be decoded. In training another image of the same window takes
           its position (order.py), so no position moves and no batch is short, and the batch says so; which image it is
           depends on the position and on what is bad, on nothing else. Evaluation counts every image, so it stops there.
           A missing file or a failing disk is no property of an image: it ends the run

B images of a micro-batch (BHWC: height and width image_size, 3 channels, uint8; normalised on the device)
M labels of the image that has most, at least 1
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from data_pipeline.augment import fill_eval, fill_train
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.deaths import WorkerDeath, say_death
from data_pipeline.decode import BadImage
from data_pipeline.manifest import Manifest
from data_pipeline.mixture import SLOTS, Mixture, rank_slots
from data_pipeline.order import Order, locate
from data_pipeline.remote import fetched, tars_of
from data_pipeline.storage import DamagedBytes, LocalStorage, Stored
from data_pipeline.stream import BadSample, MicroBatch, Stream, blank_images
from vitscale.base.errors import BadDataError, UsageError, VitscaleError
from vitscale.base.files import xxh3_64

STAND_IN_TRIES = 64
"""Images of a window looked at in place of a bad one. Where half of a window is bad, 64 are bad once in 10^19 times."""


def sample_hash(fingerprint: str, key: bytes) -> int:
    """64-bit name of one image of one dataset: xxh3_64(fingerprint as 64 hex digits ‖ key)."""
    return xxh3_64(fingerprint.encode("ascii") + key)


def mixture_of(manifests: Sequence[Manifest], *, data: DataConfig, seed: int) -> Mixture:
    """The order of a training on these datasets with the weights of `data`; one dataset needs none."""
    orders = [
        Order([shard.images for shard in manifest.shards], seed=seed, lanes=data.lanes, window=data.window, source=source)
        for source, manifest in enumerate(manifests)
    ]
    return Mixture(orders, data.weights or (SLOTS,))


def train_stream(
    manifests: Sequence[Manifest],
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
    on_death: Callable[[WorkerDeath], None] = say_death,
) -> Stream:
    """The micro-batches of one rank from the step that starts at `position`, for ever; `data.weights` mixes the datasets.

    Each step has global_batch / (world * micro_batch) of them: consecutive pieces of the rank's slots (mixture.py).
    Raises UsageError when the batch cannot be shared evenly; see `Order` for its errors. Iterating raises HostFault
    for missing files, TransientFault for failing ones and for data workers that die again and again, BadDataError where
    no image of a window can take the place of a bad one. `on_death` is told of a data worker that died and was replaced.
    """
    share = world * micro_batch
    if global_batch % share:
        below = global_batch // share * share
        raise UsageError(
            f"a global batch of {global_batch} is not a multiple of {world} ranks x {micro_batch} images = {share}; "
            f"nearest valid sizes: {below or share} and {below + share}"
        )
    mixture = mixture_of(manifests, data=data, seed=seed)

    def lists_of_positions() -> Iterator[list[int]]:
        start = position
        while True:
            slots = rank_slots(mixture.slots_of_step(start, global_batch), rank=rank, world=world)
            for first in range(0, len(slots), micro_batch):
                yield slots[first : first + micro_batch].tolist()
            start += global_batch

    dataset = _TrainImages(
        manifests,
        cache_dir=data.cache_path,
        mixture=mixture,
        seed=seed,
        augment=augment,
        image_size=image_size,
        micro_batch=micro_batch,
    )
    lists = fetched(
        lists_of_positions(),
        manifests,
        data=data,
        shards_of=lambda positions: mixture.shards_near(np.array(positions)),
        step_lists=global_batch // share,
    )
    return Stream(dataset, lists, workers=data.workers, step_lists=global_batch // share, on_death=on_death)


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
    Iterating raises HostFault for missing files, TransientFault for failing ones, BadDataError at a bad image.
    """
    images = manifest.images
    numbers = range(rank * images // world, (rank + 1) * images // world)
    most_of_a_rank = -(-images // world)
    dataset = _EvalImages(manifest, cache_dir=data.cache_path, augment=augment, image_size=image_size, micro_batch=micro_batch)
    lists = fetched(
        (list(numbers[first : first + micro_batch]) for first in range(0, most_of_a_rank, micro_batch)),
        [manifest],
        data=data,
        shards_of=dataset.shards_of,
        step_lists=1,
    )
    return Stream(dataset, lists, workers=data.workers)


class _Images:
    """Lists of numbers to micro-batches; what a number means is up to the child. Pickles without open files."""

    def __init__(
        self, manifests: Sequence[Manifest], *, cache_dir: Path, augment: AugmentConfig, image_size: int, micro_batch: int
    ) -> None:
        self._manifests = tuple(manifests)
        self._storages = [
            LocalStorage(manifest, tars=tars_of(manifest, cache_dir), share=len(self._manifests))
            for manifest in self._manifests
        ]
        self._most_labels = max(1, *(manifest.most_labels for manifest in self._manifests))
        self._augment = augment
        self._image_size = image_size
        self._micro_batch = micro_batch
        self.batch_bytes = micro_batch * image_size**2 * 3

    def close(self) -> None:
        """Close the tars this process has open."""
        for storage in self._storages:
            storage.close()

    def __getitems__(self, numbers: Sequence[int]) -> MicroBatch | VitscaleError:
        # torch would wrap an exception in its own text and traceback; a value comes through as it is.
        try:
            return self._micro_batch_of(numbers)
        except VitscaleError as error:
            return error

    def _micro_batch_of(self, numbers: Sequence[int]) -> MicroBatch:
        shape = (self._micro_batch, self._image_size, self._image_size, 3)
        images_BHWC = blank_images(shape, used=len(numbers))
        labels_BM = np.full((self._micro_batch, self._most_labels), -1, dtype=np.int64)
        hashes = 0
        bad_images = []
        sources, shards, rows = self._places(np.array(numbers, dtype=np.int64))
        places = zip(numbers, sources.tolist(), shards.tolist(), rows.tolist(), strict=True)
        for slot, (number, source, shard, row) in enumerate(places):
            try:
                stored = self._show(images_BHWC[slot], source, shard, row, number)
            except _Bad as bad:
                stored, sample = self._stand_in(images_BHWC[slot], source, shard, number, bad)
                bad_images.append(sample)
            labels = stored.labels if stored.labels is not None else [stored.label]
            labels_BM[slot, : len(labels)] = labels
            hashes += sample_hash(self._manifests[source].fingerprint, stored.key)
        all_labels_BM = torch.from_numpy(labels_BM)
        return MicroBatch(
            images_BHWC=torch.from_numpy(images_BHWC),
            labels_B=all_labels_BM[:, 0].contiguous(),
            labels_BM=all_labels_BM,
            counted_B=torch.arange(self._micro_batch) < len(numbers),
            samples_hash=hashes % 2**64,
            bad_images=tuple(bad_images),
        )

    def _show(self, out_HWC: np.ndarray, source: int, shard: int, row: int, number: int) -> Stored:
        """Put the image of one row into its slot of the batch and return its record. Raises _Bad."""
        try:
            stored = self._storages[source].read(shard, row)
        except DamagedBytes as damage:
            raise _Bad(damage.key, damage.reason, damage.detail) from None
        try:
            self._fill(out_HWC, stored, number)
        except BadImage as error:
            raise _Bad(stored.key, error.reason, error.detail) from None
        return stored

    def _name(self, source: int, shard: int, bad: "_Bad") -> str:
        """`image KEY of shard NAME in DIR is bad (reason: detail)`, for messages."""
        manifest = self._manifests[source]
        where = f"image {bad.key.decode()} of shard {manifest.shards[shard].name} in {manifest.tars_at}"
        return f"{where} is bad ({bad.reason}: {bad.detail})"

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, shard, row) of each number."""
        raise NotImplementedError

    def _fill(self, out_HWC: np.ndarray, stored: Stored, number: int) -> None:
        """Decode and put the view into its slot of the batch. Raises BadImage."""
        raise NotImplementedError

    def _stand_in(self, out_HWC: np.ndarray, source: int, shard: int, number: int, bad: "_Bad") -> tuple[Stored, BadSample]:
        """Put another image into the slot of a bad one; its record, and what happened. Raises BadDataError."""
        raise NotImplementedError


class _Bad(Exception):
    """The image of one row is bad, for whatever reason in its bytes."""

    def __init__(self, key: bytes, reason: str, detail: str) -> None:
        super().__init__(key, reason, detail)
        self.key, self.reason, self.detail = key, reason, detail


class _TrainImages(_Images):
    """Numbers are positions of the order of the run."""

    def __init__(
        self,
        manifests: Sequence[Manifest],
        *,
        cache_dir: Path,
        mixture: Mixture,
        seed: int,
        augment: AugmentConfig,
        image_size: int,
        micro_batch: int,
    ) -> None:
        super().__init__(manifests, cache_dir=cache_dir, augment=augment, image_size=image_size, micro_batch=micro_batch)
        self._mixture = mixture
        self._seed = seed

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        source, samples = self._mixture.samples_at(numbers)
        return source, samples.shard, samples.index

    def _fill(self, out_HWC: np.ndarray, stored: Stored, number: int) -> None:
        orientation = stored.orientation
        fill_train(out_HWC, stored.content, orientation=orientation, augment=self._augment, seed=self._seed, position=number)

    def _stand_in(self, out_HWC: np.ndarray, source: int, shard: int, number: int, bad: _Bad) -> tuple[Stored, BadSample]:
        manifest = self._manifests[source]
        tried = self._mixture.stand_ins(number, STAND_IN_TRIES)
        for other_shard, other_row in tried:
            try:
                stored = self._show(out_HWC, source, other_shard, other_row, number)
            except _Bad:
                continue  # is named at its own position
            return stored, BadSample(
                position=number,
                dataset=manifest.tars_at,
                shard=manifest.shards[shard].name,
                key=bad.key.decode(),
                reason=bad.reason,
                detail=bad.detail,
                stand_in_shard=manifest.shards[other_shard].name,
                stand_in_key=stored.key.decode(),
            )
        raise BadDataError(
            f"{self._name(source, shard, bad)}, and so are all {len(tried)} images of its window that were tried in its "
            f"place; restore the shard from a copy (`python launch/inspect_shards.py verify {manifest.directory}` lists all "
            "damage) or build the dataset again"
        )


class _EvalImages(_Images):
    """Numbers count the images of the manifest from its first shard on."""

    def __init__(
        self, manifest: Manifest, *, cache_dir: Path, augment: AugmentConfig, image_size: int, micro_batch: int
    ) -> None:
        super().__init__([manifest], cache_dir=cache_dir, augment=augment, image_size=image_size, micro_batch=micro_batch)
        self._ends = np.cumsum([shard.images for shard in manifest.shards])

    def shards_of(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """(0, shard) of all images `numbers`, as the mixture of a training names them."""
        shards, _ = locate(self._ends, np.array(numbers, dtype=np.int64))
        return [(0, shard) for shard in np.unique(shards).tolist()]

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shard, row = locate(self._ends, numbers)
        return np.zeros_like(shard), shard, row

    def _fill(self, out_HWC: np.ndarray, stored: Stored, number: int) -> None:
        fill_eval(out_HWC, stored.content, orientation=stored.orientation, augment=self._augment)

    def _stand_in(self, out_HWC: np.ndarray, source: int, shard: int, number: int, bad: _Bad) -> tuple[Stored, BadSample]:
        raise BadDataError(
            f"{self._name(source, shard, bad)}, and an evaluation counts every image of its dataset, so nothing can stand in "
            "for it; restore the shard from a copy or build the dataset again"
        )
