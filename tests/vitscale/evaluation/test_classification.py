"""What an evaluation counts: several labels, masked classes, padding, and the loss of the run's own objective."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.evaluation.classification import Scores, classify
from vitscale.model.config import ModelConfig
from vitscale.training.objective import Objective

CPU = torch.device("cpu")
CLASSES = 8


@dataclass
class Batch:
    images_BHWC: Tensor
    labels_BM: Tensor
    counted_B: Tensor


def scores(
    logits: Tensor, labels: list[list[int]], *, counted: Sequence[bool] | None = None, per_batch: int = 3, **settings
) -> Scores:
    """Of images whose logits are given, in batches of a few."""
    model = ModelConfig(image_size=4, patch_size=2, width=8, depth=1, heads=1, classes=CLASSES)
    objective = Objective(model=model, label_smoothing=0.0, device=CPU, dtype=torch.float32, **settings)
    counted_N = torch.tensor(counted if counted is not None else [True] * len(labels))
    labels_NM = torch.tensor(labels)
    parts = [slice(first, first + per_batch) for first in range(0, len(labels), per_batch)]
    batches = [Batch(torch.zeros(len(labels[p]), 4, 4, 3, dtype=torch.uint8), labels_NM[p], counted_N[p]) for p in parts]
    rows = iter([logits[p] for p in parts])
    return classify(objective, lambda images_BCHW: next(rows), batches, sum_over_ranks=list)


LOGITS = torch.randn(7, CLASSES, generator=torch.Generator().manual_seed(0)) * 3
ORDER = LOGITS.argsort(dim=1, descending=True).tolist()  # of each image, classes from the best on


def test_one_label_is_scored_as_torch_scores_it_bit_for_bit():
    labels = [row[0] if number % 2 else row[5] for number, row in enumerate(ORDER)]  # every other one is right
    found = scores(LOGITS, [[label] for label in labels], per_batch=7)
    losses_N = F.cross_entropy(LOGITS, torch.tensor(labels), reduction="none").double()
    assert found == Scores(images=7, top1=3 / 7, top5=3 / 7, loss=float(losses_N.sum()) / 7)


def test_an_image_is_right_when_its_best_class_is_one_of_its_labels():
    labels = [
        [ORDER[0][6], ORDER[0][0]],  # the second label is the best class
        [ORDER[1][0], -1],
        [ORDER[2][4], ORDER[2][3]],  # both among the five best: one hit
        [ORDER[3][7], ORDER[3][5]],  # none among them
    ]
    found = scores(LOGITS[:4], labels)
    assert (found.images, found.top1, found.top5) == (4, 2 / 4, 3 / 4)
    log_p = F.log_softmax(LOGITS[:4], dim=1)
    of_each = [-sum(log_p[n, c] for c in row if c >= 0) / sum(c >= 0 for c in row) for n, row in enumerate(labels)]
    assert found.loss == pytest.approx(float(sum(of_each)) / 4, rel=1e-6)


def test_the_loss_of_a_sigmoid_run_is_its_sum_over_classes():
    labels = [[row[0], row[3]] for row in ORDER]
    target = torch.zeros(7, CLASSES).scatter_(1, torch.tensor(labels), 1.0)
    found = scores(LOGITS, labels, kind="sigmoid")
    expected = F.binary_cross_entropy_with_logits(LOGITS, target, reduction="sum").item() / 7
    assert found.loss == pytest.approx(expected, rel=1e-6) and found.top1 == 1.0


def test_a_masked_class_is_never_predicted():
    logits = torch.arange(CLASSES).float().expand(3, -1).clone()  # class 7 is the best, then 6, ...
    masked = (3, 4, 5, 6, 7)  # three classes are left: the five best would reach into the masked ones
    found = scores(logits, [[7], [2], [0]], masked_classes=masked)
    assert (found.images, found.top1, found.top5) == (3, 1 / 3, 2 / 3)
    # The image whose only label is masked has no loss; the others compete with three classes.
    log_sum = math.log(sum(math.exp(x) for x in range(3)))
    assert found.loss == pytest.approx(((log_sum - 2) + (log_sum - 0)) / 2, rel=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_padding_counts_for_nothing(kind):
    labels = [[row[0]] for row in ORDER]
    padded = torch.cat([LOGITS, torch.full((2, CLASSES), 50.0)])
    with_padding = scores(padded, [*labels, [-1], [-1]], counted=[True] * 7 + [False] * 2, kind=kind)
    assert with_padding == scores(LOGITS, labels, kind=kind)
