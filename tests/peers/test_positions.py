"""Positions and patch kernels are resized as the named libraries do; rotations are those of DINOv3 in timm."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.helpers.peers import peer
from vitscale.model.config import ModelConfig
from vitscale.model.position import resize_patch_kernel, resize_positions, rotate, rotation, sincos2d_mae

GRIDS = [((14, 14), (24, 24)), ((24, 24), (14, 14)), ((7, 7), (16, 9)), ((16, 16), (16, 16))]
ERROR = 1e-5


def table(grid: tuple[int, int], prefix: int = 1) -> torch.Tensor:
    return torch.randn(1, prefix + grid[0] * grid[1], 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_bicubic_antialias_is_timms(old, new):
    peer("timm")
    from timm.layers import resample_abs_pos_embed

    theirs = resample_abs_pos_embed(table(old), list(new), list(old), num_prefix_tokens=1)
    ours = resize_positions(table(old), old, new, prefix=1, dialect="bicubic_antialias")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ERROR)


@pytest.mark.parametrize(("old", "new"), [pair for pair in GRIDS if pair[0][0] == pair[0][1]])
def test_bicubic_is_hugging_faces(old, new):
    transformers = peer("transformers")
    config = transformers.ViTConfig(image_size=16 * old[0], hidden_size=12, num_attention_heads=3, num_hidden_layers=1)
    embeddings = transformers.ViTModel(config).embeddings
    embeddings.position_embeddings.data = table(old)
    tokens = torch.zeros(1, 1 + new[0] * new[1], 12)
    with torch.no_grad():
        theirs = embeddings.interpolate_pos_encoding(tokens, 16 * new[0], 16 * new[1])
    ours = resize_positions(table(old), old, new, prefix=1, dialect="bicubic")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ERROR)


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_zoom_linear_is_the_zoom_of_the_jax_code(old, new):
    """vision_transformer checkpoint.py and big_vision models/vit.py: scipy.ndimage.zoom of the grid with order 1."""
    from scipy.ndimage import zoom

    grid = table(old)[0, 1:].reshape(*old, 12).numpy()
    theirs = zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1)
    assert theirs.shape[:2] == new
    ours = resize_positions(table(old), old, new, prefix=1, dialect="zoom_linear")
    np.testing.assert_allclose(ours[0, 1:].reshape(*new, 12).numpy(), theirs, rtol=0, atol=ERROR)
    assert torch.equal(ours[:, :1], table(old)[:, :1])


@pytest.mark.parametrize(("old", "new"), [(16, 14), (16, 32), (8, 16), (32, 8)])
def test_pi_bicubic_is_timms(old, new):
    peer("timm")
    from timm.layers import resample_patch_embed

    kernel = torch.randn(5, 3, old, old, generator=torch.Generator().manual_seed(0))
    theirs = resample_patch_embed(kernel, [new, new], interpolation="bicubic", antialias=True)
    ours = resize_patch_kernel(kernel, new, dialect="pi_bicubic")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ERROR * float(theirs.abs().max()))


@pytest.mark.parametrize(("old", "new"), [(16, 14), (16, 32), (8, 12)])
def test_pi_bilinear_is_big_visions(old, new):
    """proj/flexi/vit.py: the resize matrix from the images of a basis (linear, no antialiasing), its pseudo-inverse applied."""
    kernel = torch.randn(5, 3, old, old, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    columns = []
    for i in range(old * old):
        basis = torch.zeros(1, 1, old, old)
        basis.view(-1)[i] = 1.0
        columns.append(F.interpolate(basis, size=(new, new), mode="bilinear", align_corners=False).flatten().numpy())
    resize_mat = np.stack(columns).T
    inverse = np.linalg.pinv(resize_mat.T)
    theirs = np.einsum("xy,dcy->dcx", inverse, kernel.reshape(5, 3, -1).numpy()).reshape(5, 3, new, new)
    ours = resize_patch_kernel(kernel, new, dialect="pi_bilinear").numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ERROR * np.abs(theirs).max())


@pytest.mark.parametrize(("rows", "columns"), [(14, 14), (5, 9)])
def test_rotations_are_those_of_dinov3(rows, columns):
    peer("timm")
    from timm.layers import RotaryEmbeddingDinoV3, apply_rot_embed_cat

    x = torch.randn(2, 3, rows * columns, 16, generator=torch.Generator().manual_seed(0))
    embed = RotaryEmbeddingDinoV3(16, feat_shape=[rows, columns]).get_embed()
    theirs = apply_rot_embed_cat(x, embed, half=True)
    c = ModelConfig(
        image_size=8, patch_size=4, width=48, depth=1, heads=3, classes=2, position="rotary", class_token=False, pool="average"
    )
    ours = rotate(x, *rotation(c, rows, columns, torch.device("cpu")))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ERROR)


def test_sincos2d_mae_is_maes():
    """util/pos_embed.py of MAE, restated: the column is encoded first, sin before cos, in halves of the width."""
    D, grid = 24, 6
    omega = 1 / 10000 ** (np.arange(D // 4) / (D / 4))
    w, h = np.meshgrid(np.arange(grid), np.arange(grid))
    parts = [f(np.einsum("m,d->md", axis.reshape(-1), omega)) for axis in (w, h) for f in (np.sin, np.cos)]
    np.testing.assert_allclose(sincos2d_mae(grid, grid, D)[0].numpy(), np.concatenate(parts, axis=1), rtol=0, atol=1e-12)
