"""Rotary positions: physical time and space to cos/sin, split or interleaved, identity for sinks (specification 1.8).

Shapes: H heads, T tokens, D head dim, n position dims (3 for video self-attention, 1 everywhere else). One table of
angles [H, T, D/2] serves both rope types: they differ only in which elements of a head are paired.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from omniforcing_lib.config import ModelConfig
from omniforcing_lib.layout import AV, Clock

SPATIAL_STRIDE = 32
"""Nominal pixels per token in each direction; LTX-2's VAE, and by convention the miniature's positions too."""


class Rotation(NamedTuple):
    """Cosines and sines of a stretch of tokens, each [H, T, D/2]."""

    cos: Tensor
    sin: Tensor


class Ropes(NamedTuple):
    """Rotations of one forward pass: self-attention (3-D, 1-D) and cross-modal (time only), for each stream."""

    own: AV[Rotation]
    cross: AV[Rotation]


def positions(
    clock: Clock,
    latents: AV[range],
    grid: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> AV[Tensor]:
    """Give the middle of each cell in seconds and nominal pixels; float32 is the reference's arithmetic.

    Everything is made on the device: a copy from the host would wait for all that the device still has to do.

    Source: specification 1.8.

    Shapes: video [3, F h w] (t, y, x), audio [1, T].
    """
    edges = clock.edges(latents.map(lambda span: torch.arange(span.start, span.start + len(span) + 1, device=device)))
    seconds = edges.map(lambda e, rate: _over(e.to(dtype), rate), AV(clock.fps, clock.mel_rate))
    seconds = seconds.map(lambda s: (s[:-1] + s[1:]) / 2)
    y, x = ((torch.arange(n, dtype=dtype, device=device) + 0.5) * SPATIAL_STRIDE for n in grid)
    cells = torch.meshgrid(seconds.video, y, x, indexing="ij")
    return AV(torch.stack([axis.flatten() for axis in cells]), seconds.audio[None])


def angles(position: Tensor, max_pos: tuple[int, ...], dim: int, theta: float, precision: str) -> Tensor:
    """Turn positions into rotation angles (specification 1.8).

    Shapes: position [n, T] to [T, dim / 2]; the first dim/2 - n floor(dim/2n) angles are zero (padding).
    """
    fraction = torch.stack([_over(*pair) for pair in zip(position, max_pos, strict=False)], dim=1)
    return _spread(fraction * 2 - 1, dim, theta, precision)


def _over(x: Tensor, number: float) -> Tensor:
    """Divide; a GPU would multiply by the reciprocal of a number of the host, which is off by a bit."""
    return x / x.new_full((), number)


def offset_angles(
    seconds: float,
    axes: int,
    max_pos: tuple[int, ...],
    dim: int,
    theta: float,
    precision: str,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Give the angles that make a key look `seconds` later; they are the same for a key of any position.

    Shapes: float64 [1, dim / 2]; `axes` is the number of position dims n of the attention.
    """
    moved = torch.full((1, 1), 2 * seconds / max_pos[0], dtype=torch.float64, device=device)
    return _spread(torch.nn.functional.pad(moved, (0, axes - 1)), dim, theta, precision)


