"""How much memory the plan of a very long table takes: a list and the results of its scan are made up, then planned.

`python -m tests.helpers.long_table make DIR ROWS` writes them, `... plan DIR` plans in a process of its own and prints
its peak memory as JSON. Nothing is decoded.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.build import _Build
from data_pipeline.config import BuildConfig
from data_pipeline.exclude import Excluded
from data_pipeline.layout import lay_out, read_layouts
from data_pipeline.listing import read_listing, write_listing
from data_pipeline.manifest import write_table
from data_pipeline.scan import ScanSetup, _runs, scan_inputs, scan_path
from data_pipeline.source import CHUNK_ROWS, Chunk, Source, Unusable, Wanted
from data_pipeline.team import Team
from vitscale.base.progress import ImageBar

CLASSES = 1000
CONFIG = BuildConfig(source="table:long.csv", split=(("train", "0.99"), ("eval", "0.01")), dedup=True)


class LongTable(Source):
    """Rows that nobody reads."""

    where = "a long table"
    class_names = tuple(f"n{number:08d}" for number in range(CLASSES))

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def list_inputs(self) -> Iterator[Chunk]:
        for start in range(0, self.rows, CHUNK_ROWS):
            numbers = np.arange(start, min(start + CHUNK_ROWS, self.rows))
            names = [f"part-{number % 997:04d}/photograph_{number:010d}.jpg" for number in numbers.tolist()]
            yield Chunk(numbers=numbers, names=pa.array(names, pa.large_string()), labels=pa.array(numbers % CLASSES))

    def read(self, wanted: Wanted) -> Iterator[bytes | Unusable]:
        raise NotImplementedError


def make(work: Path, rows: int) -> None:
    """Every 50th image is bad, every 100th has the bytes of its neighbour."""
    work.mkdir(parents=True)
    listing = write_listing(LongTable(rows), work / "list")
    for piece, run in enumerate(_runs(np.arange(rows), listing.groups)):
        is_bad = run % 50 == 7
        hashes = np.random.default_rng(piece).integers(0, 2**64, len(run), np.uint64)
        hashes[run % 100 == 1] = hashes[np.flatnonzero(run % 100 == 1) - 1]
        columns = {
            "number": run,
            "source_size": np.full(len(run), 110_000),
            "source_xxh3": hashes,
            "size": np.where(is_bad, 0, 110_000),
            "image_xxh3": hashes,
            "offset": np.full(len(run), -1),
            "reason": np.where(is_bad, "decode-error", "").tolist(),
            "detail": np.where(is_bad, "the bytes make no sense", "").tolist(),
        }
        write_table(scan_path(work, piece), columns)


def plan(work: Path) -> dict[str, float]:
    """Take the scan over, plan, and prepare the first shards of each split."""
    started_at_s = time.monotonic()
    listing = read_listing(work / "list")
    source, excluded, team = LongTable(len(listing)), Excluded(()), Team()
    setup = ScanSetup(source=source, directory=work, config=CONFIG)
    scan = scan_inputs(setup, listing, excluded, team=team, workers=1, is_shown=False)
    lay_out(CONFIG, listing, scan, excluded, work=work, listed=len(listing))
    layouts = read_layouts(work)
    build = _Build(CONFIG, work.parent, workers=1, team=team, url=None, is_shown=False)
    build._work = work
    with ImageBar(images=0, what="", is_shown=False) as bar:
        tasks = build._tasks(layouts, listing, bar)
        firsts = [next(tasks) for _ in range(20)]
    return {
        "rows": len(listing),
        "images": sum(layout.images for layout in layouts),
        "rejected": sum(sum(layout.rejected.values()) for layout in layouts),
        "first_names": len(firsts[0].wanted.names),
        "seconds": round(time.monotonic() - started_at_s, 1),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        print(json.dumps(plan(Path(sys.argv[2]))))
