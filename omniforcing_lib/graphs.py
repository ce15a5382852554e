"""CUDA graphs and compiled blocks: take Python out of the way of a training step and of a stream.

A small model keeps a GPU waiting for launches. `Recorded` records a piece of a training step, or a pass of a stream, as
a CUDA graph, and replays it. `Captured` does that for a stream: once the window is full, every pass over a block has
the same shapes, reads the whole ring and writes one place of it. What still changes from block to block (latents,
rotations, the place) is copied into fixed buffers. Where that is not so the model is just called: on a CPU, in the
first pass under a new prompt, and in the first blocks, each of which has shapes of its own and comes once, so that
nothing would be replayed. A pass over two blocks is called, too: it does the work of two passes and saves their
launches, which a recorded stream does not pay.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from omniforcing_lib import backends
from omniforcing_lib.cache import KVCache, OpenBlock
from omniforcing_lib.layout import AV
from omniforcing_lib.rope import Ropes, Rotation
from omniforcing_lib.transformer import Transformer

Piece = Callable[..., dict[str, Tensor]]
"""piece(generator, *key) -> tensors by name."""


class Recordable(Protocol):
    """Something that learns, as `training.train.Learner` does; it tells whether its steps can be CUDA graphs."""

    recordable: bool


def recorded(piece: Piece, *learners: Recordable, live: bool = False) -> Piece:
    """Record a piece of a step where that can be done; `live` pieces ask the host for data."""
    return piece if live or not all(learner.recordable for learner in learners) else Recorded(piece)


class Recorded:
    """Record a piece as CUDA graphs, one for each key, and replay them; on the CPU just call it.

    The piece may use no random numbers but the generator's, and may not ask the GPU for a value. It runs, and is
    recorded, on the generator's device.

    Args:
        piece: what is recorded.
        warm: calls with a key that run as they are before it is recorded.
    """

    def __init__(self, piece: Piece, warm: int = 3) -> None:
        self._piece, self._warm = piece, warm
        self._calls: dict[object, int] = {}
        self._graphs: dict[object, tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]] = {}
        self._own: torch.Generator | None = None
        self._pool: Any = None  # one for all keys: they are replayed in turn, and what they give is copied at once

    def __call__(self, generator: torch.Generator, *key: Hashable) -> dict[str, Tensor]:
        """Run with the generator as it was last seeded."""
        if generator.device.type != "cuda":
            return self._piece(generator, *key)
        with torch.cuda.device(generator.device):
            # a graph stays bound to the generator that it was recorded with
            self._own = self._own or torch.Generator(generator.device)
            generator = self._own.manual_seed(generator.initial_seed())
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= self._warm:
                return self._warm_up(generator, key)
            if key not in self._graphs:
                self._graphs[key] = self._record(generator, key)
            graph, outputs = self._graphs[key]
            graph.replay()
            return {name: value.clone() for name, value in outputs.items()}

    def _warm_up(self, generator: torch.Generator, key: tuple[Hashable, ...]) -> dict[str, Tensor]:
        device = generator.device
        side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            outputs = self._piece(generator, *key)
        current.wait_stream(side)
        return outputs

    def _record(
        self, generator: torch.Generator, key: tuple[Hashable, ...]
    ) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
        graph, seed = torch.cuda.CUDAGraph(), generator.initial_seed()
        graph.register_generator_state(generator)
        # The stream is made for this device: torch's own belongs to the device that was current when it was first made.
        # Another thread, which decodes the block before, may go on allocating and copying.
        stream = torch.cuda.Stream(generator.device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            outputs = self._piece(generator, *key)
        generator.manual_seed(seed)
        return graph, outputs


def compile_blocks(model: Transformer, **options: object) -> Transformer:
    """Compile every block in place by `torch.compile`, with its options.

    All blocks share one piece of code. Under a cache each noise level and each place in the ring is another one, and
    past torch's limit of recompilations they run as they are: compile what trains, and for a stream use `Captured`.
    """
    for block in model.transformer_blocks:
        block.compile(**options)
    return model


class Captured(Transformer):
    """Run a causal student's steady passes as CUDA graphs; the weights are those of `model`, nothing is copied.

    It serves one stream at a time: for another cache the passes are recorded again. Another prompt of the same length
    is written over the one before, where the graphs read it, so they are replayed as they are.
    """

    def __init__(self, model: Transformer) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)
        self._recording: Buffers | None = None
        self._in_graph = False

    def rotations(self, latents: AV[range], grid: tuple[int, int], sinks: int) -> Ropes:
        """Give the rotations of a stretch of latents; within a graph, the buffer that they are copied to."""
        return self._recording.ropes if self._in_graph and self._recording else super().rotations(latents, grid, sinks)

    def forward(
        self,
        x: AV[Tensor],
        sigma: AV,
        text: AV[Tensor],
        *,
        cache: KVCache | None = None,
        blocks: tuple[OpenBlock, ...] = (),
        sigma_key: Hashable | None = None,
        **rest: Any,
    ) -> AV[Tensor]:
        """Predict the velocity as `Transformer.forward` does; a steady pass is recorded once, then replayed."""
        if any(rest.values()) or cache is None or not steady(x, cache, blocks, sigma_key):
            return super().forward(x, sigma, text, cache=cache, blocks=blocks, sigma_key=sigma_key, **rest)
        (block,) = blocks
        # 1. What a graph must not contain is done before: casts, and rotations that are new in each block.
        x = x.map(lambda part: part.to(self.proj_out.weight.dtype))
        cache.rotate_pinned(block)
        ropes = super().rotations(block.latents, (x.video.shape[2], x.video.shape[3]), 0)
        # 2. The first steady pass over a cache makes the buffers.
        if self._recording is None or not self._recording.fit(cache, x, sigma_key):
            self._recording = Buffers(x, ropes, weakref.ref(cache, self._forget), block, Recorded(self._pass, warm=1))
            self._recording.fit(cache, x, sigma_key)
        # 3. What is new in this block is copied in, and the pass is recorded or replayed.
        self._recording.fill(x, ropes, block)
        velocity = self._recording.recorded(self._recording.generator, sigma_key)
        return AV(velocity["video"], velocity["audio"])

    def _pass(self, generator: torch.Generator, sigma_key: Hashable) -> dict[str, Tensor]:
        """Run the pass on the buffers: what a graph records. The cache holds all that follows from sigma and text."""
        buffers, nothing = self._recording, AV[Any](None, None)
        if buffers is None:
            raise RuntimeError("a pass is recorded on buffers, and there are none")
        context = {"cache": buffers.cache(), "blocks": (buffers.block,), "sigma_key": sigma_key}
        self._in_graph = True
        try:
            return super().forward(buffers.x, nothing, nothing, **context)._asdict()
        finally:
            self._in_graph = False

    def _forget(self, cache: weakref.ref[KVCache]) -> None:
        """Free graphs and buffers of a cache that is gone."""
        if self._recording is not None and self._recording.cache is cache:
            self._recording = None


class Buffers:
    """Hold what a recorded pass reads and may change: latents, rotations, the place in the ring that it writes.

    Args:
        x: latents of a first pass.
        ropes: their rotations.
        cache: what the pass reads; it is not kept alive.
        block: the open block of the first pass.
        recorded: the pass.
    """

    def __init__(
        self, x: AV[Tensor], ropes: Ropes, cache: weakref.ref[KVCache], block: OpenBlock, recorded: Recorded
    ) -> None:
        self.cache, self.recorded = cache, recorded
        self.x, self.ropes = x.map(torch.clone), Ropes(*(pair.map(_copy) for pair in ropes))
        self.write = block.places.map(lambda places: places.at.clone())
        self.generator = torch.Generator(x.video.device)
        self._prompts: dict[Hashable, AV[tuple[Tensor, Tensor]]] = {}

    def fit(self, cache: KVCache, x: AV[Tensor], sigma_key: Hashable) -> bool:
        """Tell whether a pass is the recorded one: the same cache and shapes, the prompt in the same memory."""
        held = cache.layers[0].map(lambda layer: layer.text.held[cache.prompt_key(sigma_key)])
        prompts = self._prompts.setdefault(sigma_key, held)
        return (
            cache is self.cache()
            and all(new is old for new, old in zip(held, prompts, strict=True))
            and all(new.shape == old.shape and new.dtype == old.dtype for new, old in zip(x, self.x, strict=True))
        )

    def fill(self, x: AV[Tensor], ropes: Ropes, block: OpenBlock) -> None:
        """Copy in what is new in this block."""
        self.x.map(Tensor.copy_, x)
        for old, new in zip(_tables(self.ropes), _tables(ropes), strict=True):
            old.copy_(new)
        self.write.map(lambda at, places: at.copy_(places.at), block.places)
        self.block = block._replace(places=block.places.map(lambda p, at: p._replace(at=at), self.write))


def steady(x: AV[Tensor], cache: KVCache, blocks: tuple[OpenBlock, ...], sigma_key: Hashable | None) -> bool:
    """Tell whether a pass has the shapes that all later ones have, on a GPU, and computes nothing that can be held."""
    if not backends.on_gpu(x.video.device) or len(blocks) != 1 or not blocks[0].writes or not cache.knows(sigma_key):
        return False
    ring = cache.layers[0].map(lambda layer: range(layer.own.keys.shape[2]))
    return blocks[0].places.map(lambda places: places.whole) == ring


def _copy(by: Rotation) -> Rotation:
    return Rotation(by.cos.clone(), by.sin.clone())


def _tables(ropes: Ropes) -> list[Tensor]:
    return [table for pair in ropes for rotation in pair for table in rotation]
