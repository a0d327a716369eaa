"""Where the time of a step goes, without making the step wait.

On a GPU the host runs ahead of the device, so a part is timed by events that the device passes, read once the step is done; on
a CPU host time is the time. Communication is the time in which the rank waits in collectives that DeepSpeed calls: where they
run beside the computation, only what is left of them counts. It is part of the other times, not beside them.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

COLLECTIVES = (
    "all_reduce",
    "reduce",
    "reduce_scatter_tensor",
    "reduce_scatter",
    "all_gather_into_tensor",
    "all_gather",
    "broadcast",
)


class StepClock:
    """Adds up named parts of the steps since `restart`."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Forget what was added up and start counting."""
        self._pairs: list[tuple[str, Any, Any]] = []
        self._seconds: dict[str, float] = {}
        self._last = self._now()

    def _now(self) -> Any:
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, part: str) -> None:
        """What came since the last call belongs to `part`."""
        now = self._now()
        self._add(part, self._last, now)
        self._last = now

    def _add(self, part: str, before: Any, after: Any) -> None:
        if self._on_device:
            self._pairs.append((part, before, after))
        else:
            self._seconds[part] = self._seconds.get(part, 0.0) + after - before

    def seconds(self, part: str) -> float:
        """Seconds of a part. On a GPU the device must be done with it."""
        events = sum(before.elapsed_time(after) for name, before, after in self._pairs if name == part) / 1e3
        return events + self._seconds.get(part, 0.0)

    def watch_collectives(self, backend: Any) -> Callable[[], None]:
        """Time the collectives of a communication backend as part "communication"; returns what ends that."""
        originals = {name: getattr(backend, name) for name in COLLECTIVES if hasattr(backend, name)}
        for name, original in originals.items():
            setattr(backend, name, self._timed(original))

        def stop() -> None:
            for name in originals:
                vars(backend).pop(name, None)

        return stop

    def _timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self._now()
            handle = collective(*args, **kwargs)
            self._add("communication", before, self._now())
            return _TimedHandle(handle, self) if kwargs.get("async_op") and handle is not None else handle

        return timed


class _TimedHandle:
    """What an asynchronous collective returns; waiting for it is communication."""

    def __init__(self, handle: Any, clock: StepClock) -> None:
        self._handle, self._clock = handle, clock

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        before = self._clock._now()
        done = self._handle.wait(*args, **kwargs)
        self._clock._add("communication", before, self._clock._now())
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
