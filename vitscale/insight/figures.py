"""Attention as a picture: one row per image, ready for a paper.

image | last layer (mean over heads) | rollout | gradient rollout | the heads of the last layer, one by one

Overlays are scaled to their own largest patch, named below them beside what uniform attention would give.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image

from vitscale.base.errors import EnvironmentFault

COLORMAP = matplotlib.colormaps["inferno"]
OVERLAY = 0.62
"""Share of the colour in an overlay; the rest is the image in gray."""

PANEL_PIXELS_MIN = 224
"""Smaller images are enlarged to at least this before anything is laid over them."""

PANEL_INCHES = 1.75
GAP_INCHES = 0.09
CAPTION_INCHES = 0.30
MARGIN_INCHES = 0.10
HEADING_INCHES = 0.21
LEGEND_INCHES = 0.22
DOTS_PER_INCH = 220
INK, FAINT = "#222222", "#777777"
RIM = [withStroke(linewidth=0.7, foreground="#000000a0")]
CAPTION_LETTERS_MAX = 34


@dataclass(frozen=True, kw_only=True)
class AttentionRow:
    """What is shown of one image."""

    image_HWC: np.ndarray
    """uint8, as the model saw it."""
    caption: str
    """Prediction or name."""
    heads_HN: np.ndarray
    """The attention nearest to the head (`Look.last_BHN`), over all N tokens, patches last; rows sum to 1."""
    rollout_N: np.ndarray
    """Rollout over all tokens; sums to 1."""
    gradient_N: np.ndarray
    """Gradient rollout over all tokens, of any sum."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    asking: str = "Class token"
    """Whose attention the last layer's is."""


def draw_attention(path: Path, rows: Sequence[AttentionRow]) -> None:
    """Write the figure as PNG. Raises EnvironmentFault when it cannot be written."""
    assert rows
    heads = len(rows[0].heads_HN)
    per_row = math.ceil(math.sqrt(heads))
    lines = math.ceil(heads / per_row)
    step = PANEL_INCHES + GAP_INCHES
    head_inches = (PANEL_INCHES - (lines - 1) * GAP_INCHES / 2) / lines
    heads_inches = per_row * head_inches + (per_row - 1) * GAP_INCHES / 2
    width = 2 * MARGIN_INCHES + 4 * step + heads_inches
    height = MARGIN_INCHES + HEADING_INCHES + len(rows) * (PANEL_INCHES + CAPTION_INCHES) + LEGEND_INCHES
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)

    def panel(left: float, top: float, size: float, picture: np.ndarray) -> Axes:
        """A square at inches from the upper left corner."""
        axes = figure.add_axes((left / width, 1 - (top + size) / height, size / width, size / height))
        axes.imshow(picture, interpolation="antialiased", aspect="auto")
        axes.set_axis_off()
        return axes

    def text(left: float, top: float, words: str, *, size: float, colour: str, align: str = "left") -> None:
        figure.text(left / width, 1 - top / height, words, size=size, color=colour, ha=align, va="top", family="DejaVu Sans")

    lefts = [MARGIN_INCHES + i * step for i in range(5)]
    titles = ["Image", f"{rows[0].asking}, last layer", "Rollout", "Gradient rollout", f"{heads} heads, last layer"]
    for left, title in zip(lefts, titles, strict=True):
        text(left, MARGIN_INCHES, title, size=7.5, colour=INK)
    for number, row in enumerate(rows):
        top = MARGIN_INCHES + HEADING_INCHES + number * (PANEL_INCHES + CAPTION_INCHES)
        below = top + PANEL_INCHES + 0.05
        image_HWC = _enlarged(row.image_HWC)
        mean_N = row.heads_HN.mean(axis=0)
        panel(lefts[0], top, PANEL_INCHES, image_HWC)
        text(lefts[0], below, _shortened(row.caption), size=6.5, colour=INK)
        for left, attention_N in ((lefts[1], mean_N), (lefts[2], row.rollout_N), (lefts[3], row.gradient_N)):
            panel(left, top, PANEL_INCHES, overlay(image_HWC, attention_N, row.grid))
            words = "relative; for the most probable class" if attention_N is row.gradient_N else _peak(attention_N, row.grid)
            text(left, below, words, size=6, colour=FAINT)
        for head, attention_N in enumerate(row.heads_HN):
            line, column = divmod(head, per_row)
            small = head_inches + GAP_INCHES / 2
            axes = panel(lefts[4] + column * small, top + line * small, head_inches, overlay(image_HWC, attention_N, row.grid))
            axes.text(
                0.03,
                0.96,
                str(head + 1),
                size=4.5,
                color="white",
                ha="left",
                va="top",
                transform=axes.transAxes,
                path_effects=RIM,
            )
    _legend(figure, left=lefts[1], width=width, height=height)
    save_figure(path, figure)


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG on white. Raises EnvironmentFault when it cannot be written."""
    try:
        figure.savefig(path, dpi=DOTS_PER_INCH, format="png", facecolor="white")
    except OSError as error:
        raise EnvironmentFault(f"the figure cannot be written to {path} ({error}); give a directory with room") from None


def _legend(figure: Figure, *, left: float, width: float, height: float) -> None:
    bottom, bar_inches, thin = 0.12, PANEL_INCHES / 2, 0.05
    axes = figure.add_axes((left / width, bottom / height, bar_inches / width, thin / height))
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=COLORMAP, aspect="auto")
    axes.set_axis_off()
    words = "attention, from 0 to the largest patch of each panel"
    y = (bottom + thin / 2) / height
    figure.text((left + bar_inches + 0.08) / width, y, words, size=6, color=FAINT, ha="left", va="center")


def _peak(attention_N: np.ndarray, grid: tuple[int, int]) -> str:
    return f"largest patch {100 * patches_of(attention_N, grid).max():.2f} %, uniform {100 / len(attention_N):.2f} %"


def _shortened(words: str) -> str:
    return words if len(words) <= CAPTION_LETTERS_MAX else words[: CAPTION_LETTERS_MAX - 1].rstrip() + "…"


def _enlarged(image_HWC: np.ndarray) -> np.ndarray:
    """Pixels repeated, so that a small image stays what it is."""
    times = math.ceil(PANEL_PIXELS_MIN / image_HWC.shape[0])
    return image_HWC.repeat(times, axis=0).repeat(times, axis=1)


def patches_of(attention_N: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The patches' part of a row of attention, laid out as in the image: rows, columns."""
    return attention_N[-grid[0] * grid[1] :].reshape(grid)


def overlay(image_HWC: np.ndarray, attention_N: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The image in gray under the attention to its patches: float H,W,3 in 0..1; the largest patch has the brightest colour."""
    height, width = image_HWC.shape[:2]
    patches = patches_of(attention_N, grid).astype(np.float32)
    smooth = Image.fromarray(patches / max(float(patches.max()), 1e-30)).resize((width, height), Image.Resampling.BICUBIC)
    colour_HWC = COLORMAP(np.asarray(smooth).clip(0, 1))[..., :3]
    gray_HW1 = (image_HWC @ np.array([0.299, 0.587, 0.114]) / 255)[..., None]
    return OVERLAY * colour_HWC + (1 - OVERLAY) * gray_HW1
