"""How long a store may be silent, slow or failing before it is asked again, and before it is given up.

trial      one request for an object; trials go on until one succeeds, an answer is final, or the deadline has passed
trickle    a body that comes below slow_bytes_per_s, or, at first, far more slowly than bodies of this store usually begin
"""

import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vitscale.base.credentials import masked
from vitscale.base.errors import TransientFault, VitscaleError

UNUSUAL = 16
"""Times slower than the median: given up early, which costs a request where it was none."""
BEGINNINGS_MIN = 4
TELLING_BYTES = 1 << 20
"""Bodies that end before they are judged tell something from here on: smaller ones come in one burst on any network."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """When a request is given up and made again, and when the object is."""

    connect_s: float = 5.0
    stall_s: float = 8.0
    """Longest silence, before and within a body."""
    slow_s: float = 1.0
    """Time over which the speed of a body is measured: what one trickle costs; a quarter of it at the first one of an
    object, where the usual is known. Doubles with each further one that the object meets."""
    slow_bytes_per_s: int = 250_000
    """Slower bodies are given up. What came is kept, so a network that knows no better still gets on."""
    request_s: float = 120.0
    """Longest life of one request."""
    backoff_s: float = 0.1
    """Upper end of the first random wait; doubles with each failure in a row, up to backoff_max_s."""
    backoff_max_s: float = 20.0
    deadline_s: float = 300.0
    """Longest time for one object, on top of what it takes at slow_bytes_per_s."""


PATIENCE = Patience()


class Stopped(Exception):
    """The caller's event was set while a store was read."""


class Passing(Exception):
    """Something that a further request may cure."""


class Slow(Passing):
    """A body that trickles."""


class Pace:
    """How fast the bodies of one store usually begin, networks as they are. Use from any thread."""

    def __init__(self) -> None:
        self._beginnings: deque[float] = deque(maxlen=32)

    def note(self, body_bytes: int, body_s: float) -> None:
        self._beginnings.append(body_bytes / max(body_s, 1e-3))

    def least_bytes_per_s(self) -> float:
        """Whatever begins more slowly is likely to be a trickle; 0 until enough bodies have been seen."""
        beginnings = list(self._beginnings)
        return statistics.median(beginnings) / UNUSUAL if len(beginnings) >= BEGINNINGS_MIN else 0.0


class Watch:
    """The speed of one body. Only the time in which its reader waits for it counts."""

    def __init__(self, patience: Patience, pace: Pace, *, trickles: int) -> None:
        """`trickles`: bodies of the same object given up before."""
        self._patience, self._pace = patience, pace
        self._is_judged_early = trickles == 0
        self._is_beginning = True
        self._window_s = patience.slow_s * 2 ** max(0, trickles - 1)
        self._bytes, self._s = 0, 0.0

    def add(self, n_bytes: int, waited_s: float) -> None:
        """Raises Slow when the body trickles."""
        self._bytes += n_bytes
        self._s += waited_s
        if self._is_beginning and self._s >= self._patience.slow_s / 4:
            self._is_beginning = False
            if self._is_judged_early:
                self._require(self._pace.least_bytes_per_s())
            self._pace.note(self._bytes, self._s)
        if self._s >= self._window_s:
            self._require(self._patience.slow_bytes_per_s)
            self._bytes, self._s = 0, 0.0

    def end(self) -> None:
        """The body is whole."""
        if self._is_beginning and self._bytes >= TELLING_BYTES:
            self._pace.note(self._bytes, self._s)

    def _require(self, least_bytes_per_s: float) -> None:
        if self._bytes < self._s * least_bytes_per_s:
            raise Slow(f"a body came at {self._bytes / self._s / 1000:,.1f} kB/s")


class Trials:
    """Requests for one object until one succeeds: waits between them, and the deadline.

    `what`: such as "read URL". `faults`: the errors that `verdict` knows, which gives None for those that may pass.
    """

    def __init__(
        self,
        what: str,
        *,
        patience: Patience,
        size: int,
        stop: threading.Event,
        faults: tuple[type[BaseException], ...],
        verdict: Callable[[BaseException], VitscaleError | None],
    ) -> None:
        self._what, self._patience, self._stop = what, patience, stop
        self._faults: tuple[type[BaseException], ...] = (*faults, Passing, VitscaleError)
        self._verdict = verdict
        self._started_at_s = time.monotonic()
        self._limit_s = patience.deadline_s + size / patience.slow_bytes_per_s
        self._failures_in_a_row = 0
        self.trickles = 0
        """Bodies given up because they trickled, counted up to 10."""

    def is_better(self) -> None:
        self._failures_in_a_row = 0

    @contextmanager
    def next(self) -> Iterator[None]:
        """Around one request: swallows a fault that may pass, after a wait; raises Stopped and all others."""
        if self._stop.is_set():
            raise Stopped
        try:
            yield
        except self._faults as error:
            self.trickles = min(self.trickles + isinstance(error, Slow), 10)
            verdict = self._verdict(error)
            if verdict is not None:
                raise verdict from None
            elapsed_s = time.monotonic() - self._started_at_s
            if elapsed_s > self._limit_s:
                raise TransientFault(
                    f"gave up to {self._what} after {elapsed_s:.0f} s, the last error being: "
                    f"{first_line(error)}; check the store and the network, then start again"
                ) from None
            most_s = min(self._patience.backoff_max_s, self._patience.backoff_s * 2**self._failures_in_a_row)
            self._failures_in_a_row = min(self._failures_in_a_row + 1, 30)
            # Spread out over the whole interval, so that the ranks that failed together do not come back together.
            if self._stop.wait(min(random.uniform(0, most_s), max(0.0, self._limit_s - elapsed_s))):
                raise Stopped from None


def first_line(error: BaseException) -> str:
    """obstore appends pages of its own inner state; the URL it names may be a signed one."""
    return masked(str(error).splitlines()[0]) if str(error) else type(error).__name__
