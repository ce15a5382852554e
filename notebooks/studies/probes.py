"""Ask a model, a mask or a codec what it does, by touching one thing and looking at what moves.

Notebooks 01 and 02 and their tests ask; nothing in the method needs these answers.

Shapes: K blocks, F video and T audio latents, R rows (queries), C columns (keys).
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from omniforcing_lib import masks
from omniforcing_lib.attention import attend
from omniforcing_lib.cache import KVCache
from omniforcing_lib.flow import noise_like, noised
from omniforcing_lib.layout import AV, BlockLayout, Clock
from omniforcing_lib.masks import AttentionMask, BlockRows, Masks
from omniforcing_lib.transformer import Transformer
from studies.bench import alternate
from studies.distill import by_ratio

CLOCK = Clock()
SIDES = {"video_self": AV(0, 0), "audio_self": AV(1, 1), "a2v": AV(0, 1), "v2a": AV(1, 0)}


class Inputs(NamedTuple):
    """What a transformer is called with: noisy latents, noise levels, text."""

    x: AV[Tensor]
    sigma: AV[Tensor]
    text: AV[Tensor]

    def to(self, target: torch.device | torch.dtype) -> Inputs:
        """Move all tensors to a device or dtype."""
        return Inputs(*(pair.map(lambda t: t.to(target)) for pair in self))


@torch.no_grad()
def noisy_clip(x0: AV[Tensor], text: AV[Tensor], seed: int, layout: BlockLayout) -> Inputs:
    """Noise each block of clean latents to a level of its own, as causal training does (specification 3.6).

    Shapes: x0 AV([1, F, h, w, C], [1, T, C]), text AV [1, L, C]; sigma of the result AV([1, F], [1, T]).
    """
    generator, frames = torch.Generator().manual_seed(seed), x0.video.shape[1]
    level = torch.rand(1, layout.count(frames), generator=generator).to(x0.video.device)
    sigma = layout.block_index(frames).map(lambda blocks: level[:, blocks])
    return Inputs(x0.map(noised, noise_like(x0, generator), sigma), sigma, text)


def block_rows(layout: BlockLayout, seconds: int, clock: Clock = CLOCK) -> list[dict[str, object]]:
    """Table a clip's blocks, one per row: latents, what they decode to, and when each stream ends.

    Source: specification 3.2, 3.3.
    """
    rows = []
    for k, block in enumerate(layout.blocks(clock.latents(seconds).video)):
        frames, samples = clock.frames(block.video), clock.samples(block.audio)
        ends = clock.seconds(block).map(lambda span: f"{float(span[1]):.4f}")
        rows.append(
            {"block": k}
            | {f"{name} latents": steps(latents) for name, latents in zip(AV._fields, block, strict=True)}
            | {"pixel frames": steps(frames), "samples": steps(samples)}
            | {f"{name} ends, s": end for name, end in zip(AV._fields, ends, strict=True)}
        )
    return rows


def steps(span: range) -> str:
    """Write a range for a reader, the last step included."""
    return f"{span.start}" if len(span) == 1 else f"{span.start} – {span.stop - 1}"


def leftovers(layout: BlockLayout, seconds: Iterable[int], clock: Clock = CLOCK) -> AV[int]:
    """Add up the pixel and mel frames of whole-second clips that their blocks leave out or add (paper Sec. 3.1).

    A clip of K seconds has 24K + 1 pixel frames and 100K + 1 mel frames; zero means that nothing is truncated.
    """
    missing = AV(0, 0)
    for length in seconds:
        last = layout.block(layout.count(clock.latents(length).video) - 1)
        ends = AV(clock.frames(last.video).stop, clock.mels(last.audio).stop)
        expected = AV(clock.fps, clock.mel_rate).map(lambda rate, length=length: rate * length + 1)
        missing = missing.map(lambda total, a, b: total + abs(a - b), ends, expected)
    return missing


def lags(layout: BlockLayout, blocks: int, clock: Clock = CLOCK) -> set[Fraction]:
    """Collect by how many seconds audio ends before video, over the first blocks; one value is no drift, exactly."""
    ends = (clock.seconds(layout.block(k)) for k in range(blocks))
    return {video[1] - audio[1] for video, audio in ends}


def misplaced_by_ratio(layout: BlockLayout, seconds: int, clock: Clock = CLOCK) -> int:
    """Count audio latents that the released code gives the sigma of another block, see `distill.by_ratio`."""
    frames = clock.latents(seconds).video
    return sum(a != b for a, b in zip(layout.block_index(frames).audio, by_ratio(layout, frames), strict=True))


def rule(layout: BlockLayout, video_latents: int, tokens_per_frame: int) -> dict[str, Tensor]:
    """Write the four masks token by token from the paper's formula, knowing nothing of runs (specification 3.2, 3.4).

    Shapes: bool [R, C] by name; a token's block is 0 within the first block, else 1 + (token - first) // step.
    """
    tokens = AV(video_latents * tokens_per_frame, layout.audio_latents(video_latents))
    first = AV(layout.first.video * tokens_per_frame, layout.first.audio)
    step = AV(layout.step.video * tokens_per_frame, layout.step.audio)
    block = tokens.map(lambda n, a, b: torch.clamp((torch.arange(n) - a) // b + 1, min=0), first, step)
    block = AV(block.video, torch.cat([block.audio.new_zeros(layout.sinks), block.audio]))
    return {name: block[side.audio][None] <= block[side.video][:, None] for name, side in SIDES.items()}


def seen(visibility: AttentionMask) -> Tensor:
    """Ask attention itself what it lets through: with equal scores and one-hot values the output is the mask.

    Shapes: bool [R, C].
    """
    q, k = (torch.zeros(1, 1, n, 16) for n in (visibility.rows, visibility.columns))
    with warnings.catch_warnings():
        # FlexAttention warns that it runs uncompiled: here, once and on little, that is the quicker way.
        warnings.simplefilter("ignore")
        return attend(q, k, torch.eye(visibility.columns)[None, None], visibility)[0, 0] > 0


def renderings_agree(layout: BlockLayout, video_latents: int, tokens_per_frame: int) -> dict[str, bool]:
    """Compare what attention sees under each rendering of all four masks with the paper's rule."""
    wanted = rule(layout, video_latents, tokens_per_frame)

    def agree(rendering: str) -> bool:
        built = masks.build(layout, video_latents, tokens_per_frame, rendering=rendering)
        return all(torch.equal(seen(getattr(built, name)), mask) for name, mask in wanted.items())

    return {rendering: agree(rendering) for rendering in masks.RENDERINGS}


