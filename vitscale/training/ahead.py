"""Micro-batches on their way to the GPU while it computes: a thread takes them from a stream and copies them on a side stream.

What was taken ahead and not trained on never counts: the only data state is `position` (design.md, law 2), which the loop owns.
On a CPU there is nothing to copy, and the stream is used as it is.
"""

import dataclasses
import queue
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import torch

DEPTH = 2
"""Micro-batches that lie ready on the device."""


class Closable(Protocol):
    """A stream of micro-batches."""

    def __iter__(self) -> Iterator[Any]: ...

    def __next__(self) -> Any: ...

    def close(self) -> None: ...


def ahead_of(stream: Closable, device: torch.device) -> Closable:
    """The same micro-batches in the same order, with images and labels on the device."""
    return CopiedAhead(stream, device) if device.type == "cuda" else stream


class CopiedAhead:
    """Iterator whose thread runs until `close`, the end of the stream, or an error, which it hands over in its place."""

    def __init__(self, stream: Closable, device: torch.device) -> None:
        self._stream, self._device = stream, device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=DEPTH)
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="copied-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> "CopiedAhead":
        return self

    def __next__(self) -> Any:
        if self._error is not None:
            raise self._error
        batch, event, self._error = self._ready.get()
        if self._error is not None:
            raise self._error
        if event is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(event)
            for tensor in _tensors(batch).values():
                tensor.record_stream(here)  # its memory may be given away only when the computation is done with it
        return batch

    def _work(self) -> None:
        try:
            while not self._closed.is_set():
                batch = next(self._stream)
                moved, event = self._copied(batch)
                self._hand_over((moved, event, None))
        except BaseException as error:
            self._hand_over((None, None, error))

    def _hand_over(self, item: Any) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _copied(self, batch: Any) -> tuple[Any, Any]:
        if self._side is None:
            return batch, None
        with torch.cuda.stream(self._side):
            # Only pinned memory is copied beside the computation; the first copy is the host's, at memory speed.
            moved = {name: tensor.pin_memory().to(self._device, non_blocking=True) for name, tensor in _tensors(batch).items()}
            event = torch.cuda.Event()
            event.record()
        return dataclasses.replace(batch, **moved), event

    def close(self) -> None:
        """End the thread, then the stream."""
        self._closed.set()
        self._thread.join()
        self._stream.close()


def _tensors(batch: Any) -> dict[str, torch.Tensor]:
    """What of a micro-batch the device needs."""
    return {name: getattr(batch, name) for name in ("images_BHWC", "labels_B", "labels_BM")}
