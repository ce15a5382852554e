"""Arrays -> figures of fixed size in one visual language. F frames, N samples, K blocks.

Time runs left to right in seconds, and both streams share one axis. Colours have a meaning: video is blue, audio is
orange, sinks are green, what is compared with (teacher, paper) is grey. Every function that draws is `styled`, takes
plain arrays and gives a figure that no window owns; `report.Run.figure` stores it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, pairwise, zip_longest
from pathlib import Path
from typing import Protocol

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Annulus, Rectangle
from matplotlib.ticker import LogLocator

from omniforcing_lib.bounce.variety import quadrants
from omniforcing_lib.bounce.world import SPEED
from omniforcing_lib.layout import AV, BlockLayout, Clock
from studies.probes import SIDES

CLOCK = Clock()
INK, GREY, PALE = "#23272f", "#8b919b", "#e6e8ec"
STREAM = AV("#2f6fba", "#e07b21")
SINK = "#2f9e5f"
PREFIX_HATCH = "////"
NAMED = {"teacher": GREY, "paper": GREY, "sink": SINK, "video": STREAM.video, "audio": STREAM.audio}
OTHERS = (INK, "#8e44ad", "#158f9b", "#c2395f", "#a07b16", "#5b5bd6")
WIDTH, MANY_LINES = 8.0, 5
styled = mpl.rc_context(fname=Path(__file__).with_name("plots.mplstyle"))
"""Decorate what draws: it draws in the style of the series and leaves matplotlib's own settings as they were."""


def colours(names: Iterable[str]) -> dict[str, str]:
    """Give each name its colour: streams, sinks, teacher and paper their own, the others in order.

    The first name with a word of its own has that colour; a second one would look the same, and takes another.
    """
    others, left = cycle(OTHERS), dict(NAMED)

    def one(name: str) -> str:
        word = next((word for word in left if word in name.lower()), None)
        return left.pop(word) if word else next(others)

    return {name: one(name) for name in names}


def figure(height: float, width: float = WIDTH) -> Figure:
    """Make an empty figure of `width` x `height` inches, at 100 dpi, that no window and no global list holds."""
    return Figure(figsize=(width, height))


def png(fig: Figure, dpi: int = 100) -> bytes:
    """Render a figure as the bytes of a PNG, the same for the same figure."""
    with io.BytesIO() as buffer:
        fig.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
        return buffer.getvalue()


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


class Timed(Protocol):
    """Anything that happens at a time: an impact, an onset."""

    time_s: float


@styled
def rulers(layouts: BlockLayout | Mapping[str, BlockLayout], seconds: int) -> Figure:
    """Draw the block table as two aligned rulers of latents, for one layout or for several by name (paper Sec. 3.1).

    Each block carries its number and how many latents it holds; sinks stand before time, of which they hold none.
    """
    named = layouts if isinstance(layouts, Mapping) else {"": layouts}
    fig = figure(0.45 + 1.35 * len(named))
    panels = fig.subplots(len(named), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, layout) in zip(panels, named.items(), strict=True):
        _ruler(axes, layout, seconds)
        table = f"first block {tuple(layout.first)}, then {tuple(layout.step)}, {layout.sinks} sinks"
        axes.set_title(f"{name}: {table}" if name else table)
    panels[-1].set_xlabel("seconds")
    return fig


