"""ds_config.json: every "auto" is resolved, every contradiction is named, and DeepSpeed gets a complete dictionary."""

import copy
import json
from pathlib import Path
from typing import Any

import deepspeed.runtime.config as theirs
import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from vitscale.base.errors import UsageError
from vitscale.config import Config, apply_overrides
from vitscale.ds_check import _FITS
from vitscale.ds_config import DsConfig, divisors, read_ds_config, resolve_ds_config
from vitscale.ds_keys import (
    ACTIVATION_KEYS,
    ACTIVATION_REASONS,
    AUTO_KEYS,
    CHECKED_LATER,
    COUNT,
    FLAG,
    KNOWN,
    REFUSED,
    SIZE,
    ZERO,
    Table,
)
from vitscale.recipes.catalog import recipe_named

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = json.loads((ROOT / "ds_config.json").read_text())


def config_of(*overrides: str) -> Config:
    """A global batch of 96, at most 48 images at once, clipping at 1.0, fp32, depth 4; unless told otherwise."""
    base = ["optim.global_batch=96", "optim.micro_batch_max=48", "optim.clip=1.0", "train.precision=fp32", "model.depth=4"]
    return apply_overrides(recipe_named("digits"), [*base, *overrides])


def resolve(record: dict[str, Any], *overrides: str, world: int = 1) -> DsConfig:
    return resolve_ds_config(record, config=config_of(*overrides), world=world)


def refusal(record: dict[str, Any], *overrides: str, world: int = 1) -> str:
    with pytest.raises(UsageError) as caught:
        resolve(record, *overrides, world=world)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "micro", "accumulation"), [(1, 48, 2), (2, 48, 1), (3, 32, 1), (4, 24, 1), (6, 16, 1), (8, 12, 1)]
)
def test_auto_takes_the_largest_micro_batch_that_divides(world, micro, accumulation):
    for record in (SHIPPED, {}):
        ds = resolve(record, world=world)
        assert (ds.world, ds.micro_batch, ds.accumulation) == (world, micro, accumulation)
        assert ds.engine["train_batch_size"] == 96
        assert ds.engine["train_micro_batch_size_per_gpu"] == micro
        assert ds.engine["gradient_accumulation_steps"] == accumulation


@pytest.mark.parametrize(("most", "micro"), [(1, 1), (7, 6), (31, 24), (33, 32), (95, 48), (96, 96), (1000, 96)])
def test_auto_stays_within_micro_batch_max(most, micro):
    assert resolve({}, f"optim.micro_batch_max={most}").micro_batch == micro


