"""Memory of the sigmoid loss at 1024 images and 29,593 classes (JFT-3B), sparse and dense, beside the logits.

    python -m tests.measure.memory_of_sigmoid_loss

Resident memory of a fresh process each, highest value over forward and backward less that with the logits alone.
"""

import multiprocessing
import resource

import torch
import torch.nn.functional as F

from vitscale.training.losses import sigmoid_losses, sparse_targets

B, C, M = 1024, 29_593, 5


def sparse(x_BC: torch.Tensor, labels_BM: torch.Tensor) -> torch.Tensor:
    targets = sparse_targets(labels_BM, share=False, masked_C=None)
    return sigmoid_losses(x_BC, targets, smoothing=0.0, masked_C=None).trained_B.mean()


def dense(x_BC: torch.Tensor, labels_BM: torch.Tensor) -> torch.Tensor:
    target_BC = torch.zeros_like(x_BC).scatter_(1, labels_BM, 1.0)
    return F.binary_cross_entropy_with_logits(x_BC, target_BC, reduction="sum") / B


def measure(loss_of) -> float:
    """Bytes."""
    torch.set_num_threads(1)
    x_BC = torch.randn(B, C).requires_grad_()
    labels_BM = torch.randint(0, C, (B, M))
    small = torch.zeros(2, 3, requires_grad=True)
    loss_of(small, torch.zeros(2, M, dtype=torch.int64)).backward()  # what a first call loads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss_of(x_BC, labels_BM).backward()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main() -> None:
    matrix = 4 * B * C
    print(f"logits {matrix / 1e6:.0f} MB")
    for name, loss_of in (("sparse", sparse), ("dense", dense)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(measure, (loss_of,))
        print(f"{name}: {found / 1e6:.0f} MB above the logits = {found / matrix:.2f} times their size")


if __name__ == "__main__":
    main()
