"""The rolling KV cache: a ring for each attention of each layer, written in place, read as a slice.

Keys and values of a stream live in [sinks | block 0 | ring of blocks]. Sinks and block 0 are pinned; block k >= 1 goes
to ring place (k - 1) mod (window + 1) and there overwrites the block that has left the window. Attention does not
depend on the order of keys, so nothing is ever moved and a read is one slice (paper Sec. 3.4; specification 6.2, 6.4).

`KVCache.open` describes a block as an immutable `OpenBlock`. The caller passes it to the model, which passes it to
every attention, which writes and reads through `Ring.extend`. The cache itself does not know which block is open.

Shapes: B batch, H heads, N places, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from omniforcing_lib import backends, masks
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.fused import functions
from omniforcing_lib.layout import AV, BlockLayout, Clock
from omniforcing_lib.rope import Ropes, offset_rotations

T = TypeVar("T")
Project = Callable[[], tuple[Tensor, Tensor]]
"""Projects a call's keys and values, each [B, H, L, D]."""
ANY_SIGMA = "any"
_PARTS = ("keys", "values", "anchor")


class Places(NamedTuple):
    """Places of an open block in the rings of one stream.

    Attributes:
        write: where its keys go.
        history: what it sees besides itself.
        whole: `history` and the block as one range, where they are neighbours.
        at: `write` as indices on a GPU, where a kernel that was compiled or recorded once reads them.
    """

    write: slice
    history: tuple[range, ...]
    whole: range | None
    at: Tensor | None = None


class RotationOffset(NamedTuple):
    """Rotation that makes the pinned keys look later, so that they follow the window; `block` names the amount."""

    block: int
    ropes: Ropes


class OpenBlock(NamedTuple):
    """One block of a pass over the cache.

    Attributes:
        k: number of the block.
        latents: its latents in each stream.
        tokens: its tokens in the call, sinks included.
        places: where its keys go and what it sees.
        offset: how far the pinned keys have to follow the window; None where they keep their own positions.
        writes: whether the pass stores what it computes. A pass with gradients must not: its own keys carry the
            gradient, the history is detached (paper Sec. 3.3), and a later pass stores the block.
    """

    k: int
    latents: AV[range]
    tokens: AV[slice]
    places: AV[Places]
    offset: RotationOffset | None
    writes: bool = True


