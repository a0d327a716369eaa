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
from vitscale.base.progress import seconds_of
from vitscale.base.records import decode
from vitscale.model.config import ModelConfig
from vitscale.model.presets import preset, preset_names

Kind = Literal["result", "machine", "watching"]
T = TypeVar("T")
PRESET = "model.preset"
"""An override, but no setting: it is stored as the numbers it stands for."""


def watching(default: Any) -> Any:
    """A field that says what is looked at, and when."""
    return field(default=default, metadata={"kind": "watching"})


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The update: optimizer, schedule, decay. Decoupled weight decay as torch does it: the decay per step is lr * weight_decay.

    Sources that decay by schedule * weight_decay without the peak rate (big_vision, Loshchilov & Hutter's own form) are
    converted by dividing by the peak rate.
    """

    global_batch: int
    """Images per optimizer update over all ranks."""
    peak_lr: float
    """Learning rate after warm-up, for `optim.global_batch`; never rescaled silently."""
    micro_batch_max: int = 64
    """Most images one rank feeds forward at once; the micro-batch is the largest divisor of its share up to this."""
    optimizer: Literal["adamw", "lion", "sgd", "muon"] = "adamw"
    """adamw (Loshchilov & Hutter 2019); lion (Chen et al. 2023: beta1 0.9, beta2 0.99); sgd with `momentum`; muon (Jordan et
    al. 2024, momentum 0.95) for the matrices of the blocks, adamw with `adam_lr` for everything else."""
    schedule: Literal["cosine", "linear", "rsqrt", "wsd", "constant"] = "cosine"
    """After warm-up: cosine or linear down to end_lr at the end of the run; rsqrt: peak / sqrt(1 + t / timescale) (Zhai et
    al. 2022); wsd: stays at the peak; constant: as wsd, without a cool-down. rsqrt and wsd end with `cooldown`."""
    warmup: int | str = 0
    """Length of the linear warm-up from 0: steps, or a text such as "5%", "5ep", "10000img"."""
    cooldown: int | str = 0
    """rsqrt, wsd: length of the last, linear fall to end_lr."""
    timescale: int | str = 10_000
    """rsqrt: steps behind the warm-up after which the rate has fallen to 1 / sqrt(2) of the peak."""
    end_lr: float = 0.0
    """Learning rate the schedule ends at."""
    weight_decay: float = 0.1
    """Applies to matrices only: not to biases, norms, class token and positions."""
    head_weight_decay: float | None = None
    """Weight decay of the head's matrix (Zhai et al. 2022, section 3.1: 100 times the body's); None: as all others."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each block to the one below it (BEiT, MAE); the head has factor 1."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9
    """sgd; muon has its own."""
    moment_dtype: Literal["fp32", "bf16"] = "fp32"
    """What the first moment (adamw, lion) or the momentum (sgd, muon) is kept in; bf16 saves two bytes a number (AugReg)."""
    adam_lr: float | None = None
    """muon: peak rate of what adamw updates; None: peak_lr."""
    clip: float = 1.0
    """Largest global gradient norm; 0: off."""

    def __post_init__(self) -> None:
        for name in ("global_batch", "peak_lr", "micro_batch_max", "eps", "adam_lr"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"optim.{name} must be > 0, got {value}")
        for name in ("end_lr", "weight_decay", "head_weight_decay", "clip"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"optim.{name} must be >= 0, got {value}")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} must be within [0, 1), got {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        if self.cooldown != 0 and self.schedule not in ("rsqrt", "wsd"):
            raise ValueError(
                f"optim.cooldown={self.cooldown!r} has no effect with optim.schedule={self.schedule}; "
                "set optim.cooldown to 0 or optim.schedule to rsqrt or wsd"
            )
        if self.adam_lr is not None and self.optimizer != "muon":
            raise ValueError(f"optim.adam_lr has no effect with optim.optimizer={self.optimizer}; delete it")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, on what objective, from which seed and weights, in which precision."""

    length: int | str
    """Length of the run: steps, or a text such as "60ep" or "1000000img"."""
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    objective: Literal["softmax", "sigmoid"] = "softmax"
    """Cross-entropy over classes that exclude each other, or for each class by itself: then the sum over the classes,
    averaged over the images (big_vision). Of several labels sigmoid wants each, and softmax shares 1 among them."""
    label_smoothing: float = 0.0
    """softmax: (1 - s) target + s / classes. sigmoid: the same targets, as timm's BCE has them."""
    masked_classes: tuple[int, ...] = ()
    """Classes that take no part: no logit in the softmax, no term in the sigmoid's sum, never predicted in an evaluation."""
    head_bias: float = 0.0
    """Initial value of the head's biases; -10 for sigmoid over 20 thousand classes (Beyer et al. 2020, big_vision)."""
    dropout: float = 0.0
    """After the positions are added, after attention's output, and after both maps of the feed-forward (ViT, appendix B.1)."""
    mixup: float = 0.0
    """Alpha of mixup's Beta(alpha, alpha) (Zhang et al. 2018); 0: off."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta(alpha, alpha) (Yun et al. 2019); 0: off. With both, each group draws one of them at even odds."""
    mix_group: int = 4
    """Consecutive images of a global batch that are paired among each other by mixup and cutmix; divides the micro-batch."""
    ema: tuple[float, ...] = ()
    """Decays of exponential moving averages of the parameters, such as [0.9999]; none: no average is kept."""
    drop_path: float = 0.0
    """Stochastic depth (Huang et al. 2016): share of images whose branch of a block is left out, and not computed."""
    drop_path_rule: Literal["uniform", "linear"] = "uniform"
    """uniform: the same rate in every block (DeiT III); linear: from 0 in the first to drop_path in the last (DeiT)."""
    resolutions: tuple[str, ...] = ()
    """Progressive resolution: image sizes and from when, such as ["128@0", "160@40%", "224@80%"]; none: model.image_size."""
    skip_steps: tuple[int, ...] = ()
    """Steps whose update is left out, by their numbers in metrics.jsonl, such as [1201, 1207]."""
    spike_sigmas: float = 6.0
    """A step is skipped when its loss is this many standard deviations above the mean of the last 128 accepted ones, as in
    OLMo-core's SkipStepOptimizer, and 0.5 nats above it; 0: never."""
    rollback_skips: int = 3
    """Steps gone bad within rollback_window that send the run back to a checkpoint older than they are; 0: never."""
    rollback_window: int = 50
    """Steps."""
    rollback_jump: int = 0
    """Global batches left out behind the last bad step when the run goes back."""
    rollbacks_max: int = 3
    """How often a run may go back; then it ends as diverged (exit 79)."""
    init_weights: str = machine("")
    """Where a fine-tuning takes its weights from; empty: fresh weights."""
    branch: str = machine("")
    """RUN@STEP whose whole state a branch starts from; empty: the run is none."""
    init_sha256: str = ""
    """sha256 of those weights, or of the record of that checkpoint; filled in when the run starts."""

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "drop_path", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be within [0, 1), got {getattr(self, name)}")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} must be >= 0, got {getattr(self, name)}")
        if self.mix_group < 2:
            raise ValueError(f"train.mix_group must be at least 2, got {self.mix_group}")
        if self.seed < 0:
            raise ValueError(f"train.seed must be 0 or more, got {self.seed}")
        for name in ("spike_sigmas", "rollback_skips", "rollback_jump", "rollbacks_max"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} must be >= 0, got {getattr(self, name)}")
        if self.rollback_window < max(1, self.rollback_skips):
            raise ValueError(
                f"train.rollback_window={self.rollback_window} steps cannot hold train.rollback_skips={self.rollback_skips} "
                "skipped ones; enlarge the window or lower the number"
            )
        if self.skip_steps and min(self.skip_steps) < 1:
            raise ValueError(f"train.skip_steps: steps are numbered from 1, got {min(self.skip_steps)}")
        for decay in self.ema:
            if not 0 < decay < 1:
                raise ValueError(f"train.ema: a decay must be within (0, 1), got {decay}")
        if len(set(self.ema)) < len(self.ema):
            raise ValueError(f"train.ema: each decay once, got {list(self.ema)}")
        if self.masked_classes and (min(self.masked_classes) < 0 or len(set(self.masked_classes)) < len(self.masked_classes)):
            raise ValueError("train.masked_classes: expected numbers of classes from 0 on, each once")

    def drop_rates(self, depth: int) -> tuple[float, ...]:
        """The rate of stochastic depth of every block."""
        if self.drop_path_rule == "uniform" or depth == 1:
            return (self.drop_path,) * depth
        return tuple(self.drop_path * layer / (depth - 1) for layer in range(depth))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What is written down, and when. All lengths as in train.length; percent is of the whole run."""

    log_every: int | str = watching(50)
    eval_every: int | str = watching("10%")
    save_every: int | str = watching("10%")
    """auto: as often as loses the least time, from what a save costs and `failures_per_host_day` (Young 1974, Daly 2006)."""
    failures_per_host_day: float = watching(0.0065)
    """Failures that end the job, per host of eight GPUs and day; the default is Meta's RSC (Kokolis et al. 2024)."""
    attention_every: int | str = watching(0)
    """Attention of the first evaluation images (without any: of training images) to TensorBoard; 0: never."""
    keep_last: int = watching(2)
    """Checkpoints kept besides those of keep_every."""
    keep_every: int | str = watching(0)
    """Keep every checkpoint at a multiple of this for ever; 0: none."""
    parity: Literal["first", "never"] = watching("first")
    """Prove the gradients of a configuration against plain torch before its first start, on a reduced twin; or never."""
    histograms_every: int | str = watching(0)
    """Histograms of update-to-weight ratios per block, maximum and entropy of attention, to TensorBoard; 0: never."""
    stop_after: int | str = watching(0)
    """Save and end (exit 76) before a start of the program is this old: seconds, or a text such as "3h50m"; 0: no limit."""
    integrity_every: int | str = watching(100)
    """Compare what all ranks must hold equally, bit for bit; also before each save. 0: never."""
    step_timeout: float = watching(600.0)
    """Seconds without any progress after which a run counts as hung, names the late rank and ends with 75; 0: never. Longer
    than the compilation in the first step and than a save."""

    def __post_init__(self) -> None:
        try:
            seconds_of(self.stop_after)
        except ValueError as error:
            raise ValueError(f"run.stop_after: {error}") from None
        if not self.failures_per_host_day > 0:
            raise ValueError(f"run.failures_per_host_day must be above 0, got {self.failures_per_host_day}")
        if self.keep_last < 1:
            raise ValueError(
                f"run.keep_last must be at least 1, got {self.keep_last}: the newest valid checkpoint is never deleted"
            )
        if self.step_timeout < 0:
            raise ValueError(f"run.step_timeout must be >= 0 seconds, got {self.step_timeout}")


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

    def __post_init__(self) -> None:
        masked, classes = self.train.masked_classes, self.model.classes
        if masked and max(masked) >= classes:
            raise ValueError(
                f"train.masked_classes names class {max(masked)}, but model.classes={classes} are numbered from 0 to "
                f"{classes - 1}; remove it or set model.classes to at least {max(masked) + 1}"
            )
        if len(masked) == classes:
            raise ValueError(f"train.masked_classes masks all {classes} classes of model.classes; leave at least one")


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


