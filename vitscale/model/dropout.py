"""Dropout that keeps one byte per element for the backward pass, on every device."""

import torch
from torch import Tensor, nn


class Dropout(nn.Module):
    """In training sets a share `rate` of the elements to 0 and divides the others by 1 - rate (Srivastava et al. 2014).

    Draws from torch's global generator of the device, which recomputation sets back: the same elements fall again.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        assert 0 <= rate < 1
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        # What F.dropout calls on a GPU; on a CPU that one would keep its mask in the type of x.
        return torch.native_dropout(x, self.rate, True)[0]
