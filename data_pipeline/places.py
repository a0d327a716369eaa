"""Where tars lie: a directory of this machine or a prefix of an object store, and patterns that name several of them.

DIR                        every *.tar in it
DIR/train-*.tar            a pattern of the shell
DIR/train-{000..012}.tar   a range or a list in braces, as WebDataset writes it; also behind s3://, gs://, https://
s3://BUCKET/PREFIX         every *.tar directly below it
"""

import functools
import glob
import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.store import Store, is_url, open_store
from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.base.files import temporary_beside, write_bytes

MOST_TARS = 10_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True, kw_only=True)
class Tars:
    """Tars of one place, sorted by name as the source lists or counts them."""

    at: str
    """Absolute directory, or URL."""
    names: tuple[str, ...]
    """File names without `.tar`."""


def find_tars(source: str) -> Tars:
    """The tars that `source` names. Raises UsageError for none, EnvironmentFault for a place that cannot be read."""
    paths = _expanded(source)
    if is_url(source):
        return _find_objects(source, paths)
    if os.path.isdir(source):
        paths = [os.path.join(source, name) for name in os.listdir(source) if name.endswith(".tar")]
    elif any(glob.has_magic(path) for path in paths):
        paths = [path for pattern in paths for path in glob.glob(pattern)]
    paths = sorted(paths)
    folders = {os.path.dirname(os.path.abspath(path)) for path in paths}
    if not paths:
        raise UsageError(f"expected tars at {source}, found none; give their directory or a pattern such as 'DIR/train-*.tar'")
    if len(folders) > 1:
        raise UsageError(f"expected tars of one directory, {source} names {len(folders)}; index each directory for itself")
    for path in paths:
        if not path.endswith(".tar") or not os.path.isfile(path):
            raise UsageError(f"expected files *.tar, {source} names {path}, which is none; mend the pattern")
    names = [os.path.basename(path).removesuffix(".tar") for path in paths]
    return Tars(at=folders.pop(), names=tuple(names))


def _find_objects(source: str, urls: list[str]) -> Tars:
    folder, _, last = source.rpartition("/")
    if any("*" in url or not url.endswith(".tar") for url in urls):
        if last.endswith(".tar") or "{" in source or "*" in source:
            raise UsageError(f"expected a prefix or names in braces such as {folder}/train-{{000..012}}.tar, got {source}")
        at = source.rstrip("/")
        names = [path.removesuffix(".tar") for path in open_store(at).list("") if path.endswith(".tar") and "/" not in path]
    else:
        at = folder
        names = sorted({url.removeprefix(f"{folder}/").removesuffix(".tar") for url in urls})
        if any("/" in name for name in names):
            raise UsageError(f"expected tars below one prefix, {source} names several; index each prefix for itself")
    if not names:
        raise UsageError(f"expected tars directly below {source}, found none; give their prefix, or names in braces")
    return Tars(at=at, names=tuple(names))


@functools.lru_cache(maxsize=4)
def _store(url: str) -> Store:
    """One per process: it remembers what it saw of each object."""
    return open_store(url)


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """By what an unchanged tar is known without reading it."""

    size: int
    """Bytes."""
    mtime_ns: int
    """Time of its last change; 0 in object stores."""


def stamp_of(at: str, name: str) -> Stamp:
    """Raises EnvironmentFault for a missing tar."""
    if is_url(at):
        return Stamp(size=_store(at).size(f"{name}.tar"), mtime_ns=0)
    path = Path(at) / f"{name}.tar"
    try:
        status = path.stat()
    except FileNotFoundError:
        raise EnvironmentFault(f"expected a tar at {path}, found none; restore it from a copy") from None
    return Stamp(size=status.st_size, mtime_ns=status.st_mtime_ns)


ReadAt = Callable[[int, int], bytes]
"""read_at(offset, count): bytes of a tar, fewer only where it ends."""


@contextmanager
def local_copy(at: str, name: str, *, scratch: Path) -> Iterator[Path]:
    """The tar as a local file: itself, or a copy in `scratch` that is gone afterwards."""
    if not is_url(at):
        yield Path(at) / f"{name}.tar"
        return
    with temporary_beside(scratch / f"{name}.tar") as copy:
        with open(copy, "wb") as file:
            for piece in _store(at).chunks(f"{name}.tar"):
                file.write(piece)
        yield copy


def pieces_of(at: str, name: str) -> ReadAt:
    """read_at of a tar where it lies, for a few pieces of it."""
    if is_url(at):
        return functools.partial(_store(at).read_range, f"{name}.tar")

    def read_at(offset: int, count: int) -> bytes:
        with reading(Path(at) / f"{name}.tar") as read:
            return read(offset, count)

    return read_at


@contextmanager
def reading(path: Path) -> Iterator[ReadAt]:
    """read_at of a local file."""
    with open(path, "rb", buffering=0) as file:
        descriptor = file.fileno()

        def read_at(offset: int, count: int) -> bytes:
            content = os.pread(descriptor, count, offset)
            while len(content) < count and (more := os.pread(descriptor, count - len(content), offset + len(content))):
                content += more  # a network file system may answer in pieces
            return content

        yield read_at


def record_of(directory: Path, at: str, name: str) -> Path:
    """A record of a dataset, such as an index; one that is missing is fetched from the store that has the tars."""
    path = directory / name
    if is_url(at) and not path.exists():
        write_bytes(path, _store(at).read(name))
    return path


def _expanded(pattern: str) -> list[str]:
    """`a{0..2}{x,y}`: every combination, ranges padded with zeros as their first number is."""
    parts = _BRACES.split(pattern)  # text and inside of braces, by turns
    choices: list[list[str]] = []
    count = 1
    for number, part in enumerate(parts):
        if number % 2 == 0:
            choices.append([part])
        elif span := _RANGE.fullmatch(part):
            first, last = int(span[1]), int(span[2])
            if not first <= last < first + MOST_TARS:
                raise UsageError(f"expected an ascending range in braces, got {{{part}}} in {pattern}")
            choices.append([f"{value:0{len(span[1])}d}" for value in range(first, last + 1)])
        else:
            choices.append(part.split(","))
        count *= len(choices[-1])
    if count > MOST_TARS:
        raise UsageError(f"expected at most {MOST_TARS:,} tars, {pattern} names {count:,}")
    return ["".join(combination) for combination in itertools.product(*choices)]
