"""What two parameters look like: position embeddings and the patch projection (Dosovitskiy et al. 2021, figure 7).

S patches of the model's own grid   D width   C channels   P patch side
"""

import torch
from torch import Tensor

from vitscale.model.vit import VisionTransformer

FILTERS = 28
"""Principal components shown, as in the paper."""


@torch.no_grad()
def position_similarity(model: VisionTransformer) -> Tensor | None:
    """Cosine between the learned position embeddings of any two patches: SS; None where positions are not learned."""
    if model.pos_embed is None:
        return None
    rows_SD = model.pos_embed[0, -model.config.patches :].float().cpu()
    unit_SD = rows_SD / rows_SD.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return unit_SD @ unit_SD.T


@torch.no_grad()
def patch_filters(model: VisionTransformer, n_filters: int = FILTERS) -> tuple[Tensor, Tensor]:
    """The first principal components of the D filters of the patch projection: (filters_FPPC, share of variance_F).

    Filters are centred over D; components have length 1 and a sign of their own: the largest entry is positive.
    """
    config = model.config
    weight_DX = model.patch_embed.proj.weight.float().cpu()
    _, spread, components = torch.linalg.svd(weight_DX - weight_DX.mean(dim=0), full_matrices=False)
    n = min(n_filters, len(components))
    chosen = components[:n]
    chosen = chosen * chosen.gather(1, chosen.abs().argmax(dim=1, keepdim=True)).sign()
    shares = spread[:n].square() / spread.square().sum().clamp_min(1e-30)
    return chosen.view(n, config.channels, config.patch_size, config.patch_size).permute(0, 2, 3, 1), shares
