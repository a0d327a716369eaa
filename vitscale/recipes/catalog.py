"""Find a recipe by its name on the command line, and the data set it was made for."""

from collections.abc import Callable
from dataclasses import dataclass

from vitscale.base.errors import UsageError, nearest
from vitscale.config import Config
from vitscale.recipes import augreg, catlip, deit3, demo, finetune, plain, scaling, vit20

Recipe = Callable[[], Config]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set of the literature: what a recipe is counted with where no data is given."""

    name: str
    images: int
    classes: int


CIFAR_10 = Source(name="CIFAR-10", images=50_000, classes=10)
IMAGENET_1K = Source(name="ImageNet-1k", images=1_281_167, classes=1000)
IMAGENET_21K = Source(name="ImageNet-21k", images=14_197_122, classes=21_843)
"""As big_vision counts the classes."""
IMAGENET_21K_FALL_2011 = Source(name="ImageNet-21k (fall 2011)", images=14_197_122, classes=21_841)
"""As the release has folders: EVA and timm count like this."""
JFT_300M = Source(name="JFT-300M (303 million)", images=303_000_000, classes=18_291)
JFT_3B = Source(name="JFT-3B (3 billion)", images=3_000_000_000, classes=29_593)
JFT_4B = Source(name="JFT-4B (4 billion)", images=4_000_000_000, classes=29_593)
DATACOMP = Source(name="DataComp-1.3B (1.3 billion)", images=1_300_000_000, classes=24_320)

_RECIPES_OF: dict[Source | None, tuple[Recipe, ...]] = {
    CIFAR_10: (demo.cifar10,),
    None: (demo.digits, finetune.finetune),  # digits brings its images along; fine-tuning is for any
    JFT_300M: (vit20.vit20_jft_b16, vit20.vit20_jft_l16, vit20.vit20_jft_h14),
    IMAGENET_21K: (
        vit20.vit20_i21k_b16,
        vit20.vit20_i21k_l16,
        augreg.augreg_i21k_ti16,
        augreg.augreg_i21k_s16,
        augreg.augreg_i21k_b16,
        augreg.augreg_i21k_l16,
    ),
    IMAGENET_1K: (
        vit20.vit20_i1k_b16,
        vit20.vit20_i1k_l16,
        augreg.augreg_i1k_s16,
        augreg.augreg_i1k_b16,
        plain.plain_s16,
        deit3.deit3_i1k_s16,
        deit3.deit3_i1k_b16,
        deit3.deit3_i1k_l16,
        deit3.deit3_i1k_h14,
    ),
    IMAGENET_21K_FALL_2011: (
        deit3.deit3_i21k_s16,
        deit3.deit3_i21k_b16,
        deit3.deit3_i21k_l16,
        deit3.deit3_i21k_h14,
    ),
    JFT_3B: (scaling.scaling_g, scaling.sovit_400m),
    JFT_4B: (scaling.vit_22b,),
    DATACOMP: (catlip.catlip_l16,),
}
RECIPES: dict[str, Recipe] = {recipe.__name__: recipe for recipes in _RECIPES_OF.values() for recipe in recipes}
_SOURCES = {recipe.__name__: source for source, recipes in _RECIPES_OF.items() for recipe in recipes}


def recipe_named(name: str) -> Config:
    """The configuration of a recipe; UsageError with the nearest name when there is none."""
    if name not in RECIPES:
        raise UsageError(f"there is no recipe {name!r} among {', '.join(RECIPES)}{nearest(name, RECIPES)}")
    return RECIPES[name]()


def source_of(recipe: str) -> Source | None:
    """The data set a recipe was made for; None where it has none of its own, and for a name that is no recipe's."""
    return _SOURCES.get(recipe)
