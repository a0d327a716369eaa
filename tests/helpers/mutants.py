"""Images that were damaged on purpose, and files that are far larger than they look. A pure function of numbers."""

import io
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from tests.helpers.shards import smooth_image

PNG = b"\x89PNG\r\n\x1a\n"


def whole_images() -> list[bytes]:
    """One of each kind that a data set may hold."""
    generator = np.random.default_rng(0)
    pixels = smooth_image(generator, 90, 120) // 2 + generator.integers(0, 128, (90, 120, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    makers: list[tuple[Image.Image, str, dict]] = [
        (image, "JPEG", {"quality": 90}),
        (image, "JPEG", {"quality": 75, "subsampling": 0, "exif": exif}),
        (image, "JPEG", {"quality": 85, "progressive": True}),
        (image, "JPEG", {"quality": 85, "restart_marker_blocks": 4}),
        (image.convert("L"), "JPEG", {"quality": 85}),
        (image.convert("CMYK"), "JPEG", {"quality": 85}),
        (image, "PNG", {}),
        (image.convert("L"), "PNG", {}),
        (image.convert("P"), "PNG", {}),
        (image.convert("RGBA"), "PNG", {}),
        (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG", {}),
        (image, "WEBP", {"quality": 80}),
        (image, "WEBP", {"lossless": True}),
        (image.convert("RGBA"), "WEBP", {"quality": 60}),
    ]
    found = []
    for picture, kind, options in makers:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        found.append(buffer.getvalue())
    return found


def mutants(count: int, *, seed: int) -> Iterator[bytes]:
    """Whole images with one to three damages each."""
    whole = whole_images()
    generator = random.Random(seed)
    for number in range(count):
        content = bytearray(whole[number % len(whole)])
        for _ in range(generator.choice((1, 1, 1, 2, 3))):
            content = generator.choice(DAMAGES)(generator, content, whole)
        yield bytes(content)


def _bits(generator: random.Random, content: bytearray, _: list[bytes]) -> bytearray:
    for _ in range(generator.choice((1, 1, 3, 20))):
        if content:
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    return content


def _noise(generator: random.Random, content: bytearray, _: list[bytes]) -> bytearray:
    start = generator.randrange(len(content) + 1)
    piece = generator.randbytes(generator.randrange(1, 40))
    content[start : start + len(piece)] = piece
    return content


def _cut(generator: random.Random, content: bytearray, _: list[bytes]) -> bytearray:
    return content[: generator.randrange(len(content) + 1)]


def _hole(generator: random.Random, content: bytearray, _: list[bytes]) -> bytearray:
    start = generator.randrange(len(content) + 1)
    del content[start : start + generator.randrange(1, 300)]
    return content


def _zeros(generator: random.Random, content: bytearray, _: list[bytes]) -> bytearray:
    start = generator.randrange(len(content) + 1)
    length = min(generator.randrange(1, 600), len(content) - start)
    content[start : start + length] = bytes(length)
    return content


def _again(generator: random.Random, content: bytearray, _: list[bytes]) -> bytearray:
    start = generator.randrange(len(content) + 1)
    piece = content[start : start + generator.randrange(1, 300)]
    content[start:start] = piece
    return content


def _splice(generator: random.Random, content: bytearray, whole: list[bytes]) -> bytearray:
    """The head of one image and the tail of another."""
    other = generator.choice(whole)
    return content[: generator.randrange(len(content) + 1)] + other[generator.randrange(len(other)) :]


def _header(generator: random.Random, content: bytearray, _: list[bytes]) -> bytearray:
    for _ in range(generator.randrange(1, 5)):
        if content:
            content[generator.randrange(min(len(content), 64))] = generator.choice(
                (0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256))
            )
    return content


def _marker(generator: random.Random, content: bytearray, _: list[bytes]) -> bytearray:
    """A JPEG marker becomes another one, or gets another length."""
    places = [at for at in range(len(content) - 4) if content[at] == 0xFF and content[at + 1] not in (0, 0xFF)]
    if places:
        at = generator.choice(places)
        if generator.random() < 0.5:
            content[at + 1] = generator.randrange(1, 255)
        else:
            content[at + 2 : at + 4] = generator.randbytes(2)
    return content


def _chunk_length(generator: random.Random, content: bytearray, _: list[bytes]) -> bytearray:
    """A PNG or RIFF chunk gets another length or content, with a right checksum where the format has one."""
    at = content.find(generator.choice((b"IHDR", b"IDAT", b"PLTE", b"tRNS", b"VP8 ", b"VP8L", b"VP8X", b"ALPH")))
    if at < 4 or at + 8 > len(content):
        return content
    if generator.random() < 0.5:
        content[at - 4 : at] = generator.randbytes(4)
    else:
        length = int.from_bytes(content[at - 4 : at], "big")
        if length and at + 8 + length <= len(content):
            content[at + 4 + generator.randrange(length)] = generator.randrange(256)
            content[at + 4 + length : at + 8 + length] = zlib.crc32(content[at : at + 4 + length]).to_bytes(4, "big")
    return content


DAMAGES: list[Callable[[random.Random, bytearray, list[bytes]], bytearray]] = [
    _bits,
    _noise,
    _cut,
    _hole,
    _zeros,
    _again,
    _splice,
    _header,
    _marker,
    _chunk_length,
]


