"""Where images come from: a sorted, numbered list of inputs, and the bytes of each.

input    one candidate image; its *number* is fixed by the sorted source alone and becomes its key
name     what a person calls the input: a path below the source, a row of a Parquet file
group    neighbouring inputs that are read together (a Parquet row group)

SOURCE              inputs                                             number
imagefolder:PATH    every file below PATH/CLASS/, by class, then path  place in the list
parquet:PATH        rows of a file, a directory or a pattern, by file  row
digits:train|eval|  the 1,797 scans of scikit-learn; every fifth one   index of the scan
                    belongs to eval, the others to train

A new kind of source is one class with `list_inputs` and `read`, and one line in `open_source`.
"""

import functools
import json
import os
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.decode import encode_png
from vitscale.base.errors import EnvironmentFault, UsageError, nearest

KINDS = ("imagefolder", "parquet", "digits")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LABEL_COLUMNS = ("label", "labels", "fine_label")
# A label becomes an index into a list of names; more than this is an identifier, not a class.
MOST_CLASSES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The list of a source; row i of every field describes one input, in ascending order of number."""

    numbers: np.ndarray
    """int64."""
    labels: np.ndarray
    """int32 index into `classes`; -1: no class."""
    groups: np.ndarray
    """int32, not decreasing: inputs with equal value are read together."""
    classes: tuple[str, ...]
    names: pa.LargeStringArray
    """Packed: 300 M Python strings would need 30 GB."""

    def names_of(self, rows: np.ndarray) -> list[str]:
        return self.names.take(pa.array(rows)).to_pylist()

    def rows(self, rows: np.ndarray, *, labels: np.ndarray, classes: tuple[str, ...]) -> "Inputs":
        """The given rows under other labels."""
        return Inputs(
            numbers=self.numbers[rows],
            labels=labels,
            groups=self.groups[rows],
            classes=classes,
            names=self.names.take(pa.array(rows)),
        )


@dataclass(frozen=True, kw_only=True)
class Unusable:
    """Stands for the bytes of an input that is rejected before anybody decodes it."""

    reason: str
    """Short, for counting: not-an-image, no-class."""
    detail: str


class Source(ABC):
    """A sorted list of inputs. Instances travel to worker processes: they hold no open files."""

    is_random_access = True
    """False: bytes come cheaply only group by group, so the scan spills them (design.md 5.2)."""

    @abstractmethod
    def list_inputs(self) -> Inputs:
        """The complete list, equal on every call while the source is unchanged."""

    @abstractmethod
    def read(self, numbers: Sequence[int], names: Sequence[str]) -> Iterator[bytes | Unusable]:
        """Bytes of some inputs of one group, in ascending order; Unusable where there are none to decode.

        A file that cannot be read at all raises OSError or EnvironmentFault: that is no verdict on the image.
        """


def open_source(spec: str) -> Source:
    """The source a SOURCE argument names. Raises UsageError for a wrong word, EnvironmentFault for a missing path."""
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in KINDS:
        known = "imagefolder:PATH, parquet:PATH, digits:train or digits:eval"
        raise UsageError(f"expected SOURCE as {known}, got {spec!r}{nearest(kind, KINDS)}")
    if kind == "digits":
        return DigitsSource(rest)
    if not rest:
        raise UsageError(f"expected a path after {kind}:, got none")
    path = Path(rest).expanduser()
    return FolderSource(path) if kind == "imagefolder" else ParquetSource(path)


class FolderSource(Source):
    """One folder per class; files of a class may lie in folders below it."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise EnvironmentFault(f"expected a directory of class folders at {root}, found {_what_is(root)}")
        self.root = root

    def list_inputs(self) -> Inputs:
        entries = sorted(os.scandir(self.root), key=lambda entry: entry.name)
        classes = tuple(entry.name for entry in entries if entry.is_dir())
        if not classes:
            raise UsageError(f"expected one folder per class in {self.root}, found none; move the images into such")
        names = [entry.name for entry in entries if not entry.is_dir()]
        labels = [-1] * len(names)
        for label, name in enumerate(classes):
            found = sorted(_files_below(self.root / name))
            names += [f"{name}/{file}" for file in found]
            labels += [label] * len(found)
        if not any(_is_image_name(name) and label >= 0 for name, label in zip(names, labels, strict=True)):
            raise UsageError(f"expected images ({' '.join(IMAGE_ENDINGS)}) in the class folders of {self.root}, found none")
        try:
            packed = pa.array(names, pa.large_string())
        except UnicodeEncodeError as error:
            raise UsageError(f"expected file names in UTF-8 below {self.root}, got {error.object!r}; rename it") from None
        return Inputs(
            numbers=np.arange(len(names), dtype=np.int64),
            labels=np.array(labels, np.int32),
            groups=np.zeros(len(names), np.int32),
            classes=classes,
            names=packed,
        )

    def read(self, numbers: Sequence[int], names: Sequence[str]) -> Iterator[bytes | Unusable]:
        for name in names:
            if not _is_image_name(name):
                yield Unusable(reason="not-an-image", detail=f"the ending {Path(name).suffix!r} is not one of an image")
            elif "/" not in name:
                yield Unusable(reason="no-class", detail="lies beside the class folders, not in one")
            else:
                yield (self.root / name).read_bytes()


