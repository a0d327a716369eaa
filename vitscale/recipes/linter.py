"""Combinations of settings that run but seldom mean what their author meant: one sentence each, with the source.

A finding never stops a run. Every rule is silent on every shipped recipe, and speaks on one small example of its own
(tests/vitscale/test_linter.py). A rule sees the configuration and the lengths in steps; it returns what is suspicious, why, and
what to change.
"""

from collections.abc import Callable
from dataclasses import dataclass

from vitscale.config import Config
from vitscale.model.flops import parameters


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A configuration and what follows from it."""

    config: Config
    total_steps: int
    warmup_steps: int
    cooldown_steps: int
    source_classes: int | None
    """Classes of the data set the recipe was made for; None where it has none."""

    @property
    def is_fresh(self) -> bool:
        """Pretraining from fresh weights, where most of the literature's numbers hold."""
        return not self.config.train.init_weights

    @property
    def reference_rate(self) -> float:
        """The rate carried over to a batch of 4,096 by the square-root rule of Adam (Malladi et al. 2022) and to width 768 by
        the square root of the width, which the published recipes follow within a factor of 5."""
        optim, model = self.config.optim, self.config.model
        return float(optim.peak_lr / (optim.global_batch / 4096) ** 0.5 * (model.width / 768) ** 0.5)


def findings(facts: Facts) -> list[str]:
    """Every suspicious combination, as sentences; none is the normal case."""
    return [sentence for rule in RULES if (sentence := rule(facts)) is not None]


# ---- rate and decay -------------------------------------------------------------------------------------------------


def _decay_without_effect(f: Facts) -> str | None:
    optim = f.config.optim
    if not f.is_fresh or not 0 < optim.peak_lr * optim.weight_decay < 1e-6:
        return None
    return (
        f"optim.weight_decay={optim.weight_decay:g} times optim.peak_lr={optim.peak_lr:g} shrinks a weight by less than 1e-6 a "
        "step, which is none: big_vision's decays are not multiplied by the rate, so divide them by it (1e-4 at 1e-3 is 0.1 "
        "here)"
    )


def _decay_of_everything(f: Facts) -> str | None:
    optim = f.config.optim
    product = optim.peak_lr * optim.weight_decay
    if product <= 1e-3:
        return None
    return (
        f"optim.weight_decay={optim.weight_decay:g} times optim.peak_lr={optim.peak_lr:g} forgets the weights within "
        f"{1 / product:.0f} steps; the strongest published is 0.3 at 3e-3 (Dosovitskiy et al. 2021, ImageNet): lower one of "
        "them"
    )


def _rate_against_batch(f: Facts) -> str | None:
    optim = f.config.optim
    if optim.optimizer != "adamw" or not f.is_fresh or 1e-4 <= f.reference_rate <= 1e-2:
        return None
    side = "high" if f.reference_rate > 1e-2 else "low"
    return (
        f"optim.peak_lr={optim.peak_lr:g} is {side} for optim.global_batch={optim.global_batch} and "
        f"model.width={f.config.model.width}: {f.reference_rate:.1e} at a batch of 4096 and width 768 by square roots (Malladi "
        "et al. 2022), where the shipped recipes have 2e-4 to 4e-3: change one of them"
    )


def _lion_at_adams_rate(f: Facts) -> str | None:
    if f.config.optim.optimizer != "lion" or f.reference_rate <= 5e-4:
        return None
    return (
        f"optim.peak_lr={f.config.optim.peak_lr:g} is a rate for adamw; lion's updates are 3 to 10 times larger (Chen et al. "
        "2023, section 5): divide optim.peak_lr by 3 to 10 and multiply optim.weight_decay by as much"
    )


def _lion_with_adams_beta(f: Facts) -> str | None:
    if f.config.optim.optimizer != "lion" or f.config.optim.beta2 <= 0.99:
        return None
    return (
        f"optim.beta2={f.config.optim.beta2:g} is adamw's; lion's momentum is decayed by 0.99 (Chen et al. 2023, section 5): "
        "set optim.beta2=0.99"
    )


def _sgd_at_adams_rate(f: Facts) -> str | None:
    optim = f.config.optim
    if optim.optimizer != "sgd" or optim.peak_lr > 1e-3:
        return None
    return (
        f"optim.peak_lr={optim.peak_lr:g} is a rate for adamw; sgd does not divide by the size of the gradient, and ViT "
        "fine-tunes with it at 3e-3 to 6e-2 (Dosovitskiy et al. 2021, appendix B.1.1): raise optim.peak_lr"
    )


