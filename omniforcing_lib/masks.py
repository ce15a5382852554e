"""Who sees whom: one predicate on blocks, rendered as dense masks, FlexAttention masks and slices.

A query in block q sees a key in block k if `visible(q, k)`. Tokens of a block are contiguous and audio sinks are the
head of block 0, so the rows of a block are one range and see one or two ranges of columns. The dense, flex and sliced
renderings all derive from these ranges (paper Sec. 3.1 and 3.2; specification 3.4), and the cache asks `seen` for its
window.

Shapes: R rows (queries), C columns (keys), Tv = F h w video tokens, Ta = S + T audio tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from omniforcing_lib.layout import BlockLayout


def visible(query_block: int, key_block: int, window: int | None = None) -> bool:
    """Tell whether a query may see a key: never the future; with a window, block 0 and the last `window` blocks.

    This is the only place where causality is decided.
    """
    if key_block > query_block:
        return False
    return window is None or key_block == 0 or key_block >= query_block - window


def seen(query_block: int, window: int | None = None) -> tuple[int, ...]:
    """List the blocks that a query sees, in order and up to its own; costs no more than the window is long."""
    recent = takewhile(lambda k: visible(query_block, k, window), range(query_block, 0, -1))
    return (0, *reversed([*recent]))


class BlockRows(NamedTuple):
    """Rows of one block and the ranges of columns that they see, in order."""

    rows: range
    columns: tuple[range, ...]


@dataclass(frozen=True)
class AttentionMask:
    """One attention mask.

    Attributes:
        by_block: rows of each block, which together are all rows, with what they see.
        columns: number of columns.
        rendering: how attention uses it: `sliced` (one call for each block), `dense` or `flex`; None leaves it to the
            backend.
    """

    by_block: tuple[BlockRows, ...]
    columns: int
    rendering: str | None = None

    def __post_init__(self) -> None:
        if self.rendering not in (None, *RENDERINGS):
            raise ValueError(f"a mask is rendered as one of {', '.join(RENDERINGS)}; found {self.rendering!r}")

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.by_block[-1].rows.stop

    @cached_property
    def dense(self) -> Tensor:
        """Render as a bool tensor.

        Shapes: [R, C], true where the row may attend.
        """
        mask = torch.zeros(self.rows, self.columns, dtype=torch.bool)
        for rows, columns in self.by_block:
            for span in columns:
                mask[rows.start : rows.stop, span.start : span.stop] = True
        return mask

    @cached_property
    def block_masks(self) -> dict[str, object]:
        """Hold what `block_mask` rendered, by device."""
        return {}

    def mask_mod(self, device: str | torch.device = "cpu"):
        """Render as FlexAttention's predicate of (batch, head, row, column)."""
        # a window leaves two ranges at most: what is pinned, and what is recent
        pairs = [(*columns, range(0), range(0))[:2] for _, columns in self.by_block]
        bounds = torch.tensor(
            [[first.start, first.stop, last.start, last.stop] for first, last in pairs], device=device
        )
        lengths = torch.tensor([len(rows) for rows, _ in self.by_block], device=device)
        a, b, c, d = bounds.repeat_interleave(lengths, dim=0).unbind(1)

        def mask_mod(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            pinned = (column >= a[row]) & (column < b[row])
            recent = (column >= c[row]) & (column < d[row])
            return pinned | recent

        return mask_mod


def _block_mask(mask: AttentionMask, device: str | torch.device = "cpu") -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    if str(device) not in mask.block_masks:
        rendered = create_block_mask(mask.mask_mod(device), None, None, mask.rows, mask.columns, device)
        mask.block_masks[str(device)] = rendered
    return mask.block_masks[str(device)]


# As torch.compiler.disable, which would import torch's compiler here and not at the first call.
block_mask: Callable[..., object] = _disable_dynamo(_block_mask)
"""Render a mask as a FlexAttention `BlockMask` for a device, made once for each."""


RENDERINGS = ("sliced", "dense", "flex")


class Masks(NamedTuple):
    """The four masks of a clip, named rows from columns, and the sinks in front of the audio."""

    video_self: AttentionMask
    audio_self: AttentionMask
    a2v: AttentionMask
    v2a: AttentionMask
    sinks: int


@lru_cache(maxsize=64)
def build(
    layout: BlockLayout,
    video_latents: int,
    tokens_per_frame: int,
    *,
    window: int | None = None,
    rendering: str | None = None,
) -> Masks:
    """Build the four block-causal masks of a clip (paper Sec. 3.1; specification 3.4).

    `a2v` has video rows and audio columns, `v2a` audio rows and video columns. With a window a row sees block 0, its
    own block and the `window` blocks before it: what a rolling cache holds.
    """
    # tokens of each block of each stream, the sinks in audio block 0
    video, audio = layout.tokens(video_latents, tokens_per_frame)

    def mask(rows: tuple[range, ...], columns: tuple[range, ...]) -> AttentionMask:
        by_block = tuple(
            BlockRows(span, merged(c for k, c in enumerate(columns) if visible(q, k, window)))
            for q, span in enumerate(rows)
        )
        return AttentionMask(by_block, columns[-1].stop, rendering)

    return Masks(mask(video, video), mask(audio, audio), mask(video, audio), mask(audio, video), layout.sinks)


def dense(layout: BlockLayout, video_latents: int, tokens_per_frame: int) -> dict[str, Tensor]:
    """Give the four masks as bool tensors by name, for pictures and checks."""
    masks = build(layout, video_latents, tokens_per_frame)
    return {name: getattr(masks, name).dense for name in ("video_self", "audio_self", "a2v", "v2a")}


def merged(spans: Iterable[range]) -> tuple[range, ...]:
    """Sort ranges and make one of neighbours; empty ones are left out."""
    out: list[range] = []
    for span in sorted(filter(len, spans), key=lambda span: span.start):
        if out and out[-1].stop == span.start:
            span = range(out.pop().start, span.stop)
        out.append(span)
    return tuple(out)


def take(x: Tensor, spans: Sequence[range]) -> Tensor:
    """Read ranges of keys or values; a single one is a view. Shapes: [B, H, L, D] to [B, H, sum of lengths, D]."""
    parts = [x[:, :, span.start : span.stop] for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
