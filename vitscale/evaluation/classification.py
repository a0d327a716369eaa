"""Top-1, top-5 and cross-entropy over a whole dataset, every image counted exactly once on any number of ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from vitscale.training.objective import Objective

# B batch   H height   W width   C classes behind logits_, channels behind images_   M labels of an image, padded with -1
# K best classes


class EvalBatch(Protocol):
    """What an evaluation stream yields."""

    @property
    def images_BHWC(self) -> Tensor: ...

    @property
    def labels_BM(self) -> Tensor: ...

    @property
    def counted_B(self) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores over all counted images."""

    images: int
    top1: float
    """Share of images, 0..1, of whose labels one has the largest logit (several labels: Beyer et al. 2020, ImageNet-ReaL)."""
    top5: float
    """Share of images of whose labels one is among the five largest logits."""
    loss: float
    """Mean of the objective, without label smoothing, over the images with a label that is not masked."""
    averages: "Mapping[float, Scores]" = field(default_factory=dict)
    """During training: what the moving averages of the weights score on the same images, by decay."""

    def as_record(self) -> dict[str, Any]:
        record: dict[str, Any] = {"images": self.images, "top1": self.top1, "top5": self.top5, "loss": self.loss}
        if self.averages:
            record["ema"] = {str(decay): scores.as_record() for decay, scores in self.averages.items()}
        return record


@torch.no_grad()
def classify(
    objective: Objective,
    forward: Callable[[Tensor], Tensor],
    batches: Iterable[EvalBatch],
    *,
    sum_over_ranks: Callable[[Sequence[float]], list[float]],
) -> Scores:
    """Score the batches of this rank and add up over the ranks. A masked class is never predicted.

    `forward` takes normalised images_BCHW and gives logits_BC; every rank must see the same number of batches, because at
    ZeRO stage 3 a forward is collective. Counts are added as integers in float64: exact up to 2^53 images.
    """
    images = with_target = top1 = top5 = 0
    loss = 0.0
    for batch in batches:
        logits_BC = objective.logits(forward, batch.images_BHWC)
        labels_BM = batch.labels_BM.to(logits_BC.device)
        counted_B = batch.counted_B.to(logits_BC.device)
        targets = objective.targets(labels_BM)
        losses_B = objective.losses(logits_BC, targets).reported_B.double()
        has_target_B = counted_B & (targets.weights_BK > 0).any(dim=1)
        if objective.masked_C is not None:
            logits_BC = logits_BC.masked_fill(objective.masked_C, -torch.inf)
        best_BK = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1)
        is_label_BK = (best_BK.indices[:, :, None] == labels_BM[:, None, :]).any(dim=2)
        hits_BK = is_label_BK & (best_BK.values != -torch.inf) & counted_B[:, None]
        images += int(counted_B.sum())
        with_target += int(has_target_B.sum())
        top1 += int(hits_BK[:, 0].sum())
        top5 += int(hits_BK.any(dim=1).sum())
        loss += float((losses_B * has_target_B).sum())
    totals = sum_over_ranks([images, top1, top5, loss, with_target])
    images_all, top1_all, top5_all, loss_all, with_target_all = totals
    return Scores(
        images=round(images_all),
        top1=top1_all / images_all,
        top5=top5_all / images_all,
        loss=loss_all / max(1.0, with_target_all),
    )