# ---- bombs ----------------------------------------------------------------------------------------------------------


def write_bombs(directory: Path) -> list[Path]:
    """Files whose reader may be made to need much time or memory; the ending tells what they pretend to be."""
    jpeg, progressive, png = whole_images()[0], whole_images()[2], whole_images()[6]
    zeros = _deflated_zeros(1 << 30)
    bombs = {
        "pixels.png": _png(20000, 20000, _deflated_zeros(20000 * 60001)),
        "text.png": png[:33] + chunk(b"zTXt", b"Comment\0\0" + zeros) + png[33:],
        "itext.png": png[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zeros) + png[33:],
        "profile.png": png[:33] + chunk(b"iCCP", b"icc\0\0" + zeros) + png[33:],
        "overfull.png": _png(64, 64, zeros),
        "exif.jpg": jpeg[:2]
        + _segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x07\xff\xff\xff\xff\0\0\0\0" * 5000) * 400
        + jpeg[2:],
        "profile.jpg": jpeg[:2]
        + b"".join(_segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 255]) + bytes(65000)) for i in range(1, 256))
        + jpeg[2:],
        "pixels.jpg": _with_size(jpeg, 65500, 65500),
        "scans.jpg": _many_scans(_with_size(progressive, 5000, 5000), 5000),
        "segments.jpg": jpeg[:2] + _segment(0xFE, b"") * 2_000_000 + jpeg[2:],
        "fill.jpg": jpeg[:2] + b"\xff" * 8_000_000 + jpeg[2:],
        "stuffed.jpg": jpeg[:2] + b"\xff\0" * 10_000_000 + jpeg[2:],
        "chunks.png": png[:33] + chunk(b"tEXt", b"") * 1_000_000 + png[33:],
        "chunks.webp": b"RIFF" + (80_000_004).to_bytes(4, "little") + b"WEBP" + b"XXXX\0\0\0\0" * 10_000_000,
        "pixels.webp": _webp(16383, 16383),
        "sparse.tar": _typed(b"S", 300 << 30) + bytes(1024),
        "paxsparse.tar": _pax(b"22 GNU.sparse.major=1\n24 GNU.sparse.realsize=9" + b"\n") + _typed(b"0", 0) + bytes(1024),
        "gzip.tar": zlib.compress(bytes(1 << 20), 9, 31),
        "paxheader.tar": _typed(b"x", 1 << 30),
        "longnames.tar": (_typed(b"L", 300) + b"n" * 300 + bytes(212)) * 100_000,
        "nested.tar": _nested(_nested(b"x" * 5000)),
        "labels.tar": _tar([("a.json", b"[" * 10_000_000), ("a.jpg", jpeg)]),
        "cut.tar": _tar([("a.jpg", jpeg)])[:900],
    }
    paths = []
    for name, content in bombs.items():
        (directory / name).write_bytes(content)
        paths.append(directory / name)
    for name, size in (("paxheader.tar", 2 << 30), ("sparse.tar", 301 << 30)):
        with open(directory / name, "r+b") as file:
            file.truncate(size)  # holes: the size is there, the bytes are not
    return paths


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, data: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _deflated_zeros(count: int) -> bytes:
    """A zlib stream of that many zeros, made without compressing them all: equal pieces end at a full flush."""
    packer = zlib.compressobj(9, wbits=-15)
    piece = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    last = zlib.compressobj(9, wbits=-15)
    rest = last.compress(bytes(count % (1 << 20))) + last.flush()
    return b"\x78\xda" + piece * (count >> 20) + rest + (count % 65521 << 16 | 1).to_bytes(4, "big")


def _segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + (len(body) + 2).to_bytes(2, "big") + body


def _with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """The frame header says another size."""
    at = next(at for at in range(2, len(jpeg)) if jpeg[at] == 0xFF and jpeg[at + 1] in (0xC0, 0xC2) and jpeg[at + 4] == 8)
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


def _many_scans(jpeg: bytes, times: int) -> bytes:
    """The last scan of a progressive JPEG, refined again and again."""
    last = jpeg.rfind(b"\xff\xda")
    return jpeg[:-2] + jpeg[last:-2] * times + jpeg[-2:]


def _webp(width: int, height: int) -> bytes:
    """A lossless WebP of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 9, 9)).save(buffer, "WEBP", lossless=True)
    content = bytearray(buffer.getvalue())
    at = content.find(b"VP8L") + 9  # behind length and signature: 14 bits of width - 1, 14 of height - 1
    content[at : at + 4] = (
        int.from_bytes(content[at : at + 4], "little") & (0xF << 28) | (height - 1) << 14 | (width - 1)
    ).to_bytes(4, "little")
    return bytes(content)


def _typed(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("a.jpg")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)[-512:]


def _pax(records: bytes) -> bytes:
    return _typed(b"x", len(records)) + records + bytes(-len(records) % 512)


def _tar(files: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def _nested(content: bytes) -> bytes:
    return _tar([(f"{number}.tar", content) for number in range(50)])


def jpeg_of(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", pixels)[1].tobytes()
