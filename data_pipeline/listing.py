"""The list of a source on disk: written chunk by chunk, memory-mapped afterwards, so that its length costs no memory.

DIR/
  numbers.i64        number of every input, ascending
  labels.i32         its first label; -1: none
  groups.i32         its group
  names.utf8         the names, one after the other
  name_starts.i64    where each name starts, and the end of the last
  places.i64         file, offset, size of every input; only for sources that read by place
  all_labels.i32     all labels, input after input; only where an input has several
  label_starts.i64   where the labels of each input start, and the end of the last
  list.json          written last: rows, classes, sha256 of each file above; its own sha256 stands for the list

All little-endian, without headers. DIR appears whole: it is written under another name first.
"""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.labels import MOST_CLASSES, ChunkLabels, LabelReader
from data_pipeline.source import Chunk, Source, Wanted, packed
from vitscale.base.errors import EnvironmentFault, UsageError, nearest
from vitscale.base.files import canonical_json, fsync_path, publish, read_json, sha256_bytes, sha256_file, write_json

RECORD = "list.json"
# Rows that are looked at together where a whole column would be too much.
_ROWS_AT_ONCE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The list of a source, or the part of it that has wanted classes; row i of every field describes one input."""

    numbers: np.ndarray
    """int64, ascending."""
    labels: np.ndarray
    """int32, the first label: an index into `classes`; -1: none."""
    groups: np.ndarray
    """int32, not decreasing: inputs with equal value are read together."""
    classes: tuple[str, ...]
    most_labels: int
    """Labels of the input that has most: 0 (no labels), 1, or more."""
    sha256: str
    """Hex, over everything the source listed, wanted or not."""
    names: pa.LargeStringArray
    """Of all rows on disk."""
    places: np.ndarray | None
    """(rows, 3) of all rows on disk; None: the source reads without."""
    all_labels: np.ndarray | None
    """Of all rows on disk, in the numbering of the source; None unless `most_labels` was above 1."""
    label_starts: np.ndarray | None
    rows_on_disk: np.ndarray | None = None
    """int64 row on disk of each row here; None: they are the same."""
    number_of: np.ndarray | None = None
    """int32 class number here of each class of the source; -1: not wanted. None: they are the same."""

    def __len__(self) -> int:
        return len(self.numbers)

    def names_of(self, rows: np.ndarray) -> list[str]:
        return self.names.take(pa.array(self._on_disk(rows))).to_pylist()

    def labels_of(self, rows: np.ndarray) -> list[list[int]] | None:
        """All labels of each row, the first one first; None unless `most_labels` is above 1."""
        if self.most_labels < 2:
            return None
        assert self.all_labels is not None and self.label_starts is not None, "kept where inputs have several labels"
        on_disk = self._on_disk(rows)
        starts, stops = self.label_starts[on_disk].tolist(), self.label_starts[on_disk + 1].tolist()
        found = [self._here(self.all_labels[start:stop]) for start, stop in zip(starts, stops, strict=True)]
        return [list(dict.fromkeys(numbers[numbers >= 0].tolist())) for numbers in found]

    def wanted(self, rows: np.ndarray) -> Wanted:
        """What the source needs to read these rows."""
        places = None if self.places is None else np.array(self.places[self._on_disk(rows)])
        return Wanted(numbers=np.array(self.numbers[rows]), names=self.names_of(rows), places=places)

    def narrowed(self, classes: tuple[str, ...]) -> "Listing":
        """The inputs that have one of these classes, labelled in the order in which they are given here.

        Raises UsageError for an unknown class, and for one named twice.
        """
        return self.renumbered(classes, renumbering(self.classes, classes))

    def renumbered(self, classes: tuple[str, ...], number_of: np.ndarray) -> "Listing":
        """The inputs that have one of these classes. Several classes of the source may become one.

        `number_of`: int32 place in `classes` of each class here; -1: not wanted; the last entry serves label -1.
        """
        assert self.rows_on_disk is None, "narrowed once"
        rows, labels, most = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)], 0
        for start in range(0, len(self), _ROWS_AT_ONCE):
            first, counts = self._narrowed_part(slice(start, start + _ROWS_AT_ONCE), number_of)
            kept = np.flatnonzero(counts)
            rows.append(start + kept)
            labels.append(first[kept])
            most = max(most, int(counts.max(initial=0)))
        kept = np.concatenate(rows)
        return replace(
            self,
            numbers=self.numbers[kept],
            labels=np.concatenate(labels),
            groups=self.groups[kept],
            classes=classes,
            most_labels=most,
            rows_on_disk=kept,
            number_of=number_of,
        )

    def _narrowed_part(self, part: slice, number_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First label and count of labels of some rows, under other numbers."""
        if self.most_labels < 2:
            first = number_of[self.labels[part]]
            return first, (first >= 0).astype(np.int64)
        assert self.all_labels is not None and self.label_starts is not None
        starts = self.label_starts[part.start : part.stop + 1]
        numbers = number_of[self.all_labels[starts[0] : starts[-1]]]
        owners = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        # Two labels that become one are one label; its first place counts.
        kept = np.sort(np.unique(owners * (MOST_CLASSES + 1) + numbers, return_index=True)[1])
        kept = kept[numbers[kept] >= 0]
        return _first_and_counts(numbers[kept], np.bincount(owners[kept], minlength=len(starts) - 1))

    def _on_disk(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.rows_on_disk is None else self.rows_on_disk[rows]

    def _here(self, numbers: np.ndarray) -> np.ndarray:
        return numbers if self.number_of is None else self.number_of[numbers]


def write_listing(source: Source, directory: Path) -> Listing:
    """List the source into `directory`, and read it back.

    A finished list there is replaced, unless it is equal: then its files stay as they are, also under readers.
    Raises UsageError for a source that lists nothing or whose labels are no classes.
    """
    temporary = directory.with_name(f"{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    packed(list(source.class_names), where=source.where)  # they are text, too
    reader = LabelReader(source.class_names, where=source.where)
    writer = _Writer(temporary, where=source.where)
    for chunk in source.list_inputs():
        writer.append(chunk, reader.read(chunk.labels, rows=len(chunk.numbers)))
    if not writer.rows:
        raise UsageError(f"expected images in {source.where}, found none")
    classes, final = reader.finish()
    if final is not None:
        for name in ("labels.i32", "all_labels.i32"):
            _renumber(temporary / name, final)
    if reader.most_labels < 2:
        for name in ("all_labels.i32", "label_starts.i64"):
            (temporary / name).unlink()
    paths = sorted(temporary.iterdir())
    for path in paths:
        fsync_path(path)
    record = {
        "rows": writer.rows,
        "classes": classes,
        "most_labels": reader.most_labels,
        "sha256": {path.name: sha256_file(path) for path in paths},
    }
    write_json(temporary / RECORD, record)
    if (directory / RECORD).exists() and (directory / RECORD).read_bytes() == canonical_json(record):
        shutil.rmtree(temporary)
    else:
        shutil.rmtree(directory, ignore_errors=True)
        publish(temporary, directory)
    return read_listing(directory)


def read_listing(directory: Path) -> Listing:
    """Map a finished list into memory. Raises EnvironmentFault when it is missing or damaged."""
    record = read_json(directory / RECORD)
    try:
        rows, classes, most_labels, files = (record[name] for name in ("rows", "classes", "most_labels", "sha256"))
    except (KeyError, TypeError):
        raise EnvironmentFault(f"{directory / RECORD} is no record of a list; start the build over with --replan") from None

    def column(name: str, dtype: str, count: int | None = None) -> np.ndarray:
        try:
            mapped = np.memmap(directory / name, dtype, mode="r")
        except (OSError, ValueError) as error:
            raise EnvironmentFault(f"{directory / name} cannot be read ({error}); start the build over with --replan") from None
        if count is not None and len(mapped) != count:
            raise EnvironmentFault(
                f"{directory / name}: expected {count:,} numbers, found {len(mapped):,}; start the build over with --replan"
            )
        return mapped

    name_starts = column("name_starts.i64", "<i8", rows + 1)
    text = column("names.utf8", "u1", int(name_starts[-1])) if name_starts[-1] else np.zeros(0, np.uint8)
    has_several = "all_labels.i32" in files
    return Listing(
        numbers=column("numbers.i64", "<i8", rows),
        labels=column("labels.i32", "<i4", rows),
        groups=column("groups.i32", "<i4", rows),
        classes=tuple(classes),
        most_labels=most_labels,
        sha256=sha256_bytes(canonical_json(record)),
        names=pa.LargeStringArray.from_buffers(rows, pa.py_buffer(name_starts), pa.py_buffer(text)),
        places=column("places.i64", "<i8", 3 * rows).reshape(rows, 3) if "places.i64" in files else None,
        all_labels=column("all_labels.i32", "<i4") if has_several else None,
        label_starts=column("label_starts.i64", "<i8", rows + 1) if has_several else None,
    )


class _Writer:
    """Appends chunks to the files of a list."""

    def __init__(self, directory: Path, *, where: str) -> None:
        self._directory = directory
        self._where = where
        self._text_bytes = 0
        self._label_count = 0
        self.rows = 0
        for name in ("name_starts.i64", "label_starts.i64"):
            self._append(name, np.zeros(1, "<i8"))

    def append(self, chunk: Chunk, labels: ChunkLabels) -> None:
        rows = len(chunk.numbers)
        groups = np.zeros(rows, np.int32) if chunk.groups is None else chunk.groups
        self._append("numbers.i64", chunk.numbers.astype("<i8"))
        self._append("labels.i32", labels.first.astype("<i4"))
        self._append("groups.i32", groups.astype("<i4"))
        try:
            chunk.names.validate(full=True)  # a Parquet file may hold anything as text
        except pa.ArrowException:
            raise UsageError(f"{self._where}: expected names in UTF-8, got others near row {self.rows:,}") from None
        starts, text = _unpacked(chunk.names)
        self._append("names.utf8", text)
        self._append("name_starts.i64", starts[1:] + self._text_bytes)
        self._append("all_labels.i32", labels.all.astype("<i4"))
        self._append("label_starts.i64", np.cumsum(labels.counts).astype("<i8") + self._label_count)
        if chunk.places is not None:
            self._append("places.i64", chunk.places.astype("<i8"))
        self._text_bytes += len(text)
        self._label_count += len(labels.all)
        self.rows += rows

    def _append(self, name: str, column: np.ndarray) -> None:
        with open(self._directory / name, "ab") as file:
            file.write(np.ascontiguousarray(column).data)


def _unpacked(names: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """Starts (rows + 1, from 0) and the bytes of packed names."""
    _, starts, text = names.buffers()
    bounds = np.frombuffer(starts, "<i8", count=len(names) + 1, offset=8 * names.offset)
    all_text = np.frombuffer(text, np.uint8) if text is not None else np.zeros(0, np.uint8)
    return bounds - bounds[0], all_text[bounds[0] : bounds[-1]]


def _renumber(path: Path, final: np.ndarray) -> None:
    """Replace provisional class numbers by final ones, in place: the list has no name yet."""
    number_of = np.append(final, -1).astype("<i4")  # the last entry serves -1
    with open(path, "r+b") as file:
        while part := file.read(4 * _ROWS_AT_ONCE):
            file.seek(-len(part), os.SEEK_CUR)
            file.write(number_of[np.frombuffer(part, "<i4")].data)


def _first_and_counts(numbers: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first = np.full(len(counts), -1, np.int32)
    first[counts > 0] = numbers[(np.cumsum(counts) - counts)[counts > 0]]
    return first, counts


def renumbering(classes: tuple[str, ...], wanted: tuple[str, ...]) -> np.ndarray:
    """int32 place in `wanted` of each class; -1: not wanted; the last entry serves label -1.

    Raises UsageError for an unknown class, and for one named twice.
    """
    place_of = {name: place for place, name in enumerate(classes)}
    number_of = np.full(len(classes) + 1, -1, np.int32)
    for number, name in enumerate(wanted):
        if name not in place_of:
            raise UsageError(
                f"--classes: the source has no class {name!r} among its {len(classes)} classes{nearest(name, classes)}"
            )
        if number_of[place_of[name]] >= 0:
            raise UsageError(f"--classes: expected each class once, got {name!r} twice")
        number_of[place_of[name]] = number
    return number_of
