"""The same work in this process or in several: independent tasks, results as they come.

A task is a function of a shared object (sent once to each worker) and one small record. What a task writes depends on
the record alone, so the number of workers changes no byte.
"""

import errno
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from vitscale.base.errors import EnvironmentFault, TransientFault
from vitscale.base.progress import progress

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

# Errors of a disk or network that may be gone on the next start.
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ECONNRESET, errno.EHOSTDOWN)
_shared: Any = None


def default_workers() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_tasks(function: Callable[[S, T], R], shared: S, tasks: Iterable[T], *, workers: int) -> Iterator[R]:
    """Yield function(shared, task) for every task, in order of completion; one worker means this very process.

    Tasks are drawn as they are needed, two per worker ahead. Raises TransientFault when a worker process dies.
    """
    if workers == 1:
        for task in tasks:
            yield function(shared, task)
        return
    # Not fork: the caller may have threads and a GPU. A server that has loaded our modules once forks clean workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in sys.modules if name.startswith("data_pipeline.")])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=(shared,))
    running: set[Future[R]] = set()
    try:
        for task in tasks:
            running.add(pool.submit(_call, function, task))
            if len(running) >= 2 * workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise TransientFault(
            "a worker process was killed, perhaps for want of memory; "
            "run the same command again to continue, with fewer --workers if it happens again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def watched(finished: Iterable[tuple[R, int]], *, images: int, what: str, is_shown: bool) -> list[R]:
    """Collect results behind a bar that counts the images each of them stands for."""
    results: list[R] = []

    def ticks() -> Iterator[int]:
        for result, count in finished:
            results.append(result)
            yield from range(count)

    for _ in progress(ticks(), total=images, what=what, unit=" images") if is_shown else ticks():
        pass
    return results


@contextmanager
def disk_faults(where: object) -> Iterator[None]:
    """Turn an error of the disk into one sentence and the right exit code: 75 when it may pass by itself, else 3."""
    try:
        yield
    except OSError as error:
        fault = TransientFault if error.errno in _PASSING else EnvironmentFault
        raise fault(
            f"{error.filename or where}: {error.strerror or error}; once that is mended, the same command continues"
        ) from None


def _begin_worker(shared: Any) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent alone speaks
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker must not write on when its parent was killed: the next start owns the directory."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(function: Callable[[Any, T], R], task: T) -> R:
    return function(_shared, task)
