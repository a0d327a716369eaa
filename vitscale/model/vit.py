"""The Vision Transformer of the seed mathematics, its initialisation, and the role of each parameter.

Z_0 = [x_class; patches E] + E_pos;  Z_l = Block_l(Z_{l-1});  logits = z_0^{(L)} W_cls + b_cls,  y = softmax(logits)

norm="post" has no normalisation after the last layer (the seed); norm="pre" has one, `norm` (all public weights).
Names of parameters are those of timm; the patch projection is the matrix (D, C P P) instead of a convolution kernel.

B batch   H, W pixels   C channels   N tokens (class token first)   D width
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitscale.base.files import xxh3_64
from vitscale.config import ModelConfig
from vitscale.model.layers import Block, PatchEmbed
from vitscale.model.position import sinusoidal_positions


class VisionTransformer(nn.Module):
    """Images to logits. Values are those of torch's constructors until `initialise` or loaded weights replace them."""

    pos_embed: Tensor

    def __init__(self, config: ModelConfig, *, recompute_every: int = 0) -> None:
        """recompute_every=k: in training, every k-th block forgets its activations and computes them again in the
        backward pass (1: all blocks, 0: none). Changes memory and time, never a value."""
        super().__init__()
        assert recompute_every >= 0
        self.config = config
        self.recompute_every = recompute_every
        D = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        if config.position == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, D))
        else:
            # float64 and rounded where it is added: casting a model to bf16 or float64 must not shape the table.
            self.register_buffer("pos_embed", sinusoidal_positions(config.tokens, D), persistent=False)
        self.patch_embed = PatchEmbed(config.patch_size, config.channels, D, bias=config.projection_bias)
        self.blocks = nn.ModuleList(
            Block(
                D,
                config.heads,
                hidden_width=config.feedforward_width,
                post_norm=config.norm == "post",
                projection_bias=config.projection_bias,
                norm_eps=config.norm_eps,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(D, eps=config.norm_eps) if config.norm == "pre" else None
        self.head = nn.Linear(D, config.classes)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """z_0^{(L)}, the final class token: BD. Images are normalised (layers.normalise_pixels), of the weights' dtype."""
        C, size = self.config.channels, self.config.image_size
        if images_BCHW.ndim != 4 or images_BCHW.shape[1:] != (C, size, size):
            raise ValueError(
                f"expected images of shape (batch, {C}, {size}, {size}), got {tuple(images_BCHW.shape)}; "
                "resize the images or set model.image_size"
            )
        x_BND = self.patch_embed(images_BCHW)
        x_BND = torch.cat([self.cls_token.expand(x_BND.shape[0], -1, -1), x_BND], dim=1)
        z_BND = x_BND + self.pos_embed.to(x_BND.dtype)
        for layer, block in enumerate(self.blocks):
            if self.training and self.recompute_every and layer % self.recompute_every == 0:
                z_BND = checkpoint(block, z_BND, use_reentrant=False)
            else:
                z_BND = block(z_BND)
        z_BD = z_BND[:, 0]
        return self.norm(z_BD) if self.norm is not None else z_BD

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits, B x classes."""
        return self.head(self.features(images_BCHW))

    def predict_proba(self, images_BCHW: Tensor) -> Tensor:
        """y = softmax(logits), B x classes, in float32 at least."""
        logits = self(images_BCHW)
        return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


# ---- initialisation -------------------------------------------------------------------------------------------------


@torch.no_grad()
def initialise(model: VisionTransformer, *, seed: int) -> None:
    """Fill every parameter with fresh values.

    name                     distribution                         as in
    cls_token                0                                    ViT
    pos_embed                normal, std 0.02                     ViT
    patch_embed.proj.weight  normal cut at 2 sigma,               ViT (Flax convolution: LeCun normal)
                             std 1/sqrt(C P^2) after the cut
    attn.qkv.weight          uniform +-sqrt(6/(D + D)),           ViT (Xavier uniform; q, k and v are
                             each of q, k, v by itself            matrices of their own)
    attn.proj.weight         uniform +-sqrt(6/(D + D))            ViT (Xavier uniform)
    mlp.fc1, fc2.weight      uniform +-sqrt(6/(D + D_ff))         ViT (Xavier uniform)
    mlp.fc1, fc2.bias        normal, std 1e-6                     ViT
    other biases             0                                    ViT
    norm weights             1                                    ViT
    head.weight              0                                    ViT: every class starts at probability 1/classes,
                                                                  whatever the norm
    ViT: Dosovitskiy et al. 2021 and its published code, google-research/vision_transformer, models_vit.py.

    Each value depends on (seed, name, shape) only: drawn on the CPU in float32 from a generator keyed by seed and name,
    so device, dtype, thread count and the presence of other parameters change nothing, and no global generator is moved.
    Parameters must be whole: call this before ZeRO-3 partitions them. On the meta device give each parameter its
    storage first (to_empty() would also empty the sinusoidal table, which is not filled here).
    """
    for parameter in model.parameters():
        parameter.fill_(math.nan)
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(xxh3_64(f"{seed} {name}".encode()))
        parameter.copy_(_distribution_of(name)(parameter.shape, generator))
    unfilled = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    assert not unfilled, f"without a fresh value: {unfilled}"


Draw = Callable[[torch.Size, torch.Generator], Tensor]


def _distribution_of(name: str) -> Draw:
    """The table of `initialise`, by the last two parts of a name."""
    *_, module, kind = ["", *name.split(".")]
    if kind == "pos_embed":
        return _normal(0.02)
    if kind == "cls_token" or module == "head":
        return _constant(0.0)
    if module.startswith("norm"):
        return _constant(1.0 if kind == "weight" else 0.0)
    if kind == "bias":
        return _normal(1e-6) if module in ("fc1", "fc2") else _constant(0.0)
    if name == "patch_embed.proj.weight":
        return _lecun_normal
    return {"qkv": _xavier_uniform_of_three, "proj": _xavier_uniform, "fc1": _xavier_uniform, "fc2": _xavier_uniform}[module]


def _constant(value: float) -> Draw:
    return lambda shape, generator: torch.full(shape, value)


def _normal(std: float) -> Draw:
    return lambda shape, generator: torch.empty(shape).normal_(0.0, std, generator=generator)


def _xavier_uniform(shape: torch.Size, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(6 / (shape[0] + shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _xavier_uniform_of_three(shape: torch.Size, generator: torch.Generator) -> Tensor:
    third = torch.Size((shape[0] // 3, shape[1]))
    return torch.cat([_xavier_uniform(third, generator) for _ in range(3)])


def _lecun_normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    # A standard normal cut at +-2 keeps this standard deviation; dividing by it gives 1/sqrt(fan_in) after the cut.
    std = math.sqrt(1 / shape[1]) / 0.87962566103423978
    return nn.init.trunc_normal_(torch.empty(shape), 0.0, std, -2 * std, 2 * std, generator=generator)


# ---- roles ----------------------------------------------------------------------------------------------------------


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices only, not to biases, norms, class token and positions."""
    return parameter.ndim >= 2 and name.rpartition(".")[2] not in ("cls_token", "pos_embed")
