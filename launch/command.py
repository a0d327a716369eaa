"""The command line that pretraining and fine-tuning share: parse, resolve, print what was derived, carry out."""

import dataclasses
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.config import sources_of, spelled
from data_pipeline.manifest import Manifest
from data_pipeline.mixture import SLOTS
from launch.arguments import Parser
from launch.assemble import carry_out
from launch.branch import Parent, find_parent, is_same_parent, require_same_state
from launch.datasets import EMBEDDED, absolute, open_datasets
from launch.estimates import DEFAULT_GPU, Row, estimate_rows, suspicious_rows
from launch.gate import check_configuration
from launch.job import Job, make_plan, require_cache
from launch.trained import identity_of
from vitscale.base.cluster import resolve_cluster
from vitscale.base.errors import UsageError
from vitscale.base.files import read_json
from vitscale.base.startup import startup_of_this_process
from vitscale.config import Config, all_keys, apply_overrides, from_record
from vitscale.ds_config import read_ds_config, resolve_ds_config
from vitscale.model.flops import forward_flops, parameters
from vitscale.recipes.catalog import Source, recipe_named, source_of
from vitscale.training.checkpoint import candidates
from vitscale.training.rundir import FINISHED, differences, refuse_result_changes, stored_config

DEFAULT_DS_CONFIG = Path(__file__).resolve().parent.parent / "ds_config.json"


def training_parser(description: str) -> Parser:
    """The flags of pretrain.py and finetune.py; every setting is a `section.key=value` behind them."""
    parser = Parser(
        description=description, epilog="settings: " + ", ".join(all_keys()) + ", ds.PATH (a key of ds_config.json)"
    )
    parser.add_argument("--recipe", metavar="NAME", help="start from this recipe")
    parser.add_argument("--config", type=Path, metavar="FILE", help="start from a stored RUN/config.json")
    parser.add_argument(
        "--data",
        metavar="DIR[=WEIGHT][,DIR…]",
        help="training dataset, a directory or URL, made by launch/build_shards.py; or several with weights: A=3,B=1",
    )
    parser.add_argument("--eval-data", metavar="DIR", help="evaluation dataset, a directory or URL")
    parser.add_argument("--run", type=Path, metavar="DIR", help="run directory (default: runs/<recipe>)")
    parser.add_argument("--deepspeed_config", type=Path, default=DEFAULT_DS_CONFIG, metavar="FILE")
    parser.add_argument("--dry-run", action="store_true", help="print what was derived, write nothing, end")
    parser.add_argument("--check", action="store_true", help="compare the gradients of the whole model with plain torch, end")
    parser.add_argument("--world", type=int, metavar="N", help="with --dry-run: as if started with N ranks")
    parser.add_argument("--local_rank", type=int, help="set by launchers; ignored")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser


