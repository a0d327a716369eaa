"""A start whose ranks do not all come says who is missing while it waits, and ends with a sentence."""

import dataclasses
import functools
import math
import multiprocessing
import os
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed

import vitscale.training.engine as engine_module
from launch.forked import cluster_of, free_port
from vitscale.base.errors import EnvironmentFault
from vitscale.training.arrival import spans, wait_for_all_ranks


def test_numbers_in_short():
    assert [spans(numbers) for numbers in ([3], [0, 1, 2, 3], [1, 2, 5, 7, 8])] == ["3", "0-3", "1-2, 5, 7-8"]


def start(rank: int, world: int, port: int, *, after_s: float = 0.0, **settings: Any) -> Any:
    """A rank in a process of its own: what it said, and how its wait ended, come through the pipe."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_wait, args=(sender, rank, world, port, after_s, settings))
    process.start()
    return receiver


def _wait(sender: Any, rank: int, world: int, port: int, after_s: float, settings: dict[str, Any]) -> None:
    said: list[str] = []
    time.sleep(after_s)
    cluster = dataclasses.replace(cluster_of(rank, world, port), host=f"node{rank}", local_rank=0, local_world=1)
    try:
        wait_for_all_ranks(cluster, say=said.append, **{"first_word_s": 0.5, "patience_s": 30.0, **settings})
        end = "together"
    except (EnvironmentFault, torch.distributed.DistError) as error:
        end = f"{type(error).__name__}: {error}"
    sender.send((said, end))
    time.sleep(1.0 if rank == 0 else 0.0)  # its server ends with it
    os._exit(0)


def answers(*pipes: Any) -> list[tuple[list[str], str]]:
    assert all(pipe.poll(60) for pipe in pipes)
    return [pipe.recv() for pipe in pipes]


def test_all_ranks_that_come_go_on_together_and_nothing_is_said():
    port = free_port()
    assert answers(*(start(rank, 3, port, first_word_s=20.0) for rank in range(3))) == [([], "together")] * 3


def test_rank_zero_names_who_is_late_and_less_and_less_often():
    port, started_s = free_port(), time.monotonic()
    zero, one, two, three = answers(*(start(rank, 4, port, after_s=2.6 if rank in (1, 2) else 0.0) for rank in range(4)))
    assert (zero[1], one[1], two[1], three[1]) == ("together",) * 4
    assert three[0] == one[0] == two[0] == []
    took_s = time.monotonic() - started_s
    assert 2 <= len(zero[0]) <= 1 + math.log2(took_s / 0.5)  # after 0.5, 1, 2 s
    assert all("for ranks 1-2 of 4; look whether the command runs on every host" in sentence for sentence in zero[0])
    assert f":{port}" in zero[0][0]


def test_who_never_comes_ends_the_start_with_its_name():
    port = free_port()
    zero, one = answers(*(start(rank, 3, port, patience_s=2.0) for rank in (0, 1)))
    assert zero[1].startswith("EnvironmentFault: rank 2 of 3 did not start within 2 s;")
    assert one[1].startswith("Dist")


def test_a_host_that_cannot_reach_rank_zero_says_so():
    port = free_port()
    ((said, end),) = answers(start(1, 2, port, patience_s=3.9))
    sentence = f"rank 1 on node1 cannot reach rank 0 at 127.0.0.1:{port} ([Errno 111] Connection refused) after "
    assert end.startswith(f"HostFault: {sentence}")
    assert all(words.startswith(f"still waiting: {sentence}") for words in said)
    assert len(said) == 3  # after 0.5, 1 and 2 s


def test_a_rank_zero_that_comes_late_is_waited_for():
    port = free_port()
    zero, one = answers(start(0, 2, port, after_s=2.0, first_word_s=20.0), start(1, 2, port))
    assert (zero[1], one[1]) == ("together", "together")
    assert one[0] and not zero[0]


def test_no_rank_joins_a_process_group_before_all_are_there(monkeypatch):
    monkeypatch.setattr(engine_module, "wait_for_all_ranks", functools.partial(wait_for_all_ranks, patience_s=1.0))
    monkeypatch.setattr(engine_module, "PROCESS_GROUP_TIMEOUT", timedelta(seconds=5))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for name, value in cluster_of(0, 2, 0).environment().items():
        monkeypatch.setenv(name, value)  # and takes back what the start writes there
    with pytest.raises(EnvironmentFault, match=r"^rank 1 of 2 did not start within 1 s;"):
        engine_module.start_ranks(cluster_of(0, 2, free_port()))
    assert not torch.distributed.is_initialized()
