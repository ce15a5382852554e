"""The rolling KV cache: a ring for each attention of each layer, written in place, read as a slice.

Keys and values of a stream live in [sinks | block 0 | ring of blocks]. Sinks and block 0 are pinned; block k >= 1 goes
to ring place (k - 1) mod (window + 1) and there overwrites the block that has left the window. Attention does not
depend on the order of keys, so nothing is ever moved and a read is one slice (paper Sec. 3.4; spec 6.2, 6.4).

Shapes: B batch, H heads, N places, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from omniforcing_lib.config import ModelConfig
from omniforcing_lib.layout import AV, BlockLayout, Clock
from omniforcing_lib.rope import Rotation, rotate, turns

T = TypeVar("T")
_PARTS = ("keys", "values", "anchor")


class Span(NamedTuple):
    """Places of the open block and of the history it sees, in one stream; `all` as one slice if they are neighbours."""

    write: slice
    history: tuple[slice, ...]
    all: slice | None


def _spanned(write: slice, *history: slice) -> Span:
    kept = tuple(s for s in history if s.start < s.stop)
    pieces = sorted([*kept, write], key=lambda s: s.start)
    joined = all(a.stop == b.start for a, b in pairwise(pieces))
    return Span(write, kept, slice(pieces[0].start, pieces[-1].stop) if joined else None)


class Ring:
    """Keys and values of one stream in one attention.

    Shapes: keys and values [B, H, N, D].
    """

    def __init__(self, shape: tuple[int, ...], cache: KVCache, stream: int, **kind: object) -> None:
        self.keys, self.values = torch.zeros(shape, **kind), torch.zeros(shape, **kind)
        self.anchor: Tensor | None = None
        self._cache, self._stream = cache, stream

    def turn_anchor(self, by: Rotation, pinned: int, rope_type: str) -> None:
        """Rotate the pinned keys so that they look later than they were; the window stays as it is."""
        if self.anchor is None:
            self.anchor = self.keys[:, :, :pinned].clone()
        self.keys[:, :, :pinned] = rotate(self.anchor, by, rope_type)

    def extend(self, project: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Write the open block's keys and values in place; return all that it sees.

        Where gradients flow nothing is written: the block's own keys carry the gradient, the history is detached
        (paper Sec. 3.3), and the clean pass that follows fills the place.
        """
        span = self._cache.span[self._stream]
        new = project()
        if torch.is_grad_enabled():
            stores = (self.keys, self.values)
            return tuple(
                torch.cat([*(store[:, :, s].clone() for s in span.history), x], dim=2)
                for store, x in zip(stores, new, strict=True)
            )
        return tuple(self._place(store, x, span) for store, x in zip((self.keys, self.values), new, strict=True))

    @staticmethod
    def _place(store: Tensor, x: Tensor, span: Span) -> Tensor:
        store[:, :, span.write] = x
        if span.all is not None:
            return store[:, :, span.all]
        return torch.cat([*(store[:, :, s] for s in span.history), x], dim=2)


class TextSlot:
    """Keys and values of the prompt, projected once; again at every call where gradients flow."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None

    def extend(self, project: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Reuse what is held, or project and hold it."""
        if torch.is_grad_enabled():
            return project()
        if self.held is None:
            self.held = project()
        return self.held


class Memo:
    """What follows from the noise level alone, made once a level; again at every call where gradients flow."""

    def __init__(self) -> None:
        self.held: dict[float, object] = {}

    def get(self, level: float | None, make: Callable[[], T]) -> T:
        """Reuse what is held for a level known on the host, or make and hold it."""
        if level is None or torch.is_grad_enabled():
            return make()
        if level not in self.held:
            self.held[level] = make()
        return self.held[level]


class Slots(NamedTuple):
    """What one stream caches in one layer: its own keys, the prompt's, its keys for the other stream, modulation."""

    own: Ring
    text: TextSlot
    cross: Ring
    rows: Memo


