"""Multi-head self-attention and attention pooling; the kernel stands behind one function.

B batch   N tokens (prefix first)   D width   H heads   K = D/H columns of one head
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscale.model.config import ModelConfig
from vitscale.model.dropout import Dropout
from vitscale.model.norms import make_norm
from vitscale.model.position import rotate

Watch = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Given q, k, v as they enter the kernel and what comes out of it, each BHNK (one query in attention pooling)."""


def attend(q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(K)) V for every head. The only call of an attention kernel; kernels.py says which one it is."""
    return F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK)


class Attention(nn.Module):
    """MSA(Z) = Concat(head_1 ... head_H) W_O with head_h = softmax(Q K^T / sqrt(K)) V.

    W_Q, W_K and W_V of all heads are one matrix `qkv` (3D, D): rows of q, then k, then v, heads in order (as timm has it).
    Dropout stands behind W_O; the attention itself has none.
    """

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.dropout = Dropout(dropout)
        self.qkv = nn.Linear(D, 3 * D, bias=config.projection_bias and config.qkv_bias)
        self.q_norm = make_norm(config, config.head_width) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_width) if config.qk_norm else None
        self.proj = nn.Linear(D, D, bias=config.projection_bias)
        self.watch: Watch | None = None
        """Looks at every forward pass, beside whatever kernel runs. Set by insight, None in training."""

    def queries_keys_values(
        self, z_BND: Tensor, rotation: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `attend` is given, each BHNK. Whatever changes queries or keys belongs here."""
        B, N, D = z_BND.shape
        q, k, v = self.qkv(z_BND).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind()
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return q, k, v

    def forward(self, z_BND: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, k, v = self.queries_keys_values(z_BND, rotation)
        heads_BHNK = attend(q, k, v)
        if self.watch is not None:
            self.watch(q, k, v, heads_BHNK)
        return self.dropout(self.proj(heads_BHNK.transpose(1, 2).flatten(2)))


class AttentionPool(nn.Module):
    """MAP head (Zhai et al. 2022, section 3.2): one learned query attends over all tokens, then a residual FFN: BND -> BD.

    Names are those of timm's AttentionPoolLatent.
    """

    def __init__(self, config: ModelConfig, mlp: nn.Module) -> None:
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.latent = nn.Parameter(torch.zeros(1, 1, D))
        self.q = nn.Linear(D, D)
        self.kv = nn.Linear(D, 2 * D)
        self.proj = nn.Linear(D, D)
        self.norm = make_norm(config, D)
        self.mlp = mlp
        self.watch: Watch | None = None

    def forward(self, z_BND: Tensor) -> Tensor:
        B, N, _ = z_BND.shape
        q = self.q(self.latent.expand(B, -1, -1)).view(B, 1, self.heads, -1).transpose(1, 2)
        k, v = self.kv(z_BND).view(B, N, 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        heads_BH1K = attend(q, k, v)
        if self.watch is not None:
            self.watch(q, k, v, heads_BH1K)
        x_B1D = self.proj(heads_BH1K.transpose(1, 2).flatten(2))
        return (x_B1D + self.mlp(self.norm(x_B1D)))[:, 0]
