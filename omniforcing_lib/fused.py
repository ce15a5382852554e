"""The elementwise work of a block as five functions; on a GPU each is one kernel.

Every function says what is to be computed in plain PyTorch, and is called as it stands on a CPU and wherever gradients
flow. On a GPU `torch.compile` fuses it once for each kind of input. What is fused reads and writes each tensor once,
where one kernel an operation reads and writes all that lies between. Training compiles whole blocks instead
(`graphs.compile_blocks`). A pass of the model chooses once for all its layers (`functions`).

Shapes: B batch, H heads, T tokens, D stream width, N places of a ring, G groups of tokens that share one sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from omniforcing_lib import backends
from omniforcing_lib.rope import Rotation, rotate


def fuses(device: torch.device) -> bool:
    """Tell whether work on a device is fused: on a GPU, without gradients."""
    return backends.on_gpu(device) and not torch.is_grad_enabled()


@lru_cache
def compiled(plain: Callable) -> Callable:
    """Compile a function for each kind of input that it meets, as one kernel."""
    # torch would begin another kernel after 30 operations on a GPU, after 50 on a CPU
    whole: dict[str, Any] = {"realize_opcount_threshold": 1000}
    return backends.many_kinds(torch.compile(plain, dynamic=False, fullgraph=True, options=whole))


def modulate(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Scale and shift groups of tokens: x gain + shift, where gain is 1 + scale.

    Shapes: x [B, T, D], gain and shift [B, G, D] with G a divisor of T.
    """
    if gain.shape[1] == 1:
        return torch.addcmul(shift, x, gain)
    grouped = x.unflatten(1, (gain.shape[1], -1))
    return torch.addcmul(shift[:, :, None], grouped, gain[:, :, None]).flatten(1, 2)


def gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """Add a gated update: x + gate * update, groups as in `modulate`."""
    if gate.shape[1] == 1:
        return torch.addcmul(x, gate, update)
    groups = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, groups), gate[:, :, None], update.unflatten(1, groups)).flatten(1, 2)


Pair = tuple[Tensor, Tensor]
"""Gain and shift of `modulate`."""


def residual(
    x: Tensor, update: Tensor | None, gate: Tensor | None, pairs: Sequence[Pair | None], eps: float
) -> tuple[Tensor, list[Tensor]]:
    """Add a branch to the stream, and give what the next branches read: the norm of it, modulated by each pair.

    Args:
        x: the stream.
        update: what a branch gave; None adds nothing.
        gate: of the update; None adds it whole.
        pairs: gain and shift of each input to give; None gives the norm as it is.
        eps: epsilon of the RMS norm, which has no weight.

    Shapes: x and update [B, T, D] to [B, T, D] and one such for each pair.
    """
    if update is not None:
        x = x + update if gate is None else gated(x, gate, update)
    normed = rms_norm(x, x.shape[-1:], eps=eps) if pairs else x
    return x, [normed if pair is None else modulate(normed, *pair) for pair in pairs]


def normed_heads(
    x: Tensor, weight: Tensor, heads: int, eps: float, rotation: Rotation | None, rope_type: str
) -> Tensor:
    """Norm queries or keys over all heads together, split them into heads, rotate.

    Shapes: x [B, T, H D] to [B, H, T, D].
    """
    split = rms_norm(x, x.shape[-1:], weight, eps).unflatten(-1, (heads, -1)).transpose(1, 2)
    return split if rotation is None else rotate(split, rotation, rope_type)


def stored(
    k: Tensor,
    v: Tensor,
    q: Tensor | None,
    weights: tuple[Tensor, Tensor],
    eps: float,
    rotation: Rotation | None,
    rope_type: str,
    ring: tuple[Tensor, Tensor],
    places: Tensor,
) -> Tensor | None:
    """Norm and rotate keys and write them and the values to their places in a ring; do the same for queries, if given.

    Args:
        k: keys as projected.
        v: values.
        q: queries of the same tokens.
        weights: of the norms of queries and of keys.
        eps: epsilon of both.
        rotation: of these tokens.
        rope_type: see `rope.rotate`.
        ring: keys and values of the ring, which are written.
        places: places in it, one for each token.

    Shapes: k, v and q [B, T, H D], ring [B, H, N, D], places [T] to the queries [B, H, T, D].
    """
    heads = ring[0].shape[1]
    # by token, as they come: then writing needs no kernel of its own
    keys = normed_heads(k, weights[1], heads, eps, rotation, rope_type)
    for store, new in zip(ring, (keys.transpose(1, 2), v.unflatten(-1, (heads, -1))), strict=True):
        store.transpose(1, 2)[:, places] = new
    return None if q is None else normed_heads(q, weights[0], heads, eps, rotation, rope_type)


def rotated_to(x: Tensor, rotation: Rotation, rope_type: str, out: Tensor) -> None:
    """Rotate keys and write them to `out`. Shapes: x and out [B, H, T, D]."""
    out.copy_(rotate(x, rotation, rope_type))


def gated_heads(attended: Tensor, logits: Tensor) -> Tensor:
    """Scale what each head found by twice the sigmoid of its logit, and join the heads (LTX-2.3).

    Shapes: attended [B, H, T, D], logits [B, T, H] to [B, T, H D].
    """
    gate = 2 * torch.sigmoid(logits)
    return (attended.transpose(1, 2) * gate.unsqueeze(-1)).flatten(2)


class Elementwise(NamedTuple):
    """The five functions, as they stand or compiled."""

    residual: Callable
    normed_heads: Callable
    stored: Callable
    rotated_to: Callable
    gated_heads: Callable


PLAIN = Elementwise(residual, normed_heads, stored, rotated_to, gated_heads)


def functions(device: torch.device) -> Elementwise:
    """Give the functions for work on a device: compiled where it is fused (see `fuses`), else as they stand."""
    return Elementwise(*map(compiled, PLAIN)) if fuses(device) else PLAIN