# ---- lengths --------------------------------------------------------------------------------------------------------


def _warmup_fills_the_run(f: Facts) -> str | None:
    if f.warmup_steps <= f.total_steps / 2:
        return None
    return (
        f"optim.warmup is {f.warmup_steps:,} of {f.total_steps:,} steps: more than half of the run is below the rate that was "
        "chosen; published recipes warm up for 1 to 11 % (Beyer et al. 2022: 10,000 of 112,603): shorten it, or write it in "
        "percent"
    )


def _postnorm_without_warmup(f: Facts) -> str | None:
    if f.config.model.norm != "post" or f.warmup_steps >= min(1000, f.total_steps / 100):
        return None
    return (
        f"model.norm=post with a warm-up of {f.warmup_steps} steps: gradients behind post-norm are large at first and need one "
        "(Xiong et al. 2020): set optim.warmup=5%, or model.norm=pre"
    )


def _no_cooldown(f: Facts) -> str | None:
    schedule = f.config.optim.schedule
    if schedule not in ("rsqrt", "wsd") or f.cooldown_steps:
        return None
    return (
        f"optim.schedule={schedule} without optim.cooldown ends at a high rate, where much of the score is still missing (Zhai "
        "et al. 2022, section 3.5): set optim.cooldown, or branch off one later with --from RUN@STEP"
    )


def _average_longer_than_the_run(f: Facts) -> str | None:
    slow = [decay for decay in f.config.train.ema if decay**f.total_steps > 0.01]
    if not slow:
        return None
    return (
        f"train.ema={slow[0]:g} looks back over {1 / (1 - slow[0]):,.0f} steps of a run of {f.total_steps:,}, so "
        f"{slow[0] ** f.total_steps:.0%} of the average are still the first weights (it has no bias correction, as in timm): "
        f"set a decay of at most {0.01 ** (1 / f.total_steps):.6g}"
    )


# ---- model ----------------------------------------------------------------------------------------------------------


def _deep_postnorm(f: Facts) -> str | None:
    model = f.config.model
    if model.norm != "post" or model.depth < 18:
        return None
    return (
        f"model.norm=post at model.depth={model.depth}: post-norm of 18 layers and more diverges without scaled residuals "
        "(Wang et al. 2022, DeepNet, section 3): set model.norm=deepnorm or pre"
    )


def _large_without_qk_norm(f: Facts) -> str | None:
    model = f.config.model
    if model.qk_norm or parameters(model) < 8e9:
        return None
    return (
        f"model.qk_norm=false at {parameters(model) / 1e9:.1f} billion parameters: attention logits grew until training "
        "diverged from 8 billion on (Dehghani et al. 2023, section 2): set model.qk_norm=true"
    )


def _layer_decay_of_fresh_weights(f: Facts) -> str | None:
    if f.config.optim.layer_decay == 1 or not f.is_fresh:
        return None
    return (
        f"optim.layer_decay={f.config.optim.layer_decay:g} with fresh weights: the lowest layers learn at "
        f"{f.config.optim.layer_decay ** (f.config.model.depth + 1):.1g} of the rate; it is for fine-tuning (Bao et al. 2022, "
        "BEiT): set it to 1"
    )


def _half_precision(f: Facts) -> str | None:
    if f.config.train.precision != "fp16":
        return None
    return (
        "train.precision=fp16 overflows where ViTs of this kind have large activations, and bf16 ended what clipping could "
        "not (open_clip issue 147, EVA issue 28): set train.precision=bf16 where the device has it"
    )


# ---- objective ------------------------------------------------------------------------------------------------------


def _sigmoid_from_even_odds(f: Facts) -> str | None:
    train, classes = f.config.train, f.config.model.classes
    if train.objective != "sigmoid" or classes < 1000 or train.head_bias <= -3:
        return None
    return (
        f"train.objective=sigmoid over {classes:,} classes with train.head_bias={train.head_bias:g} starts at a loss of "
        f"{classes * 0.693:,.0f} or so, which the first steps spend on the biases: set train.head_bias=-10 (Beyer et al. "
        "2020), or -ln of the number of classes (big_vision, ImageNet-1k: -6.9)"
    )


