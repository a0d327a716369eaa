"""The gate before a run: are the gradients of this configuration those of plain torch?

prove_gradients       at the first start of a configuration, on a twin of two blocks and two micro-batches; remembered
check_configuration   --check: the whole model at its own micro-batch, without data; nothing is written

What was proven is kept in $XDG_CACHE_HOME/vitscale/parity (else ~/.cache), one file per hash of all that a gradient depends on:
the twin, ds_config.json, world, versions, device and the code. Deleting the directory is safe.
"""

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from launch.engines import make_engine, silent
from vitscale.base.cluster import Cluster
from vitscale.base.files import canonical_json, read_json, sha256_bytes, write_json
from vitscale.config import Config, check_mix_group, to_record
from vitscale.ds_config import DsConfig, divisors, resolve_ds_config
from vitscale.model.flops import train_flops
from vitscale.training.engine import from_rank_zero, leave_ranks, start_ranks, versions
from vitscale.training.objective import objective_of
from vitscale.training.parity import MicroBatchLoss, Verdict, check_gradients

BLOCKS, ACCUMULATION, IMAGES = 2, 2, 4
"""Of the twin: every class of error shows in two blocks and two micro-batches of a few images."""
SECONDS_MAX = 60.0
CPU_FLOPS = 2e10
"""What a rank on a CPU does at least, for deciding whether the twin fits into SECONDS_MAX: a guess on the safe side."""
INSTRUMENTS = ("flops_profiler", "comms_logger", "wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print")
ROOT = Path(__file__).resolve().parent.parent


def prove_gradients(config: Config, ds: DsConfig, *, device: torch.device) -> None:
    """Compare the twin's gradients with plain torch, unless that was done before. Collective; rank 0 speaks.

    Raises EnvironmentFault with the parameter that differs most.
    """
    twin, twin_ds = twin_of(config, ds)
    path = cache_directory() / f"{identity(twin, twin_ds, device)}.json"
    rank = torch.distributed.get_rank()
    known = from_rank_zero(read_json(path) if rank == 0 and path.is_file() else None)
    if known is not None:
        if rank == 0:
            print(f"{known['sentence']}; proven before ({path})", flush=True)
        return
    images = twin.optim.global_batch // twin_ds.world
    estimate_s = 3 * train_flops(twin.model) * images / CPU_FLOPS
    if device.type == "cpu" and estimate_s > SECONDS_MAX:
        if rank == 0:
            print(
                f"gradients not proven: a twin of {BLOCKS} blocks would take about {estimate_s:.0f} s on this CPU; "
                "--check compares the whole model",
                flush=True,
            )
        return
    verdict = _check(twin, twin_ds, device=device)
    verdict.raise_fault()
    if rank == 0:
        print(verdict.sentence(), flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"sentence": verdict.sentence(), "whole": dataclasses.asdict(verdict.whole)})


def check_configuration(config: Config, ds: DsConfig, cluster: Cluster) -> None:
    """Join the ranks, compare the gradients of the whole model, with its micro-batch and up to four of them, print a table.

    Raises EnvironmentFault as `prove_gradients`.
    """
    check_mix_group(config, micro_batch=ds.micro_batch, accumulation=ds.accumulation)
    device = start_ranks(cluster)
    whole, whole_ds = _reduced(
        config, ds, blocks=config.model.depth, micro=ds.micro_batch, accumulation=min(4, ds.accumulation)
    )
    verdict = _check(whole, whole_ds, device=device)
    if torch.distributed.get_rank() == 0:
        print(f"{verdict.table()}\n{verdict.sentence()}", flush=True)
    verdict.raise_fault()
    leave_ranks()


def twin_of(config: Config, ds: DsConfig) -> tuple[Config, DsConfig]:
    """The configuration with two blocks, two micro-batches of a few images, and nothing that hides a gradient."""
    mixes = config.train.mixup > 0 or config.train.cutmix > 0
    group = config.train.mix_group if mixes else 1
    micro = next((n for n in divisors(ds.micro_batch) if n % group == 0 and n >= IMAGES), ds.micro_batch)
    return _reduced(config, ds, blocks=min(BLOCKS, config.model.depth), micro=micro, accumulation=ACCUMULATION)


def _reduced(config: Config, ds: DsConfig, *, blocks: int, micro: int, accumulation: int) -> tuple[Config, DsConfig]:
    batch = ds.world * micro * accumulation
    reduced = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, depth=blocks),
        # A clipped gradient would hide a factor, and dropout draws masks that plain torch draws otherwise.
        optim=dataclasses.replace(config.optim, global_batch=batch, micro_batch_max=micro, clip=0.0),
        train=dataclasses.replace(config.train, dropout=0.0, ema=(), resolutions=()),
    )
    record: dict[str, Any] = {key: copy.deepcopy(value) for key, value in ds.record.items() if key not in INSTRUMENTS}
    record |= {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": "auto",
    }
    if isinstance(ds.recompute, int) and ds.recompute > blocks:
        record["vitscale"]["recompute"] = blocks
    return reduced, resolve_ds_config(record, config=reduced, world=ds.world)


def _check(config: Config, ds: DsConfig, *, device: torch.device) -> Verdict:
    def loss_of(dtype: torch.dtype) -> MicroBatchLoss:
        objective = objective_of(config, device=device, dtype=dtype)
        return lambda forward, images_BHWC, labels_B, slot: (
            objective(forward, images_BHWC, labels_B[:, None], step=0, first_slot=slot).trained
        )

    return check_gradients(
        lambda weights: make_engine(config, ds, initial=None, device=device, say=silent, exactly=weights),
        loss_of,
        config=config,
        ds=ds,
        device=device,
    )


def identity(config: Config, ds: DsConfig, device: torch.device) -> str:
    """sha256 of all that the gradients of a twin depend on."""
    record = to_record(config)
    code = sha256_bytes(b"".join(path.read_bytes() for path in sorted((ROOT / "vitscale").rglob("*.py"))))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    what = {section: record[section] for section in ("model", "optim", "train")}
    for key in ("length", "init_weights", "branch", "init_sha256"):
        del what["train"][key]
    return sha256_bytes(
        canonical_json({**what, "ds": ds.record, "world": ds.world, "versions": versions(), "device": name, "code": code})
    )


def cache_directory() -> Path:
    """Where proofs are remembered. Raises EnvironmentFault where there is no home directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "vitscale" / "parity"
