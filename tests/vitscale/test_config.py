"""The configuration tree is strict at the door, survives JSON, and knows what a resume may change."""

import dataclasses
import json

import pytest

from data_pipeline.config import AugmentConfig, DataConfig
from vitscale.base.errors import UsageError
from vitscale.config import (
    Config,
    OptimConfig,
    RunConfig,
    TrainConfig,
    all_keys,
    apply_overrides,
    from_record,
    kind_of,
    model_from_record,
    steps_of,
    to_record,
)
from vitscale.model.config import ModelConfig
from vitscale.recipes.catalog import RECIPES, recipe_named

MODEL = {"image_size": 8, "patch_size": 2, "width": 64, "depth": 4, "heads": 4, "classes": 10}


def digits(*overrides: str) -> Config:
    return apply_overrides(recipe_named("digits"), overrides)


# ---- round trip -------------------------------------------------------------------------------------------------


SECTIONS = "(sections: model, optim, train, data, augment, run, ds)"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json_exactly(name):
    config = recipe_named(name)
    assert from_record(json.loads(json.dumps(to_record(config)))) == config


def test_values_survive_that_differ_from_their_defaults():
    config = digits("data.window=full", "model.mlp_width=100", "model.pixel_mean=[0.1,0.2,0.3]", "run.keep_every=7")
    again = from_record(json.loads(json.dumps(to_record(config))))
    assert again == config
    assert again.model.pixel_mean == (0.1, 0.2, 0.3)
    assert model_from_record(to_record(config)["model"]) == config.model


# ---- overrides --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.depth=7", 7),
        ("optim.peak_lr=3e-4", 3e-4),
        ("optim.peak_lr=1", 1.0),
        ("optim.warmup=5%", "5%"),
        ("optim.warmup=12", 12),
        ('optim.warmup="12ep"', "12ep"),
        ("train.precision=bf16", "bf16"),
        ("model.projection_bias=false", False),
        ("model.mlp_width=null", None),
        ("model.mlp_width=128", 128),
        ("model.pixel_std=[1,2,3.5]", (1.0, 2.0, 3.5)),
        ("data.window=full", "full"),
        ("data.window=64", 64),
        ("data.path=2024", "2024"),
        ("data.path=a=b", "a=b"),
        ("data.path=", ""),
    ],
)
def test_an_override_sets_one_value_with_its_type_and_no_other(override, value):
    section, key = override.partition("=")[0].split(".")
    before = digits()
    changed = apply_overrides(before, [override])
    found = getattr(getattr(changed, section), key)
    assert found == value
    assert type(found) is type(value)
    back = dataclasses.replace(getattr(changed, section), **{key: getattr(getattr(before, section), key)})
    assert dataclasses.replace(changed, **{section: back}) == before