def _softmax_with_bias(f: Facts) -> str | None:
    if f.config.train.objective != "softmax" or f.config.train.head_bias == 0:
        return None
    return (
        f"train.head_bias={f.config.train.head_bias:g} cancels out of a softmax, so it belongs to another objective: set "
        "train.objective=sigmoid (as the sources of -10 do), or train.head_bias=0"
    )


def _smoothed_sigmoid(f: Facts) -> str | None:
    if f.config.train.objective != "sigmoid" or f.config.train.label_smoothing == 0 or f.config.model.classes < 1000:
        return None
    return (
        f"train.label_smoothing={f.config.train.label_smoothing:g} with train.objective=sigmoid: the recipes with it have none "
        "(big_vision; DeiT III uses smoothing with softmax only), since each class may be false by itself already: set it to 0"
    )


RELEASES = {21_843: "ImageNet-21k as big_vision counts it", 21_841: "the folders of the fall 2011 release (timm, EVA)"} | {
    19_167: "the winter 2021 release",
    11_221: "ImageNet-21K-P of fall 2011",
    10_450: "ImageNet-21K-P of winter 2021",
}
COUNTS = RELEASES | {1000: "ImageNet-1k", 18_291: "JFT-300M", 29_593: "JFT-3B"}


def _one_class_off(f: Facts) -> str | None:
    classes = f.config.model.classes
    near = next((count for count in COUNTS if abs(count - classes) == 1), None)
    if near is None or classes in COUNTS:
        return None
    return (
        f"model.classes={classes} is one off {near}, {COUNTS[near]}: a background class, or a count from 1 (big_transfer issue "
        f"18, ImageNet21K issue 16): set model.classes={near}, or look at the labels"
    )


def _other_release(f: Facts) -> str | None:
    classes, wanted = f.config.model.classes, f.source_classes
    if wanted not in RELEASES or classes not in RELEASES or classes == wanted:
        return None
    return (
        f"model.classes={classes} is {RELEASES[classes]}, but recipe {f.config.recipe} is for {wanted}, {RELEASES[wanted]}: "
        "heads and scores of the two do not compare; name the data's own release"
    )


# ---- regularisation -------------------------------------------------------------------------------------------------


def _dropout_and_depth(f: Facts) -> str | None:
    train = f.config.train
    if train.dropout < 0.1 or train.drop_path < 0.2:
        return None
    return (
        f"train.dropout={train.dropout:g} and train.drop_path={train.drop_path:g} together: the sources have one of them, or "
        "0.1 of both (Steiner et al. 2022; Touvron et al. 2022: stochastic depth alone): set train.dropout=0"
    )


def _pairs_only(f: Facts) -> str | None:
    train = f.config.train
    if not (train.mixup or train.cutmix) or train.mix_group > 2:
        return None
    return (
        "train.mix_group=2 mixes every image with the one that mixes with it, by one coefficient, so a pair gives two shares "
        "of the same two images (the sources mix over whole batches): set train.mix_group=4 or more"
    )


def _averaged_away(f: Facts) -> str | None:
    """Strong mixing on a model that cannot fit the data anyway."""
    train = f.config.train
    if train.mixup + train.cutmix < 1.5 or f.config.model.width > 192:
        return None
    return (
        f"train.mixup={train.mixup:g} and train.cutmix={train.cutmix:g} on a model of width {f.config.model.width}, "
        "which cannot fit the images unmixed: small models are best without (Steiner et al. 2022, figure 4: Ti/16): lower both"
    )


Rule = Callable[[Facts], str | None]
RULES: tuple[Rule, ...] = (
    _decay_without_effect,
    _decay_of_everything,
    _rate_against_batch,
    _lion_at_adams_rate,
    _lion_with_adams_beta,
    _sgd_at_adams_rate,
    _warmup_fills_the_run,
    _postnorm_without_warmup,
    _no_cooldown,
    _average_longer_than_the_run,
    _deep_postnorm,
    _large_without_qk_norm,
    _layer_decay_of_fresh_weights,
    _half_precision,
    _sigmoid_from_even_odds,
    _softmax_with_bias,
    _smoothed_sigmoid,
    _one_class_off,
    _other_release,
    _dropout_and_depth,
    _pairs_only,
    _averaged_away,
)