def check_mix_group(config: Config, *, micro_batch: int, accumulation: int) -> None:
    """Raise UsageError where images are mixed in groups of which a micro-batch holds no whole number."""
    group, share = config.train.mix_group, micro_batch * accumulation
    if not (config.train.mixup or config.train.cutmix) or micro_batch % group == 0:
        return
    groups = [str(n) for n in range(2, micro_batch + 1) if micro_batch % n == 0]
    micro_batches = [str(n) for n in range(group, share + 1, group) if share % n == 0]
    ways = [
        *([f"train.mix_group to one of {', '.join(groups)}"] if groups else []),
        *([f"train_micro_batch_size_per_gpu to one of {', '.join(micro_batches)}"] if micro_batches else []),
        *([] if groups or micro_batches else ["another optim.global_batch, or train.mixup and train.cutmix to 0"]),
    ]
    raise UsageError(
        f"train.mix_group={group} does not divide the micro-batch of {micro_batch} images, and mixup and cutmix pair images "
        f"inside groups; set {' or '.join(ways)}"
    )


# ---- decode, override, encode ---------------------------------------------------------------------------------------


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Apply `section.key=value` texts in order; `model.preset=L/16` stands for all settings of a size.

    Raises UsageError naming the nearest key and the expected type.
    """
    record = to_record(config)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise UsageError(f"expected section.key=value, got {override!r}")
        if path == PRESET:
            record["model"] |= _preset(text)
            continue
        if path not in _settings():
            sections = dict.fromkeys(key.partition(".")[0] for key in [*_settings(), "ds"])
            raise UsageError(
                f"there is no setting {path!r} (sections: {', '.join(sections)})"
                f"{nearest(path, [*_settings(), PRESET, 'ds.PATH'])}"
            )
        section, _, key = path.partition(".")
        record[section][key] = _value_of(text)
    return from_record(record)


def _preset(name: str) -> dict[str, Any]:
    try:
        return preset(name)
    except ValueError as error:
        raise UsageError(f"{PRESET}: {error}{nearest(name, preset_names())}") from None


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


NOT_OFFERED = {
    "adafactor": "it factors the second moment over rows and columns, which ZeRO's flat partitions do not know; "
    "take adamw, with optim.moment_dtype=bf16 to save memory",
    "lamb": "it scales each update by the norm of the whole layer, which no rank of ZeRO holds; take adamw",
    "lars": "it scales each update by the norm of the whole layer, which no rank of ZeRO holds; take sgd",
    "shampoo": "it needs whole matrices and their roots, and ZeRO's partitions are flat; take muon or adamw",
    "soap": "it needs whole matrices and their eigenvectors, and ZeRO's partitions are flat; take muon or adamw",
    "adam": "its weight decay runs through the moments; take adamw (the same with optim.weight_decay=0)",
}
"""Optimizers people ask for, with the reason why there is none."""


def _decode_strictly(cls: type[T], record: Any, path: str, *, origin: str) -> T:
    try:
        if isinstance(record, dict) and isinstance(section := record.get("optim"), dict):
            wanted = str(section.get("optimizer")).lower()
            if wanted in NOT_OFFERED:
                raise ValueError(f"optim.optimizer={wanted} is not offered: {NOT_OFFERED[wanted]}")
        return decode(cls, record, path)
    except ValueError as error:
        raise UsageError(f"{origin}: {error}" if origin else str(error)) from None
