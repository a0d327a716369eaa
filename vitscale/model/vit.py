"""The Vision Transformer of the seed mathematics, its initialisation, and the role of each parameter.

Z_0 = [x_class; patches E] + E_pos;  Z_l = Block_l(Z_{l-1});  logits = z_0^{(L)} W_cls + b_cls,  y = softmax(logits)

norm="post" has no normalisation after the last layer (the seed); norm="pre" has one, `norm` (all public weights).
Names of parameters are those of timm; the patch projection is the matrix (D, C P P) instead of a convolution kernel.

B batch   H, W pixels   C channels   N tokens (class token, registers, patches)   D width
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vitscale.base.files import xxh3_64
from vitscale.model.attention import AttentionPool
from vitscale.model.config import ModelConfig, Recompute
from vitscale.model.dropout import Dropout
from vitscale.model.layers import Block, FeedForward, Kept, PatchEmbed
from vitscale.model.norms import make_norm
from vitscale.model.position import fixed_positions, resize_positions, rotation

Checkpoint = Callable[..., Tensor]
"""Runs a function without keeping its activations; called as checkpoint(block, *arguments)."""


class VisionTransformer(nn.Module):
    """Images to logits. Values are those of torch's constructors until `initialise` or loaded weights replace them."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        recompute: Recompute = 0,
        drop_path: Sequence[float] = (),
        dropout: float = 0.0,
        checkpoint_function: Checkpoint | None = None,
    ) -> None:
        """recompute: in training, what blocks forget and compute again in the backward pass: 0 nothing, k everything in every
        k-th block, "selective" all but attention and matrix products. Changes memory and time, never a value.
        `checkpoint_function` replaces torch's non-reentrant one where blocks are recomputed whole.
        drop_path: a rate per block, or none. In training each branch of a block is computed for round((1 - rate) B) images
        drawn from torch's global CPU generator, and scaled by B over their number (Huang et al. 2016; DINOv2's form).
        dropout: a rate, in training, after the positions are added, after attention's output map, and after both parts of the
        feed-forward (Dosovitskiy et al. 2021, appendix B.1; attention itself and the MAP head have none)."""
        super().__init__()
        assert len(drop_path) in (0, config.depth)
        self.config = config
        self.recompute = recompute
        self.drop_path = tuple(drop_path)
        self._checkpoint = checkpoint_function or checkpoint_whole
        D = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, D)) if config.registers else None
        rows = config.patches + (config.prefix_tokens if config.prefix_positions else 0)
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, D)) if config.position == "learned" else None
        self.patch_embed = PatchEmbed(config.patch_size, config.channels, D, bias=config.projection_bias)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(config, dropout) for _ in range(config.depth))
        self.norm = None if config.is_post_norm else make_norm(config, D)
        self.attn_pool = AttentionPool(config, FeedForward(config)) if config.pool == "map" else None
        self.pre_logits = nn.Linear(D, config.pre_logits_width) if config.pre_logits_width else None
        self.head = nn.Linear(config.pre_logits_width or D, config.classes)

    def tokens(self, images_BCHW: Tensor) -> Tensor:
        """Z_L, before the final norm: BND. Any H and W that the patch divides; learned positions are resampled for them."""
        C, P = self.config.channels, self.config.patch_size
        if images_BCHW.ndim != 4 or images_BCHW.shape[1] != C or images_BCHW.shape[2] % P or images_BCHW.shape[3] % P:
            raise ValueError(
                f"expected images of shape (batch, {C}, height, width) with sides that are multiples of {P}, "
                f"got {tuple(images_BCHW.shape)}; resize the images"
            )
        B, _, height, width = images_BCHW.shape
        rows, columns = height // P, width // P
        z_BND = self.dropout(self._with_prefix_and_positions(self.patch_embed(images_BCHW), rows, columns))
        turned = rotation(self.config, rows, columns, z_BND.device) if self.config.position == "rotary" else None
        kept = self._draw_kept(B, z_BND.device)
        for layer, block in enumerate(self.blocks):
            z_BND = self._through(layer, block, z_BND, turned, kept[layer] if kept else None)
        return z_BND

    def _with_prefix_and_positions(self, x_BND: Tensor, rows: int, columns: int) -> Tensor:
        c = self.config
        prefix = [token.expand(x_BND.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if c.position == "rotary":
            return torch.cat([*prefix, x_BND], dim=1)
        if self.pos_embed is not None:
            rows_before = c.prefix_tokens if c.prefix_positions else 0
            old, new = (c.grid, c.grid), (rows, columns)
            pos_1ND = resize_positions(self.pos_embed, old, new, prefix=rows_before, dialect=c.position_resize)
        else:
            pos_1ND = fixed_positions(c, rows, columns, x_BND.device, x_BND.dtype)
        pos_1ND = pos_1ND.to(x_BND.dtype)
        if pos_1ND.shape[1] > rows * columns:
            return torch.cat([*prefix, x_BND], dim=1) + pos_1ND
        return torch.cat([*prefix, x_BND + pos_1ND], dim=1)

    def _draw_kept(self, batch: int, device: torch.device) -> list[Kept | None]:
        """The images whose branches are computed, per block; drawn outside the blocks, so that recomputing repeats them."""
        if not self.training or not any(self.drop_path):
            return []
        drawn: list[Kept | None] = []
        for rate in self.drop_path:
            count = kept_images(batch, rate)
            if count == batch:
                drawn.append(None)
                continue
            pair = torch.stack([torch.randperm(batch)[:count].sort().values for _ in range(2)]).to(device, non_blocking=True)
            drawn.append((pair[0], pair[1]))
        return drawn

    def _through(self, layer: int, block: nn.Module, *arguments: Any) -> Tensor:
        if self.training and self.recompute == "selective":
            return checkpoint(block, *arguments, use_reentrant=False, context_fn=_keep_products)
        if self.training and self.recompute != 0 and self.recompute != "selective" and layer % self.recompute == 0:
            return self._checkpoint(block, *arguments)
        return block(*arguments)

    def pooled(self, z_BND: Tensor) -> Tensor:
        """What the head sees of the last tokens, final norm included: BD."""
        norm = self.norm if self.norm is not None else nn.Identity()
        if self.attn_pool is not None:
            return self.attn_pool(norm(z_BND))
        if self.config.pool == "class":
            return norm(z_BND[:, 0])
        patches_BND = z_BND[:, self.config.prefix_tokens :]
        return norm(patches_BND.mean(dim=1)) if self.config.pool_norm == "after" else norm(patches_BND).mean(dim=1)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """The pooled features, for the seed z_0^{(L)}: BD. Images are normalised, of the weights' dtype."""
        return self.pooled(self.tokens(images_BCHW))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits, B x classes."""
        x_BD = self.features(images_BCHW)
        return self.head(x_BD if self.pre_logits is None else torch.tanh(self.pre_logits(x_BD)))

    def predict_proba(self, images_BCHW: Tensor) -> Tensor:
        """y = softmax(logits), B x classes, in float32 at least."""
        logits = self(images_BCHW)
        return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def kept_images(batch: int, rate: float) -> int:
    """How many of `batch` images a branch with stochastic depth at `rate` is computed for; never none."""
    return max(1, round(batch * (1 - rate)))


# ---- recomputation --------------------------------------------------------------------------------------------------


def checkpoint_whole(block: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """torch's non-reentrant checkpoint: exact also with frozen weights and at every ZeRO stage."""
    return checkpoint(block, *arguments, use_reentrant=False)


_aten = torch.ops.aten
PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    # At ZeRO stage 3 DeepSpeed's linear map adds its bias in place to the product that is kept: repeating that would add it
    # twice, in silence. Kept, the sum is the same memory as the product.
    _aten.add_.Tensor,
}
"""What selective recomputation keeps: results that are dear to compute for their size."""


def _keep_products() -> Any:
    # Mutation is allowed for that sum alone: torch counts it as one after it was kept.
    return create_selective_checkpoint_contexts(_policy, allow_cache_entry_mutation=True)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


# ---- initialisation -------------------------------------------------------------------------------------------------


@torch.no_grad()
def initialise(model: VisionTransformer, *, seed: int, head_bias: float = 0.0) -> None:
    """Fill every parameter with fresh values.

    name                     distribution                         as in
    cls_token                0                                    ViT
    reg_token                normal, std 1e-6                     timm
    pos_embed                normal, std 0.02                     ViT
    patch_embed.proj.weight  normal cut at 2 sigma,               ViT (Flax convolution: LeCun normal)
                             std 1/sqrt(C P^2) after the cut
    attn.qkv.weight          uniform +-sqrt(6/(D + D)),           ViT (Xavier uniform; q, k and v are
                             each of q, k, v by itself            matrices of their own)
    attn.proj.weight         uniform +-sqrt(6/(D + D))            ViT (Xavier uniform)
    mlp.fc1, fc2.weight      uniform +-sqrt(6/(D + D_ff)),        ViT (Xavier uniform)
                             gate and value each by itself
    attn_pool.latent         uniform +-sqrt(6/(1 + D))            big_vision (Xavier uniform)
    attn_pool.q, kv, proj    as attn; mlp as mlp                  big_vision
    ls1, ls2.gamma           model.layer_scale                    CaiT
    pre_logits.weight        as patch_embed.proj.weight           ViT (Flax Dense: LeCun normal)
    mlp.fc1, fc2.bias        normal, std 1e-6                     ViT
    other biases             0                                    ViT
    norm weights             1                                    ViT
    norm="deepnorm": values (v), attn.proj, mlp.fc1 and fc2 of the blocks are multiplied by (8L)^(-1/4)   DeepNet
    head.weight              0                                    ViT: every class starts at probability 1/classes,
                                                                  whatever the norm
    head.bias                head_bias                            big_vision: for sigmoid over many classes, -10 starts each
                                                                  at a probability of 4.5e-5 instead of 1/2
    ViT: Dosovitskiy et al. 2021 and its published code, google-research/vision_transformer, models_vit.py.

    Each value depends on (seed, name, shape) only: drawn on the CPU in float32 from a generator keyed by seed and name,
    so device, dtype, thread count and the presence of other parameters change nothing, and no global generator is moved.
    Parameters must be whole: call this before ZeRO-3 partitions them. On the meta device give each parameter its
    storage first.
    """
    for parameter in model.parameters():
        parameter.fill_(math.nan)
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(xxh3_64(f"{seed} {name}".encode()))
        draw = _constant(head_bias) if name == "head.bias" else _distribution_of(name, model.config)
        parameter.copy_(draw(parameter.shape, generator))
    unfilled = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    assert not unfilled, f"without a fresh value: {unfilled}"


Draw = Callable[[torch.Size, torch.Generator], Tensor]


def _distribution_of(name: str, config: ModelConfig) -> Draw:
    """The table of `initialise`, by the last two parts of a name."""
    *_, module, kind = ["", *name.split(".")]
    beta = (8 * config.depth) ** -0.25 if config.norm == "deepnorm" and name.startswith("blocks.") else 1.0
    if kind == "pos_embed":
        return _normal(0.02)
    if kind == "reg_token":
        return _normal(1e-6)
    if kind == "latent":
        return _xavier_uniform_rows
    if kind == "gamma":
        assert config.layer_scale is not None
        return _constant(config.layer_scale)
    if kind == "cls_token" or module == "head":
        return _constant(0.0)
    if "norm" in module:
        return _constant(1.0 if kind == "weight" else 0.0)
    if kind == "bias":
        return _normal(1e-6) if module in ("fc1", "fc2") else _constant(0.0)
    if name == "patch_embed.proj.weight" or module == "pre_logits":
        return _lecun_normal
    if module == "fc1" and config.activation == "swiglu":
        return _xavier_uniform_of(beta, beta)
    factors = {"qkv": (1.0, 1.0, beta), "kv": (1.0, 1.0), "q": (1.0,), "proj": (beta,), "fc1": (beta,), "fc2": (beta,)}
    return _xavier_uniform_of(*factors[module])


def _constant(value: float) -> Draw:
    return lambda shape, generator: torch.full(shape, value)


def _normal(std: float) -> Draw:
    return lambda shape, generator: torch.empty(shape).normal_(0.0, std, generator=generator)


def _xavier_uniform_of(*factors: float) -> Draw:
    """Matrices of equal size one above the other, each drawn by itself and multiplied by its factor."""

    def draw(shape: torch.Size, generator: torch.Generator) -> Tensor:
        rows = shape[0] // len(factors)
        bound = math.sqrt(6 / (rows + shape[1]))
        return torch.cat(
            [torch.empty(rows, shape[1]).uniform_(-bound, bound, generator=generator) * factor for factor in factors]
        )

    return draw


def _xavier_uniform_rows(shape: torch.Size, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(6 / (shape[-2] + shape[-1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _lecun_normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    # A standard normal cut at +-2 keeps this standard deviation; dividing by it gives 1/sqrt(fan_in) after the cut.
    std = math.sqrt(1 / shape[1]) / 0.87962566103423978
    return nn.init.trunc_normal_(torch.empty(shape), 0.0, std, -2 * std, 2 * std, generator=generator)


# ---- roles ----------------------------------------------------------------------------------------------------------


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices only, not to biases, norms, factors, tokens, positions and MAP's query."""
    return parameter.ndim >= 2 and name.rpartition(".")[2] not in ("cls_token", "reg_token", "pos_embed", "latent")


def layer_of(name: str, *, depth: int) -> int:
    """Where a parameter stands on the way up: 0 the embeddings, l + 1 block l, depth + 1 everything behind the blocks."""
    first, _, rest = name.partition(".")
    if first in ("patch_embed", "cls_token", "reg_token", "pos_embed"):
        return 0
    return int(rest.partition(".")[0]) + 1 if first == "blocks" else depth + 1


def matrices_in(name: str, config: ModelConfig) -> int:
    """How many matrices of equal size stand one above the other in a parameter: queries, keys, values; SwiGLU's two."""
    kind = name.removesuffix(".weight").rpartition(".")[2]
    return {"qkv": 3, "kv": 2, "fc1": 2 if config.activation == "swiglu" else 1}.get(kind, 1)
