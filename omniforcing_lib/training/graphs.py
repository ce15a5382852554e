"""A piece of a training step as CUDA graphs: recorded once a key, then replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from omniforcing_lib.training.train import Learner, Metrics


def recorded(piece: Callable[..., Metrics], *players: Learner, live: bool = False) -> Callable[..., Metrics]:
    """Record a piece of a step where that can be done; `live` pieces ask the host for data."""
    return piece if live or not all(player.recordable for player in players) else Recorded(piece)


class Recorded:
    """Record a piece of a step as CUDA graphs, one a key, and replay them; on the CPU just call it.

    A small model keeps a GPU waiting for launches: replayed, the miniature trains several times faster. The piece may
    use no random numbers but the generator's, and may not ask the GPU for a value.
    """

    def __init__(self, piece: Callable[..., Metrics], warm: int = 3) -> None:
        self._piece, self._warm = piece, warm
        self._calls: dict[object, int] = {}
        self._graphs: dict[object, tuple[torch.cuda.CUDAGraph, Metrics]] = {}
        self._own: torch.Generator | None = None

    def __call__(self, generator: torch.Generator, *key: int) -> Metrics:
        """Run with the generator as it was last seeded."""
        if generator.device.type != "cuda":
            return self._piece(generator, *key)
        # a graph stays bound to the generator that it was recorded with
        self._own = self._own or torch.Generator(generator.device)
        generator = self._own.manual_seed(generator.initial_seed())
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] <= self._warm:
            return self._warm_up(generator, key)
        if key not in self._graphs:
            self._graphs[key] = self._record(generator, key)
        graph, numbers = self._graphs[key]
        graph.replay()
        return {name: value.clone() for name, value in numbers.items()}

    def _warm_up(self, generator: torch.Generator, key: tuple[int, ...]) -> Metrics:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            numbers = self._piece(generator, *key)
        torch.cuda.current_stream().wait_stream(side)
        return numbers

    def _record(self, generator: torch.Generator, key: tuple[int, ...]) -> tuple[torch.cuda.CUDAGraph, Metrics]:
        graph, seed = torch.cuda.CUDAGraph(), generator.initial_seed()
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            numbers = self._piece(generator, *key)
        generator.manual_seed(seed)
        return graph, numbers