def test_the_last_override_of_a_key_wins_and_checks_see_all_of_them_together():
    assert digits("model.depth=7", "model.depth=9").model.depth == 9
    both = digits("model.patch_size=5", "model.image_size=10").model  # neither alone fits the other's old value
    assert (both.image_size, both.patch_size) == (10, 5)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "model.dept=7",
            f"there is no setting 'model.dept' {SECTIONS}; did you mean 'model.depth'",
        ),
        (
            "optm.peak_lr=1",
            f"there is no setting 'optm.peak_lr' {SECTIONS}; did you mean 'optim.peak_lr'",
        ),
        ("depth=7", "sections: model, optim, train, data, augment, run, ds"),
        ("recipe=other", "there is no setting 'recipe'"),
        (
            "model.depth.x=1",
            f"there is no setting 'model.depth.x' {SECTIONS}; did you mean 'model.depth'",
        ),
        ("model=7", "there is no setting 'model'"),
        ("--depth", "expected section.key=value, got '--depth'"),
        ("model.depth=deep", "model.depth: expected a whole number, got 'deep'"),
        ("model.depth=7.5", "model.depth: expected a whole number, got 7.5"),
        ("model.depth=true", "model.depth: expected a whole number, got True"),
        ("model.depth=null", "model.depth: expected a whole number, got None"),
        ("optim.peak_lr=fast", "optim.peak_lr: expected a number, got 'fast'"),
        ("optim.peak_lr=true", "optim.peak_lr: expected a number, got True"),
        ("optim.peak_lr=NaN", "optim.peak_lr: expected a number, got nan"),
        ("optim.peak_lr=1e999", "optim.peak_lr: expected a number, got inf"),
        ("optim.warmup=true", "optim.warmup: expected a whole number or a text, got True"),
        ("optim.optimizer=LAMB", "optim.optimizer=lamb is not offered: it scales each update by the norm of the whole layer"),
        ("optim.optimizer=adafactor", "factors the second moment over rows and columns, which ZeRO's flat partitions"),
        ("optim.optimizer=adamx", "optim.optimizer: expected one of 'adamw', 'lion', 'sgd', 'muon', got 'adamx'"),
        ("model.mlp_width=wide", "model.mlp_width: expected a whole number or null, got 'wide'"),
        ("model.projection_bias=1", "model.projection_bias: expected true or false, got 1"),
        ("model.norm=pst", "model.norm: expected one of 'pre', 'post', 'deepnorm', 'respost', got 'pst'; did you mean 'post'"),
        ("train.precision=16", "train.precision: expected one of 'fp32', 'bf16', 'fp16', got 16"),
        ("data.window=fll", "data.window: expected a whole number or 'full', got 'fll'"),
        ("model.pixel_mean=0.5", "model.pixel_mean: expected a list, each item a number, got 0.5"),
        ('model.pixel_mean=[0.5,"a",0.5]', "model.pixel_mean: expected a number, got 'a'"),
        ("data.path=null", "data.path: expected a text, got None"),
        ('data.path=["a"]', "data.path: expected a text, got ['a']"),
        ("model.image_size=9", "nearest valid sizes: 8 and 10"),
    ],
)
def test_a_wrong_word_is_one_sentence(override, said):
    with pytest.raises(UsageError) as caught:
        digits(override)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stored_record_is_decoded_as_strictly():
    record = to_record(digits())
    for path, wrong in (
        ("there is no setting 'modl'; did you mean 'model'", record | {"modl": {}}),
        (
            "there is no setting 'model.depht'; did you mean 'model.depth'",
            record | {"model": record["model"] | {"depht": 3}},
        ),
        ("the setting recipe is missing", {k: v for k, v in record.items() if k != "recipe"}),
        ("the setting optim.peak_lr is missing", record | {"optim": {"global_batch": 96}}),
        ("expected a section with keys at run, got 3", record | {"run": 3}),
        ("expected a section with keys at the top, got []", []),
    ):
        with pytest.raises(UsageError) as caught:
            from_record(wrong, origin="RUN/config.json")
        assert str(caught.value).startswith(f"RUN/config.json: {path}")
    with pytest.raises(UsageError, match=r"FILE: model.depth: expected a whole number, got 'x'"):
        model_from_record(record["model"] | {"depth": "x"}, origin="FILE")


def test_what_has_a_default_may_be_absent_from_a_record():
    record = to_record(digits())
    del record["data"], record["run"]["keep_last"]
    decoded = from_record(record)
    assert decoded.data == DataConfig()
    assert decoded.run.keep_last == RunConfig().keep_last


