"""What a model is: every setting of the section `model`, and what follows from them. No torch."""

from dataclasses import dataclass
from typing import Literal

Recompute = int | Literal["selective"]
"""What the backward pass computes again: 0 nothing, k everything in every k-th block, "selective" the cheap parts of all."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Vision Transformer, by the letters of the seed mathematics: H=W=image_size, P=patch_size, D=width, L=depth."""

    image_size: int
    """Height and width of the input in pixels."""
    patch_size: int
    width: int
    depth: int
    heads: int
    classes: int
    mlp_width: int | None = None
    """D_ff; None: 4 * width, as the seed has it."""
    channels: int = 3
    norm: Literal["pre", "post", "deepnorm", "respost"] = "pre"
    """post: LayerNorm(z + f(z)) and no final norm, the seed to the letter; pre: the papers and all public weights;
    deepnorm: post with LayerNorm(alpha z + f(z)), alpha = (2L)^(1/4), for deep post-norm (Wang et al. 2022, DeepNet);
    respost: z + LayerNorm(f(z)) and a final norm (Liu et al. 2022, Swin v2 section 3.2; timm's ResPostBlock)."""
    norm_kind: Literal["layernorm", "rmsnorm"] = "layernorm"
    """rmsnorm: no centring and no bias (Zhang & Sennrich 2019)."""
    norm_bias: bool = True
    """Bias of the norms; False: ViT-22B."""
    norm_eps: float = 1e-6
    """Epsilon of every norm (Flax and timm: 1e-6; torch's own default is 1e-5; Hugging Face's 1e-12)."""
    projection_bias: bool = True
    """Bias on the linear maps the seed writes without one: E, W_Q, W_K, W_V and W_O. False: the seed to the letter."""
    qkv_bias: bool = True
    """False: none on W_Q, W_K and W_V even where projection_bias is true (ViT-22B)."""
    qk_norm: bool = False
    """Norm of each head's queries and keys over its K columns before the product (Dehghani et al. 2023, section 2)."""
    parallel: bool = False
    """z + MSA(norm(z)) + FFN(norm(z)) with one norm, instead of one after the other (Dehghani et al. 2023, section 2)."""
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu"
    """gelu: exact; gelu_tanh: Flax's approximation, what JAX weights were trained with; swiglu: silu(z W) * (z V)."""
    layer_scale: float | None = None
    """Initial value of a factor per channel on each branch (Touvron et al. 2021, CaiT section 2.2); None: no factors."""
    class_token: bool = True
    registers: int = 0
    """Extra tokens that belong to no patch (Darcet et al. 2024)."""
    position: Literal["learned", "sinusoidal", "sincos2d_bv", "sincos2d_mae", "rotary"] = "learned"
    """sinusoidal: along the line of tokens; sincos2d: over rows and columns in the two public dialects (position.py);
    rotary: over rows and columns, inside the heads."""
    prefix_positions: bool = True
    """Learned positions have rows for class token and registers too (ViT, DeiT); False: for patches only (big_vision,
    registers). The other kinds except `sinusoidal` never have them."""
    position_resize: Literal["bicubic_antialias", "bicubic", "zoom_linear"] = "bicubic_antialias"
    """How learned positions are carried over to another grid: as timm, as Hugging Face and MAE, as the JAX code."""
    pool: Literal["class", "average", "map"] = "class"
    """What the head sees: the class token, the mean of the patches, or one query's attention over all tokens (MAP)."""
    pool_norm: Literal["before", "after"] = "before"
    """Whether the final norm stands before or after the mean of pool=average (big_vision: before; timm: after)."""
    pre_logits_width: int | None = None
    """Width of a tanh layer before the head (the published ImageNet-21k models); None: no such layer."""
    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Subtracted from pixels in 0..1 per channel (0.5/0.5: the range [-1, 1] of the ViT papers)."""
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in (
            "image_size",
            "patch_size",
            "width",
            "depth",
            "heads",
            "classes",
            "channels",
            "mlp_width",
            "pre_logits_width",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name} must be at least 1, got {value}")
        if self.registers < 0:
            raise ValueError(f"model.registers must be 0 or more, got {self.registers}")
        if self.image_size % self.patch_size:
            below = self.image_size // self.patch_size * self.patch_size
            raise ValueError(
                f"model.image_size={self.image_size} is not a multiple of model.patch_size={self.patch_size}; "
                f"nearest valid sizes: {below or self.patch_size} and {below + self.patch_size}"
            )
        if self.width % self.heads:
            raise ValueError(
                f"model.width={self.width} is not a multiple of model.heads={self.heads}; every head needs width/heads columns"
            )
        if len(self.pixel_mean) != self.channels or len(self.pixel_std) != self.channels:
            raise ValueError(
                f"model.pixel_mean and pixel_std need one number per channel ({self.channels}), "
                f"got {len(self.pixel_mean)} and {len(self.pixel_std)}"
            )
        for name, smallest in (("norm_eps", self.norm_eps), ("pixel_std", min(self.pixel_std))):
            if smallest <= 0:
                raise ValueError(f"model.{name} must be > 0, got {getattr(self, name)}")
        if self.pool == "class" and not self.class_token:
            raise ValueError("model.pool=class needs a class token; set model.class_token=true or model.pool=average")
        divisor, of = (4, self.width) if self.position.startswith("sincos2d") else (4, self.head_width)
        if (self.position.startswith("sincos2d") or self.position == "rotary") and of % divisor:
            what = "model.width" if self.position.startswith("sincos2d") else "model.width / model.heads"
            raise ValueError(f"model.position={self.position} needs {what} to be a multiple of 4, got {of}")

    @property
    def feedforward_width(self) -> int:
        """D_ff."""
        return self.mlp_width if self.mlp_width is not None else 4 * self.width

    @property
    def head_width(self) -> int:
        """K = D / H, the columns of one head."""
        return self.width // self.heads

    @property
    def grid(self) -> int:
        """Patches per side of an image of image_size."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """N = H W / P^2."""
        return self.grid**2

    @property
    def prefix_tokens(self) -> int:
        """Class token and registers, which stand before the patches in this order."""
        return int(self.class_token) + self.registers

    @property
    def tokens(self) -> int:
        """What the encoder sees: class token, registers and patches."""
        return self.prefix_tokens + self.patches

    @property
    def is_post_norm(self) -> bool:
        """Norms stand after the sums, and there is no final one."""
        return self.norm in ("post", "deepnorm")
