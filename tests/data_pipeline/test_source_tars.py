"""Laws of the sources that are tars: every member or sample listed, its exact bytes, and no silence about damage."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build import build_dataset
from data_pipeline.config import BuildConfig
from data_pipeline.listing import write_listing
from data_pipeline.manifest import read_table
from data_pipeline.sources import packed
from data_pipeline.sources.open import open_source
from tests.helpers.sources import digit_pngs, listed_and_read, names_of
from vitscale.base.errors import EnvironmentFault, UsageError


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], *, form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_one_tar_per_class_lists_members_in_the_order_of_the_tars(tmp_path: Path, form: int) -> None:
    long = "n02/" + "x" * 80 + "/é.jpg"
    write_tar(tmp_path / "in" / "n02.tar", [(long, b"two-b"), ("n02_1.JPEG", b""), ("readme.txt", b"about")], form=form)
    write_tar(tmp_path / "in" / "n01.tar", [("n01_9.JPEG", b"one-a" * 999), ("n01_10.png", b"one-b")], form=form)
    write_tar(tmp_path / "in" / "n03.tar", [], form=form)
    listing, contents = listed_and_read(open_source(f"tars:{tmp_path / 'in'}"), tmp_path / "list")
    assert names_of(listing) == [
        "n01.tar:n01_9.JPEG",
        "n01.tar:n01_10.png",
        f"n02.tar:{long}",
        "n02.tar:n02_1.JPEG",
        "n02.tar:readme.txt",
    ]
    assert listing.classes == ("n01", "n02", "n03")
    assert (listing.labels.tolist(), listing.numbers.tolist()) == ([0, 0, 1, 1, 1], [0, 1, 2, 3, 4])
    assert contents == [b"one-a" * 999, b"one-b", b"two-b", b"", "not-an-image"]


def test_packed_inputs_are_read_in_any_order(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_tar(tmp_path / "in" / f"{name}.tar", [(f"{number}.jpg", f"{name}{number}".encode()) for number in range(5)])
    source = open_source(f"tars:{tmp_path / 'in'}")
    listing = write_listing(source, tmp_path / "list")
    rows = np.random.default_rng(0).permutation(15)
    contents = list(source.read(listing.wanted(rows)))
    assert contents == [f"{'abc'[row // 5]}{row % 5}".encode() for row in rows]


def test_chunks_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [(f"{number}.jpg", b"x") for number in range(5)])
    whole = write_listing(open_source(f"tars:{tmp_path}"), tmp_path / "whole")
    monkeypatch.setattr(packed, "CHUNK_ROWS", 2)
    assert write_listing(open_source(f"tars:{tmp_path}"), tmp_path / "parts").sha256 == whole.sha256


def test_tars_build_into_the_dataset_of_their_folders(tmp_path: Path) -> None:
    png = digit_pngs(12)
    for number, content in enumerate(png):
        path = tmp_path / "folder" / "abc"[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for name in "abc":
        files = sorted((tmp_path / "folder" / name).iterdir())
        write_tar(tmp_path / "tars" / f"{name}.tar", [(file.name, file.read_bytes()) for file in files])
    hashes = []
    for source in (f"imagefolder:{tmp_path / 'folder'}", f"tars:{tmp_path / 'tars'}"):
        out = tmp_path / f"out-{source.partition(':')[0]}"
        config = BuildConfig(source=source, shard_bytes=None, shard_images=5)
        manifest = build_dataset(config, out, workers=1, show_progress=False)
        assert manifest.images == 12
        hashes.append([shard.tar_sha256 for shard in manifest.shards])
    assert hashes[0] == hashes[1]


def sample(key: str, content: bytes, label: object = None, *, ending: str = "jpg") -> list[tuple[str, bytes]]:
    members = [(f"{key}.{ending}", content)]
    if isinstance(label, str):
        members.append((f"{key}.cls", label.encode()))
    elif label is not None:
        members.append((f"{key}.json", json.dumps(label).encode()))
    return members


def test_webdataset_lists_samples_with_the_labels_of_cls_and_json(tmp_path: Path) -> None:
    members = [
        *sample("a/0001", b"jpg", "3\n"),
        *sample("a/0002", b"jpeg", {"label": 1, "caption": "x"}, ending="jpeg"),
        *sample("a/0003", b"PNG", {"labels": [2, "0", 2]}, ending="PNG"),
        ("a/0004.txt", b"no image"),
        *sample("0005", b"webp", [3, 1], ending="webp"),
        *sample("0006", b"jpg", 2),
        *sample("0007", b"jpg", {"caption": "no label"}),
        *sample("0008", b"jpg", {"label": {"no": "label"}}),
        ("0009.json", b"{torn"),
        ("0009.jpg", b"jpg"),
        ("0010.png", b"second"),
        ("0010.jpg", b"first"),
        ("0010.seg.png", b"mask"),
    ]
    write_tar(tmp_path / "in" / "train-000001.tar", [*sample("0001", b"last", "0")])
    write_tar(tmp_path / "in" / "train-000000.tar", members)
    listing, contents = listed_and_read(open_source(f"webdataset:{tmp_path / 'in'}"), tmp_path / "list")
    keys = ["a/0001", "a/0002", "a/0003", "a/0004", *(f"{number:04d}" for number in range(5, 11))]
    assert names_of(listing) == [*(f"train-000000.tar:{key}" for key in keys), "train-000001.tar:0001"]
    assert listing.labels_of(np.arange(11)) == [[3], [1], [2, 0], [], [3, 1], [2], [], [], [], [], [0]]
    assert listing.classes == ("0", "1", "2", "3")
    images = [b"jpg", b"jpeg", b"PNG", "no-image", b"webp", b"jpg", b"jpg", "bad-label", "bad-label", b"first", b"last"]
    assert contents == images


def test_webdataset_patterns_expand_braces_and_stars(tmp_path: Path) -> None:
    for number in range(12):
        write_tar(tmp_path / f"train-{number:04d}.tar", sample("x", b"", str(number)))
    counts = {
        "train-{0000..0003}.tar": [0, 1, 2, 3],
        "train-000[89].tar": [8, 9],
        "train-001*.tar": [10, 11],
        "train-{0010,0002}.tar": [2, 10],
        "train-00{00..01}.tar": [0, 1],
        "train-0007.tar": [7],
        ".": list(range(12)),
    }
    for pattern, numbers in counts.items():
        listing = write_listing(open_source(f"webdataset:{tmp_path / pattern}"), tmp_path / "list")
        assert listing.labels.tolist() == numbers


@pytest.mark.parametrize("kind", ["manifest.json", "classnames.txt"])
def test_webdataset_takes_class_names_from_beside_the_tars(tmp_path: Path, kind: str) -> None:
    names = ["tench, Tinca", "goldfish", "shark"]
    (tmp_path / kind).write_text(json.dumps({"classes": names}) if kind == "manifest.json" else "\n".join(names) + "\n")
    write_tar(tmp_path / "a.tar", [*sample("0", b"", "2"), *sample("1", b"", "0")])
    listing = write_listing(open_source(f"webdataset:{tmp_path}"), tmp_path / "list")
    assert (listing.classes, listing.labels.tolist()) == (tuple(names), [2, 0])
    write_tar(tmp_path / "a.tar", sample("0", b"", "goldfish"))
    assert write_listing(open_source(f"webdataset:{tmp_path}"), tmp_path / "list").labels.tolist() == [1]
    write_tar(tmp_path / "a.tar", sample("0", b"", "3"))
    with pytest.raises(UsageError, match="labels below 3, the count of class names, got 3"):
        write_listing(open_source(f"webdataset:{tmp_path}"), tmp_path / "list")


def test_our_own_shards_can_be_sharded_anew(tmp_path: Path) -> None:
    first = build_dataset(BuildConfig(source="digits:eval"), tmp_path / "first", workers=1, show_progress=False)
    config = BuildConfig(source=f"webdataset:{first.directory}", shard_bytes=None, shard_images=100)
    second = build_dataset(config, tmp_path / "second", workers=1, show_progress=False)
    assert (second.images, second.images_read, second.classes) == (359, 359, first.classes)
    pairs = []
    for manifest in (first, second):
        tables = [read_table(manifest.directory / f"{shard.name}.parquet") for shard in manifest.shards]
        pairs.append(sorted((int(h), int(x)) for t in tables for h, x in zip(t["image_xxh3"], t["label"], strict=True)))
    assert pairs[0] == pairs[1]


@pytest.mark.parametrize("kind", ["tars", "webdataset"])
@pytest.mark.parametrize(
    ("pattern", "fault", "message"),
    [
        ("empty", UsageError, "expected .tar files at .*empty, found none"),
        ("none-*.tar", UsageError, "expected .tar files"),
        ("none.tar", EnvironmentFault, "expected a tar at .*none.tar, found nothing"),
        ("good-{0..2}.tar", EnvironmentFault, "good-1.tar and 1 more, found nothing"),
        ("good-{0..2.tar", UsageError, "close its braces"),
        ("s3://bucket/good.tar", UsageError, "expected tars on a local or network file system"),
        ("torn.tar", EnvironmentFault, "torn.tar cannot be read as a tar .*cut"),
        ("zeros.tar", EnvironmentFault, "zeros.tar cannot be read as a tar .*file is empty"),
        ("packed.tar", EnvironmentFault, "compressed .gzip"),
        ("text.tar", UsageError, "expected .*images .*found none"),
    ],
)
def test_tars_that_are_none_are_named(tmp_path: Path, kind: str, pattern: str, fault: type[Exception], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "zeros.tar").write_bytes(b"")
    good = write_tar(tmp_path / "good-0.tar", [("a.jpg", b"x" * 2000), ("b.jpg", b"y" * 2000)])
    (tmp_path / "torn.tar").write_bytes(good.read_bytes()[:4000])
    (tmp_path / "packed.tar").write_bytes(b"\x1f\x8b" + bytes(999))
    write_tar(tmp_path / "text.tar", [("a.txt", b"x")])
    place = pattern if "://" in pattern else tmp_path / pattern
    with pytest.raises(fault, match=message):
        write_listing(open_source(f"{kind}:{place}"), tmp_path / "list")


def test_other_tars_give_another_list(tmp_path: Path) -> None:
    hashes = []
    for members in ([("1.jpg", b"a")], [("1.jpg", b"ab")], [("2.jpg", b"a")], [("1.jpg", b"a"), ("2.jpg", b"b")]):
        write_tar(tmp_path / "a.tar", members)
        hashes.append(write_listing(open_source(f"tars:{tmp_path}"), tmp_path / "list").sha256)
    (tmp_path / "a.tar").rename(tmp_path / "b.tar")
    hashes.append(write_listing(open_source(f"tars:{tmp_path}"), tmp_path / "list").sha256)
    assert len(set(hashes)) == 5
    assert write_listing(open_source(f"tars:{tmp_path / 'b.tar'}"), tmp_path / "list").sha256 == hashes[-1]


def test_a_tar_of_tars_asks_to_be_unpacked(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "n01.tar", [("n01_1.JPEG", b"x")])
    outer = write_tar(tmp_path / "outer" / "ILSVRC2012_img_train.tar", [("n01.tar", inner.read_bytes())])
    with pytest.raises(UsageError, match=r"ILSVRC2012_img_train\.tar holds tars such as n01\.tar.*unpack it"):
        write_listing(open_source(f"tars:{outer}"), tmp_path / "list")


def test_a_tar_that_lost_its_end_since_it_was_listed_is_no_bad_image(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", [("1.jpg", b"x" * 3000)])
    source = open_source(f"tars:{file}")
    listing = write_listing(source, tmp_path / "list")
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(EnvironmentFault, match=r"a\.tar has become shorter"):
        list(source.read(listing.wanted(np.array([0]))))
