"""What lies where in a plain tar: names, offsets and sizes of its regular files, without reading their content.

Python's tarfile ends without a word at the first header it does not understand, and what follows is lost. Here an
archive is walked to its end mark, or `BadTar` says what is wrong and at which byte.

member    one regular file: name, offset and size of its content
sample    adjacent members of one key; the key is the path up to the first dot of its last component (WebDataset)

Understood: USTAR with prefix, GNU (long names, base-256 sizes), PAX (path, size), v7. Directories are passed over.
Refused: compressed and sparse archives, links, devices, and headers larger than any real one.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

BLOCK_BYTES = 512
HEADER_BYTES_MAX = 1 << 20
"""Longest GNU long name or PAX header: 250 times the longest path of Linux."""
EXTENSIONS_MAX = 8
"""Extension headers (long name, long link, PAX) before one member; real archives have at most three."""
TAIL_BYTES_MAX = 1 << 20
"""Zeros after the end mark: archives are filled up to whole records, 10 kB by default."""

# One read covers the end of an image, a label and the next header; more would be waste beside images of 100 kB.
_REACH_BYTES = 8192
_ZEROS = bytes(BLOCK_BYTES)
_POSIX_MAGIC = b"ustar\0"
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x1f\x9d": "compress",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"M": "the continuation of another volume",
    b"S": "a sparse file",
}
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


class BadTar(Exception):
    """These bytes are no plain tar from beginning to end: `reason` for reading, `offset` of the first bad byte."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason, offset)
        self.reason = reason
        self.offset = offset

    def __str__(self) -> str:
        return f"{self.reason} (byte {self.offset:,})"


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file of a tar. In its name, bytes that are not UTF-8 stand as \\xNN."""

    name: str
    offset: int
    """Of the content, bytes from the beginning of the tar."""
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class TarSample:
    """Adjacent members of one key, by ending in lower case without its dot: `jpg`, `cls`, `seg.png`."""

    key: str
    members: dict[str, Member]


def members(read_at: Callable[[int, int], bytes], size: int) -> Iterator[Member]:
    """The regular files of a tar of `size` bytes, in its order; read_at(offset, count) gives its bytes.

    Raises BadTar: compressed, sparse or link; wrong checksum; a member or header cut short; no end mark; data after it.
    A tar that stops after a whole member without its two zero blocks is refused too: nobody can tell how much is missing.
    """
    blocks = _Blocks(read_at, size)
    _refuse_compressed(read_at(0, min(size, BLOCK_BYTES)))
    everywhere: dict[str, str] = {}  # PAX records of global headers
    extended: dict[str, str] = {}  # records for the next member alone
    extensions = at = 0
    while (block := blocks.at(at)) != _ZEROS:
        _check_sum(block, at)
        kind = block[156:157]
        length = _number(block[124:136], "size", at)
        content = at + BLOCK_BYTES
        if kind in (b"L", b"K", b"x", b"X", b"g"):
            extensions += 1
            if extensions > EXTENSIONS_MAX:
                raise BadTar(f"more than {EXTENSIONS_MAX} extension headers before one member", at)
            if length > HEADER_BYTES_MAX:
                raise BadTar(f"an extension header of {length:,} bytes, at most {HEADER_BYTES_MAX:,} are read", at)
            text = blocks.read(content, length)
            if kind == b"L":
                extended["path"] = _text(text)
            elif kind != b"K":
                (everywhere if kind == b"g" else extended).update(_pax_records(text, content))
            at = content + _padded(length)
            continue
        name = _name(block)
        if extensions or everywhere:
            records = everywhere | extended
            name, length = records.get("path", name), _pax_size(records, length, at)
            if any(key.startswith("GNU.sparse") for key in records):
                raise BadTar(f"{name} is a sparse file; pack it without --sparse", at)
            extended, extensions = {}, 0
        if kind == b"5" or (kind == b"\0" and name.endswith("/")) or kind == b"V":
            at = content  # directories and volume labels have no content, whatever their size says
            continue
        if kind not in (b"0", b"\0", b"7"):
            what = _REFUSED.get(kind, f"of the unknown type {kind!r}")
            raise BadTar(f"{name} is {what}; pack regular files only (tar --dereference --hard-dereference)", at)
        if content + length > size:
            raise BadTar(f"{name} is cut: {length:,} bytes expected, {size - content:,} are there", content)
        yield Member(name, content, length)
        at = content + _padded(length)
    if extensions:
        raise BadTar("the archive ends after an extension header", at)
    _check_tail(blocks, at, size)


def samples(members: Iterable[Member]) -> Iterator[TarSample]:
    """Adjacent members of one key together. Members without a key (`key_and_ending`) are left out.

    A second member of the same key and ending begins another sample of that key; it is for the caller to refuse it.
    """
    key, together = "", dict[str, Member]()
    for member in members:
        if (parts := key_and_ending(member.name)) is None:
            continue
        if together and (parts[0] != key or parts[1] in together):
            yield TarSample(key, together)
            together = {}
        key = parts[0]
        together[parts[1]] = member
    if together:
        yield TarSample(key, together)


def key_and_ending(name: str) -> tuple[str, str] | None:
    """(key, ending in lower case) of a member by WebDataset's rule; None for `README` and `a/.hidden.jpg`."""
    match = _KEY.fullmatch(name)
    return (match[1], match[2].lower()) if match else None


