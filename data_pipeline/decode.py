"""Encoded bytes to pixels and back: the home of simplejpeg, OpenCV and Pillow. Images are H,W,3 arrays of uint8, RGB.

Formats: jpg, png, webp (first frame). Grayscale becomes three equal channels; palettes and CMYK become RGB; an alpha
channel is dropped, as torchvision and timm do; of 16-bit channels the high byte is kept, as libpng does. The EXIF
orientation stands in the index of the shard; `oriented` applies it.
"""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import simplejpeg
from PIL import Image

# Parallelism is processes (loader.py): threads of OpenCV would take the cores of the matrix multiplication.
cv2.setNumThreads(0)
# decode_full has a limit of its own, and what is decoded for training has passed it.
Image.MAX_IMAGE_PIXELS = None

Format = Literal["jpg", "png", "webp"]
Reason = Literal["truncated", "unknown-format", "too-many-bytes", "too-many-pixels", "decode-error", "empty"]

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"
_JPEG_END = b"\xff\xd9"
_EXIF_ORIENTATION = 0x0112


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


def image_header(content: bytes) -> ImageHeader:
    """Format and size, read from the header alone. Raises BadImage."""
    image_format = _format_of(content)
    with _open(content, image_format) as image:
        width, height = image.size
        orientation = _orientation(image)
    return ImageHeader(format=image_format, width=width, height=height, orientation=orientation)


def decode_full(content: bytes, *, max_pixels: int) -> np.ndarray:
    """The image, after every check we know: the build decides with it what enters a dataset.

    Data that ends early, carries a wrong checksum or makes libjpeg warn is an error, where a lenient decoder would
    return a partly gray picture. Raises BadImage.
    """
    header = image_header(content)
    if header.width * header.height > max_pixels:
        raise BadImage("too-many-pixels", f"{header.width} x {header.height} is more than {max_pixels} pixels")
    if header.format == "jpg":
        return _decode_jpeg(content, fast=False)
    if header.format == "png":
        with _open(content, "png") as image:
            try:
                image.verify()  # checksums of all chunks, which load() does not look at
            except (OSError, SyntaxError, ValueError) as error:
                raise _bad(content, "png", error) from None
    return _decode_by_pillow(content, header.format)


def decode(content: bytes) -> np.ndarray:
    """The image, for training: bytes that passed `decode_full` once. Raises BadImage.

    JPEGs take libjpeg's fast transform and plain chroma upsampling: a tenth of the time less, for 0.3 grey levels on top
    of the 2 to 4 that JPEG itself loses (photographs of 32 to 400 pixels at quality 90). Both are integer arithmetic:
    equal bytes give equal pixels.
    """
    image_format = _format_of(content)
    return _decode_jpeg(content, fast=True) if image_format == "jpg" else _decode_by_pillow(content, image_format)


def encode_png(image: np.ndarray) -> bytes:
    """A PNG of an H,W,3 or (gray) H,W array of uint8. Equal pixels give equal bytes on one version of zlib."""
    height, width = image.shape[:2]
    assert image.dtype == np.uint8 and image.shape[2:] in ((), (3,)) and height and width
    rows = np.ascontiguousarray(image).reshape(height, -1)
    raw = np.hstack([np.zeros((height, 1), np.uint8), rows]).tobytes()  # each row begins with its filter: none
    colour_type = 2 if image.ndim == 3 else 0
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    return _PNG_SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(raw, 9)) + _chunk(b"IEND", b"")


def encode_jpeg(image: np.ndarray, *, quality: int) -> bytes:
    """A JPEG of an H,W,3 array of uint8, colours at half resolution as in photographs. Equal pixels give equal bytes."""
    assert image.dtype == np.uint8 and image.ndim == 3
    # The slow transform: the fast one loses visibly above quality 95.
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "420", fastdct=False)


def resize(image: np.ndarray, *, width: int, height: int) -> np.ndarray:
    """Resize each axis on its own terms: by area where it shrinks (antialiased), linearly where it grows."""
    small_width, small_height = min(width, image.shape[1]), min(height, image.shape[0])
    if (small_height, small_width) != image.shape[:2]:
        image = cv2.resize(image, (small_width, small_height), interpolation=cv2.INTER_AREA)
    if (height, width) != image.shape[:2]:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image


def oriented(image: np.ndarray, orientation: int) -> np.ndarray:
    """The image as its EXIF orientation asks to be shown (Exif 2.32, tag 274)."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image[::-1] if orientation in (3, 4, 7, 8) else image


def _format_of(content: bytes) -> Format:
    if not content:
        raise BadImage("empty", "0 bytes")
    if content.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if content.startswith(_PNG_SIGNATURE):
        return "png"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    raise BadImage("unknown-format", f"expected jpg, png or webp, the bytes begin with {content[:8].hex(' ')}")


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, struct.error):  # damaged metadata say nothing
        return 1
    return orientation if orientation in range(1, 9) else 1


def _jpeg_header(content: bytes) -> tuple[int, int, str, str]:
    """(height, width, colour space, subsampling)."""
    try:
        return simplejpeg.decode_jpeg_header(content)
    except ValueError as error:
        raise _bad(content, "jpg", error) from None


def _decode_jpeg(content: bytes, *, fast: bool) -> np.ndarray:
    if _jpeg_header(content)[2] in ("CMYK", "YCCK"):
        return _decode_by_pillow(content, "jpg")  # knows Adobe's inverted inks
    try:
        return simplejpeg.decode_jpeg(content, colorspace="RGB", fastdct=fast, fastupsample=fast, strict=True)
    except ValueError as error:
        raise _bad(content, "jpg", error) from None


def _decode_by_pillow(content: bytes, image_format: Format) -> np.ndarray:
    with _open(content, image_format) as image:
        try:
            image.load()
            if image.mode.startswith("I"):  # 16-bit gray, which convert() would clip
                gray = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(gray[:, :, None], 3, axis=2)
            if "transparency" in image.info:
                image = image.convert("RGBA")
            pixels = np.array(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, struct.error, MemoryError) as error:
            raise _bad(content, image_format, error) from None
    if _is_cut(content, image_format):
        raise BadImage("truncated", "the end of the file is missing")
    return pixels


def _open(content: bytes, image_format: Format) -> Image.Image:
    names = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on metadata
            return Image.open(io.BytesIO(content), formats=[names[image_format]])
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise _bad(content, image_format, error) from None


def _bad(content: bytes, image_format: Format, error: Exception) -> BadImage:
    return BadImage("truncated" if _is_cut(content, image_format) else "decode-error", str(error))


def _is_cut(content: bytes, image_format: Format) -> bool:
    """Whether the mark that ends every file of this format is missing."""
    if image_format == "jpg":
        return not content.rstrip(b"\0").endswith(_JPEG_END)
    if image_format == "png":
        return _PNG_END not in content
    return len(content) < 8 + int.from_bytes(content[4:8], "little")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
