"""Laws of the views: right size for any image, a function of (seed, position), the distribution of the papers."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn.functional import interpolate

from data_pipeline.augment import eval_view, fill_eval, fill_train, train_view
from data_pipeline.config import AugmentConfig
from data_pipeline.crops import Box, decoding_shrink, on_grid
from data_pipeline.decode import Picture, decode
from data_pipeline.resample import resample
from tests.helpers.shards import smooth_image

PLAIN = AugmentConfig(crop_area_min=1.0, crop_area_max=1.0, crop_ratio_max=1.0, flip=0.0)


def picture(height: int, width: int) -> np.ndarray:
    return smooth_image(np.random.default_rng(7), height, width)


def photograph(seed: int, height: int, width: int) -> np.ndarray:
    """Detail at every scale, as nature has it: amplitude falls as one over frequency."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij"))
    waves = np.fft.fft2(noise, axes=(0, 1)) / np.maximum(frequency, 1 / max(height, width))[:, :, None]
    values = np.fft.ifft2(waves, axes=(0, 1)).real
    return np.clip(128 + 45 * (values - values.mean()) / values.std(), 0, 255).astype(np.uint8)


def resized(image: np.ndarray, *, width: int, height: int) -> np.ndarray:
    out = np.empty((height, width, 3), np.uint8)
    resample(image, out)
    return out


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-3, np.mean((image.astype(float) - other) ** 2))))


def coordinates(side: int) -> np.ndarray:
    """An image that says where each pixel was: channel 0 the column, channel 1 the row."""
    row, column = np.mgrid[:side, :side].astype(np.uint8)
    return np.dstack([column, row, np.zeros_like(row)])


@pytest.mark.parametrize("image_size", [8, 16, 32])
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (8, 8), (32, 32), (7, 31), (90, 64)])
def test_every_image_gives_views_of_the_asked_size(shape, image_size):
    image = picture(*shape)
    for position in range(30):
        view = train_view(image, augment=AugmentConfig(), image_size=image_size, seed=0, position=position)
        assert view.shape == (image_size, image_size, 3) and view.dtype == np.uint8
    for eval_crop in (0.875, 0.5, 1.0):
        view = eval_view(image, augment=AugmentConfig(eval_crop=eval_crop), image_size=image_size)
        assert view.shape == (image_size, image_size, 3) and view.dtype == np.uint8


def test_views_differ_by_position_and_seed_and_by_nothing_else():
    image = picture(40, 40)
    views = {
        (seed, position): train_view(image, augment=AugmentConfig(), image_size=16, seed=seed, position=position)
        for seed in (0, 1)
        for position in (0, 1, 2**40)
    }
    for name, view in views.items():
        again = train_view(image.copy(), augment=AugmentConfig(), image_size=16, seed=name[0], position=name[1])
        assert np.array_equal(again, view)
    different = {view.tobytes() for view in views.values()}
    assert len(different) == len(views)


@pytest.mark.parametrize("side", [8, 32, 45])
def test_the_whole_area_of_a_square_is_the_plain_resize(side):
    image = picture(side, side)
    for position in range(5):
        view = train_view(image, augment=PLAIN, image_size=16, seed=0, position=position)
        assert np.array_equal(view, resized(image, width=16, height=16))


def test_what_never_fits_becomes_the_centre():
    wide = np.hstack([np.full((10, 10, 3), grey, np.uint8) for grey in (0, 100, 200)])
    view = train_view(wide, augment=PLAIN, image_size=10, seed=0, position=0)
    assert (view == 100).all()


def test_crops_have_the_areas_and_ratios_of_the_settings_and_lie_everywhere():
    image = coordinates(200)
    augment = AugmentConfig(crop_area_min=0.05, crop_area_max=0.4, crop_ratio_max=2.0, flip=0.5)
    areas, log_ratios, centres, flips = [], [], [], []
    for position in range(2000):
        view = train_view(image, augment=augment, image_size=4, seed=0, position=position).astype(float)
        left, right = view[:, 0, 0].mean(), view[:, -1, 0].mean()
        # Four cells across the crop: the centres of the outer two are 3/4 of its length apart.
        width, height = abs(right - left) * 4 / 3, (view[-1, :, 1].mean() - view[0, :, 1].mean()) * 4 / 3
        areas.append(width * height / 200**2)
        log_ratios.append(np.log2(width / height))
        centres.append(view[:, :, 0].mean())
        flips.append(left > right)
    # 2000 draws: three standard errors of the mean are 0.007 of area, 0.04 of log2 ratio, 0.034 of flips.
    assert np.mean(areas) == pytest.approx(0.225, abs=0.015) and min(areas) > 0.03 and max(areas) < 0.43
    assert np.mean(log_ratios) == pytest.approx(0, abs=0.05) and 0.9 < max(np.abs(log_ratios)) < 1.2
    assert np.mean(centres) == pytest.approx(99.5, abs=3) and np.std(centres) > 20
    assert np.mean(flips) == pytest.approx(0.5, abs=0.034)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_flip_mirrors_the_same_crop(flip):
    image = coordinates(64)
    views = [train_view(image, augment=AugmentConfig(flip=f), image_size=8, seed=3, position=9) for f in (0.0, flip)]
    assert np.array_equal(views[1], views[0][:, ::-1] if flip else views[0])


