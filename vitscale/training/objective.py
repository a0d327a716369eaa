"""From a micro-batch to a loss: normalise and mix on the device, forward through the engine, cross-entropy."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.config import Config
from vitscale.model.config import ModelConfig
from vitscale.model.layers import normalise_pixels
from vitscale.training.losses import Losses, Targets, sigmoid_losses, softmax_losses, sparse_targets
from vitscale.training.mixing import Mixing, mix

# B batch   H height   W width   C channels, or classes behind logits_   M labels of an image, padded with -1


class Loss(NamedTuple):
    """Of a micro-batch, scalars on the device."""

    trained: Tensor
    """What the gradient is taken of."""
    reported: Tensor
    """The same targets, mixed where they are mixed, without label smoothing; no gradient."""


class Objective:
    """Softmax or sigmoid cross-entropy with label smoothing, computed in float32 from the logits.

    softmax  mean over the images that have a target (their weights, when mixed). An image whose labels are all masked has
             none: its weight is 0, and a micro-batch without any target has the loss 0.
    sigmoid  sum over the classes, mean over all images: where labels are masked, the other classes are wrong all the same.
    Micro-batches weigh the same among each other, also where some hold images without a target.
    """

    def __init__(
        self,
        *,
        model: ModelConfig,
        label_smoothing: float,
        device: torch.device,
        dtype: torch.dtype,
        kind: Literal["softmax", "sigmoid"] = "softmax",
        masked_classes: tuple[int, ...] = (),
        mixing: Mixing | None = None,
    ) -> None:
        self.model = model
        self.kind = kind
        self.label_smoothing = label_smoothing
        self.device = device
        self.dtype = dtype
        self.mixing = mixing
        self.masked_C: Tensor | None = None
        """bool, true for classes that take no part; None: all do."""
        if masked_classes:
            masked_C = torch.zeros(model.classes, dtype=torch.bool)
            masked_C[list(masked_classes)] = True
            self.masked_C = masked_C.to(device)

    def logits(self, forward: Callable[[Tensor], Tensor], images_BHWC: Tensor) -> Tensor:
        """logits_BC in float32 for uint8 images. `forward` is the engine itself, never its module (design.md 7)."""
        return forward(self._pixels(images_BHWC).to(self.dtype)).float()

    def _pixels(self, images_BHWC: Tensor) -> Tensor:
        """Normalised BCHW in float32 at least; images are mixed before they are rounded."""
        images_BHWC = images_BHWC.to(self.device, non_blocking=True)
        precise = torch.promote_types(self.dtype, torch.float32)
        return normalise_pixels(images_BHWC, self.model.pixel_mean, self.model.pixel_std, precise)

    def targets(self, labels_BM: Tensor) -> Targets:
        """What the labels of images stand for, on the device."""
        labels_BM = labels_BM.to(self.device, non_blocking=True)
        return sparse_targets(labels_BM, share=self.kind == "softmax", masked_C=self.masked_C)

    def losses(self, logits_BC: Tensor, targets: Targets) -> Losses:
        """Loss of each image, times its weight for softmax."""
        compute = softmax_losses if self.kind == "softmax" else sigmoid_losses
        return compute(logits_BC, targets, smoothing=self.label_smoothing, masked_C=self.masked_C)

    def __call__(
        self, forward: Callable[[Tensor], Tensor], images_BHWC: Tensor, labels_BM: Tensor, *, step: int, first_slot: int
    ) -> Loss:
        """Loss of a micro-batch of training. `first_slot` is the slot of its first image in the global batch of `step`."""
        if self.kind == "softmax" and labels_BM.shape[1] == 1 and self.mixing is None and self._is_plain:
            # torch's own mean, which the golden losses were written with: it adds in another order.
            logits_BC = self.logits(forward, images_BHWC)
            loss = F.cross_entropy(logits_BC, labels_BM[:, 0].to(self.device, non_blocking=True))
            return Loss(loss, loss.detach())
        targets = self.targets(labels_BM)
        images_BCHW = self._pixels(images_BHWC)
        if self.mixing is not None:
            images_BCHW, targets = mix(images_BCHW, targets, self.mixing, step=step, first_slot=first_slot)
        losses = self.losses(forward(images_BCHW.to(self.dtype)).float(), targets)
        if self.kind == "sigmoid":
            return Loss(losses.trained_B.mean(), losses.reported_B.mean())
        weight = targets.weights_BK.sum()
        weight = torch.where(weight > 0, weight, 1.0)
        return Loss(losses.trained_B.sum() / weight, losses.reported_B.sum() / weight)

    @property
    def _is_plain(self) -> bool:
        return self.label_smoothing == 0 and self.masked_C is None


def objective_of(config: Config, *, device: torch.device, dtype: torch.dtype) -> Objective:
    """The objective of a run; `dtype` is what the engine's forward pass wants its images in."""
    train = config.train
    is_mixed = train.mixup > 0 or train.cutmix > 0
    return Objective(
        model=config.model,
        label_smoothing=train.label_smoothing,
        device=device,
        dtype=dtype,
        kind=train.objective,
        masked_classes=train.masked_classes,
        mixing=Mixing(mixup=train.mixup, cutmix=train.cutmix, group=train.mix_group, seed=train.seed) if is_mixed else None,
    )
