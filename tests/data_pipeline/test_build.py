"""Laws of a build: what comes out, in which bytes, and who is accounted for."""

import io
import itertools
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.build import build_dataset
from data_pipeline.config import BuildConfig
from data_pipeline.manifest import MANIFEST, REJECTS, Manifest, read_manifest, read_table
from data_pipeline.workshop import forget_dataset
from vitscale.base.errors import BadDataError, UsageError
from vitscale.base.files import read_json, xxh3_64


def picture(shade: int, *, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(shade).integers(0, 256, (8 + 9 * (shade % 7), 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def image_folder(root: Path, *, per_class: int = 5, classes: tuple[str, ...] = ("ant", "bee", "cat")) -> Path:
    for label, name in enumerate(classes):
        for number in range(per_class):
            path = root / name / f"{number:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(100 * label + number))
    return root


def build(out: Path, source: str, *, workers: int = 1, **options: object) -> Manifest:
    if "shard_images" in options:
        options["shard_bytes"] = None
    return build_dataset(BuildConfig(source=source, **options), out, workers=workers, show_progress=False)  # type: ignore[arg-type]


def all_rows(manifest: Manifest) -> dict[str, np.ndarray]:
    tables = [read_table(manifest.directory / f"{shard.name}.parquet") for shard in manifest.shards]
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return build(tmp_path_factory.mktemp("digits"), "digits:train", shard_bytes=16_000)


def test_digits_fill_many_shards(digits: Manifest) -> None:
    assert len(digits.shards) >= 8


def test_digits_split_by_every_fifth_scan(digits: Manifest, tmp_path: Path) -> None:
    held_out = build(tmp_path, "digits:eval")
    keys = [sorted(int(key) for key in all_rows(manifest)["key"]) for manifest in (digits, held_out)]
    assert [digits.images, held_out.images] == [1438, 359]
    assert keys[1] == list(range(4, 1797, 5))
    assert sorted(keys[0] + keys[1]) == list(range(1797))
    assert digits.classes == held_out.classes == tuple("0123456789")


def test_shards_by_bytes_are_uneven_and_within_the_limit(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source", per_class=30)
    out = tmp_path / "out"
    manifest = build(out, f"imagefolder:{source}", shard_bytes=8_000)
    sizes = [read_table(out / f"{shard.name}.parquet")["image_size"] for shard in manifest.shards]
    assert len(sizes) >= 8
    assert len({len(of_shard) for of_shard in sizes}) > 2
    assert all(of_shard.sum() <= 8_000 for of_shard in sizes)
    assert all(now.sum() + then[0] > 8_000 for now, then in itertools.pairwise(sizes))


def test_shards_by_count_leave_the_rest_to_the_last(tmp_path: Path) -> None:
    manifest = build(tmp_path, "digits:eval", shard_images=100)
    assert [(shard.name, shard.images) for shard in manifest.shards] == [
        ("train-000000", 100),
        ("train-000001", 100),
        ("train-000002", 100),
        ("train-000003", 59),
    ]


def test_the_order_is_a_seeded_permutation(digits: Manifest, tmp_path: Path) -> None:
    keys = all_rows(digits)["key"].tolist()
    other = all_rows(build(tmp_path, "digits:train", shard_bytes=16_000, seed=1))["key"].tolist()
    assert sorted(keys) == sorted(other) != keys != other
    labels = all_rows(digits)["label"][:160]
    assert len(set(labels[:40].tolist())) == 10, "one shard holds every class"


def test_tarfile_and_webdataset_read_what_the_index_says(digits: Manifest) -> None:
    for shard in digits.shards:
        rows = read_table(digits.directory / f"{shard.name}.parquet")
        path = digits.directory / f"{shard.name}.tar"
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            contents = [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]
        expected = [f"{key}.{ending}" for key in rows["key"] for ending in ("png", "cls")]
        assert [member.name for member in members] == expected
        assert [member.offset_data for member in members[::2]] == rows["image_offset"].tolist()
        assert [xxh3_64(content) for content in contents[::2]] == rows["image_xxh3"].tolist()
        assert [int(content) for content in contents[1::2]] == rows["label"].tolist()

        samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
        assert [sample["__key__"] for sample in samples] == rows["key"].tolist()
        assert [sample["png"] for sample in samples] == contents[::2]
        assert [int(sample["cls"]) for sample in samples] == rows["label"].tolist()


def test_tars_are_plain_ustar_without_a_trace_of_the_machine(digits: Manifest) -> None:
    path = digits.directory / "train-000000.tar"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert {(m.type, m.mode, m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members} == {
        (tarfile.REGTYPE, 0o644, 0, 0, "", "", 0)
    }
    assert not any(member.pax_headers for member in members)
    assert path.read_bytes()[257:265] == b"ustar\x0000"


def test_read_is_written_plus_rejected_by_key_and_reason(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source")
    whole = picture(7)
    (source / "ant" / "below").mkdir()
    (source / "ant" / "below" / "deep.PNG").write_bytes(picture(8, kind="PNG"))
    (source / "ant" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (source / "bee" / "empty.jpeg").write_bytes(b"")
    (source / "bee" / "text.jpg").write_bytes(b"I am no image")
    (source / "cat" / "notes.txt").write_bytes(b"I never claimed to be one")
    (source / "readme.md").write_bytes(b"about the classes")
    manifest = build(tmp_path / "out", f"imagefolder:{source}")
    rows, rejects = all_rows(manifest), read_table(tmp_path / "out" / REJECTS)

    assert manifest.images == len(rows["key"]) == 16
    named = dict(zip(rejects["source"].tolist(), rejects["reason"].tolist(), strict=True))
    assert named.keys() == {"ant/cut.jpg", "bee/empty.jpeg", "bee/text.jpg", "cat/notes.txt", "readme.md"}
    assert [named["bee/empty.jpeg"], named["cat/notes.txt"], named["readme.md"]] == ["empty", "not-an-image", "not-an-image"]
    assert manifest.rejected == {reason: list(named.values()).count(reason) for reason in sorted(set(named.values()))}
    numbers = [int(key) for key in rows["key"]] + rejects["input"].tolist()
    assert sorted(numbers) == list(range(manifest.images_read))
    for name, image_hash in zip(rows["source"], rows["image_xxh3"], strict=True):
        assert xxh3_64((source / name).read_bytes()) == image_hash
    assert dict(zip(rows["source"], rows["format"], strict=True))["ant/below/deep.PNG"] == "png"


def test_classes_are_labelled_in_the_order_given(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source")
    (source / "ant" / "bad.jpg").write_bytes(b"of a class that is not selected")
    manifest = build(tmp_path / "out", f"imagefolder:{source}", classes=("cat", "bee"))
    rows = all_rows(manifest)
    assert manifest.classes == ("cat", "bee")
    assert (manifest.images, manifest.images_read, manifest.build["left_out"]) == (10, 10, 6)
    assert {(name.split("/")[0], label) for name, label in zip(rows["source"], rows["label"].tolist(), strict=True)} == {
        ("cat", 0),
        ("bee", 1),
    }


def test_per_class_keeps_the_first_good_images_and_reads_no_more(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source")
    for bad in ("00", "02", "04"):
        (source / "bee" / f"{bad}.jpg").write_bytes(b"bad")
    manifest = build(tmp_path / "out", f"imagefolder:{source}", per_class=2)
    kept = sorted(all_rows(manifest)["source"])
    assert kept == ["ant/00.jpg", "ant/01.jpg", "bee/01.jpg", "bee/03.jpg", "cat/00.jpg", "cat/01.jpg"]
    assert read_table(tmp_path / "out" / REJECTS)["source"].tolist() == ["bee/00.jpg", "bee/02.jpg"]
    assert (manifest.images_read, manifest.build["left_out"]) == (8, 7)


def test_a_bad_image_stops_the_build_when_asked(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source")
    (source / "ant" / "notes.txt").write_text("no image, no cause to stop")
    (source / "bee" / "02.jpg").write_bytes(b"bad")
    with pytest.raises(BadDataError, match=r"bee/02\.jpg"):
        build(tmp_path / "out", f"imagefolder:{source}", on_bad="stop")
    (source / "bee" / "02.jpg").write_bytes(picture(3))
    assert build(tmp_path / "out", f"imagefolder:{source}", on_bad="stop").images == 15


@pytest.mark.parametrize("unread", ["beside.jpg", "bee/folder.jpg"])
def test_inputs_that_are_refused_unread_stop_the_build_when_asked(tmp_path: Path, unread: str) -> None:
    source = image_folder(tmp_path / "source")
    (source / "ant" / "notes.txt").write_text("no image by name, no cause to stop")
    os.mkfifo(source / unread)
    with pytest.raises(BadDataError, match=rf"{unread} cannot be used.*--on-bad skip"):
        build(tmp_path / "out", f"imagefolder:{source}", on_bad="stop")


def test_no_good_image_is_an_error_and_leaves_no_dataset(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source", per_class=1, classes=("ant",))
    (source / "ant" / "00.jpg").write_bytes(b"bad")
    with pytest.raises(BadDataError, match="ant/00"):
        build(tmp_path / "out", f"imagefolder:{source}")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_finished_dataset_is_returned_untouched(tmp_path: Path) -> None:
    first = build(tmp_path, "digits:eval")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert build(tmp_path, "digits:eval").fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_other_options_are_refused_by_name_until_replanned(tmp_path: Path) -> None:
    build(tmp_path, "digits:eval", shard_images=100)
    with pytest.raises(UsageError, match=r"--shard-images=100, --seed=0.*--shard-images=90, --seed=5.*--replan"):
        build(tmp_path, "digits:eval", shard_images=90, seed=5)
    forget_dataset(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(build(tmp_path, "digits:eval", shard_images=90, seed=5).shards) == 4


@pytest.mark.parametrize("foreign", ["notes.txt", "train-000000.tar"])
def test_a_directory_of_others_is_never_touched(tmp_path: Path, foreign: str) -> None:
    (tmp_path / foreign).write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        build(tmp_path, "digits:eval")
    forget_dataset(tmp_path)
    assert files_of(tmp_path) == {foreign: b"mine"}


def test_timm_finds_its_list(digits: Manifest) -> None:
    split = read_json(digits.directory / "_info.json")["splits"]["train"]
    assert split["filenames"] == [f"{shard.name}.tar" for shard in digits.shards]
    assert split["shard_lengths"] == [shard.images for shard in digits.shards]
    assert (split["name"], split["num_samples"]) == ("train", 1438)


def test_exact_duplicates_are_counted_and_kept(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source")
    (source / "cat" / "again.jpg").write_bytes((source / "ant" / "00.jpg").read_bytes())
    manifest = build(tmp_path / "out", f"imagefolder:{source}")
    assert (manifest.images, manifest.build["exact_duplicates"]) == (16, 1)


def test_the_directory_of_a_finished_build_holds_the_dataset_alone(digits: Manifest) -> None:
    expected = [f"{shard.name}{ending}" for shard in digits.shards for ending in (".parquet", ".tar")]
    assert sorted(files_of(digits.directory)) == sorted([*expected, MANIFEST, REJECTS, "_info.json"])
    assert read_manifest(digits.directory) == digits
