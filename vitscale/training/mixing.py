"""Mixup and CutMix on the device, inside groups of G consecutive slots of the global batch.

Image i of a group is mixed with image G-1-i of it (timm pairs whole batches so; the middle one of an odd group stays as it
is). All images of a group share lambda and box. What a group draws is a pure function of (seed, step, group), its number
being slot // G: raw output of Philox4x64, a counter-based generator (Salmon et al. 2011) whose stream is fixed. So the
same images are mixed in the same way on any number of ranks and in any micro-batches that G divides.

mixup   lambda x_i + (1 - lambda) x_j, lambda ~ Beta(alpha, alpha)                        Zhang et al. 2018
CutMix  x_j inside a box of area 1 - lambda around a uniform centre, x_i outside of it; the box is clipped to the image
        and lambda becomes the share of x_i that is left                                  Yun et al. 2019; timm's rand_bbox
Targets are lambda t_i + (1 - lambda) t_j in both, for softmax and for sigmoid. The thresholding of mixed targets to 0 and 1
that DeiT III's binary cross-entropy uses (timm: bce_target_thresh) is not done.

B images of a micro-batch   n = B / G groups   C channels   H height   W width   K entries of a sparse target
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitscale.base.files import xxh3_64
from vitscale.training.losses import Targets

_WORDS = 8  # of 64 bits per group: two blocks of Philox4x64, six of them used


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Which of the two, how strong, and among how many images."""

    mixup: float
    """Alpha; 0: off."""
    cutmix: float
    """Alpha; 0: off. With both on, a group draws one of them at even odds."""
    group: int
    """G."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What the groups of a micro-batch do, on the host."""

    lambda_n: np.ndarray
    """Weight of x_i in the target, after clipping."""
    blend_n: np.ndarray
    """Weight of x_i in every pixel: lambda of mixup, 1 of CutMix."""
    box_n4: np.ndarray
    """int64: top, bottom, left, right, half-open; empty for mixup."""


def draw(mixing: Mixing, *, step: int, first_group: int, groups: int, height: int, width: int) -> Draws:
    """What groups first_group .. first_group + groups - 1 of a step do with images of height x width pixels."""
    key = np.array([xxh3_64(f"mixing {mixing.seed}".encode()), step], np.uint64)
    counter = np.array([first_group * _WORDS // 4, 0, 0, 0], np.uint64)  # one count for every four words
    raw_nw = np.random.Philox(key=key, counter=counter).random_raw(groups * _WORDS).reshape(groups, _WORDS)
    which_n, side_n, u_n, v_n, row_n, column_n, *_ = ((raw_nw >> 11).astype(np.float64) + 0.5).T / 2**53
    if mixing.mixup and mixing.cutmix:
        is_cutmix_n = which_n < 0.5
    else:
        is_cutmix_n = np.full(groups, bool(mixing.cutmix))
    alpha_n = np.where(is_cutmix_n, mixing.cutmix, mixing.mixup)
    lambda_n = _symmetric_beta(alpha_n, side_n, u_n, v_n)

    share_n = np.where(is_cutmix_n, np.sqrt(1 - lambda_n), 0.0)  # of each side
    bounds = []
    for side, centre_n in ((height, np.floor(row_n * height)), (width, np.floor(column_n * width))):
        half_n = np.floor(side * share_n) // 2
        bounds += [np.clip(centre_n - half_n, 0, side), np.clip(centre_n + half_n, 0, side)]
    top_n, bottom_n, left_n, right_n = bounds
    uncovered_n = 1 - (bottom_n - top_n) * (right_n - left_n) / (height * width)
    return Draws(
        lambda_n=np.where(is_cutmix_n, uncovered_n, lambda_n),
        blend_n=np.where(is_cutmix_n, 1.0, lambda_n),
        box_n4=np.stack(bounds, axis=1).astype(np.int64),
    )


def _symmetric_beta(alpha_n: np.ndarray, side_n: np.ndarray, u_n: np.ndarray, v_n: np.ndarray) -> np.ndarray:
    """Beta(alpha, alpha) from three uniform numbers, without rejection, for every alpha > 0.

    1/2 +- 1/(2 sqrt(1 + 1/((u^(-1/alpha) - 1) cos^2(2 pi v)))): Devroye 1996, Random variate generation in one line of code.
    """
    with np.errstate(over="ignore", divide="ignore"):  # infinity leads to lambda 0 or 1, and 0 to 1/2, as it should
        spread_n = np.expm1(-np.log(u_n) / alpha_n) * np.cos(2 * np.pi * v_n) ** 2
        distance_n = 0.5 / np.sqrt(1 + 1 / spread_n)
    return np.where(side_n < 0.5, 0.5 - distance_n, 0.5 + distance_n)


def mix(images_BCHW: Tensor, targets: Targets, mixing: Mixing, *, step: int, first_slot: int) -> tuple[Tensor, Targets]:
    """Mix a micro-batch whose first image has slot `first_slot` of its global batch; both stay as they were.

    `images_BCHW` are normalised, in float32. G divides the micro-batch and the slot.
    """
    B, C, H, W = images_BCHW.shape
    G = mixing.group
    assert B % G == 0 and first_slot % G == 0, (B, first_slot, G)
    drawn = draw(mixing, step=step, first_group=first_slot // G, groups=B // G, height=H, width=W)
    table_n6 = torch.from_numpy(np.concatenate([drawn.lambda_n[:, None], drawn.blend_n[:, None], drawn.box_n4], axis=1))
    lambda_n, blend_n, *box = table_n6.float().to(images_BCHW.device, non_blocking=True).T

    own = images_BCHW.view(B // G, G, C, H, W)
    other = own.flip(1)
    if mixing.mixup:
        own = torch.lerp(other, own, blend_n.view(-1, 1, 1, 1, 1))  # exactly x_i where the blend is 1
    if mixing.cutmix:
        top, bottom, left, right = (bound.view(-1, 1, 1, 1, 1) for bound in box)
        rows = torch.arange(H, device=images_BCHW.device).view(-1, 1)
        columns = torch.arange(W, device=images_BCHW.device)
        own = torch.where((rows >= top) & (rows < bottom) & (columns >= left) & (columns < right), other, own)

    def pairs(whole_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Of each image and of its partner, group by group."""
        own_nGK = whole_BK.view(B // G, G, -1)
        return own_nGK, own_nGK.flip(1)

    own_weights_nGK, other_weights_nGK = pairs(targets.weights_BK)
    share_n11 = lambda_n.view(-1, 1, 1)
    weights_nGK = torch.cat([share_n11 * own_weights_nGK, (1 - share_n11) * other_weights_nGK], dim=2)
    labels_nGK = torch.cat(pairs(targets.labels_BK), dim=2)
    return own.reshape(B, C, H, W), Targets(labels_nGK.flatten(0, 1), weights_nGK.flatten(0, 1))