def off_by_one(right: Masks, name: str) -> Masks:
    """Spoil one mask: each block sees one column too many, the first token of the next block."""
    mask: AttentionMask = getattr(right, name)

    def longer(block: BlockRows) -> BlockRows:
        *pinned, recent = block.columns
        return BlockRows(block.rows, (*pinned, range(recent.start, min(recent.stop + 1, mask.columns))))

    return right._replace(**{name: replace(mask, by_block=tuple(map(longer, mask.by_block)))})


@torch.no_grad()
def leak_matrix(model: Transformer, inputs: Inputs, layout: BlockLayout, built: Masks) -> dict[str, np.ndarray]:
    """Change each block of each stream in turn and measure which blocks of which output move (invariant 1).

    Shapes: [K, K] for "video → audio" and the other three; row = block changed, column = block of the output,
    value = largest absolute change. Zero means equal to the bit: every pass has the same shapes.
    """
    blocks = layout.blocks(inputs.x.video.shape[1])
    before = model(*inputs, masks=built)
    moved = {f"{a} → {b}": np.zeros((len(blocks),) * 2) for a in AV._fields for b in AV._fields}
    for stream, name in enumerate(AV._fields):
        for k, block in enumerate(blocks):
            after = model(touched(inputs.x, stream, block[stream]), inputs.sigma, inputs.text, masks=built)
            change = before.map(lambda a, b: (a - b).abs().flatten(2).amax(2)[0], after)
            for out, other in enumerate(AV._fields):
                largest = [change[out][span[out].start : span[out].stop].max().item() for span in blocks]
                moved[f"{name} → {other}"][k] = largest
    return moved