def test_the_central_view_is_the_middle_of_the_resized_image():
    image = picture(64, 128)
    small = resized(image, width=64, height=32)
    view = eval_view(image, augment=AugmentConfig(eval_crop=0.875), image_size=28)  # 28 / 0.875 = 32
    assert np.array_equal(view, small[2:30, 18:46])
    whole = eval_view(picture(64, 64), augment=AugmentConfig(eval_crop=1.0), image_size=64)
    assert np.array_equal(whole, picture(64, 64))


def test_the_middle_of_a_long_strip_does_not_fill_the_memory():
    strip = np.zeros((1, 2_000_000, 3), np.uint8)
    strip[:, 1_000_000 - 50 : 1_000_000 + 50] = 255
    assert (eval_view(strip, augment=AugmentConfig(), image_size=224) == 255).all()


# ---- resampling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (90, 1), (30, 40), (224, 224), (300, 260), (500, 97), (1000, 800)])
def test_resampling_is_the_antialiased_bicubic_of_torch_from_any_memory(shape):
    image = np.random.default_rng(2).integers(0, 256, (shape[0] + 2, shape[1] + 3, 3), dtype=np.uint8)[1:-1, 2:-1]
    planes = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    expected = interpolate(planes, size=(64, 48), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(resized(image, width=48, height=64), expected)


@pytest.mark.parametrize("shape", [(500, 375), (331, 500), (224, 300), (150, 120), (900, 1200), (96, 960)])
def test_crops_are_antialiased_above_50_db_of_pillows_bicubic(shape):
    image = photograph(3, *shape)
    expected = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC))
    assert psnr(resized(image, width=224, height=224), expected) > 50  # 42 for resizing by area, 30 without antialiasing
    stripes = np.zeros((448, 448, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(resized(stripes, width=224, height=224)[:, 4:-4].astype(int)) <= 1  # none survives


# ---- encoded images to slots ----------------------------------------------------------------------------------------


def jpeg(image: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def train_slot(content: bytes, *, size: int, position: int, orientation: int = 1, **settings: object) -> np.ndarray:
    out = np.empty((size, size, 3), np.uint8)
    augment = AugmentConfig(**settings)
    fill_train(out, content, orientation=orientation, augment=augment, seed=5, position=position)
    return out


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"subsampling": 1}])
def test_what_is_decoded_for_a_crop_gives_the_view_of_the_whole_picture(options):
    content = jpeg(photograph(4, 203, 301), **options)
    whole = decode(content)
    for position in range(40):
        expected = train_view(whole, augment=AugmentConfig(), image_size=160, seed=5, position=position)
        assert np.array_equal(train_slot(content, size=160, position=position), expected)


def test_crops_that_shrink_much_are_decoded_smaller_and_look_alike():
    content = jpeg(photograph(5, 1111, 1300))
    whole = decode(content)
    for side, (top, left), factor in ((370, (3, 5), 2), (800, (300, 299), 4), (1111, (0, 64), 8)):
        box = Box(top, left, side, side)
        assert decoding_shrink(box, size=90) == factor and decoding_shrink(box, size=side // 3 * 2 + 1) == 1
        grown = on_grid(box, factor)
        small = Picture(content).crop(*grown, shrink=factor)
        assert small.shape[:2] == (grown.height // factor, grown.width // factor)
        full = whole[grown.top : grown.top + grown.height, grown.left : grown.left + grown.width]
        # Photographs give 42 dB on average; the colours of this picture are as fine as its brightness. 60: another way it is.
        assert 38 < psnr(resized(small, width=90, height=90), resized(full, width=90, height=90)) < 60
    view = train_slot(content, size=64, position=3)
    assert view.shape == (64, 64, 3) and view.std() > 5


def test_the_slot_depends_on_nothing_but_bytes_seed_and_position():
    contents = [jpeg(photograph(seed, 120 + 30 * seed, 200)) for seed in range(4)]
    first = [train_slot(content, size=48, position=7) for content in contents]
    for _ in range(3):  # memory of larger and smaller pictures is used again
        for number in (3, 0, 2, 1):
            assert np.array_equal(train_slot(contents[number], size=48, position=7), first[number])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_views_are_shown_as_their_exif_orientation_asks(orientation):
    upright = coordinates(64)
    tag = Image.Exif()
    tag[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(upright).save(buffer, "PNG", exif=tag)
    content = buffer.getvalue()
    with Image.open(buffer) as image:
        expected = np.array(ImageOps.exif_transpose(image))
    out = np.empty((64, 64, 3), np.uint8)
    fill_eval(out, content, orientation=orientation, augment=AugmentConfig(eval_crop=1.0))
    assert np.array_equal(out, expected)
    plain = {"crop_area_min": 1.0, "crop_ratio_max": 1.0}
    assert np.array_equal(train_slot(content, size=64, position=0, orientation=orientation, flip=0.0, **plain), expected)
    flipped = train_slot(content, size=64, position=0, orientation=orientation, flip=1.0, **plain)
    assert np.array_equal(flipped, expected[:, ::-1])
