"""From a micro-batch to a loss: normalise on the device, forward through the engine, softmax cross-entropy."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.config import ModelConfig
from vitscale.model.layers import normalise_pixels

# B batch   H height   W width   C channels, or classes behind logits_


class Objective:
    """Softmax cross-entropy with label smoothing, computed in float32 from the logits."""

    def __init__(self, *, model: ModelConfig, label_smoothing: float, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model
        self.label_smoothing = label_smoothing
        self.device = device
        self.dtype = dtype

    def logits(self, forward: Callable[[Tensor], Tensor], images_BHWC: Tensor) -> Tensor:
        """logits_BC in float32 for uint8 images. `forward` is the engine itself, never its module (design.md 7)."""
        images_BHWC = images_BHWC.to(self.device, non_blocking=True)
        images_BCHW = normalise_pixels(images_BHWC, self.model.pixel_mean, self.model.pixel_std, self.dtype)
        return forward(images_BCHW).float()

    def __call__(self, forward: Callable[[Tensor], Tensor], images_BHWC: Tensor, labels_B: Tensor) -> Tensor:
        """Mean loss of the micro-batch, a scalar on the device."""
        logits_BC = self.logits(forward, images_BHWC)
        return F.cross_entropy(logits_BC, labels_B.to(self.device, non_blocking=True), label_smoothing=self.label_smoothing)
