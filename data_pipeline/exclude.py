"""Images that may not enter a dataset because another one, mostly an evaluation set, has them.

An image is known by the xxh3 of its bytes, both as they were read when that dataset was built and as it stores them. By
chance alone one of 300 M images meets one of 100,000 with odds of 2 in a million.
"""

from pathlib import Path

import numpy as np

from data_pipeline.manifest import read_manifest, read_table


class Excluded:
    """The images of some datasets. `places`: numbers of images over all of them."""

    def __init__(self, directories: tuple[str, ...]) -> None:
        hashes: list[np.ndarray] = [np.zeros(0, np.uint64)]
        places: list[np.ndarray] = [np.zeros(0, np.int64)]
        self._keys: list[np.ndarray] = []
        self._starts: list[int] = []
        self._names: list[str] = []
        images = 0
        for directory in directories:
            manifest = read_manifest(Path(directory))
            for shard in manifest.shards:
                rows = read_table(Path(directory) / f"{shard.name}.parquet", columns=["key", "image_xxh3", "source_xxh3"])
                hashes += [rows["image_xxh3"], rows["source_xxh3"]]
                places += 2 * [np.arange(images, images + shard.images)]
                self._starts.append(images)
                self._keys.append(rows["key"].astype("S"))
                self._names.append(dataset_name(directory))
                images += shard.images
        all_hashes, all_places = np.concatenate(hashes), np.concatenate(places)
        order = np.argsort(all_hashes, kind="stable")  # of equal images the first is named
        self._hashes, self._places = all_hashes[order], all_places[order]

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """The place of the image with each hash; -1: it is not there."""
        if not len(self._hashes):
            return np.full(len(hashes), -1, np.int64)
        at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        return np.where(self._hashes[at] == hashes, self._places[at], -1)

    def name_of(self, place: int) -> str:
        """`image KEY of DATASET`."""
        part = int(np.searchsorted(self._starts, place, side="right")) - 1
        return f"image {self._keys[part][place - self._starts[part]].decode()} of {self._names[part]}"


def dataset_name(directory: str) -> str:
    """The last part of the path: the same dataset elsewhere is the same dataset."""
    return Path(directory).resolve().name
