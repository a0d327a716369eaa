"""Laws of the tar scanner: it agrees with tarfile where an archive is whole, and never ends in silence where it is not."""

import gzip
import io
import random
import tarfile
from collections.abc import Callable, Sequence

import pytest

from data_pipeline.tars import BadTar, Member, TarSample, key_and_ending, members, samples

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar_of(files: Sequence[tuple[str, bytes]], *, form: str = "ustar", **fields: object) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=FORMATS[form]) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def listed(content: bytes) -> list[Member]:
    return list(members(reader(content), len(content)))


def reader(content: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, count: content[offset : offset + count]


def pairs(count: int, *, folder: str = "", size: int = 700) -> list[tuple[str, bytes]]:
    files = []
    for i in range(count):
        files += [(f"{folder}{i:04d}.jpg", bytes([i % 251]) * (size + i)), (f"{folder}{i:04d}.cls", str(i).encode())]
    return files


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("folder", ["", "./", "a" * 60 + "/" + "b" * 60 + "/", "ünï/"])
def test_names_offsets_and_sizes_are_those_of_tarfile(form: str, folder: str) -> None:
    content = tar_of(pairs(40, folder=folder), form=form)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [Member(info.name, info.offset_data, info.size) for info in tar]
    assert listed(content) == expected


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_names_longer_than_a_header_are_whole(form: str) -> None:
    name = "d/" * 900 + "x.jpg"
    content = tar_of([(name, b"1"), ("y.jpg", b"22")], form=form)
    assert [(member.name, member.size) for member in listed(content)] == [(name, 1), ("y.jpg", 2)]


def test_directories_and_volume_labels_are_no_members() -> None:
    content = tar_of([("a", b"")], type=tarfile.DIRTYPE)[:512] + tar_of([("label", b"")], type=b"V")[:512]
    assert [member.name for member in listed(content + tar_of([("a/b.jpg", b"1")]))] == ["a/b.jpg"]


def test_a_size_in_base_256_is_read() -> None:
    content = bytearray(tar_of([("a.jpg", b"x" * 1000), ("b.jpg", b"y")]))
    content[124:136] = b"\x80" + (1000).to_bytes(11, "big")
    with_sum(content)
    assert [member.size for member in listed(bytes(content))] == [1000, 1]


def test_a_size_of_a_pax_header_overrules_the_octal_one() -> None:
    content = tar_of([("a.jpg", b"x" * 1000)], form="pax", pax_headers={"size": "1000"})
    assert [(member.name, member.size) for member in listed(content)] == [("a.jpg", 1000)]


def test_a_name_that_is_not_utf_8_keeps_its_bytes_in_print() -> None:
    content = tar_of([("caf\udce9.jpg", b"1")])
    assert [member.name for member in listed(content)] == ["caf\\xe9.jpg"]


def with_sum(content: bytearray, at: int = 0) -> bytes:
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    return bytes(content)


def renamed(kind: bytes) -> bytes:
    content = bytearray(tar_of([("a.jpg", b"x")]))
    content[156:157] = kind
    return with_sum(content)


def pax(records: bytes, *, kind: bytes = b"x") -> bytes:
    return tar_of([("h", records)], type=kind)[: 512 + -(-len(records) // 512) * 512]


LONG = tar_of([("a" * 200, b"")], form="gnu")[:1024]
WHOLE = tar_of(pairs(3))


@pytest.mark.parametrize(
    ("content", "reason", "offset"),
    [
        (b"", "the file is empty", 0),
        (gzip.compress(WHOLE), r"compressed \(gzip\)", 0),
        (b"BZh91AY" + bytes(2000), r"compressed \(bzip2\)", 0),
        (b"\xfd7zXZ\0" + bytes(2000), r"compressed \(xz\)", 0),
        (b"\x28\xb5\x2f\xfd" + bytes(2000), r"compressed \(zstd\)", 0),
        (b"\xff\xd8\xff" + bytes(range(256)) * 8, "no number|checksum is wrong", 0),
        (WHOLE[:700], "0000.jpg is cut: 700 bytes expected, 188 are there", 512),
        (WHOLE[:100], "ends within a header", 0),
        (WHOLE[: 512 + 900], "ends within its last member", 1412),
        (WHOLE[: 512 + 1024], "end mark is missing", 1536),
        (WHOLE.rstrip(b"\0") + bytes(512 - len(WHOLE.rstrip(b"\0")) % 512 + 512), "half of the end mark", None),
        (WHOLE + WHOLE, "data follow the end mark", len(WHOLE)),
        (WHOLE + bytes(2 << 20), "bytes follow the last member", None),
        (renamed(b"1"), "a.jpg is a hard link", 0),
        (renamed(b"2"), "a.jpg is a symbolic link", 0),
        (renamed(b"S"), "a.jpg is a sparse file", 0),
        (renamed(b"M"), "a.jpg is the continuation", 0),
        (renamed(b"?"), "a.jpg is of the unknown type", 0),
        (pax(b"22 GNU.sparse.major=1\n") + WHOLE, "0000.jpg is a sparse file", 1024),
        (pax(b"99 path=a\n") + WHOLE, "PAX header is damaged", 512),
        (pax(b"x path=a\n") + WHOLE, "PAX header is damaged", 512),
        (pax(b"11 size=-1\n") + WHOLE, "size in a PAX header is '-1'", 1024),
        (pax(b"10 path=a\n") + bytes(1024), "ends after an extension header", 1024),
        (LONG * 9 + WHOLE, "more than 8 extension headers", 8192),
    ],
)
def test_what_is_no_plain_whole_tar_is_named(content: bytes, reason: str, offset: int | None) -> None:
    with pytest.raises(BadTar, match=reason) as caught:
        listed(content)
    assert offset is None or caught.value.offset == offset


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
def test_an_extension_header_of_gigabytes_is_refused_unread(kind: bytes) -> None:
    content = bytearray(renamed(kind))
    content[124:136] = b"%011o\0" % (2 << 30)
    content = with_sum(content)
    asked = []

    def read_at(offset: int, count: int) -> bytes:
        asked.append(count)
        return content[offset : offset + count]

    with pytest.raises(BadTar, match="an extension header of 2,147,483,648 bytes"):
        list(members(read_at, 3 << 30))
    assert max(asked) < 1 << 20


@pytest.mark.parametrize("form", FORMATS)
def test_one_changed_bit_or_a_cut_never_loses_a_member_in_silence(form: str) -> None:
    whole = tar_of(pairs(6, size=300), form=form, mtime=1.5)
    expected = listed(whole)
    generator = random.Random(form)
    refused = 0
    for _ in range(1500):
        content = bytearray(whole)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        del content[generator.choice([generator.randrange(len(content)), len(content)]) :]
        try:
            assert listed(bytes(content)) == expected
        except BadTar:
            refused += 1
    assert refused > 500


def test_samples_are_adjacent_members_of_one_key() -> None:
    names = ["d/1.jpg", "d/1.cls", "README", "d/2.JPG", "d/2.seg.png", "d/2.jpg", "e/2.jpg", "d/1.txt"]
    found = list(samples(Member(name, 0, i) for i, name in enumerate(names)))
    assert [(sample.key, {ending: member.size for ending, member in sample.members.items()}) for sample in found] == [
        ("d/1", {"jpg": 0, "cls": 1}),
        ("d/2", {"jpg": 3, "seg.png": 4}),
        ("d/2", {"jpg": 5}),
        ("e/2", {"jpg": 6}),
        ("d/1", {"txt": 7}),
    ]
    assert list(samples([])) == list[TarSample]()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("./a.b/c.d.E", ("./a.b/c", "d.e")),
        ("/x/y z.cls", ("/x/y z", "cls")),
        ("README", None),
        ("a.d/b", None),
        ("a/._b.jpg", None),
        (".hidden", None),
    ],
)
def test_the_key_ends_at_the_first_dot_of_the_last_component(name: str, expected: tuple[str, str] | None) -> None:
    assert key_and_ending(name) == expected
