"""Numbers -> charts: lines, bars with intervals, ablations, times, rooflines. K blocks.

Every function takes plain arrays by name and gives a figure; names choose colours (`canvas.colours`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Annulus
from matplotlib.ticker import LogLocator

from omniforcing_lib.bounce.variety import quadrants
from omniforcing_lib.bounce.world import SPEED
from omniforcing_lib.layout import AV
from series.canvas import GREY, INK, OTHERS, PALE, STREAM, bare, colours, figure, styled


class Estimate(NamedTuple):
    """A number and its 95 % interval, NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan


@styled
def sigma_schedule(schedules: Mapping[str, Sequence[float]]) -> Figure:
    """Draw noise levels by step, and mark which share of the steps is spent where."""
    fig = figure(2.4, width=5)
    axes = fig.subplots()
    for name, colour in colours(schedules).items():
        sigmas = np.asarray(schedules[name], float)
        place = np.linspace(0, 1, len(sigmas))
        axes.plot(place, sigmas, marker="o", markersize=3, color=colour, label=f"{name} ({len(sigmas) - 1} steps)")
    axes.set(xlabel="share of the steps done", ylabel="sigma", ylim=(-0.03, 1.03))
    axes.grid(True)
    axes.legend()
    return fig


@styled
def curves(
    series: Mapping[str, tuple],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    log: str = "",
    hline: float | None = None,
) -> Figure:
    """Draw lines by name, each (x, y) or (x, y, (low, high)); `log` names logarithmic axes: "", "x", "y" or "xy"."""
    fig = figure(2.7, width=6)
    axes = fig.subplots()
    for name, colour in colours(series).items():
        _line(axes, series[name], colour, name)
    if hline is not None:
        axes.axhline(hline, color=GREY, linewidth=1, linestyle=":")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    for axis in log:
        getattr(axes, f"set_{axis}scale")("log")
        _plain(getattr(axes, f"{axis}axis"))
    axes.grid(True)
    axes.legend()
    return fig


