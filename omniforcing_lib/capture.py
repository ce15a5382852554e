"""Take Python out of a stream's way: compiled blocks, and the steady pass replayed as one CUDA graph a noise level.

Once the window is full every pass over a block has the same shapes, reads the whole ring and writes one place of it.
What still changes from block to block (latents, rotations, the place) is copied into fixed buffers; all else a graph
may hold. Where that is not so (the first blocks, a new prompt, a CPU) the model is just called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from omniforcing_lib.cache import KVCache, Span
from omniforcing_lib.layout import AV
from omniforcing_lib.rope import Ropes, Rotation
from omniforcing_lib.training.graphs import Recorded
from omniforcing_lib.training.train import Metrics
from omniforcing_lib.transformer import Transformer


def compile_blocks(model: Transformer, **how: object) -> Transformer:
    """Compile every block in place by `torch.compile`; `how` is its options.

    All blocks share one piece of code. Under a cache each noise level and each place in the ring is another one, and
    past torch's limit of recompilations they run as they are: compile what trains, and for a stream use `Captured`.
    """
    for block in model.transformer_blocks:
        block.compile(**how)
    return model


class Captured(Transformer):
    """Run a causal student's steady passes as CUDA graphs; the weights are those of `model`, nothing is copied.

    It serves one stream at a time: another cache, or another prompt, is recorded anew.
    """

    def __init__(self, model: Transformer) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)
        self._held: Buffers | None = None
        self._replaying = False

    def rotations(self, latents: AV[range], grid: tuple[int, int], sinks: int) -> Ropes:
        """Give the rotations of a stretch of latents; within a graph, the buffer that they are copied to."""
        return self._held.ropes if self._replaying else super().rotations(latents, grid, sinks)

    def forward(self, x: AV[Tensor], sigma: AV, text: AV[Tensor], *, cache: KVCache | None = None, **how) -> AV[Tensor]:
        """Predict the velocity as `Transformer.forward` does; a steady pass is recorded once, then replayed."""
        if cache is None or any(how.values()) or not steady(x, sigma, cache):
            return super().forward(x, sigma, text, cache=cache, **how)
        cache.turn()
        ropes = super().rotations(cache.latents, tuple(x.video.shape[2:4]), 0)
        if self._held is None or not self._held.fit(cache, x):
            self._held = Buffers(x, ropes, cache, partial(self._pass, text))
        self._held.fill(x, ropes, cache)
        made = self._held.recorded(self._held.generator, sigma.video)
        return AV(made["video"], made["audio"])

    def _pass(self, text: AV[Tensor], generator: torch.Generator, level: float) -> Metrics:
        """Run the pass on the buffers: what a graph records."""
        self._replaying = True
        try:
            with self._held.open():
                return super().forward(self._held.x, AV(level, level), text, cache=self._held.cache)._asdict()
        finally:
            self._replaying = False


class Buffers:
    """Hold what a recorded pass reads and may change: latents, rotations, the place in the ring that it writes."""

    def __init__(self, x: AV[Tensor], ropes: Ropes, cache: KVCache, piece: Callable[..., Metrics]) -> None:
        self.cache, self.text = cache, _prompt(cache)
        self.x, self.ropes = x.map(torch.clone), Ropes(*(pair.map(_copy) for pair in ropes))
        device, span = x.video.device, cache.opened[0].span
        self.at = span.map(lambda span: torch.arange(span.write.start, span.write.stop, device=device))
        self.generator, self.recorded = torch.Generator(device), Recorded(piece, warm=1)

    def fit(self, cache: KVCache, x: AV[Tensor]) -> bool:
        """Tell whether a pass is the recorded one: the same cache, prompt and shapes."""
        same = cache is self.cache and _prompt(cache) is self.text
        return same and x.map(lambda new, old: new.shape == old.shape and new.dtype == old.dtype, self.x) == (
            True,
            True,
        )

    def fill(self, x: AV[Tensor], ropes: Ropes, cache: KVCache) -> None:
        """Copy in what is new in this block."""
        self.x.map(Tensor.copy_, x)
        for old, new in zip(_tables(self.ropes), _tables(ropes), strict=True):
            old.copy_(new)
        starts = cache.opened[0].span.map(lambda span: span.write.start)
        self.at.map(lambda at, start: torch.arange(start, start + len(at), out=at), starts)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Open the block at a place that a tensor says, in place of one that Python knows."""
        (before,) = self.cache.opened
        span = before.span.map(lambda span, at: Span(at, span.history, span.all), self.at)
        self.cache.opened = (before._replace(span=span),)
        yield
        self.cache.opened = (before,)


def steady(x: AV[Tensor], sigma: AV, cache: KVCache) -> bool:
    """Tell whether a pass has the shapes that all later ones have, on a GPU, and its prompt is known."""
    if not on_gpu(x) or torch.is_grad_enabled() or not isinstance(sigma.video, float) or len(cache.opened) != 1:
        return False
    slots = cache.layer(0)
    whole = AV(*(slice(0, slot.own.keys.shape[2]) for slot in slots))
    return cache.knows_text(sigma) and cache.opened[0].span.map(lambda span: span.all) == whole


def on_gpu(x: AV[Tensor]) -> bool:
    """Tell whether latents are where graphs can be recorded."""
    return x.video.is_cuda


def _prompt(cache: KVCache) -> object:
    return cache.layer(0).video.text.held


def _copy(by: Rotation) -> Rotation:
    return Rotation(by.cos.clone(), by.sin.clone())


def _tables(ropes: Ropes) -> list[Tensor]:
    return [table for pair in ropes for rotation in pair for table in rotation]
