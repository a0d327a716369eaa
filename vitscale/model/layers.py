"""The parts of a Vision Transformer that are not attention, and what turns pixels into its input.

B batch   H, W pixels   C channels   P patch side   N patches or tokens   D width
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscale.model.attention import Attention
from vitscale.model.config import ModelConfig
from vitscale.model.dropout import Dropout
from vitscale.model.norms import make_norm


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
    """FFN(z) = f(z W_1 + b_1) W_2 + b_2 with f an activation of ModelConfig.activation; BND -> BND.

    gelu       z Phi(z), the seed's
    gelu_tanh  its tanh approximation (Hendrycks & Gimpel 2016), which JAX weights were trained with
    swiglu     silu(z W_g + b_g) * (z W_v + b_v) (Shazeer 2020); W_1 = [W_g; W_v], rows of the gate first (timm's SwiGLUPacked)
    Dropout stands behind f and behind W_2 (ViT's MlpBlock).
    """

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        D, M = config.width, config.feedforward_width
        self.activation = config.activation
        self.dropout = Dropout(dropout)
        self.fc1 = nn.Linear(D, 2 * M if config.activation == "swiglu" else M)
        self.fc2 = nn.Linear(M, D)

    def forward(self, z_BND: Tensor) -> Tensor:
        hidden_BNM = self.fc1(z_BND)
        if self.activation == "swiglu":
            gate_BNM, value_BNM = hidden_BNM.chunk(2, dim=-1)
            hidden_BNM = F.silu(gate_BNM) * value_BNM
        else:
            hidden_BNM = F.gelu(hidden_BNM, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.dropout(self.fc2(self.dropout(hidden_BNM)))


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021, CaiT section 2.2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND * self.gamma


Rotation = tuple[Tensor, Tensor]
Kept = tuple[Tensor, Tensor]
"""Which images of the batch go through MSA and which through FFN, as indices; see VisionTransformer."""


class Block(nn.Module):
    """One encoder layer, BND -> BND.

    post-norm (the seed)            Z' = LN1(Z + MSA(Z));          out = LN2(Z' + FFN(Z'))
    deepnorm                        Z' = LN1(alpha Z + MSA(Z));    out = LN2(alpha Z' + FFN(Z')),  alpha = (2L)^(1/4)
    respost   (Swin v2)             Z' = Z + LN1(MSA(Z));          out = Z' + LN2(FFN(Z'))
    pre-norm  (ViT, public weights) Z' = Z + MSA(LN1(Z));          out = Z' + FFN(LN2(Z'))
    parallel                        out = Z + MSA(LN1(Z)) + FFN(LN1(Z)), or LN1(alpha Z + MSA(Z) + FFN(Z))
    LayerScale multiplies MSA(.) and FFN(.).
    """

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.placement = config.norm
        self.is_post_norm = config.is_post_norm
        self.alpha = (2 * config.depth) ** 0.25 if config.norm == "deepnorm" else 1.0
        scaled = config.layer_scale is not None
        self.norm1 = make_norm(config, config.width)
        self.attn = Attention(config, dropout)
        self.ls1 = LayerScale(config.width) if scaled else None
        self.norm2 = None if config.parallel else make_norm(config, config.width)
        self.mlp = FeedForward(config, dropout)
        self.ls2 = LayerScale(config.width) if scaled else None

    def forward(self, z_BND: Tensor, rotation: Rotation | None = None, kept: Kept | None = None) -> Tensor:
        def attention(x_BND: Tensor) -> Tensor:
            branch_BND = self.attn(x_BND, rotation)
            return branch_BND if self.ls1 is None else self.ls1(branch_BND)

        def feed_forward(x_BND: Tensor) -> Tensor:
            branch_BND = self.mlp(x_BND)
            return branch_BND if self.ls2 is None else self.ls2(branch_BND)

        if self.norm2 is None:
            return self._sublayer(z_BND, self.norm1, lambda x_BND: attention(x_BND) + feed_forward(x_BND), kept, 0)
        z_BND = self._sublayer(z_BND, self.norm1, attention, kept, 0)
        return self._sublayer(z_BND, self.norm2, feed_forward, kept, 1)

    def _sublayer(
        self, z_BND: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor], kept: Kept | None, which: int
    ) -> Tensor:
        """z + f(norm(z)), z + norm(f(z)), or norm(alpha z + f(z)).

        f is computed for the kept images alone, and scaled up for them.
        """
        inner = {"pre": lambda x_BND: branch(norm(x_BND)), "respost": lambda x_BND: norm(branch(x_BND))}.get(
            self.placement, branch
        )
        residual_BND = z_BND if self.alpha == 1.0 else self.alpha * z_BND
        if kept is None:
            sum_BND = residual_BND + inner(z_BND)
        else:
            chosen = kept[which]
            part = inner(z_BND.index_select(0, chosen))
            sum_BND = residual_BND.index_add(0, chosen, part.to(residual_BND.dtype), alpha=z_BND.shape[0] / chosen.shape[0])
        return norm(sum_BND) if self.is_post_norm else sum_BND
