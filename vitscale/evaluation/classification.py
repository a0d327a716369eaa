"""Top-1, top-5 and cross-entropy over a whole dataset, every image counted exactly once on any number of ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# B batch   H height   W width   C classes behind logits_, channels behind images_


class EvalBatch(Protocol):
    """What an evaluation stream yields."""

    @property
    def images_BHWC(self) -> Tensor: ...

    @property
    def labels_B(self) -> Tensor: ...

    @property
    def counted_B(self) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores over all counted images."""

    images: int
    top1: float
    """Share of images, 0..1, whose label has the largest logit."""
    top5: float
    loss: float
    """Mean cross-entropy, without label smoothing."""
    averages: "Mapping[float, Scores]" = field(default_factory=dict)
    """During training: what the moving averages of the weights score on the same images, by decay."""

    def as_record(self) -> dict[str, Any]:
        record: dict[str, Any] = {"images": self.images, "top1": self.top1, "top5": self.top5, "loss": self.loss}
        if self.averages:
            record["ema"] = {str(decay): scores.as_record() for decay, scores in self.averages.items()}
        return record


@torch.no_grad()
def classify(
    logits_of: Callable[[Tensor], Tensor],
    batches: Iterable[EvalBatch],
    *,
    sum_over_ranks: Callable[[Sequence[float]], list[float]],
) -> Scores:
    """Score the batches of this rank and add up over the ranks.

    `logits_of` takes images_BHWC (uint8) and gives logits_BC in float32; every rank must see the same number of batches,
    because at ZeRO stage 3 a forward is collective. Counts are added as integers in float64: exact up to 2^53 images.
    """
    images = top1 = top5 = 0
    loss = 0.0
    for batch in batches:
        logits_BC = logits_of(batch.images_BHWC)
        labels_B = batch.labels_B.to(logits_BC.device)
        counted_B = batch.counted_B.to(logits_BC.device)
        best_BK = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices
        hits_BK = (best_BK == labels_B[:, None]) & counted_B[:, None]
        images += int(counted_B.sum())
        top1 += int(hits_BK[:, 0].sum())
        top5 += int(hits_BK.sum())
        losses_B = F.cross_entropy(logits_BC, labels_B.clamp(min=0), reduction="none").double()
        loss += float((losses_B * counted_B).sum())
    images_all, top1_all, top5_all, loss_all = sum_over_ranks([images, top1, top5, loss])
    return Scores(images=round(images_all), top1=top1_all / images_all, top5=top5_all / images_all, loss=loss_all / images_all)
