"""Stand-in for the decoder, so that building can be tested; the real module replaces it."""

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


class BadImage(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class ImageHeader:
    format: str
    width: int
    height: int


def image_header(content: bytes) -> ImageHeader:
    if not content:
        raise BadImage("empty", "0 bytes")
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.format not in _FORMATS:
                raise BadImage("unknown-format", str(image.format))
            return ImageHeader(_FORMATS[image.format], *image.size)
    except OSError as error:
        raise BadImage("unknown-format", str(error).split("<")[0]) from None


def decode_full(content: bytes, *, max_pixels: int) -> np.ndarray:
    header = image_header(content)
    if header.width * header.height > max_pixels:
        raise BadImage("too-many-pixels", f"{header.width}x{header.height}")
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise BadImage("truncated" if "truncated" in str(error) else "decode-error", str(error)) from None


def encode_png(image: np.ndarray) -> bytes:
    height, width = image.shape[:2]
    colour = 0 if image.ndim == 2 else 2
    rows = b"".join(b"\0" + row.tobytes() for row in image)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
