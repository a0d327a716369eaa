"""Whether other hosts can reach this one by the address that its own name has.

gloo binds to the address of the host name unless GLOO_SOCKET_IFNAME names an interface. Many hosts give their own name a
loopback address in /etc/hosts; then a run over several hosts dies after a minute with "connectFullMesh failed".
"""

import ipaddress
import socket
from collections.abc import Mapping

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
ENVIRONMENT_FILE = ".deepspeed_env"
"""Lines NAME=VALUE in the directory a command is started in, or at home: deepspeed gives them to all hosts."""


def address_of(host: str) -> str:
    """The first address of a host name; empty where it has none."""
    try:
        return str(socket.getaddrinfo(host, None)[0][4][0])
    except OSError:
        return ""


def is_loopback(address: str) -> bool:
    """Whether an address is reached from its own host only; so is none at all."""
    return not address or ipaddress.ip_address(address.partition("%")[0]).is_loopback


def interfaces() -> list[str]:
    """Names of the network interfaces here, loopback left out."""
    return [name for _, name in socket.if_nameindex() if name != "lo"]


def interface_fault(host: str, *, address: str, here: list[str], environ: Mapping[str, str]) -> str | None:
    """What keeps other hosts from reaching `host`, in one sentence, or None. Pure.

    `address` is that of its name, `here` are its interfaces, `environ` may name one of them.
    """
    named = environ.get(GLOO, "")
    wanted = named.split(",")[0]
    if wanted and wanted not in here:
        return (
            f"host {host} has no network interface {wanted!r}, which {GLOO} names; it has {', '.join(here) or 'none'}: "
            f"name one that all hosts have in {ENVIRONMENT_FILE}"
        )
    if wanted or not is_loopback(address):
        return None
    example = here[0] if here else "eth0"
    return (
        f"the name of host {host} stands for {address or 'no address'}, which other hosts cannot reach; write the lines "
        f"{GLOO}={example} and {NCCL}={example} into {ENVIRONMENT_FILE} where the command is started"
    )
