"""Pixels, patches and positions."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vitscale.model.attention import Attention
from vitscale.model.config import ModelConfig
from vitscale.model.layers import PatchEmbed, normalise_pixels
from vitscale.model.position import resize_positions, sinusoidal_positions


def test_patch_projection_is_the_convolution_of_public_weights():
    torch.manual_seed(0)
    embed = PatchEmbed(4, 3, 10, bias=True).double()
    images_BCHW = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    kernel = embed.proj.weight.reshape(10, 3, 4, 4)
    expected_BDHW = F.conv2d(images_BCHW, kernel, embed.proj.bias, stride=4)
    torch.testing.assert_close(embed(images_BCHW), expected_BDHW.flatten(2).transpose(1, 2), rtol=0, atol=1e-13)


def test_queries_keys_values_are_rows_of_one_matrix_in_this_order():
    attention = Attention(ModelConfig(image_size=4, patch_size=2, width=6, depth=1, heads=2, classes=2, qkv_bias=False))
    with torch.no_grad():
        attention.qkv.weight.copy_(torch.arange(18.0)[:, None].expand(18, 6))
    ones_BND = torch.full((1, 1, 6), 1 / 6)
    q, k, v = attention.queries_keys_values(ones_BND)
    for got, first_row in ((q, 0), (k, 6), (v, 12)):
        torch.testing.assert_close(got.flatten(), torch.arange(first_row, first_row + 6.0))
        assert got.shape == (1, 2, 1, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pixels_are_scaled_shifted_and_divided(dtype):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.5, 0.25)
    work = np.float64 if dtype == torch.float64 else np.float32
    expected = (images.astype(work) / work(255) - np.array(mean, work)) / np.array(std, work)
    given = torch.from_numpy(images)
    got = normalise_pixels(given, mean, std, dtype)
    assert got.shape == (2, 3, 5, 4) and got.is_contiguous() and got.dtype == dtype
    assert torch.equal(got, torch.from_numpy(expected.transpose(0, 3, 1, 2)).to(dtype))
    assert np.array_equal(given.numpy(), images), "the batch itself is left alone"


def test_sinusoidal_positions_are_those_of_the_paper():
    table = sinusoidal_positions(7, 6)
    assert table.shape == (1, 7, 6) and table.dtype == torch.float64
    torch.testing.assert_close(table[0, 0], torch.tensor([0, 1, 0, 1, 0, 1.0], dtype=torch.float64))
    third = 10000 ** (-4 / 6) * 5
    assert table[0, 5, 4].item() == pytest.approx(np.sin(third), abs=1e-15)
    assert table[0, 5, 5].item() == pytest.approx(np.cos(third), abs=1e-15)


def test_positions_of_the_same_grid_are_untouched():
    pos = torch.randn(1, 10, 4, dtype=torch.bfloat16)
    assert torch.equal(resize_positions(pos, (3, 3), (3, 3), prefix=1, dialect="bicubic_antialias"), pos)


@pytest.mark.parametrize(("from_grid", "to_grid"), [(4, 6), (6, 4), (2, 7)])
def test_resized_positions_keep_the_class_token_and_the_orientation(from_grid, to_grid):
    pos = torch.zeros(1, 1 + from_grid**2, 3, dtype=torch.float64)
    pos[0, 0] = torch.tensor([7.0, 8.0, 9.0])
    rows = (torch.arange(from_grid) + 0.5) / from_grid
    pos[0, 1:, 0] = rows.repeat_interleave(from_grid)  # grows downwards
    pos[0, 1:, 1] = rows.repeat(from_grid)  # grows to the right
    pos[0, 1:, 2] = 2.0
    resized = resize_positions(pos, (from_grid, from_grid), (to_grid, to_grid), prefix=1, dialect="bicubic_antialias")
    assert resized.shape == (1, 1 + to_grid**2, 3) and resized.dtype == torch.float64
    assert torch.equal(resized[0, 0], pos[0, 0])
    grid = resized[0, 1:].reshape(to_grid, to_grid, 3)
    torch.testing.assert_close(grid[..., 2], torch.full((to_grid, to_grid), 2.0, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(grid[..., 0], grid[..., 1].T, rtol=0, atol=1e-6)
    assert (grid[1:, :, 0] > grid[:-1, :, 0]).all() and (grid[0, :, 0] - grid[0, 0, 0]).abs().max() < 1e-6


def cubic(distance: float, a: float = -0.5) -> float:
    """Keys' cubic kernel with the parameter that antialiased resampling uses."""
    x = abs(distance)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resample_matrix(n: int, m: int) -> np.ndarray:
    """m x n: antialiased cubic resampling along one axis, pixel centres at half integers."""
    scale = n / m
    support = max(scale, 1.0)
    rows = []
    for i in range(m):
        centre = (i + 0.5) * scale
        weights = np.array([cubic((j + 0.5 - centre) / support) for j in range(n)])
        rows.append(weights / weights.sum())
    return np.array(rows)


@pytest.mark.parametrize(("from_grid", "to_grid"), [(4, 6), (9, 4), (3, 8)])
def test_resized_positions_are_antialiased_bicubic(from_grid, to_grid):
    torch.manual_seed(0)
    pos = torch.randn(1, 1 + from_grid**2, 2)
    grid = pos[0, 1:].reshape(from_grid, from_grid, 2).double().numpy()
    matrix = resample_matrix(from_grid, to_grid)
    expected = np.einsum("ia,jb,abd->ijd", matrix, matrix, grid).reshape(-1, 2)
    np.testing.assert_allclose(
        resize_positions(pos, (from_grid, from_grid), (to_grid, to_grid), prefix=1, dialect="bicubic_antialias")[0, 1:].numpy(),
        expected,
        rtol=0,
        atol=2e-6,
    )
