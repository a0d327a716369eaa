"""Multi-head self-attention; the kernel stands behind one function.

B batch   N tokens (class token first)   D width   H heads   K = D/H columns of one head
"""

import torch.nn.functional as F
from torch import Tensor, nn


def attend(q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(K)) V for every head. The only call of an attention kernel: another one is put in here."""
    return F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK)


class Attention(nn.Module):
    """MSA(Z) = Concat(head_1 ... head_H) W_O with head_h = softmax(Q K^T / sqrt(K)) V.

    W_Q, W_K and W_V of all heads are one matrix `qkv` (3D, D): rows of q, then k, then v, heads in order (as timm has it).
    """

    def __init__(self, width: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)

    def queries_keys_values(self, z_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `attend` is given, each BHNK. Whatever changes queries or keys belongs here: attention maps read them too."""
        B, N, D = z_BND.shape
        q, k, v = self.qkv(z_BND).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind()
        return q, k, v

    def forward(self, z_BND: Tensor) -> Tensor:
        heads_BHNK = attend(*self.queries_keys_values(z_BND))
        return self.proj(heads_BHNK.transpose(1, 2).flatten(2))
