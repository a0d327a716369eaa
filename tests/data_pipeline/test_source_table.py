"""Laws of tables: rows in their order, labels in every form, and a path to nothing is a reject."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.build import build_dataset
from data_pipeline.config import BuildConfig
from data_pipeline.listing import Listing, write_listing
from data_pipeline.manifest import REJECTS, read_table
from data_pipeline.sources.open import open_source
from tests.helpers.sources import digit_pngs, listed_and_read, names_of
from vitscale.base.errors import EnvironmentFault, UsageError


def table(path: Path, columns: dict[str, object]) -> Path:
    """A table in the form its ending says."""
    arrow = pa.table(columns)
    if path.suffix == ".csv":
        cells = [["" if cell is None else str(cell) for cell in column.to_pylist()] for column in arrow.columns]
        quoted = [[f'"{cell}"' if "," in cell else cell for cell in row] for row in zip(*cells, strict=True)]
        path.write_text("".join(",".join(row) + "\n" for row in [arrow.column_names, *quoted]))
    else:
        pq.write_table(arrow, path)
    return path


def listed(path: Path) -> Listing:
    return write_listing(open_source(f"table:{path}"), path.with_suffix(".list"))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_rows_keep_their_order_and_paths_start_at_the_table(tmp_path: Path, ending: str) -> None:
    png = digit_pngs(3)
    (tmp_path / "images").mkdir()
    for number, content in enumerate(png):
        (tmp_path / "images" / f"{number}.png").write_bytes(content)
    absolute = str(tmp_path / "images" / "0.png")
    paths = ["images/2.png", absolute, "images/gone.png", None, "images", "images/1.png", "images/2.png/x", "x" * 999]
    labels = ["shark", "tench, Tinca", "shark", None, "shark", "tench, Tinca", "shark", "goldfish"]
    file = table(tmp_path / f"t.{ending}", {"id": list(range(8)), "path": paths, "label": labels})
    listing, contents = listed_and_read(open_source(f"table:{file}"), tmp_path / "list")
    assert listing.numbers.tolist() == list(range(8))
    assert names_of(listing) == [path or "" for path in paths]
    assert listing.classes == ("goldfish", "shark", "tench, Tinca")
    assert listing.labels.tolist() == [1, 2, 1, -1, 1, 2, 1, 0]
    missing = "missing-file"
    assert contents == [png[2], png[0], missing, missing, "not-a-file", png[1], missing, missing]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_numbers_are_numbers(tmp_path: Path, ending: str) -> None:
    for kind in (pa.int64(), pa.uint8(), pa.float64(), pa.string()):
        column = pa.array([10, None, 2, 0]).cast(kind)
        listing = listed(table(tmp_path / f"{kind}.{ending}", {"path": ["a", "b", "c", "d"], "class": column}))
        if not (ending == "csv" and kind == pa.float64()):
            assert listing.labels.tolist() == [10, -1, 2, 0]
            assert listing.classes == tuple(str(number) for number in range(11))


def test_several_labels_as_text_are_split_at_bars_or_else_at_spaces(tmp_path: Path) -> None:
    cases = {
        "bars": (["tench, Tinca|great white", "", " goldfish ", "goldfish | tench, Tinca"], [[2, 1], [], [0], [0, 2]]),
        "spaces": (["7 3", "", " 12", "3  12 3"], [[7, 3], [], [12], [3, 12]]),
        "names": (["b a", "c", "a", "a b"], [[1, 0], [2], [0], [0, 1]]),
    }
    for name, (texts, expected) in cases.items():
        for ending in ("csv", "parquet"):
            listing = listed(table(tmp_path / f"{name}.{ending}", {"path": list("abcd"), "labels": texts}))
            assert listing.labels_of(np.arange(4)) == expected
            assert listing.labels.tolist() == [(labels or [-1])[0] for labels in expected]


@pytest.mark.parametrize("kind", [pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_text_may_have_any_form_of_arrow(tmp_path: Path, kind: pa.DataType) -> None:
    columns = {"path": pa.array(["x", "y"]).cast(kind), "labels": pa.array(["b|a", None]).cast(kind)}
    listing = listed(table(tmp_path / "t.parquet", columns))
    assert (names_of(listing), listing.labels_of(np.arange(2))) == (["x", "y"], [[1, 0], []])


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.string()), pa.list_(pa.float32())])
def test_several_labels_as_lists(tmp_path: Path, kind: pa.DataType) -> None:
    labels = [[3, 1], [], None, [0]]
    texts = [row and [str(label) for label in row] for row in labels]
    column = pa.array(texts if pa.types.is_large_list(kind) else labels, kind)
    listing = listed(table(tmp_path / "t.parquet", {"path": list("abcd"), "labels": column}))
    assert listing.labels_of(np.arange(4)) == [[3, 1], [], [], [0]]


def test_thirty_thousand_classes_and_many_labels_per_image(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    truth = [list(set(generator.integers(0, 30_000, generator.integers(0, 12)).tolist())) for _ in range(20_000)]
    texts = ["|".join(f"entity_{label:05d}" for label in labels) for labels in truth]
    listing = listed(table(tmp_path / "t.csv", {"path": [f"{row}.jpg" for row in range(len(truth))], "labels": texts}))
    used = sorted({label for labels in truth for label in labels})
    assert listing.classes == tuple(f"entity_{label:05d}" for label in used)
    number_of = {label: number for number, label in enumerate(used)}
    assert listing.labels_of(np.arange(len(truth))) == [[number_of[label] for label in labels] for labels in truth]
    assert listing.most_labels == max(map(len, truth))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_without_labels_there_are_no_classes(tmp_path: Path, ending: str) -> None:
    listing = listed(table(tmp_path / f"t.{ending}", {"path": ["b", "a"], "size": [1, 2]}))
    assert (listing.classes, listing.most_labels, listing.labels.tolist()) == ((), 0, [-1, -1])


def test_a_csv_may_have_quotes_windows_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes('\ufeffpath,label\r\n"a,b.jpg",NA\r\nc.jpg,"né ""1"""\r\n'.encode())
    listing = listed(tmp_path / "t.csv")
    assert names_of(listing) == ["a,b.jpg", "c.jpg"]
    assert (listing.classes, listing.labels.tolist()) == (("NA", 'né "1"'), [0, 1])