class _Blocks:
    """Bytes of the tar by offset, read a little ahead."""

    def __init__(self, read_at: Callable[[int, int], bytes], size: int) -> None:
        self._read_at = read_at
        self._size = size
        self._start = 0
        self._ahead = b""

    def at(self, offset: int) -> bytes:
        """The block at `offset`. Raises BadTar where the tar ends before it."""
        start = offset - self._start
        if start < 0 or start + BLOCK_BYTES > len(self._ahead):
            if offset > self._size:
                raise BadTar("the tar ends within its last member", self._size)
            if offset == self._size:
                raise BadTar(
                    "the end mark is missing, so the tar may have been cut; fetch it again, or append the mark "
                    "(truncate -s +1024 FILE) if you know that nothing is missing",
                    self._size,
                )
            self._ahead = self._read_at(offset, min(_REACH_BYTES, self._size - offset))
            self._start, start = offset, 0
            if len(self._ahead) < BLOCK_BYTES:
                raise BadTar("the tar ends within a header", offset)
        return self._ahead[start : start + BLOCK_BYTES]

    def read(self, offset: int, count: int) -> bytes:
        content = self._read_at(offset, min(count, max(0, self._size - offset)))
        if len(content) < count:
            raise BadTar("the tar ends within an extension header", offset)
        return content


def _refuse_compressed(beginning: bytes) -> None:
    if not beginning:
        raise BadTar("the file is empty", 0)
    for magic, name in _COMPRESSED.items():
        if beginning.startswith(magic):
            raise BadTar(f"the file is compressed ({name}), expected a plain tar; unpack the compression first", 0)


def _check_sum(block: bytes, at: int) -> None:
    stored = _number(block[148:156], "checksum", at)
    found = sum(block) - sum(block[148:156]) + 8 * 0x20
    if stored != found:
        # Some historical programs summed signed bytes.
        signed = found - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
        if stored != signed:
            raise BadTar("this is no header of a tar: its checksum is wrong", at)


def _number(field: bytes, what: str, at: int) -> int:
    """Octal digits, or GNU's base 256 behind a byte of 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if digits and not digits.isdigit():
        raise BadTar(f"the {what} in a header is {field!r}, which is no number", at)
    try:
        return int(digits or b"0", 8)
    except ValueError:
        raise BadTar(f"the {what} in a header is {field!r}, which is no octal number", at) from None


def _name(block: bytes) -> str:
    name = _text(block[:100])
    if block[257:263] == _POSIX_MAGIC and block[345]:
        return f"{_text(block[345:500])}/{name}"
    return name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _pax_records(content: bytes, at: int) -> dict[str, str]:
    """`LENGTH KEY=VALUE\\n`, where the length counts the whole record."""
    records, start = {}, 0
    content = content.rstrip(b"\0")
    while start < len(content):
        space = content.find(b" ", start, start + 8)
        digits = content[start:space]
        end = start + int(digits) if space >= 0 and digits.isdigit() else 0
        key, equals, value = content[space + 1 : end - 1].partition(b"=")
        if not start < end <= len(content) or content[end - 1 : end] != b"\n" or not equals:
            raise BadTar("a PAX header is damaged", at + start)
        records[key.decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
        start = end
    return records


def _pax_size(records: dict[str, str], otherwise: int, at: int) -> int:
    text = records.get("size")
    if text is None:
        return otherwise
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise BadTar(f"the size in a PAX header is {text[:40]!r}, which is no number", at)
    return int(text)


def _padded(length: int) -> int:
    return -(-length // BLOCK_BYTES) * BLOCK_BYTES


def _check_tail(blocks: _Blocks, at: int, size: int) -> None:
    """Two zero blocks, and nothing but zeros behind them: a second archive there would be lost in silence."""
    if size - at > 2 * BLOCK_BYTES + TAIL_BYTES_MAX:
        raise BadTar(f"{size - at:,} bytes follow the last member, where only an end mark should", at)
    if size - at < 2 * BLOCK_BYTES:
        raise BadTar("half of the end mark is missing, so the tar may have been cut; fetch it again", at)
    tail = blocks.read(at, size - at)
    if tail.count(0) != len(tail):
        data = next(i for i, byte in enumerate(tail) if byte)
        raise BadTar("data follow the end mark (two archives in one file?); unpack and pack them as one", at + data)
