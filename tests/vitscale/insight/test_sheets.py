"""Laws of a contact sheet: every picture is there in its shape, every word fits, and the sheet is a function of its cells."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitscale.base.errors import EnvironmentFault
from vitscale.insight.sheets import COLUMNS, GAP, HEAD, MARGIN, SQUARE, Cell, _fitted, _font, _shortened, draw_sheet

RED, BLUE = np.array([200, 0, 0], np.uint8), np.array([0, 0, 200], np.uint8)


def cell(height: int, width: int, colour: np.ndarray = RED, *, words: str = "3 cat") -> Cell:
    return Cell(image_HWC=np.broadcast_to(colour, (height, width, 3)).copy(), heading="000000001", words=words)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def test_pictures_stand_in_rows_in_their_order(tmp_path: Path) -> None:
    cells = [cell(40, 40, BLUE if number == COLUMNS else RED) for number in range(COLUMNS + 1)]
    draw_sheet(tmp_path / "new" / "a.png", cells, title="train-000000", subtitle="9 of 9 images")
    sheet = pixels(tmp_path / "new" / "a.png")
    assert sheet.shape[1] == 2 * MARGIN + COLUMNS * SQUARE + (COLUMNS - 1) * GAP
    is_red, is_blue = (sheet == RED).all(-1), (sheet == BLUE).all(-1)
    assert is_red.sum() == COLUMNS * 160 * 160  # 40 pixels, four times
    assert is_blue.sum() == 160 * 160
    assert np.argwhere(is_red)[:, 0].max() < np.argwhere(is_blue)[:, 0].min()
    assert np.argwhere(is_blue)[:, 1].max() < MARGIN + SQUARE
    assert (sheet[:, :MARGIN] == 255).all() and (sheet[:, -MARGIN:] == 255).all()


@pytest.mark.parametrize(
    ("height", "width", "shown"),
    [(8, 8, (168, 168)), (400, 800, (84, 168)), (3000, 2, (168, 1)), (100, 50, (100, 50))],
)
def test_a_picture_keeps_its_shape(height: int, width: int, shown: tuple[int, int]) -> None:
    assert _fitted(np.zeros((height, width, 3), np.uint8)).size[::-1] == shown


def test_small_pictures_are_enlarged_pixel_by_pixel() -> None:
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    assert (np.array(_fitted(image)) == image.repeat(21, axis=0).repeat(21, axis=1)).all()


@pytest.mark.parametrize(
    "words", ["", "short", "n02113799_" + "very_long_" * 9 + "standard_poodle", "W" * 300, "i" * 2_000_000, "a\nb\tc\0d"]
)
def test_words_fit_on_one_line(words: str) -> None:
    font = _font("DejaVuSans-Bold", 13)
    found = _shortened(words, font, SQUARE)
    assert font.getlength(found) <= SQUARE
    assert found.isprintable()
    if len(words) > 30:
        assert "…" in found and words.startswith(found.split("…")[0]) and words.endswith(found.split("…")[1])


def test_what_cannot_be_shown_keeps_its_place_and_its_words(tmp_path: Path) -> None:
    hidden = Cell(image_HWC=None, heading="a.jpg", words="truncated", remark="half of it")
    draw_sheet(tmp_path / "a.png", [hidden, cell(168, 168)], title="rejected", subtitle="2 of 2")
    sheet = pixels(tmp_path / "a.png")
    top = MARGIN + HEAD
    assert (sheet[top + 5, MARGIN + 20] == 0xF3).all()
    assert (sheet[top + SQUARE + 5 : top + SQUARE + 50, MARGIN : MARGIN + SQUARE] < 128).any()
    assert (sheet[top + 5, MARGIN + SQUARE + GAP + 20] == RED).all()


def test_a_sheet_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        draw_sheet(tmp_path / "file" / "a.png", [cell(4, 4)], title="", subtitle="")
