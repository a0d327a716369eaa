"""Data workers that die, as by the out-of-memory killer: how many of them a stream bears, and what is said of each."""

import signal
import sys
from dataclasses import dataclass

from vitscale.base.errors import TransientFault

HEALS_MAX = 3
"""Deaths within HEALS_WITHIN_STEPS that a stream bears; more are no accident."""
HEALS_WITHIN_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class WorkerDeath:
    """A data worker that ended although nobody had ended it."""

    pid: int
    exit_code: int
    """Negative: the number of the signal that killed it."""

    def __str__(self) -> str:
        if self.exit_code >= 0:
            return f"data worker {self.pid} ended with exit code {self.exit_code}"
        name = signal.Signals(-self.exit_code).name
        hint = ", as the out-of-memory killer does" if name == "SIGKILL" else ""
        return f"data worker {self.pid} was killed by {name}{hint}"


def say_death(death: WorkerDeath) -> None:
    print(f"{death}; the data workers were started anew", file=sys.stderr, flush=True)


class Deaths:
    """Those of one stream, by the number of micro-batches it had handed over."""

    def __init__(self, *, within: int) -> None:
        self._within = within
        self._at: list[int] = []

    def add(self, death: WorkerDeath, *, at: int) -> None:
        """Raises TransientFault where there were too many within the last `within` micro-batches."""
        self._at = [*(earlier for earlier in self._at if earlier > at - self._within), at]
        if len(self._at) > HEALS_MAX:
            raise TransientFault(
                f"{death}, the {len(self._at)}th within {HEALS_WITHIN_STEPS} steps; expected at most {HEALS_MAX}: see what "
                "kills them (fewer data.workers need less memory of the host), then give the same command again"
            )
