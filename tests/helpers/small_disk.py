"""A file system of a few hundred kilobytes, or of a few files, that only one child process sees."""

import ctypes
import multiprocessing
import os
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_NEW_MOUNTS = 0x00020000


def require_mounts() -> None:
    """Skip, aloud, where nobody may mount anything."""
    tried = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {tried.stderr.strip()}")


def mount(*words: str | Path) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True, timeout=10)


def on_small_disk(place: Path, options: str, function: Callable[..., Any], *args: Any) -> Any:
    """What function(*args) returns in a forked child for which `place` is a tmpfs with `options` (size=, nr_inodes=)."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    place.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            if ctypes.CDLL(None, use_errno=True).unshare(_NEW_MOUNTS) != 0:
                raise OSError(ctypes.get_errno(), "unshare")
            mount("--make-rprivate", "/")
            mount("-t", "tmpfs", "-o", options, "tmpfs", place)
            sender.send((True, function(*args)))
        except BaseException:
            sender.send((False, traceback.format_exc()))
        finally:
            os._exit(0)
    sender.close()
    good, answer = receiver.recv()
    os.waitpid(pid, 0)
    assert good, answer
    return answer
