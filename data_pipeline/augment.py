"""Views of an image: a random one for training, the central one for evaluation. Images are H,W,3 arrays of uint8.

A training view draws from a generator keyed by (seed, position): the image at a position gets the same crop, flip and
colours on any number of ranks and workers, and others in the next epoch.

Crops are drawn in the coordinates in which an image is stored, and the finished view is turned as its EXIF orientation
asks. The distribution is that of turning first: area, place and the logarithm of the aspect ratio are drawn alike for
both axes and both directions, and so is the flip when its probability is 0.5 or the image stands upright.
"""

import numpy as np

from data_pipeline.config import AugmentConfig
from data_pipeline.crops import CROP_TRIES, central_box, decoding_shrink, on_grid, random_box
from data_pipeline.decode import Picture, mirror, oriented
from data_pipeline.order import Purpose, draws
from data_pipeline.policies import colours_change, recolour
from data_pipeline.resample import resample

LONG_SIDE_MAX = 4
"""Evaluation looks at the middle of longer strips than 4 : 1, so that a strip of one pixel cannot fill the memory."""


def train_view(image: np.ndarray, *, augment: AugmentConfig, image_size: int, seed: int, position: int) -> np.ndarray:
    """Random resized crop, flip and colours: image_size,image_size,3."""
    view = np.empty((image_size, image_size, 3), np.uint8)
    _fill_train(view, Picture(image), orientation=1, augment=augment, seed=seed, position=position)
    return view


def eval_view(image: np.ndarray, *, augment: AugmentConfig, image_size: int) -> np.ndarray:
    """The short side resized to round(image_size / eval_crop), the centre cut out: image_size,image_size,3."""
    return _eval_view(Picture(image), augment=augment, image_size=image_size)


def fill_train(
    out_HWC: np.ndarray, content: bytes, *, orientation: int, augment: AugmentConfig, seed: int, position: int
) -> None:
    """Decode an encoded image and put its training view into `out_HWC`. Raises BadImage."""
    _fill_train(out_HWC, Picture(content), orientation=orientation, augment=augment, seed=seed, position=position)


def fill_eval(out_HWC: np.ndarray, content: bytes, *, orientation: int, augment: AugmentConfig) -> None:
    """Decode an encoded image and put its evaluation view into `out_HWC`. Raises BadImage."""
    out_HWC[:] = oriented(_eval_view(Picture(content), augment=augment, image_size=len(out_HWC)), orientation)


def _fill_train(
    out_HWC: np.ndarray, picture: Picture, *, orientation: int, augment: AugmentConfig, seed: int, position: int
) -> None:
    uniform = _uniform(seed, position, stream=0, count=4 * CROP_TRIES + 1)
    is_flipped = float(uniform[0]) < augment.flip
    box = random_box(picture.height, picture.width, augment=augment, tries=uniform[1:].reshape(CROP_TRIES, 4))
    size = len(out_HWC)
    shrink = decoding_shrink(box, size=size) if picture.is_scalable else 1
    region = picture.crop(*on_grid(box, shrink), shrink=shrink)
    if is_flipped or orientation != 1:
        view = np.empty((size, size, 3), np.uint8)
        resample(region, view)
        if orientation != 1:
            view = np.ascontiguousarray(oriented(view, orientation))
        if is_flipped:
            mirror(view, out_HWC)
        else:
            out_HWC[:] = view
    else:
        resample(region, out_HWC)
    if colours_change(augment):

        def more(stream: int, count: int) -> np.ndarray:
            return _uniform(seed, position, stream=stream, count=count)

        out_HWC[:] = recolour(out_HWC, augment=augment, uniform=more)


def _uniform(seed: int, position: int, *, stream: int, count: int) -> np.ndarray:
    """Numbers of [0, 1) that belong to (seed, position, stream)."""
    raw = draws(seed, Purpose.VIEW, (position, stream), count=count)
    return (raw >> np.uint64(11)) * 2.0**-53  # the 53 high bits: every double of [0, 1) alike


def _eval_view(picture: Picture, *, augment: AugmentConfig, image_size: int) -> np.ndarray:
    short = min(picture.height, picture.width)
    box = central_box(
        picture.height,
        picture.width,
        box_height=min(picture.height, LONG_SIDE_MAX * short),
        box_width=min(picture.width, LONG_SIDE_MAX * short),
    )
    image = picture.crop(*box)
    scale = round(image_size / augment.eval_crop) / short
    resized = np.empty((round(box.height * scale), round(box.width * scale), 3), np.uint8)
    resample(image, resized)
    middle = central_box(*resized.shape[:2], box_height=image_size, box_width=image_size)
    return resized[middle.top : middle.top + image_size, middle.left : middle.left + image_size]