# ---- checks of the sections -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "base", "wrong", "said"),
    [
        *[
            (ModelConfig, MODEL, {name: 0}, f"model.{name} must be at least 1, got 0")
            for name in (*MODEL, "channels", "mlp_width")
        ],
        (ModelConfig, MODEL, {"patch_size": 3}, "nearest valid sizes: 6 and 9"),
        (ModelConfig, MODEL, {"patch_size": 16}, "nearest valid sizes: 16 and 16"),
        (ModelConfig, MODEL, {"heads": 5}, "model.width=64 is not a multiple of model.heads=5"),
        (ModelConfig, MODEL, {"channels": 1}, "one number per channel (1), got 3 and 3"),
        (ModelConfig, MODEL, {"pixel_std": (0.5,)}, "one number per channel (3), got 3 and 1"),
        (ModelConfig, MODEL, {"pixel_std": (0.5, 0.0, 0.5)}, "model.pixel_std must be > 0, got (0.5, 0.0, 0.5)"),
        (ModelConfig, MODEL, {"norm_eps": 0.0}, "model.norm_eps must be > 0, got 0.0"),
        *[
            (OptimConfig, {"global_batch": 96, "peak_lr": 1e-3}, {name: 0}, f"optim.{name} must be > 0, got 0")
            for name in ("global_batch", "peak_lr", "micro_batch_max", "eps")
        ],
        *[
            (OptimConfig, {"global_batch": 96, "peak_lr": 1e-3}, {name: -0.1}, f"optim.{name} must be >= 0, got -0.1")
            for name in ("end_lr", "weight_decay", "clip")
        ],
        *[
            (OptimConfig, {"global_batch": 96, "peak_lr": 1e-3}, {name: value}, f"optim.{name} must be within [0, 1), got")
            for name in ("beta1", "beta2")
            for value in (-0.1, 1.0)
        ],
        (TrainConfig, {"length": 1}, {"label_smoothing": 1.0}, "train.label_smoothing must be within [0, 1), got 1.0"),
        (TrainConfig, {"length": 1}, {"label_smoothing": -0.1}, "train.label_smoothing must be within [0, 1), got -0.1"),
        (TrainConfig, {"length": 1}, {"seed": -1}, "train.seed must be 0 or more, got -1"),
        (TrainConfig, {"length": 1}, {"spike_sigmas": -1.0}, "train.spike_sigmas must be >= 0, got -1"),
        (TrainConfig, {"length": 1}, {"rollback_jump": -1}, "train.rollback_jump must be >= 0, got -1"),
        (TrainConfig, {"length": 1}, {"rollback_window": 2}, "cannot hold train.rollback_skips=3"),
        (TrainConfig, {"length": 1}, {"skip_steps": (4, 0)}, "train.skip_steps: steps are numbered from 1, got 0"),
        (RunConfig, {}, {"keep_last": 0}, "the newest valid checkpoint is never deleted"),
        (DataConfig, {}, {"lanes": 0}, "data.lanes must be at least 1, got 0"),
        (DataConfig, {}, {"window": 0}, 'data.window must be at least 1 or "full", got 0'),
        (DataConfig, {}, {"workers": -1}, "data.workers must be 0 or more, got -1"),
        (DataConfig, {}, {"cache_bytes": "50 apples"}, "data.cache_bytes: expected a size above 0 such as 500GB"),
        (AugmentConfig, {}, {"crop_area_min": 0.0}, "0 < min <= max <= 1, got 0.0 and 1.0"),
        (AugmentConfig, {}, {"crop_area_min": 0.6, "crop_area_max": 0.5}, "0 < min <= max <= 1, got 0.6 and 0.5"),
        (AugmentConfig, {}, {"crop_area_max": 1.1}, "0 < min <= max <= 1, got 0.05 and 1.1"),
        (AugmentConfig, {}, {"crop_ratio_max": 0.9}, "augment.crop_ratio_max must be at least 1, got 0.9"),
        (AugmentConfig, {}, {"flip": 1.1}, "augment.flip must be within 0 and 1, got 1.1"),
        (AugmentConfig, {}, {"eval_crop": 0.0}, "augment.eval_crop must be above 0 and at most 1, got 0.0"),
        (AugmentConfig, {}, {"eval_crop": 1.1}, "augment.eval_crop must be above 0 and at most 1, got 1.1"),
    ],
)
def test_every_check_of_a_section_names_the_key_and_the_value(section, base, wrong, said):
    section(**base)
    with pytest.raises(ValueError) as caught:
        section(**base | wrong)
    assert said in str(caught.value)


@pytest.mark.parametrize("edge", [{"beta1": 0.0}, {"clip": 0.0}, {"weight_decay": 0.0}, {"end_lr": 0.0}])
def test_the_edges_of_a_range_belong_to_it(edge):
    OptimConfig(global_batch=1, peak_lr=1e-3, **edge)


def test_what_follows_from_the_model_section():
    model = ModelConfig(**MODEL)
    assert (model.patches, model.tokens, model.feedforward_width) == (16, 17, 256)
    assert ModelConfig(**MODEL | {"mlp_width": 100}).feedforward_width == 100


def test_a_configuration_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        digits().model.depth = 3  # type: ignore[misc]


# ---- kinds ------------------------------------------------------------------------------------------------------

