"""Laws of decoding: the pixels of the file, always H,W,3 uint8; what is damaged is refused, by reason."""

import io
import struct
import subprocess
import sys
import time
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline.decode import BadImage, Picture, decode, decode_full, encode_png, image_header, oriented, resize
from data_pipeline.headers import jpeg_frame
from data_pipeline.jpeg import decode_for_crop
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


# ---- only what a crop needs -----------------------------------------------------------------------------------------

TALL = smooth_image(np.random.default_rng(2), 90, 61) // 2 + np.random.default_rng(3).integers(
    0, 99, (90, 61, 3), dtype=np.uint8
)
CODINGS = {
    "444": {"subsampling": 0},
    "422": {"subsampling": 1},
    "420": {"subsampling": 2},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "gray": {},
}


@pytest.mark.parametrize("name", CODINGS)
def test_rows_above_any_bottom_equal_those_of_the_whole_picture(name):
    picture = TALL[:, :, 0] if name == "gray" else TALL
    content = encoded(picture, "JPEG", quality=93, **CODINGS[name])
    whole = decode(content)
    frame = jpeg_frame(content)
    for bottom in range(1, len(TALL) + 1):
        assert np.array_equal(decode_for_crop(content, frame, bottom=bottom)[:bottom], whole[:bottom])
    half = decode_for_crop(content, frame, bottom=90, shrink=2).copy()
    assert half.shape == (45, 31, 3)
    for bottom in range(2, 90, 2):
        rows = decode_for_crop(content, frame, bottom=bottom, shrink=2)[: bottom // 2]
        assert np.array_equal(rows, half[: bottom // 2])
    assert content == encoded(picture, "JPEG", quality=93, **CODINGS[name])  # the bytes of the caller are left alone


@pytest.mark.parametrize("name", FILES)
def test_a_rectangle_of_a_picture_is_that_of_the_whole(name):
    picture = Picture(FILES[name])
    assert (picture.height, picture.width) == (HEIGHT, WIDTH)
    assert np.array_equal(picture.crop(3, 5, 10, 20), decode(FILES[name])[3:13, 5:25])


def test_less_is_decoded_for_a_crop_at_the_top():
    content = encoded(np.random.default_rng(0).integers(0, 256, (1600, 800, 3), dtype=np.uint8), "JPEG")
    frame = jpeg_frame(content)

    def time_of(bottom: int) -> float:
        times = []
        for _ in range(5):
            begun_s = time.thread_time()
            decode_for_crop(content, frame, bottom=bottom)
            times.append(time.thread_time() - begun_s)
        return min(times)

    assert time_of(200) < 0.5 * time_of(1600)  # an eighth of the work, and a look over the rest for the end mark


# ---- what cameras and bombs leave in files --------------------------------------------------------------------------


def segments(content: bytes) -> list[int]:
    """Where the segments of a JPEG begin, up to the picture data."""
    at, found = 2, []
    while True:
        found.append(at)
        if content[at + 1] == 0xDA:
            return found
        at += 2 + int.from_bytes(content[at + 2 : at + 4])


@pytest.mark.parametrize("name", ["jpeg", "jpeg 420", "jpeg progressive", "jpeg gray"])
def test_stray_bytes_that_cost_no_pixel_are_accepted(name):
    content = FILES[name]
    expected = decode_full(content, max_pixels=MANY)
    for at in segments(content)[1:]:
        stray = content[:at] + b"stray\0" + content[at:]
        assert np.array_equal(decode_full(stray, max_pixels=MANY), expected)
        assert np.array_equal(decode(stray), decode(content)) and image_header(stray) == image_header(content)
    for tail in (b"\0" * 9, b"trailing bytes", content, b"\xff\xd8\xff"):
        assert np.array_equal(decode_full(content + tail, max_pixels=MANY), expected)
        assert np.array_equal(decode(content + tail), decode(content))
    if "progressive" not in name:
        filled = content[:-2] + b"\0" * 40 + content[-2:]
        assert np.array_equal(decode_full(filled, max_pixels=MANY), expected)


def test_a_preview_in_the_metadata_does_not_stand_in_for_a_missing_end():
    preview = encoded(PICTURE[:8, :8], "JPEG")
    content = encoded(PICTURE, "JPEG", exif=b"Exif\0\0II*\0" + preview)
    assert decode_full(content, max_pixels=MANY).shape == (HEIGHT, WIDTH, 3)
    assert_bad(content[:-2], "truncated")
    assert_bad(content[: len(content) // 2 + len(preview) // 2], "truncated")


def is_refused(content: bytes) -> bool:
    try:
        decode_full(content, max_pixels=MANY)
    except BadImage as error:
        assert error.reason == "decode-error"
        return True
    return False


def test_lost_picture_data_are_refused_whatever_else_is_tidied():
    content = encoded(TALL, "JPEG", quality=93, subsampling=2)
    scan, size = segments(content)[-1] + 14, len(content)
    for cut in range(scan, size - 20, 97):
        assert is_refused(content[:cut] + content[-2:])  # the end is lost
        assert is_refused(content[:20] + b"stray" + content[20:cut] + content[-2:])
        assert is_refused(content[:-2] + content[cut : cut + 20] + content[-2:])  # more data than pixels
    # Of a piece lost in the middle Huffman codes may find their way back without a trace, but seldom.
    lost = (size - scan) // 10
    refused = [is_refused(content[:cut] + content[cut + lost :]) for cut in range(scan, size - 2 - lost, 17)]
    assert np.mean(refused) > 0.8


@pytest.mark.parametrize("form", ["GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "ICO"])
def test_other_formats_are_refused_by_name(form):
    try:
        content = encoded(PICTURE, form)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {form}")
    with pytest.raises(BadImage, match=f"unknown-format: expected jpg, png or webp, this is {form[:3].replace('ICO', 'icon')}"):
        decode_full(content, max_pixels=MANY)


def test_the_first_frame_of_an_animation_is_the_image():
    frames = [Image.fromarray(picture) for picture in (PICTURE, 255 - PICTURE)]
    content = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert (image_header(content).width, image_header(content).height) == (WIDTH, HEIGHT)
    assert np.array_equal(decode_full(content, max_pixels=MANY), PICTURE) and np.array_equal(decode(content), PICTURE)


def test_ycck_and_cmyk_and_16_bits_are_rgb():
    ycck = bytearray(FILES["jpeg cmyk"])
    adobe = ycck.index(b"Adobe")
    assert ycck[adobe + 11] in (0, 2)
    ycck[adobe + 11] = 2 - ycck[adobe + 11]  # the other reading of the same four components
    for content in (FILES["jpeg cmyk"], bytes(ycck)):
        with Image.open(io.BytesIO(content)) as image:
            expected = np.array(image.convert("RGB"))
        assert np.array_equal(decode_full(content, max_pixels=MANY), expected) and np.array_equal(decode(content), expected)
    deep = np.random.default_rng(0).integers(0, 65536, (9, 7, 3), dtype=np.uint16)
    content = cv2.imencode(".png", deep[:, :, ::-1])[1].tobytes()
    assert np.array_equal(decode(content), deep >> 8) and np.array_equal(decode_full(content, max_pixels=MANY), deep >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_read_and_applied_as_pillow_does(form, orientation):
    tag = Image.Exif()
    tag[0x010F] = "a camera"
    tag[0x0112] = orientation
    content = encoded(PICTURE, form, exif=tag, **({"lossless": True} if form == "WEBP" else {}))
    assert image_header(content).orientation == orientation
    with Image.open(io.BytesIO(content)) as image:
        expected = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    pixels = oriented(decode_full(content, max_pixels=MANY), orientation)
    assert pixels.shape == expected.shape and np.abs(pixels.astype(int) - expected).max() <= 2


def test_damaged_metadata_say_nothing():
    for exif in (
        b"",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\xff\xff",
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0",
    ):
        assert image_header(encoded(PICTURE, "JPEG", exif=b"Exif\0\0" + exif)).orientation == 1


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bombs() -> dict[str, bytes]:
    png, jpeg = FILES["png"], FILES["jpeg progressive"]
    zeros = zlib.compress(bytes(256 << 20), 9)
    large = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    scan = segments(jpeg)[-1]
    huge_webp = bytearray(encoded(PICTURE, "WEBP", exif=b"II*\0"))
    huge_webp[24:30] = b"\xff\x3f\0\xff\x3f\0"
    return {
        "png of 1.2 GB": png[:8] + png_chunk(b"IHDR", large) + png_chunk(b"IDAT", zeros) + png_chunk(b"IEND", b""),
        "jpeg of 4.3 gigapixels": jpeg[: (at := jpeg_frame(jpeg).at + 5)] + b"\xff\xff\xff\xff" + jpeg[at + 4 :],
        "jpeg of 5000 scans": jpeg[:-2] + jpeg[scan:-2] * 5000 + jpeg[-2:],
        "webp of 268 megapixels": bytes(huge_webp),
    }


SUSPECTS = """
import sys, time, resource
from data_pipeline.decode import BadImage, decode_full
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    content = open(path, "rb").read()
    begun = time.monotonic()
    try:
        result = decode_full(content, max_pixels=100_000_000).shape
    except BadImage as error:
        result = error.reason
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(path.rsplit("/")[-1], time.monotonic() - begun < 1, grown < 64 << 10, result, sep="|")
"""


@pytest.mark.slow
def test_bombs_are_refused_within_a_second_and_64_mb_and_hidden_ones_do_nothing(tmp_path):
    png = FILES["png"]
    zeros = zlib.compress(bytes(256 << 20), 9)
    harmless = {
        "text": png[:33] + png_chunk(b"zTXt", b"Comment\0\0" + zeros) + png[33:],
        "international text": png[:33] + png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + zeros) + png[33:],
        "profile": png[:33] + png_chunk(b"iCCP", b"icc\0\0" + zeros) + png[33:],
        "jpeg profile": encoded(PICTURE, "JPEG", icc_profile=bytes(16_000_000)),
        "jpeg exif": FILES["jpeg"][:2]
        + (b"\xff\xe1\xff\xffExif\0\0" + b"II*\0\x08\0\0\0\xff\xff".ljust(65527, b"\x12")) * 200
        + FILES["jpeg"][2:],
    }
    paths = []
    for name, content in {**bombs(), **harmless}.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(content)
    said = subprocess.run([sys.executable, "-c", SUSPECTS, *paths], capture_output=True, text=True, timeout=60)
    results = {line.split("|")[0]: line.split("|")[1:] for line in said.stdout.splitlines()}
    for name in bombs():
        assert results[name][:2] == ["True", "True"] and results[name][2] in ("too-many-pixels", "decode-error"), (
            name,
            results,
        )
    for name in harmless:
        assert results[name] == ["True", "True", f"({HEIGHT}, {WIDTH}, 3)"], (name, results, said.stderr)


def test_a_chunk_that_claims_gigabytes_costs_nothing_in_training():
    content = encode_png(smooth_image(np.random.default_rng(1), 20, 20))
    at = content.index(b"IDAT") - 4
    begun_s = time.process_time()
    with pytest.raises(BadImage, match="runs over the end"):
        decode(content[:at] + (2_443_940_935).to_bytes(4) + content[at + 4 :])
    assert time.process_time() - begun_s < 0.2
