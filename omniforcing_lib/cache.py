"""The rolling KV cache: a ring for each attention of each layer, written in place, read as a slice.

Keys and values of a stream live in [sinks | block 0 | ring of blocks]. Sinks and block 0 are pinned; block k >= 1 goes
to ring place (k - 1) mod (window + 1) and there overwrites the block that has left the window. Attention does not
depend on the order of keys, so nothing is ever moved and a read is one slice (paper Sec. 3.4; spec 6.2, 6.4).

Shapes: B batch, H heads, N places, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from omniforcing_lib.config import ModelConfig
from omniforcing_lib.layout import AV, BlockLayout, Clock
from omniforcing_lib.rope import Ropes, rotate, turns

T = TypeVar("T")
_PARTS = ("keys", "values", "anchor")
ANY_LEVEL = "any"


class Span(NamedTuple):
    """Places of the open block and of the history it sees, in one stream; `all` as one slice if they are neighbours."""

    write: slice
    history: tuple[slice, ...]
    all: slice | None


def _spanned(write: slice, *history: slice) -> Span:
    together = _joined(write, *history)
    return Span(write, _joined(*history), together[0] if len(together) == 1 else None)


def _joined(*spans: slice) -> tuple[slice, ...]:
    """Sort slices and make one of neighbours."""
    joined: list[slice] = []
    for span in sorted(spans, key=lambda s: s.start):
        if joined and joined[-1].stop == span.start:
            span = slice(joined.pop().start, span.stop)
        joined.append(span)
    return tuple(joined)


class Opened(NamedTuple):
    """An open block: rows of its tokens in a call, where its keys go, and the turn that it gives the pinned keys."""

    k: int
    rows: AV[slice]
    span: AV[Span]
    turn: tuple[int, Ropes] | None


class Ring:
    """Keys and values of one stream in one attention.

    Shapes: keys and values [B, H, N, D].
    """

    def __init__(self, shape: tuple[int, ...], cache: KVCache, stream: int, name: str, **kind: object) -> None:
        self.keys, self.values = torch.zeros(shape, **kind), torch.zeros(shape, **kind)
        self.anchor: Tensor | None = None
        self._cache, self._stream, self._name = cache, stream, name
        self._asking = stream if name == "own" else 1 - stream
        self._turned: int | None = None

    def shape(self, part: str) -> tuple[int, ...]:
        """Tell the shape of the keys, the values or the anchor."""
        pinned = self._cache.pinned[self._stream] if part == "anchor" else None
        return tuple(self.keys[:, :, :pinned].shape)

    def forget_anchor(self) -> None:
        """Let the pinned keys be what is written to them next."""
        self.anchor = self._turned = None

    def _turn(self, to: int, by: Ropes) -> None:
        """Rotate the pinned keys so that they look later than they were; the window stays as it is."""
        if self._turned == to:
            return
        pinned = self._cache.pinned[self._stream]
        if self.anchor is None:
            self.anchor = self.keys[:, :, :pinned].clone()
        rotation = getattr(by, self._name)[self._stream]
        self.keys[:, :, :pinned] = rotate(self.anchor, rotation, self._cache.config.rope_type)
        self._turned = to

    def extend(self, project: Callable[[], tuple[Tensor, Tensor]]) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Write the open blocks' keys and values in place; yield, block by block, the rows that ask and all they see.

        A block is written when the one before it has been answered: it may overwrite what that one still saw.
        Where gradients flow nothing is written: the block's own keys carry the gradient, the history is detached
        (paper Sec. 3.3), and the clean pass that follows fills the place.
        """
        new = project()
        for block in self._cache.opened:
            if block.turn is not None:
                self._turn(*block.turn)
            rows, span = block.rows[self._stream], block.span[self._stream]
            pairs = zip((self.keys, self.values), new, strict=True)
            yield block.rows[self._asking], *(self._see(store, x[:, :, rows], span) for store, x in pairs)

    @staticmethod
    def _see(store: Tensor, x: Tensor, span: Span) -> Tensor:
        if torch.is_grad_enabled():
            return torch.cat([*(store[:, :, s].clone() for s in span.history), x], dim=2)
        store[:, :, span.write] = x
        if span.all is not None:
            return store[:, :, span.all]
        return torch.cat([*(store[:, :, s] for s in span.history), x], dim=2)


