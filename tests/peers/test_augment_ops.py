"""Each operation of the policies is torchvision's at the same strength."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from data_pipeline import colour
from data_pipeline.policies import MAGNITUDES, apply, operation_names
from launch.peers import mend_torchvision
from tests.data_pipeline.test_augment import photograph

mend_torchvision()
transforms = pytest.importorskip("torchvision.transforms", reason="torchvision is not installed")
functional = transforms.functional

IMAGE = photograph(6, 96, 96)
TENSOR = torch.from_numpy(IMAGE).permute(2, 0, 1)
NAMES = {
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "saturation": "Color",
    "auto_contrast": "AutoContrast",
}
GEOMETRY = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def torchvisions(name: str, *, magnitude: int, is_negative: bool, is_wide: bool) -> np.ndarray:
    policy = transforms.TrivialAugmentWide() if is_wide else transforms.RandAugment()
    space = policy._augmentation_space(MAGNITUDES) if is_wide else policy._augmentation_space(MAGNITUDES, (96, 96))
    theirs = NAMES.get(name, name.capitalize())
    strengths, is_signed = space[theirs]
    strength = float(strengths[magnitude]) if strengths.ndim else 0.0
    if is_signed and is_negative:
        strength = -strength
    bilinear = transforms.InterpolationMode.BILINEAR
    result = transforms.autoaugment._apply_op(TENSOR, theirs, strength, interpolation=bilinear, fill=[colour.FILL] * 3)
    return result.permute(1, 2, 0).numpy()


def test_the_operations_are_the_same():
    assert len(list(operation_names())) == 14 == len(transforms.RandAugment()._augmentation_space(31, (96, 96)))


@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("name", list(operation_names()))
def test_each_operation_is_torchvisions(name, is_wide):
    for magnitude in (0, 7, 18, 30):
        for is_negative in (False, True):
            options = {"magnitude": magnitude, "is_negative": is_negative, "is_wide": is_wide}
            found, expected = apply(IMAGE, name, **options).astype(int), torchvisions(name, **options).astype(int)
            off = np.abs(found - expected)
            if name in GEOMETRY:
                # OpenCV places samples on a grid of 1/32 pixel, and the two treat the border's own pixels differently.
                assert off[8:-8, 8:-8].mean() < 2.5 and (off > 24).mean() < 0.06, (options, off.mean())
            else:
                # torchvision cuts what we round.
                assert off.max() <= 2 and off.mean() < 1.2, (options, off.max(), off.mean())


@pytest.mark.parametrize("turn", [-0.4, -0.1, 0.0, 0.2, 0.5])
def test_hue_is_torchvisions(turn):
    expected = functional.adjust_hue(TENSOR, turn).permute(1, 2, 0).numpy().astype(int)
    off = np.abs(colour.hue(IMAGE, turn).astype(int) - expected)
    assert off.mean() < 2.5 and np.quantile(off, 0.99) <= 12  # a byte for each of hue, saturation and value


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur_is_pillows(sigma):
    expected = np.asarray(Image.fromarray(IMAGE).filter(ImageFilter.GaussianBlur(sigma))).astype(int)
    off = np.abs(colour.blur(IMAGE, sigma).astype(int) - expected)
    assert off.mean() < 1.5  # Pillow approximates the bell by three boxes
