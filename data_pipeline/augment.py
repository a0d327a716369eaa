"""Views of an image: a random one for training, the central one for evaluation. Images are H,W,3 arrays of uint8.

A training view draws from a generator keyed by (seed, position): the image at a position gets the same crop and flip
on any number of ranks and workers, and another one in the next epoch.
"""

import math

import numpy as np

from data_pipeline.config import AugmentConfig
from data_pipeline.decode import decode, oriented, resize
from data_pipeline.order import Purpose, draws

CROP_TRIES = 10
"""Random rectangles tried before the centre is taken, as torchvision, timm and the Inception code do."""

LONG_SIDE_MAX = 4
"""Evaluation looks at the middle of longer strips than 4 : 1, so that a strip of one pixel cannot fill the memory."""


def train_view(image: np.ndarray, *, augment: AugmentConfig, image_size: int, seed: int, position: int) -> np.ndarray:
    """Random resized crop and flip: image_size,image_size,3.

    The crop (Szegedy et al. 2015) has an area drawn uniformly and an aspect ratio drawn uniformly in its logarithm; a
    rectangle that does not fit in the image is drawn again.
    """
    raw = draws(seed, Purpose.VIEW, (position,), count=4 * CROP_TRIES + 1)
    uniform = (raw >> np.uint64(11)) * 2.0**-53  # the 53 high bits: every double of [0, 1) alike
    top, left, height, width = _crop(image, augment=augment, tries=uniform[1:].reshape(CROP_TRIES, 4))
    view = resize(image[top : top + height, left : left + width], width=image_size, height=image_size)
    return view[:, ::-1] if uniform[0] < augment.flip else view


def eval_view(image: np.ndarray, *, augment: AugmentConfig, image_size: int) -> np.ndarray:
    """The short side resized to round(image_size / eval_crop), the centre cut out: image_size,image_size,3."""
    height, width = image.shape[:2]
    short = min(height, width)
    image = _centre(image, height=min(height, LONG_SIDE_MAX * short), width=min(width, LONG_SIDE_MAX * short))
    height, width = image.shape[:2]
    scale = round(image_size / augment.eval_crop) / short
    resized = resize(image, width=round(width * scale), height=round(height * scale))
    return _centre(resized, height=image_size, width=image_size)


def fill_train(
    out_HWC: np.ndarray, content: bytes, *, orientation: int, augment: AugmentConfig, seed: int, position: int
) -> None:
    """Decode an encoded image and put its training view into `out_HWC`. Raises BadImage."""
    view = train_view(decode(content), augment=augment, image_size=len(out_HWC), seed=seed, position=position)
    out_HWC[:] = oriented(view, orientation)


def fill_eval(out_HWC: np.ndarray, content: bytes, *, orientation: int, augment: AugmentConfig) -> None:
    """Decode an encoded image and put its evaluation view into `out_HWC`. Raises BadImage."""
    out_HWC[:] = oriented(eval_view(decode(content), augment=augment, image_size=len(out_HWC)), orientation)


def _crop(image: np.ndarray, *, augment: AugmentConfig, tries: np.ndarray) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the crop; a row of `tries` is (area, ratio, top, left), each in [0, 1)."""
    height, width = image.shape[:2]
    log_ratio_max = math.log(augment.crop_ratio_max)
    for area_draw, ratio_draw, top_draw, left_draw in tries.tolist():
        share = augment.crop_area_min + (augment.crop_area_max - augment.crop_area_min) * area_draw
        ratio = math.exp((2 * ratio_draw - 1) * log_ratio_max)
        area = share * height * width
        crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = int(top_draw * (height - crop_height + 1))
            left = int(left_draw * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    # The centre, as large as the widest allowed ratio lets it be.
    crop_height = min(height, max(1, round(width * augment.crop_ratio_max)))
    crop_width = min(width, max(1, round(height * augment.crop_ratio_max)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _centre(image: np.ndarray, *, height: int, width: int) -> np.ndarray:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]
