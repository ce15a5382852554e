"""Arrays -> figures. Time runs left to right in seconds and both streams share one axis.

Every function takes plain arrays and gives a figure; `report.Run.figure` stores it. F frames, N samples, K blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, zip_longest
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure

from omniforcing_lib.layout import AV, BlockLayout, Clock
from series.canvas import GREY, INK, SINK, STREAM, WIDTH, bare, box, figure, hatch, styled
from series.charts import (
    Estimate,
    bars_with_ci,
    block_times,
    by_sinks,
    curves,
    error_by_block,
    phase,
    roofline,
    sigma_schedule,
    velocities,
)

__all__ = [
    "Estimate",
    "bars_with_ci",
    "block_times",
    "by_sinks",
    "contact_sheet",
    "curves",
    "error_by_block",
    "leak_heatmap",
    "mask_grid",
    "phase",
    "roofline",
    "rulers",
    "sigma_schedule",
    "strip",
    "velocities",
]

CLOCK = Clock()
SIDES = {"video_self": AV(0, 0), "audio_self": AV(1, 1), "a2v": AV(0, 1), "v2a": AV(1, 0)}


class Timed(Protocol):
    """Anything that happens at a time: an impact, an onset."""

    time_s: float


@styled
def rulers(layouts: BlockLayout | Mapping[str, BlockLayout], seconds: int, clock: Clock = CLOCK) -> Figure:
    """Draw the block table as two aligned rulers of latents, for one layout or for several by name (paper Sec. 3.1).

    Each block carries its number and how many latents it holds; sinks stand before time, of which they hold none.
    """
    named = layouts if isinstance(layouts, Mapping) else {"": layouts}
    fig = figure(0.45 + 1.35 * len(named))
    panels = fig.subplots(len(named), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, layout) in zip(panels, named.items(), strict=True):
        _ruler(axes, layout, seconds, clock)
        table = f"first block {tuple(layout.first)}, then {tuple(layout.step)}, {layout.sinks} sinks"
        axes.set_title(f"{name}: {table}" if name else table)
    panels[-1].set_xlabel("seconds")
    return fig


def _ruler(axes: Axes, layout: BlockLayout, seconds: int, clock: Clock) -> None:
    for k, block in enumerate(layout.blocks(clock.latents(seconds).video)):
        for stream, bottom in ((0, 1.0), (1, 0.0)):
            # One latent a range, so that `clock.seconds` gives the edges of each.
            edges = [clock.seconds(AV(range(i, i + 1), range(i, i + 1)))[stream] for i in block[stream]]
            _ruled(axes, np.array(edges, float), bottom, STREAM[stream], k)
    if layout.sinks:
        box(axes, -0.42, -0.08, 0, 0.8, edge=SINK, facecolor=SINK)
        axes.text(-0.25, 0.4, str(layout.sinks), ha="center", va="center", color="white", weight="bold")
    axes.set(xlim=(-0.45, seconds + 0.1), ylim=(-0.12, 1.92), xticks=range(seconds + 1), yticks=(0.4, 1.4))
    axes.set_yticklabels(["audio", "video"])
    bare(axes)


def _ruled(axes: Axes, edges: np.ndarray, bottom: float, colour: str, k: int) -> None:
    """Draw one block of one stream: a cell a latent."""
    start, stop = edges[0, 0], edges[-1, 1]
    box(axes, start, stop, bottom, bottom + 0.8, edge="none", facecolor=(*to_rgb(colour), 0.16 + 0.14 * (k % 2)))
    axes.vlines(edges[1:, 0], bottom, bottom + 0.8, color=colour, linewidth=0.5)
    if k == 0:
        hatch(axes, start, stop, bottom, bottom + 0.8, edge=colour)
    box(axes, start, stop, bottom, bottom + 0.8, edge=colour, fill=False, linewidth=1.3)
    if stop - start > 0.3:
        label = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        axes.text((start + stop) / 2, bottom + 0.4, f"block {k}: {len(edges)}", ha="center", va="center", bbox=label)


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
    for found, colour, marker, foot, head in zip(events, STREAM, (7, 6), (1.0, 1.0), (2.12, -0.12), strict=False):
        if not (times := [event.time_s for event in found]):
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
    columns: int = 2,
    clock: Clock = CLOCK,
) -> Figure:
    """Draw several clips as small strips, frames above waveform; with `events`, impacts and onsets of each are marked.

    Shapes: each clip frames uint8 [F, H, W, 3], samples float [N].
    """
    if len(clips) != len(titles) or not clips:
        raise ValueError(f"expected a title for each clip, found {len(clips)} clips and {len(titles)} titles")
    rows = -(-len(clips) // columns)
    fig = figure(0.1 + (1.35 if events else 1.2) * rows)
    panels = fig.subplots(rows, columns, squeeze=False).ravel()
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
        _reach(axes, np.asarray(matrix, float), norm)
        axes.set(title=name)
    for axes in panels[-1]:
        axes.set_xlabel("block of the output")
    for axes in panels[:, 0]:
        axes.set_ylabel("block perturbed")
    fig.colorbar(ScalarMappable(norm, "Purples"), ax=list(panels.flat), shrink=0.85, label="largest change")
    return fig


def _reach(axes: Axes, matrix: np.ndarray, norm: LogNorm) -> None:
    """Draw one matrix: zero is white, a change before the perturbed block a red cross."""
    axes.imshow(np.ma.masked_equal(matrix, 0), norm=norm, cmap="Purples", aspect="equal")
    edges = np.arange(len(matrix) + 1) - 0.5
    axes.step(edges, edges, where="pre", color=INK, linewidth=1.3)
    rows, columns = np.nonzero(np.tril(matrix, -1))
    axes.plot(columns, rows, "x", color="#d0021b", markersize=8, markeredgewidth=2)
    axes.set(xticks=range(len(matrix)), yticks=range(len(matrix)))
    bare(axes)
