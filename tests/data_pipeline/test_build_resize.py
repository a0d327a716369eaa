"""Laws of --resize-short: large images become small, upright JPEGs; small ones keep every byte."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.decode import decode, resize
from data_pipeline.manifest import Manifest
from data_pipeline.resize import Shrink
from tests.helpers.builds import builds, files_of, photograph, rows_of, write_folder
from vitscale.base.files import xxh3_64

LARGE = {
    "a/landscape.jpg": photograph(1, height=100, width=151),
    "a/portrait.jpg": photograph(2, height=203, width=64),
    "a/turned.jpg": photograph(3, height=90, width=120, orientation=6),
    "a/large.png": photograph(4, height=70, width=70, kind="PNG"),
}
SMALL = {
    "b/exact.jpg": photograph(5, height=50, width=80),
    "b/small.png": photograph(6, height=30, width=200, kind="PNG"),
    "b/small-turned.jpg": photograph(7, height=40, width=60, orientation=3),
}


def build(out: Path, **options: object) -> tuple[Manifest, dict[str, dict[str, object]], dict[str, bytes]]:
    """Manifest, rows of the index by source name, stored bytes by source name."""
    write_folder(out / "source", LARGE | SMALL)
    [manifest] = builds(out / "out", f"imagefolder:{out / 'source'}", resize_short=50, **options)
    rows = rows_of(manifest)
    by_name = {name: {column: rows[column][row] for column in rows} for row, name in enumerate(rows["source"])}
    with tarfile.open(manifest.directory / "train-000000.tar") as tar:
        stored = {}
        for name, row in by_name.items():
            member = tar.extractfile(f"{row['key']}.{row['format']}")
            assert member is not None
            stored[name] = member.read()
    return manifest, by_name, stored


def test_large_images_get_the_short_side_and_small_ones_keep_their_bytes(tmp_path: Path) -> None:
    _, rows, stored = build(tmp_path)
    found = {name: (row["width"], row["height"], row["format"], row["orientation"]) for name, row in rows.items()}
    assert found == {
        "a/landscape.jpg": (76, 50, "jpg", 1),  # 75.5 rounds up
        "a/portrait.jpg": (50, 159, "jpg", 1),  # 158.6
        "a/turned.jpg": (50, 67, "jpg", 1),  # 120 x 90, shown as 90 x 120
        "a/large.png": (50, 50, "jpg", 1),
        "b/exact.jpg": (80, 50, "jpg", 1),
        "b/small.png": (200, 30, "png", 1),
        "b/small-turned.jpg": (60, 40, "jpg", 3),
    }
    for name, content in SMALL.items():
        assert stored[name] == content
        assert rows[name]["image_xxh3"] == rows[name]["source_xxh3"] == xxh3_64(content)
    for name, content in LARGE.items():
        assert rows[name]["image_xxh3"] == xxh3_64(stored[name])
        assert rows[name]["source_xxh3"] == xxh3_64(content)
        assert rows[name]["image_size"] == len(stored[name])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_shrunk_image_is_what_a_viewer_shows(orientation: int) -> None:
    content = photograph(8, height=60, width=90, orientation=orientation)
    with Image.open(io.BytesIO(content)) as image:
        shown = np.asarray(_upright(image).convert("RGB"))
    small = decode(Shrink(short=50, quality=95).shrunk(decode(content), orientation))
    assert small.shape == ((75, 50, 3) if orientation >= 5 else (50, 75, 3))
    assert psnr(grey(small), grey(by_area(shown, height=small.shape[0], width=small.shape[1]))) > 35


@pytest.mark.parametrize(("height", "width"), [(100, 151), (500, 375), (257, 400), (1024, 768)])
def test_the_filter_is_that_of_areas(height: int, width: int) -> None:
    """Within rounding of the exact area filter in doubles, and of Pillow's box filter where the factor is whole."""
    pixels = np.random.default_rng(9).integers(0, 256, (height, width, 3), dtype=np.uint8)
    small = resize(pixels, width=64, height=48)
    assert np.abs(small - by_area(pixels, height=48, width=64)).max() <= 1
    if width % 64 == height % 64 == 0:
        box = np.asarray(Image.fromarray(pixels).resize((64, height // 16), Image.Resampling.BOX), np.float64)
        assert np.abs(resize(pixels, width=64, height=height // 16) - box).max() <= 1


def test_the_jpeg_costs_what_its_quality_says() -> None:
    """40 dB are 2.5 grey levels, what quality 90 loses in smooth pictures."""
    pixels = decode(photograph(3, height=400, width=300))
    small = decode(Shrink(short=100, quality=90).shrunk(pixels, 1))
    assert psnr(grey(small), grey(by_area(pixels, height=133, width=100))) > 40


def test_quality_changes_bytes_and_is_recorded(tmp_path: Path) -> None:
    coarse, _, few = build(tmp_path / "60", quality=60)
    _, _, many = build(tmp_path / "95", quality=95)
    assert coarse.build["options"]["quality"] == 60
    assert all(len(few[name]) < len(many[name]) for name in LARGE)


def test_shards_are_cut_by_what_is_stored(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", {f"a/{n}.jpg": photograph(n, height=120, width=120) for n in range(40)})
    [manifest] = builds(tmp_path / "out", f"imagefolder:{source}", resize_short=20, shard_bytes=8_000)
    rows = rows_of(manifest)
    assert len(manifest.shards) == pytest.approx(rows["image_size"].sum() / 8_000, abs=1.5)


def test_equal_builds_have_equal_bytes(tmp_path: Path) -> None:
    first, second = (build(tmp_path / name)[0] for name in ("one", "two"))
    assert files_of(first.directory) == files_of(second.directory)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def grey(image: np.ndarray) -> np.ndarray:
    """Luma: the colours lose half their resolution in a JPEG."""
    return np.asarray(image, np.float64) @ [0.299, 0.587, 0.114]


def by_area(image: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Every pixel the mean over the area it covers."""
    rows, columns = (overlaps(source, target) for source, target in ((image.shape[0], height), (image.shape[1], width)))
    return np.einsum("ih,hwc,jw->ijc", rows, image.astype(np.float64), columns, optimize=True)


def overlaps(source: int, target: int) -> np.ndarray:
    """(target, source) share of each source pixel in each target pixel, in one dimension."""
    edges = np.arange(target + 1)[:, None] * source / target
    inside = np.clip(edges[1:] - np.arange(source), 0, 1) - np.clip(edges[:-1] - np.arange(source), 0, 1)
    return inside * target / source


def _upright(image: Image.Image) -> Image.Image:
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    orientation = image.getexif().get(0x0112, 1)
    return image.transpose(turns[orientation]) if orientation in turns else image.copy()
