"""strace, attached to the running process itself: what it asks of the system is written down, or made to fail."""

import ctypes
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

_PR_SET_PTRACER, _ANYBODY = 0x59616D61, ctypes.c_ulong(-1)
_LINE = re.compile(r"(\d+\.\d+) (\w+)\((.*)\)\s+= (-?\d+)(.*)$", re.DOTALL)
_TEXT = re.compile(r"(?:\\x[0-9a-f]{2})+")


class Call(NamedTuple):
    """One system call that has returned."""

    at_s: float
    """When it began."""
    name: str
    arguments: str
    """As strace writes them; every text in hexadecimal: \\x2f\\x74..."""
    result: int


def require_strace() -> None:
    """Skip, aloud, where no process may be traced."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    tried = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"processes may not be traced here: {tried.stderr.strip()}")


@contextmanager
def attached(*options: str) -> Iterator[None]:
    """This process and its threads, present and future, under strace with these options."""
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANYBODY, 0, 0, 0)  # Ubuntu lets only a parent attach otherwise
    tracer = subprocess.Popen(["strace", "-f", *options, "-p", str(os.getpid())], stderr=subprocess.PIPE, text=True)
    try:
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        assert "attached" in said, said
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.communicate(timeout=30)


def calls_of(place: Path) -> list[Call]:
    """The calls in all files below `place`, which `strace -ff -xx --absolute-timestamps=unix,ns` wrote, in their order."""
    found = []
    for file in place.iterdir():
        for line in file.read_text().splitlines():
            matched = _LINE.match(line)
            if matched is not None:
                at_s, name, arguments, result, _ = matched.groups()
                found.append(Call(float(at_s), name, arguments, int(result)))
    return sorted(found)


def texts_of(arguments: str) -> list[bytes]:
    """The bytes of every text in the arguments of a call: paths (also those of descriptors) and contents."""
    return [bytes.fromhex(text.replace("\\x", "")) for text in _TEXT.findall(arguments)]
