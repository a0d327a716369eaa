"""Laws of the views: right size for any image, a function of (seed, position), the distribution of the papers."""

import numpy as np
import pytest

from data_pipeline.augment import eval_view, train_view
from data_pipeline.config import AugmentConfig
from data_pipeline.decode import resize
from tests.helpers.shards import smooth_image

PLAIN = AugmentConfig(crop_area_min=1.0, crop_area_max=1.0, crop_ratio_max=1.0, flip=0.0)


def picture(height: int, width: int) -> np.ndarray:
    return smooth_image(np.random.default_rng(7), height, width)


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
        assert np.array_equal(view, resize(image, width=16, height=16))


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
    resized = resize(image, width=64, height=32)
    view = eval_view(image, augment=AugmentConfig(eval_crop=0.875), image_size=28)  # 28 / 0.875 = 32
    assert np.array_equal(view, resized[2:30, 18:46])
    whole = eval_view(picture(64, 64), augment=AugmentConfig(eval_crop=1.0), image_size=64)
    assert np.array_equal(whole, picture(64, 64))


def test_the_middle_of_a_long_strip_does_not_fill_the_memory():
    strip = np.zeros((1, 2_000_000, 3), np.uint8)
    strip[:, 1_000_000 - 50 : 1_000_000 + 50] = 255
    assert (eval_view(strip, augment=AugmentConfig(), image_size=224) == 255).all()
