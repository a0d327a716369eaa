"""The measurements behind `bench.py loader`: loaders take turns, and one image is followed through its stages."""

import gc
import os
import statistics
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from data_pipeline.augment import fill_train
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.crops import CROP_TRIES, decoding_shrink, on_grid, random_box
from data_pipeline.decode import Picture, mirror
from data_pipeline.loader import train_stream
from data_pipeline.manifest import Manifest
from data_pipeline.order import Purpose, draws, locate
from data_pipeline.resample import resample
from data_pipeline.storage import DamagedBytes, LocalStorage
from data_pipeline.stream import PREFETCH_PER_WORKER, MicroBatch, Stream
from vitscale.base.errors import EnvironmentFault, UsageError

OURS, CEILING = "ours", "ceiling"
SAMPLE_IMAGES = 1000
STAGE_REPEATS = 3
IDLE_WAIT_S = 20.0


class Loader(Protocol):
    """An endless iterator over batches of another library."""

    def __call__(
        self, manifest: Manifest, *, augment: AugmentConfig, image_size: int, batch: int, workers: int
    ) -> Generator[Any]: ...


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one loader did in its turns."""

    what: str
    images_per_s: list[float]
    """Of each turn, by wall clock."""
    cpu_us_per_image: list[float]
    """Of each turn: this process and its workers."""
    checked: int
    """Images whose batch had the right shape and type and was not blank."""

    @property
    def median(self) -> float:
        return statistics.median(self.images_per_s)

    @property
    def cpu_us(self) -> float:
        return statistics.median(self.cpu_us_per_image)


def measure_loaders(
    manifest: Manifest,
    *,
    augment: AugmentConfig,
    image_size: int,
    batch: int,
    workers: int,
    seconds: float,
    rounds: int,
    peers: dict[str, Loader],
) -> dict[str, Result]:
    """Let each loader work for `seconds`, in turns, `rounds` times. Its workers live on between its turns, with full queues."""
    settings: dict[str, Any] = {"augment": augment, "image_size": image_size, "batch": batch, "workers": workers}
    shape = {(batch, image_size, image_size, 3), (batch, 3, image_size, image_size)}
    results: dict[str, Result] = {}
    with ExitStack() as stack:
        ours = stack.enter_context(closing(_our_stream(manifest, **settings)))
        ceiling = stack.enter_context(closing(Stream(_DecodeOnly(manifest, batch), _endless(batch), workers=workers)))
        loaders: dict[str, tuple[str, Iterator[Any]]] = {
            OURS: ("vitscale", (micro_batch.images_BHWC for micro_batch in ours)),
            CEILING: ("decode only, whole images, no read", (micro_batch.counted_B for micro_batch in ceiling)),
            **{name: (name, stack.enter_context(closing(make(manifest, **settings)))) for name, make in peers.items()},
        }
        for name, (what, _) in loaders.items():
            results[name] = Result(what=what, images_per_s=[], cpu_us_per_image=[], checked=0)
        for _ in range(rounds):
            for name, (what, batches) in loaders.items():
                _wait_until_idle()  # the workers of the turn before fill their queues, seconds of work for slow ones
                drained = workers * PREFETCH_PER_WORKER + 2  # what waited in the queues was made before its turn
                for _ in range(drained):
                    images = next(batches)
                    assert name == CEILING or (
                        tuple(images.shape) in shape and images.dtype in (torch.uint8, torch.float32) and images[-1].any()
                    )
                per_s, cpu_us, count = _turn(batches, batch=batch, seconds=seconds)
                old = results[name]
                results[name] = Result(
                    what=what,
                    images_per_s=[*old.images_per_s, per_s],
                    cpu_us_per_image=[*old.cpu_us_per_image, cpu_us],
                    checked=old.checked + count + drained * batch,
                )
    return results


def _turn(batches: Iterator[Any], *, batch: int, seconds: float) -> tuple[float, float, int]:
    """(images per second, CPU microseconds per image, images)."""
    images = 0
    cpu_s, begun_s = _cpu_s(), time.perf_counter()
    while (elapsed_s := time.perf_counter() - begun_s) < seconds or not images:
        next(batches)
        images += batch
    return images / elapsed_s, 1e6 * (_cpu_s() - cpu_s) / images, images


def _wait_until_idle() -> None:
    """Return when this process and its workers have nothing left to do, at the latest after IDLE_WAIT_S."""
    give_up_at_s = time.monotonic() + IDLE_WAIT_S
    while time.monotonic() < give_up_at_s:
        before_s = _cpu_s()
        time.sleep(0.3)
        if _cpu_s() - before_s < 0.03:
            return


def _cpu_s() -> float:
    """CPU time of this process and its living descendants."""
    ticks, waiting = 0, [os.getpid()]
    while waiting:
        pid = waiting.pop()
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # user and system
            children = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
        except OSError:  # ended in the meantime
            continue
        waiting += [int(child) for group in children for child in group]
    return ticks / os.sysconf("SC_CLK_TCK")


def _our_stream(manifest: Manifest, *, augment: AugmentConfig, image_size: int, batch: int, workers: int) -> Stream:
    return train_stream(
        [manifest],
        data=DataConfig(workers=workers),
        augment=augment,
        image_size=image_size,
        seed=0,
        global_batch=batch,
        micro_batch=batch,
        rank=0,
        world=1,
        position=0,
    )


def _contents(manifest: Manifest) -> list[bytes]:
    """The first images of the dataset, at most SAMPLE_IMAGES."""
    storage = LocalStorage(manifest)
    ends = np.cumsum([shard.images for shard in manifest.shards])
    shards, rows = locate(ends, np.arange(min(SAMPLE_IMAGES, manifest.images)))
    with closing(storage):
        try:
            return [storage.read(shard, row).content for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)]
        except DamagedBytes as damage:
            raise EnvironmentFault(
                f"expected whole images to measure with, but {damage.key.decode()} in {manifest.tars_at} is bad "
                f"({damage.detail}); `python launch/inspect_shards.py verify {manifest.directory}` names all damage"
            ) from None


def _endless(batch: int) -> Iterator[list[int]]:
    first = 0
    while True:
        yield list(range(first, first + batch))
        first += batch


class _DecodeOnly:
    """Numbers to nothing: the images are decoded whole, from memory, and dropped."""

    batch_bytes = 0

    def __init__(self, manifest: Manifest, batch: int) -> None:
        self._contents = _contents(manifest)
        self._batch = batch

    def __getitems__(self, numbers: list[int]) -> MicroBatch:
        for number in numbers:
            picture = Picture(self._contents[number % len(self._contents)])
            picture.crop(0, 0, picture.height, picture.width)
        nothing = torch.zeros(1, dtype=torch.uint8)
        return MicroBatch(images_BHWC=nothing, labels_B=nothing, labels_BM=nothing, counted_B=nothing, samples_hash=0)

    def close(self) -> None:
        pass


def measure_stages(manifest: Manifest, *, augment: AugmentConfig, image_size: int) -> dict[str, float]:
    """CPU microseconds per image of each step from the shard to the slot, in this thread: best of STAGE_REPEATS per image."""
    images = min(SAMPLE_IMAGES, manifest.images)
    if images == 0:
        raise UsageError(f"--data: expected a dataset with images, {manifest.directory} has none")
    storage = LocalStorage(manifest)
    shards, rows = locate(np.cumsum([shard.images for shard in manifest.shards]), np.arange(images))
    slot, view = np.empty((2, image_size, image_size, 3), np.uint8)
    names = ("read and hash", "random numbers, box", "header", "decode to the end of the crop", "resize", "flip", "other")
    best = np.full((images, len(names)), np.inf)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.disable()
    try:
        for _ in range(STAGE_REPEATS):
            for number, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
                clock = _Clock()
                content = storage.read(shard, row).content
                clock.lap()
                uniform = (draws(0, Purpose.VIEW, (number,), count=4 * CROP_TRIES + 1) >> np.uint64(11)) * 2.0**-53
                tries = uniform[1:].reshape(CROP_TRIES, 4)
                clock.lap()
                picture = Picture(content)
                clock.lap()
                box = random_box(picture.height, picture.width, augment=augment, tries=tries)
                clock.lap(onto=1)
                shrink = decoding_shrink(box, size=image_size) if picture.is_scalable else 1
                region = picture.crop(*on_grid(box, shrink), shrink=shrink)
                clock.lap()
                resample(region, view)
                clock.lap()
                if uniform[0] < augment.flip:
                    mirror(view, slot)
                clock.lap()
                settings: dict[str, Any] = {"orientation": 1, "augment": augment, "seed": 0, "position": number}
                fill_train(slot, content, **settings)
                clock.lap()
                whole = clock.laps.pop()
                clock.laps.append(max(0.0, whole - sum(clock.laps[1:])))  # the second pass finds the bytes in the cache
                best[number] = np.minimum(best[number], clock.laps)
    finally:
        gc.enable()
        torch.set_num_threads(threads)
        storage.close()
    return {name: round(1e6 * float(value), 1) for name, value in zip(names, best.mean(axis=0), strict=True)}


class _Clock:
    """CPU time of this thread between laps."""

    def __init__(self) -> None:
        self.laps: list[float] = []
        self._last_s = time.thread_time()

    def lap(self, *, onto: int | None = None) -> None:
        now_s = time.thread_time()
        if onto is None:
            self.laps.append(now_s - self._last_s)
        else:
            self.laps[onto] += now_s - self._last_s
        self._last_s = time.thread_time()
