"""Laws of images without a label: among labelled ones they are rejected by name, alone they are a dataset."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.manifest import REJECTS, Manifest, read_table, write_table
from tests.helpers.builds import builds, photograph, rows_of
from vitscale.base.errors import BadDataError, UsageError

LABELS = ["ant", None, "bee", "ant", None, "bee"]


def parquet(root: Path, labels: list[str | None]) -> str:
    images = [{"bytes": photograph(number), "path": f"{number}.jpg"} for number in range(len(labels))]
    write_table(root / "images.parquet", {"image": images, "label": labels})
    return f"parquet:{root / 'images.parquet'}"


def table(root: Path, labels: list[str | None]) -> str:
    for number in range(len(labels)):
        (root / f"{number}.jpg").write_bytes(photograph(number))
    rows = [f"{number}.jpg,{label or ''}\n" for number, label in enumerate(labels)]
    (root / "table.csv").write_text("path,label\n" + "".join(rows))
    return f"table:{root / 'table.csv'}"


def webdataset(root: Path, labels: list[str | None]) -> str:
    with tarfile.open(root / "some.tar", "w") as tar:
        for number, label in enumerate(labels):
            contents = {"jpg": photograph(number)} | ({"cls": label.encode()} if label else {})
            for ending, content in contents.items():
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return f"webdataset:{root}"


Maker = Callable[[Path, list[str | None]], str]
MAKERS = pytest.mark.parametrize("make", [parquet, table, webdataset])


def build(root: Path, source: str, **options: object) -> Manifest:
    [manifest] = builds(root / "out", source, **options)
    return manifest


@MAKERS
def test_images_without_a_label_among_labelled_ones_are_rejected_by_name(tmp_path: Path, make: Maker) -> None:
    manifest = build(tmp_path, make(tmp_path, LABELS))
    assert (manifest.images, manifest.images_read, manifest.rejected) == (4, 6, {"no-label": 2})
    assert sorted(rows_of(manifest)["label"].tolist()) == [0, 0, 1, 1]
    rejects = read_table(tmp_path / "out" / REJECTS)
    assert rejects["input"].tolist() == [1, 4]
    assert set(rejects["reason"]) == {"no-label"}


@MAKERS
def test_a_source_without_labels_is_built_without(tmp_path: Path, make: Maker) -> None:
    source = make(tmp_path, [None] * 4)
    manifest = build(tmp_path, source)
    assert (manifest.images, manifest.rejected, manifest.most_labels) == (4, {}, 0)
    assert set(rows_of(manifest)["label"].tolist()) == {-1}
    with pytest.raises(UsageError, match=r"--per-class needs classes"):
        builds(tmp_path / "other", source, per_class=1)


def test_a_missing_label_stops_the_build_when_asked(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match=r"1\.jpg cannot be used \(no-label: others of the source have one\)"):
        build(tmp_path, parquet(tmp_path, LABELS), on_bad="stop")


def test_what_has_no_label_is_of_no_wanted_class(tmp_path: Path) -> None:
    source = table(tmp_path, LABELS)
    [by_class] = builds(tmp_path / "by-class", source, classes=("bee",))
    [per_class] = builds(tmp_path / "per-class", source, per_class=1)
    (tmp_path / "map.csv").write_text("ant,insect\n")
    [mapped] = builds(tmp_path / "mapped", source, labels=str(tmp_path / "map.csv"))
    for manifest in (by_class, per_class, mapped):
        assert (manifest.images, manifest.rejected, manifest.build["left_out"]) == (2, {}, 4)