def run_training(
    args: Namespace,
    *,
    default_recipe: str,
    adapt: Callable[[Config], Config] = lambda config: config,
    source: str | None = None,
    branch: str | None = None,
) -> None:
    """From parsed flags to a finished run.

    `adapt` changes a fresh recipe before the overrides apply (fine-tuning puts its model there); `source` names the
    weights to start from, `branch` the run and step whose whole state a new run starts from.
    """
    startup = startup_of_this_process()
    cluster = resolve_cluster(os.environ)
    if args.world is not None:
        if not args.dry_run:
            raise UsageError("--world only goes with --dry-run; a real start takes its world from the launcher")
        if args.world < 1:
            raise UsageError(f"--world must be at least 1, got {args.world}")
        cluster = dataclasses.replace(cluster, world=args.world, local_world=1)
    if args.dry_run and cluster.rank > 0:
        return  # rank 0 says it all, and embedded data that it builds in passing is seen by no other rank
    if args.recipe and args.config:
        raise UsageError("give one of --recipe and --config, not both")

    run = args.run or Path("runs") / (args.recipe or default_recipe)
    stored = stored_config(run)
    parent = _parent(branch, stored, run)
    if branch and (args.recipe or args.config):
        raise UsageError("--from takes the configuration of its run; leave out --recipe and --config")
    if args.config:
        config = from_record(read_json(args.config), origin=str(args.config))
    elif stored is not None and not args.recipe:
        config = stored
    elif parent is not None:
        config = parent.config
    else:
        config = adapt(recipe_named(args.recipe or default_recipe))
    ds_overrides = [text.removeprefix("ds.") for text in args.overrides if text.startswith("ds.")]
    config = apply_overrides(config, [text for text in args.overrides if not text.startswith("ds.")])
    config = _with_paths(config, args)
    if source is not None:
        origin = dataclasses.replace(config.train, init_weights=source, init_sha256=identity_of(source))
        config = dataclasses.replace(config, train=origin)
    if parent is not None:
        require_same_state(parent, config)
        origin = dataclasses.replace(config.train, branch=parent.name, init_sha256=parent.sha256)
        config = dataclasses.replace(config, train=origin)
    ds = resolve_ds_config(read_ds_config(args.deepspeed_config, ds_overrides), config=config, world=cluster.world)

    if args.check:
        check_configuration(config, ds, cluster)
        return
    source_data = source_of(config.recipe)
    # A dry run needs no data: what is not there is counted as the data set of the recipe.
    counted = source_data if args.dry_run and not (config.data.path or config.data.eval_path) else None
    train_data: tuple[Manifest, ...] = ()
    eval_data = None
    if counted is None:
        with tempfile.TemporaryDirectory() as scratch:
            # A dry run writes nothing: embedded data goes to a directory that is gone afterwards.
            place = Path(scratch) if args.dry_run and stored is None else run
            config, train_data, eval_data = open_datasets(config, run=place, cluster=cluster)
    images = counted.images if counted else sum(manifest.images for manifest in train_data)
    plan, schedule, keep_every_steps = make_plan(config, ds, images)
    found = differences(stored, config) if stored is not None else []
    refuse_result_changes(run, found)
    job = Job(
        run=run,
        config=config,
        ds=ds,
        cluster=cluster,
        train_data=train_data,
        eval_data=eval_data,
        plan=plan,
        schedule=schedule,
        keep_every_steps=keep_every_steps,
        followed=found,
        source=source,
        parent=parent,
    )
    if cluster.rank == 0:
        estimates = estimate_rows(job, gpu=DEFAULT_GPU if args.world is not None else None) if args.dry_run else []
        print(table([*derived_rows(job, counted=counted), *estimates, *suspicious_rows(job, source=source_data)]), flush=True)
    if (run / FINISHED).is_file() and not args.dry_run:
        if cluster.rank == 0:
            print(f"{run} is finished: {read_json(run / FINISHED)}; nothing to do", flush=True)
        return
    if args.world is None and train_data:  # else nobody knows how many ranks share a node
        require_cache(job)
    if not args.dry_run:
        carry_out(job, startup)


def _parent(wanted: str | None, stored: Config | None, run: Path) -> Parent | None:
    """The parent of a branch that has no checkpoint of its own yet; None for what is no branch, or stands by itself."""
    known = stored.train.branch if stored is not None else ""
    if wanted and stored is not None and not is_same_parent(wanted, known):
        raise UsageError(
            f"{run} is {f'a branch of {known}' if known else 'no branch'}, so it cannot start from {wanted}; "
            "leave out --from to continue it, or give another --run directory"
        )
    if not (known or wanted) or candidates(run / "checkpoints"):
        return None
    parent = find_parent(known or wanted or "")
    if parent.step_directory.parent.parent == run.resolve():
        raise UsageError(f"--from {wanted} names the run itself; give the branch a --run directory of its own")
    return parent


