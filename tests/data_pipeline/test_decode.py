"""Laws of decoding: the pixels of the file, always H,W,3 uint8; what is damaged is refused, by reason."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from data_pipeline.decode import BadImage, decode, decode_full, encode_png, image_header, resize
from tests.helpers.shards import smooth_image

HEIGHT, WIDTH = 20, 28
PICTURE = smooth_image(np.random.default_rng(1), HEIGHT, WIDTH)
MANY = 10**6


def encoded(image: Image.Image | np.ndarray, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **options)
    return buffer.getvalue()


FILES = {
    "jpeg": encoded(PICTURE, "JPEG", quality=95, subsampling=0),
    "jpeg 420": encoded(PICTURE, "JPEG", quality=95, subsampling=2),
    "jpeg progressive": encoded(PICTURE, "JPEG", quality=95, progressive=True),
    "jpeg gray": encoded(PICTURE[:, :, 0], "JPEG", quality=95),
    "jpeg cmyk": encoded(Image.fromarray(PICTURE).convert("CMYK"), "JPEG", quality=95),
    "png": encoded(PICTURE, "PNG"),
    "png stored": encode_png(PICTURE),
    "webp": encoded(PICTURE, "WEBP", quality=90),
    "webp lossless": encoded(PICTURE, "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", FILES)
def test_header_and_pixels_agree_with_the_picture(name):
    content = FILES[name]
    header = image_header(content)
    assert (header.width, header.height) == (WIDTH, HEIGHT)
    assert header.format == {"jpe": "jpg", "png": "png", "web": "webp"}[name[:3]]
    with Image.open(io.BytesIO(content)) as image:
        expected = np.array(image.convert("RGB"))
    full, fast = decode_full(content, max_pixels=MANY), decode(content)
    assert full.shape == fast.shape == (HEIGHT, WIDTH, 3) and full.dtype == fast.dtype == np.uint8
    # Two builds of libjpeg may round differently; the fast way shows at the hard chroma edges of this tiny picture.
    assert np.abs(full.astype(int) - expected).max() <= (2 if name.startswith("jpeg") else 0)
    assert np.abs(fast.astype(int) - expected).mean() <= (8 if name.startswith("jpeg") else 0)
    if "gray" in name:
        assert (full == full[:, :, :1]).all() and (fast == fast[:, :, :1]).all()
    if "png" in name or "lossless" in name:
        assert np.array_equal(full, PICTURE)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_refused(name):
    content = FILES[name]
    for end in [*range(12, len(content) - 12, 7), *range(len(content) - 12, len(content))]:
        with pytest.raises(BadImage) as caught:
            decode_full(content[:end], max_pixels=MANY)
        assert caught.value.reason == "truncated" and caught.value.detail
    for end in (len(content) // 2, len(content) - 1):
        with pytest.raises(BadImage):
            decode(content[:end])


@pytest.mark.parametrize("name", ["png", "png stored"])
def test_a_flipped_bit_in_a_png_is_refused(name):
    content = FILES[name]
    for at in range(8, len(content), 13):
        damaged = bytearray(content)
        damaged[at] ^= 4
        with pytest.raises(BadImage):
            decode_full(bytes(damaged), max_pixels=MANY)


def test_reasons_name_what_is_wrong():
    assert_bad(b"", "empty")
    for form in ("GIF", "BMP", "TIFF"):
        assert_bad(encoded(PICTURE, form), "unknown-format")
    assert_bad(b"<html>not found</html>", "unknown-format")
    jpeg = bytearray(FILES["jpeg"])
    jpeg[-60:-50] = b"\xff\xd8" * 5  # marks where pixels should be
    assert_bad(bytes(jpeg), "decode-error")
    assert str(BadImage("empty", "0 bytes")) == "empty: 0 bytes"


def assert_bad(content: bytes, reason: str) -> None:
    with pytest.raises(BadImage) as caught:
        decode_full(content, max_pixels=MANY)
    assert caught.value.reason == reason


@pytest.mark.parametrize("name", ["jpeg", "png", "webp"])
def test_pixels_are_counted_before_they_are_decoded(name):
    assert decode_full(FILES[name], max_pixels=WIDTH * HEIGHT).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(BadImage, match=f"too-many-pixels: {WIDTH} x {HEIGHT} is more than {WIDTH * HEIGHT - 1} pixels"):
        decode_full(FILES[name], max_pixels=WIDTH * HEIGHT - 1)


def test_a_bomb_is_refused_by_its_header():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    bomb = FILES["png"][:8] + chunk + FILES["png"][8 + 25 :]
    assert image_header(bomb).width == 60_000
    assert_bad(bomb, "too-many-pixels")


def test_other_modes_become_rgb():
    palette = Image.fromarray(PICTURE).quantize(16)
    assert np.array_equal(decode(encoded(palette, "PNG")), np.array(palette.convert("RGB")))
    assert np.array_equal(decode(encoded(palette, "PNG", transparency=b"\0\x80\xff")), np.array(palette.convert("RGB")))
    alpha = np.dstack([PICTURE, np.full((HEIGHT, WIDTH), 77, np.uint8)])
    assert np.array_equal(decode(encoded(alpha, "PNG")), PICTURE)
    gray = PICTURE[:, :, 0]
    three = np.repeat(gray[:, :, None], 3, axis=2)
    assert np.array_equal(decode(encoded(gray, "PNG")), three)
    assert np.array_equal(decode(encoded(np.dstack([gray, gray]), "PNG")), three)  # gray and alpha
    assert np.array_equal(decode(encoded(gray.astype(np.uint16) * 257, "PNG")), three)  # 16 bits
    black_and_white = Image.fromarray(gray).convert("1")
    assert set(np.unique(decode(encoded(black_and_white, "PNG"))).tolist()) == {0, 255}


def test_the_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    content = encoded(PICTURE, "JPEG", exif=exif.tobytes())
    assert decode(content).shape == decode_full(content, max_pixels=MANY).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("shape", [(1, 1, 3), (8, 8, 3), (8, 8), (150, 151, 3)])
def test_encoded_png_depends_on_the_pixels_alone_and_comes_back(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)
    content = encode_png(image)
    assert np.array_equal(decode_full(content, max_pixels=MANY), expected)
    assert encode_png(np.asfortranarray(image)) == content


def test_equal_pixels_give_equal_png_bytes():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert encode_png(image) == encode_png(image.copy(order="F"))


def test_shrinking_averages_and_growing_interpolates():
    stripes = np.tile(np.array([0, 200], np.uint8)[None, :, None], (4, 4, 3))
    assert (resize(stripes, width=8, height=4) == stripes).all()
    assert (resize(stripes, width=4, height=4) == 100).all()  # antialiased: no stripe survives
    grown = resize(np.array([[[0] * 3, [100] * 3]], np.uint8), width=4, height=1)
    assert grown[0, :, 0].tolist() == [0, 25, 75, 100]
    both = resize(stripes, width=4, height=9)
    assert both.shape == (9, 4, 3) and (both == 100).all()


def test_opencv_runs_in_the_calling_thread():
    assert cv2.getNumThreads() == 1
