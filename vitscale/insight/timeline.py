"""Attempts of a run over time: how far each came, what ended it, and where the next one took up the work."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vitscale.insight.figures import DOTS_PER_INCH, FAINT, INK

COLOURS = ("#3b76af", "#d07b2f", "#5b8c5a", "#a0506e", "#7a6bb0", "#8a8a4a", "#46a3a0", "#7d5540")
ROWS_MAX = 24
"""Rows that are drawn; a long storm looks the same further down."""


@dataclass(frozen=True, kw_only=True)
class AttemptBar:
    """One attempt as a bar from its start to its end, at the steps it went through."""

    row: str
    """Attempts of one run share a row."""
    from_s: float
    """Since the beginning of the run."""
    to_s: float
    kind: str
    """What ended it; empty: it finished."""
    last_step: int


def draw_attempts(bars: Sequence[AttemptBar], path: Path) -> None:
    """One row per run; a bar ends with the last step it reached, in the colour of what struck it."""
    rows = list(dict.fromkeys(bar.row for bar in bars))[:ROWS_MAX]
    kinds = sorted({bar.kind for bar in bars if bar.kind})
    figure = Figure(figsize=(10.2, 0.9 + 0.26 * len(rows)), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for bar in bars:
        if bar.row not in rows:
            continue
        y = rows.index(bar.row)
        colour = COLOURS[kinds.index(bar.kind) % len(COLOURS)] if bar.kind else FAINT
        label = None if axes.get_legend_handles_labels()[1].count(bar.kind or "finished") else bar.kind or "finished"
        axes.barh(
            y, bar.to_s - bar.from_s, left=bar.from_s, height=0.62, color=colour, edgecolor="white", linewidth=0.8, label=label
        )
        axes.annotate(
            str(bar.last_step),
            (bar.to_s, y),
            xytext=(-2, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            size=5.5,
            color="white",
        )
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlabel("seconds; in each bar the last step it reached", color=INK, size=7)
    axes.tick_params(labelsize=6.5, colors=INK, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper center", ncols=7, frameon=False, fontsize=6.5, labelcolor=INK
    )
    figure.savefig(path)
