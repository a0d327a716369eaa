"""Start several gloo ranks on this machine, for laws that only hold between processes."""

import gc
import importlib
import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Loaded before the fork, so that a rank starts in milliseconds instead of importing for ten seconds.
import vitscale.training.engine as engine_module
from vitscale.base.cluster import Cluster


def load_before_forking() -> None:
    """Import what torch's first optimizer and DeepSpeed's first engine would import in every rank: 8 s of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._dynamo")
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cluster_of(rank: int, world: int, port: int) -> Cluster:
    return Cluster(
        rank=rank,
        world=world,
        local_rank=rank,
        local_world=world,
        master_addr="127.0.0.1",
        master_port=port,
        launcher="test",
        host="test",
    )


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """Call function(cluster, *args) on `world` forked ranks with a process group; their results in rank order.

    Raises RuntimeError with the traceback of the first rank that failed, TimeoutError when one does not end.
    """
    load_before_forking()
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
