"""First pass of a build: read every candidate, decode it completely, hash it, and write down what came out.

DIR/.build/scan-000000.parquet    one row per input of piece 0: number, size, source hash, reason (empty: good), detail
DIR/.build/spill-000000           source bytes of the good images of piece 0, one after the other, only for sources
                                  without cheap random access

A *piece* is a run of candidates of one group; it is scanned iff its scan file exists, so a killed scan continues.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.config import BuildConfig
from data_pipeline.decode import BadImage, decode_full
from data_pipeline.listing import Listing
from data_pipeline.manifest import read_table, write_table
from data_pipeline.plan import BAD, GOOD, UNREAD, candidates
from data_pipeline.processes import run_tasks, watched
from data_pipeline.source import Source, Unusable, Wanted
from vitscale.base.errors import BadDataError
from vitscale.base.files import publish, xxh3_64

# A piece is short enough to share among workers and to lose in a kill, and long enough for few files. It follows from
# the number of inputs alone: another number of workers must find the pieces of the killed build.
LEAST_PIECE, MOST_PIECE, PIECES = 64, 4096, 64


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What is known of every selected input; row i belongs to row i of the list."""

    status: np.ndarray
    """int8: UNREAD (left out by --per-class), GOOD or BAD."""
    sizes: np.ndarray
    """int64 bytes of the source."""
    hashes: np.ndarray
    """uint64 xxh3 of the source bytes."""
    pieces: np.ndarray
    """int32 piece that read the input."""
    offsets: np.ndarray
    """int64 place of the bytes in the spill file of that piece."""
    reasons: dict[int, tuple[str, str]]
    """Reason and detail by row, for bad inputs."""


@dataclass(frozen=True, kw_only=True)
class ScanSetup:
    """What every piece needs."""

    source: Source
    directory: Path
    config: BuildConfig


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of inputs to read."""

    piece: int
    wanted: Wanted


def scan_inputs(setup: ScanSetup, inputs: Listing, *, workers: int, is_shown: bool) -> Scan:
    """Read what the options select, in as many rounds as bad images under --per-class ask for.

    Raises BadDataError at a bad image when the options say stop.
    """
    count = len(inputs)
    scan = Scan(
        status=np.full(count, UNREAD, np.int8),
        sizes=np.zeros(count, np.int64),
        hashes=np.zeros(count, np.uint64),
        pieces=np.zeros(count, np.int32),
        offsets=np.zeros(count, np.int64),
        reasons={},
    )
    pieces = 0
    while len(rows := candidates(inputs.labels, scan.status, setup.config.per_class)):
        runs = list(_runs(rows, inputs.groups))
        todo = [number for number, run in enumerate(runs, start=pieces) if not scan_path(setup.directory, number).exists()]
        tasks = (_piece(number, runs[number - pieces], inputs) for number in todo)
        finished = run_tasks(scan_piece, setup, tasks, workers=workers)
        images = sum(len(runs[number - pieces]) for number in todo)
        watched(((None, done) for done in finished), images=images, what="reading", is_shown=is_shown and images > 0)
        for number, run in enumerate(runs, start=pieces):
            _take_over(scan, number, run, read_table(scan_path(setup.directory, number)))
        pieces += len(runs)
    return scan


def scan_piece(setup: ScanSetup, piece: Piece) -> int:
    """Read, decode and hash the inputs of a piece, then publish its files. Returns how many inputs it had."""
    rows: list[tuple[int, int, str, str]] = []  # size, hash, reason, detail
    spill_temporary = setup.directory / f"spill-{piece.piece:06d}.tmp"
    with open(os.devnull if setup.source.is_random_access else spill_temporary, "wb") as spill:
        contents = setup.source.read(piece.wanted)
        for name, content in zip(piece.wanted.names, contents, strict=True):
            if isinstance(content, Unusable):
                rows.append((0, 0, content.reason, content.detail))
                continue
            try:
                decode_full(content, max_pixels=setup.config.max_pixels)
            except BadImage as bad:
                if setup.config.on_bad == "stop":
                    raise BadDataError(
                        f"{name} is a bad image ({bad.reason}: {bad.detail}) and --on-bad is stop; "
                        "repair it, or let the build reject it with --on-bad skip"
                    ) from None
                rows.append((0, 0, bad.reason, bad.detail))
            else:
                spill.write(content)
                rows.append((len(content), xxh3_64(content), "", ""))
        spill.flush()
        if not setup.source.is_random_access:
            os.fsync(spill.fileno())
            publish(spill_temporary, spill_path(setup.directory, piece.piece))
    sizes, hashes, reasons, details = zip(*rows, strict=True)
    columns = {
        "number": piece.wanted.numbers,
        "size": np.array(sizes, np.int64),
        "source_xxh3": np.array(hashes, np.uint64),
        "reason": list(reasons),
        "detail": list(details),
    }
    write_table(scan_path(setup.directory, piece.piece), columns)
    return len(rows)


def scan_path(directory: Path, piece: int) -> Path:
    return directory / f"scan-{piece:06d}.parquet"


def spill_path(directory: Path, piece: int) -> Path:
    return directory / f"spill-{piece:06d}"


def _piece(piece: int, rows: np.ndarray, inputs: Listing) -> Piece:
    return Piece(piece=piece, wanted=inputs.wanted(rows))


def _runs(rows: np.ndarray, groups: np.ndarray) -> Iterator[np.ndarray]:
    """Cut rows where their group changes, and then into pieces of equal length."""
    most = min(MOST_PIECE, max(LEAST_PIECE, len(rows) // PIECES))
    for together in np.split(rows, np.flatnonzero(np.diff(groups[rows])) + 1):
        yield from np.split(together, range(most, len(together), most))


def _take_over(scan: Scan, piece: int, rows: np.ndarray, table: dict[str, np.ndarray]) -> None:
    is_good = table["reason"] == ""
    scan.status[rows] = np.where(is_good, GOOD, BAD)
    scan.sizes[rows] = table["size"]
    scan.hashes[rows] = table["source_xxh3"]
    scan.pieces[rows] = piece
    scan.offsets[rows] = np.cumsum(table["size"]) - table["size"]
    for at in np.flatnonzero(~is_good):
        scan.reasons[int(rows[at])] = (table["reason"][at], table["detail"][at])
