"""Before anything is made: do all ranks run the same program, and do their clocks agree?

Ranks with another version or other code do not fail at once: they give other numbers, or wait for each other for ever.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vitscale.base.cluster import Cluster
from vitscale.base.code import program_versions
from vitscale.base.errors import EnvironmentFault
from vitscale.training.engine import barrier, from_all_ranks

CLOCK_SKEW_MAX_S = 5.0
"""Times in logs, and ages of files on shared disks, mean nothing past it."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one host of a run says of itself."""

    host: str
    versions: Mapping[str, str]
    clock_unix_s: float
    """At the same moment on all hosts, or nearly."""


def require_equal_hosts(cluster: Cluster, *, say: Callable[[str], None]) -> None:
    """Raise EnvironmentFault where ranks run different programs; say which clocks are off. Collective."""
    versions = program_versions()
    barrier()
    facts = from_all_ranks(Facts(host=cluster.host, versions=versions, clock_unix_s=time.time()))
    faults = version_faults(facts)
    if faults:
        raise EnvironmentFault("; ".join(faults))
    if cluster.rank == 0:
        for sentence in clock_faults(facts):
            say(f"warning: {sentence}")


def version_faults(facts: Sequence[Facts]) -> list[str]:
    """One sentence for each thing that is not equal everywhere, with hosts and values. Pure."""
    faults = []
    for name in facts[0].versions:
        hosts: dict[str, list[str]] = {}
        for fact in facts:
            seen = hosts.setdefault(fact.versions[name], [])
            if fact.host not in seen:
                seen.append(fact.host)
        if len(hosts) > 1:
            values = ", ".join(f"{value} on {_some(names)}" for value, names in hosts.items())
            thing, remedy = (
                ("source code of vitscale (its hash)", "copy the same source tree to all hosts")
                if name == "code"
                else (f"version of {name}", "install the same version on all hosts")
            )
            faults.append(f"expected one {thing} on all hosts, got {values}; {remedy}")
    return faults


def clock_faults(facts: Sequence[Facts]) -> list[str]:
    """One sentence for each host whose clock is far from the others'. Pure."""
    middle = statistics.median_low(fact.clock_unix_s for fact in facts)
    off = {fact.host: fact.clock_unix_s - middle for fact in facts}
    return [
        f"the clock of host {host} is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the others; set it by NTP"
        for host, skew_s in off.items()
        if abs(skew_s) > CLOCK_SKEW_MAX_S
    ]


def _some(hosts: Sequence[str]) -> str:
    return ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else "")
