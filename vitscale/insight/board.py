"""Attention of a fixed set of images while a model trains: pictures and curves for TensorBoard.

A picture has a row per image: the image, the attention nearest to the head (mean over heads), rollout through all layers.
"""

import math
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor

from vitscale.insight.figures import overlay
from vitscale.insight.look import Look, look
from vitscale.insight.rollout import attention_rollout
from vitscale.model.layers import normalise_pixels
from vitscale.model.vit import VisionTransformer
from vitscale.training.engine import Engine
from vitscale.training.metrics import Metrics

IMAGES = 4
"""How many images are watched."""
PANEL_SIDE_MIN = 112


def attention_watcher(engine: Engine, images_BHWC: Tensor, *, metrics: Metrics | None) -> Callable[[int], None]:
    """A function of the step that looks at the present weights. Collective; only rank 0, which has `metrics`, computes maps.

    `images_BHWC` (uint8) are equal on all ranks. The engine is left in evaluation mode, as after an evaluation.
    """
    model = cast(VisionTransformer, engine.module)

    def watch(step: int) -> None:
        engine.eval()
        config = model.config
        images_BCHW = normalise_pixels(images_BHWC.to(engine.device), config.pixel_mean, config.pixel_std, engine.input_dtype)
        if metrics is None:
            with torch.no_grad():
                engine(images_BCHW)  # at ZeRO stage 3 every rank gives its part of the weights
            return
        seen = look(model, images_BCHW, forward=engine)
        metrics.log_attention(step, picture_of(images_BHWC.numpy(), seen), scalars_of(seen))

    return watch


def scalars_of(seen: Look) -> dict[str, float]:
    """Entropy, distance, largest logit and median norm per block; means over images and heads but for the logit, of which it
    is the largest. The first block is 1."""
    scalars: dict[str, float] = {}
    for number, (entropy_BH, distance_BH, logit_BH, norms_BN) in enumerate(
        zip(seen.entropy_BH, seen.distance_BH, seen.logit_BH, seen.norms_BN, strict=True), start=1
    ):
        scalars[f"entropy_nats/block_{number:02d}"] = float(entropy_BH.mean())
        scalars[f"distance_pixels/block_{number:02d}"] = float(distance_BH.mean())
        scalars[f"largest_logit/block_{number:02d}"] = float(logit_BH.max())
        scalars[f"patch_norm/block_{number:02d}"] = float(norms_BN[:, seen.prefix :].median())
    return scalars


def picture_of(images_BHWC: np.ndarray, seen: Look) -> np.ndarray:
    """All images below each other: uint8 H,W,3 on white."""
    grid, gap = (seen.rows, seen.columns), 4
    nearest_BN = seen.last_BHN.mean(dim=1).numpy()
    rollout_BN = attention_rollout(seen.start_BN, seen.mean_BNN).numpy()
    lines = []
    for image_HWC, nearest_N, rollout_N in zip(images_BHWC, nearest_BN, rollout_BN, strict=True):
        times = math.ceil(PANEL_SIDE_MIN / image_HWC.shape[0])
        large_HWC = image_HWC.repeat(times, 0).repeat(times, 1)
        overlays = [(255 * overlay(large_HWC, row_N, grid)).round().astype(np.uint8) for row_N in (nearest_N, rollout_N)]
        white = np.full((large_HWC.shape[0], gap, 3), 255, np.uint8)
        lines.append(np.concatenate([large_HWC, white, overlays[0], white, overlays[1]], axis=1))
        lines.append(np.full((gap, lines[0].shape[1], 3), 255, np.uint8))
    return np.concatenate(lines[:-1])
