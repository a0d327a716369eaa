"""Laws of reading: the bytes of the index or an error that says where; bounded memory; safe in other processes."""

import dataclasses
import errno
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import storage
from data_pipeline.decode import encode_png
from data_pipeline.manifest import read_manifest
from data_pipeline.storage import DamagedBytes, LocalStorage, check_files
from tests.helpers.shards import numbered_images, numbered_labels, write_dataset
from vitscale.base.errors import HostFault, TransientFault

SIZES = [3, 1, 4, 2]


@pytest.fixture
def dataset(tmp_path):
    images = numbered_images(SIZES)
    return write_dataset(tmp_path / "set", images, numbered_labels(SIZES), []), images


def test_every_row_gives_its_key_its_label_and_its_bytes(dataset):
    manifest, images = dataset
    store = LocalStorage(manifest)
    number = 0
    for shard, pictures in enumerate(images):
        for row, picture in enumerate(pictures):
            stored = store.read(shard, row)
            assert (stored.key, stored.label) == (f"{number:09d}".encode(), number)
            assert stored.content == encode_png(picture)
            number += 1


def test_one_flipped_bit_is_named_before_anything_decodes_it(dataset):
    manifest, _ = dataset
    tar = manifest.directory / "train-000002.tar"
    content = bytearray(tar.read_bytes())
    content[512 + 100] ^= 1  # in the first image, behind its header
    tar.write_bytes(content)
    store = LocalStorage(manifest)
    with pytest.raises(DamagedBytes, match="do not have the hash") as caught:
        store.read(2, 0)
    assert (caught.value.key, caught.value.reason) == (b"000000004", "wrong-hash")
    assert store.read(2, 1).key == b"000000005"  # the others are whole


def test_a_file_that_ends_early_is_damage(dataset):
    manifest, _ = dataset
    tar = manifest.directory / "train-000000.tar"
    os.truncate(tar, 600)
    with pytest.raises(DamagedBytes, match=r"expected \d+ bytes of image, the file ends after 88") as caught:
        LocalStorage(manifest).read(0, 0)
    assert (caught.value.key, caught.value.reason) == (b"000000000", "short-read")


def test_a_missing_tar_or_index_speaks_from_every_rank(dataset):
    manifest, _ = dataset
    (manifest.directory / "train-000001.tar").unlink()
    with pytest.raises(HostFault, match=r"train-000001\.tar, got: No such file"):
        LocalStorage(manifest).read(1, 0)
    (manifest.directory / "train-000003.parquet").unlink()
    with pytest.raises(HostFault, match=r"train-000003\.parquet"):
        LocalStorage(manifest).read(3, 0)


def test_a_failing_file_system_is_transient(dataset, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    begun_at_s = time.monotonic()
    with pytest.raises(TransientFault, match=r"train-000000\.tar failed for 0 s .*Input/output error") as caught:
        LocalStorage(dataset[0], io_deadline_s=0.2).read(0, 0)
    assert caught.value.exit_code == 75 and 0.2 < time.monotonic() - begun_at_s < 2


def test_faults_of_a_network_file_system_that_pass_are_met_with_the_file_opened_anew(dataset, monkeypatch):
    manifest, images = dataset
    store = LocalStorage(manifest)
    store.read(2, 0)
    tar = manifest.directory / "train-000002.tar"
    before = os.stat(tar).st_ino
    (manifest.directory / "moved").write_bytes(tar.read_bytes())
    os.replace(manifest.directory / "moved", tar)  # another inode: the server has a new file under the old name
    faults, pread = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT], os.pread

    def fail_at_first(descriptor, size, offset):
        if faults or os.fstat(descriptor).st_ino == before:
            raise OSError(faults.pop() if faults else errno.ESTALE, "Stale file handle")
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", fail_at_first)
    assert store.read(2, 3).content == encode_png(images[2][3])
    assert faults == []


def test_an_index_is_read_again_too_while_its_file_system_fails(dataset, monkeypatch):
    manifest, _ = dataset
    expected, faults, read_bytes = (
        LocalStorage(manifest).read(2, 3),
        [errno.EIO, errno.ESTALE, errno.ETIMEDOUT],
        Path.read_bytes,
    )

    def fail_at_first(path: Path) -> bytes:
        if faults and path.suffix == ".parquet":
            raise OSError(faults.pop(), "fault")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", fail_at_first)
    assert LocalStorage(manifest).read(2, 3) == expected and faults == []
    faults.extend([errno.EIO] * 1000)
    with pytest.raises(TransientFault, match=r"reading .*train-000002\.parquet failed for 0 s"):
        LocalStorage(manifest, io_deadline_s=0.2).read(2, 3)
    faults.clear()
    (manifest.directory / "train-000002.parquet").unlink()
    with pytest.raises(HostFault, match=r"train-000002\.parquet cannot be read"):
        LocalStorage(manifest).read(2, 3)


def test_a_missing_tar_is_not_waited_for(dataset):
    manifest, _ = dataset
    (manifest.directory / "train-000001.tar").unlink()
    begun_at_s = time.monotonic()
    with pytest.raises(HostFault):
        LocalStorage(manifest).read(1, 0)
    assert time.monotonic() - begun_at_s < 1


