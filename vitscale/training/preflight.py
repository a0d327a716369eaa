"""Before anything is made: all ranks compare what they are (base/agreement.py)."""

import time
from collections.abc import Callable

from vitscale.base.agreement import Facts, clock_faults, program_versions, version_faults
from vitscale.base.cluster import Cluster
from vitscale.base.errors import EnvironmentFault
from vitscale.training.collectives import barrier, from_all_ranks


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
