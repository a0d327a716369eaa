"""Make large images small before they are stored: a third of the bytes and of the decoding time of every later epoch.

short side   the smaller of width and height
"""

from dataclasses import dataclass

import numpy as np

from data_pipeline.decode import oriented, resize
from data_pipeline.jpeg import encode_jpeg


@dataclass(frozen=True, kw_only=True)
class Shrink:
    """Images whose short side is above `short` are stored with exactly this short side, as JPEG of `quality`."""

    short: int
    quality: int

    def is_needed(self, image: np.ndarray) -> bool:
        return min(image.shape[:2]) > self.short

    def shrunk(self, image: np.ndarray, orientation: int) -> bytes:
        """A small JPEG of a decoded image, upright (EXIF orientation 1).

        The area filter of OpenCV weights every source pixel by the share of it that falls into the target pixel. Equal
        pixels give equal bytes on one version of OpenCV and libjpeg-turbo and one kind of processor.
        """
        height, width = image.shape[:2]
        small = resize(image, width=self._side(width, height), height=self._side(height, width))
        return encode_jpeg(oriented(small, orientation), quality=self.quality)

    def _side(self, side: int, other: int) -> int:
        """Length of one side when the shorter of both becomes `short`; a half pixel rounds up."""
        return self.short if side <= other else (2 * side * self.short + other) // (2 * other)
