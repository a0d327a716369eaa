"""A lost rank is one sentence for the others; an error of their own stays what it is."""

import os
import subprocess
import sys

import pytest
import torch.distributed

from vitscale.base.errors import TransientFault
from vitscale.base.host import process_of
from vitscale.training import peers as peers_module
from vitscale.training.peers import Peer, dead_beside, is_lost_connection, lost_ranks_are_transient

LOST = [
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:43567"),
    RuntimeError("[../gloo/transport/tcp/pair.cc:534] Read error [10.0.0.2]:9281: Connection reset by peer. This is typically"),
    RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete"),
    torch.distributed.DistBackendError(
        "NCCL error in: x.cpp:1, remote process exited or there was a network error\nncclRemoteError: A call failed"
    ),
    torch.distributed.DistNetworkError("The client socket has failed: recvValue failed on SocketImpl(fd=5)"),
]
OWN = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"),
    RuntimeError("ProcessGroupGloo::allreduce: invalid tensor size at index 1 (expected (3), got (2))"),
    RuntimeError("Detected mismatch between collectives on ranks"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    NotImplementedError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
    torch.distributed.DistBackendError(
        "NCCL error in: x.cpp\nncclInvalidUsage: This usually reflects invalid usage of NCCL library."
    ),
    torch.distributed.DistBackendError("NCCL error in: x.cpp\nncclUnhandledCudaError: Call to CUDA function failed."),
]


@pytest.mark.parametrize("error", LOST, ids=range(len(LOST)))
def test_a_lost_connection_is_transient(monkeypatch, error):
    monkeypatch.setattr(peers_module, "BURIAL_S", 0.0)
    peers = (Peer(rank=0, host="alpha", process=None), Peer(rank=1, host="beta", process=None))
    words = r"^rank 1 on beta lost its connection in a collective \("
    with pytest.raises(TransientFault, match=words) as caught, lost_ranks_are_transient(peers, 1):
        raise error
    sentence = str(caught.value)
    assert "another rank or its host is gone; the same command continues" in sentence
    assert "\n" not in sentence and "/gloo/" not in sentence and "typically" not in sentence


@pytest.mark.parametrize("error", OWN, ids=range(len(OWN)))
def test_an_error_of_our_own_passes(error):
    assert not is_lost_connection(error)
    with pytest.raises(type(error)) as caught, lost_ranks_are_transient((Peer(rank=0, host="alpha", process=None),), 0):
        raise error
    assert caught.value is error


def test_the_dead_on_the_same_host_are_seen_and_one_rank_speaks():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = process_of(os.getpid())
    peers = (
        Peer(rank=0, host="alpha", process=process_of(child.pid)),
        Peer(rank=1, host="alpha", process=own),
        Peer(rank=2, host="alpha", process=own),
        Peer(rank=3, host="beta", process=process_of(child.pid)),
    )
    assert dead_beside(peers, peers[2]) == []
    child.kill()
    child.wait()
    assert dead_beside(peers, peers[2]) == [peers[0]]
    assert peers_module.first_alive_beside(peers, peers[2]) == peers[1]
