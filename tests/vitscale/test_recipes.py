"""Recipes are found by name, and what their text claims holds."""

import re

import pytest

from vitscale.base.errors import UsageError
from vitscale.config import steps_of
from vitscale.ds_config import resolve_ds_config
from vitscale.recipes.catalog import RECIPES, recipe_named

WORLDS = [1, 2, 3, 4, 6, 8]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_bears_the_name_it_is_found_by_and_says_how_to_run_it(name):
    assert recipe_named(name).recipe == name
    for word in ("Command:", "Hardware:", "Source:"):
        assert re.search(rf"^\s+{word}\s+\S", RECIPES[name].__doc__ or "", re.MULTILINE), f"{name} lacks {word}"


def test_a_wrong_name_is_answered_with_the_nearest_and_the_list():
    with pytest.raises(UsageError, match=r"no recipe 'digit' among cifar10, digits, finetune; did you mean 'digits'\?"):
        recipe_named("digit")


@pytest.mark.parametrize("name", ["digits", "cifar10"])
@pytest.mark.parametrize("world", WORLDS)
def test_the_demonstrations_run_on_any_usual_number_of_ranks(name, world):
    config = recipe_named(name)
    ds = resolve_ds_config({}, config=config, world=world)
    assert ds.world * ds.micro_batch * ds.accumulation == config.optim.global_batch == 96
    assert ds.micro_batch <= config.optim.micro_batch_max


@pytest.mark.parametrize("name", RECIPES)
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
