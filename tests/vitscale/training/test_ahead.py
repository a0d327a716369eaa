"""What a thread takes ahead is what the stream gives, in its order, with its errors."""

import threading
from dataclasses import dataclass, field

import pytest
import torch

from vitscale.base.errors import TransientFault
from vitscale.training.ahead import DEPTH, CopiedAhead, ahead_of


@dataclass
class Numbers:
    """A stream of numbers that ends, or fails, after some."""

    count: int
    error: Exception | None = None
    given: int = 0
    closed: list[str] = field(default_factory=list)

    def __iter__(self):
        return self

    def __next__(self) -> int:
        if self.given == self.count:
            raise self.error or StopIteration
        self.given += 1
        return self.given

    def close(self) -> None:
        self.closed.append(threading.current_thread().name)


CPU = torch.device("cpu")


def test_the_same_micro_batches_in_the_same_order():
    assert list(CopiedAhead(Numbers(20), CPU)) == list(range(1, 21))


def test_an_error_comes_where_its_micro_batch_would_and_again_whenever_asked():
    ahead = CopiedAhead(Numbers(2, TransientFault("the disk is away")), CPU)
    assert [next(ahead), next(ahead)] == [1, 2]
    for _ in range(2):
        with pytest.raises(TransientFault, match="the disk is away"):
            next(ahead)


def test_it_takes_no_more_ahead_than_it_may_and_closing_ends_thread_and_stream():
    stream = Numbers(10**9)
    ahead = CopiedAhead(stream, CPU)
    assert next(ahead) == 1
    ahead.close()
    assert stream.given <= 1 + DEPTH + 1 and stream.closed == [threading.main_thread().name]
    assert not ahead._thread.is_alive()


def test_on_a_cpu_the_stream_is_used_as_it_is():
    stream = Numbers(1)
    assert ahead_of(stream, CPU) is stream
