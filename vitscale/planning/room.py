"""Whether the checkpoints that a run keeps fit on its disk, asked before the first is written.

One checkpoint of P parameters: 4 P of weights in float32 (the partitions' masters), the optimizer's moments, 4 P for each
moving average; at stages 1 and 2 rank 0 adds the weights as the model holds them. While one is written the kept ones are
still there, so there must be room for keep_last + 1. Quotas are not seen here: a save that meets one says so itself.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from vitscale.base.progress import bytes_in_words
from vitscale.config import Config
from vitscale.ds_config import DsConfig
from vitscale.model.flops import parameters
from vitscale.planning.memory import moment_bytes


@dataclass(frozen=True, kw_only=True)
class Size:
    """What one checkpoint takes."""

    bytes: int
    files: int
    """Directories and temporary files counted."""


def checkpoint_size(config: Config, ds: DsConfig) -> Size:
    """Estimated from the configuration; wrappers of the files and the maps, a few kB each, are left out."""
    P, N, stage = parameters(config.model), ds.world, ds.stage
    is_low = config.train.precision == "fp16" or (config.train.precision == "bf16" and stage >= 2)
    model = (2 if is_low else 4) * P if stage in (1, 2) else 0
    numbers = 4 * P + moment_bytes(config.model, config.optim) + 4 * P * len(config.train.ema)
    shards = {0: 0, 1: N, 2: N, 3: 2 * N}[stage]
    averages = (N if stage else 1) if config.train.ema else 0
    return Size(bytes=model + numbers, files=shards + (1 if stage < 3 else 0) + N + averages + 3)


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a file system still takes."""

    bytes: int
    files: int | None
    """None: as many as there is room for."""


def room_at(path: Path) -> Room:
    """Of the file system that `path`, or the nearest directory above it that exists, lies on."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    free = os.statvfs(place)
    return Room(bytes=free.f_bavail * free.f_frsize, files=free.f_favail if free.f_files else None)


def shortage(size: Size, room: Room, *, keep_last: int, present: int, where: Path) -> str | None:
    """A warning in one sentence where the checkpoints to come will not fit beside those `present`, else None. Pure."""
    more = max(1, keep_last + 1 - present)
    needed = Size(bytes=more * size.bytes, files=more * size.files)
    is_short_of_files = room.files is not None and room.files < needed.files
    if room.bytes >= needed.bytes and not is_short_of_files:
        return None
    left = f"{room.files:,} files" if is_short_of_files else bytes_in_words(room.bytes)
    wanted = f"{needed.files:,} files" if is_short_of_files else bytes_in_words(needed.bytes)
    return (
        f"{where} has room for {left}, but the {keep_last} checkpoints of run.keep_last and the one being written need about "
        f"{wanted} more ({bytes_in_words(size.bytes)} each); free room or lower run.keep_last, else a save fails, "
        "the checkpoint before stays and training goes on"
    )
