"""Which rectangle of an image is seen. Pure arithmetic on sizes and random numbers."""

import math
from typing import NamedTuple

import numpy as np

from data_pipeline.config import AugmentConfig

CROP_TRIES = 10
"""Random rectangles tried before the centre is taken, as torchvision, timm and the Inception code do."""


REST_SHRINK_MIN = 1.5
"""What the antialiased resize must still shrink by when a crop was decoded smaller. Then the view stays 42 dB (PSNR, mean of
photographs) from the one of the full decode: more than bilinear and bicubic are from each other (40 dB)."""


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def random_box(height: int, width: int, *, augment: AugmentConfig, tries: np.ndarray) -> Box:
    """The random resized crop (Szegedy et al. 2015) of an image of that size.

    Its area is drawn uniformly and its aspect ratio uniformly in the logarithm; a rectangle that does not fit is drawn
    again. `tries` holds CROP_TRIES rows of (area, ratio, top, left), each in [0, 1).
    """
    log_ratio_max = math.log(augment.crop_ratio_max)
    for area_draw, ratio_draw, top_draw, left_draw in tries.tolist():
        share = augment.crop_area_min + (augment.crop_area_max - augment.crop_area_min) * area_draw
        ratio = math.exp((2 * ratio_draw - 1) * log_ratio_max)
        area = share * height * width
        crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = int(top_draw * (height - crop_height + 1))
            left = int(left_draw * (width - crop_width + 1))
            return Box(top, left, crop_height, crop_width)
    # The centre, as large as the widest allowed ratio lets it be.
    crop_height = min(height, max(1, round(width * augment.crop_ratio_max)))
    crop_width = min(width, max(1, round(height * augment.crop_ratio_max)))
    return central_box(height, width, box_height=crop_height, box_width=crop_width)


def decoding_shrink(box: Box, *, size: int) -> int:
    """By how much (1, 2, 4, 8) the picture may be decoded smaller for a view of size x size."""
    spare = min(box.height, box.width) / (REST_SHRINK_MIN * size)
    return max(factor for factor in (1, 2, 4, 8) if factor <= max(1, spare))


def on_grid(box: Box, shrink: int) -> Box:
    """The box, grown to begin and end at multiples of `shrink`; its end may lie up to shrink - 1 outside the picture."""
    top, left = box.top // shrink * shrink, box.left // shrink * shrink
    bottom, right = -(-(box.top + box.height) // shrink) * shrink, -(-(box.left + box.width) // shrink) * shrink
    return Box(top, left, bottom - top, right - left)


def central_box(height: int, width: int, *, box_height: int, box_width: int) -> Box:
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def erased_box(height: int, width: int, *, draws: list[float]) -> Box | None:
    """Random erasing (Zhong et al. 2017): 2 to 33 % of the area, ratio 0.3 to 1 / 0.3; None where no try fits.

    `draws` holds four numbers in [0, 1) per try.
    """
    log_ratio_max = math.log(1 / 0.3)
    for first in range(0, len(draws), 4):
        area = (0.02 + 0.31 * draws[first]) * height * width
        ratio = math.exp((2 * draws[first + 1] - 1) * log_ratio_max)
        box_height, box_width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_height < height and 0 < box_width < width:
            top = int(draws[first + 2] * (height - box_height + 1))
            left = int(draws[first + 3] * (width - box_width + 1))
            return Box(top, left, box_height, box_width)
    return None
