"""Files appear whole or not at all: temporary name, fsync, rename. Also the hashes that records carry."""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from vitscale.base.errors import EnvironmentFault

HASH_CHUNK_BYTES = 4 << 20


_SAFE_NAME = re.compile(r"(?!\.)[^/\\\x00-\x1f\x7f]{1,240}")


def safe_name(name: object) -> bool:
    """Whether a name that a record holds may become a file in its directory: one plain component, nothing hidden."""
    return isinstance(name, str) and _SAFE_NAME.fullmatch(name) is not None


def unsafe_name(names: Iterable[object]) -> str | None:
    """The first name, as it is written in Python, that is not safe or meets another where case is ignored; None: all fine."""
    seen = set()
    for name in names:
        if not safe_name(name) or (folded := str(name).casefold()) in seen:
            return repr(name)
        seen.add(folded)
    return None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system say which file it met: what fails at an open file does not know its name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def fsync_path(path: Path) -> None:
    """Flush a file or a directory to the device. A rename is durable only after its directory was flushed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Rename a file or directory already written and flushed, then flush the directory that now names it."""
    os.replace(temporary, final)
    fsync_path(final.parent)


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` that no other writer has; what is still there at the end is deleted.

    Drawn at random: the number of a process is that of another one on the next machine, or after a kill.
    """
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(6)}")
    _in_use.add(temporary)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        _in_use.discard(temporary)


_in_use: set[Path] = set()  # by the threads of this process


def remove_temporaries(directory: Path) -> None:
    """Delete what a process that was killed while it wrote has left in a directory. Only for who alone writes there."""
    for path in directory.glob(".*.tmp-*"):
        if path not in _in_use:
            path.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is either absent, the old one, or the whole new one."""
    with temporary_beside(path) as temporary:
        with naming(path), open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)


def write_json(path: Path, record: Any) -> None:
    """Write canonical JSON: sorted keys, two spaces, one final newline. Equal records give equal bytes."""
    write_bytes(path, canonical_json(record))


def canonical_json(record: Any) -> bytes:
    return (json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Read JSON; a missing or damaged file raises EnvironmentFault naming it."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise EnvironmentFault(f"expected a file at {path}, found none") from None
    except (ValueError, OSError, RecursionError) as error:
        raise EnvironmentFault(f"{path} cannot be read as JSON ({error}); restore it from a copy") from None


def sha256_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a whole file, read in chunks."""
    digest = hashlib.sha256()
    with naming(path), open(path, "rb", buffering=0) as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def xxh3_64(content: bytes) -> int:
    """64-bit xxh3 as an unsigned integer: the hash of images and of delivered samples."""
    return xxhash.xxh3_64_intdigest(content)
