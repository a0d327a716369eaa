"""How other hosts reach this one, and what to say where they cannot.

gloo binds to the address of the host's own name unless GLOO_SOCKET_IFNAME names an interface. Many hosts give their own name
a loopback address in /etc/hosts; then a run over several hosts dies after a minute with "connectFullMesh failed". So the
interface that leads to rank 0 is named here, where nobody else has.
"""

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Mapping, Sequence

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
ENVIRONMENT_FILE = ".deepspeed_env"
"""Lines NAME=VALUE in the directory a command is started in, or at home: deepspeed gives them to all hosts."""
_SIOCGIFADDR = 0x8915  # linux/sockios.h


def address_of(host: str) -> str:
    """The first IPv4 address of a host name; empty where it has none."""
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0])
    except OSError:
        return ""


def is_loopback(address: str) -> bool:
    """Whether an address is reached from its own host only."""
    return ipaddress.ip_address(address).is_loopback


def interfaces() -> dict[str, str]:
    """IPv4 address by name of the network interfaces here that have one, loopback left out."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            address = socket.inet_ntoa(answer[20:24])
            if not is_loopback(address):
                found[name] = address
    return found


def interface_towards(address: str, here: Mapping[str, str]) -> str | None:
    """The interface of this host that leads to an address; None where no route does. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
            source = probe.getsockname()[0]
        except OSError:
            return None
    return next((name for name, own in here.items() if own == source), None)


def interface_for_gloo(host: str, master_addr: str, environ: Mapping[str, str]) -> tuple[str | None, str | None]:
    """(interface to name to gloo, what keeps this host from being reached) where a run spans hosts; mostly both are None."""
    named, here = environ.get(GLOO), interfaces()
    if named:
        return None, missing_interface(host, named, list(here))
    own, master = address_of(host), address_of(master_addr)
    if (own and not is_loopback(own)) or not master or is_loopback(master):
        return None, None
    found = interface_towards(master, here)
    return found, None if found else unreachable(host, own, list(here))


def missing_interface(host: str, named: str, here: Sequence[str]) -> str | None:
    """The sentence where GLOO_SOCKET_IFNAME names an interface that this host has not; else None. Pure."""
    if any(name in here for name in named.split(",")):
        return None
    return (
        f"host {host} has no network interface {named!r} with an address, which {GLOO} names; it has "
        f"{', '.join(here) or 'none'}: name one that all hosts have, in {ENVIRONMENT_FILE}"
    )


def unreachable(host: str, address: str, here: Sequence[str]) -> str:
    """The sentence for a host that others cannot reach by its name. Pure."""
    example = here[0] if here else "eth0"
    return (
        f"the name of host {host} stands for {address or 'no address'}, which other hosts cannot reach; write the lines "
        f"{GLOO}={example} and {NCCL}={example} into {ENVIRONMENT_FILE} where the command is started"
    )


def why_unanswered(host: str, port: int, *, timeout_s: float = 10.0) -> str:
    """Knock at a port: empty where somebody listens there, else why that is not known. Nothing is sent."""
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
        return ""
    except OSError as error:
        return str(error)
