"""The figure shows attention where it is, and the command says in one sentence what is wrong."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launch.attention import image_paths, main
from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.insight import figures
from vitscale.insight.figures import AttentionRow, draw_attention
from vitscale.model.config import ModelConfig
from vitscale.model.vit import VisionTransformer, initialise
from vitscale.weights.native import Weights, save_weights


def one_patch(place: int, *, grid: int = 4) -> np.ndarray:
    attention_N = np.zeros(1 + grid**2, np.float32)
    attention_N[1 + place] = 1.0
    return attention_N


def panel_of(figure: np.ndarray, *, left_inches: float, size_inches: float, row: int = 0) -> np.ndarray:
    top = figures.MARGIN_INCHES + figures.HEADING_INCHES + row * (figures.PANEL_INCHES + figures.CAPTION_INCHES)
    edges = [round(inches * figures.DOTS_PER_INCH) for inches in (top, left_inches, size_inches)]
    return figure[edges[0] : edges[0] + edges[2], edges[1] : edges[1] + edges[2]]


def brightest_patch(panel: np.ndarray, *, grid: int = 4) -> int:
    side = len(panel) // grid
    sums = panel[: side * grid, : side * grid].sum(axis=2).reshape(grid, side, grid, side).sum(axis=(1, 3))
    return int(sums.argmax())


@pytest.mark.parametrize("image_size", [8, 64, 320])
def test_each_panel_is_brightest_at_the_patch_that_is_looked_at(tmp_path, image_size):
    black = np.zeros((image_size, image_size, 3), np.uint8)
    rows = [
        AttentionRow(
            grid=(4, 4),
            gradient_N=one_patch(9),
            image_HWC=black,
            caption="x",
            heads_HN=np.stack([one_patch(3)] * 4),
            rollout_N=one_patch(8),
        ),
        AttentionRow(
            grid=(4, 4),
            gradient_N=one_patch(9),
            image_HWC=black,
            caption="y" * 99,
            heads_HN=np.stack([one_patch(6)] * 4),
            rollout_N=one_patch(1),
        ),
    ]
    draw_attention(tmp_path / "a.png", rows)
    figure = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(float)
    step = figures.PANEL_INCHES + figures.GAP_INCHES
    for row, (last, rollout) in enumerate([(3, 8), (6, 1)]):
        where = [figures.MARGIN_INCHES + column * step for column in range(5)]
        image, class_token, through_all, gradient = (
            panel_of(figure, left_inches=left, size_inches=figures.PANEL_INCHES, row=row) for left in where[:4]
        )
        assert image[5:-5, 5:-5].max() == 0
        assert brightest_patch(class_token) == last and brightest_patch(through_all) == rollout
        assert brightest_patch(gradient) == 9
        head = panel_of(figure, left_inches=where[4], size_inches=(figures.PANEL_INCHES - figures.GAP_INCHES / 2) / 2, row=row)
        assert brightest_patch(head) == last


@pytest.mark.parametrize("heads", [1, 3, 16])
def test_any_number_of_heads_fits_on_the_page(tmp_path, heads):
    gray = np.full((224, 224, 3), 90, np.uint8)
    row = AttentionRow(
        grid=(4, 4),
        gradient_N=one_patch(9),
        image_HWC=gray,
        caption="",
        heads_HN=np.stack([one_patch(5)] * heads),
        rollout_N=one_patch(5),
    )
    draw_attention(tmp_path / "a.png", [row])
    figure = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    margin = math.floor(figures.MARGIN_INCHES * figures.DOTS_PER_INCH) - 2
    for edge in (figure[:margin], figure[-margin:], figure[:, :margin], figure[:, -margin:]):
        assert edge.min() == 255, "the margin stays white"
    assert figure.min() < 128


def test_a_figure_that_cannot_be_written_is_named(tmp_path):
    row = AttentionRow(
        grid=(4, 4),
        gradient_N=one_patch(9),
        image_HWC=np.zeros((8, 8, 3), np.uint8),
        caption="",
        heads_HN=one_patch(0)[None],
        rollout_N=one_patch(0),
    )
    with pytest.raises(EnvironmentFault, match="absent"):
        draw_attention(tmp_path / "absent" / "a.png", [row])


# ---- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights_path(tmp_path: Path) -> Path:
    config = ModelConfig(image_size=16, patch_size=4, width=24, depth=2, heads=3, classes=2)
    model = VisionTransformer(config)
    initialise(model, seed=0)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors["head.bias"] = torch.tensor([0.0, 3.0])
    path = tmp_path / "w.safetensors"
    save_weights(path, Weights(model=config, tensors=tensors, meta={"classes": json.dumps(["cat", "dog"])}))
    return path


def save_image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_the_command_writes_one_figure_of_all_and_one_of_each(tmp_path, weights_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("launch.attention.draw_attention", lambda path, rows: drawn.append((path.name, rows)))
    first, second = save_image(tmp_path / "images" / "a.png", 1), save_image(tmp_path / "b.png", 2)
    main(["--from", str(weights_path), "--images", str(first.parent), str(second), "--out", str(tmp_path / "out")])
    assert [name for name, _ in drawn] == ["attention.png", "attention-00-a.png", "attention-01-b.png"]
    assert [len(rows) for _, rows in drawn] == [2, 1, 1]
    row = drawn[0][1][0]
    assert row.caption == "95 %  dog"  # softmax of (0, 3)
    assert row.heads_HN.shape == (3, 17) and row.rollout_N.shape == (17,) and row.image_HWC.shape == (672, 672, 3)
    np.testing.assert_allclose([*row.heads_HN.sum(axis=1), row.rollout_N.sum()], 1, atol=1e-6)


def test_the_command_leaves_pictures(tmp_path, weights_path):
    main(["--from", str(weights_path), "--images", str(save_image(tmp_path / "a.png")), "--out", str(tmp_path / "x" / "y")])
    names = sorted(path.name for path in (tmp_path / "x" / "y").iterdir())
    assert names == ["attention.png", "depth.png", "heads-00-a.png", "index.html"]
    page = (tmp_path / "x" / "y" / "index.html").read_text()
    assert not re.search(r"@@|(src|href)=\"?(?!data:)[a-z]*:?//", page), "nothing is fetched and nothing is left unfilled"
    assert Image.open(tmp_path / "x" / "y" / "attention.png").format == "PNG"


def test_a_directory_stands_for_its_first_images_by_name(tmp_path):
    for number in range(18):
        save_image(tmp_path / "d" / f"{number:02d}.png")
    (tmp_path / "d" / "00.txt").write_text("no image")
    assert [path.name for path in image_paths([tmp_path / "d"])] == [f"{number:02d}.png" for number in range(16)]


def test_what_is_missing_is_said_in_one_sentence(tmp_path, weights_path):
    image, out = save_image(tmp_path / "a.png"), str(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    for source, given, fault, words in [
        (weights_path, tmp_path / "no.png", UsageError, "no.png, found none"),
        (weights_path, tmp_path / "empty", UsageError, "empty, found none"),
        (weights_path, tmp_path / "bad.png", EnvironmentFault, "bad.png cannot be read as an image"),
        (tmp_path / "no.safetensors", image, EnvironmentFault, "no.safetensors"),
    ]:
        with pytest.raises(fault, match=words) as refusal:
            main(["--from", str(source), "--images", str(given), "--out", out])
        assert "\n" not in str(refusal.value)
    with pytest.raises(EnvironmentFault, match="expected a directory to write to"):
        main(["--from", str(weights_path), "--images", str(image), "--out", str(image)])
