"""One stream of micro-batches over the phases of progressive resolution: at the first step of a phase the images change size.

The order knows positions only, so a new stream takes up where the last one stood, and a resume opens the one of its step.
"""

from collections.abc import Callable, Sequence

from data_pipeline.stream import MicroBatch, Stream
from vitscale.planning.resolution import Phase, phase_at


class PhasedStream:
    """Iterator over the micro-batches of one rank, from the step after `step` steps on; for ever."""

    def __init__(
        self,
        open_stream: Callable[[int, int], Stream],
        phases: Sequence[Phase],
        *,
        step: int,
        position: int,
        global_batch: int,
        accumulation: int,
    ) -> None:
        """`open_stream(image_size, position)` makes the stream of one phase; `position` is that of the first step."""
        self._open_stream = open_stream
        self._phases = phases
        self._step, self._position = step, position
        self._global_batch, self._accumulation = global_batch, accumulation
        self._given = 0
        self._size = phase_at(phases, step).image_size
        self._stream = open_stream(self._size, position)

    def __iter__(self) -> "PhasedStream":
        return self

    def __next__(self) -> MicroBatch:
        if self._given == self._accumulation:
            self._given = 0
            self._step += 1
            self._position += self._global_batch
            size = phase_at(self._phases, self._step).image_size
            if size != self._size:
                self._stream.close()
                self._size, self._stream = size, self._open_stream(size, self._position)
        batch = next(self._stream)
        self._given += 1
        return batch

    def close(self) -> None:
        """End the workers of the present phase."""
        self._stream.close()