@dataclass
class KVCache:
    """Rolling cache of a whole model: open block 0, run, open block 1, run, ...

    Args:
        config: the model's.
        layout: blocks and sinks.
        grid: tokens of a video frame (h, w).
        batch: B.
        window: past blocks kept besides block 0; a clip of at most window + 2 blocks is not windowed.
        reanchor: past the window, sinks and block 0 follow it at the distance that they had when it first filled, so
            that no query ever sees a distance that a short clip does not have; False keeps absolute positions.
        clock: seconds of the blocks.
        device: where the rings live.
        dtype: of keys and values.
    """

    config: ModelConfig
    layout: BlockLayout
    grid: tuple[int, int]
    batch: int = 1
    window: int = 20
    reanchor: bool = False
    clock: Clock = field(default_factory=Clock)
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32
    latents: AV[range] | None = field(default=None, init=False)
    span: AV[Span] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"the window is 0 or more past blocks, found {self.window}")
        tokens = self.grid[0] * self.grid[1]
        self._per_latent = AV(tokens, 1)
        self._pinned = AV(self.layout.first.video * tokens, self.layout.sinks + self.layout.first.audio)
        self._step = self.layout.step.map(lambda n, tokens: n * tokens, self._per_latent)
        places = self._pinned.map(lambda pinned, step: pinned + step * (self.window + 1), self._step)
        heads = self.config.num_attention_heads
        dims = AV(self.config.attention_head_dim, self.config.audio_attention_head_dim)
        kind = {"device": self.device, "dtype": self.dtype}

        def slots(stream: int) -> Slots:
            shape = (self.batch, heads, places[stream])
            own = Ring((*shape, dims[stream]), self, stream, **kind)
            cross = Ring((*shape, dims.audio), self, stream, **kind)
            return Slots(own, TextSlot(), cross, Memo())

        self.levels = Memo()
        self._layers = [AV(slots(0), slots(1)) for _ in range(self.config.num_layers)]

    def layer(self, index: int) -> AV[Slots]:
        """Slots of one layer, for each stream."""
        return self._layers[index]

    def open(self, k: int, block: AV[range] | None = None) -> None:
        """Make block `k` the one that is written; `block` gives its latents where it is partial."""
        block = block or self.layout.block(k)
        self.latents, self._k = block, k
        sizes = block.map(lambda span, tokens: len(span) * tokens, self._per_latent)
        self.span = AV(*(self._span(stream, k, sizes[stream]) for stream in (0, 1)))
        if self.reanchor and k > self.window + 1:
            self._follow(k)

    def _follow(self, k: int) -> None:
        """Turn the pinned keys by the time that the window has moved since it first filled."""
        starts = (self.clock.seconds(self.layout.block(i)) for i in (k - self.window, 1))
        moved = AV(*zip(*starts, strict=True)).map(lambda ends: float(ends[0][0] - ends[1][0]))
        by = turns(self.config, moved, torch.device(self.device))
        for slots in self._layers:
            for slot, own, cross, pinned in zip(slots, by.own, by.cross, self._pinned, strict=True):
                slot.own.turn_anchor(own, pinned, self.config.rope_type)
                slot.cross.turn_anchor(cross, pinned, self.config.rope_type)

    def _span(self, stream: int, k: int, size: int) -> Span:
        pinned, step = self._pinned[stream], self._step[stream]
        if k == 0:
            return _spanned(slice(0, pinned))
        start = pinned + (k - 1) % (self.window + 1) * step
        stop = pinned + min(k, self.window + 1) * step
        return _spanned(slice(start, start + size), slice(0, start), slice(start + step, stop))

    @property
    def sinks(self) -> int:
        """Audio sink tokens of the layout."""
        return self.layout.sinks

    @property
    def at_start(self) -> bool:
        """Tell whether block 0 is open, so that the sinks run with it."""
        return self._k == 0

    @property
    def knows_text(self) -> bool:
        """Tell whether the prompt's keys are held and may be used."""
        if torch.is_grad_enabled() or self.config.modulates_prompt_by_sigma:
            return False
        return self._layers[0].video.text.held is not None

    def forget_text(self) -> None:
        """Drop the prompt's keys: the next call reads the text it is given."""
        for slots in self._layers:
            for slot in slots:
                slot.text.held = None

    @property
    def nbytes(self) -> int:
        """Bytes held by the rings."""
        return sum(2 * ring.keys.nbytes for ring in self._rings().values())

    def tensors(self) -> dict[str, Tensor]:
        """Name what the rings hold, so that a stream can be stored and go on."""
        parts = {f"{at}.{part}": getattr(ring, part) for at, ring in self._rings().items() for part in _PARTS}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` of an equal cache gave; ValueError where it was another."""
        for at, ring in self._rings().items():
            stored = tensors.get(f"{at}.keys")
            expected, found = tuple(ring.keys.shape), None if stored is None else tuple(stored.shape)
            if expected != found:
                raise ValueError(
                    f"keys of {at} are {expected} here, {found} there; use the same model, grid and window"
                )
            ring.keys.copy_(tensors[f"{at}.keys"])
            ring.values.copy_(tensors[f"{at}.values"])
            anchor = tensors.get(f"{at}.anchor")
            ring.anchor = None if anchor is None else anchor.to(ring.keys)

    def _rings(self) -> dict[str, Ring]:
        return {
            f"{layer}.{stream}.{name}": getattr(slot, name)
            for layer, slots in enumerate(self._layers)
            for stream, slot in zip(AV._fields, slots, strict=True)
            for name in ("own", "cross")
        }
