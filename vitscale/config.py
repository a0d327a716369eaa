"""One typed configuration tree, strict at the door.

A recipe returns a `Config`; `section.key=value` overrides change it; the resolved tree is stored as JSON in the run
directory and decodes back to an equal tree. Unknown or ill-typed keys raise UsageError with the nearest valid name.
DeepSpeed's side of the settings (how the machine does it) lives in ds_config.json, never here (design.md 7).

Each field has a kind, which says what a resume does with a difference (design.md 4):
result    changes what is learned: must be equal, else exit 2
machine   how it is computed: follows the command
watching  what is logged, saved and evaluated, and when: follows the command
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import Field, dataclass, field
from fractions import Fraction
from typing import Any, Literal, TypeVar, cast

from data_pipeline.config import AugmentConfig, DataConfig, machine
from vitscale.base.errors import UsageError, nearest
from vitscale.base.records import decode

Kind = Literal["result", "machine", "watching"]
T = TypeVar("T")


def watching(default: Any) -> Any:
    """A field that says what is looked at, and when."""
    return field(default=default, metadata={"kind": "watching"})


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
    norm: Literal["pre", "post"] = "pre"
    """post: LayerNorm(z + f(z)) and no final norm, the seed to the letter; pre: the papers and all public weights."""
    projection_bias: bool = True
    """Bias on the linear maps the seed writes without one: E, W_Q, W_K, W_V and W_O. False: the seed to the letter."""
    position: Literal["learned", "sinusoidal"] = "learned"
    norm_eps: float = 1e-6
    """Epsilon of LayerNorm (Flax and timm: 1e-6; torch's own default is 1e-5)."""
    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Subtracted from pixels in 0..1 per channel (0.5/0.5: the range [-1, 1] of the ViT papers)."""
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "width", "depth", "heads", "classes", "channels", "mlp_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name} must be at least 1, got {value}")
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

    @property
    def feedforward_width(self) -> int:
        """D_ff."""
        return self.mlp_width if self.mlp_width is not None else 4 * self.width

    @property
    def patches(self) -> int:
        """N = H W / P^2."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """N + 1: the patches and the class token."""
        return self.patches + 1


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with decoupled weight decay as torch does it: the decay per step is lr * weight_decay."""

    global_batch: int
    """Images per optimizer update over all ranks."""
    peak_lr: float
    """Learning rate after warm-up, for `optim.global_batch`; never rescaled silently."""
    micro_batch_max: int = 64
    """Most images one rank feeds forward at once; the micro-batch is the largest divisor of its share up to this."""
    warmup: int | str = 0
    """Length of the linear warm-up from 0: steps, or a text such as "5%", "5ep", "10000img"."""
    end_lr: float = 0.0
    """Learning rate the cosine ends at."""
    weight_decay: float = 0.1
    """Applies to matrices only: not to biases, norms, class token and positions."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0
    """Largest global gradient norm; 0: off."""

    def __post_init__(self) -> None:
        for name in ("global_batch", "peak_lr", "micro_batch_max", "eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optim.{name} must be > 0, got {getattr(self, name)}")
        for name in ("end_lr", "weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name} must be >= 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} must be within [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, from which seed and weights, in which precision."""

    length: int | str
    """Length of the run: steps, or a text such as "60ep" or "1000000img"."""
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    label_smoothing: float = 0.0
    init_weights: str = machine("")
    """Where a fine-tuning takes its weights from; empty: fresh weights."""
    init_sha256: str = ""
    """sha256 of those weights; filled in when the run starts."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"train.label_smoothing must be within [0, 1), got {self.label_smoothing}")
        if self.seed < 0:
            raise ValueError(f"train.seed must be 0 or more, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What is written down, and when. All lengths as in train.length; percent is of the whole run."""

    log_every: int | str = watching(50)
    eval_every: int | str = watching("10%")
    save_every: int | str = watching("10%")
    keep_last: int = watching(2)
    """Checkpoints kept besides those of keep_every."""
    keep_every: int | str = watching(0)
    """Keep every checkpoint at a multiple of this for ever; 0: none."""

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ValueError(
                f"run.keep_last must be at least 1, got {self.keep_last}: the newest valid checkpoint is never deleted"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """The full configuration of a run, except how the machine does it (ds_config.json)."""

    recipe: str
    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    run: RunConfig = RunConfig()


def steps_of(length: int | str, *, global_batch: int, epoch_images: int, total_steps: int | None = None) -> int:
    """Convert a length to steps, rounding up: 1500, "30ep", "1000000img", or "5%" of `total_steps`.

    The one place where lengths are converted; training code knows only steps. Raises ValueError.
    """
    text = str(length).strip()
    unit = next(unit for unit in ("ep", "img", "%", "") if text.endswith(unit))
    try:
        amount = Fraction(text.removesuffix(unit))  # exact: no epoch count is rounded up because of a binary fraction
    except (ValueError, ZeroDivisionError):
        amount = Fraction(-1)
    if amount < 0 or (unit == "%" and total_steps is None):
        raise ValueError(f'expected a length such as 1500, "30ep", "1000000img" or "5%", got {length!r}')
    steps = {
        "ep": amount * epoch_images / global_batch,
        "img": amount / global_batch,
        "%": amount * (total_steps or 0) / 100,
        "": amount,
    }
    return math.ceil(steps[unit])


# ---- decode, override, encode ---------------------------------------------------------------------------------------


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Apply `section.key=value` texts in order. Raises UsageError naming the nearest key and the expected type."""
    record = to_record(config)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise UsageError(f"expected section.key=value, got {override!r}")
        if path not in _settings():
            sections = dict.fromkeys(key.partition(".")[0] for key in [*_settings(), "ds"])
            raise UsageError(
                f"there is no setting {path!r} (sections: {', '.join(sections)}){nearest(path, [*_settings(), 'ds.PATH'])}"
            )
        section, _, key = path.partition(".")
        record[section][key] = _value_of(text)
    return from_record(record)


def _value_of(text: str) -> Any:
    """JSON where it parses (numbers, true, null, lists), else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _settings() -> dict[str, Field[Any]]:
    """Every dotted key of the tree, with its field."""
    return {
        f"{section.name}.{setting.name}": setting
        for section in dataclasses.fields(Config)
        if dataclasses.is_dataclass(section.type)
        for setting in dataclasses.fields(cast(Any, section.type))
    }


def all_keys() -> list[str]:
    """Every dotted key of the tree."""
    return list(_settings())


def kind_of(key: str) -> Kind:
    """The kind of a dotted key; "recipe" itself is a name and counts as watching."""
    return "watching" if key == "recipe" else _settings()[key].metadata.get("kind", "result")


def to_record(config: Config) -> dict[str, Any]:
    """The tree as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_record(record: dict[str, Any], *, origin: str = "") -> Config:
    """Decode strictly; unknown, missing or ill-typed keys raise UsageError. `origin` names the file in the message."""
    return _decode_strictly(Config, record, "", origin=origin)


def model_from_record(record: dict[str, Any], *, origin: str = "") -> ModelConfig:
    """Decode the section `model` alone, as stored beside weights; errors as in from_record."""
    return _decode_strictly(ModelConfig, record, "model", origin=origin)


def _decode_strictly(cls: type[T], record: Any, path: str, *, origin: str) -> T:
    try:
        return decode(cls, record, path)
    except ValueError as error:
        raise UsageError(f"{origin}: {error}" if origin else str(error)) from None
