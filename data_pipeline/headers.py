"""What an encoded image says about itself before any pixel is decoded: jpg, png, webp, read with the standard library.

Nothing is decompressed and nothing is allocated that the header asks for, so no file, however hostile, costs more than
a walk over its own bytes. The limit on pixels is applied to what is found here.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Format = Literal["jpg", "png", "webp"]
Reason = Literal["truncated", "unknown-format", "too-many-bytes", "too-many-pixels", "decode-error", "empty"]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_END = b"\xff\xd9"

_EXIF_ORIENTATION = 0x0112
_EXIF_ENTRIES_MAX = 1000
_FOREIGN = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "BigTIFF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"8BPS": "Photoshop",
    b"\0\0\x01\0": "icon",
    b"%PDF": "PDF",
}
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_ALONE = frozenset([0x01, *range(0xD0, 0xD8)])  # JPEG markers without a length
_FRAMES = frozenset([*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)])
_NO_FILL = re.compile(b"[^\xff]")
PARTS_MAX = 100_000
"""Segments or chunks that are walked: a PNG of 64 MB in pieces of 1 kB has fewer."""


class BadImage(Exception):
    """These bytes are no image that we can use: `reason` for counting, `detail` for reading."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """What an image says about itself before any pixel is decoded."""

    format: Format
    width: int
    height: int
    orientation: int
    """EXIF orientation, 1 to 8; 1 where nothing is said."""


class Frame(NamedTuple):
    """The start-of-frame segment of a JPEG."""

    at: int
    """Place of its marker in the bytes."""
    kind: int
    """Second byte of the marker: 0xC0, 0xC1 sequential, 0xC2 progressive, others are rare."""
    height: int
    width: int
    components: int


class Chunk(NamedTuple):
    """One chunk of a PNG or WebP."""

    kind: bytes
    start: int
    """Place of its content in the bytes."""
    size: int


def image_header(content: bytes) -> ImageHeader:
    """Format, size and orientation. Raises BadImage."""
    image_format = format_of(content)
    if image_format == "jpg":
        frame = jpeg_frame(content)
        width, height, orientation = frame.width, frame.height, _jpeg_orientation(content, end=frame.at)
    elif image_format == "png":
        width, height, orientation = _png_header(content)
    else:
        width, height, orientation = _webp_header(content)
    if width < 1 or height < 1:
        raise BadImage("decode-error", f"the header says {width} x {height} pixels")
    return ImageHeader(format=image_format, width=width, height=height, orientation=orientation)


def format_of(content: bytes) -> Format:
    """Which of our formats the first bytes announce. Raises BadImage that names a foreign one."""
    if content.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if content.startswith(PNG_SIGNATURE):
        return "png"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    if not content:
        raise BadImage("empty", "0 bytes")
    foreign = next((name for start, name in _FOREIGN.items() if content.startswith(start)), None)
    if content[4:8] == b"ftyp":
        foreign = "AVIF" if content[8:12] in (b"avif", b"avis") else "HEIC or video"
    found = f"this is {foreign}" if foreign else f"the bytes begin with {content[:8].hex(' ')}"
    raise BadImage("unknown-format", f"expected jpg, png or webp, {found}")


def jpeg_frame(content: bytes) -> Frame:
    """The first start-of-frame segment. Raises BadImage.

    Bytes between two segments are skipped as libjpeg does, which only warns of them: cameras and old editors left them.
    """
    at = 2
    try:
        for _ in range(PARTS_MAX):
            if content[at] != 0xFF:
                at = content.index(b"\xff", at)
            if content[at + 1] == 0xFF and (end_of_fill := _NO_FILL.search(content, at + 1)):
                at = end_of_fill.start() - 1
            kind = content[at + 1]
            if kind == 0 or kind in _ALONE:  # no segment: a stuffed byte, or a marker without a length
                at += 2
                continue
            if kind in (0xD9, 0xDA):
                raise BadImage("decode-error", "the picture data begin before any frame header")
            length = content[at + 2] << 8 | content[at + 3]
            if kind in _FRAMES:
                height, width = content[at + 5] << 8 | content[at + 6], content[at + 7] << 8 | content[at + 8]
                return Frame(at, kind, height, width, content[at + 9])
            at += 2 + max(length, 2)
    except (IndexError, ValueError):
        raise BadImage("truncated", "the file ends before its frame header") from None
    raise BadImage("decode-error", f"more than {PARTS_MAX:,} segments before the frame header")


def png_chunks(content: bytes) -> Iterator[Chunk]:
    """The chunks up to IEND, nothing checked but that they are whole. Raises BadImage."""
    at = len(PNG_SIGNATURE)
    for _ in range(PARTS_MAX):
        if at + 12 > len(content):
            raise BadImage("truncated", "the end of the file is missing")
        size, kind = int.from_bytes(content[at : at + 4]), content[at + 4 : at + 8]
        if at + 12 + size > len(content):
            raise BadImage("truncated", f"chunk {kind!r} of {size} bytes runs over the end of the file")
        yield Chunk(kind, at + 8, size)
        if kind == b"IEND":
            return
        at += 12 + size
    raise BadImage("decode-error", f"more than {PARTS_MAX:,} chunks")


def png_essence(content: bytes) -> bytes:
    """The same picture without ancillary chunks (texts, profiles, thumbnails: where bombs hide), every checksum compared.

    Raises BadImage.
    """
    kept = [PNG_SIGNATURE]
    view = memoryview(content)
    for kind, start, size in png_chunks(content):
        end = start + size
        if zlib.crc32(view[start - 4 : end]) != int.from_bytes(content[end : end + 4]):
            raise BadImage("decode-error", f"chunk {kind!r} does not have the checksum it carries")
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(content[start - 8 : end + 4])
    return b"".join(kept)


def is_cut(content: bytes, image_format: Format) -> bool:
    """Whether the mark that ends every file of this format is missing."""
    if image_format == "jpg":
        # Picture data never hold the end mark, but an embedded preview before the frame may. What follows the first
        # end is allowed: cameras append videos and second pictures.
        try:
            return content.rfind(JPEG_END) < jpeg_frame(content).at
        except BadImage:
            return True
    if image_format == "png":
        return b"IEND\xaeB`\x82" not in content
    return len(content) < 8 + int.from_bytes(content[4:8], "little")


def _png_header(content: bytes) -> tuple[int, int, int]:
    width = height = 0
    orientation = 1
    for kind, start, size in png_chunks(content):
        if start == len(PNG_SIGNATURE) + 8:
            if kind != b"IHDR" or size != 13:
                raise BadImage("decode-error", "expected the header chunk first")
            width, height, depth, colour = struct.unpack(">IIBB", content[start : start + 10])
            if depth not in _PNG_DEPTHS.get(colour, ()):
                raise BadImage("decode-error", f"{depth} bits of colour type {colour} do not exist")
        elif kind == b"eXIf":
            orientation = _exif_orientation(content[start : start + size])
    return width, height, orientation


def _webp_header(content: bytes) -> tuple[int, int, int]:
    width = height = 0
    orientation = 1
    try:
        for kind, start, size in _riff_chunks(content):
            if kind == b"VP8X":
                width = 1 + int.from_bytes(content[start + 4 : start + 7], "little")
                height = 1 + int.from_bytes(content[start + 7 : start + 10], "little")
            elif kind == b"EXIF":
                exif = content[start : start + size]
                orientation = _exif_orientation(exif.removeprefix(b"Exif\0\0"))
            elif kind == b"VP8L" and not width:
                bits = int.from_bytes(content[start + 1 : start + 5], "little")
                width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
            elif kind == b"VP8 " and not width:
                sizes = struct.unpack("<HH", content[start + 6 : start + 10])
                width, height = sizes[0] & 0x3FFF, sizes[1] & 0x3FFF
    except struct.error:
        raise BadImage("truncated", "the file ends in its header") from None
    if not width:
        raise BadImage("truncated" if is_cut(content, "webp") else "decode-error", "there is no picture in the file")
    return width, height, orientation


def _riff_chunks(content: bytes) -> Iterator[Chunk]:
    at = 12
    for _ in range(PARTS_MAX):
        if at + 8 > len(content):
            return
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        yield Chunk(content[at : at + 4], at + 8, size)
        at += 8 + size + size % 2


def _jpeg_orientation(content: bytes, *, end: int) -> int:
    at = content.find(b"Exif\0\0", 0, end)
    if at < 4:
        return 1
    length = content[at - 2] << 8 | content[at - 1]
    return _exif_orientation(content[at + 6 : at - 2 + length])


def _exif_orientation(tiff: bytes) -> int:
    """Tag 274 of the first directory; 1 where the metadata are damaged: they say nothing then."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(min(entries, _EXIF_ENTRIES_MAX)):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * entry)
            if tag == _EXIF_ORIENTATION:
                return value if (kind, count) == (3, 1) and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
