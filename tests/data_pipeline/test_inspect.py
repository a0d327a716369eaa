"""Laws of the two commands: what is damaged is named, and a wrong word ends in one sentence with its exit code."""

import shutil
import sys
from pathlib import Path

import pytest

from data_pipeline.build import build_dataset
from data_pipeline.config import BuildConfig
from data_pipeline.manifest import Manifest, read_index, read_manifest
from data_pipeline.verify import verify_dataset
from launch import build_shards, inspect_shards
from vitscale.base.errors import EnvironmentFault, UsageError


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
        (["--shard-size", "12parsec"], "expected a size such as 256MB"),
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
