"""Laws of an index of foreign tars: it trains, it says what it leaves out, it continues, and the tars stay as they are."""

import io
import json
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.decode import encode_png
from data_pipeline.foreign import index_dataset
from data_pipeline.loader import eval_stream, train_stream
from data_pipeline.manifest import Manifest, read_index, read_manifest, read_table
from data_pipeline.places import find_tars
from data_pipeline.storage import check_files
from data_pipeline.verify import verify_dataset
from tests.helpers.mutants import whole_images
from tests.helpers.object_store import serve
from tests.helpers.shards import smooth_image
from vitscale.base.errors import BadDataError, EnvironmentFault, UsageError

Files = Sequence[tuple[str, bytes]]


def write_tar(path: Path, files: Files, *, form: int = tarfile.GNU_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def picture(number: int) -> bytes:
    return encode_png(smooth_image(np.random.default_rng(number), 10 + number % 3, 12))


def labelled(numbers: Sequence[int], *, folder: str = "./") -> list[tuple[str, bytes]]:
    """Label first, as GNU tar and WebDataset sort the members of a sample."""
    files = []
    for number in numbers:
        files += [(f"{folder}{number:04d}.cls", b"%d\n" % (number % 5)), (f"{folder}{number:04d}.PNG", picture(number))]
    return files


def index_all(source: Path | str, out: Path, **options: object) -> Manifest:
    return index_dataset(find_tars(str(source)), out=out, show_progress=False, **options)  # type: ignore[arg-type]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    for shard, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)):
        write_tar(tmp_path / "tars" / f"part-{shard}.tar", labelled(range(10 * shard, 10 * shard + 10 - shard)), form=form)
    return tmp_path / "tars"


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


def shown(manifest: Manifest) -> list[int]:
    """Labels of an epoch of training followed by those of an evaluation."""
    data = DataConfig(path=str(manifest.directory), workers=0, lanes=2, window=8)
    shape = {"data": data, "augment": AugmentConfig(), "image_size": 8, "rank": 0, "world": 1, "micro_batch": 9}
    found: list[int] = []
    stream = train_stream([manifest], seed=3, global_batch=9, position=0, **shape)  # type: ignore[arg-type]
    for _, batch in zip(range(manifest.images // 9), stream, strict=False):
        found += batch.labels_B.tolist()
    stream.close()
    with_eval = eval_stream(manifest, **shape)  # type: ignore[arg-type]
    for batch in with_eval:
        found += batch.labels_B[batch.counted_B].tolist()
    with_eval.close()
    return found


@pytest.mark.parametrize("place", ["beside", "apart"])
def test_foreign_tars_train_and_evaluate(tars: Path, tmp_path: Path, place: str) -> None:
    before = files_of(tars)
    out = tars if place == "beside" else tmp_path / "index"
    manifest = index_all(tars, out)
    assert (manifest.images, manifest.images_read, manifest.rejected, manifest.most_labels) == (27, 27, {}, 1)
    assert manifest.classes == ("0", "1", "2", "3", "4")
    assert manifest.tars_at == str(tars)
    assert [shard.images for shard in manifest.shards] == [10, 9, 8]
    check_files(manifest)
    labels = shown(manifest)
    expected = [number % 5 for number in (*range(10), *range(10, 19), *range(20, 28))]
    assert sorted(labels[:27]) == sorted(expected)
    assert labels[27:] == expected
    assert verify_dataset(manifest, workers=1, show_progress=False) == []
    assert {name: content for name, content in files_of(tars).items() if name.endswith(".tar")} == before


def test_rows_hold_what_the_members_say(tars: Path, tmp_path: Path) -> None:
    manifest = index_all(tars, tmp_path / "index")
    index, rows = read_index(manifest, 1), read_table(tmp_path / "index" / "part-1.parquet")
    assert [bytes(key).decode() for key in index.keys] == [f"./{number:04d}" for number in range(10, 19)]
    tar = (tars / "part-1.tar").read_bytes()
    for row, number in enumerate(range(10, 19)):
        offset, size = int(index.image_offset[row]), int(index.image_size[row])
        assert tar[offset : offset + size] == picture(number)
        assert (rows["width"][row], rows["height"][row], rows["format"][row]) == (12, 10 + number % 3, "png")
    assert rows["source"][0] == "part-1.tar:./0010.PNG"


def test_place_and_workers_change_no_byte(tars: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert index_all(tars, one).fingerprint == index_all(tars, two, workers=2).fingerprint
    assert files_of(one) == files_of(two)
    assert index_all(tars, tars).fingerprint == read_manifest(one).fingerprint


def test_everything_unusable_is_named_with_its_reason(tmp_path: Path) -> None:
    huge = bytearray(picture(1))
    huge[16:24] = (60000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    files = [
        ("good.png", picture(0)),
        ("good.cls", b"1"),
        ("README", b"about"),
        ("text.txt", b"no image"),
        ("text.cls", b"1"),
        ("cut.jpg", b""),
        ("cut.cls", b"1"),
        ("what.jpg", b"no image at all"),
        ("what.cls", b"1"),
        ("large.png", bytes(huge)),
        ("large.cls", b"1"),
        ("named.png", picture(2)),
        ("named.cls", b"cat"),
        ("far.png", picture(3)),
        ("far.cls", b"123456789"),
        ("odd.png", picture(4)),
        ("odd.json", b"{broken"),
        ("alone.png", picture(5)),
        ("good.png", picture(6)),
        ("._good.png", b"mac"),
    ]
    write_tar(tmp_path / "a.tar", files)
    manifest = index_all(tmp_path, tmp_path)
    rejects = read_table(tmp_path / "rejects.parquet")
    assert dict(zip(rejects["source"], rejects["reason"], strict=True)) == {
        "a.tar:README": "no-key",
        "a.tar:text": "no-image",
        "a.tar:cut.jpg": "empty",
        "a.tar:what.jpg": "unknown-format",
        "a.tar:large.png": "too-many-pixels",
        "a.tar:named.png": "bad-label",
        "a.tar:far.png": "bad-label",
        "a.tar:odd.png": "bad-label",
        "a.tar:alone.png": "no-label",
        "a.tar:good.png": "duplicate-key",
        "a.tar:._good.png": "no-key",
    }
    assert (manifest.images, manifest.images_read) == (1, 12)
    assert sum(manifest.rejected.values()) == 11
    assert verify_dataset(manifest, workers=1, show_progress=False) == []


def test_a_picture_of_endless_scans_is_refused_by_its_header(tmp_path: Path) -> None:
    progressive = whole_images()[2]
    last = progressive.rfind(b"\xff\xda")
    endless = progressive[:-2] + progressive[last:-2] * 200 + progressive[-2:]
    write_tar(tmp_path / "a.tar", [("0.jpg", progressive), ("1.jpg", endless)])
    assert index_all(tmp_path, tmp_path).rejected == {"decode-error": 1}


def test_tars_without_any_label_are_a_dataset_without_labels(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{number}.png", picture(number)) for number in range(4)])
    manifest = index_all(tmp_path, tmp_path)
    assert (manifest.images, manifest.classes, manifest.most_labels) == (4, (), 0)
    assert read_index(manifest, 0).label.tolist() == [-1] * 4


def test_an_unlabelled_tar_among_labelled_ones_is_left_out(tars: Path) -> None:
    write_tar(tars / "none.tar", [("x.png", picture(1)), ("y.png", picture(2))])
    manifest = index_all(tars, tars)
    assert manifest.rejected == {"no-label": 2}
    assert [shard.name for shard in manifest.shards] == ["part-0", "part-1", "part-2"]
    assert not (tars / "none.parquet").exists()
    assert len(shown(manifest)) == 54


def test_json_labels_and_class_names(tmp_path: Path) -> None:
    records = [{"labels": [2, 0, 2]}, {"label": "dog", "width": 3}, [1], "cat", {"caption": "x"}, {"labels": []}]
    files = []
    for number, record in enumerate(records):
        files += [(f"{number}.json", json.dumps(record).encode()), (f"{number}.png", picture(number))]
    write_tar(tmp_path / "a.tar", files)
    manifest = index_all(tmp_path, tmp_path, classes=("cat", "dog", "hen"))
    index = read_index(manifest, 0)
    assert (manifest.classes, manifest.most_labels, manifest.rejected) == (("cat", "dog", "hen"), 2, {"no-label": 2})
    assert index.labels is not None
    assert [labels.tolist() for labels in index.labels] == [[2, 0], [1], [1], [0]]
    assert index.label.tolist() == [2, 1, 1, 0]
    assert verify_dataset(manifest, workers=1, show_progress=False) == []


def test_full_decoding_finds_what_headers_hide(tmp_path: Path) -> None:
    damaged = bytearray(picture(1))
    damaged[damaged.find(b"IDAT") + 20] ^= 1
    write_tar(tmp_path / "a.tar", [("0.png", picture(0)), ("1.png", bytes(damaged))])
    assert index_all(tmp_path, tmp_path / "quick").images == 2
    assert index_all(tmp_path, tmp_path / "full", is_full=True).rejected == {"decode-error": 1}


def test_an_interrupted_index_keeps_unchanged_tars(tars: Path, tmp_path: Path) -> None:
    whole = index_all(tars, tmp_path / "whole")
    out = tmp_path / "out"
    (tars / "part-1.tar").rename(tmp_path / "away")
    (tars / "part-1.tar").write_bytes((tmp_path / "away").read_bytes()[:1800])
    with pytest.raises(EnvironmentFault, match=r"part-1\.tar: .* is cut"):
        index_all(tars, out)
    assert not (out / "manifest.json").exists()
    kept = (out / "part-0.parquet").stat().st_mtime_ns
    (tmp_path / "away").rename(tars / "part-1.tar")
    (out / "part-2.parquet").write_bytes(b"damaged by something else")
    assert index_all(tars, out).fingerprint == whole.fingerprint
    assert files_of(out) == files_of(tmp_path / "whole")
    assert (out / "part-0.parquet").stat().st_mtime_ns == kept
    assert not (out / ".index").exists()


def test_damaged_tars_can_be_left_out_by_name(tars: Path) -> None:
    (tars / "part-1.tar").write_bytes((tars / "part-1.tar").read_bytes()[:-9000])
    manifest = index_all(tars, tars, skip_damaged=True)
    assert (manifest.images, manifest.images_read, manifest.rejected) == (18, 19, {"damaged-tar": 1})
    rejects = read_table(tars / "rejects.parquet")
    assert (rejects["input"].tolist(), rejects["source"].tolist()) == ([0], ["part-1.tar"])


def test_a_complete_index_is_found_again_and_a_changed_one_refused(tars: Path, tmp_path: Path) -> None:
    manifest = index_all(tars, tmp_path / "index")
    assert index_all(tars, tmp_path / "index").fingerprint == manifest.fingerprint
    with pytest.raises(UsageError, match="other --classes or without --full"):
        index_all(tars, tmp_path / "index", classes=("a", "b", "c", "d", "e"))
    write_tar(tars / "part-2.tar", labelled(range(40, 90)))
    with pytest.raises(UsageError, match=r"part-2\.tar has changed"):
        index_all(tars, tmp_path / "index")
    write_tar(tars / "part-3.tar", labelled(range(90, 92)))
    with pytest.raises(UsageError, match=r"index of 3 tars, .* has 4"):
        index_all(tars, tmp_path / "index")


def test_an_unfinished_build_is_not_indexed(tars: Path) -> None:
    (tars / ".build").mkdir()
    with pytest.raises(UsageError, match="an unfinished build"):
        index_all(tars, tars)


def test_nothing_usable_is_no_dataset(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0.txt", b"x"), ("1.txt", b"y")])
    with pytest.raises(BadDataError, match="none can be used, mostly no-image"):
        index_all(tmp_path, tmp_path)


def test_verify_names_what_is_damaged_in_foreign_tars(tars: Path, tmp_path: Path) -> None:
    manifest = index_all(tars, tmp_path / "index")
    index = read_index(manifest, 0)
    tar = bytearray((tars / "part-0.tar").read_bytes())
    tar[int(index.image_offset[4]) + 20] ^= 1
    tar[int(index.image_offset[7]) - 1024] = ord("4")  # the label of sample 7, which says 2
    (tars / "part-0.tar").write_bytes(tar)
    (tars / "part-2.tar").unlink()
    found = verify_dataset(manifest, workers=1, show_progress=False)
    assert [line.split(":")[0] for line in found] == ["part-0.tar"] * 3 + ["part-2.tar"]
    assert "image ./0004: its bytes" in found[1]
    assert "image ./0007: expected ./0007.png with label 2 in the tar, found ./0007.PNG with label 4" in found[2]
    assert found[3].endswith("missing")


def test_tars_on_an_object_store_are_indexed_and_verified(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = index_all(tars, tmp_path / "local")
    with serve() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        server.objects.update({f"bucket/far/{name}": content for name, content in files_of(tars).items()})
        server.objects["bucket/far/below/other.tar"] = b"not looked at"
        remote = index_all("s3://bucket/far", tmp_path / "remote")
        assert (remote.fingerprint, remote.tars_at) == (local.fingerprint, "s3://bucket/far")
        assert verify_dataset(remote, workers=1, show_progress=False) == []
        some = index_all(f"{server.url}/bucket/far/part-{{0..1}}.tar", tmp_path / "some")
        assert [shard.name for shard in some.shards] == ["part-0", "part-1"]
        with pytest.raises(UsageError, match="found none"):
            find_tars("s3://bucket/near")
    assert sorted(path.name for path in (tmp_path / "remote").iterdir()) == sorted([*files_of(tmp_path / "local")])


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["part-0", "part-1", "part-2"]),
        ("part-*.tar", ["part-0", "part-1", "part-2"]),
        ("part-{0..1}.tar", ["part-0", "part-1"]),
        ("part-{2,0}.tar", ["part-0", "part-2"]),
    ],
)
def test_patterns_name_tars(tars: Path, pattern: str, names: list[str]) -> None:
    found = find_tars(f"{tars}/{pattern}" if pattern else str(tars))
    assert (found.at, list(found.names)) == (str(tars), names)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("x-*.tar", "found none"), ("part-{0..7}.tar", "part-3.tar, which is none"), ("part-{7..0}.tar", "ascending range")],
)
def test_patterns_that_name_nothing_are_usage_errors(tars: Path, pattern: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_tars(f"{tars}/{pattern}")
