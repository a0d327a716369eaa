"""One thread in the test process: a pool of OpenMP threads does not survive the fork that starts ranks and workers.

With `-n`, a file goes to one process, so that what its tests share is made once, and the longest files go first: no process
is left with a long one at the end.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

# Read when torch loads OpenMP. Threads that spin as they wait take the cores from the test beside: it took five times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# Gradients are proven once per configuration and test session, whatever the home directory remembers.
CACHE = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="vitscale-cache-")

ROOT = Path(__file__).parent
LONGEST_FIRST = (
    "test_readme.py",
    "data_pipeline/test_build_interrupted.py",
    "chaos/test_kills.py",
    "vitscale/training/test_engine.py",
    "launch/test_object_store.py",
    "vitscale/training/test_matrix.py",
    "data_pipeline/test_build_memory.py",
    "launch/test_resume.py",
    "multinode/test_two_hosts.py",
)
"""Files that take about a minute or more. A name too many or too few costs seconds at the end, nothing else."""

TEST_PROCESS = os.getpid()
set_num_threads = torch.set_num_threads


def set_num_threads_in_children(count: int) -> None:
    """Ranks may have threads; the process they are forked from may not, or they would wait for ever."""
    assert count == 1 or os.getpid() != TEST_PROCESS, "use more than one thread in a forked process only"
    set_num_threads(count)


torch.set_num_threads = set_num_threads_in_children
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests before those without, the longest first; within a file the order stays."""
    with_slow_tests = {item.path for item in items if item.get_closest_marker("slow")}
    places = {ROOT / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: (item.path not in with_slow_tests, places.get(item.path, len(places))))


@pytest.hookimpl(optionalhook=True)  # pytest-xdist may be missing
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """File by file in our order, unless --dist says otherwise."""
    from xdist.scheduler import LoadFileScheduling

    if config.option.dist != "load":
        return None
    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)