class Ring:
    """Keys and values of one stream in one attention.

    Args:
        shape: [B, H, N, D] of the keys and of the values.
        stream: 0 if the keys are the video's, 1 if the audio's.
        kind: `own` if the stream's own queries read, `cross` if those of the other stream do.
        pinned: places of sinks and block 0.
        rope_type: see `rope.rotate`.
        options: device and dtype.
    """

    def __init__(
        self, shape: tuple[int, ...], stream: int, kind: str, pinned: int, rope_type: str, **options: Any
    ) -> None:
        self.keys, self.values = torch.zeros(shape, **options), torch.zeros(shape, **options)
        self.anchor: Tensor | None = None  # the pinned keys at their own positions, once they have been rotated
        self._stream, self._kind, self._pinned, self._rope_type = stream, kind, pinned, rope_type
        self._reader = stream if kind == "own" else 1 - stream
        self._rotated_for: int | None = None

    def shape(self, part: str) -> tuple[int, ...]:
        """Give the shape of the keys, the values or the anchor."""
        return tuple(self.keys[:, :, : self._pinned if part == "anchor" else None].shape)

    def forget_anchor(self) -> None:
        """Take the pinned keys, as they are written next, for those at their own positions."""
        self.anchor = self._rotated_for = None

    def rotate_pinned(self, offset: RotationOffset | None) -> None:
        """Rotate the pinned keys, from their own positions, by an offset; the window stays as it is."""
        if offset is None or self._rotated_for == offset.block:
            return
        # They always turn from where they were written: turning twice would add up rounding.
        if self.anchor is None:
            self.anchor = self.keys[:, :, : self._pinned].clone()
        rotation = getattr(offset.ropes, self._kind)[self._stream]
        rotated_to = functions(self.anchor.device).rotated_to
        rotated_to(self.anchor, rotation, self._rope_type, self.keys[:, :, : self._pinned])
        self._rotated_for = offset.block

    def open(self, block: OpenBlock) -> Places:
        """Let the pinned keys follow the window for a block; give its places."""
        self.rotate_pinned(block.offset)
        return block.places[self._stream]

    def read(self, places: Places) -> tuple[Tensor, Tensor]:
        """Give all that a block sees once it is stored, itself included. Shapes: two of [B, H, L, D]."""
        own = range(places.write.start, places.write.stop)
        spans = (*places.history, own) if places.whole is None else (places.whole,)
        return masks.take(self.keys, spans), masks.take(self.values, spans)

    def extend(self, project: Project, blocks: tuple[OpenBlock, ...]) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Store the open blocks' keys and values; yield, block by block, the queries that read and all they see.

        Raises:
            RuntimeError: keys with gradients would be stored; open the block with `writes=False`.
        """
        new = project()
        for block in blocks:
            # 1. The pinned keys follow the window.
            places = self.open(block)
            # 2. The block is written only now, after the block before it was answered: it may overwrite a block
            #    which that one still saw.
            tokens = block.tokens[self._stream]
            stores = zip((self.keys, self.values), new, strict=True)
            keys, values = (_extended(store, x[:, :, tokens], places, block.writes) for store, x in stores)
            # 3. Its queries see all of that.
            yield block.tokens[self._reader], keys, values


def _extended(store: Tensor, x: Tensor, places: Places, writes: bool) -> Tensor:
    """Give what a block sees, itself included. Shapes: store [B, H, N, D], x [B, H, T, D] to [B, H, L, D]."""
    if writes:
        if x.requires_grad:
            raise RuntimeError("a pass with gradients cannot be stored in the cache; open its block with writes=False")
        store[:, :, places.write if places.at is None else places.at] = x
        if places.whole is not None:
            return masks.take(store, (places.whole,))
    # What lies in one piece of the ring is read without a copy; this pass stores nothing, or its past is in two pieces.
    return torch.cat([*(store[:, :, span.start : span.stop] for span in places.history), x], dim=2)


class PerSigmaCache:
    """What follows from noise levels (and the prompt) alone, computed once for each key."""

    def __init__(self) -> None:
        self.held: dict[Hashable, Any] = {}
        self._stale: dict[Hashable, Any] = {}

    def get(self, key: Hashable | None, make: Callable[[], T]) -> T:
        """Give what is held under a key; make and hold it if nothing is. Under None nothing is held."""
        if key is None:
            return make()
        if key not in self.held:
            self.held[key] = _written_over(self._stale.pop(key, None), make())
        return self.held[key]

    def forget(self) -> None:
        """Make everything again at its next use, in the memory that it has now: CUDA graphs go on reading there."""
        self._stale |= self.held
        self.held = {}


def _written_over(old: Any, new: Any) -> Any:
    """Copy a tuple of new tensors to the place of old ones of the same shapes; give the new ones where it cannot be."""
    if old is None:
        return new
    fits = all(
        a.shape == b.shape and a.dtype == b.dtype and (torch.is_inference_mode_enabled() or not a.is_inference())
        for a, b in zip(old, new, strict=True)
    )
    if not fits:
        return new
    # The memory stays where it is, because a recorded CUDA graph reads there.
    for a, b in zip(old, new, strict=True):
        a.copy_(b)
    return old


class Prompt(NamedTuple):
    """The prompt's keys and values in one attention, held under a key or projected at every call."""

    cache: PerSigmaCache
    key: Hashable | None

    def extend(self, project: Project, blocks: tuple[OpenBlock, ...]) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Reuse what is held, or project and hold it; every query of every block sees all of it."""
        yield slice(None), *self.cache.get(self.key, project)


class LayerCache(NamedTuple):
    """What one stream caches in one layer: its own keys, the prompt's, its keys for the other stream, modulation."""

    own: Ring
    text: PerSigmaCache
    cross: Ring
    modulation: PerSigmaCache