def _plain(axis: Axis) -> None:
    """Label a logarithmic axis 20, 50, 100 rather than with powers."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _line(axes: Axes, line: tuple, colour: str, name: str, **look: object) -> None:
    x, y, *band = line
    many = len(x) > 40
    axes.plot(x, y, color=colour, label=name, marker="" if many else "o", **look)
    for low, high in band:
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


@styled
def bars_with_ci(measures: Mapping[str, Mapping[str, Estimate]]) -> Figure:
    """Draw each measure as a panel of horizontal bars, one a model, with 95 % intervals (value, low, high) or alone.

    More models than there are colours are all grey: a colour that comes twice says nothing.
    """
    models = list(next(iter(measures.values())))
    colour = colours(models) if len(models) <= len(OTHERS) else dict.fromkeys(models, GREY)
    fig = figure(0.75 + 0.3 * len(models))
    panels = fig.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, (measure, estimates) in zip(panels, measures.items(), strict=True):
        _bars(axes, {model: Estimate(*estimates[model]) for model in models}, colour)
        axes.set_title(measure)
    panels[0].invert_yaxis()
    return fig


def _bars(axes: Axes, estimates: Mapping[str, Estimate], colour: Mapping[str, str]) -> None:
    value, low, high = np.array(list(estimates.values()), float).T
    bars = {"height": 0.66, "alpha": 0.8, "error_kw": {"ecolor": INK, "elinewidth": 1.1, "capsize": 2.5}}
    axes.barh(list(estimates), value, xerr=(value - low, high - value), color=[colour[m] for m in estimates], **bars)
    for row, (number, end) in enumerate(zip(value, np.fmax(value, high), strict=True)):
        axes.annotate(f"{number:.3g}", (end, row), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.margins(x=0.3)
    axes.grid(True, axis="x")
    axes.tick_params(axis="y", length=0)


@styled
def by_sinks(panels: Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float]]]], *, log: bool = False) -> Figure:
    """Draw measures against the number of sinks: panel -> series -> (sinks, values); what is not finite is a cross."""
    counts = sorted({int(s) for series in panels.values() for sinks, _ in series.values() for s in sinks})
    fig = figure(2.7)
    for axes, (measure, series) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, colour in colours(series).items():
            _sunk(axes, counts, *series[name], colour, name)
        axes.set(title=measure, xlabel="audio sinks", xlim=(-0.4, len(counts) - 0.6))
        axes.set_xticks(range(len(counts)), [str(c) for c in counts])
        if log:
            axes.set_yscale("log")
            _plain(axes.yaxis)
        axes.grid(True, axis="y")
        axes.legend()
    return fig


def _sunk(axes: Axes, counts: list[int], sinks: Sequence[int], values: Sequence[float], colour: str, name: str) -> None:
    x, y = np.array([counts.index(int(s)) for s in sinks]), np.asarray(values, float)
    finite = np.isfinite(y)
    style = {"color": colour, "marker": "o", "label": name, "linestyle": "--" if "paper" in name.lower() else "-"}
    axes.plot(x[finite], y[finite], **style)
    axes.plot(
        x[~finite], np.full((~finite).sum(), 0.96), "x", color=colour, transform=axes.get_xaxis_transform(), mew=2
    )
    for place in x[~finite]:
        axes.text(place, 0.88, "NaN", color=colour, ha="center", transform=axes.get_xaxis_transform(), fontsize=8)


@styled
def phase(
    norms: Mapping[str, Mapping[str, float]], notes: Mapping[str, Mapping[str, str]], *, xlabel: str = ""
) -> Figure:
    """Draw a map, row -> column -> largest gradient norm, each place with its note; broken runs are crossed out."""
    columns = list(next(iter(norms.values())))
    values = np.array([[norms[row].get(column, math.nan) for column in columns] for row in norms], float)
    finite = values[np.isfinite(values)]
    fig = figure(0.9 + 0.42 * len(norms))
    axes = fig.subplots()
    scale = LogNorm(finite.min(), max(finite.max(), 2 * finite.min()))
    shown = axes.imshow(np.ma.masked_invalid(values), norm=scale, cmap="YlOrRd", aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        note = notes[list(norms)[i]].get(columns[j], "")
        words, dark = f"{value:.3g}\n{note}" if note else "", np.isfinite(value) and scale(value) > 0.6
        axes.text(j, i, words, ha="center", va="center", fontsize=7.5, color="white" if dark else INK)
        if np.isinf(value):
            axes.plot(j, i, "x", color=INK, markersize=26, markeredgewidth=1)
    axes.set_xticks(range(len(columns)), [column.replace(", ", "\n") for column in columns], fontsize=7)
    axes.set_yticks(range(len(norms)), list(norms))
    axes.set_xlabel(xlabel)
    bare(axes)
    fig.colorbar(shown, ax=axes, label="largest gradient norm")
    return fig


@styled
def error_by_block(regimes: Mapping[str, AV[np.ndarray]], *, ylabel: str | AV[str] = "error", first: int = 0) -> Figure:
    """Draw the error of each block, video and audio side by side (exposure bias).

    A name reads "model, past": a shade a model, the last one in its stream's colour; dashes a past, the first solid.
    `first` is the number of the first block.

    Shapes: each stream [K], or [clips, K] for a mean with its 95 % interval; NaN is left out.
    """
    fig = figure(2.9)
    panels, ylabels = AV(*fig.subplots(1, 2, sharex=True)), ylabel if isinstance(ylabel, AV) else AV(ylabel, ylabel)
    models, pasts = ([*dict.fromkeys(name.partition(", ")[part] for name in regimes)] for part in (0, 2))
    for axes, stream, colour, label in zip(panels, AV._fields, STREAM, ylabels, strict=True):
        shades = dict(zip(reversed(models), (colour, GREY, INK, "#8e44ad"), strict=False))
        for name, errors in regimes.items():
            mean, half = _mean_by_block(np.atleast_2d(getattr(errors, stream)))
            blocks, (model, _, past) = np.arange(first, first + len(mean)), name.partition(", ")
            dashes = ("-", "--", ":", "-.")[pasts.index(past) % 4]
            _line(axes, (blocks, mean, (mean - half, mean + half)), shades[model], name, linestyle=dashes)
        axes.set(title=stream, xlabel="block", ylabel=label, xticks=blocks)
        axes.set_ylim(bottom=0)
        axes.grid(True)
    fig.legend(*panels.video.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return fig


def _mean_by_block(each: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over clips, and half of its 95 % interval. Shapes: [clips, K] to [K] both."""
    known = np.maximum(np.isfinite(each).sum(0), 1)
    mean = np.nansum(each, axis=0) / known
    spread = np.sqrt(np.nansum((each - mean) ** 2, axis=0) / np.maximum(known - 1, 1))
    return mean, np.where(known > 1, 1.96 * spread / np.sqrt(known), 0.0)


