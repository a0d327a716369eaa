"""One forward pass, looked at: of every layer only what pictures need is kept, chunk by chunk.

asking row   whose attention is shown: the class token's where the head reads it, else the mean over the rows of all patches
pool         MAP's own attention, whose one query is what the head asks
entropy      mean over the patches' rows of -sum_j A_ij ln A_ij, in nats; between 0 and ln N
distance     mean over the patches' rows of sum_j A_ij d_ij / sum_j A_ij over patches j, d_ij between centres in pixels
             (Dosovitskiy et al. 2021, figure 7 and appendix D.7)
logit        largest |q_i k_j / sqrt(K)| before the softmax: past about 50 attention is one-hot and training nears
             divergence (Dehghani et al. 2023, section 2; Wortsman et al. 2023, section 3.1)
norm         |z_i| of each token behind each block (Darcet et al. 2024, section 2)

Memory besides weights and an ordinary forward pass, per image: 4 L N^2 bytes for the mean maps, 4 L (H + 1) N for rows and
norms, and chunks. ViT-L/16 at 384 pixels (L 24, H 16, N 577): 32 MB + 1 MB, where all maps are 511 MB.

B batch   L layers   H heads   M some queries   N tokens (prefix first)
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitscale.insight.attention_maps import Forward, attention_of, chunks, watched
from vitscale.model.attention import Watch
from vitscale.model.vit import VisionTransformer


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one forward pass showed, on the CPU in float32 at least. Lists are by layer, first block first."""

    prefix: int
    """Tokens before the patches."""
    rows: int
    columns: int
    """Patches per side of the image."""
    asks_class_token: bool
    """Whether the head reads the class token."""
    logits_BC: Tensor
    mean_BNN: list[Tensor]
    """Mean over heads of the maps; empty where `keep_maps` was false."""
    asking_BHN: list[Tensor]
    entropy_BH: list[Tensor]
    distance_BH: list[Tensor]
    logit_BH: list[Tensor]
    """Largest attention logit of a head, by size."""
    norms_BN: list[Tensor]
    pool_BHN: Tensor | None
    """MAP only."""

    @property
    def start_BN(self) -> Tensor:
        """What the head reads of the last tokens, as shares that sum to 1: where rollout begins."""
        like = self.asking_BHN[0]
        if self.pool_BHN is not None:
            return self.pool_BHN.mean(dim=1)
        start_BN = torch.zeros(like.shape[0], like.shape[2], dtype=like.dtype)
        if self.asks_class_token:
            start_BN[:, 0] = 1
        else:
            start_BN[:, self.prefix :] = 1 / (self.rows * self.columns)
        return start_BN

    @property
    def last_BHN(self) -> Tensor:
        """The attention nearest to the head: of MAP's query, else the asking rows of the last layer."""
        return self.asking_BHN[-1] if self.pool_BHN is None else self.pool_BHN


def patch_distances(rows: int, columns: int, patch_size: int) -> Tensor:
    """Pixels between the centres of any two patches: (rows columns, rows columns)."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], dim=1).float() * patch_size
    # Differences, not cdist: its product form turns a distance of 0 into rounding.
    return (places[:, None] - places[None]).square().sum(-1).sqrt()


class LayerTally:
    """Adds up one layer's map chunk by chunk; the map itself is never whole, but its mean over heads is."""

    def __init__(
        self, shape: tuple[int, int, int], prefix: int, distances: Tensor, *, keep_map: bool, asks_first: bool
    ) -> None:
        B, H, N = shape
        self.prefix, self.distances, self.heads, self.asks_first = prefix, distances, H, asks_first
        self.mean_BNN = torch.zeros(B, N, N) if keep_map else None
        self.asking_BHN = torch.zeros(B, H, N)
        self.entropy_BH = torch.zeros(B, H)
        self.distance_BH = torch.zeros(B, H)

    def add(self, head: int, queries: slice, rows_BMN: Tensor) -> None:
        """Rows of one head; every row of every head comes once."""
        if self.mean_BNN is not None:
            self.mean_BNN[:, queries] += rows_BMN.to("cpu") / self.heads
        if self.asks_first and queries.start == 0:
            self.asking_BHN[:, head] = rows_BMN[:, 0].to("cpu")
        skipped = max(0, self.prefix - queries.start)
        if skipped >= rows_BMN.shape[1]:
            return
        patches_BMN, first = rows_BMN[:, skipped:], queries.start + skipped - self.prefix
        n_patches = self.distances.shape[0]
        if not self.asks_first:
            self.asking_BHN[:, head] += patches_BMN.sum(dim=1).to("cpu") / n_patches
        self.entropy_BH[:, head] += torch.special.entr(patches_BMN).sum(dim=(1, 2)).to("cpu") / n_patches
        to_patches_BMN = patches_BMN[..., self.prefix :]
        far_BM = torch.einsum("bmn,mn->bm", to_patches_BMN, self.distances[first : first + patches_BMN.shape[1]])
        mass_BM = to_patches_BMN.sum(dim=-1).clamp_min(torch.finfo(rows_BMN.dtype).tiny)
        self.distance_BH[:, head] += (far_BM / mass_BM).sum(dim=1).to("cpu") / n_patches


