"""A CSV or Parquet table of paths and labels; rows are streamed, so it may be as long as it likes.

column            text or number in it
path              of an image, absolute or relative to the directory of the table
label (or class)  the number or the name of its class; empty: none
labels            several of them: a list (Parquet), or text with | between them, or spaces where no row has a |

Names are sorted to number the classes. Without a label column the images have no labels. An input is a row.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from data_pipeline.labels import is_text
from data_pipeline.source import Chunk, Source, Unusable, Wanted, read_file, what_is
from data_pipeline.sources.parquet import batches_of, open_parquet
from vitscale.base.errors import EnvironmentFault, UsageError, nearest

LABEL_COLUMNS = ("label", "labels", "class")
# A path that names no file now: it is the table that is wrong, not the disk.
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class TableSource(Source):
    """The rows of one table. A path that leads to no file is rejected as missing-file: long tables always have some."""

    def __init__(self, file: Path) -> None:
        if file.suffix.lower() not in (".csv", ".parquet"):
            raise UsageError(f"expected a table as FILE.csv or FILE.parquet, got {file.name!r}")
        if not file.is_file():
            raise EnvironmentFault(f"expected a table at {file}, found {what_is(file)}")
        self.file, self.where = file, str(file)
        columns = self._columns()
        if "path" not in columns:
            raise UsageError(f"{file}: expected a column path, got {', '.join(columns)}{nearest('path', columns)}")
        labels = [name for name in LABEL_COLUMNS if name in columns]
        if len(labels) > 1:
            raise UsageError(f"{file}: expected one column of labels, got {' and '.join(labels)}; leave one of them out")
        self.label = labels[0] if labels else None

    def list_inputs(self) -> Iterator[Chunk]:
        listed = 0
        separator = self._separator() if self.label == "labels" else None
        for batch in self._batches(["path", self.label] if self.label else ["path"]):
            try:
                names = pc.fill_null(batch["path"].cast(pa.large_string()), "")
            except pa.ArrowException:
                raise UsageError(f"{self.file}: expected paths as text in column path, got {batch['path'].type}") from None
            labels = batch[self.label] if self.label else None
            if separator is not None and (texts := _texts(batch["labels"])) is not None:
                labels = self._split(texts, separator)
            yield Chunk(numbers=np.arange(listed, listed + len(names), dtype=np.int64), names=names, labels=labels)
            listed += len(names)
        if not listed:
            raise UsageError(f"expected rows in {self.file}, found none")

    def read(self, wanted: Wanted, *, max_bytes: int | None = None) -> Iterator[bytes | Unusable]:
        directory = self.file.parent
        for name in wanted.names:
            if not name or "\0" in name:
                yield Unusable(reason="missing-file", detail="the row has no path")
                continue
            try:
                yield read_file(directory / name, max_bytes=max_bytes)
            except OSError as error:
                if error.errno not in _MISSING:
                    raise
                yield Unusable(reason="missing-file", detail=os.strerror(error.errno or 0))

    def _columns(self) -> list[str]:
        if self.file.suffix.lower() == ".parquet":
            with open_parquet(self.file) as parquet:
                return list(parquet.schema_arrow.names)
        with self._csv() as reader:
            return list(reader.schema.names)

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        if self.file.suffix.lower() == ".parquet":
            yield from batches_of(self.file, columns)
            return
        with self._csv(columns) as reader:
            try:
                yield from reader
            except pa.ArrowException as error:
                raise self._bad_csv(error) from None

    def _csv(self, columns: list[str] | None = None) -> csv.CSVStreamingReader:
        """All columns are text: what the first rows look like must not decide about the others."""
        names = columns or []
        conversion = csv.ConvertOptions(
            include_columns=columns,
            column_types={name: pa.string() for name in names},
            null_values=[""],
            strings_can_be_null=True,
        )
        try:
            return csv.open_csv(self.file, read_options=csv.ReadOptions(use_threads=False), convert_options=conversion)
        except pa.ArrowException as error:
            raise self._bad_csv(error) from None

    def _bad_csv(self, error: Exception) -> UsageError:
        reason = " ".join(str(error).split())
        return UsageError(f"{self.file} cannot be read as CSV in UTF-8 with one line of column names ({reason}); write it anew")

    def _separator(self) -> str:
        """Of labels in one text: | if any row has one, else spaces."""
        for batch in self._batches(["labels"]):
            if (texts := _texts(batch["labels"])) is None:
                break
            if pc.any(pc.match_substring(texts, "|")).as_py():
                return "|"
        return " "

    def _split(self, texts: pa.Array, separator: str) -> pa.Array:
        lists = texts.filter(pc.starts_with(pc.utf8_ltrim_whitespace(texts), "["))
        if len(lists):
            raise UsageError(f"{self.file}: expected several labels as 3|17 in column labels, got {lists[0].as_py()!r}")
        return pc.split_pattern(texts, "|") if separator == "|" else pc.utf8_split_whitespace(texts)


def _texts(column: pa.Array) -> pa.Array | None:
    """A column of text in any of Arrow's forms as plain text; None: it is no text."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    return column.cast(pa.large_string()) if is_text(kind) else None
