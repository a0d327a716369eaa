"""The gate before a run: are the gradients of this configuration those of plain torch?

prove_gradients       before the first start of a configuration, on a twin of two blocks and two micro-batches; remembered
check_configuration   --check: the whole model at its own micro-batch, without data; nothing is written

A resume on another world, stage or version is a new configuration. What was proven is kept by the hash of all that a gradient
depends on (the twin, ds_config.json, world, versions, device and the code): the last proof in RUN/choices.json, each in
$XDG_CACHE_HOME/vitscale/parity (else ~/.cache), where other runs find it. Deleting either is safe.
"""

import copy
import dataclasses
import gc
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from launch.engines import make_engine, pin_attention, silent
from vitscale.base.cluster import Cluster
from vitscale.base.errors import EnvironmentFault, HostFault
from vitscale.base.files import canonical_json, read_json, sha256_bytes, write_json
from vitscale.config import Config, check_mix_group, to_record
from vitscale.ds_config import DsConfig, divisors, resolve_ds_config
from vitscale.model.compile import forget_compiled
from vitscale.model.flops import train_flops
from vitscale.training.choices import CHOICES
from vitscale.training.collectives import from_rank_zero
from vitscale.training.engine import leave_ranks, start_ranks, versions
from vitscale.training.objective import objective_of
from vitscale.training.parity import MicroBatchLoss, Verdict, check_gradients

BLOCKS, ACCUMULATION, IMAGES = 2, 2, 4
"""Of the twin: every class of error shows in two blocks and two micro-batches of a few images."""
SECONDS_MAX = 60.0
CPU_FLOPS = 2e10
"""What a rank on a CPU does at least, for deciding whether the twin fits into SECONDS_MAX: a guess on the safe side."""
INSTRUMENTS = ("flops_profiler", "comms_logger", "wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print")
ROOT = Path(__file__).resolve().parent.parent


def prove_gradients(config: Config, ds: DsConfig, *, run: Path, device: torch.device) -> None:
    """Compare the twin's gradients with plain torch, unless that was done before. Collective; rank 0 speaks.

    Leaves generators, compiled code and the peak of the memory as if it had not been. Raises EnvironmentFault with the
    parameter that differs most.
    """
    twin, twin_ds = twin_of(config, ds)
    known_as = identity(twin, twin_ds, device)
    path = cache_directory() / f"{known_as}.json"
    rank = torch.distributed.get_rank()
    proof = from_rank_zero(_remembered(path, run, known_as) if rank == 0 else None)
    if proof is not None:
        if rank == 0:
            print(f"{proof['sentence']}; proven before", flush=True)
            _remember(proof, path=path, run=run)
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
        proof = {"identity": known_as, "sentence": verdict.sentence(), "whole": dataclasses.asdict(verdict.whole)}
        _remember(proof, path=path, run=run)


def _remembered(path: Path, run: Path, known_as: str) -> dict[str, Any] | None:
    """The proof of this identity; what cannot be read is proven again."""
    for file, section in ((run / CHOICES, "parity"), (path, None)):
        try:
            record = read_json(file)
        except EnvironmentFault:
            continue
        proof = record.get(section) if section else record
        if isinstance(proof, dict) and proof.get("identity") == known_as:
            return proof
    return None


def _remember(proof: dict[str, Any], *, path: Path, run: Path) -> None:
    choices = run / CHOICES
    record = read_json(choices) if choices.is_file() else {}
    if record.get("parity") != proof:
        write_json(choices, {**record, "parity": proof})
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, proof)
    except OSError as error:  # a home that is read-only or full: the next run proves it again
        print(f"this proof cannot be kept for other runs ({error}); set XDG_CACHE_HOME to a directory of your own", flush=True)


def check_configuration(config: Config, ds: DsConfig, cluster: Cluster) -> None:
    """Join the ranks, compare the gradients of the whole model, with its micro-batch and up to four of them, print a table.

    Raises EnvironmentFault as `prove_gradients`, and HostFault where the memory does not hold model and reference.
    """
    check_mix_group(config, micro_batch=ds.micro_batch, accumulation=ds.accumulation)
    device = start_ranks(cluster)
    with tempfile.TemporaryDirectory() as scratch:
        pin_attention(Path(scratch), config, ds, device=device)
    whole, whole_ds = _reduced(
        config, ds, blocks=config.model.depth, micro=ds.micro_batch, accumulation=min(4, ds.accumulation)
    )
    try:
        verdict = _check(whole, whole_ds, device=device)
    except torch.OutOfMemoryError as error:
        raise HostFault(
            f"host {cluster.host}: the whole model and its plain float32 reference do not fit into the memory of {device} "
            f"together ({str(error).splitlines()[0]}); add model.depth=N with fewer than {config.model.depth} blocks, or "
            "optim.micro_batch_max with a smaller number"
        ) from None
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

    on_cuda = device.type == "cuda"
    with torch.random.fork_rng([torch.cuda.current_device()] if on_cuda else []):
        verdict = check_gradients(
            lambda weights: make_engine(config, ds, initial=None, device=device, say=silent, exactly=weights),
            loss_of,
            config=config,
            ds=ds,
            device=device,
        )
    if ds.compile_blocks:
        forget_compiled()
    gc.collect()  # an engine is full of rings
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return verdict


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
    """Where proofs are remembered; under the temporary directory for a user without a home."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        home = Path(tempfile.gettempdir()) / f"vitscale-cache-{os.getuid()}"
    return home / "vitscale" / "parity"
