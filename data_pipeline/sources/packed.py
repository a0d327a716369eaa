"""Inputs that lie inside tars: where they are is found once, when the source is listed; a read is then one `pread`."""

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from braceexpand import braceexpand

from data_pipeline.source import CHUNK_ROWS, Unusable, too_long, what_is
from data_pipeline.tars import BadTar, Member, members
from vitscale.base.errors import EnvironmentFault, UsageError

T = TypeVar("T")

ReadAt = Callable[[int, int], bytes]
"""read_at(offset, count): bytes of an open file, fewer only where it ends."""


def find_tars(pattern: str) -> list[Path]:
    """The tars in a directory, or those a pattern names (* and ?, {000..099} and {a,b}), sorted.

    Raises UsageError where there are none, EnvironmentFault where one that a pattern without * names is missing.
    """
    if "://" in pattern:
        raise UsageError(f"expected tars on a local or network file system, got the URL {pattern}; copy them first")
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.tar"))
    elif path.exists():
        files = [path]
    else:
        files = sorted({Path(file) for one in _expanded(str(path)) for file in _matching(one)})
    if not files:
        raise UsageError(f"expected .tar files at {pattern}, found none")
    if missing := [file for file in files if not file.is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise EnvironmentFault(f"expected a tar at {missing[0]}{more}, found {what_is(missing[0])}")
    return files


def tar_members(file: Path, read_at: ReadAt) -> Iterator[Member]:
    """The regular files of a tar. Raises EnvironmentFault where it is damaged: nobody knows what is missing."""
    try:
        yield from members(read_at, file.stat().st_size)
    except BadTar as bad:
        raise EnvironmentFault(f"{file} cannot be read as a tar ({bad}); repair it, fetch it again, or move it away") from None


@contextmanager
def reading(file: Path) -> Iterator[ReadAt]:
    """A function that reads an open file at any offset."""
    with open(file, "rb", buffering=0) as raw:

        def read_at(offset: int, count: int) -> bytes:
            content = os.pread(raw.fileno(), count, offset)
            while len(content) < count and (more := os.pread(raw.fileno(), count - len(content), offset + len(content))):
                content += more  # a network file system may answer in pieces
            return content

        yield read_at


def read_places(files: Sequence[Path], places: np.ndarray, *, max_bytes: int | None) -> Iterator[bytes | Unusable]:
    """The bytes at places (rows of file number, offset, size), in the given order; one file is open at a time.

    A size below zero reads nothing.
    """
    start = 0
    while start < len(places):
        number = places[start, 0]
        others = np.flatnonzero(places[start:, 0] != number)
        stop = start + int(others[0]) if len(others) else len(places)
        with reading(files[number]) as read_at:
            for _, offset, size in places[start:stop].tolist():
                if (unusable := too_long(size, max_bytes)) is not None:
                    yield unusable
                    continue
                size = max(size, 0)
                content = read_at(offset, size)
                if len(content) != size:
                    raise EnvironmentFault(
                        f"{files[number]} has become shorter since it was listed; restore it, or start over with --replan"
                    )
                yield content
        start = stop


def in_chunks(items: Iterable[T]) -> Iterator[list[T]]:
    """Lists of at most CHUNK_ROWS items."""
    waiting = iter(items)
    while chunk := list(islice(waiting, CHUNK_ROWS)):
        yield chunk


def _expanded(pattern: str) -> Iterator[str]:
    try:
        yield from braceexpand(pattern)
    except ValueError:  # unbalanced
        raise UsageError(f"expected a pattern such as train-{{000..099}}.tar, got {pattern!r}; close its braces") from None


def _matching(pattern: str) -> list[str]:
    return glob.glob(pattern) if glob.has_magic(pattern) else [pattern]