def _ruler(axes: Axes, layout: BlockLayout, seconds: int) -> None:
    label = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for k, block in enumerate(layout.blocks(CLOCK.latents(seconds).video)):
        for stream, bottom in ((0, 1.0), (1, 0.0)):
            # One latent a range, so that `Clock.seconds` gives the edges of each.
            latents = [CLOCK.seconds(AV(range(i, i + 1), range(i, i + 1)))[stream] for i in block[stream]]
            edges, colour = np.array(latents, float), STREAM[stream]
            sides = (edges[0, 0], edges[-1, 1], bottom, bottom + 0.8)
            box(axes, *sides, edge="none", facecolor=(*to_rgb(colour), 0.16 + 0.14 * (k % 2)))
            axes.vlines(edges[1:, 0], *sides[2:], color=colour, linewidth=0.5)
            if k == 0:
                hatch(axes, *sides, edge=colour)
            box(axes, *sides, edge=colour, fill=False, linewidth=1.3)
            if sides[1] - sides[0] > 0.3:
                place = {"ha": "center", "va": "center", "bbox": label}
                axes.text(sum(sides[:2]) / 2, bottom + 0.4, f"block {k}: {len(edges)}", **place)
    if layout.sinks:
        box(axes, -0.42, -0.08, 0, 0.8, edge=SINK, facecolor=SINK)
        axes.text(-0.25, 0.4, str(layout.sinks), ha="center", va="center", color="white", weight="bold")
    axes.set(xlim=(-0.45, seconds + 0.1), ylim=(-0.12, 1.92), xticks=range(seconds + 1), yticks=(0.4, 1.4))
    axes.set_yticklabels(["audio", "video"])
    bare(axes)


@styled
def overview(layout: BlockLayout) -> Figure:
    """Draw the method in three rows over time: the teacher's clip, the student's blocks, what a viewer gets of them."""
    fig = figure(2.7)
    axes = fig.subplots()
    seconds, teacher, student, shown, half, lag = 5, 3.2, 1.6, 0.0, 0.4, 0.35
    blocks = [CLOCK.seconds(block) for block in layout.blocks(CLOCK.latents(seconds).video)]
    for stream, lift in ((0, half), (1, 0)):
        colour = STREAM[stream]
        pale = (*to_rgb(colour), 0.2)
        box(axes, 0, seconds, teacher + lift, teacher + lift + half, edge=colour, facecolor=pale)
        for k, block in enumerate(blocks):
            start, stop = map(float, block[stream])
            box(axes, start, stop, student + lift, student + lift + half, edge=colour, facecolor=pale)
            box(axes, start + lag, stop + lag, shown + lift, shown + lift + half, edge="white", facecolor=colour)
            if k == 0:
                hatch(axes, start, stop, student + lift, student + lift + half, edge=colour)
    arrow, middle = {"arrowstyle": "->", "color": INK, "shrinkA": 0, "shrinkB": 0}, {"ha": "center", "va": "center"}
    axes.annotate("", (seconds, teacher - 0.12), (0, teacher - 0.12), arrowprops=arrow | {"arrowstyle": "<->"})
    middles = [float(sum(block.video)) / 2 for block in blocks]
    for k, here in enumerate(middles):
        if k:
            bow = arrow | {"connectionstyle": "arc3,rad=0.5"}
            axes.annotate("", (here, student - 0.03), (middles[k - 1], student - 0.03), arrowprops=bow)
            axes.text(here, student + 1.5 * half, f"block {k}", **middle)
            for lift, word in ((1.5, "see"), (0.5, "hear")):
                axes.text(here + lag, shown + lift * half, word, color="white", weight="bold", **middle)
    axes.text(seconds / 2, teacher + 1.5 * half, "every latent sees every other", **middle)
    axes.text(seconds / 2, teacher + 0.5 * half, "nothing to see or hear before all of it is done", **middle)
    axes.set(xlim=(-0.05, seconds + lag + 0.1), ylim=(-0.1, teacher + 2 * half + 0.05), xlabel="seconds")
    axes.set_yticks([row + half for row in (teacher, student, shown)], ["teacher", "student", "stream"])
    bare(axes)
    return fig


@styled
def strip(
    clip: AV[np.ndarray],
    impacts: Sequence[Timed] | None = None,
    onsets: Sequence[Timed] | None = None,
    *,
    title: str = "",
    pictures: int = 12,
    clock: Clock = CLOCK,
) -> Figure:
    """Draw frames above the waveform on one time axis: impacts seen (blue) and onsets heard (orange) should meet.

    Shapes: frames uint8 [F, H, W, 3], samples float [N].
    """
    fig = figure(2.15)
    axes = fig.subplots()
    end = len(clip.video) / clock.fps
    _film(axes, clip, pictures, clock)
    _mark(axes, AV(impacts or (), onsets or ()))
    axes.set(xlim=(0, end), ylim=(-0.15, 2.15), xlabel="seconds", yticks=(0.5, 1.5), title=title)
    axes.set_yticklabels([_counted("sound", "onset", onsets), _counted("frames", "impact", impacts)])
    bare(axes)
    return fig


