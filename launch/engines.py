"""From a configuration to an engine, and a whole dataset through it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed

from data_pipeline.loader import eval_stream
from data_pipeline.manifest import Manifest
from data_pipeline.stream import MicroBatch, Stream
from vitscale.config import Config
from vitscale.ds_config import DsConfig
from vitscale.evaluation.classification import Scores, classify
from vitscale.model.compile import compile_blocks
from vitscale.model.vit import VisionTransformer, initialise
from vitscale.training.choices import choose_attention
from vitscale.training.engine import Engine, checkpoint_function
from vitscale.training.objective import Objective
from vitscale.training.optim import make_optimizer
from vitscale.training.watch import UNWATCHED, Beats
from vitscale.weights.native import Weights, fit_to

Say = Callable[[str], None]


def silent(sentence: str) -> None:
    """What the other ranks say."""


def pin_attention(run: Path, config: Config, ds: DsConfig, *, device: torch.device) -> None:
    """Pin the attention kernel of ds_config.json for the shapes of this configuration; `run` keeps what was measured."""
    model = config.model
    choose_attention(
        run,
        ds.attention,
        shape_BHNK=(ds.micro_batch, model.heads, model.tokens, model.head_width),
        dtype=product_dtype(config),
        device=device,
        rank=torch.distributed.get_rank(),
        say=print,
    )


def make_engine(
    config: Config,
    ds: DsConfig,
    *,
    initial: Weights | None,
    device: torch.device,
    say: Say,
    exactly: dict[str, torch.Tensor] | None = None,
) -> Engine:
    """Model, optimizer and DeepSpeed engine; every rank starts from the same weights.

    `initial` are weights of another run, whose head is left; `exactly` are all values of this model.
    """
    model = VisionTransformer(
        config.model,
        recompute=ds.recompute,
        drop_path=config.train.drop_rates(config.model.depth),
        dropout=config.train.dropout,
        checkpoint_function=checkpoint_function(ds, device),
    )
    initialise(model, seed=config.train.seed, head_bias=config.train.head_bias)
    if initial is not None:
        missing = model.load_state_dict(fit_to(initial, config.model, new_head=True), strict=False).missing_keys
        assert all(name.startswith("head.") for name in missing), missing
    if exactly is not None:
        model.load_state_dict(exactly)
    model.to(device)
    if ds.compile_blocks:
        compile_blocks(model, batch=ds.micro_batch, dtype=product_dtype(config), say=say)
    return Engine(model, make_optimizer(model, optim=config.optim), ds=ds, device=device, ema=config.train.ema)


def product_dtype(config: Config) -> torch.dtype:
    """The type matrix products and attention run in, whichever way train.precision is reached."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.train.precision]


def evaluate_engine(
    engine: Engine,
    objective: Objective,
    manifest: Manifest,
    *,
    config: Config,
    micro_batch: int,
    watch: Beats = UNWATCHED,
) -> Scores:
    """Score the engine's present weights on a whole dataset. Collective."""
    engine.eval()
    batches = eval_stream(
        manifest,
        data=config.data,
        augment=config.augment,
        image_size=config.model.image_size,
        micro_batch=micro_batch,
        rank=engine.rank,
        world=engine.world,
    )
    return classify(objective, engine, _beating(batches, watch), sum_over_ranks=engine.sum_over_ranks)


def _beating(batches: Stream, watch: Beats) -> Iterator[MicroBatch]:
    for number, batch in enumerate(batches):
        watch.beat("evaluate", micro_batch=number)
        yield batch