def touched(x: AV[Tensor], stream: int, span: range) -> AV[Tensor]:
    """Copy latents and add 1 to a span of one stream."""
    copies = x.map(Tensor.clone)
    copies[stream][:, span.start : span.stop] += 1
    return copies


def into_the_past(moved: Mapping[str, np.ndarray]) -> int:
    """Count pairs of blocks where an output before the changed block moved."""
    return sum(int(np.count_nonzero(np.tril(matrix, -1))) for matrix in moved.values())


@torch.no_grad()
def cached_pass(model: Transformer, inputs: Inputs, layout: BlockLayout) -> AV[Tensor]:
    """Run a clip block by block through the KV cache, the way a stream does; each block's pass fills the cache.

    Shapes: to AV([1, F, h, w, C], [1, T, C]).
    """
    x, sigma, text = inputs
    where = {"device": x.video.device, "dtype": x.video.dtype}
    cache, parts = KVCache(model.config, layout, tuple(x.video.shape[2:4]), len(x.video), **where), []
    for k, block in enumerate(layout.blocks(x.video.shape[1])):
        piece = x.map(lambda t, span: t[:, span.start : span.stop], block)
        level = sigma.map(lambda t, span: t if t.ndim == 1 else t[:, span.start : span.stop], block)
        parts.append(model(piece, level, text, cache=cache, blocks=(cache.open(k, block),)))
    return AV(*zip(*parts, strict=True)).map(lambda part: torch.cat(part, dim=1))


@torch.no_grad()
def cached_against_masked(model: Transformer, inputs: Inputs, layout: BlockLayout, dtype: str = "") -> AV[float]:
    """Measure the largest difference of a cached and a masked pass, as a share of the largest value (invariant 2).

    A `dtype`, by name, casts the model and its inputs first.
    """
    if dtype:
        model, inputs = (x.to(getattr(torch, dtype)) for x in (model, inputs))
    frames, height, width = inputs.x.video.shape[1:4]
    whole = model(*inputs, masks=masks.build(layout, frames, height * width))
    return whole.map(lambda a, b: ((a - b).abs().max() / a.abs().max()).item(), cached_pass(model, inputs, layout))


class Cost(NamedTuple):
    """What one video self-attention of a clip costs.

    Attributes:
        tokens: video tokens.
        visible: share of the query-key pairs that the mask allows.
        mask_mb: megabytes of the dense mask.
        ms: median time by way of attending.
    """

    tokens: int
    visible: float
    mask_mb: float
    ms: dict[str, float]


@torch.no_grad()
def attention_cost(
    layout: BlockLayout,
    seconds: Sequence[int],
    *,
    tokens_per_frame: int = 16,
    heads: int = 4,
    dim: int = 40,
    repeats: int = 9,
    device: str | torch.device = "cpu",
) -> dict[int, Cost]:
    """Time video self-attention by clip length: all pairs, under a dense mask, and one call per block.

    The ways take turns after a warm-up, so that a machine that slows down slows all of them.
    """
    costs = {}
    for length in seconds:
        latents = CLOCK.latents(length).video
        sliced = masks.build(layout, latents, tokens_per_frame, rendering="sliced").video_self
        q, k, v = torch.randn(3, 1, heads, sliced.rows, dim, generator=torch.Generator().manual_seed(0)).to(device)
        ways = {"no mask": None, "dense mask": replace(sliced, rendering="dense"), "block slices": sliced}
        times = alternate({name: partial(attend, q, k, v, way) for name, way in ways.items()}, repeats)
        ms = {name: 1000 * statistics.median(took) for name, took in times.items()}
        pairs = sum(len(rows) * sum(map(len, columns)) for rows, columns in sliced.by_block)
        mask_mb = 1e3 * dense_mask_gb(length, tokens_per_frame)
        costs[length] = Cost(sliced.rows, pairs / sliced.rows**2, mask_mb, ms)
    return costs


def dense_mask_gb(seconds: int, tokens_per_frame: int, clock: Clock = CLOCK) -> float:
    """Give the gigabytes of a clip's dense mask of video self-attention, one byte per pair."""
    return (clock.latents(seconds).video * tokens_per_frame) ** 2 / 1e9
