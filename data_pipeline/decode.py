"""Encoded bytes to pixels and back: the home of OpenCV and Pillow. Images are H,W,3 arrays of uint8, RGB.

Formats: jpg, png, webp (first frame). Grayscale becomes three equal channels; palettes and CMYK become RGB; an alpha
channel is dropped, as torchvision and timm do; of 16-bit channels the high byte is kept, as libpng does. The EXIF
orientation stands in the index of the shard; `oriented` applies it. Colour profiles are not applied.
"""

import io
import struct
import warnings
import zlib
from collections import deque

import cv2
import numpy as np
from PIL import Image, ImageFile

from data_pipeline.headers import (
    PNG_SIGNATURE,
    BadImage,
    Format,
    Frame,
    ImageHeader,
    Reason,
    format_of,
    image_header,
    is_cut,
    jpeg_frame,
    png_chunks,
    png_essence,
)
from data_pipeline.jpeg import decode_checked, decode_for_crop, refuse_many_scans

__all__ = [
    "BadImage",
    "Format",
    "ImageHeader",
    "Picture",
    "Reason",
    "decode",
    "decode_damaged",
    "decode_full",
    "encode_png",
    "image_header",
    "oriented",
    "resize",
]

# Parallelism is processes (loader.py): threads of OpenCV would take the cores of the matrix multiplication.
cv2.setNumThreads(0)
# decode_full has a limit of its own, and what is decoded for training has passed it.
Image.MAX_IMAGE_PIXELS = None

_AS_STORED = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


PIXELS_MAX = 250_000_000
"""Nothing larger is decoded, whatever a dataset says of itself: 750 MB."""


class Picture:
    """An image of known size of which a rectangle is wanted; a JPEG is decoded as far as that rectangle needs."""

    def __init__(self, source: bytes | np.ndarray) -> None:
        """From encoded bytes, or from pixels that are there already. Raises BadImage."""
        self._frame: Frame | None = None
        if isinstance(source, bytes):
            self._content = source
            if format_of(source) == "jpg":
                frame = jpeg_frame(source)
                _refuse_size(frame.width, frame.height)
                # Inks are Pillow's work, and a frame without height is libjpeg's to complain about.
                self._frame = frame if frame.components != 4 and frame.height else None
            if self._frame is None:
                source = decode(source)
        if isinstance(source, np.ndarray):
            self._pixels = source
        self.height, self.width = source.shape[:2] if isinstance(source, np.ndarray) else frame[2:4]

    @property
    def is_scalable(self) -> bool:
        """Whether `crop` can decode at a half, a quarter, an eighth for less."""
        return self._frame is not None

    def crop(self, top: int, left: int, height: int, width: int, *, shrink: int = 1) -> np.ndarray:
        """That rectangle; with `shrink` (1, 2, 4, 8: a divisor of all four numbers) decoded that much smaller.

        The pixels are overwritten by the next picture this thread decodes. Raises BadImage.
        """
        bottom, right = top + height, left + width
        if self._frame is None:
            assert shrink == 1
            return self._pixels[top:bottom, left:right]
        assert top % shrink == left % shrink == height % shrink == width % shrink == 0
        pixels = decode_for_crop(self._content, self._frame, bottom=bottom, shrink=shrink)
        return pixels[top // shrink : bottom // shrink, left // shrink : right // shrink]


def decode_full(content: bytes, *, max_pixels: int) -> np.ndarray:
    """The image, after every check we know: the build decides with it what enters a dataset.

    Data that ends early, carries a wrong checksum or makes libjpeg lose picture data is an error, where a lenient
    decoder would return a partly gray picture. Nothing is decompressed before the size in the header was accepted, and
    no text, profile or preview ever is. Raises BadImage.
    """
    header = image_header(content)
    if header.width * header.height > max_pixels:
        raise BadImage("too-many-pixels", f"{header.width} x {header.height} is more than {max_pixels} pixels")
    if header.format == "jpg":
        frame = jpeg_frame(content)
        refuse_many_scans(content, frame)
        if frame.components != 4:
            return decode_checked(content)
    return _decode_by_pillow(png_essence(content) if header.format == "png" else content, header.format)


def decode(content: bytes) -> np.ndarray:
    """The whole image, for training: bytes that passed `decode_full` once. Raises BadImage."""
    image_format = format_of(content)
    if image_format == "jpg":
        frame = jpeg_frame(content)
        _refuse_size(frame.width, frame.height)
        if frame.components != 4:
            return decode_for_crop(content, frame, bottom=frame.height).copy()
    if image_format == "png":
        _refuse_size(*struct.unpack(">II", content[16:24].ljust(8, b"\0")))
        deque(png_chunks(content), maxlen=0)  # OpenCV makes room for any length that a chunk claims
        # Six times as fast as Pillow on small images, and equal to it in every mode; None where Pillow knows the reason.
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), _AS_STORED)
        if pixels is not None:
            return pixels
    if image_format == "webp":
        header = image_header(content)  # Pillow makes room for the picture before it tells its size
        _refuse_size(header.width, header.height)
    return _decode_by_pillow(content, image_format)


