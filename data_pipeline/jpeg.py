"""JPEG to pixels: whole and checked, or only as far as a crop needs: the home of simplejpeg.

Two ways to save work where a crop is all that is wanted:
rows    below the crop nothing is decoded. The decoder ends after as many rows as the frame header announces, so a
        copy of the bytes with a smaller height there is decoded instead. Pixels are equal: plain upsampling looks at
        no neighbouring row.
shrink  a crop that will shrink by 2, 4 or 8 is decoded at that scale: the inverse transform takes fewer coefficients.
"""

import threading
from typing import Any

import numpy as np
import simplejpeg

from data_pipeline.headers import JPEG_END, BadImage, Frame, is_cut, jpeg_frame

SCANS_MAX = 100
"""Progressive files have about ten scans. Each costs a pass over the whole picture: a small file with thousands would
take hours."""

SCRATCH_BYTES_KEPT = 64 << 20
"""Larger pictures (21 megapixels) get memory of their own, so that one of them does not stay in every worker."""

_SEQUENTIAL_OR_PROGRESSIVE = (0xC0, 0xC1, 0xC2)  # coded by Huffman codes: what libjpeg decodes row by row as announced

# What libjpeg warns of although every coefficient was read. All other warnings mean lost picture data.
_HARMLESS_WARNINGS = ("extraneous bytes before marker", "Invalid SOS parameters", "Adobe color transform", "JFIF revision")


class _Scratch(threading.local):
    """Memory for encoded and decoded bytes, used again for each image of a thread: fresh pages cost a seventh of decoding."""

    def __init__(self) -> None:
        self.encoded = bytearray()
        self.pixels = np.empty(0, np.uint8)


_scratch = _Scratch()


def refuse_many_scans(content: bytes, frame: Frame) -> None:
    """Raise BadImage for a file that would take unreasonably long."""
    scans = content.count(b"\xff\xda", frame.at)
    if scans > SCANS_MAX:
        raise BadImage("decode-error", f"expected at most {SCANS_MAX} scans, got {scans:,}")


def decode_checked(content: bytes) -> np.ndarray:
    """The whole picture, H,W,3, or BadImage for data that end early or are damaged.

    Of libjpeg's warnings those are accepted which the file does not raise any more once stray bytes between its
    segments, fill before its end and what follows the end are removed: then every coefficient was read.
    """
    frame = jpeg_frame(content)
    assert frame.components != 4, "inks are decoded by Pillow"
    if is_cut(content, "jpg"):
        raise BadImage("truncated", "the end of the file is missing")
    try:
        return simplejpeg.decode_jpeg(content, colorspace="RGB", strict=True)
    except ValueError as error:
        if not _is_harmless(error):
            raise BadImage("decode-error", str(error)) from None
    try:
        return simplejpeg.decode_jpeg(_tidy(content), colorspace="RGB", strict=True)
    except ValueError as error:
        raise BadImage("decode-error", str(error)) from None


def decode_for_crop(content: bytes, frame: Frame, *, bottom: int, shrink: int = 1) -> np.ndarray:
    """At least the rows [0, bottom) of the picture, or with `shrink` 2, 4, 8 that much smaller: rows [0, bottom / shrink).

    By libjpeg's fast transform and plain chroma upsampling: a tenth of the time less, for 0.3 grey levels on top of the
    2 to 4 that JPEG itself loses (photographs of 32 to 400 pixels at quality 90). Both are integer arithmetic: equal
    bytes give equal pixels.

    The bytes have passed `decode_checked` and their hash was compared, so warnings are ignored; only a file without
    its end is refused. The pixels lie in memory of this thread and are overwritten by its next call. Raises BadImage.
    """
    size = len(content)
    if content.rfind(JPEG_END) < frame.at:
        raise BadImage("truncated", "the end of the file is missing")
    data: bytes | memoryview = content
    height = frame.height
    # A scaled decode ends in the middle of a block row, which libjpeg fills from the block below: whole blocks only.
    wanted = bottom if shrink == 1 else -(-bottom // 32) * 32
    if wanted < height and frame.kind in _SEQUENTIAL_OR_PROGRESSIVE:
        height = wanted
        if len(_scratch.encoded) < size:
            _scratch.encoded = bytearray(2 * size)
        _scratch.encoded[:size] = content
        _scratch.encoded[frame.at + 5 : frame.at + 7] = height.to_bytes(2)
        data = memoryview(_scratch.encoded)[:size]
    out_height, out_width = -(-height // shrink), -(-frame.width // shrink)
    options: dict[str, Any] = {}
    if shrink > 1:
        options = {"min_height": out_height, "min_width": out_width, "min_factor": shrink}
    options |= {"fastdct": True, "fastupsample": True, "buffer": _pixels(out_height * out_width * 3)}
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False, **options)
    except ValueError as error:
        if not _is_harmless(error):
            raise BadImage("decode-error", str(error)) from None
    # Stray bytes among the headers: simplejpeg stops at them even where it is not strict.
    try:
        return simplejpeg.decode_jpeg(_tidy(bytes(data)), colorspace="RGB", strict=False, **options)
    except ValueError as error:
        raise BadImage("decode-error", str(error)) from None


def encode_jpeg(image: np.ndarray, *, quality: int) -> bytes:
    """A JPEG of an H,W,3 array of uint8, colours at half resolution as in photographs. Equal pixels give equal bytes."""
    assert image.dtype == np.uint8 and image.ndim == 3
    # The slow transform: the fast one loses visibly above quality 95.
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "420", fastdct=False)


def _is_harmless(error: ValueError) -> bool:
    return any(warning in str(error) for warning in _HARMLESS_WARNINGS)


def _pixels(size: int) -> np.ndarray:
    if size > SCRATCH_BYTES_KEPT:
        return np.empty(size, np.uint8)
    if len(_scratch.pixels) < size:
        _scratch.pixels = np.empty(min(2 * size, SCRATCH_BYTES_KEPT), np.uint8)
    return _scratch.pixels


def _tidy(content: bytes) -> bytes:
    """The segments and picture data of a JPEG without what stands between them."""
    kept = [content[:2]]
    at = 2
    while True:
        at = content.find(b"\xff", at)
        if at < 0 or at + 4 > len(content):
            return content
        kind = content[at + 1]
        if kind in (0x00, 0x01, 0xFF) or 0xD0 <= kind <= 0xD7:
            at += 1 if kind == 0xFF else 2
            continue
        if kind == 0xDA:
            # Some writers leave zeros before the end mark; a zero behind FF is part of the data.
            data = content[at : content.index(JPEG_END, at)].rstrip(b"\0")
            return b"".join([*kept, data, b"\0" if data.endswith(b"\xff") else b"", JPEG_END])
        end = at + 2 + max(2, content[at + 2] << 8 | content[at + 3])
        kept.append(content[at:end])
        at = end
