"""A host that others cannot reach by its name is helped where that is possible, and named where it is not."""

import socket

import pytest

from vitscale.base import network
from vitscale.base.network import (
    GLOO,
    interface_for_gloo,
    interface_towards,
    interfaces,
    missing_interface,
    unreachable,
    why_unanswered,
)


@pytest.fixture
def names(monkeypatch):
    """A made-up /etc/hosts and two interfaces; rank 0 is reached through the second."""
    addresses = {"good": "10.0.0.5", "debian": "127.0.1.1", "master": "10.1.0.1", "here": "127.0.0.1"}
    monkeypatch.setattr(network, "address_of", lambda host: addresses.get(host, ""))
    monkeypatch.setattr(network, "interfaces", lambda: {"eth0": "10.0.0.5", "ib0": "10.1.0.5"})
    monkeypatch.setattr(network, "interface_towards", lambda address, here: "ib0" if address == "10.1.0.1" else None)


@pytest.mark.parametrize(
    ("host", "master", "environ", "interface", "words"),
    [
        ("good", "master", {}, None, None),
        ("debian", "master", {}, "ib0", None),
        ("nameless", "master", {}, "ib0", None),
        ("debian", "here", {}, None, None),  # all "hosts" are this one
        ("debian", "master", {GLOO: "eth0"}, None, None),
        ("good", "master", {GLOO: "eth7"}, None, "host good has no network interface 'eth7'"),
    ],
)
def test_the_interface_for_gloo(names, host, master, environ, interface, words):
    found, fault = interface_for_gloo(host, master, environ)
    assert found == interface
    assert (fault is None) if words is None else (fault is not None and fault.startswith(words))


def test_no_way_to_rank_zero_is_a_sentence(names, monkeypatch):
    monkeypatch.setattr(network, "interface_towards", lambda address, here: None)
    _, fault = interface_for_gloo("debian", "master", {})
    assert fault == (
        "the name of host debian stands for 127.0.1.1, which other hosts cannot reach; write the lines GLOO_SOCKET_IFNAME=eth0 "
        "and NCCL_SOCKET_IFNAME=eth0 into .deepspeed_env where the command is started"
    )
    assert "stands for no address" in unreachable("x", "", [])


def test_one_of_several_named_interfaces_is_enough():
    assert missing_interface("a", "eth9,eth0", ["eth0"]) is None
    assert "it has none" in (missing_interface("a", "eth0", []) or "")


def test_the_interfaces_of_this_host_lead_to_their_own_addresses():
    here = interfaces()
    assert "lo" not in here
    for name, address in here.items():
        socket.inet_aton(address)
        assert interface_towards(address, here) in (name, *[other for other, own in here.items() if own == address])


def test_a_knock_says_why_nobody_answers():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert why_unanswered("127.0.0.1", port) == ""
    assert why_unanswered("127.0.0.1", port) == "[Errno 111] Connection refused"
    assert why_unanswered("no-such-host.invalid", port)
