"""Contact sheets: many small pictures in a grid, each with two lines of text, on white.

cell    a square with one picture, its shape kept; below it a heading, words, and perhaps a remark, each on one line,
        shortened to the width of the square
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitscale.base.errors import EnvironmentFault

COLUMNS = 8
SQUARE = 168
"""Pixels of the side of a cell's square."""
GAP, MARGIN = 16, 28
LINE = 18
HEAD = 64
"""Pixels of title and subtitle."""
LETTERS_MAX = 1000
"""Longer words are cut before they are measured."""
INK, FAINT, PALE, HATCH = "#1a1a1a", "#666666", "#f3f3f3", "#dddddd"
_FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One picture and what is said of it."""

    image_HWC: np.ndarray | None
    """uint8, RGB; None: there is nothing to see."""
    heading: str
    words: str
    remark: str = ""
    """In gray; the room for it is left out where no cell has one."""


def draw_sheet(path: Path, cells: Sequence[Cell], *, title: str, subtitle: str) -> None:
    """Write the sheet as PNG. Raises EnvironmentFault when it cannot be written."""
    large, bold, small = _font("DejaVuSans-Bold", 22), _font("DejaVuSans-Bold", 13), _font("DejaVuSans", 13)
    rows = -(-len(cells) // COLUMNS)
    width = 2 * MARGIN + COLUMNS * SQUARE + (COLUMNS - 1) * GAP
    lines = 3 if any(cell.remark for cell in cells) else 2
    pitch = SQUARE + lines * LINE + GAP + 4
    sheet = Image.new("RGB", (width, 2 * MARGIN + HEAD + rows * pitch - GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 4), _shortened(title, large, width - 2 * MARGIN), font=large, fill=INK)
    draw.text((MARGIN, MARGIN + 28), _shortened(subtitle, small, width - 2 * MARGIN), font=small, fill=FAINT)
    for number, cell in enumerate(cells):
        row, column = divmod(number, COLUMNS)
        left, top = MARGIN + column * (SQUARE + GAP), MARGIN + HEAD + row * pitch
        if cell.image_HWC is None:
            draw.rectangle((left, top, left + SQUARE - 1, top + SQUARE - 1), fill=PALE, outline=HATCH)
            draw.line((left, top, left + SQUARE - 1, top + SQUARE - 1), fill=HATCH)
        else:
            picture = _fitted(cell.image_HWC)
            # On the lower edge, so that every picture stands on its text.
            sheet.paste(picture, (left + (SQUARE - picture.width) // 2, top + SQUARE - picture.height))
        draw.text((left, top + SQUARE + 5), _shortened(cell.heading, bold, SQUARE), font=bold, fill=INK)
        draw.text((left, top + SQUARE + 5 + LINE), _shortened(cell.words, small, SQUARE), font=small, fill=INK)
        draw.text((left, top + SQUARE + 5 + 2 * LINE), _shortened(cell.remark, small, SQUARE), font=small, fill=FAINT)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, format="PNG")
    except OSError as error:
        raise EnvironmentFault(f"the sheet cannot be written to {path} ({error}); give a directory with room") from None


def _fitted(image_HWC: np.ndarray) -> Image.Image:
    """As large as the square allows; small pictures are enlarged pixel by pixel, so that they stay what they are."""
    image = Image.fromarray(image_HWC)
    longest = max(image.size)
    times = SQUARE / longest if longest > SQUARE else SQUARE // longest
    method = Image.Resampling.NEAREST if longest <= SQUARE else Image.Resampling.BICUBIC
    return image.resize((max(1, round(image.width * times)), max(1, round(image.height * times))), method)


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    # Basic layout: the other one fails on some texts.
    return ImageFont.truetype(str(_FONTS / f"{name}.ttf"), size, layout_engine=ImageFont.Layout.BASIC)


def _shortened(words: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """One line that fits; of a long one beginning and end remain, because keys differ in their ends."""
    words = " ".join("".join(letter if letter.isprintable() else " " for letter in words).split())
    if len(words) <= LETTERS_MAX and font.getlength(words) <= width:
        return words
    words = words if len(words) <= LETTERS_MAX else words[: LETTERS_MAX // 2] + words[-LETTERS_MAX // 2 :]
    kept = len(words) - 1
    while kept and font.getlength(_cut(words, kept)) > width:
        kept -= 1
    return _cut(words, kept)


def _cut(words: str, kept: int) -> str:
    back = kept // 3
    return f"{words[: kept - back].rstrip()}…{words[len(words) - back :].lstrip() if back else ''}"
