"""Labels as sources have them (numbers, class names, lists of either) into numbers of classes.

A class that is given by name gets a provisional number where it is first met; the names are sorted, and the numbers
final, only when all labels were seen. Names that are all whole numbers, as in a CSV, are those numbers.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vitscale.base.errors import UsageError

# A label becomes an index into a list of names; more than this is an identifier, not a class.
MOST_CLASSES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ChunkLabels:
    """Numbers of the classes of a chunk, provisional while `LabelReader.finish` was not called."""

    first: np.ndarray
    """(rows,) int32: the first label of each input; -1: none."""
    all: np.ndarray
    """int32: all labels, input after input."""
    counts: np.ndarray
    """(rows,) int64: how many of `all` belong to each input."""


class LabelReader:
    """Numbers the labels of a source, chunk by chunk. `class_names`: empty, or those the source knows beforehand."""

    def __init__(self, class_names: tuple[str, ...], *, where: str) -> None:
        self._class_names = class_names
        self._where = where
        self._provisional: dict[str, int] = {}
        self._known: dict[str | None, int] = {}  # the same, by the text as it stands there
        self._highest = -1
        self.most_labels = 0

    def read(self, labels: pa.Array | None, *, rows: int) -> ChunkLabels:
        """The labels of a chunk. Raises UsageError for labels that are no classes."""
        if labels is not None and not are_labels(labels.type):
            raise UsageError(f"{self._where}: expected labels as whole numbers, names or lists of them, got {labels.type}")
        if labels is None or pa.types.is_null(labels.type):
            numbers = np.zeros(0, np.int32)
            counts = np.zeros(rows, np.int64)
        elif _is_list(labels.type):
            numbers = self._numbers(labels.flatten())
            lengths = pc.fill_null(pc.list_value_length(labels), 0).to_numpy(zero_copy_only=False).astype(np.int64)
            owners = np.repeat(np.arange(rows), lengths)
            # One label said twice is one label; the first place counts.
            kept = np.sort(np.unique(owners * (MOST_CLASSES + 1) + numbers, return_index=True)[1])
            kept = kept[numbers[kept] >= 0]
            numbers, counts = numbers[kept], np.bincount(owners[kept], minlength=rows)
        else:
            numbers = self._numbers(labels)
            counts = (numbers >= 0).astype(np.int64)
            numbers = numbers[numbers >= 0]
        self.most_labels = max(self.most_labels, int(counts.max(initial=0)))
        first = np.full(rows, -1, np.int32)
        starts = np.cumsum(counts) - counts
        first[counts > 0] = numbers[starts[counts > 0]]
        return ChunkLabels(first=first, all=numbers, counts=counts)

    def finish(self) -> tuple[tuple[str, ...], np.ndarray | None]:
        """The classes, and the final number of each provisional one; None: they are final already."""
        if not self._provisional:
            return self._numbered_classes(), None
        names = list(self._provisional)
        are_numbers = [_is_number(name) for name in names]
        if self._highest >= 0:
            raise UsageError(f"{self._where}: expected labels that are all numbers or all names, got both, as {names[0]!r}")
        if all(are_numbers):
            final = [self._class_number(name) for name in names]
            self._highest = max(final)
            return self._numbered_classes(), np.array(final, np.int32)
        if any(are_numbers):
            number, name = names[are_numbers.index(True)], names[are_numbers.index(False)]
            raise UsageError(f"{self._where}: expected labels that are all numbers or all names, got {number!r} and {name!r}")
        classes = self._class_names or tuple(sorted(names))
        number_of = {name: number for number, name in enumerate(classes)}
        for name in names:
            if name not in number_of:
                raise UsageError(f"{self._where}: expected one of its {len(classes)} class names, got the label {name!r}")
        return classes, np.array([number_of[name] for name in names], np.int32)

    def _numbered_classes(self) -> tuple[str, ...]:
        classes = self._class_names
        if classes and self._highest >= len(classes):
            raise UsageError(
                f"{self._where}: expected labels below {len(classes)}, the count of class names, got {self._highest}"
            )
        return classes or tuple(str(number) for number in range(self._highest + 1))

    def _numbers(self, labels: pa.Array) -> np.ndarray:
        """int32 class number of each label, -1 for null and for numbers below zero."""
        if pa.types.is_dictionary(labels.type) and not is_text(labels.type.value_type):
            labels = labels.dictionary_decode()
        if not is_text(labels.type) and not pa.types.is_dictionary(labels.type):
            return self._whole_numbers(labels)
        encoded = labels if pa.types.is_dictionary(labels.type) else labels.dictionary_encode()
        try:
            texts = encoded.dictionary.to_pylist()
        except UnicodeDecodeError as error:
            raise UsageError(f"{self._where}: expected labels in UTF-8, got {error.object!r}") from None
        self._known |= {text: self._provisional_number(text) for text in texts if text not in self._known}
        codes = np.array([*map(self._known.__getitem__, texts), -1], np.int32)
        return codes[pc.fill_null(encoded.indices.cast(pa.int64()), len(texts)).to_numpy(zero_copy_only=False)]

    def _whole_numbers(self, labels: pa.Array) -> np.ndarray:
        if pa.types.is_floating(labels.type):  # whole numbers with gaps, as pandas makes them
            labels = pc.if_else(pc.is_nan(labels), None, labels)
        try:
            numbers = pc.fill_null(labels.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
        except pa.ArrowException as error:
            raise UsageError(f"{self._where}: expected whole numbers as labels ({error})") from None
        self._highest = max(self._highest, self._class_number(str(numbers.max(initial=-1))))
        return np.maximum(numbers, -1).astype(np.int32)

    def _provisional_number(self, text: str | None) -> int:
        name = (text or "").strip()
        if not name or (name.startswith("-") and _is_number(name[1:])):
            return -1
        number = self._provisional.setdefault(name, len(self._provisional))
        if number >= MOST_CLASSES:
            raise UsageError(f"{self._where}: expected class labels, got more than {MOST_CLASSES:,} different ones")
        return number

    def _class_number(self, text: str) -> int:
        if len(text.lstrip("0")) > len(str(MOST_CLASSES)) or int(text) >= MOST_CLASSES:
            raise UsageError(f"{self._where}: expected class numbers as labels, got {text[:40]}, an identifier")
        return int(text)


def are_labels(kind: pa.DataType) -> bool:
    """Whether a column of this type can be read: whole numbers, text, or lists of either; or nothing but nulls."""
    if _is_list(kind) or pa.types.is_dictionary(kind):
        return are_labels(kind.value_type)
    return is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
