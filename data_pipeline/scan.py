"""First pass of a build: read every candidate, decode it completely, hash it, and write down what came out.

DIR/.build/scan-000000.parquet    one row per input of piece 0: number; size and xxh3 of what was read and of what will be
                                  stored; place in the spill file (-1: not there); reason (empty: good) and its detail
DIR/.build/spill-000000           bytes to store, one image after the other: of images that were shrunk (they are decoded
                                  here and never again), and of all images of sources without cheap random access

A *piece* is a run of candidates of one group; it is scanned iff its scan file exists, so a killed scan continues.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipeline.config import BuildConfig
from data_pipeline.decode import BadImage, decode_full, image_header
from data_pipeline.exclude import Excluded
from data_pipeline.listing import Listing
from data_pipeline.manifest import read_table, write_table
from data_pipeline.plan import BAD, DUPLICATE, EXCLUDED, GOOD, UNREAD, candidates, duplicates, in_parts
from data_pipeline.processes import run_tasks
from data_pipeline.resize import Shrink
from data_pipeline.source import NOT_AN_IMAGE, Source, Unusable, Wanted
from data_pipeline.team import Team
from vitscale.base.errors import BadDataError
from vitscale.base.faults import fault_point
from vitscale.base.files import publish, temporary_beside, xxh3_64
from vitscale.base.progress import ImageBar

# A piece is short enough to share among workers and to lose in a kill, and long enough for few files. It follows from
# the number of inputs alone: another number of workers must find the pieces of the killed build.
LEAST_PIECE, MOST_PIECE, PIECES = 64, 4096, 64
NO_LABEL = Unusable(reason="no-label", detail="others of the source have one")


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What is known of every selected input, 44 bytes each; row i belongs to row i of the list."""

    status: np.ndarray
    """int8: UNREAD (left out by --per-class), GOOD, BAD, EXCLUDED or DUPLICATE."""
    source_sizes: np.ndarray
    """int32 bytes that were read; 0: there were none."""
    hashes: np.ndarray
    """uint64 xxh3 of the bytes that were read."""
    sizes: np.ndarray
    """int32 bytes to store."""
    image_hashes: np.ndarray
    """uint64 xxh3 of the bytes to store."""
    pieces: np.ndarray
    """int32 piece that read the input."""
    offsets: np.ndarray
    """int64 place of the bytes to store in the spill file of that piece; -1: they are read from the source again."""
    causes: np.ndarray
    """int64: for EXCLUDED the place in the excluded datasets, for DUPLICATE the row that is kept."""

    @classmethod
    def of(cls, count: int) -> "Scan":
        # Zeros cost no memory before they are touched.
        return cls(
            status=np.full(count, UNREAD, np.int8),
            source_sizes=np.zeros(count, np.int32),
            hashes=np.zeros(count, np.uint64),
            sizes=np.zeros(count, np.int32),
            image_hashes=np.zeros(count, np.uint64),
            pieces=np.zeros(count, np.int32),
            offsets=np.zeros(count, np.int64),
            causes=np.zeros(count, np.int64),
        )