def test_tars_are_read_where_the_manifest_or_the_reader_says(dataset, tmp_path):
    manifest, images = dataset
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for tar in manifest.directory.glob("*.tar"):
        os.replace(tar, elsewhere / tar.name)
    with pytest.raises(HostFault):
        LocalStorage(manifest).read(0, 0)
    moved = dataclasses.replace(manifest, tars_at=str(elsewhere))
    check_files(moved)
    for store in (LocalStorage(manifest, tars=elsewhere), LocalStorage(moved)):
        assert store.read(2, 1).content == encode_png(images[2][1])
        assert pickle.loads(pickle.dumps(store)).read(2, 1) == store.read(2, 1)  # noqa: S301 our own bytes


def test_tars_that_the_cache_has_evicted_do_not_stay_open(dataset, monkeypatch):
    monkeypatch.setattr(storage, "READS_PER_LOOK", 3)
    manifest = dataclasses.replace(dataset[0], tars_at="s3://bucket/set")
    store = LocalStorage(manifest, tars=manifest.directory)
    store.read(0, 0)
    store.read(2, 0)
    evicted = manifest.directory / "train-000000.tar"
    evicted.unlink()
    for _ in range(4):
        store.read(2, 1)
    assert open_tars(manifest.directory) == [manifest.directory.resolve() / "train-000002.tar"]


def test_a_read_that_comes_in_pieces_is_put_together(dataset, monkeypatch):
    whole = LocalStorage(dataset[0]).read(2, 3)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 50), offset))
    assert LocalStorage(dataset[0]).read(2, 3) == whole


def open_tars(directory: Path) -> list[Path]:
    """The tars of one dataset that this process holds open; other tests may have left theirs to the garbage collector."""
    paths = [Path(os.path.realpath(f"/proc/self/fd/{number}")) for number in os.listdir("/proc/self/fd")]
    return [path for path in paths if path.suffix == ".tar" and path.parent == directory.resolve()]


def test_indexes_and_open_files_stay_bounded(dataset, monkeypatch):
    monkeypatch.setattr(storage, "INDEX_ROWS_KEPT", 5)
    monkeypatch.setattr(storage, "FILES_KEPT", 2)
    loads = []
    load = storage.read_index
    monkeypatch.setattr(storage, "read_index", lambda m, shard, **how: loads.append(shard) or load(m, shard, **how))
    store = LocalStorage(dataset[0])
    keys = [store.read(shard, 0).key for shard in (0, 1, 0, 2, 2, 0, 3, 1)]
    assert [int(key) for key in keys] == [0, 3, 0, 4, 4, 0, 8, 3]
    assert loads == [0, 1, 2, 0, 3, 1]  # 0 and 1 fit; 2 drives both out; then 0 drives out 2; 0, 3 fit; 1 drives nothing new
    assert len(open_tars(dataset[0].directory)) == 2
    store.close()
    assert open_tars(dataset[0].directory) == []
    assert store.read(0, 0).key == b"000000000"


def test_a_copy_in_another_process_opens_its_own_files(dataset):
    store = LocalStorage(dataset[0])
    before = store.read(2, 0)
    packed = pickle.dumps(store)
    assert pickle.loads(packed).read(2, 0) == before  # noqa: S301 our own bytes


def test_check_files_passes_a_whole_dataset_and_names_the_first_file_that_fails(dataset):
    manifest, _ = dataset
    check_files(manifest)
    os.truncate(manifest.directory / "train-000001.tar", 512)
    (manifest.directory / "train-000002.parquet").unlink()
    (manifest.directory / "train-000003.tar").unlink()
    with pytest.raises(HostFault) as caught:
        check_files(read_manifest(manifest.directory))
    size = manifest.shards[1].tar_bytes
    assert f"train-000001.tar has 512 bytes instead of {size}, and 2 more files like it" in str(caught.value)
    # Two ranks of a node: each asks for every second shard, and together they find all of it.
    with pytest.raises(HostFault, match=r"but train-000002\.parquet is missing; restore"):
        check_files(manifest, local_rank=0, local_world=2)
    with pytest.raises(HostFault, match=r"but train-000001\.tar has 512 bytes instead of \d+, and 1 more files"):
        check_files(manifest, local_rank=1, local_world=2)


def test_check_files_asks_a_dataset_on_a_store_for_its_local_records_alone(dataset):
    manifest, _ = dataset
    for tar in manifest.directory.glob("*.tar"):
        tar.unlink()
    local_records = dataclasses.replace(manifest, tars_at="s3://bucket/set")
    check_files(local_records)
    (manifest.directory / "train-000002.parquet").unlink()
    with pytest.raises(HostFault, match=r"train-000002\.parquet is missing"):
        check_files(local_records)
    cached = manifest.directory.parent / manifest.fingerprint
    os.rename(manifest.directory, cached)
    check_files(dataclasses.replace(local_records, directory=cached))


def test_labels_of_unlabelled_images_stay_minus_one(tmp_path):
    manifest = write_dataset(tmp_path, [[np.zeros((4, 4, 3), np.uint8)]], [[-1]], [])
    assert LocalStorage(manifest).read(0, 0).label == -1