def largest_logit(q_BHNK: Tensor, k_BHNK: Tensor) -> Tensor:
    """max over i, j of |q_i k_j / sqrt(K)|: BH, in float32. Head by head, as the maps are."""
    scale = q_BHNK.shape[-1] ** -0.5
    heads = range(q_BHNK.shape[1])
    found = [((q_BHNK[:, h].float() * scale) @ k_BHNK[:, h].float().mT).abs().amax(dim=(1, 2)) for h in heads]
    return torch.stack(found, dim=1)


@torch.no_grad()
def look(model: VisionTransformer, images_BCHW: Tensor, *, forward: Forward | None = None, keep_maps: bool = True) -> Look:
    """Run the images through `forward` (None: the model) and keep what a `Look` holds.

    Collective where `forward` is an engine's: every rank must call it. Leaves training or evaluation mode as it is.
    """
    config = model.config
    asks_class_token = config.pool == "class"
    B, P = images_BCHW.shape[0], config.patch_size
    rows, columns = images_BCHW.shape[2] // P, images_BCHW.shape[3] // P
    distances = patch_distances(rows, columns, P).to(images_BCHW.device)
    shape = (B, config.heads, config.prefix_tokens + rows * columns)
    tallies: dict[int, LayerTally] = {}
    norms: dict[int, Tensor] = {}
    logits: dict[int, Tensor] = {}
    pool: list[Tensor] = []

    def watch(layer: int) -> Watch:
        def catch(q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor, out_BHNK: Tensor) -> None:
            tally = LayerTally(shape, config.prefix_tokens, distances, keep_map=keep_maps, asks_first=asks_class_token)
            for head, queries, rows_BMN in chunks(q_BHNK, k_BHNK):
                tally.add(head, queries, rows_BMN.float())
            tallies[layer] = tally
            logits[layer] = largest_logit(q_BHNK, k_BHNK).cpu()

        return catch

    def watch_pool(q_BH1K: Tensor, k_BHNK: Tensor, v_BHNK: Tensor, out_BH1K: Tensor) -> None:
        pool.append(torch.cat([rows_B1N.float().cpu() for _, _, rows_B1N in chunks(q_BH1K, k_BHNK)], dim=1))

    def measure(layer: int) -> Callable[[Any, Any, Tensor], None]:
        def hook(module: Any, inputs: Any, z_BND: Tensor) -> None:
            norms[layer] = z_BND.float().norm(dim=-1).cpu()

        return hook

    watches = {attention_of(model, layer): watch(layer) for layer in range(config.depth)}
    if model.attn_pool is not None:
        watches[model.attn_pool] = watch_pool
    with ExitStack() as stack:
        stack.enter_context(watched(watches))
        for layer, block in enumerate(model.blocks):
            stack.callback(block.register_forward_hook(measure(layer)).remove)
        logits_BC = (forward or model)(images_BCHW)
    ordered = [tallies[layer] for layer in range(config.depth)]
    return Look(
        prefix=config.prefix_tokens,
        rows=rows,
        columns=columns,
        asks_class_token=asks_class_token,
        logits_BC=logits_BC.float().cpu(),
        mean_BNN=[tally.mean_BNN for tally in ordered if tally.mean_BNN is not None],
        asking_BHN=[tally.asking_BHN for tally in ordered],
        entropy_BH=[tally.entropy_BH for tally in ordered],
        distance_BH=[tally.distance_BH for tally in ordered],
        logit_BH=[logits[layer] for layer in range(config.depth)],
        norms_BN=[norms[layer] for layer in range(config.depth)],
        pool_BHN=pool[0] if pool else None,
    )


def high_norm_tokens(norms_BN: Tensor, *, prefix: int, times_median: float = 3.0) -> Tensor:
    """Which tokens stand out, as booleans BN: norm above `times_median` times the median norm of the image's patches.

    Darcet et al. 2024 cut at a fixed norm (150) found by eye for one model; a multiple of the median carries over.
    """
    median_B1 = norms_BN[:, prefix:].median(dim=1, keepdim=True).values
    return norms_BN > times_median * median_B1
