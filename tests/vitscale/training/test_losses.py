"""The sparse losses are the dense formulas, value and gradient, for several labels, weights, smoothing and masks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.training.losses import CHUNK_ELEMENTS, Losses, Targets, sigmoid_losses, softmax_losses, sparse_targets

B, C = 6, 11
LABELS_BM = torch.tensor([[3, -1, -1], [0, 10, -1], [4, 4, 7], [2, 5, 9], [7, -1, -1], [1, 6, -1]])
MASKED_C = torch.tensor([c in (2, 7) for c in range(C)])


def logits(seed: int = 0, classes: int = C, batch: int = B, scale: float = 3.0) -> Tensor:
    return (torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed)) * scale).requires_grad_()


def dense(targets: Targets, classes: int = C) -> Tensor:
    """target_BC in float64, by hand."""
    whole = torch.zeros(len(targets.labels_BK), classes, dtype=torch.float64)
    for row, (labels, weights) in enumerate(zip(targets.labels_BK.tolist(), targets.weights_BK.tolist(), strict=True)):
        for label, weight in zip(labels, weights, strict=True):
            whole[row, label] += weight
    return whole


def mixed(targets: Targets) -> Targets:
    """Every image mixed with the one before it at 0.7 to 0.3, as mixup gives it: a class may stand twice."""
    labels = torch.cat([targets.labels_BK, targets.labels_BK.roll(1, 0)], dim=1)
    return Targets(labels, torch.cat([0.7 * targets.weights_BK, 0.3 * targets.weights_BK.roll(1, 0)], dim=1))


def softmax_by_hand(x_BC: Tensor, target_BC: Tensor, smoothing: float, masked_C: Tensor | None) -> Tensor:
    taken = torch.ones(x_BC.shape[1], dtype=torch.bool) if masked_C is None else ~masked_C
    weight_B1 = target_BC.sum(1, keepdim=True)
    target_BC = (1 - smoothing) * target_BC + weight_B1 * smoothing / taken.sum()
    return -(target_BC[:, taken] * F.log_softmax(x_BC[:, taken], dim=1)).sum(1)


def sigmoid_by_hand(x_BC: Tensor, target_BC: Tensor, smoothing: float, masked_C: Tensor | None) -> Tensor:
    taken = torch.ones(x_BC.shape[1], dtype=torch.bool) if masked_C is None else ~masked_C
    target_BC = (1 - smoothing) * target_BC + smoothing / taken.sum()
    return F.binary_cross_entropy_with_logits(x_BC[:, taken], target_BC[:, taken], reduction="none").sum(1)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("masked_C", [None, MASKED_C], ids=["all", "masked"])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_sparse_equals_dense_value_and_gradient(kind, smoothing, masked_C, is_mixed):
    targets = sparse_targets(LABELS_BM, share=kind == "softmax", masked_C=masked_C)
    targets = mixed(targets) if is_mixed else targets
    compute, by_hand = {"softmax": (softmax_losses, softmax_by_hand), "sigmoid": (sigmoid_losses, sigmoid_by_hand)}[kind]
    x = logits()
    found: Losses = compute(x, targets, smoothing=smoothing, masked_C=masked_C)
    exact = x.detach().double().requires_grad_()
    expected = by_hand(exact, dense(targets), smoothing, masked_C)
    assert torch.allclose(found.trained_B.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.allclose(found.reported_B.double(), by_hand(exact, dense(targets), 0.0, masked_C), rtol=1e-6, atol=1e-6)
    weights_B = torch.linspace(0.5, 2, B)  # not all alike, as no mean would be
    (gradient,) = torch.autograd.grad((found.trained_B * weights_B).sum(), x)
    (right,) = torch.autograd.grad((expected * weights_B).sum(), exact)
    assert torch.allclose(gradient.double(), right, rtol=1e-5, atol=1e-6)
    if masked_C is not None:
        assert (gradient[:, masked_C] == 0).all()


def test_labels_become_targets_that_count_each_class_once():
    assert dense(sparse_targets(LABELS_BM, share=False, masked_C=None)).sum(1).tolist() == [1, 2, 2, 3, 1, 2]
    shared = dense(sparse_targets(LABELS_BM, share=True, masked_C=None))
    assert shared.sum(1).tolist() == pytest.approx([1] * 6) and shared[2, 4] == 0.5 and shared[2, 7] == 0.5
    masked = dense(sparse_targets(LABELS_BM, share=True, masked_C=MASKED_C))
    assert masked.sum(1).tolist() == pytest.approx([1, 1, 1, 1, 0, 1])  # the only label of the fifth is masked
    assert masked[3, 5] == 0.5 and masked[3, 2] == 0


def test_an_image_without_a_target_has_neither_loss_nor_gradient_under_softmax():
    x = logits()
    found = softmax_losses(x, sparse_targets(LABELS_BM, share=True, masked_C=MASKED_C), smoothing=0.1, masked_C=MASKED_C)
    found.trained_B.sum().backward()
    assert found.trained_B[4] == 0 and (x.grad[4] == 0).all() and x.grad.isfinite().all()


def test_the_largest_logits_give_finite_losses():
    x = torch.tensor([[500.0, -500.0, 0.0], [-500.0, 500.0, 0.0]], requires_grad=True)
    targets = sparse_targets(torch.tensor([[0], [0]]), share=False, masked_C=None)
    found = sigmoid_losses(x, targets, smoothing=0.0, masked_C=None).trained_B
    found.sum().backward()
    found = found.tolist()
    assert found[0] == pytest.approx(0.6931472) and found[1] == pytest.approx(1000.6931472) and x.grad.isfinite().all()


def test_thousands_of_classes_equal_the_dense_loss_within_a_millionth():
    """More than one chunk of rows; the head's biases start at -10."""
    batch, classes = 300, 29_593
    assert batch * classes > CHUNK_ELEMENTS
    x = (logits(3, classes, batch, scale=1.0).detach() - 10).requires_grad_()
    labels = torch.randint(-1, classes, (batch, 4), generator=torch.Generator().manual_seed(4))
    targets = sparse_targets(labels, share=False, masked_C=None)
    found = sigmoid_losses(x, targets, smoothing=0.0, masked_C=None).trained_B.mean()
    (gradient,) = torch.autograd.grad(found, x)
    exact = x.detach().double().requires_grad_()
    expected = F.binary_cross_entropy_with_logits(exact, dense(targets, classes), reduction="sum") / batch
    (right,) = torch.autograd.grad(expected, exact)
    print(
        f"relative difference {abs(found.item() / expected.item() - 1):.1e}, {(gradient - right).abs().max():.1e} of a gradient"
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (gradient - right).abs().max() < 1e-6 * right.abs().max()