class PerSigmaCache:
    """What follows from the noise level alone, made once a level; again at every call where gradients flow."""

    def __init__(self) -> None:
        self.held: dict[Hashable, object] = {}

    def get(self, level: Hashable | None, make: Callable[[], T]) -> T:
        """Reuse what is held for levels known on the host, or make and hold it."""
        if level is None or torch.is_grad_enabled():
            return make()
        if level not in self.held:
            self.held[level] = make()
        return self.held[level]


class Prompt(NamedTuple):
    """Keys and values of the prompt, projected once a level, or at every call where no level is known."""

    held: PerSigmaCache
    level: Hashable | None

    def extend(self, project: Callable[[], tuple[Tensor, Tensor]]) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Reuse what is held, or project and hold it; all rows see all of it."""
        yield slice(None), *self.held.get(self.level, project)


class LayerCache(NamedTuple):
    """What one stream caches in one layer: its own keys, the prompt's, its keys for the other stream, modulation."""

    own: Ring
    text: PerSigmaCache
    cross: Ring
    rows: PerSigmaCache

    def prompt(self, level: Hashable | None) -> Prompt:
        """Give the prompt's keys at a level: at the noise level in LTX-2.3, at `ANY_LEVEL` before."""
        return Prompt(self.text, level)


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
    opened: tuple[Opened, ...] = field(default=(), init=False)
    restarted: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"the window is 0 or more past blocks, found {self.window}")
        tokens = self.grid[0] * self.grid[1]
        self._per_latent = AV(tokens, 1)
        self.pinned = AV(self.layout.first.video * tokens, self.layout.sinks + self.layout.first.audio)
        self._step = self.layout.step.map(lambda n, tokens: n * tokens, self._per_latent)
        places = self.pinned.map(lambda pinned, step: pinned + step * (self.window + 1), self._step)
        heads = self.config.num_attention_heads
        dims = AV(self.config.attention_head_dim, self.config.audio_attention_head_dim)
        kind = {"device": self.device, "dtype": self.dtype}

        def slots(stream: int) -> LayerCache:
            shape = (self.batch, heads, places[stream])
            own = Ring((*shape, dims[stream]), self, stream, "own", **kind)
            cross = Ring((*shape, dims.audio), self, stream, "cross", **kind)
            return LayerCache(own, PerSigmaCache(), cross, PerSigmaCache())

        self.levels = PerSigmaCache()
        self._layers = [AV(slots(0), slots(1)) for _ in range(self.config.num_layers)]

    def layer(self, index: int) -> AV[LayerCache]:
        """LayerCache of one layer, for each stream."""
        return self._layers[index]

    def open(self, k: int, block: AV[range] | None = None) -> None:
        """Make block `k` the one that is written; `block` gives its latents where it is partial."""
        block = block or self.layout.block(k)
        self.opened, self.latents = (self._opened(k, block),), block

    def turn(self) -> None:
        """Turn the pinned keys for the open block now, so that a pass over it only writes and reads."""
        for ring in self._rings().values():
            for block in self.opened:
                if block.turn is not None:
                    ring._turn(*block.turn)

    @contextmanager
    def behind(self) -> Iterator[None]:
        """Open the block before the open one too, for a call in which it stands in front and sees nothing of it."""
        after, latents, k = self.opened[0], self.latents, self.opened[0].k - 1
        block = self.layout.block(k)
        edge = self._tokens(k, block)
        before = self._opened(k, block)._replace(rows=edge.map(lambda n: slice(0, n)))
        self.opened = (before, after._replace(rows=edge.map(lambda n: slice(n, None))))
        self.latents = block.map(lambda a, b: range(a.start, b.stop), latents)
        yield
        self.opened, self.latents = (after,), latents

    def restart(self, k: int) -> tuple[int, ...]:
        """Begin anew for block `k`: give the blocks that it sees, to be remembered again, in order.

        They see block 0 and one another, at the distances that they have for block `k`, and nothing older: what a
        clip of just these blocks sees.
        """
        self.restarted = k
        self.forget_text()
        for ring in self._rings().values():
            ring.forget_anchor()
        return (0, *range(max(1, k - self.window), k))

    def _opened(self, k: int, block: AV[range]) -> Opened:
        spans = AV(*(self._span(stream, k, size) for stream, size in enumerate(self._tokens(k, block))))
        return Opened(k, AV(slice(None), slice(None)), spans, self._turn(k))

    def _tokens(self, k: int, block: AV[range]) -> AV[int]:
        """Count the tokens of a block, sinks among them."""
        return self.pinned if k == 0 else block.map(lambda span, per: len(span) * per, self._per_latent)

    def _turn(self, k: int) -> tuple[int, Ropes] | None:
        """Tell by how much the window has moved since it first filled, for block `k` or the one restarted for."""
        at = max(k, self.restarted)
        if not self.reanchor or k == 0 or at <= self.window + 1:
            return None
        if self.opened and (held := self.opened[-1].turn) and held[0] == at:
            return held
        starts = (self.clock.seconds(self.layout.block(i)) for i in (at - self.window, 1))
        moved = AV(*zip(*starts, strict=True)).map(lambda ends: float(ends[0][0] - ends[1][0]))
        return at, turns(self.config, moved, torch.device(self.device))

    def _span(self, stream: int, k: int, size: int) -> Span:
        pinned, step, places = self.pinned[stream], self._step[stream], self.window + 1
        if k == 0:
            return _spanned(slice(0, pinned))
        past = range(max(1, k - self.window, self.restarted - self.window), k)
        starts = [pinned + (i - 1) % places * step for i in (*past, k)]
        history = (slice(start, start + step) for start in starts[:-1])
        return _spanned(slice(starts[-1], starts[-1] + size), slice(0, pinned), *history)

    @property
    def sinks(self) -> int:
        """Audio sink tokens of the layout."""
        return self.layout.sinks

    @property
    def at_start(self) -> bool:
        """Tell whether block 0 is open, so that the sinks run with it."""
        return self.opened[0].k == 0

    def knows_text(self, level: Hashable | None) -> bool:
        """Tell whether the prompt's keys at a noise level are held and may be used."""
        key = level if self.config.modulates_prompt_by_sigma else ANY_LEVEL
        return not torch.is_grad_enabled() and key in self._layers[0].video.text.held

    def forget_text(self) -> None:
        """Drop the prompt's keys: the next call reads the text it is given."""
        for slots in self._layers:
            for slot in slots:
                slot.text.held = {}

    @property
    def nbytes(self) -> int:
        """Bytes held by the rings."""
        return sum(2 * ring.keys.nbytes for ring in self._rings().values())

    def tensors(self) -> dict[str, Tensor]:
        """Name what the rings hold, so that a stream can be stored and go on."""
        parts = {f"{at}.{part}": getattr(ring, part) for at, ring in self._rings().items() for part in _PARTS}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` of an equal cache gave; ValueError, and nothing taken over, where it was another."""
        rings = self._rings()
        for at, ring in rings.items():
            for part in _PARTS[: 3 if f"{at}.anchor" in tensors else 2]:
                stored = tensors.get(f"{at}.{part}")
                expected, found = ring.shape(part), None if stored is None else tuple(stored.shape)
                if expected != found:
                    raise ValueError(
                        f"{part} of {at} are {expected} here, {found} there; use the same model, grid and window"
                    )
        for at, ring in rings.items():
            ring.keys.copy_(tensors[f"{at}.keys"])
            ring.values.copy_(tensors[f"{at}.values"])
            anchor = tensors.get(f"{at}.anchor")
            ring.forget_anchor()
            ring.anchor = None if anchor is None else anchor.to(ring.keys)

    def _rings(self) -> dict[str, Ring]:
        return {
            f"{layer}.{stream}.{name}": getattr(slot, name)
            for layer, slots in enumerate(self._layers)
            for stream, slot in zip(AV._fields, slots, strict=True)
            for name in ("own", "cross")
        }
