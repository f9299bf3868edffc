"""The one look of the project's pictures: legible in print, in grey, and to the colour-blind."""

import functools
import io
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito's palette (2008), without its yellow, which is too faint on white."""
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def axes(width: float = 6.4, height: float = 4.0) -> Any:
    """New matplotlib axes, in inches, which no other figure shares. Needs matplotlib; opens no window."""
    figure = _picture()(figsize=(width, height), layout="constrained", dpi=120, facecolor="white")
    made = figure.add_subplot()
    made.spines[["top", "right"]].set_visible(False)
    made.grid(alpha=0.25, linewidth=0.6)
    made.tick_params(labelsize=9)
    return made


@functools.cache
def _picture() -> type:
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A figure that notebooks show although pyplot has never been imported."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    return Picture


def look(number: int) -> dict[str, Any]:
    """Colour, line and marker of the series with this number; the first 28 differ."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number // len(COLOURS) % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 3.5,
        "linewidth": 1.5,
    }


def label(text: str) -> str:
    """As it stands, in a legend: matplotlib takes $ for mathematics, and hides what begins with _."""
    return ("\N{NO-BREAK SPACE}" if text.startswith("_") else "") + text.replace("$", r"\$")


def legend(made: Any, title: str | None = None) -> None:
    """Beside the axes, where it hides nothing."""
    made.legend(title=title, fontsize=8, title_fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
