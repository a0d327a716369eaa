"""Stand-in."""

import numpy as np
from PIL import Image

from data_pipeline.config import AugmentConfig


def eval_view(image: np.ndarray, *, augment: AugmentConfig, image_size: int) -> np.ndarray:
    height, width = image.shape[:2]
    scale = round(image_size / augment.eval_crop) / min(height, width)
    resized = np.asarray(Image.fromarray(image).resize((round(width * scale), round(height * scale)), Image.Resampling.BOX))
    top, left = (resized.shape[0] - image_size) // 2, (resized.shape[1] - image_size) // 2
    return resized[top : top + image_size, left : left + image_size]
