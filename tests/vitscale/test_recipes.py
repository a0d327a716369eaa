"""Recipes are found by name, what their text claims holds, and their numbers are those of their sources."""

import dataclasses
import re
from pathlib import Path

import pytest

from vitscale.base.errors import UsageError
from vitscale.config import Config, steps_of
from vitscale.ds_config import resolve_ds_config
from vitscale.model.flops import forward_flops, parameter_shapes, parameters
from vitscale.recipes.catalog import RECIPES, recipe_named, source_of

ROOT = Path(__file__).resolve().parents[2]
WORLDS = [1, 2, 3, 4, 6, 8]
OWN = ["cifar10", "digits", "finetune"]
PUBLISHED = [name for name in RECIPES if name not in OWN]


def said(name: str, field: str) -> str:
    """What a docstring says behind FIELD:, its further lines included."""
    text = RECIPES[name].__doc__ or ""
    found = re.search(rf"^    {field}: +(\S.*(?:\n {{10,}}\S.*)*)", text, re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def total_steps(config: Config, images: int) -> int:
    return steps_of(config.train.length, global_batch=config.optim.global_batch, epoch_images=images)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_bears_the_name_it_is_found_by_and_says_how_to_run_it(name):
    assert recipe_named(name).recipe == name
    for field in ("Command", "Hardware", "Source"):
        assert said(name, field), f"{name} lacks {field}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_of_the_literature_says_where_it_is_from_and_what_converting_it_took(name):
    for field in ("Numbers", "Converted", "Differs", "Published", "Reached"):
        assert said(name, field), f"{name} lacks {field}"
    assert f"--recipe {name} " in said(name, "Command")


@pytest.mark.parametrize("name", PUBLISHED)
def test_another_optimizer_than_the_sources_is_named_first(name):
    first = (RECIPES[name].__doc__ or "").splitlines()[0]
    replaced = {"deit3": "LAMB with a hidden clipping of 1.0", "scaling": "Adafactor (beta2 rising to 0.999)"}
    replaced |= {"sovit": replaced["scaling"], "vit_22b": replaced["scaling"]}
    wanted = next((words for start, words in replaced.items() if name.startswith(start)), None)
    assert recipe_named(name).optim.optimizer == "adamw"
    if wanted is not None:
        assert first.startswith("AdamW where the source has ") and wanted in first
    else:
        assert re.search(r"\bAdamW? 0\.9/0\.999", said(name, "Numbers") + (RECIPES[name].__globals__["__doc__"] or ""))


def test_a_wrong_name_is_answered_with_the_nearest_and_the_list():
    with pytest.raises(UsageError, match=r"no recipe 'digit' among .*digits, .*; did you mean 'digits'\?"):
        recipe_named("digit")


@pytest.mark.parametrize("name", ["digits", "cifar10"])
@pytest.mark.parametrize("world", WORLDS)
def test_the_demonstrations_run_on_any_usual_number_of_ranks(name, world):
    config = recipe_named(name)
    ds = resolve_ds_config({}, config=config, world=world)
    assert ds.world * ds.micro_batch * ds.accumulation == config.optim.global_batch == 96
    assert ds.micro_batch <= config.optim.micro_batch_max


@pytest.mark.parametrize("name", OWN)
def test_every_length_of_a_recipe_is_one(name):
    config = recipe_named(name)

    def steps(length: int | str, total: int | None) -> int:
        return steps_of(length, global_batch=config.optim.global_batch, epoch_images=1437, total_steps=total)

    total = steps(config.train.length, None)
    assert 1 <= steps(config.optim.warmup, total) < total
    for length in (config.run.log_every, config.run.eval_every, config.run.save_every):
        assert 1 <= steps(length, total) <= total


def test_the_demonstrations_log_every_step():
    assert recipe_named("digits").run.log_every == recipe_named("cifar10").run.log_every == 1


# ---- numbers of the sources -----------------------------------------------------------------------------------------

# name: classes, batch, steps. The steps are the epochs of the source times the images of its data over its batch, rounded up,
# because every image is used: sources that drop incomplete batches, or hold images out, have a few less.
LENGTHS = {
    "vit20_jft_b16": (18_291, 4096, 517_823),  # 7 x 303 M / 4096 = 517,822.3
    "vit20_jft_l16": (18_291, 4096, 1_035_645),  # 14 x 303 M / 4096 = 1,035,644.5
    "vit20_jft_h14": (18_291, 4096, 1_035_645),
    "vit20_i21k_b16": (21_843, 4096, 311_949),  # 90 x 14,197,122 / 4096 = 311,948.6
    "vit20_i21k_l16": (21_843, 4096, 311_949),
    "vit20_i1k_b16": (1000, 4096, 93_836),  # 300 x 1,281,167 / 4096 = 93,835.5
    "vit20_i1k_l16": (1000, 4096, 93_836),
    "augreg_i21k_ti16": (21_843, 4096, 1_039_829),  # 300 x 14,197,122 / 4096 = 1,039,828.6
    "augreg_i21k_s16": (21_843, 4096, 1_039_829),
    "augreg_i21k_b16": (21_843, 4096, 1_039_829),
    "augreg_i21k_l16": (21_843, 4096, 1_039_829),
    "augreg_i1k_s16": (1000, 4096, 93_836),
    "augreg_i1k_b16": (1000, 4096, 93_836),
    "plain_s16": (1000, 1024, 112_603),  # 90 x 1,281,167 / 1024 = 112,602.6; big_vision's log of a run on all images: 112,603
    "deit3_i1k_s16": (1000, 2048, 500_456),  # 800 x 1,281,167 / 2048 = 500,455.9
    "deit3_i1k_b16": (1000, 2048, 500_456),
    "deit3_i1k_l16": (1000, 2048, 500_456),
    "deit3_i1k_h14": (1000, 2048, 500_456),
    "deit3_i21k_s16": (21_841, 2048, 1_663_726),  # 240 x 14,197,122 / 2048 = 1,663,725.2
    "deit3_i21k_b16": (21_841, 2048, 1_663_726),
    "deit3_i21k_l16": (21_841, 2048, 1_663_726),
    "deit3_i21k_h14": (21_841, 2048, 623_897),  # 90 x 14,197,122 / 2048 = 623,896.95
    "scaling_g": (29_593, 16_384, 1_000_000),  # big_vision train_vit_g.py: total_steps
    "sovit_400m": (29_593, 16_384, 2_441_407),  # 40e9 / 16,384 = 2,441,406.25
    "vit_22b": (29_593, 65_536, 177_000),  # Dehghani et al. 2023, section 4.1
    "catlip_l16": (24_320, 65_536, 200_000),  # vit_large.yaml: max_iterations, 512 x 128 GPUs
}


def test_every_recipe_of_the_literature_is_in_the_table():
    assert set(LENGTHS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_classes_batch_and_steps_are_those_of_the_source(name):
    config, source = recipe_named(name), source_of(name)
    assert source is not None
    steps = total_steps(config, source.images)
    assert (config.model.classes, config.optim.global_batch, steps) == LENGTHS[name]
    assert source.classes == config.model.classes
    claimed = [int(number.replace(",", "")) for number in re.findall(r"(?<!of )\b(\d[\d,]{4,}) steps", said(name, "Converted"))]
    assert claimed in ([], [steps], [177_000]), f"{name} says {claimed}, has {steps} steps"


# Millions of parameters at 1,000 classes, without tanh layer, as published: by DeiT III's table with LayerScale, else timm's.
MILLIONS = {
    "augreg_i21k_ti16": 5.72,
    "augreg_i21k_s16": 22.05,
    "augreg_i21k_b16": 86.57,
    "augreg_i21k_l16": 304.33,
    "vit20_jft_b16": 86.57,
    "vit20_jft_l16": 304.33,
    "vit20_jft_h14": 632.05,
    "deit3_i1k_s16": 22.06,
    "deit3_i21k_b16": 86.6,
    "deit3_i21k_l16": 304.4,
    "deit3_i1k_h14": 632.1,
    "catlip_l16": 304.33,
}


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_are_the_published_ones_within_a_thousandth(name):
    config = recipe_named(name)
    size = dataclasses.replace(config.model, classes=1000, pre_logits_width=None)
    assert parameters(size) / 1e6 == pytest.approx(MILLIONS[name], rel=1e-3)


def test_parameters_of_the_models_with_other_heads_are_the_published_ones():
    def without_head(name: str) -> int:
        model = recipe_named(name).model
        return parameters(model) - (model.width + 1) * model.classes

    def of_blocks(name: str, ending: str) -> int:
        shapes = parameter_shapes(recipe_named(name).model)
        return sum(
            a * b for key, (a, *rest) in shapes.items() if key.startswith("blocks.") and key.endswith(ending) for b in rest
        )

    # Dehghani et al. 2023, table 1: 21,743 M, which are 48 x (4 D^2 + 2 D M), the matrices of the blocks alone.
    assert of_blocks("vit_22b", ".weight") / 1e6 == pytest.approx(21_743, rel=1e-3)
    # timm's vit_so400m_patch14_siglip_224, an encoder with MAP pooling and no head: 427.68 M.
    assert without_head("sovit_400m") / 1e6 == pytest.approx(427.7, rel=1e-3)
    # Beyer et al. 2022 give 22 M; ViT-S/16 (22,050,664) less class token and positions, with a tanh layer of 384.
    plain = recipe_named("plain_s16").model
    assert parameters(plain) == 22_050_664 - 384 - 197 * 384 + 384 * 385
    # Zhai et al. 2022, table 2: 1,011 M and 533.1 GFLOPs for ViT-g/14 by a class token; MAP adds a block without queries.
    g = dataclasses.replace(recipe_named("scaling_g").model, pool="class", class_token=True, classes=1)
    assert parameters(g) / 1e6 == pytest.approx(1_011, rel=1e-3)
    assert forward_flops(g) / 1e9 == pytest.approx(533.1, rel=3e-3)


def test_settings_that_name_a_source_are_its_own():
    g = recipe_named("scaling_g")
    assert (g.optim.peak_lr, g.optim.weight_decay, g.optim.head_weight_decay) == (8e-4, 0.03, 3.0)
    assert (g.optim.schedule, g.optim.timescale, g.optim.warmup, g.optim.cooldown) == ("rsqrt", 10_000, 10_000, 50_000)
    l16 = recipe_named("augreg_i21k_l16")  # L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1
    assert (l16.optim.peak_lr, l16.optim.weight_decay, l16.train.dropout, l16.train.drop_path) == (1e-3, 0.1, 0.1, 0.1)
    assert (l16.train.mixup, l16.train.head_bias, l16.train.objective) == (0.2, -10.0, "sigmoid")
    b16 = recipe_named("vit20_i21k_b16")  # vision_transformer issue 2
    assert (b16.optim.peak_lr, b16.optim.end_lr, b16.optim.weight_decay, b16.train.dropout) == (1e-3, 1e-5, 0.03, 0.1)
    assert (b16.optim.schedule, b16.model.pre_logits_width, b16.optim.clip) == ("linear", 768, 0.0)
    plain = recipe_named("plain_s16")  # 1e-4 by schedule alone at a rate of 1e-3
    assert plain.optim.peak_lr * plain.optim.weight_decay == pytest.approx(1e-4)
    large = recipe_named("deit3_i1k_l16")
    assert (large.train.drop_path, large.train.mixup, large.train.cutmix, large.model.image_size) == (0.45, 0.8, 1.0, 192)
    assert recipe_named("catlip_l16").train.ema == (1 - 5e-4,)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_of_the_documentation_has_the_numbers_of_the_recipe(name):
    (row,) = re.findall(rf"^\| `{name}` \|.*$", (ROOT / "docs/recipes.md").read_text(), re.MULTILINE)
    _, _, _, data, size, batch, steps, published, _, _ = (cell.strip() for cell in row.split("|"))
    config, source = recipe_named(name), source_of(name)
    assert source is not None
    assert data == f"{source.name.split(' (')[0]}, {config.model.classes:,}"
    assert size == f"{parameters(config.model) / 1e6:,.1f} M"
    assert (batch, steps) == (f"{config.optim.global_batch:,}", f"{total_steps(config, source.images):,}")
    assert f"{published.split()[0]} %" in said(name, "Published")