class ParquetSource(Source):
    """Rows with an image column struct{bytes, path} and, mostly, a label: the layout of Hugging Face image datasets."""

    is_random_access = False

    def __init__(self, path: Path) -> None:
        self.files = _parquet_files(path)
        self._groups: list[tuple[Path, int]] = []  # file, number of the row group in it
        self._starts: list[int] = []  # first row of that group, over all files
        rows = 0
        for file in self.files:
            with _open_parquet(file) as parquet:
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
        self.rows = rows

    def list_inputs(self) -> Inputs:
        names: list[pa.Array] = []
        labels: list[np.ndarray] = []
        for file in self.files:
            with _open_parquet(file) as parquet:
                # A path inside a struct reads that leaf alone, without the image bytes.
                wanted = [f"{self.image}.path"] + ([self.label] if self.label else [])
                table = parquet.read(columns=wanted, use_threads=False)
                rows = parquet.metadata.num_rows
            numbered = pa.array([f"{file.name}:{row}" for row in range(rows)], pa.large_string())
            if self.image in table.column_names:
                paths = pc.struct_field(table[self.image], "path").cast(pa.large_string())
                names += pc.coalesce(paths, pa.chunked_array([numbered])).chunks
            else:
                names.append(numbered)
            if self.label:
                labels.append(pc.fill_null(table[self.label].cast(pa.int64()), -1).to_numpy())
            else:
                labels.append(np.full(rows, -1))
        label = np.concatenate(labels)
        label[label < 0] = -1
        classes = self.class_names
        highest = int(label.max())
        if classes and highest >= len(classes):
            raise UsageError(f"{self.files[0]}: expected labels below {len(classes)}, the count of class names, got {highest}")
        if highest >= MOST_CLASSES:
            raise UsageError(f"{self.files[0]}: expected class numbers in column {self.label!r}, got {highest}, an identifier")
        return Inputs(
            numbers=np.arange(self.rows, dtype=np.int64),
            labels=label.astype(np.int32),
            groups=(np.searchsorted(self._starts, np.arange(self.rows), side="right") - 1).astype(np.int32),
            classes=classes or tuple(str(number) for number in range(highest + 1)),
            names=pa.concat_arrays(names),
        )

    def read(self, numbers: Sequence[int], names: Sequence[str]) -> Iterator[bytes | Unusable]:
        group = bisect_right(self._starts, numbers[0]) - 1
        column = _image_bytes(*self._groups[group], self.image)
        for number in numbers:
            yield column[number - self._starts[group]].as_py() or b""  # null: the row has no bytes


class DigitsSource(Source):
    """The handwritten digits that come with scikit-learn: 8x8 scans with 17 grey levels, stored as grey PNG."""

    def __init__(self, part: str) -> None:
        parts = ("train", "eval", "")
        if part not in parts:
            raise UsageError(f"expected digits:train, digits:eval or digits: (all), got 'digits:{part}'{nearest(part, parts)}")
        self.part = part

    def list_inputs(self) -> Inputs:
        _, labels = _digit_scans()
        indices = np.arange(len(labels), dtype=np.int64)
        is_eval = indices % 5 == 4
        kept = indices[{"train": ~is_eval, "eval": is_eval, "": np.ones_like(is_eval)}[self.part]]
        return Inputs(
            numbers=kept,
            labels=labels[kept].astype(np.int32),
            groups=np.zeros(len(kept), np.int32),
            classes=tuple("0123456789"),
            names=pa.array([f"digits:{index}" for index in kept], pa.large_string()),
        )

    def read(self, numbers: Sequence[int], names: Sequence[str]) -> Iterator[bytes | Unusable]:
        scans, _ = _digit_scans()
        for number in numbers:
            yield encode_png(np.round(scans[number] * 255 / 16).astype(np.uint8))


@functools.cache
def _digit_scans() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) ink from 0 to 16, and (1797,) digits."""
    # Imported here because it takes as long as all else together, and every worker of every other source would pay it.
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS)


def _what_is(path: Path) -> str:
    return "a file" if path.is_file() else "nothing" if not path.exists() else "no plain file"


def _files_below(folder: Path) -> Iterator[str]:
    """Paths of all files below a folder, relative to it, with forward slashes."""

    def stop(error: OSError) -> None:
        raise error

    for at, _, files in os.walk(folder, onerror=stop, followlinks=True):
        below = Path(at).relative_to(folder)
        yield from ((below / file).as_posix() for file in files)


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
        raise EnvironmentFault(f"expected a Parquet file or a directory of them at {path}, found {_what_is(path)}")
    if not files:
        raise UsageError(f"expected .parquet files at {path}, found none")
    return files


def _open_parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowException as error:
        raise EnvironmentFault(f"{file} cannot be read as Parquet ({str(error).splitlines()[0]}); fetch it again") from None


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
    with _open_parquet(file) as parquet:
        try:
            table = parquet.read_row_group(group, columns=[f"{image}.bytes"], use_threads=False)
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise EnvironmentFault(f"{file}: row group {group} cannot be read ({reason}); fetch the file again") from None
    return pc.struct_field(table[image], "bytes")
