"""Files appear whole or not at all, and equal records give equal bytes."""

import os
import secrets

import pytest
import xxhash

from vitscale.base import files
from vitscale.base.errors import EnvironmentFault


def test_a_file_is_renamed_into_place_after_its_bytes_are_flushed(tmp_path, monkeypatch):
    acts = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (acts.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (acts.append(("rename", str(b))), real_replace(a, b)))
    path = tmp_path / "record.json"
    monkeypatch.setattr(secrets, "token_hex", lambda count: "ab" * count)
    files.write_bytes(path, b"content")
    temporary = str(tmp_path / ".record.json.tmp-abababababab")
    assert acts == [("fsync", temporary), ("rename", str(path)), ("fsync", str(tmp_path))]
    assert path.read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["record.json"]


def test_a_write_that_dies_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    files.write_bytes(path, b"old")

    def die(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(OSError, match="no space"):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["record.json"], "what was half written is gone"


def test_no_two_writers_share_a_temporary_name(tmp_path):
    # The number of a process would not do: machines and containers that share a directory have the same ones.
    path = tmp_path / "record.json"
    with files.temporary_beside(path) as one, files.temporary_beside(path) as other:
        assert one != other
        assert {one.parent, other.parent} == {tmp_path}
        one.write_bytes(b"half")
    assert os.listdir(tmp_path) == []


def test_what_a_killed_writer_left_is_deleted_and_nothing_else(tmp_path):
    path = tmp_path / "status.json"
    files.write_bytes(path, b"old")
    (tmp_path / ".status.json.tmp-0123456789ab").write_bytes(b"half")
    (tmp_path / ".hidden").write_bytes(b"mine")
    with files.temporary_beside(path) as temporary:  # of another thread, just now
        temporary.write_bytes(b"new")
        files.remove_temporaries(tmp_path)
        assert {file.name for file in tmp_path.iterdir()} == {"status.json", ".hidden", temporary.name}
    files.remove_temporaries(tmp_path / "absent")


def test_a_directory_is_published_by_one_rename(tmp_path):
    partial, final = tmp_path / "d.partial", tmp_path / "d"
    partial.mkdir()
    (partial / "a").write_text("a")
    files.publish(partial, final)
    assert not partial.exists()
    assert (final / "a").read_text() == "a"


def test_equal_records_give_equal_bytes(tmp_path):
    files.write_json(tmp_path / "a", {"b": [1, 0.1], "a": "é"})
    files.write_json(tmp_path / "b", {"a": "é", "b": [1, 0.1]})
    expected = '{\n  "a": "é",\n  "b": [\n    1,\n    0.1\n  ]\n}\n'.encode()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == expected
    assert files.read_json(tmp_path / "a") == {"a": "é", "b": [1, 0.1]}


@pytest.mark.parametrize(("content", "said"), [(None, "found none"), (b"{", "JSON"), (b"\xff\xfe{", "JSON")])
def test_a_missing_or_damaged_json_file_is_named(tmp_path, content, said):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EnvironmentFault, match=said) as caught:
        files.read_json(path)
    assert str(path) in str(caught.value)


def test_hashes_are_the_published_functions_of_the_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "HASH_CHUNK_BYTES", 2)  # several chunks, the last one short
    (tmp_path / "a").write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert files.sha256_file(tmp_path / "a") == files.sha256_bytes(b"abc") == abc
    assert files.xxh3_64(b"") == 0x2D06800538D394C2  # XXH3_64bits of nothing, seed 0 (xxHash specification)
    assert files.xxh3_64(b"abc") == xxhash.xxh3_64(b"abc").intdigest()