# What a resume does with a difference (design.md 4). Moving a key to another row changes what a user may do to a run.
KINDS = {
    "result": """
        model.image_size model.patch_size model.width model.depth model.heads model.classes model.mlp_width model.channels
        model.norm model.norm_kind model.norm_bias model.norm_eps model.projection_bias model.qkv_bias model.qk_norm
        model.parallel model.activation model.layer_scale model.class_token model.registers model.position
        model.prefix_positions model.position_resize model.pool model.pool_norm model.pre_logits_width model.pixel_mean
        model.pixel_std
        optim.global_batch optim.peak_lr optim.micro_batch_max optim.optimizer optim.schedule optim.warmup optim.cooldown
        optim.timescale optim.end_lr optim.weight_decay optim.head_weight_decay optim.layer_decay optim.beta1 optim.beta2
        optim.eps optim.momentum optim.moment_dtype optim.adam_lr optim.clip
        train.length train.seed train.precision train.objective train.label_smoothing train.masked_classes train.head_bias
        train.dropout train.mixup train.cutmix train.mix_group train.ema train.drop_path train.drop_path_rule
        train.resolutions train.skip_steps train.spike_sigmas train.rollback_skips train.rollback_window
        train.rollback_jump train.rollbacks_max train.init_sha256
        data.fingerprint data.weights data.eval_fingerprint data.lanes data.window
        augment.crop_area_min augment.crop_area_max augment.crop_ratio_max augment.flip augment.eval_crop
        augment.policy augment.randaugment_ops augment.randaugment_magnitude augment.colour_jitter augment.hue_jitter
        augment.erase augment.erase_with
    """,
    "machine": """data.path data.eval_path data.workers data.bad_images_max data.cache_dir data.cache_bytes train.init_weights
        train.branch""",
    "watching": """run.log_every run.eval_every run.save_every
        run.failures_per_host_day run.attention_every run.keep_last run.keep_every run.parity
        run.histograms_every run.integrity_every run.stop_after run.step_timeout""",
}


def test_every_setting_has_the_kind_of_the_table():
    table = {key: kind for kind, keys in KINDS.items() for key in keys.split()}
    assert {key: kind_of(key) for key in all_keys()} == table
    assert kind_of("recipe") == "watching"


# ---- lengths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        (0, 0),
        (1500, 1500),
        ("1500", 1500),
        ("10.5", 11),
        ("1ep", 15),  # 1437 / 96 = 14.97
        ("60ep", 899),  # 898.125
        ("32ep", 479),  # exactly 479: no step more
        ("0ep", 0),
        ("0.5 ep", 8),
        ("96img", 1),
        ("97img", 2),
        ("960000img", 10_000),
        ("1e6img", 10_417),
        ("5%", 45),  # 44.95
        ("100%", 899),
        ("0%", 0),
        ("0.1%", 1),
        (" 10 % ", 90),
    ],
)
def test_a_length_becomes_steps_rounded_up(length, steps):
    assert steps_of(length, global_batch=96, epoch_images=1437, total_steps=899) == steps


def test_a_length_that_is_a_whole_number_of_steps_is_never_rounded_up():
    # In binary fractions 0.07 * 100 / 1 and 0.29 * 100 / 1 come out above or below 7 and 29.
    for hundredths in range(1, 1000):
        assert steps_of(f"{hundredths / 100}ep", global_batch=1, epoch_images=100) == hundredths
        assert steps_of(f"{hundredths / 100}%", global_batch=1, epoch_images=1, total_steps=10_000) == hundredths
    assert steps_of("1000000ep", global_batch=3, epoch_images=3 * 10**12 + 3) == 10**18 + 10**6


@pytest.mark.parametrize(
    "length", [-1, "-1", "-1ep", "", "ep", "%", "nan", "nanep", "inf", "ten", "10epochs", "10 steps", "1/0"]
)
def test_what_is_no_length_is_refused_with_examples(length):
    with pytest.raises(ValueError, match='expected a length such as 1500, "30ep"') as caught:
        steps_of(length, global_batch=96, epoch_images=1437, total_steps=899)
    assert repr(length) in str(caught.value)


def test_percent_needs_a_whole():
    with pytest.raises(ValueError, match="got '5%'"):
        steps_of("5%", global_batch=96, epoch_images=1437)
