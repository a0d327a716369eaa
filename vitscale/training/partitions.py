"""Where ZeRO keeps what, as checkpoints record it, and every number of the state found again in the files.

The *partition map* of a rank lists, for each piece it holds (training/pieces.py): the parameter, where the piece starts in
the flattened parameter, and where it lies in the rank's flat partitions. With the maps of all ranks any range of a
parameter, of what its optimizer keeps and of its moving averages is found, whatever the stage and the world size that wrote
it: a resume on other ranks, an export and an evaluation read by the same few lines.

stage   weights in the rank's files               optimizer state                      averages
0       model file of rank 0, by name             the same file, by `state` number     by name, of rank 0
1, 2    single_partition_of_fp32_groups[group]    base_optimizer_state, by group       by group
3       fp32_flat_groups[sub-group]               optimizer_state_dict, by sub-group   by sub-group
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale.base.errors import EnvironmentFault
from vitscale.base.files import read_json
from vitscale.training.ema import tensor_name
from vitscale.training.engine import STORED_TYPES, Engine
from vitscale.weights.tensors import load_tensors

SCHEMA_VERSION = 2


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
            {**asdict(piece), "group": engine.state_number(partition)} for partition in held for piece in partition.pieces
        ],
    }


@dataclass(frozen=True, kw_only=True)
class StoredPiece:
    """`numel` consecutive numbers of a flattened parameter, as a rank of the run that wrote them held them."""

    rank: int
    name: str
    start: int
    numel: int
    offset: int
    group: int
    """Number of the optimizer's tensor they lie in."""


class StoredState:
    """A committed step directory whose hashes were verified, read number by number. Files are mapped when first needed.

    Raises EnvironmentFault when the maps do not cover every parameter exactly once.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        maps = [read_json(path) for path in sorted(directory.glob("partition-*.json"))]
        if not maps or len(maps) != maps[0]["world"]:
            raise EnvironmentFault(f"{directory}: expected one partition map per rank, found {len(maps)}")
        if maps[0]["schema_version"] != SCHEMA_VERSION:
            raise EnvironmentFault(
                f"{directory}: its partition maps are of schema {maps[0]['schema_version']}, this version reads "
                f"{SCHEMA_VERSION}; continue it with the version it was written with"
            )
        self.stage: int = maps[0]["zero_stage"]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[StoredPiece]] = defaultdict(list)
        self._files: dict[tuple[str, int], Any] = {}
        for record in maps:
            for entry in record["pieces"]:
                shape = self.shapes.setdefault(entry["name"], tuple(entry["shape"]))
                piece = {key: value for key, value in entry.items() if key != "shape"}
                assert shape == tuple(entry["shape"]), entry
                self._pieces[entry["name"]].append(StoredPiece(rank=record["rank"], **piece))
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece.start)
            ends = [0, *(piece.start + piece.numel for piece in pieces)]
            if [piece.start for piece in pieces] != ends[:-1] or ends[-1] != math.prod(self.shapes[name]):
                raise EnvironmentFault(
                    f"{directory}: the maps hold {sum(piece.numel for piece in pieces)} of the "
                    f"{math.prod(self.shapes[name])} numbers of {name}"
                )

    def parts(self, name: str, start: int, numel: int) -> list[tuple[StoredPiece, slice, slice]]:
        """Which stored pieces hold a range of a parameter: (piece, where in its flat tensor, where in the range)."""
        found = []
        for piece in self._pieces[name]:
            begin, end = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if begin < end:
                shift = piece.offset - piece.start
                found.append((piece, slice(begin + shift, end + shift), slice(begin - start, end - start)))
        return found

    def fill(self, target: Tensor, name: str, start: int, what: str) -> None:
        """Copy a range of a parameter into the flat `target`. `what`: weights, a tensor of the optimizer, or an average."""
        for piece, there, here in self.parts(name, start, target.numel()):
            target[here].copy_(self._flat(piece, what)[there])

    def optimizer_keys(self, name: str) -> set[str]:
        """What the optimizer keeps of a parameter, number by number; empty before its first step."""
        piece = self._pieces[name][0]
        return {key for key, value in self._optimizer_state(piece).items() if torch.is_tensor(value) and value.dim() > 0}

    def optimizer_step(self, name: str) -> float | None:
        """The optimizer's own count of steps for a parameter, where it keeps one."""
        step = self._optimizer_state(self._pieces[name][0]).get("step")
        return None if step is None else float(step)

    def _flat(self, piece: StoredPiece, what: str) -> Tensor:
        if what == "weights":
            return self._weights(piece).reshape(-1)
        if what in (state := self._optimizer_state(piece)):
            return state[what].reshape(-1)
        path = self.directory / averages_name(piece.rank)
        tensors: Mapping[str, Tensor] = self._once(("ema", piece.rank), lambda: load_tensors(path) if path.is_file() else {})
        key = f"{what}/{piece.name if self.stage == 0 else piece.group}"
        if key not in tensors:
            raise EnvironmentFault(f"{self.directory} holds no moving average with the decay {what}")
        return tensors[key].reshape(-1)

    def _weights(self, piece: StoredPiece) -> Tensor:
        if self.stage == 0:
            return self._model_file()["module"][piece.name]
        key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        return self._optimizer_file(piece.rank)[key][piece.group]

    def _optimizer_state(self, piece: StoredPiece) -> dict[str, Any]:
        if self.stage == 0:
            states = self._model_file()["optimizer"]
        else:
            key = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
            states = self._optimizer_file(piece.rank)[key]
        return states["state"].get(piece.group, {})

    def _model_file(self) -> Any:
        return self._once(("model", 0), lambda: _load(self.directory / "mp_rank_00_model_states.pt"))

    def _optimizer_file(self, rank: int) -> Any:
        def load() -> Any:
            pattern = f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            files = list(self.directory.glob(pattern))
            if len(files) != 1:
                raise EnvironmentFault(f"{self.directory}: expected one file {pattern}, found {len(files)}")
            return _load(files[0])["optimizer_state_dict"]

        return self._once(("optimizer", rank), load)

    def _once(self, key: tuple[str, int], load: Any) -> Any:
        if key not in self._files:
            self._files[key] = load()
        return self._files[key]


def consolidate(directory: Path, *, ema: float | None = None) -> dict[str, Tensor]:
    """Whole float32 parameters, by name, from a committed step directory whose hashes were verified; or, with `ema`,
    their moving averages of that decay."""
    stored = StoredState(directory)
    whole = {}
    for name, shape in stored.shapes.items():
        flat = torch.empty(math.prod(shape))
        stored.fill(flat, name, 0, "weights" if ema is None else average(ema))
        whole[name] = flat.view(shape)
    return whole


def average(decay: float) -> str:
    """What `StoredState.fill` calls the averages of a decay."""
    return tensor_name(decay, "").removesuffix("/")


def averages_name(rank: int) -> str:
    """The file of a step directory with the moving averages of one rank's partitions."""
    return f"ema-{rank:05d}.safetensors"


def _load(path: Path) -> dict[str, Any]:
    """The one place that reads DeepSpeed's files. They are our own and their sha256 was verified, and still nothing in them can
    run: tensors, plain values and the few types DeepSpeed puts beside them, nothing else."""
    with torch.serialization.safe_globals(STORED_TYPES):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
