"""Laws of the two commands: what is damaged is named, and a wrong word ends in one sentence with its exit code."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build import build_dataset
from data_pipeline.config import BuildConfig
from data_pipeline.decode import encode_png
from data_pipeline.manifest import Manifest, read_index, read_manifest
from data_pipeline.sheet import rejected_pictures, shard_pictures
from data_pipeline.summary import as_record, tally_dataset
from data_pipeline.verify import verify_dataset
from launch import build_shards, inspect_shards
from tests.helpers.object_store import serve
from tests.helpers.shards import smooth_image, write_dataset
from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.base.files import read_json


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    config = BuildConfig(source="digits:eval", shard_bytes=None, shard_images=90)
    build_dataset(config, out, workers=1, show_progress=False)
    return out


@pytest.fixture
def dataset(whole: Path, tmp_path: Path) -> Manifest:
    shutil.copytree(whole, tmp_path / "copy")
    return read_manifest(tmp_path / "copy")


def damage(manifest: Manifest) -> list[str]:
    return verify_dataset(manifest, workers=1, show_progress=False)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_whole_dataset_has_no_damage(dataset: Manifest) -> None:
    assert damage(dataset) == []


def test_a_flipped_byte_names_its_file_and_its_image(dataset: Manifest) -> None:
    index = read_index(dataset, 2)
    flip(dataset.directory / "train-000002.tar", int(index.image_offset[17]) + 40)
    found = damage(dataset)
    assert [line.split(": ")[0] for line in found] == ["train-000002.tar", "train-000002.tar"]
    assert found[0].startswith("train-000002.tar: sha256")
    assert found[1].startswith(f"train-000002.tar: image {index.keys[17].decode()}: its bytes")


@pytest.mark.parametrize(("back", "what"), [(512, "a header beside it is damaged"), (-512 - 512, "in the tar, found")])
def test_a_flipped_header_or_label_names_the_image(dataset: Manifest, back: int, what: str) -> None:
    index = read_index(dataset, 0)
    flip(dataset.directory / "train-000000.tar", int(index.image_offset[3]) - back)
    assert f"image {index.keys[3].decode()}: " in damage(dataset)[1]
    assert what in damage(dataset)[1]


def test_missing_and_cut_files_are_named(dataset: Manifest) -> None:
    directory = dataset.directory
    (directory / "train-000000.tar").unlink()
    cut = directory / "train-000001.parquet"
    cut.write_bytes(cut.read_bytes()[:-100])
    tar = directory / "train-000003.tar"
    tar.write_bytes(tar.read_bytes()[:1500])
    (directory / "rejects.parquet").unlink()
    found = damage(dataset)
    assert found[0] == "train-000000.tar: missing"
    assert found[1].startswith("train-000001.parquet: sha256")
    assert found[2].startswith("train-000003.tar: 1,500 bytes")
    assert all("train-000003.tar: image" in line for line in found[3:-1])
    assert len(found[3:-1]) >= dataset.shards[3].images - 1
    assert found[-1].startswith("rejects.parquet")


def run(monkeypatch: pytest.MonkeyPatch, script: object, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])  # type: ignore[attr-defined]
    script.main()  # type: ignore[attr-defined]


def test_info_tells_counts_classes_and_fingerprint(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, inspect_shards, "info", str(whole))
    text = capsys.readouterr().out
    assert "359 written of 359 read, 0 rejected" in text
    assert "shards       4; images min 89, mean 90, max 90" in text
    assert read_manifest(whole).fingerprint in text
    assert "source = digits:eval" in text
    counts = [int(line.split()[2]) for line in text.splitlines()[-10:]]
    assert sum(counts) == 359


def test_verify_ends_with_3_where_there_is_damage(
    dataset: Manifest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, inspect_shards, "verify", str(dataset.directory), "--workers", "1")
    assert capsys.readouterr().out.startswith("whole: 359 images in 4 shards")
    (dataset.directory / "train-000002.tar").unlink()
    with pytest.raises(EnvironmentFault, match="1 places"):
        run(monkeypatch, inspect_shards, "verify", str(dataset.directory), "--workers", "1")
    assert capsys.readouterr().out == "train-000002.tar: missing\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard-sise", "1MB"], "did you mean '--shard-size'"),
        (["--shard-size", "1MB", "--shard-images", "9"], "got both"),
        (["--shard-size", "12parsec"], "expected a size above 0 such as"),
        (["--shard-size", "0"], "expected a size"),
        (["--shard-images", "0"], "at least 1"),
        (["--seed", "-1"], "seed from 0"),
        (["--classes", "0,ten"], "no class 'ten'"),
        (["--classes", "0,,1"], "separated by commas"),
        (["--on-bad", "ignore"], "invalid choice"),
    ],
)
def test_wrong_words_are_usage_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(monkeypatch, build_shards, "digits:eval", "--out", str(tmp_path / "out"), *arguments)
    assert not (tmp_path / "out").exists()


def test_the_command_builds_repeats_and_replans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["digits:eval", "--out", str(tmp_path / "out"), "--workers", "1"]
    run(monkeypatch, build_shards, *command, "--shard-images", "100", "--classes", "3,1", "--per-class", "20")
    said = capsys.readouterr().out
    manifest = read_manifest(tmp_path / "out")
    assert manifest.classes == ("3", "1")
    assert [line.split()[:2] for line in said.splitlines()[:2]] == [["read", "40"], ["written", "40"]]
    assert manifest.fingerprint in said
    run(monkeypatch, build_shards, *command, "--shard-images", "100", "--classes", "3,1", "--per-class", "20")
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--classes=3,1"):
        run(monkeypatch, build_shards, *command)
    run(monkeypatch, build_shards, *command, "--replan", "--shard-size", "1.5kB")
    assert read_manifest(tmp_path / "out").images == 359
    assert read_manifest(tmp_path / "out").build["options"]["shard_bytes"] == 1500


# ---- numbers of a dataset -------------------------------------------------------------------------------------------


def test_the_tally_of_a_dataset_is_that_of_its_images(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    sides = [(10, 40), (40, 10), (70, 70), (33, 33), (100, 10), (12, 12), (12, 13)]
    images = [[smooth_image(generator, *side) for side in sides[:4]], [smooth_image(generator, *side) for side in sides[4:]]]
    manifest = write_dataset(tmp_path, images, [[0, 1, 1, 2], [1, 1, 0]], ["a", "b", "c"])
    tally = tally_dataset(manifest, workers=1)
    assert (tally.images, tally.unlabelled, tally.classes.tolist()) == (7, 0, [2, 4, 1])
    assert tally.image_bytes == sum(int(read_index(manifest, shard).image_size.sum()) for shard in range(2))
    assert (tally.shard_images, tally.formats, tally.orientations) == ((3, 4), {"png": 7}, {1: 7})
    assert tally.histograms["pixels"] == {0: 5, 1: 1, 2: 1}  # up to 32², 64², 128²
    assert tally.histograms["aspect"] == {0: 2, 3: 4, 6: 1}
    record = as_record(manifest, tally)
    assert record["images_by_class"] == {"a": 2, "b": 4, "c": 1}
    assert all(sum(histogram["images"]) == 7 for histogram in record["histograms"].values())


def test_info_and_verify_write_json(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, inspect_shards, "info", str(whole), "--json", str(tmp_path / "info.json"))
    run(monkeypatch, inspect_shards, "verify", str(whole), "--workers", "1", "--json", str(tmp_path / "verify.json"))
    assert read_json(tmp_path / "info.json")["images"] == 359
    assert read_json(tmp_path / "info.json")["formats"] == {"png": 359}
    assert read_json(tmp_path / "verify.json") == {
        "fingerprint": read_manifest(whole).fingerprint,
        "images": 359,
        "damage": [],
    }


# ---- sheets and foreign tars from the command line ------------------------------------------------------------------


def test_sheets_show_shards_and_say_what_they_leave_out(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspect_shards, "SHEETS", 2)
    run(monkeypatch, inspect_shards, "sheet", str(whole), "--out", str(tmp_path / "out"), "--images", "9")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train-000000.png", "train-000001.png"]
    said = capsys.readouterr().out
    assert "train-000001.png: 9 images" in said
    assert "2 further shards were left out" in said
    run(monkeypatch, inspect_shards, "sheet", str(whole), "--out", str(tmp_path / "some"), "--shards", "3")
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["train-000003.png"]


def test_pictures_of_a_shard_are_its_images_from_first_to_last(dataset: Manifest) -> None:
    index = read_index(dataset, 1)
    flip(dataset.directory / "train-000001.tar", int(index.image_offset[0]) + 40)
    pictures = shard_pictures(dataset, 1, count=4)
    assert [picture.heading for picture in pictures] == [index.keys[row].decode() for row in (0, 30, 59, 89)]
    assert (pictures[0].image_HWC, pictures[0].words) == (None, "damaged: wrong hash")
    assert [picture.words for picture in pictures[1:]] == [str(index.label[row]) for row in (30, 59, 89)]
    assert all(picture.image_HWC is not None and picture.image_HWC.shape == (8, 8, 3) for picture in pictures[1:])


def test_rejected_images_are_shown_as_far_as_they_can_be_seen(tmp_path: Path) -> None:
    good = encode_png(smooth_image(np.random.default_rng(1), 20, 20))
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    for number, content in enumerate((good, good[:-30], b"nothing", good[:-31])):
        (folder / f"{number}.png").write_bytes(content)
    config = BuildConfig(source=f"imagefolder:{tmp_path / 'in'}", shard_bytes=None, shard_images=9)
    manifest = build_dataset(config, tmp_path / "out", workers=1, show_progress=False)
    pictures, total = rejected_pictures(manifest, count=2, originals=tmp_path / "in")
    assert (total, [picture.words for picture in pictures]) == (3, ["truncated", "unknown-format"])
    assert [picture.image_HWC is None for picture in pictures] == [False, True]
    unseen, _ = rejected_pictures(manifest, count=9, originals=None)
    assert [picture.image_HWC for picture in unseen] == [None] * 3


def test_the_command_indexes_and_names_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], whole: Path
) -> None:
    (tmp_path / "tars").mkdir()
    for tar in whole.glob("*.tar"):
        shutil.copy(tar, tmp_path / "tars" / tar.name)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    words = [str(tmp_path / "tars"), "--out", str(tmp_path / "index"), "--workers", "1"]
    run(monkeypatch, inspect_shards, "index", *words, "--classes", str(tmp_path / "names.txt"))
    assert "359 of 359 samples in 4 tars, 10 classes" in capsys.readouterr().out
    ours, theirs = read_manifest(whole), read_manifest(tmp_path / "index")
    assert theirs.classes[9] == "nine"
    assert [shard.tar_sha256 for shard in theirs.shards] == [shard.tar_sha256 for shard in ours.shards]
    for shard in range(4):
        a, b = read_index(ours, shard), read_index(theirs, shard)
        for column in ("keys", "image_offset", "image_size", "label", "orientation", "image_xxh3"):
            assert (getattr(a, column) == getattr(b, column)).all()


def test_a_dataset_on_an_object_store_is_looked_at_by_its_url(
    dataset: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        for path in dataset.directory.iterdir():
            server.objects[f"bucket/digits/{path.name}"] = path.read_bytes()
        run(monkeypatch, inspect_shards, "info", "s3://bucket/digits")
        assert "359 written of 359 read" in capsys.readouterr().out
        run(monkeypatch, inspect_shards, "verify", "s3://bucket/digits", "--workers", "1")
        assert dataset.fingerprint in capsys.readouterr().out
        run(monkeypatch, inspect_shards, "sheet", "s3://bucket/digits", "--out", str(tmp_path / "s"), "--shards", "2")
        assert [path.name for path in (tmp_path / "s").iterdir()] == ["train-000002.png"]
        del server.objects["bucket/digits/train-000001.tar"]
        server.objects["bucket/digits/train-000003.parquet"] = b"other"
        with pytest.raises(EnvironmentFault, match="2 places"):
            run(monkeypatch, inspect_shards, "verify", "s3://bucket/digits", "--workers", "1")
        lines = capsys.readouterr().out.splitlines()[-2:]
        assert "s3://bucket/digits/train-000001.tar" in lines[0]
        assert lines[1].startswith("train-000003.parquet: sha256")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["look", "DIR"], "invalid choice"),
        (["info"], "required: DIR"),
        (["info", "DIR", "--ful"], "unrecognized"),
        (["verify", "DIR", "--workers", "0"], "at least 1"),
        (["sheet", "DIR"], "required: --out"),
        (["sheet", "WHOLE", "--out", "x", "--shards", "4"], "numbers below 4"),
        (["sheet", "DIR", "--out", "x", "--shards", "a"], "separated by commas"),
        (["index", "s3://bucket/tars"], "expected --out DIR"),
        (["index", "DIR"], "found none"),
        (["index", "WHOLE"], "built, not indexed"),
        (["index", "WHOLE", "--classes", "absent.txt"], "--classes: expected a text file"),
    ],
)
def test_wrong_words_of_inspect_are_usage_errors(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        run(monkeypatch, inspect_shards, *[{"DIR": str(tmp_path), "WHOLE": str(whole)}.get(word, word) for word in words])
