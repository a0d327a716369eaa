"""Laws of the colour policies: keyed to the position, off by default, the ranges and shares of the papers."""

import numpy as np
import pytest

from data_pipeline import colour
from data_pipeline.augment import train_view
from data_pipeline.config import AugmentConfig
from data_pipeline.policies import MAGNITUDES, apply, operation_names
from tests.helpers.shards import smooth_image

IMAGE = smooth_image(np.random.default_rng(3), 120, 144)
PLAIN = {"crop_area_min": 1.0, "crop_ratio_max": 1.0, "flip": 0.0}
SETTINGS = {
    "randaugment": {"policy": "randaugment"},
    "trivialaugment": {"policy": "trivialaugment"},
    "3augment": {"policy": "3augment"},
    "jitter": {"colour_jitter": 0.4, "hue_jitter": 0.1},
    "erase": {"erase": 1.0},
    "erase with zero": {"erase": 1.0, "erase_with": "zero"},
    "all": {"policy": "3augment", "colour_jitter": 0.3, "erase": 0.25},
}


def view(position: int, **settings: object) -> np.ndarray:
    return train_view(IMAGE, augment=AugmentConfig(**settings), image_size=32, seed=1, position=position)


@pytest.mark.parametrize("name", SETTINGS)
def test_colours_follow_the_position_and_leave_the_crop_alone(name):
    settings = SETTINGS[name]
    views = [view(position, **settings) for position in range(20)]
    assert all(np.array_equal(found, view(position, **settings)) for position, found in enumerate(views))
    assert all(found.shape == (32, 32, 3) and found.dtype == np.uint8 for found in views)
    unlike = [not np.array_equal(found, view(position)) for position, found in enumerate(views)]
    assert sum(unlike) >= 13  # identity, or a stretch of what is stretched already, may be drawn
    changed = {(view(position, **PLAIN, **settings).astype(int) - view(position, **PLAIN)).tobytes() for position in range(20)}
    assert len(changed) >= (12 if name != "3augment" else 6)


def test_the_three_augmentations_come_equally_often():
    gray = solarized = 0
    for position in range(900):
        plain, found = view(position, **PLAIN), view(position, **PLAIN, policy="3augment")
        gray += int((found == found[:, :, :1]).all())
        solarized += int(np.array_equal(found, np.where(plain >= 128, 255 - plain, plain)))
    for count in (gray, solarized, 900 - gray - solarized):
        assert count == pytest.approx(300, abs=3 * 14.2)  # three standard deviations


def test_erasing_hits_the_asked_share_of_images_in_rectangles_of_2_to_33_percent():
    shares = []
    for position in range(600):
        changed = (view(position, **PLAIN, erase=0.25, erase_with="zero") != view(position, **PLAIN)).any(axis=2)
        if changed.any():
            rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
            assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.95  # some pixels were black before
            shares.append(changed.mean())
    assert len(shares) / 600 == pytest.approx(0.25, abs=3 * 0.018)
    assert 0.01 < min(shares) < 0.06 and 0.25 < max(shares) < 0.36
    noise = view(3, **PLAIN, erase=1.0)[(view(3, **PLAIN, erase=1.0) != view(3, **PLAIN)).any(axis=2)]
    assert np.unique(noise).size > 50


@pytest.mark.parametrize("name", list(operation_names()))
@pytest.mark.parametrize("is_wide", [False, True])
def test_strength_zero_changes_nothing_and_more_changes_more(name, is_wide):
    before = IMAGE.copy()
    changes = []
    for magnitude in (0, 15, 30):
        found = apply(IMAGE, name, magnitude=magnitude, is_negative=False, is_wide=is_wide)
        assert found.shape == IMAGE.shape and found.dtype == np.uint8
        changes.append(float(np.abs(found.astype(int) - IMAGE).mean()))
    assert np.array_equal(IMAGE, before)
    if name in ("auto_contrast", "equalize", "identity"):
        assert changes[0] == changes[1] == changes[2]
    else:
        assert changes[0] <= 0.5 and changes[0] < changes[1] < changes[2]


def test_plain_operations_do_what_their_names_say():
    assert (colour.gray(IMAGE) == colour.gray(IMAGE)[:, :, :1]).all()
    assert np.array_equal(colour.brightness(IMAGE, 1.0), IMAGE) and not colour.brightness(IMAGE, 0.0).any()
    assert np.ptp(colour.contrast(IMAGE, 0.0)) == 0
    assert np.array_equal(colour.saturation(IMAGE, 0.0), colour.gray(IMAGE))
    assert np.array_equal(colour.hue(IMAGE, 0.0), colour.hue(IMAGE, 1.0))
    assert np.array_equal(colour.translate_x(IMAGE, 5)[:, 5:], IMAGE[:, :-5])
    assert (colour.translate_y(IMAGE, 5)[:5] == colour.FILL).all()
    flat = colour.equalize(IMAGE)
    assert flat.min() <= 2 and flat.max() >= 253 and MAGNITUDES == 31


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("policy", "autoaugment", "augment.policy must be none, randaugment, trivialaugment or 3augment, got 'autoaugment'"),
        ("randaugment_magnitude", 31, "within 0 and 30, got 31"),
        ("randaugment_ops", 0, "at least 1, got 0"),
        ("colour_jitter", -0.1, "0 or more"),
        ("hue_jitter", 0.6, "within 0 and 0.5"),
        ("erase", 1.1, "within 0 and 1"),
        ("erase_with", "grey", "noise or zero, got 'grey'"),
    ],
)
def test_wrong_settings_are_named(name, value, why):
    with pytest.raises(ValueError, match=why):
        AugmentConfig(**{name: value})
