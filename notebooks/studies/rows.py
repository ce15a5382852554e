"""What every row of audio self-attention does: how many keys it sees, how it spreads over them, how easily it is moved.

The paper's case for sinks is about rows: early audio queries see few keys, so their softmax turns one-hot and small
errors of the logits are amplified (paper Sec. 3.2; specification 4.3). All of that can be read off one forward pass.

Shapes: N layers, B batch, H heads, R audio rows (sinks included), C audio keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from omniforcing_lib.attention import Attention
from omniforcing_lib.layout import AV
from omniforcing_lib.masks import Masks
from omniforcing_lib.rope import Rotation, rotate
from omniforcing_lib.transformer import Transformer


class Rows(NamedTuple):
    """Numbers of every audio row, averaged over heads and clips.

    Shapes: keys int64 [R]; the others float32 [N, R].
    """

    keys: Tensor  # keys that the row may see
    entropy: Tensor  # of its softmax, divided by log(keys); 0 where there is one key
    on_sinks: Tensor  # share of its attention that falls on sinks
    gain: Tensor  # change of its output for a unit change of its logits, relative to its values' size
    size: Tensor  # length of its output, relative to its values' size
    logits: Tensor  # standard deviation of its visible logits


class Seen(NamedTuple):
    """One call of a self-attention: its module, input, rotation and mask."""

    attention: Attention
    x: Tensor
    rotation: Rotation
    visible: Tensor | None


@contextmanager
def watched(model: Transformer, name: str = "audio_attn1") -> Iterator[list[Seen]]:
    """Note what an attention, that of the audio to itself, is called with, layer by layer, within `with`."""
    calls: list[Seen] = []

    def note(attention: Attention, args: tuple, kwargs: dict) -> None:
        mask = kwargs["visibility"]
        calls.append(Seen(attention, args[0], kwargs["rotations"][0], None if mask is None else mask.dense))

    layers = [getattr(block, name) for block in model.transformer_blocks]
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def probe(model: Transformer, x: AV[Tensor], sigma: AV[Tensor], text: AV[Tensor], masks: Masks | None = None) -> Rows:
    """Run a forward pass and measure every audio row of every layer.

    Shapes: as `Transformer.forward`; rows and keys count the sinks of `masks` first.
    """
    with watched(model) as calls:
        model(x, sigma, text, masks=masks)
    sinks = masks.sinks if masks else 0
    layers = [_measure(call, sinks) for call in calls]
    means = [torch.stack([numbers.float().mean((0, 1)) for numbers in layer]) for layer in zip(*layers, strict=True)]
    visible = _visible(calls[0], len(calls[0].x[0]))
    return Rows(visible.sum(-1), *means)


def _measure(seen: Seen, sinks: int) -> tuple[Tensor, ...]:
    """Measure one layer. Shapes: entropy, share on sinks, gain, size, spread of the logits, each [B, H, R]."""
    logits, values = logits_values(seen)
    visible = _visible(seen, logits.shape[-1])
    rows = of_softmax(logits, values, visible)
    keys = visible.sum(-1)
    mean = (logits * visible).sum(-1, keepdim=True) / keys[:, None]
    spread = (((logits - mean).square() * visible).sum(-1) / keys).sqrt()
    return rows.entropy, rows.p[..., :sinks].sum(-1), rows.gain, rows.size, spread


def _visible(seen: Seen, tokens: int) -> Tensor:
    every = torch.ones(tokens, tokens, dtype=torch.bool)
    return (every if seen.visible is None else seen.visible).to(seen.x.device)


class Softmax(NamedTuple):
    """One attention by row. Shapes: p [B, H, R, C], the others [B, H, R]."""

    p: Tensor
    entropy: Tensor
    gain: Tensor
    size: Tensor


def of_softmax(logits: Tensor, values: Tensor, visible: Tensor) -> Softmax:
    """Measure rows of attention: how even, how easily moved, how large.

    The derivative of a row's output by logit c is p_c (v_c - out); `gain` is the norm of all of them together, and
    both it and `size` are relative to the root mean square length of the visible values.

    Shapes: logits [B, H, R, C], values [B, H, C, D], visible bool [R, C].
    """
    p = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    keys = visible.sum(-1)
    entropy = -(p * p.clamp_min(1e-30).log()).sum(-1) / keys.clamp_min(2).log()
    out = p @ values
    power = values.square().sum(-1)
    typical = (power @ visible.to(power).T) / keys
    length = out.square().sum(-1)
    away = power[..., None, :] - 2 * out @ values.mT + length[..., None]
    gain = ((p.square() * away).sum(-1) / typical).clamp_min(0).sqrt()
    return Softmax(p, entropy, gain, (length / typical).sqrt())


def logits_values(seen: Seen) -> tuple[Tensor, Tensor]:
    """Recompute logits and values of one call. Shapes: [B, H, R, C] and [B, H, C, D]."""
    attention = seen.attention
    split = rearrange(attention.q_norm(attention.to_q(seen.x)), "b t (h d) -> b h t d", h=attention.heads)
    q = rotate(split, seen.rotation, attention.rope_type)
    k, v = attention.keys_values(seen.x, seen.rotation)
    return q.float() @ k.float().mT / q.shape[-1] ** 0.5, v.float()