@pytest.mark.parametrize(
    ("record", "micro", "accumulation"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, 8, 6),
        ({"gradient_accumulation_steps": 4}, 12, 4),
        ({"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 6}, 8, 6),
        ({"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": "auto", "train_batch_size": 96}, 8, 6),
    ],
)
def test_a_literal_is_exact(record, micro, accumulation):
    ds = resolve(record, world=2)
    assert (ds.micro_batch, ds.accumulation) == (micro, accumulation)


def test_a_world_that_does_not_divide_the_batch_is_refused_with_the_valid_ones():
    said = refusal({}, world=5)
    assert "optim.global_batch=96 cannot be shared equally by 5 ranks" in said
    assert "valid numbers of ranks: 1, 2, 3, 4, 6, 8," in said
    assert "a multiple of 5" in said


@pytest.mark.parametrize("key", ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps"])
def test_a_literal_that_does_not_divide_is_refused_with_the_valid_ones(key):
    said = refusal({key: 7}, world=4)
    assert f"{key}=7 does not divide the 24 images of one rank (optim.global_batch=96 / 4 ranks)" in said
    assert said.endswith("valid values: 1, 2, 3, 4, 6, 8, 12, 24")


def test_micro_batch_times_accumulation_must_give_the_global_batch():
    said = refusal({"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2}, world=2)
    assert "train_micro_batch_size_per_gpu=8 x gradient_accumulation_steps=2 x 2 ranks = 32" in said
    assert "optim.global_batch=96" in said


@pytest.mark.parametrize("value", [0, -8, 2.5, True, "8", None])
@pytest.mark.parametrize("key", ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps"])
def test_a_batch_that_is_no_count_is_refused(key, value):
    assert f'{key}: expected a whole number of at least 1 or "auto", got {value!r}' in refusal({key: value})


def test_divisors_rise():
    assert divisors(96) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96]
    assert divisors(1) == [1]


# ---- one number, one home -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "both"),
    [
        ({"train_batch_size": 64}, ("train_batch_size=64", "optim.global_batch=96")),
        ({"gradient_clipping": 0.5}, ("gradient_clipping=0.5", "optim.clip=1.0")),
        ({"gradient_clipping": 0}, ("gradient_clipping=0", "optim.clip=1.0")),
        ({"bf16": {"enabled": True}}, ("bf16.enabled=true", "train.precision=fp32")),
    ],
)
def test_a_literal_that_contradicts_the_recipe_is_refused_with_both_values(record, both):
    said = refusal(record)
    assert all(value in said for value in both)
    assert '"auto"' in said


def test_bf16_switched_off_contradicts_a_recipe_in_bf16():
    said = refusal({"bf16": {"enabled": False}}, "train.precision=bf16")
    assert "bf16.enabled=false" in said
    assert "train.precision=bf16" in said


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_literals_that_repeat_the_recipe_are_welcome(precision):
    record = {"train_batch_size": 96, "gradient_clipping": 1.0, "bf16": {"enabled": precision == "bf16"}}
    assert resolve(record, f"train.precision={precision}") == resolve({}, f"train.precision={precision}")


def test_two_precisions_at_once_are_refused():
    said = refusal({"bf16": {"enabled": True}, "fp16": {"enabled": True}})
    assert "bf16.enabled=true and fp16.enabled=true" in said and "train.precision (now fp32)" in said
    assert "fp16.enabled=true" in refusal({"fp16": {"enabled": True}})
    assert "fp16.enabled=false" in refusal({"fp16": {"enabled": False}}, "train.precision=fp16")
    assert "fp16.enabled: expected true, false" in refusal({"fp16": {"enabled": 1}})


# ---- keys -------------------------------------------------------------------------------------------------------


def set_dotted(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize("path", REFUSED)
def test_each_refused_key_is_refused_with_its_reason(path):
    said = refusal(set_dotted(path, {"enabled": True}))
    assert said == f"ds_config: {path!r} is refused: {REFUSED[path]}"


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("train_bach_size", "'train_bach_size'; did you mean 'train_batch_size'?"),
        ("zero_optimisation", "'zero_optimisation'; did you mean 'zero_optimization'?"),
        ("zero_optimization.overlap_com", "'zero_optimization.overlap_com'; did you mean 'overlap_comm'?"),
        ("bf16.enable", "'bf16.enable'; did you mean 'enabled'?"),
        ("vitscale.recompte", "'vitscale.recompte'; did you mean 'recompute'?"),
        ("aio", "'aio'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(path, hint):
    assert refusal(set_dotted(path, 1)) == f"ds_config: there is no key {hint}"


@pytest.mark.parametrize("section", [key for key, inner in KNOWN.items() if isinstance(inner, dict)])
def test_a_section_must_be_one(section):
    assert refusal({section: True}) == f"ds_config: expected a section with keys at {section!r}, got True"


@pytest.mark.parametrize(
    "path",
    [
        *(f"zero_optimization.{key}" for key in ZERO if not key.startswith("offload")),
        "steps_per_print",
        "vitscale.recompute",
        "vitscale.attention",
    ],
)
def test_auto_is_refused_where_it_has_no_meaning(path):
    said = refusal(set_dotted(path, "auto"))
    assert said == f'ds_config: {path} cannot be "auto"; only these can: {", ".join(AUTO_KEYS)}'


@pytest.mark.parametrize("key", ACTIVATION_REASONS)
def test_activation_checkpointing_is_refused_key_by_key(key):
    said = refusal({"activation_checkpointing": {key: 3 if key == "number_checkpoints" else True}})
    assert f"activation_checkpointing.{key}=" in said
    assert ACTIVATION_REASONS[key] in said
    assert "vitscale.recompute" in said
    for off in (False, None):
        assert "activation_checkpointing" not in resolve({"activation_checkpointing": {key: off}}).engine


@pytest.mark.parametrize("stage", [-1, 4, 2.0, True, "2", None])
def test_a_stage_is_one_of_four(stage):
    said = refusal({"zero_optimization": {"stage": stage}})
    assert said == f"zero_optimization.stage: expected 0, 1, 2 or 3, got {stage!r}"


@pytest.mark.parametrize(("value", "every"), [("none", 0), ("all", 1), (1, 1), (2, 2), (4, 4)])
def test_recompute_says_every_how_many_blocks(value, every):
    assert resolve({"vitscale": {"recompute": value}}).recompute == every


@pytest.mark.parametrize("value", [0, 5, -1, 2.0, True, "some", None])
def test_recompute_outside_the_model_is_refused(value):
    said = refusal({"vitscale": {"recompute": value}})
    assert said == f'vitscale.recompute: expected "none", "all", "selective" or a number from 1 to model.depth=4, got {value!r}'


@pytest.mark.parametrize("key", ACTIVATION_KEYS)
def test_deepspeeds_own_checkpointing_needs_blocks_that_are_recomputed_whole(key):
    section = {"activation_checkpointing": {key: True}}
    assert resolve({**section, "vitscale": {"recompute": 2}}).checkpoint_keys == (key,)
    for ours in ({"recompute": "none"}, {"recompute": "selective"}, {"recompute": "all", "compile": "blocks"}):
        assert f"activation_checkpointing.{key} needs blocks that are recomputed whole" in refusal(
            {**section, "vitscale": ours}
        )
    assert resolve({"activation_checkpointing": {key: False}}).checkpoint_keys == ()
    assert "expected true or false, got 1" in refusal({"activation_checkpointing": {key: 1}})


def test_selective_recomputation_is_a_word():
    assert resolve({"vitscale": {"recompute": "selective"}}).recompute == "selective"


def test_kernel_and_compiler_are_chosen_by_words():
    ds = resolve({})
    assert (ds.attention, ds.compile_blocks) == ("torch", False)
    ds = resolve({"vitscale": {"attention": "cudnn", "compile": "blocks"}})
    assert (ds.attention, ds.compile_blocks) == ("cudnn", True)
    assert "did you mean 'cudnn'" in refusal({"vitscale": {"attention": "cudn"}})
    assert "expected one of none, blocks, got 'all'" in refusal({"vitscale": {"compile": "all"}})
    assert "stage 3" in refusal({"zero_optimization": {"stage": 3}, "vitscale": {"compile": "blocks"}})
    assert "selective has no effect inside compiled" in refusal({"vitscale": {"compile": "blocks", "recompute": "selective"}})


def test_without_a_word_nothing_is_recomputed_and_the_stage_is_2():
    ds = resolve({})
    assert (ds.recompute, ds.stage) == (0, 2)


# ---- what DeepSpeed gets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "stage", "bf16", "autocast", "data_types", "mechanism"),
    [
        *[("fp32", stage, False, None, {}, "fp32") for stage in range(4)],
        *[
            ("bf16", stage, False, {"enabled": True, "dtype": "bfloat16"}, {}, "bf16 autocast on fp32 weights")
            for stage in (0, 1)
        ],
        *[
            ("bf16", stage, True, None, {"grad_accum_dtype": "fp32"}, "bf16 weights, fp32 masters and accumulation")
            for stage in (2, 3)
        ],
    ],
)
def test_each_precision_has_one_mechanism_per_stage(precision, stage, bf16, autocast, data_types, mechanism):
    for said in ({}, {"data_types": {"grad_accum_dtype": "fp32"}}):  # repeating what happens anyway changes nothing
        ds = resolve({"zero_optimization": {"stage": stage}, **said}, f"train.precision={precision}")
        assert ds.engine["bf16"] == {"enabled": bf16}
        assert ds.engine["fp16"] == {"enabled": False}
        assert ds.engine.get("torch_autocast") == autocast
        assert ds.engine.get("data_types", {}) == data_types
        assert ds.mechanism == mechanism


def test_accumulation_in_bf16_is_a_choice_where_it_means_something():
    record = {"data_types": {"grad_accum_dtype": "bf16"}}
    ds = resolve(record, "train.precision=bf16")
    assert ds.engine["data_types"] == {"grad_accum_dtype": "bf16"}
    assert ds.mechanism == "bf16 weights and accumulation, fp32 masters"
    for stage, precision in ((0, "bf16"), (1, "bf16"), (2, "fp32")):
        said = refusal(record | {"zero_optimization": {"stage": stage}}, f"train.precision={precision}")
        assert f"grad_accum_dtype=bf16 has no effect with train.precision={precision} at stage {stage}" in said
    said = refusal({"data_types": {"grad_accum_dtype": "fp8"}}, "train.precision=bf16")
    assert "data_types.grad_accum_dtype: expected fp32 or bf16, got 'fp8'" in said


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_what_has_a_dangerous_default_is_always_written(stage, clip):
    ds = resolve({"zero_optimization": {"stage": stage}}, f"optim.clip={clip}")
    # DeepSpeed clips at 1.0 where the key is absent; at stage 0 our engine clips after its own check.
    assert ds.engine["gradient_clipping"] == (0.0 if stage == 0 else clip)
    assert ds.record["gradient_clipping"] == clip
    assert ds.engine["timers"] == {"throughput": {"enabled": False, "synchronized": False}}
    assert ds.engine["checkpoint"] == {"tag_validation": "Fail"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_accumulates_in_fp32_and_keeps_its_own_settings(stage):
    section = {"initial_scale_power": 10, "loss_scale_window": 7}
    for enabled in ({}, {"enabled": "auto"}, {"enabled": True}):
        ds = resolve({"fp16": section | enabled, "zero_optimization": {"stage": stage}}, "train.precision=fp16")
        assert ds.engine["fp16"] == {**section, "enabled": True}
        assert ds.engine["bf16"] == {"enabled": False}
        assert ds.engine["data_types"] == {"grad_accum_dtype": "fp32"}
    for precision in ("fp32", "bf16"):
        ds = resolve({"fp16": section, "zero_optimization": {"stage": stage}}, f"train.precision={precision}")
        assert ds.engine["fp16"] == {"enabled": False}
        assert ds.record["fp16"] == {**section, "enabled": False}
    assert "grad_accum_dtype=bf16 has no effect" in refusal(
        {"data_types": {"grad_accum_dtype": "bf16"}}, "train.precision=fp16"
    )


@pytest.mark.parametrize("stage", range(4))
def test_offloading_is_where_it_has_an_effect(stage):
    for section, first in (("offload_optimizer", 1), ("offload_param", 3)):
        zero = {"stage": stage, section: {"device": "cpu", "pin_memory": False}}
        if stage < first:
            said = refusal({"zero_optimization": zero})
            assert (
                f"{section}.device=cpu would have no effect at stage {stage}" in said and "set zero_optimization.stage" in said
            )
        else:
            ds = resolve({"zero_optimization": zero})
            assert ds.engine["zero_optimization"] == zero
            assert (ds.offload_optimizer, ds.offload_param) == (section == "offload_optimizer", section == "offload_param")
        ds = resolve({"zero_optimization": zero | {section: {"device": "none"}}})
        assert section not in ds.engine["zero_optimization"] and not ds.offload_optimizer and not ds.offload_param
        said = refusal({"zero_optimization": zero | {section: {"device": "nvme"}}})
        assert f"{section}.device: expected none or cpu, got 'nvme'" in said and "has not been tested" in said


def test_our_optimizer_is_welcome_everywhere():
    ds = resolve({})
    assert ds.engine["zero_allow_untested_optimizer"] is True
    assert ds.engine["zero_force_ds_cpu_optimizer"] is False


def test_what_deepspeed_cannot_do_at_a_stage_is_refused():
    assert "fp16 is not offered at ZeRO stage 0" in refusal({"zero_optimization": {"stage": 0}}, "train.precision=fp16")
    for prescaled in ({"prescale_gradients": True}, {"gradient_predivide_factor": 2.0}):
        assert "do not go with reduce_scatter at stage 2" in refusal(prescaled)
        resolve(prescaled | {"zero_optimization": {"stage": 1}})
        resolve(prescaled | {"zero_optimization": {"stage": 2, "reduce_scatter": False}})
    said = refusal({"communication_data_type": "fp32", "zero_optimization": {"stage": 1}}, "train.precision=bf16")
    assert "communication_data_type=fp32 would have no effect" in said
    resolve({"communication_data_type": "fp32"}, "train.precision=bf16")
    for stage, world in ((2, 2), (3, 3)):
        said = refusal({"zero_optimization": {"stage": stage, "zero_hpz_partition_size": 2}}, world=world)
        assert f"got stage {stage} and {world} ranks" in said


def leaves(table: Table, path: str = "") -> list[tuple[str, str]]:
    found = []
    for name, expected in table.items():
        dotted = f"{path}.{name}" if path else name
        found += leaves(expected, dotted) if isinstance(expected, dict) else [(dotted, expected)]
    return found


WRONG = ["yes", "8", -2, 2.5, [1], {"a": 1}, float("nan"), float("inf")]


@pytest.mark.parametrize(("path", "expected"), [leaf for leaf in leaves(KNOWN) if leaf[1] != CHECKED_LATER])
def test_every_value_is_checked_before_deepspeed_sees_it(path, expected):
    refused = 0
    for value in (*WRONG, *((0, 1) if expected == FLAG else (True, False))):
        record = {"zero_optimization": {"reduce_scatter": False}} | set_dotted(path, value)
        try:
            ds = resolve(record)
        except UsageError as error:
            assert f"{path}: expected {expected}, got {value!r}" in str(error)
            refused += 1
        else:
            theirs.DeepSpeedConfig(copy.deepcopy(ds.engine))  # what we let through, it takes
    assert refused >= 6


def test_a_size_may_be_written_as_2e8():
    for kind in (SIZE, COUNT):
        assert _FITS[kind](2e8) and not _FITS[kind](2.5)
    zero = {"reduce_bucket_size": 2e8}
    assert theirs.DeepSpeedConfig(resolve({"zero_optimization": zero}).engine).zero_config.reduce_bucket_size == 200_000_000


def texts_of(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [text for inner in value.values() for text in texts_of(inner)]
    return [value]


@pytest.mark.parametrize(
    ("stage", "precision"), [(s, p) for s in range(4) for p in ("fp32", "bf16", "fp16") if s > 0 or p != "fp16"]
)
def test_deepspeed_accepts_what_it_gets(stage, precision):
    record = SHIPPED | {"zero_optimization": {**SHIPPED["zero_optimization"], "stage": stage}}
    ds = resolve(record, f"train.precision={precision}", "optim.clip=0.5")
    assert "auto" not in texts_of(ds.engine) + texts_of(ds.record)
    assert ds.engine.keys().isdisjoint({"vitscale", "activation_checkpointing"})
    read = theirs.DeepSpeedConfig(copy.deepcopy(ds.engine))
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (96, 48, 2)
    assert read.zero_config.stage == stage
    assert read.gradient_clipping == (0.0 if stage == 0 else 0.5)
    assert read.bfloat16_config.enabled == (precision == "bf16" and stage >= 2)
    assert read.float16_config.enabled == (precision == "fp16")
    assert read.torch_autocast_enabled == (precision == "bf16" and stage <= 1)
    assert read.checkpoint_tag_validation_fail
    assert not read.timers_config.enabled


def test_our_tables_are_deepspeeds_own():
    fields = DeepSpeedZeroConfig.model_fields
    assert set(ZERO) <= {field.alias or name for name, field in fields.items()}
    removed = set(theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS) | {
        f"zero_optimization.{key}" for key in theirs._REMOVED_ZERO_CONFIG_KEYS
    }
    assert {key for key, reason in REFUSED.items() if "DeepSpeed 0.19 has removed it" in reason} == removed
    assert not set(KNOWN) & set(REFUSED)


def test_resolving_changes_neither_its_input_nor_shares_it():
    record = copy.deepcopy(SHIPPED)
    ds = resolve(record)
    assert record == SHIPPED
    ds.record["zero_optimization"]["stage"] = 99
    assert record == SHIPPED
    assert ds.engine["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_the_stored_record_given_back_resolves_to_the_same(stage, precision):
    ds = resolve(SHIPPED | {"zero_optimization": {"stage": stage}}, f"train.precision={precision}", world=2)
    assert resolve(json.loads(json.dumps(ds.record)), f"train.precision={precision}", world=2) == ds


# ---- the file -----------------------------------------------------------------------------------------------------


def test_overrides_reach_any_depth(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    overrides = ["zero_optimization.stage=3", "vitscale.recompute=all", "steps_per_print=null", "gradient_clipping=1.5"]
    assert read_ds_config(path, overrides) == {
        "zero_optimization": {"stage": 3},
        "vitscale": {"recompute": "all"},
        "steps_per_print": None,
        "gradient_clipping": 1.5,
    }


@pytest.mark.parametrize(
    ("content", "overrides", "said"),
    [
        (None, [], "found none; name one with --deepspeed_config"),
        ("{", [], "is not valid JSON"),
        ("[]", [], "expected a JSON object with keys, got list"),
        ("{}", ["stage"], "expected ds.PATH=value, got 'ds.stage'"),
        ("{}", ["=3"], "expected ds.PATH=value, got 'ds.=3'"),
        ('{"gradient_clipping": 1}', ["gradient_clipping.x=3"], "'gradient_clipping' is a value, not a section"),
    ],
)
def test_a_file_or_override_that_cannot_be_read_is_one_sentence(tmp_path, content, overrides, said):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError) as caught:
        read_ds_config(path, overrides)
    assert said in str(caught.value)
