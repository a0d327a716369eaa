"""Cross-entropy per image from float32 logits and sparse targets: nothing of the size B x C is built to say what is right.

Both losses are linear in the target, so a target is a list of classes with weights that add up, and label smoothing s is
(1 - s) target + s/C (Szegedy et al. 2016; for sigmoid the same numbers as timm's BinaryCrossEntropy).

B images   C classes   M labels of an image, padded with -1   K entries of a sparse target (M, or 2M when images are mixed)
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 22
"""Largest temporary of the sigmoid loss: whole rows of logits, 16 MiB of float32 (at least one row)."""


class Targets(NamedTuple):
    """target_Bc = sum of weights_BK where labels_BK is c."""

    labels_BK: Tensor
    """int64 within 0..C-1; where the weight is 0 it means nothing."""
    weights_BK: Tensor
    """float32."""


class Losses(NamedTuple):
    """Loss of each image, float32."""

    trained_B: Tensor
    """With label smoothing: what gradients are taken of."""
    reported_B: Tensor
    """Without; no gradient."""


def sparse_targets(labels_BM: Tensor, *, share: bool, masked_C: Tensor | None) -> Targets:
    """The target of each image: weight 1 for each of its labels, or 1 shared equally among them.

    A label named twice counts once, and a masked class never: an image whose labels are all masked has weight 0.
    """
    counts_BM = labels_BM >= 0
    labels_BM = labels_BM.clamp(min=0)
    if labels_BM.shape[1] > 1:
        same_BMM = (labels_BM[:, :, None] == labels_BM[:, None, :]) & counts_BM[:, None, :]
        counts_BM = counts_BM & ~same_BMM.tril(-1).any(dim=2)
    if masked_C is not None:
        counts_BM = counts_BM & ~masked_C[labels_BM]
    weights_BM = counts_BM.float()
    if share and labels_BM.shape[1] > 1:
        weights_BM = weights_BM / weights_BM.sum(dim=1, keepdim=True).clamp(min=1)
    return Targets(labels_BM, weights_BM)


def softmax_losses(logits_BC: Tensor, targets: Targets, *, smoothing: float, masked_C: Tensor | None) -> Losses:
    """- sum_c target_c log softmax(x)_c. Masked classes take no part: their probability is 0, and C counts the others.

    The loss of an image is multiplied by the sum of its weights; without any it is 0, and so is its gradient.
    """
    if masked_C is not None:
        logits_BC = logits_BC.masked_fill(masked_C, -torch.inf)
    logp_BC = F.log_softmax(logits_BC, dim=1)
    labels_BK, weights_BK = targets
    taken_BK = torch.where(weights_BK > 0, logp_BC.gather(1, labels_BK), 0.0)  # a masked class gives 0, not 0 times infinity
    plain_B = -(weights_BK * taken_BK).sum(dim=1)
    if smoothing == 0:
        return Losses(plain_B, plain_B.detach())
    if masked_C is not None:
        logp_BC = logp_BC.masked_fill(masked_C, 0.0)
    uniform_B = -weights_BK.sum(dim=1) * logp_BC.sum(dim=1) / _classes(logits_BC, masked_C)
    return Losses((1 - smoothing) * plain_B + smoothing * uniform_B, plain_B.detach())


def sigmoid_losses(logits_BC: Tensor, targets: Targets, *, smoothing: float, masked_C: Tensor | None) -> Losses:
    """sum_c [softplus(x_c) - target_c x_c]: binary cross-entropy of every class that is not masked, summed (Beyer et al. 2020).

    Beside the logits, which autograd keeps, the forward pass needs temporaries of CHUNK_ELEMENTS, and the backward
    pass one tensor of B x C: the gradient itself.
    """
    return Losses(*_SigmoidLosses.apply(logits_BC, *targets, smoothing, masked_C))


class _SigmoidLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_BC: Tensor, labels_BK: Tensor, weights_BK: Tensor, smoothing: float, masked_C: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        plain_B = torch.empty(logits_BC.shape[0], dtype=logits_BC.dtype, device=logits_BC.device)
        all_B = torch.empty_like(plain_B)
        rows = max(1, CHUNK_ELEMENTS // logits_BC.shape[1])
        for first in range(0, logits_BC.shape[0], rows):
            part = slice(first, first + rows)
            x_bC, labels_bK = logits_BC[part], labels_BK[part]
            # max(x, 0) - t x is exact for t = 1: summing softplus first would drown a small loss in rounding.
            terms_bC = x_bC.clamp(min=0)
            terms_bC.scatter_add_(1, labels_bK, -weights_BK[part] * x_bC.gather(1, labels_bK))
            terms_bC += x_bC.abs().neg_().exp_().log1p_()
            plain_B[part] = _sum_of_classes(terms_bC, masked_C)
            if smoothing:
                all_B[part] = _sum_of_classes(terms_bC.copy_(x_bC), masked_C)
        ctx.save_for_backward(logits_BC, labels_BK, weights_BK, masked_C)
        ctx.smoothing = smoothing
        if not smoothing:
            trained_B, plain_B = plain_B, plain_B.clone()
        else:
            right_B = (weights_BK * logits_BC.gather(1, labels_BK)).sum(dim=1)
            trained_B = plain_B + smoothing * (right_B - all_B / _classes(logits_BC, masked_C))
        ctx.mark_non_differentiable(plain_B)
        return trained_B, plain_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_BC, labels_BK, weights_BK, masked_C = ctx.saved_tensors
        gradient_BC = torch.sigmoid(logits_BC)
        if ctx.smoothing:
            gradient_BC -= ctx.smoothing / _classes(logits_BC, masked_C)
        gradient_BC.scatter_add_(1, labels_BK, (ctx.smoothing - 1) * weights_BK)
        if masked_C is not None:
            gradient_BC.masked_fill_(masked_C, 0.0)
        return gradient_BC.mul_(grad_B[:, None]), None, None, None, None


def _sum_of_classes(terms_bC: Tensor, masked_C: Tensor | None) -> Tensor:
    """Sum over the classes that take part; overwrites the terms of the others."""
    return (terms_bC if masked_C is None else terms_bC.masked_fill_(masked_C, 0.0)).sum(dim=1)


def _classes(logits_BC: Tensor, masked_C: Tensor | None) -> int | Tensor:
    """How many classes take part."""
    return logits_BC.shape[1] if masked_C is None else (~masked_C).sum()
