"""Plots over depth and pictures of parameters, quiet enough for a paper; SVG in the ink of the page around it, or PNG.

L layers   H heads   N tokens   S patches   F filters
"""

import io
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from vitscale.insight.figures import COLORMAP, DOTS_PER_INCH, FAINT, INK, overlay
from vitscale.insight.views import ImageView, ModelView

BLUE, ORANGE = "#3b76af", "#d07b2f"
POSITION_TILES_MAX = 14
"""Tiles per side in the picture of position similarity."""


def draw_depth(views: Sequence[ImageView], model: ModelView) -> Figure:
    """Distance, entropy and norms over depth: three axes side by side."""
    figure = Figure(figsize=(10.2, 2.9), dpi=DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    distance_LH = np.mean([view.distance_LH for view in views], axis=0)
    entropy_LH = np.mean([view.entropy_LH for view in views], axis=0)
    norms_ILN = np.stack([view.norms_LN for view in views])
    L, H = distance_LH.shape
    depth = np.arange(1, L + 1)
    left, middle, right = figure.subplots(1, 3)
    for axes, values_LH, label in (
        (left, distance_LH, "mean attention distance (pixels)"),
        (middle, entropy_LH, "entropy (nats)"),
    ):
        axes.plot(np.repeat(depth, H), values_LH.ravel(), "o", color=BLUE, alpha=0.55, markersize=3.2, markeredgewidth=0)
        axes.plot(depth, values_LH.mean(axis=1), color=BLUE, linewidth=1)
        _quiet(axes, label)
    left.set_ylim(0, None)
    ceiling = math.log(norms_ILN.shape[2])
    middle.axhline(ceiling, color=INK, linewidth=0.6, linestyle=(0, (4, 3)))
    middle.annotate("uniform", (1, ceiling), xytext=(0, 3), textcoords="offset points", color=INK, size=7)
    middle.set_ylim(0, ceiling * 1.12)
    patches_LX = norms_ILN[:, :, model.prefix :].transpose(1, 0, 2).reshape(L, -1)
    low, mid, high = np.percentile(patches_LX, [5, 50, 95], axis=1)
    right.fill_between(depth, low, high, color=BLUE, alpha=0.2, linewidth=0)
    right.plot(depth, mid, color=BLUE, linewidth=1, label="patches: median, 5 to 95 %")
    right.plot(depth, patches_LX.max(axis=1), color=BLUE, linewidth=0.8, linestyle=":", label="largest patch")
    if model.prefix:
        right.plot(depth, norms_ILN[:, :, 0].mean(axis=0), color=ORANGE, linewidth=1, label="first prefix token")
    right.set_yscale("log")
    right.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    right.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    right.yaxis.set_minor_formatter(NullFormatter())
    _quiet(right, "token norm")
    right.legend(frameon=False, fontsize=6.5, labelcolor=INK)
    figure.tight_layout(w_pad=2)
    return figure


def _quiet(axes: Axes, label: str) -> None:
    axes.set_xlabel("layer", size=8, color=INK)
    axes.set_title(label, size=8, color=INK, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set(color=INK, linewidth=0.6)
    axes.tick_params(which="both", labelsize=7, color=INK, labelcolor=INK, width=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.patch.set_alpha(0)


def svg_of(figure: Figure) -> str:
    """The figure as an SVG element without a background, its ink `currentColor`."""
    figure.patch.set_alpha(0)
    box = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vitscale"}):
        FigureCanvasSVG(figure).print_svg(box, metadata={"Date": None})
    text = box.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def draw_heads(view: ImageView, model: ModelView) -> Figure:
    """Layers from top to bottom, heads from left to right: overlays of the asking rows, each to its own largest patch."""
    L, H, _ = view.asking_LHN.shape
    inches, gap, margin, foot = 0.8, 0.04, 0.42, 0.42
    width, height = margin + H * (inches + gap) + 0.1, margin + L * (inches + gap) + foot
    figure = Figure(figsize=(max(width, 3.2), height), dpi=DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    width = max(width, 3.2)
    small_HWC = view.row.image_HWC[:: max(1, view.row.image_HWC.shape[0] // 224), :: max(1, view.row.image_HWC.shape[1] // 224)]
    for layer in range(L):
        y = height - margin - layer * (inches + gap) - inches
        figure.text((margin - 0.07) / width, (y + inches / 2) / height, model.layer_names[layer], size=7, color=INK, ha="right")
        for head in range(H):
            x = margin + head * (inches + gap)
            axes = figure.add_axes((x / width, y / height, inches / width, inches / height))
            axes.imshow(overlay(small_HWC, view.asking_LHN[layer, head], view.row.grid), interpolation="antialiased")
            axes.set_axis_off()
            if layer == 0:
                figure.text(
                    (x + inches / 2) / width, (y + inches + 0.06) / height, str(head + 1), size=7, color=INK, ha="center"
                )
    figure.text(margin / width, 1 - 0.08 / height, "head", size=7, color=FAINT, va="top")
    figure.text(0.1 / width, (height - margin) / height, "layer", size=7, color=FAINT, va="top", rotation=90)
    words = f"{model.asking}: attention to the patches,\n0 to the largest patch of each panel (inferno)"
    figure.text(margin / width, 0.06 / height, words, size=6.5, color=FAINT, va="bottom")
    return figure


def position_picture(model: ModelView) -> np.ndarray | None:
    """One tile per patch, at its place: cosine of its position embedding with all others, -1 to 1; RGBA uint8."""
    if model.position_SS is None:
        return None
    rows, columns = model.position_grid
    step = math.ceil(max(rows, columns) / POSITION_TILES_MAX)
    tiles = model.position_SS.reshape(rows, columns, rows, columns)[::step, ::step]
    return _tiled(COLORMAP((tiles + 1) / 2)[..., :3], pixels=max(1, 36 // rows))


def filters_picture(model: ModelView) -> np.ndarray:
    """Principal components of the patch projection, each scaled to its own largest entry; RGBA uint8."""
    filters = model.filters_FPPC
    if filters.shape[-1] != 3:
        filters = np.repeat(filters.mean(axis=-1, keepdims=True), 3, axis=-1)
    largest = np.abs(filters).max(axis=(1, 2, 3), keepdims=True).clip(1e-12)
    scaled = 0.5 + 0.5 * filters / largest
    across = min(7, len(scaled))
    missing = -len(scaled) % across
    scaled = np.concatenate([scaled, np.full((missing, *scaled.shape[1:]), np.nan)])
    return _tiled(scaled.reshape(-1, across, *scaled.shape[1:]), pixels=max(1, 64 // scaled.shape[1]))


def _tiled(tiles: np.ndarray, *, pixels: int, gap: int = 3) -> np.ndarray:
    """(rows, columns, h, w, 3) in 0..1 to one RGBA picture; every number becomes a square, gaps are transparent."""
    rows, columns, h, w, _ = tiles.shape
    height, width = h * pixels, w * pixels
    sheet = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for row in range(rows):
        for column in range(columns):
            tile = tiles[row, column]
            if np.isnan(tile).any():
                continue
            place = sheet[row * (height + gap) :][:height, column * (width + gap) :][:, :width]
            place[..., :3] = (255 * tile.repeat(pixels, 0).repeat(pixels, 1)).round()
            place[..., 3] = 255
    return sheet
