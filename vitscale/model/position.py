"""Position encodings E_pos, rotations of queries and keys, and how learned positions are carried to another grid.

Rows of a table are tokens: class token, registers, then the patches row by row. A fixed encoding is a function of the grid
that gives float64 and knows nothing of the model; `fixed_positions` is the table of all of them.

N tokens   D width   K columns of a head   R, C rows and columns of the grid of patches
"""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitscale.model.config import ModelConfig

ROTARY_BASE = 100.0
"""Ratio of the longest to the shortest period (DINOv3; Heo et al. 2024 use the same for axial rotations)."""


def sinusoidal_positions(tokens: int, width: int) -> Tensor:
    """The fixed encoding of Vaswani et al. 2017 (section 3.5) over positions 0 ... tokens-1: 1ND in float64.

    PE(pos, 2i) = sin(pos / 10000^(2i/D)),  PE(pos, 2i+1) = cos(pos / 10000^(2i/D)). An odd D ends with a sine.
    """
    columns = np.arange(width)
    frequency_D = 10000.0 ** (-(columns // 2 * 2) / width)
    angle_ND = np.arange(tokens)[:, None] * frequency_D[None, :]
    return torch.from_numpy(np.where(columns % 2 == 0, np.sin(angle_ND), np.cos(angle_ND)))[None]


def sincos2d_bv(rows: int, columns: int, width: int) -> Tensor:
    """big_vision and MoCo v3 (Chen et al. 2021): frequencies 10000^(-i / (D/4 - 1)), both ends of the range used."""
    return _sincos2d(rows, columns, np.arange(width // 4) / max(1, width // 4 - 1))


def sincos2d_mae(rows: int, columns: int, width: int) -> Tensor:
    """MAE (He et al. 2022): frequencies 10000^(-i / (D/4)), the lowest is never reached."""
    return _sincos2d(rows, columns, np.arange(width // 4) / (width / 4))


def _sincos2d(rows: int, columns: int, exponents: np.ndarray) -> Tensor:
    """sin x, cos x, sin y, cos y of the columns x and rows y, a quarter of D each: 1ND in float64."""
    y_N, x_N = _row_and_column(rows, columns)
    x, y = x_N[:, None] * 10000.0**-exponents, y_N[:, None] * 10000.0**-exponents
    return torch.from_numpy(np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1))[None]


def _row_and_column(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.meshgrid(np.arange(rows, dtype=np.float64), np.arange(columns, dtype=np.float64), indexing="ij")
    return y.reshape(-1), x.reshape(-1)


def rotary_angles(rows: int, columns: int, head_width: int) -> Tensor:
    """Angles of the patches for a rotation of every head: N(K/2) in float64; DINOv3 (Simeoni et al. 2025).

    Centres of patches are mapped to [-1, 1] on each axis, so another resolution covers the same range. The first K/4
    angles are 2 pi y / period, the others 2 pi x / period, with periods ROTARY_BASE^(2i / (K/2)).
    """
    y_N, x_N = _row_and_column(rows, columns)
    period = ROTARY_BASE ** (2 * np.arange(head_width // 4) / (head_width // 2))
    y_N, x_N = 2 * (y_N + 0.5) / rows - 1, 2 * (x_N + 0.5) / columns - 1
    return torch.from_numpy(2 * math.pi * np.concatenate([y_N[:, None] / period, x_N[:, None] / period], axis=1))


@lru_cache(maxsize=16)
def fixed_positions(config: ModelConfig, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """E_pos of a model whose positions are not learned: 1ND, computed in float64 and rounded once.

    `sinusoidal` counts tokens, prefix included; sincos2d has no rows for the prefix.
    """
    if config.position == "sinusoidal":
        table = sinusoidal_positions(config.prefix_tokens + rows * columns, config.width)
    elif config.position == "sincos2d_bv":
        table = sincos2d_bv(rows, columns, config.width)
    else:
        assert config.position == "sincos2d_mae", config.position
        table = sincos2d_mae(rows, columns, config.width)
    return table.to(device=device, dtype=dtype)


@lru_cache(maxsize=16)
def rotation(config: ModelConfig, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin) of every token in float32: NK each; class token and registers are not turned."""
    angles = rotary_angles(rows, columns, config.head_width).repeat(1, 2)
    angles = torch.cat([angles.new_zeros(config.prefix_tokens, config.head_width), angles])
    return angles.cos().float().to(device), angles.sin().float().to(device)


def rotate(x_BHNK: Tensor, cos_NK: Tensor, sin_NK: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + K/2}) of every token by its angles; computed in float32 at least."""
    first, second = x_BHNK.chunk(2, dim=-1)
    turned_BHNK = x_BHNK * cos_NK + torch.cat([-second, first], dim=-1) * sin_NK
    return turned_BHNK.to(x_BHNK.dtype)


# ---- another grid ---------------------------------------------------------------------------------------------------


def resize_positions(
    pos_1ND: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], *, prefix: int, dialect: str
) -> Tensor:
    """Learned positions of one grid of patches (rows, columns), carried over to another one of the same patches.

    The first `prefix` rows are kept; the others are resampled as an image of D channels in float32. Equal grids: the values
    come back untouched. Dialects:
    bicubic_antialias  timm: cubic (a = -0.5), smoothed where the grid shrinks
    bicubic            Hugging Face, MAE, DeiT: cubic (a = -0.75), no smoothing
    zoom_linear        vision_transformer and big_vision: linear with the corners on the corners (scipy zoom, order 1)
    """
    assert pos_1ND.shape[:2] == (1, prefix + old_grid[0] * old_grid[1]), f"{tuple(pos_1ND.shape)} is not {prefix} + {old_grid}"
    if old_grid == new_grid:
        return pos_1ND
    D = pos_1ND.shape[2]
    grid_1DRC = pos_1ND[:, prefix:].float().reshape(1, *old_grid, D).permute(0, 3, 1, 2)
    if dialect == "zoom_linear":
        resized_1DRC = F.interpolate(grid_1DRC, size=new_grid, mode="bilinear", align_corners=True)
    else:
        assert dialect in ("bicubic", "bicubic_antialias"), dialect
        is_smoothed = dialect == "bicubic_antialias"
        resized_1DRC = F.interpolate(grid_1DRC, size=new_grid, mode="bicubic", align_corners=False, antialias=is_smoothed)
    resized_1ND = resized_1DRC.permute(0, 2, 3, 1).reshape(1, new_grid[0] * new_grid[1], D)
    return torch.cat([pos_1ND[:, :prefix], resized_1ND.to(pos_1ND.dtype)], dim=1)


def resize_patch_kernel(kernel_DCPP: Tensor, patch_size: int, *, dialect: str) -> Tensor:
    """The patch projection for patches of another size: pi-resize (Beyer et al. 2023, FlexiViT, section 3.4).

    The new kernel gives, for a resized patch, what the old one gives for the patch itself, as nearly as possible: the
    pseudo-inverse of the transposed resize matrix times the old kernel. Not reversible. Dialects name the resize:
    pi_bicubic   timm: cubic with antialiasing        pi_bilinear  big_vision: linear without
    """
    D, C, P, _ = kernel_DCPP.shape
    if patch_size == P:
        return kernel_DCPP
    basis_11PP = torch.eye(P * P, dtype=torch.float32).reshape(P * P, 1, P, P)
    size = (patch_size, patch_size)
    if dialect == "pi_bicubic":
        resized = F.interpolate(basis_11PP, size=size, mode="bicubic", align_corners=False, antialias=True)
    else:
        assert dialect == "pi_bilinear", dialect
        resized = F.interpolate(basis_11PP, size=size, mode="bilinear", align_corners=False, antialias=False)
    resize_old_new = resized.reshape(P * P, -1).double()
    kernel = kernel_DCPP.reshape(D * C, P * P).double() @ torch.linalg.pinv(resize_old_new).T
    return kernel.to(kernel_DCPP.dtype).reshape(D, C, patch_size, patch_size)
