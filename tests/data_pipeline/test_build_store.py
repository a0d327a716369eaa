"""Laws of a build whose dataset goes to an object store: the same bytes there, the manifest last, any kill survived."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.build import build_datasets
from data_pipeline.config import BuildConfig
from data_pipeline.destination import store_of
from data_pipeline.manifest import LOCATION, MANIFEST, Manifest, read_manifest
from tests.helpers.builds import files_of
from tests.helpers.object_store import ObjectStore, serve
from vitscale.base.errors import UsageError

CONFIG = BuildConfig(source="digits:eval", shard_bytes=None, shard_images=60)
URL = "s3://bucket/sets/digits"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    store_of.cache_clear()  # it knows the server of another test
    with serve() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


def build(work: Path, *, url: str | None = URL, config: BuildConfig = CONFIG, replan: bool = False) -> tuple[Manifest, ...]:
    return build_datasets(config, work, workers=1, url=url, replan=replan, show_progress=False)


def objects(server: ObjectStore, prefix: str = "bucket/sets/digits/") -> dict[str, bytes]:
    return {name.removeprefix(prefix): bytes(content) for name, content in server.objects.items() if name.startswith(prefix)}


def test_the_store_gets_the_bytes_of_a_local_build(tmp_path: Path, server: ObjectStore) -> None:
    build(tmp_path / "local", url=None)
    local = files_of(tmp_path / "local")
    [manifest] = build(tmp_path / "work")
    assert objects(server) == local
    small = {name: content for name, content in local.items() if not name.endswith(".tar")}
    assert files_of(tmp_path / "work") == small | {LOCATION: files_of(tmp_path / "work")[LOCATION]}
    assert (manifest.tars_at, manifest.images) == (URL, 359)
    assert read_manifest(tmp_path / "work").fingerprint == read_manifest(tmp_path / "local").fingerprint


def test_an_interrupted_upload_continues_with_what_is_there(
    tmp_path: Path, server: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITSCALE_FAULT", "raise@build.shard:shard=2")
    with pytest.raises(RuntimeError):
        build(tmp_path / "work")
    monkeypatch.delenv("VITSCALE_FAULT")
    assert sorted(name for name in objects(server) if name.endswith(".tar")) == [f"train-00000{n}.tar" for n in range(3)]
    assert MANIFEST not in objects(server)
    server.objects["bucket/sets/digits/train-000001.tar"] = b"cut"
    build(tmp_path / "work")
    build(tmp_path / "local", url=None)
    assert objects(server) == files_of(tmp_path / "local")


def test_a_dataset_on_the_store_is_found_without_its_work_directory(tmp_path: Path, server: ObjectStore) -> None:
    first = build(tmp_path / "work")
    server.objects["bucket/sets/digits/train-000000.tar"] = b"not written again"
    again = build(tmp_path / "elsewhere")
    assert again[0].fingerprint == first[0].fingerprint
    assert files_of(tmp_path / "elsewhere") == files_of(tmp_path / "work")
    assert objects(server)["train-000000.tar"] == b"not written again"
    other = BuildConfig(source="digits:eval", shard_bytes=None, shard_images=61)
    with pytest.raises(UsageError, match=r"s3://bucket/sets/digits holds a dataset built with --shard-images=60"):
        build(tmp_path / "third", config=other)
    build(tmp_path / "third", config=other, replan=True)
    assert json.loads(objects(server)[MANIFEST])["build"]["options"]["shard_images"] == 61


def test_splits_lie_below_the_url(tmp_path: Path, server: ObjectStore) -> None:
    config = BuildConfig(source="digits:eval", shard_bytes=None, shard_images=60, split=(("train", "0.7"), ("eval", "0.3")))
    train, held_out = build(tmp_path / "work", config=config)
    assert [train.tars_at, held_out.tars_at] == [f"{URL}/train", f"{URL}/eval"]
    assert {"_info.json", "train/manifest.json", "eval/eval-000000.tar"} <= objects(server).keys()


def test_a_plain_http_server_is_enough(tmp_path: Path, server: ObjectStore) -> None:
    build(tmp_path / "work", url=f"{server.url}/bucket/plain")
    build(tmp_path / "local", url=None)
    assert objects(server, "bucket/plain/") == files_of(tmp_path / "local")
