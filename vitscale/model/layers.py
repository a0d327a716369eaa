"""The parts of a Vision Transformer that are not attention, and what turns pixels into its input.

B batch   H, W pixels   C channels   P patch side   N patches or tokens   D width
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscale.model.attention import Attention


def normalise_pixels(images_BHWC_u8: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """(pixel/255 - mean) / std per channel, on the device of the images; contiguous BCHW of `dtype`.

    Computed in float32 (float64 when asked for), then rounded once.
    """
    compute = torch.promote_types(dtype, torch.float32)
    mean_C11, std_C11 = _channel_constants(mean, std, compute, images_BHWC_u8.device)
    pixels_BCHW = images_BHWC_u8.permute(0, 3, 1, 2).to(compute, memory_format=torch.contiguous_format)
    return pixels_BCHW.div_(255).sub_(mean_C11).div_(std_C11).to(dtype)


@lru_cache(maxsize=16)
def _channel_constants(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    # Kept, because a copy from the host waits until the device has done everything queued before it.
    def constants(row: tuple[float, ...]) -> Tensor:
        return torch.tensor(row, dtype=dtype, device=device).view(-1, 1, 1)

    return constants(mean), constants(std)


def cut_patches(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """The N = HW/P^2 patches row by row, each flattened to a vector of length C P^2: BN(CPP).

    Inside a vector the channel varies slowest and the column fastest. That is the layout of a convolution kernel
    (D, C, P, P), so public weights fit our matrix E^T after `.reshape(D, -1)`.
    """
    B, C, H, W = images_BCHW.shape
    P = patch_size
    grid = images_BCHW.view(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5)  # B, rows, columns, C, P, P
    return grid.reshape(B, (H // P) * (W // P), C * P * P)


class PatchEmbed(nn.Module):
    """x_i = flatten(patch_i) E: BCHW -> BND. A matrix product, as the seed writes it, instead of a strided convolution."""

    def __init__(self, patch_size: int, channels: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(channels * patch_size**2, width, bias=bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.proj(cut_patches(images_BCHW, self.patch_size))


class FeedForward(nn.Module):
    """FFN(z) = GELU(z W_1 + b_1) W_2 + b_2 with the exact GELU, z Phi(z)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, z_BND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(z_BND)))


class Block(nn.Module):
    """One encoder layer, BND -> BND.

    post-norm (the seed)            Z' = LN1(Z + MSA(Z));   out = LN2(Z' + FFN(Z'))
    pre-norm  (ViT, public weights) Z' = Z + MSA(LN1(Z));   out = Z' + FFN(LN2(Z'))
    """

    def __init__(
        self, width: int, heads: int, *, hidden_width: int, post_norm: bool, projection_bias: bool, norm_eps: float
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads, bias=projection_bias)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = FeedForward(width, hidden_width)

    def forward(self, z_BND: Tensor) -> Tensor:
        if self.post_norm:
            z_BND = self.norm1(z_BND + self.attn(z_BND))
            return self.norm2(z_BND + self.mlp(z_BND))
        z_BND = z_BND + self.attn(self.norm1(z_BND))
        return z_BND + self.mlp(self.norm2(z_BND))
