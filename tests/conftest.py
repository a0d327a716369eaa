"""One thread in the test process: a pool of OpenMP threads does not survive the fork that starts ranks and workers."""

import os
import shutil
import tempfile

# Read when torch loads OpenMP. Threads that spin as they wait take the cores from the test beside: it took five times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Gradients are proven once per configuration and test session, whatever the home directory remembers.
CACHE = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="vitscale-cache-")

TEST_PROCESS = os.getpid()
set_num_threads = torch.set_num_threads


def set_num_threads_in_children(count: int) -> None:
    """Ranks may have threads; the process they are forked from may not, or they would wait for ever."""
    assert count == 1 or os.getpid() != TEST_PROCESS, "use more than one thread in a forked process only"
    set_num_threads(count)


torch.set_num_threads = set_num_threads_in_children
torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)