def _with_paths(config: Config, args: Namespace) -> Config:
    """--data and --eval-data as absolute paths, so that a resume may come from another working directory."""

    path, eval_path = config.data.path, config.data.eval_path
    try:
        if args.data is not None:
            sources = sources_of(args.data)
            path = spelled(tuple(dataclasses.replace(source, path=absolute(source.path)) for source in sources))
        if args.eval_data is not None:
            if len(sources_of(args.eval_data)) > 1:
                raise ValueError(f"expected one dataset, got {args.eval_data!r}; only --data mixes several")
            eval_path = absolute(args.eval_data)
    except ValueError as error:
        raise UsageError(f"--data or --eval-data: {error}") from None
    if eval_path.startswith(EMBEDDED) and not any(source.path.startswith(EMBEDDED) for source in sources_of(path or ".")):
        eval_path = ""  # the embedded images say nothing about a model trained on others
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=path, eval_path=eval_path))


def derived_rows(job: Job, *, counted: Source | None = None) -> list[Row]:
    """What follows from the configuration, with its factors. `counted`: the data set of the literature that stands for data."""
    config, ds, plan = job.config, job.ds, job.plan
    images = counted.images if counted else sum(manifest.images for manifest in job.train_data)
    epochs = plan.total_steps * plan.global_batch / images
    whole = {0: "no block", 1: "every block", "selective": "what is cheap in every block"}
    recompute = whole.get(ds.recompute, f"every {ds.recompute}th block")
    model = config.model
    return [
        ("recipe", f"{config.recipe} -> {job.run}"),
        (
            "model",
            f"ViT width {model.width} depth {model.depth} heads {model.heads} patch {model.patch_size} on {model.image_size} px"
            f", {model.norm}-norm: {parameters(model):,} parameters, {model.tokens} tokens, "
            f"{forward_flops(model) / 1e9:.3g} GFLOP forward per image",
        ),
        *_data_rows(job, counted),
        ("evaluation", f"{job.eval_data.images:,} images" if job.eval_data else "none (no --eval-data)"),
        (
            "global batch",
            f"{plan.global_batch} = {ds.world} ranks x micro-batch {ds.micro_batch} x accumulation {ds.accumulation}",
        ),
        (
            "length",
            f"{plan.total_steps:,} steps = {epochs:.4g} epochs; "
            f"warm-up {job.schedule.warmup_steps:,} to lr {config.optim.peak_lr}",
        ),
        (
            "machine",
            f"ZeRO stage {ds.stage}, {ds.mechanism}, recomputing {recompute}, attention {ds.attention}"
            f"{', compiled blocks' if ds.compile_blocks else ''}",
        ),
        (
            "every",
            f"log {plan.log_every_steps}, evaluate {plan.eval_every_steps}, "
            f"save {plan.save_every_steps or config.run.save_every} steps; "
            f"{f'attention {plan.attention_every_steps} steps; ' if plan.attention_every_steps else ''}"
            f"keep the last {config.run.keep_last} checkpoints",
        ),
        *[("follows the command", f"{d.key}: {d.stored!r} -> {d.wanted!r}") for d in job.followed],
    ]


def table(rows: Sequence[Row]) -> str:
    """Names in a column, each with its text."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _data_rows(job: Job, counted: Source | None) -> list[Row]:
    """One row per dataset, with its exact share and how often its images will be seen where there are several."""
    if counted is not None:
        return [("data", f"none given; counted as {counted.name}, {counted.images:,} images, {counted.classes:,} classes")]
    weights = job.config.data.weights
    if not weights:
        (manifest,) = job.train_data
        return [("data", _size(manifest))]
    shown = job.plan.total_steps * job.plan.global_batch
    sources = sources_of(job.config.data.path)
    return [
        (
            "data" if number == 0 else "",
            f"{source.path}: weight {weight}/{SLOTS}, {_size(manifest)}, {shown * weight / SLOTS / manifest.images:.4g} epochs",
        )
        for number, (source, manifest, weight) in enumerate(zip(sources, job.train_data, weights, strict=True))
    ]


def _size(manifest: Manifest) -> str:
    return f"{manifest.images:,} images in {len(manifest.shards)} shards, {len(manifest.classes)} classes"
