"""Find a recipe by its name on the command line."""

from collections.abc import Callable

from vitscale.base.errors import UsageError, nearest
from vitscale.config import Config
from vitscale.recipes.demo import cifar10, digits
from vitscale.recipes.finetune import finetune

RECIPES: dict[str, Callable[[], Config]] = {recipe.__name__: recipe for recipe in (cifar10, digits, finetune)}


def recipe_named(name: str) -> Config:
    """The configuration of a recipe; UsageError with the nearest name when there is none."""
    if name not in RECIPES:
        raise UsageError(f"there is no recipe {name!r} among {', '.join(RECIPES)}{nearest(name, RECIPES)}")
    return RECIPES[name]()