def _spread(fraction: Tensor, dim: int, theta: float, precision: str) -> Tensor:
    """Multiply fractional positions with the frequency grid and pad in front. Shapes: [T, n] to [T, dim / 2]."""
    frequency = _frequencies(dim // (2 * fraction.shape[1]), theta, precision, fraction.device)
    angle = (fraction[:, None, :] * frequency[:, None]).flatten(1)
    return torch.nn.functional.pad(angle, (dim // 2 - angle.shape[1], 0))


@lru_cache
@torch.inference_mode(False)
def _frequencies(count: int, theta: float, precision: str, device: torch.device) -> Tensor:
    """Give the frequency grid: made once, on the CPU, so that all devices have the same bits. Shapes: [count]."""
    steps = torch.linspace(0, 1, count, dtype=getattr(torch, precision))
    return (torch.pow(theta, steps) * torch.pi / 2).to(torch.float32).to(device)


def rotation(angle: Tensor, heads: int, sinks: int = 0) -> Rotation:
    """Split angles over heads and put identity rotations in front for the sinks (paper Sec. 3.2).

    Shapes: angle [T, dim / 2] to cos, sin [H, sinks + T, D/2].
    """
    by_head = angle.unflatten(1, (heads, -1)).transpose(0, 1)
    by_head = torch.nn.functional.pad(by_head, (0, 0, sinks, 0))
    return Rotation(by_head.cos().float(), by_head.sin().float())


# A table first asked for while sampling must serve training too. Few are kept: a stream needs each block's once.
@lru_cache(maxsize=16)
@torch.inference_mode(False)
def tables(
    config: ModelConfig, clock: Clock, latents: AV[range], grid: tuple[int, int], sinks: int, device: torch.device
) -> Ropes:
    """Give the rotations of a stretch of latents for every attention of the model.

    `sinks` identity rotations stand in front of the audio, which keeps its own positions. A latent whose middle is past
    `max_pos`, where the reference has nothing to agree with, is placed in float64, so that angles after an hour are as
    exact as at the start. This depends on the position alone: a latent has one rotation, in a block as in a clip.
    """
    lengths, cross_length = _lengths(config)
    # latents up to the longest extent, in the reference's arithmetic, and those beyond it
    known = clock.midpoints(latents).map(lambda times: bisect_right(times, cross_length[0]))
    near = positions(clock, latents.map(lambda span, n: span[:n], known), grid, device=device)
    far = positions(clock, latents.map(lambda span, n: span[n:], known), grid, torch.float64, device)

    def table(near: Tensor, far: Tensor, max_pos: tuple[int, ...], dim: int, sinks: int) -> Rotation:
        spectrum, heads = (config.positional_embedding_theta, config.frequencies_precision), config.num_attention_heads
        halves = [half for half in (near, far) if half.numel()] or [near]
        parts = (rotation(angles(p, max_pos, dim, *spectrum), heads, 0 if i else sinks) for i, p in enumerate(halves))
        return Rotation(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))

    in_front = AV(0, sinks)
    return Ropes(
        own=near.map(table, far, lengths, AV(config.video_dim, config.audio_dim), in_front),
        cross=near.map(lambda p, q, s: table(p[:1], q[:1], cross_length, config.audio_dim, s), far, in_front),
    )


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def offset_rotations(config: ModelConfig, seconds: AV[float], device: torch.device) -> Ropes:
    """Give the rotations that make keys look `seconds` later, for every attention; T is 1, the same for all keys."""
    lengths, cross_length = _lengths(config)

    def table(seconds: float, axes: int, max_pos: tuple[int, ...], dim: int) -> Rotation:
        grid = config.positional_embedding_theta, config.frequencies_precision
        return rotation(offset_angles(seconds, axes, max_pos, dim, *grid, device), config.num_attention_heads)

    return Ropes(
        own=seconds.map(table, AV(3, 1), lengths, AV(config.video_dim, config.audio_dim)),
        cross=seconds.map(lambda s: table(s, 1, cross_length, config.audio_dim)),
    )


def _lengths(config: ModelConfig) -> tuple[AV[tuple[int, ...]], tuple[int]]:
    """Extents of self-attention of each stream, and of cross-modal attention."""
    own = AV(config.positional_embedding_max_pos, config.audio_positional_embedding_max_pos)
    return own, (max(own.video[0], own.audio[0]),)


def rotate(x: Tensor, by: Rotation, rope_type: str) -> Tensor:
    """Rotate pairs of each head; `split` pairs (i, i + D/2), `interleaved` pairs (2i, 2i + 1). fp32 inside.

    Shapes: x [B, H, T, D] to the same.
    """
    cos, sin = by
    wide = x.float() if x.dtype.itemsize < 4 else x
    # a pair (a, b) becomes (a cos - b sin, b cos + a sin)
    split = rope_type == "split"
    if is_compiling():
        # the same numbers, so written that one kernel reads each element with its partner and writes it in order
        at, pairs = (-2, wide.unflatten(-1, (2, -1))) if split else (-1, wide.unflatten(-1, (-1, 2)))
        signs = (2 * torch.arange(2, device=x.device, dtype=wide.dtype) - 1).view((2, 1) if split else 2)
        cos, sin = cos.unsqueeze(at), sin.unsqueeze(at)
        return torch.addcmul(pairs * cos, pairs.flip(at) * signs, sin).flatten(-2).to(x.dtype)
    first, second = wide.chunk(2, dim=-1) if split else wide.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return (torch.cat(pairs, dim=-1) if split else torch.stack(pairs, dim=-1).flatten(-2)).to(x.dtype)
