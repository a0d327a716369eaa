"""Rows of Parquet files with an image column and, mostly, a label: the layout of Hugging Face image datasets."""

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

from data_pipeline.source import CHUNK_ROWS, Chunk, Source, Unusable, Wanted, what_is
from vitscale.base.errors import EnvironmentFault, UsageError

LABEL_COLUMNS = ("label", "labels", "fine_label")


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
                elif {self.image, self.label} - {None} - set(schema.names):
                    raise UsageError(f"{file}: expected the columns of {self.files[0].name}, got {', '.join(schema.names)}")
                for group in range(parquet.num_row_groups):
                    self._groups.append((file, group))
                    self._starts.append(rows)
                    rows += parquet.metadata.row_group(group).num_rows
        if not rows:
            raise UsageError(f"expected images in {path}, found no rows")

    def list_inputs(self) -> Iterator[Chunk]:
        listed = 0
        for file in self.files:
            with open_parquet(file) as parquet:
                # A path inside a struct reads that leaf alone, without the image bytes.
                wanted = [f"{self.image}.path"] + ([self.label] if self.label else [])
                in_file = 0
                for batch in parquet.iter_batches(CHUNK_ROWS, columns=wanted, use_threads=False):
                    rows = batch.num_rows
                    numbers = np.arange(listed, listed + rows, dtype=np.int64)
                    names = pa.array([f"{file.name}:{row}" for row in range(in_file, in_file + rows)], pa.large_string())
                    if self.image in batch.schema.names:
                        names = pc.coalesce(pc.struct_field(batch[self.image], "path").cast(pa.large_string()), names)
                    yield Chunk(
                        numbers=numbers,
                        names=names,
                        labels=batch[self.label] if self.label else None,
                        groups=(np.searchsorted(self._starts, numbers, side="right") - 1).astype(np.int32),
                    )
                    listed, in_file = listed + rows, in_file + rows

    def read(self, wanted: Wanted) -> Iterator[bytes | Unusable]:
        group = bisect_right(self._starts, int(wanted.numbers[0])) - 1
        column = _image_bytes(*self._groups[group], self.image)
        for number in wanted.numbers.tolist():
            yield column[number - self._starts[group]].as_py() or b""  # null: the row has no bytes


def open_parquet(file: Path) -> pq.ParquetFile:
    """Raises EnvironmentFault naming a file that is no Parquet."""
    try:
        return pq.ParquetFile(file)
    except pa.ArrowException as error:
        raise EnvironmentFault(f"{file} cannot be read as Parquet ({str(error).splitlines()[0]}); fetch it again") from None


def _parquet_files(path: Path) -> list[Path]:
    if "*" in path.name:
        files = sorted(path.parent.glob(path.name))
    elif path.is_dir():
        files = sorted(path.glob("*.parquet"))
        parts = sorted({match[1] for file in files if (match := re.match(r"(.+)-\d{5}-of-\d{5}", file.name))})
        if len(parts) > 1:
            example = path / f"{parts[-1]}-*.parquet"
            raise UsageError(f"{path} holds the splits {', '.join(parts)}, expected one; name one of them as parquet:{example}")
    elif path.is_file():
        files = [path]
    else:
        raise EnvironmentFault(f"expected a Parquet file or a directory of them at {path}, found {what_is(path)}")
    if not files:
        raise UsageError(f"expected .parquet files at {path}, found none")
    return files


def _image_column(schema: pa.Schema, file: Path) -> str:
    for field in schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return field.name
    have = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise UsageError(f"{file}: expected an image column struct{{bytes, path}}, found only {have}")


def _label_column(schema: pa.Schema) -> str | None:
    integers = [field.name for field in schema if pa.types.is_integer(field.type)]
    named = [name for name in LABEL_COLUMNS if name in integers]
    return (named + integers + [None])[0]


def _class_names(schema: pa.Schema, label: str | None) -> tuple[str, ...]:
    """The ClassLabel names in the `huggingface` metadata of the schema; empty when there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


@functools.lru_cache(maxsize=1)
def _image_bytes(file: Path, group: int, image: str) -> pa.ChunkedArray:
    """The bytes column of one row group. The last one is kept: its pieces are scanned one after the other."""
    with open_parquet(file) as parquet:
        try:
            table = parquet.read_row_group(group, columns=[f"{image}.bytes"], use_threads=False)
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise EnvironmentFault(f"{file}: row group {group} cannot be read ({reason}); fetch the file again") from None
    return pc.struct_field(table[image], "bytes")
