"""Laws of the sources: a sorted, numbered list, and the right bytes for every number."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from data_pipeline.build import build_dataset
from data_pipeline.config import BuildConfig
from data_pipeline.decode import decode_full
from data_pipeline.listing import write_listing
from data_pipeline.manifest import read_table
from data_pipeline.sources import folder
from data_pipeline.sources.folder import FolderSource
from data_pipeline.sources.open import open_source
from data_pipeline.sources.parquet import ParquetSource
from tests.helpers.sources import digit_pngs, listed_and_read, names_of
from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.base.files import xxh3_64


def write_parquet(path: Path, images: list[bytes | None], labels: dict[str, list], **extra: object) -> Path:
    paths = extra.get("paths", [None] * len(images))
    column = pa.array([{"bytes": b, "path": p} for b, p in zip(images, paths, strict=True)], IMAGE_TYPE)  # type: ignore[call-overload]
    table = pa.table({"img": column, **labels})
    if "class_names" in extra:
        feature = {"_type": "ClassLabel", "names": extra["class_names"]}
        features = {"info": {"features": {name: feature for name in labels}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path, row_group_size=3)
    return path


IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def test_digits_scale_17_grey_levels_to_256() -> None:
    scans = load_digits().images
    for number, content in enumerate(digit_pngs(20)):
        pixels = decode_full(content, max_pixels=64)
        expected = np.array([[round(v * 255 / 16) for v in row] for row in scans[number]])
        assert (pixels == expected[:, :, None]).all()
        assert content[25] == 0, "PNG colour type grey"


def test_folder_lists_by_class_then_path(tmp_path: Path) -> None:
    for name in ("b/2.jpg", "b/1.PNG", "b/sub/0.jpg", "b-c/9.jpeg", "a/notes.txt", "a/5.webp", "stray.jpg"):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    inputs, contents = listed_and_read(FolderSource(tmp_path / "source"), tmp_path / "list")
    assert inputs.classes == ("a", "b", "b-c")
    assert names_of(inputs) == ["stray.jpg", "a/5.webp", "a/notes.txt", "b/1.PNG", "b/2.jpg", "b/sub/0.jpg", "b-c/9.jpeg"]
    assert inputs.labels.tolist() == [-1, 0, 0, 1, 1, 1, 2]
    assert inputs.numbers.tolist() == list(range(7))
    assert contents == ["no-class", b"a/5.webp", "not-an-image", b"b/1.PNG", b"b/2.jpg", b"b/sub/0.jpg", b"b-c/9.jpeg"]


def test_parquet_numbers_rows_over_all_files(tmp_path: Path) -> None:
    png = digit_pngs(7)
    write_parquet(tmp_path / "b.parquet", png[4:], {"label": [2, 0, 1]}, paths=["x.png", None, "z.png"])
    write_parquet(tmp_path / "a.parquet", png[:4], {"label": [0, 1, 2, None]})
    inputs, contents = listed_and_read(ParquetSource(tmp_path), tmp_path / "list")
    assert inputs.labels.tolist() == [0, 1, 2, -1, 2, 0, 1]
    assert names_of(inputs) == ["a.parquet:0", "a.parquet:1", "a.parquet:2", "a.parquet:3", "x.png", "b.parquet:1", "z.png"]
    assert inputs.groups.tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert inputs.classes == ("0", "1", "2")
    assert contents == png


@pytest.mark.parametrize(
    ("columns", "label", "classes"),
    [
        ({"size": [9, 9], "label": [1, 0]}, "label", ("0", "1")),
        ({"fine_label": [0, 1], "coarse_label": [0, 0]}, "fine_label", ("0", "1")),
        ({"label": ["ant", "bee"], "kind": [0, 1]}, "label", ("ant", "bee")),
        ({"label": [True, False], "kind": [0, 1]}, "kind", ("0", "1")),
        ({"kind": [0, 1], "labels": [[2, 0], []]}, "labels", ("0", "1", "2")),
        ({"text": ["a", "b"]}, None, ()),
    ],
)
def test_parquet_finds_its_label(tmp_path: Path, columns: dict[str, list], label: str | None, classes: tuple[str, ...]) -> None:
    source = ParquetSource(write_parquet(tmp_path / "a.parquet", digit_pngs(2), columns))
    assert source.label == label
    assert write_listing(source, tmp_path / "list").classes == classes


def test_parquet_takes_class_names_from_the_schema(tmp_path: Path) -> None:
    names = ["tench, Tinca tinca", "goldfish", "shark"]
    source = ParquetSource(write_parquet(tmp_path / "a.parquet", digit_pngs(2), {"label": [1, 0]}, class_names=names))
    assert write_listing(source, tmp_path / "list").classes == tuple(names)
    wrong = ParquetSource(write_parquet(tmp_path / "b.parquet", digit_pngs(1), {"label": [3]}, class_names=names))
    with pytest.raises(UsageError, match="labels below 3"):
        write_listing(wrong, tmp_path / "list")


def test_a_parquet_build_spills_groups_and_stores_the_source_bytes(tmp_path: Path) -> None:
    png = digit_pngs(10)
    images = [*png[:5], None, b"", *png[5:]]
    file = write_parquet(tmp_path / "a.parquet", images, {"label": list(range(12))})
    config = BuildConfig(source=f"parquet:{file}", shard_bytes=None, shard_images=4)
    manifest = build_dataset(config, tmp_path / "out", workers=1, show_progress=False)
    assert manifest.rejected == {"empty": 2}
    tables = [read_table(tmp_path / "out" / f"{shard.name}.parquet") for shard in manifest.shards]
    stored = {int(k): (int(h), int(x)) for t in tables for k, h, x in zip(t["key"], t["image_xxh3"], t["label"], strict=True)}
    assert stored == {row: (xxh3_64(image), row) for row, image in enumerate(images) if image}
    assert (tmp_path / "out" / ".build").exists() is False


def test_parquet_reads_lists_of_labels_and_plain_bytes(tmp_path: Path) -> None:
    png = digit_pngs(3)
    names = ["tench", "goldfish", "shark"]
    for form in ({"feature": {"names": names}}, [{"names": names}]):
        columns = {"id": [b"a", b"b", b"c"], "img": pa.array([*png[:2], None]), "labels": [[2, 0], [], [1]]}
        table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": {"labels": form}}})})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
        listing, contents = listed_and_read(ParquetSource(tmp_path / "a.parquet"), tmp_path / "list")
        assert contents == [png[0], png[1], b""]
        assert listing.labels_of(np.arange(3)) == [[2, 0], [], [1]]
        assert listing.classes == tuple(names)
        assert names_of(listing) == ["a.parquet:0", "a.parquet:1", "a.parquet:2"]


def test_parquet_files_of_one_source_are_alike(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", digit_pngs(1), {"label": [0]})
    pq.write_table(pa.table({"img": digit_pngs(1), "label": [0]}), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"b\.parquet: expected the columns of a\.parquet, got img \(binary\)"):
        ParquetSource(tmp_path)


def test_names_that_are_not_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "b\udcff.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match="expected names in UTF-8"):
        write_listing(FolderSource(tmp_path / "in"), tmp_path / "list")


def test_a_folder_in_chunks_is_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(5):
            (tmp_path / "in" / name / f"{number}.jpg").write_bytes(b"x")
    whole = write_listing(FolderSource(tmp_path / "in"), tmp_path / "whole")
    monkeypatch.setattr(folder, "CHUNK_ROWS", 2)
    assert write_listing(FolderSource(tmp_path / "in"), tmp_path / "parts").sha256 == whole.sha256


@pytest.mark.parametrize(
    ("spec", "fault", "message"),
    [
        ("imagefolders:/x", UsageError, "did you mean 'imagefolder'"),
        ("/some/path", UsageError, "expected SOURCE as"),
        ("digits:trian", UsageError, "did you mean 'train'"),
        ("parquet:", UsageError, "expected a path"),
        ("imagefolder:{tmp}/none", EnvironmentFault, "found nothing"),
        ("parquet:{tmp}/none.parquet", EnvironmentFault, "found nothing"),
        ("parquet:{tmp}/empty", UsageError, "expected .parquet files"),
        ("parquet:{tmp}/torn.parquet", EnvironmentFault, "torn.parquet cannot be read as Parquet"),
        ("parquet:{tmp}/plain.parquet", UsageError, r"expected an image column .* found only n \(int64\)"),
        ("parquet:{tmp}/splits", UsageError, r"splits test, train.*\*train\*\.parquet"),
        ("parquet:{tmp}/named", UsageError, r"splits test, train.*\*train\*\.parquet"),
    ],
)
def test_wrong_sources_are_named(tmp_path: Path, spec: str, fault: type[Exception], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "splits").mkdir()
    (tmp_path / "named").mkdir()
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    pq.write_table(pa.table({"n": [1]}), tmp_path / "plain.parquet")
    for part in ("train", "test"):
        write_parquet(tmp_path / "splits" / f"{part}-00000-of-00001.parquet", digit_pngs(1), {"label": [0]})
        write_parquet(tmp_path / "named" / f"digits-{part}.parquet", digit_pngs(1), {"label": [0]})
    with pytest.raises(fault, match=message):
        open_source(spec.format(tmp=tmp_path))


@pytest.mark.parametrize(("file", "message"), [("a.jpg", "one folder per class"), ("a/notes.txt", "expected images")])
def test_a_folder_without_images_is_refused(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(UsageError, match=message):
        write_listing(FolderSource(tmp_path), tmp_path.with_suffix(".list"))
