"""Progress a person can read: a bar with rate and ETA, and durations and sizes in words."""

import re
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], *, total: int, what: str, unit: str = "it") -> Iterator[T]:
    """Yield the items behind a progress bar on stderr with rate and ETA."""
    yield from tqdm(items, total=total, desc=what, unit=unit, mininterval=_interval_s(), dynamic_ncols=True)


class Bar:
    """A progress bar that is told how far things are: rate and ETA on stderr."""

    def __init__(self, *, total: int, what: str, unit: str) -> None:
        self._bar = tqdm(total=total, desc=what, unit=unit, mininterval=_interval_s(), dynamic_ncols=True)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    @property
    def done(self) -> int:
        return int(self._bar.n)

    def reach(self, done: int, *, note: str = "") -> None:
        """So much is done by now; never less than before."""
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(max(0, done - self.done))


class ImageBar:
    """A progress bar over images that come in unequal lots: images/s, MB/s and ETA on stderr."""

    def __init__(self, *, images: int, what: str, is_shown: bool) -> None:
        self._bar = tqdm(
            total=images,
            desc=what,
            unit=" images",
            mininterval=_interval_s(),
            dynamic_ncols=True,
            disable=not is_shown or not images,
        )
        self._bytes = 0
        self._started_at_s = time.monotonic()

    def __enter__(self) -> "ImageBar":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def add(self, images: int, read_bytes: int = 0) -> None:
        self._bytes += read_bytes
        elapsed_s = time.monotonic() - self._started_at_s
        self._bar.set_postfix_str(f"{self._bytes / 1e6 / max(elapsed_s, 1e-9):.1f} MB/s", refresh=False)
        self._bar.update(images)


def _interval_s() -> float:
    return 0.2 if sys.stderr.isatty() else 5.0


def in_words(seconds: float) -> str:
    """`3d04h`, `2h05m`, `7m12s` or `9s`."""
    whole = max(0, round(seconds))
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{hours}h{m:02d}m"
    return f"{m}m{s:02d}s" if m else f"{s}s"


def seconds_of(words: int | str) -> int:
    """The other way: `3h50m`, `1d`, `90s` or a plain number of seconds. Raises ValueError."""
    text = str(words).strip()
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text)
    if match is None or not text:
        raise ValueError(f'expected a time such as 600, "90s", "3h50m" or "1d12h", got {words!r}')
    days, hours, minutes, seconds = (int(number or 0) for number in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def bytes_in_words(count: int) -> str:
    """`512 B`, `3.4 MB`: decimal units, as storage is sold."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.95:  # what rounds to 1000.0 belongs to the next unit
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