@dataclass
class KVCache:
    """Rolling cache of a whole model: open block 0, run the model with it, open block 1, run, ...

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

    Attributes:
        restarted: block for which the cache was last restarted, see `restart`.
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
    restarted: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"the window is 0 or more past blocks, found {self.window}")
        # 1. Places of each stream: sinks and block 0 in front, then a ring of window + 1 blocks.
        tokens = self.grid[0] * self.grid[1]
        self._tokens_per_latent = AV(tokens, 1)
        self.pinned = AV(self.layout.first.video * tokens, self.layout.sinks + self.layout.first.audio)
        self._step = self.layout.step.map(lambda n, tokens: n * tokens, self._tokens_per_latent)
        places = self.pinned.map(lambda pinned, step: pinned + step * (self.window + 1), self._step)
        # 2. One ring for a stream's own queries, one for the other stream's, in every layer.
        dims = AV(self.config.attention_head_dim, self.config.audio_attention_head_dim)
        options = {"rope_type": self.config.rope_type, "device": self.device, "dtype": self.dtype}

        def layer(stream: int) -> LayerCache:
            shape, pinned = (self.batch, self.config.num_attention_heads, places[stream]), self.pinned[stream]
            own = Ring((*shape, dims[stream]), stream, "own", pinned, **options)
            cross = Ring((*shape, dims.audio), stream, "cross", pinned, **options)
            return LayerCache(own, PerSigmaCache(), cross, PerSigmaCache())

        self.timesteps = PerSigmaCache()
        self.layers = [AV(layer(0), layer(1)) for _ in range(self.config.num_layers)]

    def open(self, k: int, latents: AV[range] | None = None, *, writes: bool = True) -> OpenBlock:
        """Describe block `k` for a pass.

        Args:
            k: number of the block; the blocks that it sees must be stored.
            latents: its latents where it is partial.
            writes: see `OpenBlock`.
        """
        latents = latents or self.layout.block(k)
        # 1. Causality is decided by `masks.seen`; a cache that was restarted holds nothing older than it did then.
        at = max(k, self.restarted)
        seen = [i for i in masks.seen(at, self.window) if i < k]
        # 2. Places follow from the numbers of the blocks alone.
        places = AV(0, 1).map(lambda stream, size: self._places(stream, k, seen, size), self._tokens(k, latents))
        # 3. Past the window the pinned keys are rotated by the time that the window has moved.
        offset = self._offset(at) if self.reanchor and k else None
        return OpenBlock(k, latents, AV(slice(None), slice(None)), places, offset, writes)

    def open_pair(self, k: int, latents: AV[range] | None = None) -> tuple[OpenBlock, OpenBlock]:
        """Describe blocks `k - 1` and `k` for one pass: the first stands in front and sees nothing of the second."""
        before, block = self.open(k - 1), self.open(k, latents)
        # The input of the pass holds the tokens of both; each block answers for its own part of them.
        edge = self._tokens(k - 1, before.latents)
        return (
            before._replace(tokens=edge.map(lambda n: slice(0, n))),
            block._replace(tokens=edge.map(lambda n: slice(n, None))),
        )

    def _tokens(self, k: int, latents: AV[range]) -> AV[int]:
        """Count the tokens of a block, sinks among them."""
        return self.pinned if k == 0 else latents.map(lambda span, n: len(span) * n, self._tokens_per_latent)

    def _places(self, stream: int, k: int, seen: list[int], size: int) -> Places:
        pinned, step = self.pinned[stream], self._step[stream]

        # Block i overwrites block i - window - 1, which no later block sees.
        def place(i: int, size: int = step) -> range:
            start = 0 if i == 0 else pinned + (i - 1) % (self.window + 1) * step
            return range(start, start + (pinned if i == 0 else size))

        write, history = place(k, size), masks.merged(map(place, seen))
        whole = masks.merged((write, *history))
        at = torch.arange(write.start, write.stop, device=self.device) if backends.on_gpu(self.device) else None
        return Places(slice(write.start, write.stop), history, whole[0] if len(whole) == 1 else None, at)

    def _offset(self, at: int) -> RotationOffset | None:
        """Give the rotation by the time that the window of a block has moved since it first filled."""
        oldest = masks.seen(at, self.window)[1]
        if oldest == 1:
            return None
        # Block 1 was the oldest of the first full window, so block 0 keeps the distance that it had to block 1.
        starts = (self.clock.seconds(self.layout.block(i)) for i in (oldest, 1))
        moved = AV(*zip(*starts, strict=True)).map(lambda ends: float(ends[0][0] - ends[1][0]))
        return RotationOffset(at, offset_rotations(self.config, moved, torch.device(self.device)))

    def rotate_pinned(self, block: OpenBlock) -> None:
        """Rotate the pinned keys of all rings for a block now, so that a pass over it only writes and reads."""
        for ring in self._rings().values():
            ring.rotate_pinned(block.offset)

    def restart(self, k: int) -> tuple[int, ...]:
        """Prepare to store the past of block `k` again; return the blocks to store, in order.

        They see block 0 and one another, at the distances that they have for block `k`, and nothing older: what a
        clip of just these blocks sees.
        """
        self.restarted = k
        self.forget_text()
        for ring in self._rings().values():
            ring.forget_anchor()
        return masks.seen(k, self.window)[:-1]

    def prompt_key(self, sigma_key: Hashable | None) -> Hashable | None:
        """Give the key of the prompt's keys and values: in LTX-2.3 they depend on sigma, before that they do not."""
        return sigma_key if sigma_key is None or self.config.modulates_prompt_by_sigma else ANY_SIGMA

    def knows_text(self, sigma_key: Hashable | None) -> bool:
        """Tell whether the prompt's keys and values at these noise levels are held."""
        return self.prompt_key(sigma_key) in self.layers[0].video.text.held

    def knows(self, sigma_key: Hashable | None) -> bool:
        """Tell whether all that follows from these noise levels and from the prompt alone is held."""
        return sigma_key in self.timesteps.held and self.knows_text(sigma_key)

    def forget_text(self) -> None:
        """Drop the prompt's keys: the next call reads the text that it is given."""
        for layer in self.layers:
            for stream in layer:
                stream.text.forget()

    @property
    def nbytes(self) -> int:
        """Bytes of the rings."""
        return sum(2 * ring.keys.nbytes for ring in self._rings().values())

    def tensors(self) -> dict[str, Tensor]:
        """Name what the rings hold, so that a stream can be stored and go on."""
        parts = {f"{at}.{part}": getattr(ring, part) for at, ring in self._rings().items() for part in _PARTS}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` of an equal cache gave; ValueError, and nothing taken over, where it was another."""
        rings = self._rings()
        # 1. Check all of it before any of it is taken over.
        for at, ring in rings.items():
            for part in _PARTS[: 3 if f"{at}.anchor" in tensors else 2]:
                stored = tensors.get(f"{at}.{part}")
                expected, stored_shape = ring.shape(part), None if stored is None else tuple(stored.shape)
                if expected != stored_shape:
                    raise ValueError(
                        f"{part} of {at} are {expected} here, {stored_shape} there; use the same model, grid and window"
                    )
        # 2. Copy it into the rings; without an anchor the pinned keys were never rotated.
        for at, ring in rings.items():
            ring.keys.copy_(tensors[f"{at}.keys"])
            ring.values.copy_(tensors[f"{at}.values"])
            anchor = tensors.get(f"{at}.anchor")
            ring.forget_anchor()
            ring.anchor = None if anchor is None else anchor.to(ring.keys)

    def _rings(self) -> dict[str, Ring]:
        return {
            f"{index}.{stream}.{kind}": getattr(cached, kind)
            for index, layer in enumerate(self.layers)
            for stream, cached in zip(AV._fields, layer, strict=True)
            for kind in ("own", "cross")
        }
