"""Where ZeRO keeps what: the adapter to DeepSpeed's internals (checked against its version by a test).

ZeRO flattens the parameters of a group into one vector and gives every rank a slice of it. The *partition map* of a
rank lists, for each piece it holds: the parameter, where the piece starts in the flattened parameter, and where it lies
in the rank's flat partitions. With the maps of all ranks a full parameter can be put together from the files, whatever
the stage and the world size, without asking DeepSpeed.

stage   flat partitions in the engine            in the rank's optimizer file
0       none: parameters are whole               model file of rank 0, by name
1, 2    single_partition_of_fp32_groups[group]   single_partition_of_fp32_groups
3       fp32_partitioned_groups_flat[group]      fp32_flat_groups
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale.base.errors import EnvironmentFault
from vitscale.base.files import read_json
from vitscale.training.engine import Engine

SCHEMA_VERSION = 1


def partition_map(engine: Engine) -> dict[str, Any]:
    """The partition map of this rank as plain JSON values."""
    pieces = []
    for name, parameter in engine.module.named_parameters():
        piece = _piece(engine, parameter)
        if piece is not None:
            shape = list(getattr(parameter, "ds_shape", parameter.shape))
            pieces.append({"name": name, "shape": shape, **piece})
    return {
        "schema_version": SCHEMA_VERSION,
        "rank": engine.rank,
        "world": engine.world,
        "zero_stage": engine.ds.stage,
        "pieces": pieces,
    }


def _piece(engine: Engine, parameter: Tensor) -> dict[str, int] | None:
    """{start, numel, group, offset} of the part of a parameter that this rank holds, or None."""
    stage = engine.ds.stage
    if stage == 0:
        if engine.rank > 0:
            return None
        return {"start": 0, "numel": parameter.numel(), "group": 0, "offset": 0}
    if stage in (1, 2):
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return None
        held, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
        return {"start": held.start, "numel": held.numel, "group": mapping.param_group_index, "offset": flat.start}
    zero: Any = engine.zero_optimizer
    group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
    start = padded * engine.rank  # every rank holds an equal, padded share
    numel = max(0, min(padded, parameter.ds_numel - start))  # type: ignore[attr-defined]
    return {"start": start, "numel": numel, "group": group, "offset": offset} if numel else None


def consolidate(directory: Path) -> dict[str, Tensor]:
    """Whole float32 parameters, by name, from a committed step directory whose hashes were verified.

    This is the one place that unpickles checkpoint files outside DeepSpeed's own loader. Raises EnvironmentFault when
    the maps do not cover every parameter exactly once.
    """
    maps = [read_json(path) for path in sorted(directory.glob("partition-*.json"))]
    if not maps or len(maps) != maps[0]["world"]:
        raise EnvironmentFault(f"{directory}: expected one partition map per rank, found {len(maps)}")
    whole: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    for record in maps:
        flats = _flat_partitions(directory, record)
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


def _load(path: Path) -> dict[str, Any]:
    # DeepSpeed pickles its own classes into these files; they are our own and their sha256 was verified.
    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)
