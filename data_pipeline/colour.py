"""Operations on the colours and the geometry of a view, as Pillow and torchvision define them. H,W,3 uint8 to H,W,3 uint8.

A factor f blends: f x image + (1 - f) x something plain; 0 is plain, 1 the image, above 1 exaggerates.
"""

from collections.abc import Callable

import cv2
import numpy as np

FILL = 128
"""Grey for what comes in from outside the picture."""


def gray(image: np.ndarray) -> np.ndarray:
    """Three equal channels of luma."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black."""
    return _by_table(image, np.arange(256) * factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean luma."""
    mean = float(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean())
    return _by_table(image, np.arange(256) * factor + (1 - factor) * mean)


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the gray picture."""
    return cv2.addWeighted(image, factor, gray(image), 1 - factor, 0)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with a smoothed picture; the outermost pixels stay."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    blended = cv2.addWeighted(image, factor, cv2.filter2D(image, -1, kernel), 1 - factor, 0)
    out = image.copy()
    out[1:-1, 1:-1] = blended[1:-1, 1:-1]
    return out


def hue(image: np.ndarray, turn: float) -> np.ndarray:
    """Turn the colour circle by `turn` of its whole, -0.5 to 0.5."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)  # 256 hues: adding wraps around by itself
    hsv[:, :, 0] += np.uint8(round(turn * 256) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keep the highest bits of each value."""
    return image & np.uint8(256 - 2 ** (8 - bits))


def solarize(image: np.ndarray, threshold: float) -> np.ndarray:
    """Invert every value from the threshold on."""
    values = np.arange(256)
    return _by_table(image, np.where(values >= threshold, 255 - values, values))


def auto_contrast(image: np.ndarray) -> np.ndarray:
    """Stretch each channel to the full range."""
    return _by_channel(image, _stretch)


def equalize(image: np.ndarray) -> np.ndarray:
    """Make the histogram of each channel flat."""
    return _by_channel(image, _flatten)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur."""
    return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)


def shear_x(image: np.ndarray, share: float) -> np.ndarray:
    """Slide each row to the left by `share` of its distance from the upper edge."""
    return _affine(image, [[1, -share, -share / 2], [0, 1, 0]])


def shear_y(image: np.ndarray, share: float) -> np.ndarray:
    """Slide each column up by `share` of its distance from the left edge."""
    return _affine(image, [[1, 0, 0], [-share, 1, -share / 2]])


def translate_x(image: np.ndarray, pixels: float) -> np.ndarray:
    """Move to the right."""
    return _affine(image, [[1, 0, int(pixels)], [0, 1, 0]])


def translate_y(image: np.ndarray, pixels: float) -> np.ndarray:
    """Move downwards."""
    return _affine(image, [[1, 0, 0], [0, 1, int(pixels)]])


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Turn about the centre, against the clock."""
    height, width = image.shape[:2]
    return _affine(image, cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0))


def _affine(image: np.ndarray, forward: object) -> np.ndarray:
    height, width = image.shape[:2]
    matrix = np.asarray(forward, np.float64)
    return cv2.warpAffine(
        image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=(FILL,) * 3
    )


def _by_table(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    return cv2.LUT(image, np.clip(values, 0, 255).astype(np.uint8))


def _by_channel(image: np.ndarray, table_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    histograms = [cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64) for channel in range(3)]
    return cv2.LUT(image, np.dstack([table_of(histogram) for histogram in histograms]))


def _stretch(histogram: np.ndarray) -> np.ndarray:
    used = np.flatnonzero(histogram)
    low, high = int(used[0]), int(used[-1])
    values = np.arange(256)
    if low == high:
        return values.astype(np.uint8)
    return np.clip((values - low) * (255 / (high - low)), 0, 255).astype(np.uint8)


def _flatten(histogram: np.ndarray) -> np.ndarray:
    """Pillow's rule: steps of the cumulative histogram, the last used value left out of the count."""
    used = histogram[histogram > 0]
    step = int(histogram.sum() - used[-1]) // 255
    if len(used) <= 1 or step == 0:
        return np.arange(256, dtype=np.uint8)
    before = np.concatenate([[0], np.cumsum(histogram)[:-1]])
    return np.clip((before + step // 2) // step, 0, 255).astype(np.uint8)
