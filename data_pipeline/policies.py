"""What happens to the colours of a training view: RandAugment, TrivialAugment, 3-Augment, colour jitter, random erasing.

They follow the crop and the flip in this order, each with draws of its own, so that switching one on changes no other.
Ranges are those of torchvision (transforms/autoaugment.py), which are those of the papers:
RandAugment        Cubuk et al. 2020, arXiv 1909.13719: some operations of one strength, one after another
TrivialAugment     Mueller and Hutter 2021, arXiv 2103.10158: one operation of random strength, wide ranges
3-Augment          Touvron et al. 2022 (DeiT III), arXiv 2204.07118: gray, solarize or blur, each as often
colour jitter      Howard 2013, arXiv 1312.5402; brightness, contrast and saturation in random order
random erasing     Zhong et al. 2017, arXiv 1708.04896
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from data_pipeline import colour
from data_pipeline.config import AugmentConfig
from data_pipeline.crops import CROP_TRIES, Box, erased_box

MAGNITUDES = 31
"""Steps of strength, 0 to 30."""

_POLICY, _JITTER, _ERASE, _NOISE = 1, 2, 3, 4  # streams of draws; the crop has stream 0. The values are for ever.
_BLUR_SIGMA_MIN, _BLUR_SIGMA_MAX = 0.1, 2.0  # DeiT III, augment.py


class Uniform(Protocol):
    """Numbers of [0, 1) that belong to one position: stream number, how many."""

    def __call__(self, stream: int, count: int) -> np.ndarray: ...


def colours_change(augment: AugmentConfig) -> bool:
    """Whether anything here is switched on."""
    return augment.policy != "none" or augment.colour_jitter > 0 or augment.hue_jitter > 0 or augment.erase > 0


def recolour(image: np.ndarray, *, augment: AugmentConfig, uniform: Uniform) -> np.ndarray:
    """Everything the settings ask for, on one view."""
    if augment.policy == "randaugment":
        draws = iter(uniform(_POLICY, 2 * augment.randaugment_ops).tolist())
        for draw, sign_draw in zip(draws, draws, strict=True):
            name = _NAMES[int(draw * len(_NAMES))]
            image = apply(image, name, magnitude=augment.randaugment_magnitude, is_negative=sign_draw < 0.5, is_wide=False)
    elif augment.policy == "trivialaugment":
        draw, strength, sign_draw = uniform(_POLICY, 3).tolist()
        name = _NAMES[int(draw * len(_NAMES))]
        image = apply(image, name, magnitude=int(strength * MAGNITUDES), is_negative=sign_draw < 0.5, is_wide=True)
    elif augment.policy == "3augment":
        image = _three(image, *uniform(_POLICY, 2).tolist())
    if augment.colour_jitter > 0 or augment.hue_jitter > 0:
        image = _jitter(image, augment=augment, draws=uniform(_JITTER, 8))
    if augment.erase > 0:
        probability, *draws = uniform(_ERASE, 1 + 4 * CROP_TRIES).tolist()
        box = erased_box(*image.shape[:2], draws=draws) if probability < augment.erase else None
        if box is not None:
            image = _erased(image, box, augment=augment, uniform=uniform)
    return image


def apply(image: np.ndarray, name: str, *, magnitude: int, is_negative: bool, is_wide: bool) -> np.ndarray:
    """One operation of RandAugment or (wide) TrivialAugment at strength `magnitude` of 0 .. 30."""
    share = magnitude / (MAGNITUDES - 1)
    operation, narrow_max, wide_max = _OPERATIONS[name]
    sign = -1.0 if is_negative else 1.0
    most = wide_max if is_wide else narrow_max
    if name.startswith("translate") and not is_wide:
        most *= image.shape[1 if name.endswith("x") else 0]
    return operation(image, sign * most * share, share)


def _erased(image: np.ndarray, box: Box, *, augment: AugmentConfig, uniform: Uniform) -> np.ndarray:
    shape = (box.height, box.width, 3)
    image = image.copy()
    inside = image[box.top : box.top + box.height, box.left : box.left + box.width]
    if augment.erase_with == "noise":
        inside[:] = (uniform(_NOISE, box.height * box.width * 3) * 256).astype(np.uint8).reshape(shape)
    else:
        inside[:] = 0
    return image


def _three(image: np.ndarray, choice: float, strength: float) -> np.ndarray:
    if choice < 1 / 3:
        return colour.gray(image)
    if choice < 2 / 3:
        return colour.solarize(image, 128)
    return colour.blur(image, _BLUR_SIGMA_MIN + (_BLUR_SIGMA_MAX - _BLUR_SIGMA_MIN) * strength)


def _jitter(image: np.ndarray, *, augment: AugmentConfig, draws: np.ndarray) -> np.ndarray:
    order = np.argsort(draws[:4], kind="stable").tolist()
    low, high = max(0.0, 1 - augment.colour_jitter), 1 + augment.colour_jitter
    for number in order:
        draw = float(draws[4 + number])
        if number == 3:
            if augment.hue_jitter > 0:
                image = colour.hue(image, augment.hue_jitter * (2 * draw - 1))
        elif augment.colour_jitter > 0:
            image = (colour.brightness, colour.contrast, colour.saturation)[number](image, low + (high - low) * draw)
    return image


_Operation = Callable[[np.ndarray, float, float], np.ndarray]


def _blend(operation: Callable[[np.ndarray, float], np.ndarray]) -> _Operation:
    return lambda image, signed, _: operation(image, 1 + signed)


def _move(operation: Callable[[np.ndarray, float], np.ndarray]) -> _Operation:
    return lambda image, signed, _: operation(image, signed)


# Name: (operation of (image, signed strength, share of the range), largest strength, largest strength of TrivialAugment)
_OPERATIONS: dict[str, tuple[_Operation, float, float]] = {
    "identity": (lambda image, signed, share: image, 0, 0),
    "shear_x": (_move(colour.shear_x), 0.3, 0.99),
    "shear_y": (_move(colour.shear_y), 0.3, 0.99),
    "translate_x": (_move(colour.translate_x), 150 / 331, 32),
    "translate_y": (_move(colour.translate_y), 150 / 331, 32),
    "rotate": (_move(colour.rotate), 30, 135),
    "brightness": (_blend(colour.brightness), 0.9, 0.99),
    "saturation": (_blend(colour.saturation), 0.9, 0.99),
    "contrast": (_blend(colour.contrast), 0.9, 0.99),
    "sharpness": (_blend(colour.sharpness), 0.9, 0.99),
    "posterize": (lambda image, signed, share: colour.posterize(image, 8 - round(abs(signed))), 4, 6),
    "solarize": (lambda image, signed, share: colour.solarize(image, 255 * (1 - share)), 1, 1),
    "auto_contrast": (lambda image, signed, share: colour.auto_contrast(image), 0, 0),
    "equalize": (lambda image, signed, share: colour.equalize(image), 0, 0),
}
_NAMES = tuple(_OPERATIONS)


def operation_names() -> Iterator[str]:
    """The fourteen operations, in the order in which they are drawn."""
    return iter(_NAMES)
