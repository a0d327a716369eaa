"""The handwritten digits that come with scikit-learn: 8x8 scans with 17 grey levels, stored as grey PNG."""

import functools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from data_pipeline.decode import encode_png
from data_pipeline.source import Chunk, Source, Unusable, Wanted
from vitscale.base.errors import UsageError, nearest


class DigitsSource(Source):
    """All scans, or one of the two parts: every fifth belongs to eval, the others to train."""

    class_names = tuple("0123456789")

    def __init__(self, part: str) -> None:
        parts = ("train", "eval", "")
        if part not in parts:
            raise UsageError(f"expected digits:train, digits:eval or digits: (all), got 'digits:{part}'{nearest(part, parts)}")
        self.part = part
        self.where = f"digits:{part}"

    def list_inputs(self) -> Iterator[Chunk]:
        _, labels = _digit_scans()
        indices = np.arange(len(labels), dtype=np.int64)
        is_eval = indices % 5 == 4
        kept = indices[{"train": ~is_eval, "eval": is_eval, "": np.ones_like(is_eval)}[self.part]]
        names = pa.array([f"digits:{index}" for index in kept], pa.large_string())
        yield Chunk(numbers=kept, names=names, labels=pa.array(labels[kept]))

    def read(self, wanted: Wanted, *, max_bytes: int | None = None) -> Iterator[bytes | Unusable]:
        scans, _ = _digit_scans()
        for number in wanted.numbers:
            yield encode_png(np.round(scans[number] * 255 / 16).astype(np.uint8))


@functools.cache
def _digit_scans() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) ink from 0 to 16, and (1797,) digits."""
    # Imported here because it takes as long as all else together, and every worker of every other source would pay it.
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target
