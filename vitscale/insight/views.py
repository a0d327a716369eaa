"""What pictures and pages are made of: one record per image and one of the model, as plain arrays.

L layers   H heads   N tokens (patches last)   S patches   F filters
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitscale.insight.figures import AttentionRow
from vitscale.insight.look import Look, high_norm_tokens, look
from vitscale.insight.parameters import patch_filters, position_similarity
from vitscale.insight.rollout import attention_rollout, gradient_rollout
from vitscale.model.vit import VisionTransformer

Caption = Callable[[int, float], str]
"""From the most probable class and its probability to words."""


@dataclass(frozen=True, kw_only=True)
class ImageView:
    """Everything shown of one image."""

    name: str
    row: AttentionRow
    asking_LHN: np.ndarray
    """Asking rows of every layer; with MAP its own attention is one more layer at the end."""
    mean_LNN: np.ndarray
    """Mean over heads of the maps, float16: 8 bits are shown."""
    entropy_LH: np.ndarray
    distance_LH: np.ndarray
    norms_LN: np.ndarray
    outliers_L: np.ndarray
    """How many tokens stand out by their norm."""


@dataclass(frozen=True, kw_only=True)
class ModelView:
    """What is shown of the model, whatever the image."""

    description: str
    asking: str
    layer_names: tuple[str, ...]
    heads: int
    prefix: int
    position_SS: np.ndarray | None
    position_grid: tuple[int, int]
    filters_FPPC: np.ndarray
    filter_shares_F: np.ndarray


def view_model(model: VisionTransformer, description: str) -> ModelView:
    """Parameters that can be looked at, and the names things have in captions."""
    config = model.config
    similarity = position_similarity(model)
    filters, shares = patch_filters(model)
    layers = tuple(str(layer + 1) for layer in range(config.depth))
    return ModelView(
        description=description,
        asking={"class": "Class token", "average": "Mean of patches", "map": "MAP query"}[config.pool],
        layer_names=(*layers, "MAP") if config.pool == "map" else layers,
        heads=config.heads,
        prefix=config.prefix_tokens,
        position_SS=None if similarity is None else similarity.numpy(),
        position_grid=(config.grid, config.grid),
        filters_FPPC=filters.numpy(),
        filter_shares_F=shares.numpy(),
    )


def view_image(
    model: VisionTransformer, image_BCHW: Tensor, picture_HWC: np.ndarray, *, name: str, caption: Caption
) -> ImageView:
    """Look at one image (a batch of one). `picture_HWC` is the same view in any resolution."""
    seen = look(model, image_BCHW)
    probability, label = torch.softmax(seen.logits_BC, dim=-1).max(dim=1)
    rollout_BN = attention_rollout(seen.start_BN, seen.mean_BNN)
    mean_LNN = np.stack([layer[0].numpy().astype(np.float16) for layer in seen.mean_BNN])
    seen.mean_BNN.clear()  # the backward pass needs the room
    gradient_BN = gradient_rollout(model, image_BCHW, label)
    asking = [*seen.asking_BHN, *([seen.pool_BHN] if seen.pool_BHN is not None else [])]
    row = AttentionRow(
        image_HWC=picture_HWC,
        caption=caption(int(label), float(probability)),
        heads_HN=seen.last_BHN[0].numpy(),
        rollout_N=rollout_BN[0].numpy(),
        gradient_N=gradient_BN[0].numpy(),
        grid=(seen.rows, seen.columns),
        asking={"class": "Class token", "average": "Mean of patches", "map": "MAP query"}[model.config.pool],
    )
    return ImageView(
        name=name,
        row=row,
        asking_LHN=torch.stack(asking)[:, 0].numpy(),
        mean_LNN=mean_LNN,
        entropy_LH=torch.stack(seen.entropy_BH)[:, 0].numpy(),
        distance_LH=torch.stack(seen.distance_BH)[:, 0].numpy(),
        norms_LN=torch.stack(seen.norms_BN)[:, 0].numpy(),
        outliers_L=_outliers(seen),
    )


def _outliers(seen: Look) -> np.ndarray:
    return np.array([int(high_norm_tokens(norms_BN, prefix=seen.prefix)[0].sum()) for norms_BN in seen.norms_BN])
