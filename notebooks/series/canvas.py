"""The one visual language: colours with a meaning, one style, figures of fixed size that no window owns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from itertools import cycle
from typing import ParamSpec

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from omniforcing_lib.layout import AV

P = ParamSpec("P")

INK, GREY, PALE = "#23272f", "#8b919b", "#e6e8ec"
STREAM = AV("#2f6fba", "#e07b21")
SINK = "#2f9e5f"
PREFIX_HATCH = "////"
NAMED = {"teacher": GREY, "paper": GREY, "sink": SINK, "video": STREAM.video, "audio": STREAM.audio}
OTHERS = (INK, "#8e44ad", "#158f9b", "#c2395f", "#a07b16", "#5b5bd6")
WIDTH = 8.0
STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "hatch.linewidth": 0.7,
    "svg.hashsalt": "omniforcing",
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw under STYLE and leave matplotlib's own settings as they were."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def colours(names: Iterable[str]) -> dict[str, str]:
    """Give each name its colour: streams, sinks, teacher and paper their own, the others in order."""
    others = cycle(OTHERS)

    def one(name: str) -> str:
        return next((colour for word, colour in NAMED.items() if word in name.lower()), None) or next(others)

    return {name: one(name) for name in names}


def figure(height: float, width: float = WIDTH) -> Figure:
    """Make an empty figure of `width` x `height` inches, at 100 dpi, that no window and no global list holds."""
    return Figure(figsize=(width, height))


def box(axes: Axes, left: float, right: float, bottom: float, top: float, *, edge: str, **look: object) -> None:
    """Draw a rectangle by its sides; `look` goes to matplotlib."""
    axes.add_patch(Rectangle((left, bottom), right - left, top - bottom, edgecolor=edge, **look))


def hatch(axes: Axes, left: float, right: float, bottom: float, top: float, *, edge: str) -> None:
    """Hatch a rectangle: the sign of the prefix, block 0."""
    box(axes, left, right, bottom, top, edge=to_rgba(edge, 0.6), fill=False, linewidth=0, hatch=PREFIX_HATCH)


def bare(axes: Axes) -> None:
    """Take away frame and tick marks, keep tick labels."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
