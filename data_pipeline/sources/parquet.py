"""Rows of Parquet files with an image column and, mostly, a label: the layout of Hugging Face image datasets.

image    struct{bytes, path}, or plain bytes in a column called image, img, jpg, jpeg, png or webp
label    the first of label, labels, fine_label that holds numbers, names or lists of them; else the first whole numbers
"""

import functools
import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.labels import are_labels
from data_pipeline.source import CHUNK_ROWS, Chunk, Source, Unusable, Wanted, packed, what_is
from vitscale.base.errors import EnvironmentFault, UsageError

LABEL_COLUMNS = ("label", "labels", "fine_label")
_PART = re.compile(r"(.+)-\d{5}-of-\d{5}|(?:.*[^a-z])?(train|valid|validation|val|test|eval|dev)(?![a-z])")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")


class ParquetSource(Source):
    """A file, a directory of files, or a pattern; an input is a row, a group is a row group."""

    is_random_access = False

    def __init__(self, path: Path) -> None:
        self.files = _parquet_files(path)
        self.where = str(path)
        self._groups: list[tuple[Path, int]] = []  # file, number of the row group in it
        self._starts: list[int] = []  # first row of that group, over all files
        rows = 0
        for file in self.files:
            with open_parquet(file) as parquet:
                schema = parquet.schema_arrow
                if file == self.files[0]:
                    self.image, self.label = _image_column(schema, file), _label_column(schema)
                    self.class_names = _class_names(schema, self.label)
                    self.bytes_column = f"{self.image}.bytes" if _is_image_struct(schema.field(self.image).type) else self.image
                elif not self._has_columns(schema):
                    raise UsageError(f"{file}: expected the columns of {self.files[0].name}, got {_columns_of(schema)}")
                for group in range(parquet.num_row_groups):
                    self._groups.append((file, group))
                    self._starts.append(rows)
                    rows += parquet.metadata.row_group(group).num_rows
        if not rows:
            raise UsageError(f"expected images in {path}, found no rows")

    def list_inputs(self) -> Iterator[Chunk]:
        listed = 0
        for file in self.files:
            # A path inside a struct reads that leaf alone, without the image bytes.
            path = [f"{self.image}.path"] if self.bytes_column != self.image else []
            first = listed
            for batch in batches_of(file, [*path, *([self.label] if self.label else [])]):
                numbers = np.arange(listed, listed + batch.num_rows, dtype=np.int64)
                names = packed([f"{file.name}:{row}" for row in (numbers - first).tolist()], where=self.where)
                if self.image in batch.schema.names:
                    names = pc.coalesce(pc.struct_field(batch[self.image], "path").cast(pa.large_string()), names)
                yield Chunk(
                    numbers=numbers,
                    names=names,
                    labels=batch[self.label] if self.label else None,
                    groups=(np.searchsorted(self._starts, numbers, side="right") - 1).astype(np.int32),
                )
                listed += batch.num_rows

    def read(self, wanted: Wanted, *, max_bytes: int | None = None) -> Iterator[bytes | Unusable]:
        group = bisect_right(self._starts, int(wanted.numbers[0])) - 1
        column = _image_bytes(*self._groups[group], self.bytes_column)
        for number in wanted.numbers.tolist():
            yield column[number - self._starts[group]].as_py() or b""  # null: the row has no bytes

    def _has_columns(self, schema: pa.Schema) -> bool:
        if self.label is not None and self.label not in schema.names:
            return False
        is_there = self.image in schema.names
        return is_there and _is_image_struct(schema.field(self.image).type) == (self.bytes_column != self.image)


def open_parquet(file: Path) -> pq.ParquetFile:
    """Raises EnvironmentFault naming a file that is no Parquet."""
    try:
        # Without a buffer a column of a row group is read in one piece: 130 MB more for 10 M paths in one group.
        return pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    except pa.ArrowException as error:
        raise _damaged(file, error) from None


def batches_of(file: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Columns of a file, CHUNK_ROWS rows at a time. Raises EnvironmentFault where the file is damaged."""
    with open_parquet(file) as parquet:
        try:
            yield from parquet.iter_batches(CHUNK_ROWS, columns=columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> EnvironmentFault:
    return EnvironmentFault(f"{file} cannot be read as Parquet ({str(error).splitlines()[0]}); fetch it again")


def _parquet_files(path: Path) -> list[Path]:
    if "*" in path.name:
        files = sorted(path.parent.glob(path.name))
    elif path.is_dir():
        files = sorted(path.glob("*.parquet"))
        # `train` of train-00000-of-00012.parquet and of cifar-train.parquet: the images of a test must not be trained on.
        parts = sorted({match[1] or match[2] for file in files if (match := _PART.match(file.name))})
        if len(parts) > 1:
            example = path / f"*{parts[-1]}*.parquet"
            raise UsageError(f"{path} holds the splits {', '.join(parts)}, expected one; name one of them as parquet:{example}")
    elif path.is_file():
        files = [path]
    else:
        raise EnvironmentFault(f"expected a Parquet file or a directory of them at {path}, found {what_is(path)}")
    if not files:
        raise UsageError(f"expected .parquet files at {path}, found none")
    return files


def _image_column(schema: pa.Schema, file: Path) -> str:
    structs = [field.name for field in schema if _is_image_struct(field.type)]
    plain = [name for name in IMAGE_COLUMNS if name in schema.names and _is_bytes(schema.field(name).type)]
    if not structs + plain:
        raise UsageError(f"{file}: expected an image column struct{{bytes, path}}, found only {_columns_of(schema)}")
    return (structs + plain)[0]


def _label_column(schema: pa.Schema) -> str | None:
    named = [name for name in LABEL_COLUMNS if name in schema.names and are_labels(schema.field(name).type)]
    integers = [field.name for field in schema if pa.types.is_integer(field.type)]
    return (named + integers + [None])[0]


def _columns_of(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _is_image_struct(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _class_names(schema: pa.Schema, label: str | None) -> tuple[str, ...]:
    """The ClassLabel names in the `huggingface` metadata of the schema; empty when there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        feature = features[label]
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)  # a list of labels
        return tuple(feature["names"])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return ()


@functools.lru_cache(maxsize=1)
def _image_bytes(file: Path, group: int, column: str) -> pa.ChunkedArray:
    """The bytes column of one row group. The last one is kept: its pieces are scanned one after the other."""
    with open_parquet(file) as parquet:
        try:
            table = parquet.read_row_group(group, columns=[column], use_threads=False)
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise EnvironmentFault(f"{file}: row group {group} cannot be read ({reason}); fetch the file again") from None
    return pc.struct_field(table[0], "bytes") if column not in table.column_names else table[0]
