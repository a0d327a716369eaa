"""Where ZeRO keeps what, as checkpoints record it, and whole parameters put together again from the files.

The *partition map* of a rank lists, for each piece it holds (training/pieces.py): the parameter, where the piece starts in
the flattened parameter, and where it lies in the rank's flat partitions. With the maps of all ranks a full parameter, or
its moving average, can be put together from the files, whatever the stage and the world size, without asking DeepSpeed.

stage   in the rank's optimizer file             in the rank's ema file
0       model file of rank 0, by name            by name, of rank 0
1, 2    single_partition_of_fp32_groups          by group
3       fp32_flat_groups                         by sub-group
"""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale.base.errors import EnvironmentFault
from vitscale.base.files import read_json
from vitscale.training.ema import tensor_name
from vitscale.training.engine import Engine
from vitscale.weights.tensors import load_tensors

SCHEMA_VERSION = 1


def partition_map(engine: Engine) -> dict[str, Any]:
    """The partition map of this rank as plain JSON values."""
    # At stage 0 all ranks hold the same, and rank 0 writes it.
    held = engine.partitions if engine.ds.stage > 0 or engine.rank == 0 else []
    return {
        "schema_version": SCHEMA_VERSION,
        "rank": engine.rank,
        "world": engine.world,
        "zero_stage": engine.ds.stage,
        "pieces": [
            {**asdict(piece), "group": int(partition.key) if engine.ds.stage > 0 else 0}
            for partition in held
            for piece in partition.pieces
        ],
    }


def consolidate(directory: Path, *, ema: float | None = None) -> dict[str, Tensor]:
    """Whole float32 parameters, by name, from a committed step directory whose hashes were verified; or, with `ema`,
    their moving averages of that decay.

    This is the one place that unpickles checkpoint files outside DeepSpeed's own loader. Raises EnvironmentFault when
    the maps do not cover every parameter exactly once.
    """
    maps = [read_json(path) for path in sorted(directory.glob("partition-*.json"))]
    if not maps or len(maps) != maps[0]["world"]:
        raise EnvironmentFault(f"{directory}: expected one partition map per rank, found {len(maps)}")
    whole: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    for record in maps:
        flats = _flat_partitions(directory, record) if ema is None else _flat_averages(directory, record, ema)
        for piece in record["pieces"]:
            name, shape = piece["name"], piece["shape"]
            target = whole.setdefault(name, torch.full((math.prod(shape),), math.nan))
            source = flats[name] if record["zero_stage"] == 0 else flats[piece["group"]]
            part = source.flatten()[piece["offset"] : piece["offset"] + piece["numel"]]
            target[piece["start"] : piece["start"] + piece["numel"]] = part.float()
            filled[name] = filled.get(name, 0) + piece["numel"]
    shapes = {piece["name"]: piece["shape"] for record in maps for piece in record["pieces"]}
    for name, shape in shapes.items():
        if filled[name] != math.prod(shape):
            raise EnvironmentFault(f"{directory}: the maps hold {filled[name]} of the {math.prod(shape)} numbers of {name}")
    return {name: whole[name].view(shapes[name]) for name in whole}


def _flat_partitions(directory: Path, record: dict[str, Any]) -> Any:
    """The tensors the pieces of one rank point into: by name at stage 0, by group at stages 1 to 3."""
    if record["zero_stage"] == 0:
        return _load(directory / "mp_rank_00_model_states.pt")["module"] if record["pieces"] else {}
    pattern = f"*zero_pp_rank_{record['rank']}_mp_rank_00_optim_states.pt"
    files = list(directory.glob(pattern))
    if len(files) != 1:
        raise EnvironmentFault(f"{directory}: expected one file {pattern}, found {len(files)}")
    state = _load(files[0])["optimizer_state_dict"]
    return state["fp32_flat_groups" if record["zero_stage"] == 3 else "single_partition_of_fp32_groups"]


def _flat_averages(directory: Path, record: dict[str, Any], ema: float) -> Any:
    """The same places in the averages of one decay."""
    if not record["pieces"]:
        return {}
    path = directory / averages_name(record["rank"])
    tensors = load_tensors(path) if path.is_file() else {}
    keys = {piece["name"] if record["zero_stage"] == 0 else piece["group"] for piece in record["pieces"]}
    missing = [key for key in keys if tensor_name(ema, str(key)) not in tensors]
    if missing:
        raise EnvironmentFault(f"{directory} holds no moving average with the decay {ema}")
    return {key: tensors[tensor_name(ema, str(key))] for key in keys}


def averages_name(rank: int) -> str:
    """The file of a step directory with the moving averages of one rank's partitions."""
    return f"ema-{rank:05d}.safetensors"


def _load(path: Path) -> dict[str, Any]:
    # DeepSpeed pickles its own classes into these files; they are our own and their sha256 was verified.
    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)
