"""Position encodings E_pos, one row per token: row 0 is the class token, the patches follow row by row.

N tokens   D width   grid: patches per side of the (square) image
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def sinusoidal_positions(tokens: int, width: int) -> Tensor:
    """The fixed encoding of Vaswani et al. 2017 (section 3.5) over positions 0 ... tokens-1: 1ND in float64.

    PE(pos, 2i) = sin(pos / 10000^(2i/D)),  PE(pos, 2i+1) = cos(pos / 10000^(2i/D)). An odd D ends with a sine.
    """
    columns = np.arange(width)
    frequency_D = 10000.0 ** (-(columns // 2 * 2) / width)
    angle_ND = np.arange(tokens)[:, None] * frequency_D[None, :]
    return torch.from_numpy(np.where(columns % 2 == 0, np.sin(angle_ND), np.cos(angle_ND)))[None]


def resize_positions(pos_1ND: Tensor, from_grid: int, to_grid: int) -> Tensor:
    """Learned positions of a from_grid x from_grid image, carried over to another resolution of the same patches.

    The row of the class token is kept; the others are resampled as an image of D channels, bicubic and antialiased in
    float32 (timm's way; the original JAX code resamples linearly). Equal grids: the values come back untouched.
    """
    assert pos_1ND.shape[:2] == (1, 1 + from_grid**2), f"{tuple(pos_1ND.shape)} is no grid of {from_grid} with a class token"
    if from_grid == to_grid:
        return pos_1ND
    class_11D, patches_1ND = pos_1ND[:, :1], pos_1ND[:, 1:]
    D = pos_1ND.shape[2]
    grid_1DHW = patches_1ND.float().reshape(1, from_grid, from_grid, D).permute(0, 3, 1, 2)
    resized_1DHW = F.interpolate(grid_1DHW, size=(to_grid, to_grid), mode="bicubic", align_corners=False, antialias=True)
    resized_1ND = resized_1DHW.permute(0, 2, 3, 1).reshape(1, to_grid**2, D)
    return torch.cat([class_11D, resized_1ND.to(pos_1ND.dtype)], dim=1)
