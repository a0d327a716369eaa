"""Laws of the list on disk: what the source listed, in its order; another source, another hash."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from data_pipeline.listing import RECORD, read_listing, write_listing
from data_pipeline.source import Chunk, Source, Unusable, Wanted
from tests.helpers.sources import names_of
from vitscale.base.errors import EnvironmentFault, UsageError

ROOT = Path(__file__).parents[2]
DICTIONARIES = pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int8(), pa.int64())


class ListedSource(Source):
    """Lists what it was given, in chunks of three."""

    def __init__(self, labels: pa.Array | None, *, rows: int = 0, class_names: tuple[str, ...] = ()) -> None:
        self.labels, self.class_names, self.where = labels, class_names, "the table"
        self.rows = rows if labels is None else len(labels)
        self.names = pa.array([f"é/{row * row}.jpg" for row in range(self.rows)], pa.large_string())
        self.places = np.arange(3 * self.rows).reshape(-1, 3) + 7

    def list_inputs(self) -> Iterator[Chunk]:
        for start in range(0, self.rows, 3):
            part = slice(start, min(start + 3, self.rows))
            yield Chunk(
                numbers=np.arange(part.start, part.stop) * 2,
                names=self.names[part],
                labels=None if self.labels is None else self.labels[part],
                groups=np.arange(part.start, part.stop, dtype=np.int32) // 4,
                places=self.places[part],
            )

    def read(self, wanted: Wanted, *, max_bytes: int | None = None) -> Iterator[bytes | Unusable]:
        raise NotImplementedError


def lists(labels: list[list[object] | None], kind: pa.DataType | None = None) -> pa.Array:
    return pa.array(labels, pa.list_(kind or pa.string()))


def test_the_list_on_disk_is_the_list_of_the_source(tmp_path: Path) -> None:
    source = ListedSource(pa.array([4, None, 0, 2, -1, 4, 1]))
    for listing in (write_listing(source, tmp_path / "list"), read_listing(tmp_path / "list")):
        assert len(listing) == 7
        assert names_of(listing) == source.names.to_pylist()
        assert listing.names_of(np.array([5, 0])) == ["é/25.jpg", "é/0.jpg"]
        assert listing.numbers.tolist() == [0, 2, 4, 6, 8, 10, 12]
        assert listing.labels.tolist() == [4, -1, 0, 2, -1, 4, 1]
        assert listing.groups.tolist() == [0, 0, 0, 0, 1, 1, 1]
        assert (listing.classes, listing.most_labels) == (("0", "1", "2", "3", "4"), 1)
        assert listing.labels_of(np.arange(7)) is None
        wanted = listing.wanted(np.array([3, 6]))
        assert (wanted.numbers.tolist(), wanted.names) == ([6, 12], ["é/9.jpg", "é/36.jpg"])
        assert wanted.places is not None
        assert wanted.places.tolist() == source.places[[3, 6]].tolist()


def test_without_labels_there_are_no_classes(tmp_path: Path) -> None:
    listing = write_listing(ListedSource(None, rows=4), tmp_path / "list")
    assert (listing.labels.tolist(), listing.classes, listing.most_labels) == ([-1] * 4, (), 0)


def test_named_classes_are_sorted_and_numbered_texts_are_numbers(tmp_path: Path) -> None:
    named = write_listing(ListedSource(pa.array(["cat", " ant", None, "", "bee", "cat"])), tmp_path / "named")
    assert (named.labels.tolist(), named.classes) == ([2, 0, -1, -1, 1, 2], ("ant", "bee", "cat"))
    numbered = write_listing(ListedSource(pa.array(["2", "010", "-1", "0"])), tmp_path / "numbered")
    assert (numbered.labels.tolist(), len(numbered.classes)) == ([2, 10, -1, 0], 11)


@pytest.mark.parametrize("kind", [pa.string(), pa.int64(), pa.float32(), *DICTIONARIES])
def test_several_labels_keep_their_order_and_lose_their_repetitions(tmp_path: Path, kind: pa.DataType) -> None:
    rows: list[list[object] | None] = [[3, 1], [], None, [1, 1, 0, 1], [None, 2], [0]]
    is_text = kind in (pa.string(), DICTIONARIES[0])
    if is_text:
        rows = [row and [None if label is None else "abcd"[label] for label in row] for row in rows]  # type: ignore[call-overload]
    listing = write_listing(ListedSource(lists(rows, kind)), tmp_path / "list")
    assert listing.labels.tolist() == [3, -1, -1, 1, 2, 0]
    assert listing.labels_of(np.array([3, 0, 1, 2, 4])) == [[1, 0], [3, 1], [], [], [2]]
    assert listing.most_labels == 2
    assert listing.classes == tuple("abcd" if is_text else "0123")


def test_lists_of_one_label_are_single_labels(tmp_path: Path) -> None:
    listing = write_listing(ListedSource(lists([["b"], [], ["a", "a"]])), tmp_path / "list")
    assert (listing.labels.tolist(), listing.most_labels, listing.labels_of(np.array([0]))) == ([1, -1, 0], 1, None)


def test_narrowing_labels_in_the_order_asked_for(tmp_path: Path) -> None:
    labels = pa.array(["ant", "bee", "cat", None, "cat", "ant"])
    narrow = write_listing(ListedSource(labels), tmp_path / "list").narrowed(("cat", "ant"))
    assert (narrow.labels.tolist(), narrow.numbers.tolist(), narrow.classes) == ([1, 0, 0, 1], [0, 4, 8, 10], ("cat", "ant"))
    assert names_of(narrow) == ["é/0.jpg", "é/4.jpg", "é/16.jpg", "é/25.jpg"]
    assert narrow.wanted(np.array([1])).names == ["é/4.jpg"]


def test_narrowing_keeps_an_image_for_any_wanted_label(tmp_path: Path) -> None:
    labels = lists([["a", "b", "c"], ["b"], ["c", "a"], [], ["b", "d"], ["d"]])
    narrow = write_listing(ListedSource(labels), tmp_path / "list").narrowed(("d", "c", "b"))
    assert narrow.numbers.tolist() == [0, 2, 4, 8, 10]
    assert narrow.labels.tolist() == [2, 2, 1, 2, 0]
    assert narrow.labels_of(np.arange(5)) == [[2, 1], [2], [1], [2, 0], [0]]
    alone = write_listing(ListedSource(labels), tmp_path / "list").narrowed(("a",))
    assert (alone.numbers.tolist(), alone.most_labels, alone.labels_of(np.array([0]))) == ([0, 4], 1, None)


@pytest.mark.parametrize(("wanted", "message"), [(("ant", "bees"), "did you mean 'bee'"), (("ant", "ant"), "twice")])
def test_narrowing_refuses_wrong_names(tmp_path: Path, wanted: tuple[str, ...], message: str) -> None:
    listing = write_listing(ListedSource(pa.array(["ant", "bee"])), tmp_path / "list")
    with pytest.raises(UsageError, match=message):
        listing.narrowed(wanted)


def test_another_source_has_another_hash(tmp_path: Path) -> None:
    base = pa.array([0, 1, 2, 0])
    sources = [ListedSource(base), ListedSource(pa.array([0, 1, 2, 1])), ListedSource(base[:3])]
    sources += [ListedSource(base, class_names=("a", "b", "c")), ListedSource(base)]
    sources[-1].places += 1
    sources += [ListedSource(base), ListedSource(lists([["0", "1"], ["1"], ["2"], ["0"]]))]
    sources[-2].names = pa.array(["a", "b", "c", "d"], pa.large_string())
    hashes = [write_listing(source, tmp_path / "list").sha256 for source in sources]
    assert len(set(hashes)) == len(hashes)
    assert write_listing(ListedSource(base), tmp_path / "list").sha256 == hashes[0]
    assert read_listing(tmp_path / "list").sha256 == hashes[0]


def test_an_equal_list_leaves_the_files_of_its_readers_alone(tmp_path: Path) -> None:
    source = ListedSource(pa.array(["a", "b"]))
    write_listing(source, tmp_path / "list")
    before = {path.name: path.stat().st_ino for path in (tmp_path / "list").iterdir()}
    write_listing(source, tmp_path / "list")
    assert {path.name: path.stat().st_ino for path in (tmp_path / "list").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["list"]


def test_an_unfinished_list_is_no_list(tmp_path: Path) -> None:
    write_listing(ListedSource(pa.array([0, 1])), tmp_path / "list")
    (tmp_path / "list" / "labels.i32").write_bytes(b"1234")
    with pytest.raises(EnvironmentFault, match=r"labels\.i32: expected 2 numbers, found 1"):
        read_listing(tmp_path / "list")
    (tmp_path / "list" / RECORD).write_text("{}")
    with pytest.raises(EnvironmentFault, match="no record of a list"):
        read_listing(tmp_path / "list")
    (tmp_path / "list" / RECORD).unlink()
    with pytest.raises(EnvironmentFault, match=RECORD):
        read_listing(tmp_path / "list")


MEASURE = r"""
import re, sys
import subprocess
import sys
from pathlib import Path
from data_pipeline.listing import write_listing
from data_pipeline.sources.open import open_source

