"""AdamW and its schedule. The learning rate of a step is a pure function of the step: nothing to save, nothing to restore."""

import math

import torch
from torch import nn

from vitscale.config import OptimConfig
from vitscale.model.vit import decays


def lr_at(step: int, *, optim: OptimConfig, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of update number `step` (0-based): linear warm-up, then a cosine to `end_lr` (Loshchilov & Hutter 2017).

    The first update already has peak_lr / warmup_steps: a step at rate 0 would be a wasted batch.
    """
    if step < warmup_steps:
        return optim.peak_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return optim.end_lr + (optim.peak_lr - optim.end_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(model: nn.Module, *, optim: OptimConfig) -> torch.optim.Optimizer:
    """torch AdamW (Loshchilov & Hutter 2019) in two groups: matrices decay, all else does not.

    AdamW is element-wise, so it may run on ZeRO's flat partitions.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if decays(name, parameter) else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.peak_lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