def _counted(stream: str, event: str, events: Sequence[Timed] | None) -> str:
    return stream if events is None else f"{stream}\n{len(events)} {event}{'s' * (len(events) != 1)}"


def _film(axes: Axes, clip: AV[np.ndarray], pictures: int, clock: Clock) -> None:
    """Lay pictures on [1, 2], each over the middle of its own time, above the waveform on [0, 1]."""
    end = len(clip.video) / clock.fps
    edges = np.linspace(0, end, pictures + 1)
    for start, stop in pairwise(edges):
        frame = clip.video[int((start + stop) / 2 * clock.fps)]
        axes.imshow(frame, extent=(start, stop, 1.04, 2), aspect="auto", interpolation="nearest")
    low, high = _envelope(clip.audio, 800)
    seconds = np.linspace(0, len(clip.audio) / clock.sample_rate, len(low))
    axes.fill_between(seconds, 0.5 + low, 0.5 + high, color=STREAM.audio, linewidth=0.6)


def _mark(axes: Axes, events: AV[Sequence[Timed]], size: float = 6) -> None:
    """Point at impacts from above and at onsets from below; the lines meet where sight and sound agree."""
    for timed, colour, marker, foot, head in zip(events, STREAM, (7, 6), (1.0, 1.0), (2.12, -0.12), strict=False):
        if not (times := [event.time_s for event in timed]):
            continue
        axes.vlines(times, foot, head, color=colour, linewidth=0.15 * size, linestyle=(0, (3, 2)))
        axes.plot(times, [head] * len(times), marker=marker, ms=size, color=colour, linestyle="none", clip_on=False)


