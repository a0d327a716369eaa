"""An evaluation counts every image once: on any number of ranks the same images, the same hits, the same loss."""

import pytest
import torch

from data_pipeline.manifest import Manifest, read_manifest
from launch.engines import evaluate_engine, make_engine
from tests.helpers.ranks import run_ranks
from tests.helpers.shards import numbered_images, write_dataset
from vitscale.base.cluster import Cluster
from vitscale.config import Config, apply_overrides
from vitscale.ds_config import resolve_ds_config
from vitscale.recipes.catalog import recipe_named
from vitscale.training.objective import Objective

SIZES = [1733, 2048, 1, 999, 3217, 2002]
IMAGES = 10_000

# The sum of 10,000 losses in float64, taken in another order.
TOLERANCE = 1e-9


def configuration() -> Config:
    small = ["model.width=32", "model.depth=1", "model.heads=2", "optim.global_batch=384", "data.workers=1"]
    return apply_overrides(recipe_named("digits"), small)


def scores_of(cluster: Cluster, manifest: Manifest) -> dict[str, float]:
    config = configuration()
    ds = resolve_ds_config({"zero_optimization": {"stage": 2}}, config=config, world=cluster.world)
    engine = make_engine(config, ds, initial=None, device=torch.device("cpu"), say=print)
    head = engine.module.get_parameter("head.weight")  # zeros in a new model: every image would look alike
    torch.nn.init.normal_(head, std=0.5, generator=torch.Generator().manual_seed(3))
    device = torch.device("cpu")
    objective = Objective(model=config.model, label_smoothing=0.0, device=device, dtype=engine.input_dtype)
    return evaluate_engine(engine, objective, manifest, config=config, micro_batch=64).as_record()


@pytest.mark.slow
def test_ten_thousand_images_on_one_two_and_three_ranks(tmp_path):
    assert sum(SIZES) == IMAGES
    images = numbered_images(SIZES, side=8)
    labels = [[(7 * row + shard) % 10 for row in range(size)] for shard, size in enumerate(SIZES)]
    write_dataset(tmp_path, images, labels, list("0123456789"))
    manifest = read_manifest(tmp_path)
    reference, *others = (run_ranks(world, scores_of, manifest) for world in (1, 2, 3))
    assert reference[0]["images"] == IMAGES
    assert 0.02 < reference[0]["top1"] < 0.5 and reference[0]["loss"] > 2.31  # no model that answers the same to all
    for ranks in others:
        for scores in ranks:
            assert (scores["images"], scores["top1"], scores["top5"]) == tuple(
                reference[0][name] for name in ("images", "top1", "top5")
            )
            assert scores["loss"] == pytest.approx(reference[0]["loss"], rel=TOLERANCE)
