"""Where the seconds of a start go, from the launcher to the first step. Rank 0 tells them in events.jsonl (`started`).

launcher   from the start of `deepspeed` to that of this process; others may have started ranks before, so theirs is not known
imports    from the start of this process to its first own line
…          then whatever the program says that it has done
"""

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from vitscale.base.host import Ancestor, Process, ancestors, process_of, seconds_since_start
from vitscale.base.launchers import launchers_of_one_start


@contextmanager
def importing() -> Iterator[None]:
    """Let modules load without a look for garbage among them, now or ever: they stay, and it takes a sixth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


class Startup:
    """The phases of one start, each counted from the end of the one before."""

    def __init__(self, before: Mapping[str, float], *, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = dict(before)
        self._clock = clock
        self._since_s = clock()

    def ends(self, phase: str) -> None:
        """All since the phase before was this one."""
        now_s = self._clock()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now_s - self._since_s
        self._since_s = now_s

    def as_record(self) -> dict[str, float]:
        return {phase: round(seconds, 2) for phase, seconds in self.seconds.items()}

    def in_words(self) -> str:
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"the start took {sum(self.seconds.values()):.1f} s: {phases}"


def startup_of_this_process() -> Startup:
    """To be called in the first own line of a program: imports end here."""
    me = process_of(os.getpid())
    return Startup(seconds_before(me, ancestors(os.getpid())) if me is not None else {})


def seconds_before(
    me: Process, above: Sequence[Ancestor], *, age_s: Callable[[Process], float] = seconds_since_start
) -> dict[str, float]:
    """Launcher and imports, by the times at which the processes began."""
    own_s = age_s(me)
    launchers = launchers_of_one_start(above)
    return {**({"launcher": age_s(launchers[-1]) - own_s} if launchers else {}), "imports": own_s}