listing = write_listing(open_source("table:" + sys.argv[1]), Path(sys.argv[2]))
# Not ru_maxrss: a child begins with the peak of its parent.
print(len(listing), re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_listing_a_longer_table_takes_no_more_memory(tmp_path: Path, ending: str) -> None:
    """In memory a row would take 80 bytes packed, 200 as Python strings; up to 45 come from pools that still fill."""
    peaks = {}
    for rows in (250_000, 1_250_000):
        columns = {
            "path": [f"train/n{row % 1000:08d}/n{row % 1000:08d}_{row}.JPEG" for row in range(rows)],
            "labels": [f"n{row % 1000:08d}|n{row % 777:08d}" for row in range(rows)],
        }
        file = tmp_path / f"{rows}.{ending}"
        if ending == "csv":
            csv.write_csv(pa.table(columns), file)
        else:
            pq.write_table(pa.table(columns), file, row_group_size=rows)
        arguments = [sys.executable, "-c", MEASURE, str(file), str(tmp_path / f"{rows}.list")]
        ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
        listed, peak_kb = map(int, ended.stdout.split())
        assert listed == rows
        peaks[rows] = peak_kb * 1024
    assert (peaks[1_250_000] - peaks[250_000]) / 1_000_000 < 60, "bytes of memory per row"


@pytest.mark.parametrize(
    ("labels", "class_names", "message"),
    [
        (pa.array([0, 3]), ("a", "b"), "labels below 2, the count of class names, got 3"),
        (pa.array(["a", "c"]), ("a", "b"), "one of its 2 class names, got the label 'c'"),
        (pa.array([0, 1_000_000]), (), "got 1000000, an identifier"),
        (pa.array(["0", "1000000"]), (), "got 1000000, an identifier"),
        (pa.array(["0", "9" * 5000]), (), "got 9{40}, an identifier"),
        (pa.array([2**63], pa.uint64()), (), "expected whole numbers as labels"),
        (pa.array([0.5]), (), "expected whole numbers as labels"),
        (pa.array([b"\xff"]).view(pa.string()), (), "expected labels in UTF-8"),
        (pa.array([b"x"]), (), "expected labels as whole numbers, names or lists of them, got binary"),
        (pa.array(["7", "12", "1o"]), (), "all numbers or all names, got '7' and '1o'"),
        (pa.array([], pa.int64()), (), "expected images in the table, found none"),
    ],
)
def test_labels_that_are_no_classes_are_refused(
    tmp_path: Path, labels: pa.Array, class_names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        write_listing(ListedSource(labels, class_names=class_names), tmp_path / "list")
    assert not (tmp_path / "list").exists()
