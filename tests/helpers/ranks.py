"""Start several gloo ranks on this machine, for laws that only hold between processes."""

import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vitscale.training.engine as engine_module

# Loads all that a rank needs before the fork: it starts in milliseconds instead of importing for ten seconds.
from launch.forked import cluster_of, free_port
from vitscale.base.cluster import Cluster


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """Call function(cluster, *args) on `world` forked ranks with a process group; their results in rank order.

    Raises RuntimeError with the traceback of the first rank that failed, TimeoutError when one does not end.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes, processes = [], []
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run_one, args=(sender, cluster_of(rank, world, port), function, args))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        answers: list[Any] = []
        for rank, (pipe, process) in enumerate(zip(pipes, processes, strict=True)):
            if not pipe.poll(timeout_s):
                raise TimeoutError(f"rank {rank} did not answer within {timeout_s} s")
            try:
                good, answer = pipe.recv()
            except EOFError:
                process.join(5)
                raise RuntimeError(f"rank {rank} died with exit code {process.exitcode}") from None
            if not good:
                raise RuntimeError(f"rank {rank}:\n{answer}")
            answers.append(answer)
        return answers
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def _run_one(sender: Any, cluster: Cluster, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.chdir(Path(__file__).resolve().parents[2])
    gc.freeze()  # DeepSpeed collects garbage often, and each time every page that the fork shares would be copied
    try:
        engine_module.start_ranks(cluster)
        sender.send((True, function(cluster, *args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        sender.close()
        os._exit(0)