def test_a_late_name_is_not_taken_for_the_number_its_column_began_with(tmp_path: Path) -> None:
    rows = 200_000  # more than the first block of a CSV
    paths = [f"{row:06d}.jpg" for row in range(rows)]
    (tmp_path / "t.csv").write_text("path,label\n" + "".join(f"{path},1\n" for path in paths) + "x.jpg,one\n")
    with pytest.raises(UsageError, match="all numbers or all names, got '1' and 'one'"):
        listed(tmp_path / "t.csv")


def test_missing_files_are_rejected_and_the_rest_is_built(tmp_path: Path) -> None:
    png = digit_pngs(4)
    for number, content in enumerate(png):
        (tmp_path / f"{number}.png").write_bytes(content)
    paths = ["3.png", "gone.png", "0.png", "1.png", "also/gone.png", "2.png"]
    file = table(tmp_path / "t.csv", {"path": paths, "label": list("abcabc")})
    config = BuildConfig(source=f"table:{file}", shard_bytes=None, shard_images=3)
    manifest = build_dataset(config, tmp_path / "out", workers=1, show_progress=False)
    assert (manifest.images, manifest.rejected, manifest.classes) == (4, {"missing-file": 2}, ("a", "b", "c"))
    assert read_table(tmp_path / "out" / REJECTS)["source"].tolist() == ["gone.png", "also/gone.png"]


@pytest.mark.parametrize(
    ("name", "content", "fault", "message"),
    [
        ("none.csv", None, EnvironmentFault, "expected a table at .*none.csv, found nothing"),
        ("t.tsv", b"path\tlabel\n", UsageError, "FILE.csv or FILE.parquet, got 't.tsv'"),
        ("t.csv", b"paths,label\na,1\n", UsageError, "a column path, got paths, label; did you mean 'paths'"),
        ("t.csv", b"path,label,labels\na,1,2\n", UsageError, "one column of labels, got label and labels"),
        ("t.csv", b"", UsageError, "cannot be read as CSV .*[Ee]mpty"),
        ("t.csv", b"path,label\n", UsageError, "expected rows in .*t.csv, found none"),
        ("t.csv", b"path,label\na,1\nb\n", UsageError, "cannot be read as CSV .*Expected 2 columns, got 1"),
        ("t.csv", b"path,label\n\xff\xfe.jpg,1\n", UsageError, "cannot be read as CSV in UTF-8"),
        ("t.csv", b'path,labels\na,"[1, 2]"\n', UsageError, r"as 3\|17 in column labels, got '\[1, 2\]'"),
        ("t.csv", b"path,label\na,1\nb,1o\n", UsageError, "all numbers or all names"),
        ("t.parquet", b"PAR1 torn", EnvironmentFault, "t.parquet cannot be read as Parquet"),
    ],
)
def test_tables_that_are_none_are_named(
    tmp_path: Path, name: str, content: bytes | None, fault: type[Exception], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(fault, match=message):
        listed(tmp_path / name)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": [1, 2], "label": [[0.5], [1.0]]}, "expected whole numbers as labels"),
        ({"path": ["a", "b"], "label": [True, False]}, "whole numbers, names or lists of them, got bool"),
        ({"path": pa.array([b"a", b"\xff"]).view(pa.string())}, "expected names in UTF-8"),
        ({"path": [["a"], ["b"]]}, "paths as text in column path, got list"),
    ],
)
def test_columns_that_are_none_are_named(tmp_path: Path, columns: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        listed(table(tmp_path / "t.parquet", columns))
