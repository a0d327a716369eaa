"""WebDataset, Hugging Face datasets, timm and GNU tar read the shards without the index: same keys, bytes, labels, order."""

import io
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data_pipeline.build import build_dataset
from data_pipeline.config import BuildConfig
from data_pipeline.manifest import Manifest, read_table
from tests.helpers.peers import peer
from tests.helpers.shards import smooth_image


@dataclass(frozen=True)
class Sample:
    """What every reader must see."""

    key: str
    ending: str
    content: bytes
    labels: list[int]
    """In KEY.cls, or in KEY.json where images may have several."""


@dataclass(frozen=True)
class Case:
    manifest: Manifest
    samples: list[Sample]
    has_several: bool

    @property
    def tars(self) -> list[str]:
        return [str(self.manifest.directory / f"{shard.name}.tar") for shard in self.manifest.shards]


def photo(number: int) -> bytes:
    pixels = smooth_image(np.random.default_rng(number), 20 + number % 9, 24 + number % 7)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def photos(root: Path) -> str:
    for number in range(36):
        path = root / "in" / f"class {number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number))
    return f"imagefolder:{root / 'in'}"


def table(root: Path) -> str:
    lines = ["path,labels"]
    for number in range(36):
        (root / f"{number}.jpg").write_bytes(photo(number))
        lines.append(f"{number}.jpg,{'|'.join(str(label) for label in range(12) if (number >> label % 6) & 1 or label == 11)}")
    (root / "table.csv").write_text("\n".join(lines) + "\n")
    return f"table:{root / 'table.csv'}"


@pytest.fixture(scope="module", params=["photos", "digits", "several labels"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("case")
    makers = {"photos": lambda: photos(root), "digits": lambda: "digits:eval", "several labels": lambda: table(root)}
    source = makers[request.param]()
    config = BuildConfig(source=source, shard_bytes=None, shard_images=100 if source.startswith("digits") else 8)
    manifest = build_dataset(config, root / "out", workers=1, show_progress=False)
    samples = []
    for shard in manifest.shards:
        rows = read_table(root / "out" / f"{shard.name}.parquet")
        tar = (root / "out" / f"{shard.name}.tar").read_bytes()
        for row in range(shard.images):
            offset, labels = rows["image_offset"][row], rows["labels"][row]
            content = tar[offset : offset + rows["image_size"][row]]
            labels = [int(rows["label"][row])] if labels is None else labels.tolist()
            samples.append(Sample(rows["key"][row], rows["format"][row], content, labels))
    assert len(samples) == manifest.images >= 36
    return Case(manifest, samples, request.param == "several labels")


def test_gnu_tar_lists_and_unpacks_the_same(case: Case, tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("there is no tar command here")
    listed = []
    for tar in case.tars:
        ended = subprocess.run(["tar", "tf", tar], capture_output=True, text=True, check=True)
        assert ended.stderr == ""
        listed += ended.stdout.splitlines()
        subprocess.run(["tar", "xf", tar, "-C", str(tmp_path), "--no-same-owner"], check=True)
    labels_in = "json" if case.has_several else "cls"
    assert listed == [f"{sample.key}.{ending}" for sample in case.samples for ending in (sample.ending, labels_in)]
    for sample in case.samples:
        assert (tmp_path / f"{sample.key}.{sample.ending}").read_bytes() == sample.content
        text = (tmp_path / f"{sample.key}.{labels_in}").read_text()
        assert json.loads(text) == ({"labels": sample.labels} if case.has_several else sample.labels[0])


def test_webdataset_reads_the_same(case: Case) -> None:
    webdataset = peer("webdataset")
    pipeline = webdataset.WebDataset(case.tars, shardshuffle=False)
    found = list(pipeline)
    assert [sample["__key__"] for sample in found] == [sample.key for sample in case.samples]
    assert [sample[ours.ending] for sample, ours in zip(found, case.samples, strict=True)] == [s.content for s in case.samples]
    if case.has_several:
        assert [json.loads(sample["json"])["labels"] for sample in found] == [sample.labels for sample in case.samples]
        assert not any("cls" in sample for sample in found)
    else:
        assert [int(sample["cls"]) for sample in found] == [sample.labels[0] for sample in case.samples]
    decoded = list(pipeline.decode("rgb8"))
    expected = [np.array(Image.open(io.BytesIO(sample.content)).convert("RGB")) for sample in case.samples]
    assert all(
        (sample[ours.ending] == pixels).all() for sample, ours, pixels in zip(decoded, case.samples, expected, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("is_streaming", [True, False])
def test_hugging_face_datasets_read_the_same(case: Case, tmp_path: Path, is_streaming: bool) -> None:
    datasets = peer("datasets")
    found = datasets.load_dataset(
        "webdataset", data_files={"train": case.tars}, split="train", streaming=is_streaming, cache_dir=str(tmp_path)
    )
    ending = case.samples[0].ending
    rows = list(found.cast_column(ending, datasets.Image(decode=False)))
    assert [row["__key__"] for row in rows] == [sample.key for sample in case.samples]
    assert [row[ending]["bytes"] for row in rows] == [sample.content for sample in case.samples]
    if case.has_several:
        assert [row["json"]["labels"] for row in rows] == [sample.labels for sample in case.samples]
    else:
        assert [row["cls"] for row in rows] == [sample.labels[0] for sample in case.samples]


@pytest.mark.slow
def test_timm_reads_the_same_by_our_info(case: Case) -> None:
    peer("timm")
    data = peer("timm.data")
    # timm takes the labels of .cls, or where _info.json says so those of the JSON beside the image.
    found = data.create_dataset("wds/shards", root=str(case.manifest.directory), split="train", batch_size=4)
    rows = list(found)
    assert len(found) == len(rows) == case.manifest.images
    expected = [np.array(Image.open(io.BytesIO(sample.content)).convert("RGB")) for sample in case.samples]
    assert all((np.array(image) == pixels).all() for (image, _), pixels in zip(rows, expected, strict=True))
    labels = [sample.labels if case.has_several else sample.labels[0] for sample in case.samples]
    assert [target for _, target in rows] == labels