@dataclass(frozen=True, kw_only=True)
class ScanSetup:
    """What every piece needs."""

    source: Source
    directory: Path
    config: BuildConfig

    @property
    def shrink(self) -> Shrink | None:
        short = self.config.resize_short
        return None if short is None else Shrink(short=short, quality=self.config.quality)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of inputs to read."""

    piece: int
    wanted: Wanted
    is_unlabelled: np.ndarray
    """bool of each input: it has no label, and others of the source have."""


@dataclass(frozen=True, kw_only=True)
class ScannedInput:
    """One row of a scan file."""

    source_size: int = 0
    source_xxh3: int = 0
    size: int = 0
    image_xxh3: int = 0
    offset: int = -1
    reason: str = ""
    detail: str = ""


def scan_inputs(setup: ScanSetup, inputs: Listing, excluded: Excluded, *, team: Team, workers: int, is_shown: bool) -> Scan:
    """Read what the options select, in as many rounds as rejects under --per-class ask for; all ranks see the same.

    Raises BadDataError at a bad image when the options say stop.
    """
    scan = Scan.of(len(inputs))
    pieces = 0
    while len(rows := candidates(inputs.labels, scan.status, setup.config.per_class)):
        runs = list(_runs(rows, inputs.groups))
        todo = [number for number, run in enumerate(runs, start=pieces) if not scan_path(setup.directory, number).exists()]
        images = sum(len(runs[number - pieces]) for number in todo)
        with ImageBar(images=images, what="reading", is_shown=is_shown) as bar:

            def mine(
                runs: list[np.ndarray] = runs, todo: list[int] = todo, first: int = pieces, bar: ImageBar = bar
            ) -> Iterator[Piece]:
                for number in todo:
                    if team.claim(scan_path(setup.directory, number).stem):
                        rows = runs[number - first]
                        is_unlabelled = (inputs.labels[rows] < 0) & (inputs.most_labels > 0)
                        yield Piece(piece=number, wanted=inputs.wanted(rows), is_unlabelled=is_unlabelled)
                    else:
                        bar.add(len(runs[number - first]))

            for read, read_bytes in run_tasks(scan_piece, setup, mine(), workers=workers):
                bar.add(read, read_bytes)
        team.wait_for_files([scan_path(setup.directory, number) for number in todo])
        for number, run in enumerate(runs, start=pieces):
            _take_over(scan, number, run, setup.directory)
        pieces += len(runs)
        _judge(scan, excluded, is_deduplicated=setup.config.dedup)
    return scan


def scan_piece(setup: ScanSetup, piece: Piece) -> tuple[int, int]:
    """Read, decode and hash the inputs of a piece, then publish its files. Returns how many inputs and bytes it had."""
    spill_at = spill_path(setup.directory, piece.piece)
    with temporary_beside(spill_at) as temporary:
        with open(temporary, "wb", buffering=1 << 20) as spill:
            rows = list(_scanned(setup, piece, spill))
            is_needed = spill.tell() > 0
            spill.flush()
            os.fsync(spill.fileno())
        if is_needed:
            publish(temporary, spill_at)
    _write_rows(scan_path(setup.directory, piece.piece), piece.wanted.numbers, rows)
    fault_point("build.piece", piece=piece.piece)
    return len(rows), sum(row.source_size for row in rows)


def _scanned(setup: ScanSetup, piece: Piece, spill: BinaryIO) -> Iterator[ScannedInput]:
    """What is known of each input of a piece; bytes that no source gives cheaply again go to `spill`."""
    contents = setup.source.read(piece.wanted, max_bytes=setup.config.max_bytes)
    for name, content, is_unlabelled in zip(piece.wanted.names, contents, piece.is_unlabelled.tolist(), strict=True):
        if isinstance(content, Unusable):
            yield _rejected(setup, name, ScannedInput(), content)
            continue
        known = ScannedInput(source_size=len(content), source_xxh3=xxh3_64(content))
        if is_unlabelled:
            yield _rejected(setup, name, known, NO_LABEL)
            continue
        try:
            stored = _to_store(setup, content)
        except BadImage as bad:
            yield _rejected(setup, name, known, Unusable(reason=bad.reason, detail=bad.detail))
            continue
        is_spilled = stored is not content or not setup.source.is_random_access
        offset = spill.tell() if is_spilled else -1
        image_hash = known.source_xxh3 if stored is content else xxh3_64(stored)
        yield _with(known, size=len(stored), image_xxh3=image_hash, offset=offset)
        if is_spilled:
            spill.write(stored)


def _rejected(setup: ScanSetup, name: str, known: ScannedInput, why: Unusable) -> ScannedInput:
    """Raises BadDataError where the options say stop, but for files that never claimed to be images: such lie everywhere."""
    if setup.config.on_bad == "stop" and why.reason != NOT_AN_IMAGE:
        raise BadDataError(
            f"{name} cannot be used ({why.reason}: {why.detail}) and --on-bad is stop; "
            "repair it and start again, or start over with --on-bad skip --replan"
        )
    return _with(known, reason=why.reason, detail=why.detail)


def scan_path(directory: Path, piece: int) -> Path:
    return directory / f"scan-{piece:06d}.parquet"


def spill_path(directory: Path, piece: int) -> Path:
    return directory / f"spill-{piece:06d}"


def _to_store(setup: ScanSetup, content: bytes) -> bytes:
    """The bytes a shard will hold: `content` itself, or a small JPEG of it. Raises BadImage."""
    if len(content) > setup.config.max_bytes:
        raise BadImage("too-many-bytes", f"{len(content)} bytes are more than {setup.config.max_bytes}")
    image = decode_full(content, max_pixels=setup.config.max_pixels)
    if setup.shrink is None or not setup.shrink.is_needed(image):
        return content
    return setup.shrink.shrunk(image, image_header(content).orientation)


def _write_rows(path: Path, numbers: np.ndarray, rows: list[ScannedInput]) -> None:
    columns = {
        "number": numbers,
        "source_size": np.array([row.source_size for row in rows], np.int64),
        "source_xxh3": np.array([row.source_xxh3 for row in rows], np.uint64),
        "size": np.array([row.size for row in rows], np.int64),
        "image_xxh3": np.array([row.image_xxh3 for row in rows], np.uint64),
        "offset": np.array([row.offset for row in rows], np.int64),
        "reason": [row.reason for row in rows],
        "detail": [row.detail for row in rows],
    }
    write_table(path, columns)


def _with(known: ScannedInput, **more: int | str) -> ScannedInput:
    return ScannedInput(**{**vars(known), **more})


def _runs(rows: np.ndarray, groups: np.ndarray) -> Iterator[np.ndarray]:
    """Cut rows where their group changes, and then into pieces of equal length."""
    most = min(MOST_PIECE, max(LEAST_PIECE, len(rows) // PIECES))
    for together in np.split(rows, np.flatnonzero(np.diff(groups[rows])) + 1):
        yield from np.split(together, range(most, len(together), most))


def _take_over(scan: Scan, piece: int, rows: np.ndarray, directory: Path) -> None:
    columns = ["source_size", "source_xxh3", "size", "image_xxh3", "offset", "reason"]
    table = read_table(scan_path(directory, piece), columns=columns)
    scan.status[rows] = np.where(table["reason"] == "", GOOD, BAD)
    scan.source_sizes[rows] = table["source_size"]
    scan.hashes[rows] = table["source_xxh3"]
    scan.sizes[rows] = table["size"]
    scan.image_hashes[rows] = table["image_xxh3"]
    scan.pieces[rows] = piece
    scan.offsets[rows] = table["offset"]


def _judge(scan: Scan, excluded: Excluded, *, is_deduplicated: bool) -> None:
    """Reject images of other datasets, then those that occur before: of what was read so far."""
    good = np.flatnonzero(scan.status == GOOD)
    for part in in_parts(len(good)):
        rows = good[part]
        place = excluded.find(scan.hashes[rows])
        place = np.where(place >= 0, place, excluded.find(scan.image_hashes[rows]))
        hit = place >= 0
        scan.status[rows[hit]], scan.causes[rows[hit]] = EXCLUDED, place[hit]
    if is_deduplicated:
        good = good[scan.status[good] == GOOD]
        again, kept = duplicates(scan.hashes[good], scan.source_sizes[good])
        scan.status[good[again]], scan.causes[good[again]] = DUPLICATE, good[kept]
