"""Names that come from outside never lead out of the directory they are meant for."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.decode import encode_png
from data_pipeline.destination import Destination
from data_pipeline.foreign import index_dataset
from data_pipeline.manifest import MANIFEST, SCHEMA_VERSION, read_manifest, read_table
from data_pipeline.places import find_tars
from data_pipeline.tars import BadTar, members
from tests.helpers.object_store import serve
from tests.helpers.shards import smooth_image
from vitscale.base.errors import EnvironmentFault
from vitscale.base.files import safe_name, unsafe_name

OUTWARD = [
    "",
    ".",
    "..",
    "../evil",
    "../../evil",
    "a/../../evil",
    "/tmp/evil",
    "a/b",
    "a\\b",
    "a\0b",
    "a\nb",
    "\x1b[2J",
    ".hidden",
    "a" * 300,
    None,
    7,
    ["a"],
]


@pytest.mark.parametrize("name", OUTWARD)
def test_what_is_no_plain_name_is_refused(name):
    assert not safe_name(name)
    assert unsafe_name(["fine", name]) == repr(name)


@pytest.mark.parametrize("name", ["train-000000", "mp_rank_00_model_states.pt", "größe 1", "a..b", "-", "a:b"])
def test_plain_names_are_fine(name):
    assert safe_name(name) and unsafe_name([name, "other"]) is None


def test_names_that_meet_where_case_is_ignored_are_refused():
    assert unsafe_name(["a.pt", "b.pt", "A.PT"]) == "'A.PT'"
    assert unsafe_name(["a.pt", "a.pt"]) == "'a.pt'"


def manifest_with(*names: object) -> bytes:
    shard = {"images": 1, "tar_bytes": 1, "tar_sha256": "", "index_sha256": ""}
    record = {
        "schema_version": SCHEMA_VERSION,
        "shards": [{"name": name, **shard} for name in names],
        "images": len(names),
        "classes": ["a"],
        "most_labels": 1,
        "images_read": len(names),
        "rejected": {},
        "build": {},
    }
    return json.dumps(record).encode()


@pytest.mark.parametrize("names", [*[("fine", name) for name in OUTWARD], ("fine", "FINE"), ("fine", "fine")])
def test_a_manifest_names_plain_shards_each_once(tmp_path, names):
    (tmp_path / MANIFEST).write_bytes(manifest_with("fine"))
    assert read_manifest(tmp_path).shards[0].name == "fine"
    (tmp_path / MANIFEST).write_bytes(manifest_with(*names))
    with pytest.raises(EnvironmentFault, match="expected plain file names, each once"):
        read_manifest(tmp_path)


def test_a_dataset_on_a_store_that_a_build_takes_over_names_plain_shards(tmp_path):
    with serve() as server:
        server.objects[f"set/{MANIFEST}"] = manifest_with("../evil")
        server.objects["set/../evil.parquet"] = b"evil"
        destination = Destination(directory=tmp_path / "out", url=f"{server.url}/set")
        with pytest.raises(EnvironmentFault, match=r"'\.\./evil'; expected plain file names"):
            destination.take_over({})
    assert not list(tmp_path.rglob("*evil*"))


# ---- archives ---------------------------------------------------------------------------------------------------------


def tar_of(*infos: tarfile.TarInfo, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info in infos:
            info.size = len(content) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return buffer.getvalue()


def test_members_with_outward_names_are_read_where_they_lie_and_written_nowhere(tmp_path):
    names = ["../../evil.png", "/tmp/evil.png", "a/../../../evil.png", "evil.png", "EVIL.png", "~/evil.png", "$(evil).png"]
    content = encode_png(smooth_image(np.random.default_rng(0), 8, 8))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "part.tar").write_bytes(tar_of(*map(tarfile.TarInfo, names), content=content))
    before = set(os.listdir("/tmp"))
    index_dataset(find_tars(str(tmp_path / "in")), out=tmp_path / "out", show_progress=False)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.images == len(names)
    sources = read_table(manifest.directory / "part.parquet")["source"]
    assert [source.partition(":")[2] for source in sources] == names
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {"in/part.tar", *(f"out/{name}" for name in os.listdir(tmp_path / "out"))}
    assert not [name for name in set(os.listdir("/tmp")) - before if "evil" in name] and not Path("/tmp/evil.png").exists()


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
    ],
)
def test_a_member_that_is_no_file_is_refused(kind, what):
    info = tarfile.TarInfo("evil.png")
    info.type, info.linkname = kind, "/etc/passwd"
    content = tar_of(tarfile.TarInfo("a.png"), info, content=b"x")
    with pytest.raises(BadTar, match=f"evil.png is {what}"):
        list(members(lambda offset, count: content[offset : offset + count], len(content)))
