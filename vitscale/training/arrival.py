"""Before the process group is made every rank shows itself to rank 0, and who has not come is named while the others wait.

A host that never started, an address that leads nowhere and a closed port look alike to a process group: all ranks that are
there wait for half an hour and say nothing. The store is the one that the process group meets at a moment later.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from vitscale.base.cluster import Cluster
from vitscale.base.errors import EnvironmentFault, HostFault
from vitscale.base.network import why_unanswered
from vitscale.training.collectives import PROCESS_GROUP_TIMEOUT

FIRST_WORD_S = 30.0
"""After this long the wait is mentioned, and again each time it has doubled."""
LOOK_S = 0.2
COMPLETE = "all here"


def wait_for_all_ranks(
    cluster: Cluster,
    *,
    say: Callable[[str], None],
    is_agents_store: bool = False,
    patience_s: float = PROCESS_GROUP_TIMEOUT.total_seconds(),
    first_word_s: float = FIRST_WORD_S,
) -> Store:
    """Return when all ranks of `cluster` have called this; keep the store until the process group stands.

    `is_agents_store`: torchrun's own process listens at the address, not rank 0. Rank 0 says who is missing; where rank 0
    cannot be reached, the first rank of each host says that. Raises EnvironmentFault after `patience_s`.
    """
    wait = _Wait(patience_s, first_word_s)
    is_server = cluster.rank == 0 and not is_agents_store
    if not is_server:
        _wait_for_the_address(cluster, wait, say)
    store = TCPStore(
        cluster.master_addr,
        cluster.master_port,
        cluster.world,
        is_master=is_server,
        timeout=PROCESS_GROUP_TIMEOUT,
        wait_for_workers=False,
        multi_tenant=True,  # the process group of this rank makes a store of the same address and gets the same
    )
    arrivals = PrefixStore("arrival", store)
    arrivals.set(str(cluster.rank), cluster.host)
    if cluster.rank == 0:
        _wait_for_the_others(cluster, arrivals, wait, say)
        arrivals.set(COMPLETE, "")
    else:
        arrivals.wait([COMPLETE], timedelta(seconds=patience_s))
    return store


class _Wait:
    """How long it has lasted, when it is mentioned next, and when it ends."""

    def __init__(self, patience_s: float, first_word_s: float) -> None:
        self._began_s = time.monotonic()
        self.patience_s = patience_s
        self._next_word_s = first_word_s

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self._began_s

    @property
    def is_over(self) -> bool:
        return self.waited_s >= self.patience_s

    def is_due(self) -> bool:
        """Whether to mention it now; asked again it is not, until the wait is twice as long."""
        if self.waited_s < self._next_word_s:
            return False
        self._next_word_s *= 2
        return True


def _wait_for_the_address(cluster: Cluster, wait: _Wait, say: Callable[[str], None]) -> None:
    """Knock until somebody listens. torch would do it too, with a stack trace on stderr in place of a sentence."""
    place = f"{cluster.master_addr}:{cluster.master_port}"
    while reason := why_unanswered(cluster.master_addr, cluster.master_port):
        why = (
            f"rank {cluster.rank} on {cluster.host} cannot reach rank 0 at {place} ({reason}) after {wait.waited_s:.0f} s: "
            "it has not started, or MASTER_ADDR is no address of its host, or a firewall closes the port"
        )
        if wait.is_over:
            raise HostFault(why) if cluster.local_rank == 0 else EnvironmentFault(why)
        if wait.is_due() and cluster.local_rank == 0:
            say(f"still waiting: {why}")
        time.sleep(LOOK_S)


def _wait_for_the_others(cluster: Cluster, arrivals: Store, wait: _Wait, say: Callable[[str], None]) -> None:
    missing = list(range(1, cluster.world))
    while missing := [rank for rank in missing if not arrivals.check([str(rank)])]:
        if wait.is_over:
            raise EnvironmentFault(
                f"{_absent(cluster, missing)} did not start within {wait.patience_s:.0f} s; {_advice(cluster)}"
            )
        if wait.is_due():
            say(f"still waiting after {wait.waited_s:.0f} s for {_absent(cluster, missing)}; {_advice(cluster)}")
        time.sleep(LOOK_S)


def _absent(cluster: Cluster, missing: Sequence[int]) -> str:
    return f"{'rank' if len(missing) == 1 else 'ranks'} {spans(missing)} of {cluster.world}"


def _advice(cluster: Cluster) -> str:
    return (
        "look whether the command runs on every host, and whether they reach "
        f"{cluster.master_addr}:{cluster.master_port} (`python launch/doctor.py --hostfile FILE`)"
    )


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: 0-3, 7. Pure."""
    groups = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
