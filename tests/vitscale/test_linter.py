"""The linter speaks on each suspicious combination once, and on no shipped recipe."""

import pytest

from vitscale.config import Config, apply_overrides, steps_of
from vitscale.recipes.catalog import RECIPES, Source, recipe_named, source_of
from vitscale.recipes.linter import RULES, Facts, findings


def facts_of(config: Config, *, source: Source | None) -> Facts:
    """As a dry run without data has them; for a recipe without a data set of its own with the images of the digits."""

    def steps(length: int | str, total: int | None = None) -> int:
        images = source.images if source else 1437
        return steps_of(length, global_batch=config.optim.global_batch, epoch_images=images, total_steps=total)

    total = steps(config.train.length)
    return Facts(
        config=config,
        total_steps=total,
        warmup_steps=steps(config.optim.warmup, total),
        cooldown_steps=steps(config.optim.cooldown, total),
        source_classes=source.classes if source else None,
    )


@pytest.mark.parametrize("name", RECIPES)
def test_no_shipped_recipe_is_suspicious(name):
    assert findings(facts_of(recipe_named(name), source=source_of(name))) == []


# recipe, overrides, what the one sentence must hold.
SUSPICIOUS = [
    ("plain_s16", ["optim.weight_decay=1e-4"], "optim.weight_decay=0.0001 times optim.peak_lr=0.001"),
    ("plain_s16", ["optim.weight_decay=3"], "forgets the weights within 333 steps"),
    ("plain_s16", ["optim.peak_lr=0.03", "optim.weight_decay=0.01"], "optim.peak_lr=0.03 is high for optim.global_batch=1024"),
    ("plain_s16", ["optim.global_batch=524288", "train.length=200000"], "optim.peak_lr=0.001 is low for"),
    ("plain_s16", ["optim.optimizer=lion", "optim.beta2=0.99"], "divide optim.peak_lr by 3 to 10"),
    ("plain_s16", ["optim.optimizer=lion", "optim.peak_lr=1e-4"], "set optim.beta2=0.99"),
    ("plain_s16", ["optim.optimizer=sgd"], "optim.peak_lr=0.001 is a rate for adamw; sgd"),
    ("plain_s16", ["train.length=15000"], "optim.warmup is 10,000 of 15,000 steps"),
    ("plain_s16", ["model.norm=post", "optim.warmup=100"], "model.norm=post with a warm-up of 100 steps"),
    ("scaling_g", ["optim.cooldown=0"], "optim.schedule=rsqrt without optim.cooldown"),
    ("plain_s16", ["optim.schedule=wsd"], "optim.schedule=wsd without optim.cooldown"),
    ("plain_s16", ["train.ema=[0.999,0.99999]"], "looks back over 100,000 steps of a run of 112,603"),
    ("augreg_i21k_l16", ["model.norm=post"], "model.norm=post at model.depth=24"),
    ("vit_22b", ["model.qk_norm=false"], "model.qk_norm=false at 22.4 billion parameters"),
    ("plain_s16", ["optim.layer_decay=0.75"], "optim.layer_decay=0.75 with fresh weights"),
    ("plain_s16", ["train.precision=fp16"], "train.precision=fp16 overflows"),
    ("augreg_i21k_b16", ["train.head_bias=0"], "with train.head_bias=0 starts at a loss of 15,137"),
    ("plain_s16", ["train.head_bias=-10"], "train.head_bias=-10 cancels out of a softmax"),
    ("augreg_i1k_s16", ["train.label_smoothing=0.1"], "train.label_smoothing=0.1 with train.objective=sigmoid"),
    ("plain_s16", ["model.classes=1001"], "model.classes=1001 is one off 1000"),
    ("augreg_i21k_b16", ["model.classes=21842"], "model.classes=21842 is one off 21843"),
    ("augreg_i21k_b16", ["model.classes=21841"], "but recipe augreg_i21k_b16 is for 21843"),
    ("deit3_i21k_s16", ["model.classes=19167"], "the winter 2021 release, but recipe deit3_i21k_s16 is for 21841"),
    ("augreg_i21k_l16", ["train.drop_path=0.4"], "train.dropout=0.1 and train.drop_path=0.4 together"),
    ("plain_s16", ["train.mix_group=2"], "train.mix_group=2 mixes every image with the one"),
    ("augreg_i21k_ti16", ["train.mixup=0.8", "train.cutmix=1"], "on a model of width 192"),
]


@pytest.mark.parametrize(("name", "overrides", "said"), SUSPICIOUS, ids=lambda value: str(value)[:40])
def test_each_suspicious_combination_is_named_once_and_nothing_else(name, overrides, said):
    found = findings(facts_of(apply_overrides(recipe_named(name), overrides), source=source_of(name)))
    assert len(found) == 1 and said in found[0], found
    assert "\n" not in found[0] and "  " not in found[0]


def test_every_rule_has_an_example():
    speaking = set()
    for name, overrides, _ in SUSPICIOUS:
        facts = facts_of(apply_overrides(recipe_named(name), overrides), source=source_of(name))
        speaking |= {rule for rule in RULES if rule(facts) is not None}
    assert speaking == set(RULES)


def test_what_is_usual_in_fine_tuning_is_suspicious_only_of_fresh_weights():
    usual = ["optim.layer_decay=0.75", "optim.peak_lr=1e-5"]
    source = source_of("deit3_i1k_b16")
    fresh = apply_overrides(recipe_named("deit3_i1k_b16"), usual)
    assert len(findings(facts_of(fresh, source=source))) == 3
    assert findings(facts_of(apply_overrides(fresh, ["train.init_weights=runs/x"]), source=source)) == []