def encode_png(image: np.ndarray) -> bytes:
    """A PNG of an H,W,3 or (gray) H,W array of uint8. Equal pixels give equal bytes on one version of zlib."""
    height, width = image.shape[:2]
    assert image.dtype == np.uint8 and image.shape[2:] in ((), (3,)) and height and width
    rows = np.ascontiguousarray(image).reshape(height, -1)
    raw = np.hstack([np.zeros((height, 1), np.uint8), rows]).tobytes()  # each row begins with its filter: none
    colour_type = 2 if image.ndim == 3 else 0
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    return PNG_SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(raw, 9)) + _chunk(b"IEND", b"")


def resize(image: np.ndarray, *, width: int, height: int) -> np.ndarray:
    """Resize each axis on its own terms: by area where it shrinks (antialiased), linearly where it grows."""
    small_width, small_height = min(width, image.shape[1]), min(height, image.shape[0])
    if (small_height, small_width) != image.shape[:2]:
        image = cv2.resize(image, (small_width, small_height), interpolation=cv2.INTER_AREA)
    if (height, width) != image.shape[:2]:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image


def mirror(image: np.ndarray, out_HWC: np.ndarray) -> None:
    """Write the image, left and right exchanged, into `out_HWC`: thirty times as fast as a reversed slice."""
    cv2.flip(image, 1, dst=out_HWC)


def oriented(image: np.ndarray, orientation: int) -> np.ndarray:
    """The image as its EXIF orientation asks to be shown (Exif 2.32, tag 274)."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image[::-1] if orientation in (3, 4, 7, 8) else image


def _refuse_size(width: int, height: int) -> None:
    if width * height > PIXELS_MAX:
        raise BadImage("too-many-pixels", f"{width} x {height} is more than {PIXELS_MAX} pixels")


def _decode_by_pillow(content: bytes, image_format: Format) -> np.ndarray:
    if is_cut(content, image_format):
        raise BadImage("truncated", "the end of the file is missing")
    names = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on metadata
            file = Image.open(io.BytesIO(content), formats=[names[image_format]])
        with file:
            _refuse_size(*file.size)
            file.load()
            if file.mode.startswith("I"):  # 16-bit gray, which convert() would clip
                gray = (np.asarray(file).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(gray[:, :, None], 3, axis=2)
            image = file.convert("RGBA") if "transparency" in file.info else file
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, struct.error, MemoryError, EOFError) as error:
        raise BadImage("decode-error", str(error)) from None


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def decode_damaged(content: bytes, *, max_pixels: int) -> np.ndarray:
    """What can be seen of a damaged image, the rest gray: for looking at it, never for training. Raises BadImage."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG", "PNG", "WEBP"]) as image:
            if image.width * image.height > max_pixels:
                raise BadImage("too-many-pixels", f"{image.width} x {image.height} is more than {max_pixels} pixels")
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, struct.error, MemoryError) as error:
        raise BadImage("decode-error", str(error)) from None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
