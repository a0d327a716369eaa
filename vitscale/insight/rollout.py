"""How much each input token reaches what the head reads, through all layers and residual paths.

rollout            row x prod_l (A_l + I) / 2,  A_l the mean over heads            Abnar & Zuidema 2020
gradient rollout   row x prod_l (I + G_l),  G_l = mean over heads of (dy/dA_l * A_l)+    Chefer et al. 2021 (ICCV)

`row` is what the head reads of the last tokens: the class token alone, the mean of the patches, or MAP's own attention
(in gradient rollout MAP's (dy/dA * A)+). One row is carried from the last layer down: no product of two N x N matrices.

The gradient of a map needs no eager attention: the kernel's output is O = A V, hence dy/dA = dy/dO V^T, chunk by chunk.

B batch   H heads   M some queries   N tokens   D width
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitscale.insight.attention_maps import attention_of, chunks, watched
from vitscale.model.attention import Watch
from vitscale.model.vit import VisionTransformer


def attention_rollout(start_BN: Tensor, mean_BNN: Sequence[Tensor]) -> Tensor:
    """Rollout from head means of all layers, first layer first: BN. Sums to 1 where `start_BN` does."""
    row_BN = start_BN
    for layer_BNN in reversed(mean_BNN):
        row_BN = 0.5 * row_BN + 0.5 * torch.einsum("bm,bmn->bn", row_BN, layer_BNN)
    return row_BN


def gradient_rollout(model: VisionTransformer, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    """Relevance of every input token for the logit of each image's label: BN, not negative, not normalised.

    Blocks run a second time one by one on the way back, so one block's activations and L inputs of blocks (4 L N D bytes
    per image: 57 MB for ViT-L/16 at 384 pixels) are what it holds; gradients of weights are neither made nor touched.
    """
    inputs: list[tuple[Any, ...]] = []
    handles = [block.register_forward_pre_hook(lambda _, given: inputs.append(given)) for block in model.blocks]
    try:
        with torch.no_grad():
            z_BND = model.tokens(images_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    row_BN, gradient_BND = _from_the_head(model, z_BND, labels_B)
    for layer in reversed(range(model.config.depth)):
        relevance = _Relevance()
        given_BND = inputs[layer][0].detach().requires_grad_()
        with torch.enable_grad(), watched({attention_of(model, layer): relevance.watch}):
            out_BND = model.blocks[layer](given_BND, *inputs[layer][1:])
        gradient_BND, gradient_out_BHNK = torch.autograd.grad(out_BND, [given_BND, relevance.out], gradient_BND)
        del out_BND, inputs[layer]
        row_BN = row_BN + relevance.through(row_BN, gradient_out_BHNK)
    return row_BN.cpu()


def _from_the_head(model: VisionTransformer, z_BND: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """(row_BN to start from, gradient of the chosen logits with respect to the last tokens)."""
    z_BND = z_BND.detach().requires_grad_()
    relevance = _Relevance()
    watches: dict[nn.Module, Watch] = {} if model.attn_pool is None else {model.attn_pool: relevance.watch}
    with torch.enable_grad(), watched(watches):
        x_BD = model.pooled(z_BND)
        logits_BC = model.head(x_BD if model.pre_logits is None else torch.tanh(model.pre_logits(x_BD)))
        chosen = logits_BC.gather(1, labels_B[:, None].to(logits_BC.device)).sum()
    B, N, _ = z_BND.shape
    if model.attn_pool is not None:
        gradient_BND, gradient_out = torch.autograd.grad(chosen, [z_BND, relevance.out])
        one_B1 = torch.ones(B, 1, dtype=gradient_BND.dtype, device=z_BND.device)
        return relevance.through(one_B1, gradient_out), gradient_BND
    (gradient_BND,) = torch.autograd.grad(chosen, [z_BND])
    row_BN = torch.zeros(B, N, dtype=gradient_BND.dtype, device=z_BND.device)
    if model.config.pool == "class":
        row_BN[:, 0] = 1
    else:
        row_BN[:, model.config.prefix_tokens :] = 1 / (N - model.config.prefix_tokens)
    return row_BN, gradient_BND


class _Relevance:
    """G = mean over heads of (dy/dA * A)+ of one attention, never whole."""

    out: Tensor

    def watch(self, q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor, out_BHNK: Tensor) -> None:
        self.q, self.k, self.v, self.out = q_BHNK.detach(), k_BHNK.detach(), v_BHNK.detach(), out_BHNK

    @torch.no_grad()
    def through(self, row_BM: Tensor, gradient_out_BHMK: Tensor) -> Tensor:
        """row G: BN."""
        carried_BN = torch.zeros(self.k.shape[0], self.k.shape[2], dtype=row_BM.dtype, device=row_BM.device)
        for head, queries, rows_BMN in chunks(self.q, self.k):
            gradient_BMN = gradient_out_BHMK[:, head, queries] @ self.v[:, head].transpose(1, 2)
            relevant_BMN = (gradient_BMN * rows_BMN).clamp_min_(0)
            carried_BN += torch.einsum("bm,bmn->bn", row_BM[:, queries], relevant_BMN)
        return carried_BN / self.q.shape[1]
