"""The other ranks as processes: who they are, who is gone, and what the end of one looks like to the others.

A rank that dies breaks the connections of its group: gloo raises in the ranks that wait for it. That is no defect of
theirs, so it becomes one sentence and exit 75. NCCL does not raise; there training/watch.py looks for dead ranks.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed

from vitscale.base.cluster import Cluster
from vitscale.base.errors import TransientFault
from vitscale.base.host import Process, is_alive, process_of
from vitscale.training.collectives import from_all_ranks

BURIAL_S = 0.5
"""A connection breaks before its process is seen to be gone."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One rank and its process."""

    rank: int
    host: str
    process: Process | None
    """None where the host does not tell its processes apart; then it counts as alive."""

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def is_alive(self) -> bool:
        """Only its own host can say."""
        return self.process is None or is_alive(self.process)


def meet(cluster: Cluster) -> tuple[Peer, ...]:
    """All ranks, in rank order. Collective."""
    return tuple(from_all_ranks(Peer(rank=cluster.rank, host=cluster.host, process=process_of(os.getpid()))))


def dead_beside(peers: tuple[Peer, ...], me: Peer) -> list[Peer]:
    """Ranks on the same host whose process is gone."""
    return [peer for peer in peers if peer.host == me.host and peer != me and not peer.is_alive()]


def first_alive_beside(peers: tuple[Peer, ...], me: Peer) -> Peer:
    """The rank that speaks for the host: the lowest that lives."""
    return next(peer for peer in peers if peer == me or (peer.host == me.host and peer.is_alive()))


_LOST = re.compile(
    # gloo, whose words carry the place in its source
    r"gloo/.*(closed by peer|reset by peer|broken pipe|pair closure|timed out|connection refused|no route to host|"
    r"not connected|read error|write error|unreachable|pair is not|error state)"
    # NCCL; what it calls invalid is a defect, and "unhandled cuda error" is the device's
    r"|ncclRemoteError|ncclSystemError|remote process exited|communicator was aborted|watchdog.*(timeout|timed out)"
    # the store that the ranks meet at
    r"|TCPStore|sendBytes|recvValue|store.*(connection|broken pipe|closed|timed out|timeout)",
    re.IGNORECASE | re.DOTALL,
)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that another rank or its host is gone, rather than that a collective was called wrongly."""
    is_of_torch = isinstance(error, torch.distributed.DistError) or type(error) is RuntimeError
    return is_of_torch and _LOST.search(str(error)) is not None


@contextmanager
def lost_ranks_are_transient(
    peers: tuple[Peer, ...], rank: int, *, told: Callable[[list[Peer], str], None] = lambda dead, sentence: None
) -> Iterator[None]:
    """Raise TransientFault in place of an error that a lost rank causes in this one; every other error passes.

    `told` hears of it on one rank of the host: the ranks that are known to have ended, and the sentence.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        me = peers[rank]
        time.sleep(BURIAL_S)
        dead = dead_beside(peers, me)
        sentence = (
            f"{me.name} lost its connection in a collective ({_first_words(error)}): "
            f"{', '.join(peer.name for peer in dead) or 'another rank or its host'} is gone; the same command continues from "
            "the last checkpoint"
        )
        fault = TransientFault(sentence)
        fault.every_rank_speaks = me == first_alive_beside(peers, me)
        if fault.every_rank_speaks:
            told(dead, sentence)
        raise fault from None


def _first_words(error: BaseException) -> str:
    """What went wrong: the first sentence, without the place in gloo's source."""
    words = re.sub(r"\[[^\]\s]*/[^\]]*\]\s*", "", str(error).splitlines()[0]).partition(". ")[0]
    return words if len(words) <= 160 else words[:160] + "…"