@styled
def block_times(milliseconds: Mapping[str, Sequence[float]], *, budget_ms: float = 1000.0) -> Figure:
    """Draw the time of every block in order, and beside it how much slower the slow ones are than the median."""
    fig = figure(2.7)
    order, tail = fig.subplots(1, 2, width_ratios=(2, 1))
    for name, colour in colours(milliseconds).items():
        times = np.asarray(milliseconds[name], float)
        middle, slow = np.percentile(times, (50, 95))
        order.plot(times, ".", color=colour, label=f"{name}: median {middle:.0f} ms, 95 % under {slow:.0f} ms")
        tail.plot(np.linspace(0, 100, len(times)), np.sort(times) / middle, color=colour)
    order.axhline(budget_ms, color=INK, linewidth=1, linestyle=":", label=f"real time: {budget_ms:.0f} ms")
    order.set(xlabel="block", ylabel="ms a block", yscale="log", title="every block, in order")
    _plain(order.yaxis)
    tail.set(xlabel="% of the blocks", ylabel="time / median", title="sorted")
    for axes in (order, tail):
        axes.grid(True)
    order.margins(y=0.15)
    fig.legend(loc="outside lower center", ncols=3, fontsize=8)
    return fig


@styled
def roofline(points: Mapping[str, tuple[float, float]], *, peak_gflops: float, bandwidth_gb_s: float) -> Figure:
    """Draw parts of the model as (FLOP a byte, GFLOP/s) under the machine's two roofs: bandwidth and arithmetic."""
    fig = figure(3.0, width=6)
    axes = fig.subplots()
    x = [intensity for intensity, _ in points.values()]
    ridge = peak_gflops / bandwidth_gb_s
    span = np.geomspace(min(*x, ridge) / 4, max(*x, ridge) * 4, 100)
    axes.plot(span, np.minimum(peak_gflops, bandwidth_gb_s * span), color=GREY)
    note = {"textcoords": "offset points", "color": GREY, "ha": "right"}
    axes.annotate(f"{peak_gflops:.0f} GFLOP/s", (span[-1], peak_gflops), (0, 5), **note)
    axes.annotate(f"{bandwidth_gb_s:.0f} GB/s", (ridge / 2, peak_gflops / 2), (-6, 4), **note)
    for name, colour in colours(points).items():
        axes.plot(*points[name], "o", color=colour, markersize=7)
        axes.annotate(name, points[name], xytext=(7, -9), textcoords="offset points", color=colour)
    axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity, FLOP a byte", ylabel="GFLOP/s reached")
    axes.set_ylim(top=2 * peak_gflops)
    _plain(axes.xaxis)
    _plain(axes.yaxis)
    axes.grid(True)
    return fig


@styled
def velocities(motions: Mapping[str, np.ndarray]) -> Figure:
    """Draw where the clips of each system start to go, a dot a clip, down is down as on the screen.

    The pale ring holds the speeds that the world allows; corners say how many clips go that way. A set that has
    collapsed leaves most of the ring empty.

    Shapes: each [n, 4], start x and y, velocity x and y in pixels a second.
    """
    fig, reach = figure(2.15), 1.28 * SPEED[1]
    panels = fig.subplots(1, len(motions), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, colour) in zip(panels, colours(motions).items(), strict=True):
        moves = np.asarray(motions[name], float)
        axes.add_patch(Annulus((0, 0), SPEED[1], SPEED[1] - SPEED[0], facecolor=PALE, edgecolor="none"))
        axes.axhline(0, color=PALE, linewidth=0.8)
        axes.axvline(0, color=PALE, linewidth=0.8)
        axes.plot(*moves[:, 2:].T, ".", color=colour, markersize=4, alpha=0.6, markeredgewidth=0)
        corners = zip(((1, 1), (-1, 1), (-1, -1), (1, -1)), quadrants(moves), strict=True)
        for (x, y), count in sorted(corners, reverse=True):
            place = {"ha": "right" if x > 0 else "left", "va": "bottom" if y > 0 else "top"}
            axes.text(0.97 * x * reach, 0.97 * y * reach, str(count), color=colour, weight="bold", **place)
        axes.set(title=name, xlim=(-reach, reach), ylim=(reach, -reach), aspect="equal")
        axes.set(xticks=(-60, 0, 60), yticks=(-60, 0, 60), xlabel="to the right, px/s")
        bare(axes)
    panels[0].set_ylabel("down, px/s")
    return fig
