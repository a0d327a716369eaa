"""Laws of what enters which dataset: splits, duplicates, excluded images, label maps, limits. In every case
written + rejected + left out = listed."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import BuildConfig
from data_pipeline.manifest import REJECTS, Manifest, read_index, read_table, write_table
from data_pipeline.options import checked_split
from data_pipeline.workshop import forget_dataset
from tests.helpers.builds import builds, files_of, photograph, rows_of, write_folder
from vitscale.base.errors import BadDataError, EnvironmentFault, UsageError
from vitscale.base.files import read_json, xxh3_64

SPLIT = (("train", "0.6"), ("eval", "0.4"))


def folder(root: Path, *, per_class: int = 12, first: int = 0) -> Path:
    numbers = range(first, first + per_class)
    return write_folder(
        root, {f"{name}/{n:03d}.jpg": photograph(1000 * label + n) for label, name in enumerate("abc") for n in numbers}
    )


def one(out: Path, source: str, **options: object) -> Manifest:
    [manifest] = builds(out, source, **options)
    return manifest


def rejects(manifest: Manifest) -> dict[str, tuple[str, str]]:
    table = read_table(manifest.directory / REJECTS)
    assert table["input"].tolist() == sorted(table["input"].tolist())
    return {
        name: (reason, detail) for name, reason, detail in zip(*(table[c] for c in ("source", "reason", "detail")), strict=True)
    }


def accounted(*manifests: Manifest) -> int:
    """Inputs that are written, rejected or left out: by the manifests, whose tables must agree."""
    for manifest in manifests:
        assert len(rows_of(manifest)["key"]) == manifest.images
        assert len(rejects(manifest)) == sum(manifest.rejected.values()) == manifest.images_read - manifest.images
    return sum(manifest.images_read + manifest.build["left_out"] for manifest in manifests)


def test_splits_are_disjoint_and_complete_and_datasets_of_their_own(tmp_path: Path) -> None:
    source = folder(tmp_path / "source")
    write_folder(source, {"a/text.txt": b"no image", "b/bad.jpg": b"bad", "readme.md": b"beside"})
    train, held_out = builds(tmp_path / "out", f"imagefolder:{source}", split=SPLIT, shard_images=7)
    assert [train.directory.name, held_out.directory.name] == ["train", "eval"]
    assert [shard.name for shard in held_out.shards[:2]] == ["eval-000000", "eval-000001"]
    keys = [set(rows_of(manifest)["source"]) for manifest in (train, held_out)]
    assert keys[0] & keys[1] == set()
    assert len(keys[0]) + len(keys[1]) == 36
    assert accounted(train, held_out) == 39
    assert {"a/text.txt", "readme.md"} <= rejects(train).keys(), "inputs without bytes belong to the first split"
    assert train.classes == held_out.classes == ("a", "b", "c")
    splits = read_json(tmp_path / "out" / "_info.json")["splits"]
    assert splits["eval"]["filenames"] == [f"eval/{shard.name}.tar" for shard in held_out.shards]
    assert splits["train"]["num_samples"] == train.images
    assert read_json(held_out.directory / "_info.json")["splits"]["eval"]["shard_lengths"][0] == 7


def test_more_images_and_another_seed_move_no_image(tmp_path: Path) -> None:
    folder(tmp_path / "source")
    before = builds(tmp_path / "before", f"imagefolder:{tmp_path / 'source'}", split=SPLIT)
    write_folder(tmp_path / "source", {f"a/{n}.jpg": photograph(9000 + n) for n in range(20)})
    after = builds(tmp_path / "after", f"imagefolder:{tmp_path / 'source'}", split=SPLIT, seed=3)
    for then, now in zip(before, after, strict=True):
        assert set(rows_of(then)["source"]) < set(rows_of(now)["source"])


def test_a_split_build_is_found_complete_refused_or_forgotten(tmp_path: Path) -> None:
    folder(tmp_path / "source")
    source, out = f"imagefolder:{tmp_path / 'source'}", tmp_path / "out"
    first = builds(out, source, split=SPLIT)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert builds(out, source, split=SPLIT) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
    with pytest.raises(UsageError, match=r"--split=train=0\.6,eval=0\.4, this command says --split=none"):
        builds(out, source)
    forget_dataset(out)
    assert list(out.iterdir()) == []


def test_a_split_without_images_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a/0.jpg": photograph(0)})
    with pytest.raises(UsageError, match="falls into"):
        builds(tmp_path / "out", f"imagefolder:{tmp_path}", split=SPLIT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train=0.9,eval=0.2", "add up to 1"),
        ("train=0.9", "add up to 1"),
        ("train=0.5,train=0.5", "once"),
        ("../x=0.5,y=0.5", "NAME=SHARE"),
        ("train=1.0,eval=0.0", "NAME=SHARE"),
    ],
)
def test_wrong_splits_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        checked_split(text)
    assert checked_split("train=0.9, eval=.1") == (("train", "0.9"), ("eval", ".1"))


def test_dedup_rejects_all_but_the_lowest_number(tmp_path: Path) -> None:
    source = folder(tmp_path / "source")
    again = (source / "b" / "003.jpg").read_bytes()
    write_folder(source, {"a/zz.jpg": again, "c/copy.jpg": again, "c/other.jpg": photograph(5)})
    kept = one(tmp_path / "kept", f"imagefolder:{source}")
    assert (kept.images, kept.build["exact_duplicates"], accounted(kept)) == (39, 3, 39)
    manifest = one(tmp_path / "out", f"imagefolder:{source}", dedup=True)
    assert accounted(manifest) == 39
    assert rejects(manifest) == {
        "b/003.jpg": ("duplicate", "the bytes of input 12, a/zz.jpg"),
        "c/copy.jpg": ("duplicate", "the bytes of input 12, a/zz.jpg"),
        "c/other.jpg": ("duplicate", "the bytes of input 5, a/005.jpg"),
    }
    assert (manifest.rejected, manifest.build["exact_duplicates"]) == ({"duplicate": 3}, 3)


def test_dedup_and_per_class_keep_as_many_as_there_are(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", per_class=4)
    write_folder(source, {"b/001.jpg": (source / "b" / "000.jpg").read_bytes()})
    manifest = one(tmp_path / "out", f"imagefolder:{source}", dedup=True, per_class=2)
    assert sorted(rows_of(manifest)["source"]) == ["a/000.jpg", "a/001.jpg", "b/000.jpg", "b/002.jpg", "c/000.jpg", "c/001.jpg"]
    assert (manifest.build["left_out"], accounted(manifest)) == (5, 12)


def test_images_of_excluded_datasets_are_rejected_by_key(tmp_path: Path) -> None:
    source = folder(tmp_path / "source")
    write_folder(tmp_path / "held", {"x/1.jpg": photograph(3), "x/2.jpg": photograph(70, height=90, width=60)})
    # What this one stores is not what it read: both must be known.
    write_folder(source, {"c/large.jpg": photograph(70, height=90, width=60)})
    held_out = one(tmp_path / "held-out", f"imagefolder:{tmp_path / 'held'}", resize_short=40)
    stored = [tarfile.open(held_out.directory / f"{shard.name}.tar") for shard in held_out.shards]  # noqa: SIM115
    small = stored[0].extractfile("000000001.jpg")
    assert small is not None
    write_folder(source, {"b/small.jpg": small.read()})
    stored[0].close()
    manifest = one(tmp_path / "out", f"imagefolder:{source}", exclude=(str(held_out.directory),))
    assert rejects(manifest) == {
        "a/003.jpg": ("excluded", "image 000000000 of held-out"),
        "b/small.jpg": ("excluded", "image 000000001 of held-out"),
        "c/large.jpg": ("excluded", "image 000000001 of held-out"),
    }
    assert (manifest.rejected, accounted(manifest)) == ({"excluded": 3}, 38)
    with pytest.raises(EnvironmentFault, match="expected a dataset"):
        builds(tmp_path / "more", f"imagefolder:{source}", exclude=(str(tmp_path / "held"),))


def test_a_label_map_renames_merges_and_leaves_out(tmp_path: Path) -> None:
    source = folder(tmp_path / "source")
    (tmp_path / "map.csv").write_text('source_class,name\nc,"cat, wild"\nz,zebra\na,"cat, wild"\n')
    manifest = one(tmp_path / "out", f"imagefolder:{source}", labels=str(tmp_path / "map.csv"))
    assert manifest.classes == ("cat, wild", "zebra")
    rows = rows_of(manifest)
    assert {(name[0], label) for name, label in zip(rows["source"], rows["label"].tolist(), strict=True)} == {
        ("a", 0),
        ("c", 0),
    }
    assert (manifest.images, manifest.build["left_out"], accounted(manifest)) == (24, 12, 36)


def test_classes_choose_among_the_names_of_a_label_map(tmp_path: Path) -> None:
    source = folder(tmp_path / "source")
    (tmp_path / "map.tsv").write_text("a\tfirst\nb\tsecond\nc\tthird\n")
    manifest = one(
        tmp_path / "out", f"imagefolder:{source}", labels=str(tmp_path / "map.tsv"), classes=("third", "first"), per_class=2
    )
    rows = rows_of(manifest)
    assert manifest.classes == ("third", "first")
    assert sorted(zip(rows["source"], rows["label"].tolist(), strict=True)) == [
        ("a/000.jpg", 1), ("a/001.jpg", 1), ("c/000.jpg", 0), ("c/001.jpg", 0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c\n", "line 1: expected two fields"),
        ("a,x\na,y\n", "two names"),
        ("ant,x\n", "none of its 1"),
        ("\n", "found none"),
    ],
)
def test_wrong_label_maps_are_refused(tmp_path: Path, text: str, message: str) -> None:
    source = folder(tmp_path / "source", per_class=1)
    (tmp_path / "map.csv").write_text(text)
    with pytest.raises(UsageError, match=message):
        builds(tmp_path / "out", f"imagefolder:{source}", labels=str(tmp_path / "map.csv"))


def test_a_changed_label_map_is_another_build(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", per_class=2)
    (tmp_path / "map.csv").write_text("a,x\nb,y\n")
    builds(tmp_path / "out", f"imagefolder:{source}", labels=str(tmp_path / "map.csv"))
    (tmp_path / "map.csv").write_text("a,y\nb,x\n")
    with pytest.raises(UsageError, match=r"--labels=map\.csv"):
        builds(tmp_path / "out", f"imagefolder:{source}", labels=str(tmp_path / "map.csv"))


def many_labels(root: Path) -> str:
    """A Parquet file of images with none, one or several labels."""
    labels = [["ant", "cat"], ["bee"], [], ["cat", "ant", "bee"], ["dog"], ["ant"]]
    images = [{"bytes": photograph(number), "path": f"{number}.jpg"} for number in range(len(labels))]
    write_table(root / "many.parquet", {"image": images, "labels": labels})
    return f"parquet:{root / 'many.parquet'}"


def test_many_labels_are_stored_in_json_and_index(tmp_path: Path) -> None:
    manifest = one(tmp_path / "out", many_labels(tmp_path), shard_images=4)
    assert (manifest.classes, manifest.most_labels) == (("ant", "bee", "cat", "dog"), 3)
    expected = {"0.jpg": [0, 2], "1.jpg": [1], "3.jpg": [2, 0, 1], "4.jpg": [3], "5.jpg": [0]}
    rows = rows_of(manifest)
    assert {name: labels.tolist() for name, labels in zip(rows["source"], rows["labels"], strict=True)} == expected
    assert {name: label for name, label in zip(rows["source"], rows["label"].tolist(), strict=True)} == {
        name: labels[0] for name, labels in expected.items()
    }
    assert rejects(manifest) == {"2.jpg": ("no-label", "others of the source have one")}
    for number, shard in enumerate(manifest.shards):
        index = read_index(manifest, number)
        with tarfile.open(manifest.directory / f"{shard.name}.tar") as tar:
            for row, key in enumerate(index.keys):
                stored = tar.extractfile(f"{key.decode()}.json")
                assert stored is not None and index.labels is not None
                assert json.loads(stored.read()) == {"labels": index.labels[row].tolist()}
    assert read_json(manifest.directory / "_info.json")["splits"]["train"]["alt_label"] == "labels"


def test_a_label_map_of_many_labels_merges_inside_an_image(tmp_path: Path) -> None:
    (tmp_path / "map.csv").write_text("cat,pet\ndog,pet\nant,insect\n")
    manifest = one(tmp_path / "out", many_labels(tmp_path), labels=str(tmp_path / "map.csv"))
    rows = rows_of(manifest)
    assert manifest.classes == ("pet", "insect")
    assert {name: labels.tolist() for name, labels in zip(rows["source"], rows["labels"], strict=True)} == {
        "0.jpg": [1, 0], "3.jpg": [0, 1], "4.jpg": [0], "5.jpg": [1]
    }  # fmt: skip
    assert (manifest.build["left_out"], accounted(manifest)) == (2, 6)


def test_several_source_labels_that_become_one_are_one(tmp_path: Path) -> None:
    (tmp_path / "map.csv").write_text("cat,animal\nant,animal\nbee,animal\n")
    manifest = one(tmp_path / "out", many_labels(tmp_path), labels=str(tmp_path / "map.csv"))
    assert (manifest.most_labels, manifest.images) == (1, 4)
    assert set(rows_of(manifest)["label"].tolist()) == {0}
    with tarfile.open(manifest.directory / "train-000000.tar") as tar:
        assert {name.split(".")[1] for name in tar.getnames()} == {"jpg", "cls"}


def test_limits_of_pixels_and_bytes(tmp_path: Path) -> None:
    large, long = photograph(1, height=60, width=60), photograph(2) + b"\0" * 9_000
    source = write_folder(tmp_path / "source", {"a/0.jpg": photograph(0), "a/1.jpg": large, "a/2.jpg": long})
    manifest = one(tmp_path / "out", f"imagefolder:{source}", max_pixels=1000, max_bytes=9_000)
    assert {name: reason for name, (reason, _) in rejects(manifest).items()} == {
        "a/1.jpg": "too-many-pixels",
        "a/2.jpg": "too-many-bytes",
    }
    assert accounted(manifest) == 3


def test_all_excluded_is_an_error(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", per_class=1)
    held_out = one(tmp_path / "held-out", f"imagefolder:{source}")
    with pytest.raises(BadDataError, match="mostly excluded"):
        builds(tmp_path / "out", f"imagefolder:{source}", exclude=(str(held_out.directory),))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 7])
def test_workers_change_no_byte_of_splits(tmp_path: Path, workers: int) -> None:
    source = folder(tmp_path / "source", per_class=60)
    write_folder(source, {"c/again.jpg": photograph(3), "c/bad.jpg": b"bad"})
    options = {"split": SPLIT, "dedup": True, "resize_short": 16, "shard_bytes": 9_000}
    builds(tmp_path / "one", f"imagefolder:{source}", **options)
    builds(tmp_path / "many", f"imagefolder:{source}", workers=workers, **options)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "many")


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="quality"):
        BuildConfig(source="digits:", quality=0)


def test_hashes_of_the_index_are_those_of_the_files(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", per_class=3)
    rows = rows_of(one(tmp_path / "out", f"imagefolder:{source}"))
    for name, source_hash, image_hash in zip(rows["source"], rows["source_xxh3"], rows["image_xxh3"], strict=True):
        assert xxh3_64((source / name).read_bytes()) == source_hash == image_hash
    assert len(np.unique(rows["image_xxh3"])) == 9