def _envelope(samples: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest sample in each column of a picture; the loudest reaches half a unit."""
    pieces = np.array_split(samples, min(columns, max(len(samples), 1)))
    scale = 0.47 / max(float(np.abs(samples).max(initial=0)), 1e-3)
    low, high = ([pick(piece, initial=0) for piece in pieces] for pick in (np.min, np.max))
    return scale * np.array(low), scale * np.array(high)


@styled
def contact_sheet(
    clips: Sequence[AV[np.ndarray]],
    titles: Sequence[str],
    events: Sequence[AV[Sequence[Timed]]] = (),
    *,
    clock: Clock = CLOCK,
) -> Figure:
    """Draw several clips as small strips, frames above waveform; with `events`, impacts and onsets of each are marked.

    Shapes: each clip frames uint8 [F, H, W, 3], samples float [N].
    """
    if len(clips) != len(titles) or not clips:
        raise ValueError(f"expected a title for each clip, found {len(clips)} clips and {len(titles)} titles")
    rows = -(-len(clips) // 2)
    fig = figure(0.1 + (1.35 if events else 1.2) * rows)
    panels = fig.subplots(rows, 2, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for axes, clip, title, marks in zip_longest(panels[: len(clips)], clips, titles, events):
        _film(axes, clip, 9 if marks else 7, clock)
        _mark(axes, marks or AV((), ()), size=4)
        axes.set(xlim=(0, len(clip.video) / clock.fps), ylim=(-0.15, 2.15) if marks else (0, 2))
        axes.set_title(title, weight="normal", pad=7 if marks else 2)
    return fig


@styled
def mask_grid(
    masks: Mapping[str, np.ndarray],
    layout: BlockLayout,
    video_latents: int,
    tokens_per_frame: int,
    *,
    block: int | None = None,
) -> Figure:
    """Draw masks side by side: rows ask, columns answer; sinks are green, block 0 hatched, white is not seen.

    With a `block` its rows stand out and the others fade.

    Shapes: each bool [rows, columns], named video_self, audio_self, a2v (video rows, audio columns) or v2a.
    """
    tokens = layout.tokens(video_latents, tokens_per_frame)
    fig = figure(2.6)
    panels = fig.subplots(1, len(masks), squeeze=False)[0]
    for axes, (name, mask) in zip(panels, masks.items(), strict=True):
        sides = SIDES[name]
        _mask(axes, np.asarray(mask), tokens, sides, layout.sinks, block)
        axes.set(title=name, xlabel=f"{AV._fields[sides.audio]} keys", ylabel=f"{AV._fields[sides.video]} queries")
    return fig


def _mask(
    axes: Axes, mask: np.ndarray, tokens: AV[tuple[range, ...]], sides: AV[int], sinks: int, block: int | None
) -> None:
    rows, columns = tokens[sides.video], tokens[sides.audio]
    picture = np.where(mask[..., None], _tint(STREAM[sides.audio], 0.55), 1.0)
    if sides.audio == 1:
        picture[:, :sinks] = np.where(mask[:, :sinks, None], _tint(SINK, 0.85), 1.0)
    if sides.video == 1:
        picture[:sinks] = np.where(mask[:sinks, :, None], 0.55 * picture[:sinks] + 0.45 * np.array(to_rgb(SINK)), 1.0)
    if block is not None:
        others = ~np.isin(np.arange(len(mask)), rows[block])
        picture[others] = 1 - 0.3 * (1 - picture[others])
    axes.imshow(picture, extent=(0, mask.shape[1], mask.shape[0], 0), aspect="auto", interpolation="nearest")
    hatch(axes, sinks * sides.audio, columns[0].stop, 0, mask.shape[0], edge=INK)
    axes.hlines([span.start for span in rows[1:]], 0, mask.shape[1], color=GREY, linewidth=0.5)
    axes.vlines([span.start for span in columns[1:]], 0, mask.shape[0], color=GREY, linewidth=0.5)
    for axis, spans in ((axes.xaxis, columns), (axes.yaxis, rows)):
        axis.set_ticks([(s.start + s.stop) / 2 for s in spans], [str(k) for k in range(len(spans))])
    axes.tick_params(length=0)


def _tint(colour: str, strength: float) -> np.ndarray:
    return 1 - strength * (1 - np.array(to_rgb(colour)))


@styled
def leak_heatmap(matrices: np.ndarray | Mapping[str, np.ndarray]) -> Figure:
    """Draw how far each perturbed block reaches: left of the stairs is the past, where white means to the bit.

    A change that reaches the past is a red cross.

    Shapes: each [K, K], row = block perturbed, column = block of the output, value = largest change; four in a row.
    """
    named = matrices if isinstance(matrices, Mapping) else {"": matrices}
    columns = min(4, len(named))
    rows = -(-len(named) // columns)
    fig = figure(0.4 + 1.95 * rows, width=min(WIDTH, 2.2 * columns + 1.2))
    panels = fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    largest = max(float(np.max(m)) for m in named.values()) or 1.0
    norm = LogNorm(largest * 1e-4, largest)
    for axes, (name, matrix) in zip(panels.flat, named.items(), strict=False):
        matrix = np.asarray(matrix, float)
        axes.imshow(np.ma.masked_equal(matrix, 0), norm=norm, cmap="Purples", aspect="equal")
        edges = np.arange(len(matrix) + 1) - 0.5
        axes.step(edges, edges, where="pre", color=INK, linewidth=1.3)
        later, earlier = np.nonzero(np.tril(matrix, -1))
        axes.plot(earlier, later, "x", color="#d0021b", markersize=8, markeredgewidth=2)
        axes.set(title=name, xticks=range(len(matrix)), yticks=range(len(matrix)))
        bare(axes)
    for axes in panels[-1]:
        axes.set_xlabel("block of the output")
    for axes in panels[:, 0]:
        axes.set_ylabel("block perturbed")
    fig.colorbar(ScalarMappable(norm, "Purples"), ax=list(panels.flat), shrink=0.85, label="largest change")
    return fig


@styled
def curves(
    series: Mapping[str, tuple], *, xlabel: str, ylabel: str, title: str = "", log: str = "", hline: float | None = None
) -> Figure:
    """Draw lines by name, each (x, y) or (x, y, (low, high)); `log` names logarithmic axes: "", "x", "y" or "xy".

    The names of many lines stand beside them.
    """
    beside = len(series) > MANY_LINES
    fig = figure(2.7, width=WIDTH if beside else 6)
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
    axes.legend(**{"loc": "center left", "bbox_to_anchor": (1, 0.5)} if beside else {})
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
def bars_with_ci(measures: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Draw each measure as a panel of horizontal bars, one for each model: (value, low, high), or (value,) alone.

    low and high are the edges of the 95 % interval. More models than there are colours are all grey: a colour that
    comes twice says nothing. What is not a number has a dash.
    """
    models = list(next(iter(measures.values())))
    colour = colours(models) if len(models) <= len(OTHERS) else dict.fromkeys(models, GREY)
    fig = figure(0.75 + 0.3 * len(models))
    panels = fig.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    whiskers = {"ecolor": INK, "elinewidth": 1.1, "capsize": 2.5}
    for axes, (measure, estimates) in zip(panels, measures.items(), strict=True):
        value, low, high = np.array([(*estimates[model], math.nan, math.nan)[:3] for model in models], float).T
        bars = {"height": 0.66, "alpha": 0.8, "color": [colour[model] for model in models], "error_kw": whiskers}
        axes.barh(models, value, xerr=(value - low, high - value), **bars)
        for row, (number, end) in enumerate(zip(value, np.nan_to_num(np.fmax(value, high)), strict=True)):
            text = f"{number:.3g}" if math.isfinite(number) else "—"
            axes.annotate(text, (end, row), (5, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_title(measure)
        axes.margins(x=0.3)
        axes.grid(True, axis="x")
        axes.tick_params(axis="y", length=0)
    panels[0].invert_yaxis()
    return fig


@styled
def by_sinks(panels: Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float]]]], *, log: bool = False) -> Figure:
    """Draw measures against the number of sinks: panel -> series -> (sinks, values); what is not finite is a cross."""
    counts = sorted({int(s) for series in panels.values() for sinks, _ in series.values() for s in sinks})
    fig = figure(2.7)
    for axes, (measure, series) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        above = {"transform": axes.get_xaxis_transform()}
        for name, colour in colours(series).items():
            x, y = np.array([counts.index(int(s)) for s in series[name][0]]), np.asarray(series[name][1], float)
            finite, dashes = np.isfinite(y), "--" if "paper" in name.lower() else "-"
            axes.plot(x[finite], y[finite], color=colour, marker="o", label=name, linestyle=dashes)
            axes.plot(x[~finite], np.full((~finite).sum(), 0.96), "x", color=colour, mew=2, **above)
            for place in x[~finite]:
                axes.text(place, 0.88, "NaN", color=colour, ha="center", fontsize=8, **above)
        axes.set(title=measure, xlabel="audio sinks", xlim=(-0.4, len(counts) - 0.6))
        axes.set_xticks(range(len(counts)), [str(c) for c in counts])
        if log:
            axes.set_yscale("log")
            _plain(axes.yaxis)
        axes.grid(True, axis="y")
        axes.legend()
    return fig


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
def block_times(milliseconds: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the time of every block in order, and beside it how much slower the slow ones are than the median."""
    fig = figure(2.7)
    order, tail = fig.subplots(1, 2, width_ratios=(2, 1))
    for name, colour in colours(milliseconds).items():
        times = np.asarray(milliseconds[name], float)
        middle, slow = np.percentile(times, (50, 95))
        order.plot(times, ".", color=colour, label=f"{name}: median {middle:.0f} ms, 95 % under {slow:.0f} ms")
        tail.plot(np.linspace(0, 100, len(times)), np.sort(times) / middle, color=colour)
    order.axhline(1000, color=INK, linewidth=1, linestyle=":", label="real time: 1000 ms")
    order.set(xlabel="block", ylabel="ms a block", yscale="log", title="every block, in order")
    _plain(order.yaxis)
    tail.set(xlabel="% of the blocks", ylabel="time / median", title="sorted")
    for axes in (order, tail):
        axes.grid(True)
    order.margins(y=0.15)
    fig.legend(loc="outside lower center", ncols=3, fontsize=8)
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
