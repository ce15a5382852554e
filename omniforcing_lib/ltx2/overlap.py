"""Decode a stream through convolutions by overlap and crop: the same outputs as the whole decode, but later.

A chain lists the layers of a decoder along time. It determines which inputs an output needs, hence which outputs are
final once the stream has reached some input, and how much of the past has to be kept. All of it is exact integer
arithmetic. Pointwise layers (norms over channels, activations, residual sums) are left out of a chain.

Shapes: B batch, n inputs, m outputs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Layer(NamedTuple):
    """The receptive field of a layer: output t depends on inputs (t down + first) // up to (t down + last) // up."""

    first: int
    last: int
    up: int = 1
    down: int = 1


Chain = Sequence["Layer | list[Chain]"]
"""Layers from input to output; a list holds chains that run side by side on the same input."""


def convolution(kernel: int, before: int, dilation: int = 1, stride: int = 1) -> Layer:
    """Describe a convolution with `before` padded steps in front."""
    return Layer(-before, (kernel - 1) * dilation - before, 1, stride)


def transposed(kernel: int, stride: int, cropped: int) -> Layer:
    """Describe a transposed convolution whose first `cropped` outputs are cut off."""
    return Layer(cropped - kernel + stride, cropped, stride)


def repeated(times: int, dropped: int) -> Layer:
    """Describe upsampling: each step becomes `times` steps, and the first `dropped` of the stream are left out."""
    return Layer(dropped, dropped, times)


def needs(chain: Chain, outputs: range) -> range:
    """Give the inputs that a stretch of outputs depends on, as if the stream had no ends."""
    start, last = outputs.start, outputs.stop - 1
    for layer in reversed(chain):
        if isinstance(layer, Layer):
            start = (start * layer.down + layer.first) // layer.up
            last = (last * layer.down + layer.last) // layer.up
        else:
            spans = [needs(branch, range(start, last + 1)) for branch in layer]
            start, last = min(s.start for s in spans), max(s.stop for s in spans) - 1
    return range(start, last + 1)


@dataclass
class Tail:
    """Where an overlapped decoding stands.

    Attributes:
        kept: the inputs that later outputs still need, [B, n, ...].
        start: number of the first of them in the stream.
        given: outputs given so far.
        layers: what the decoder's layers carry, see `carried`.
    """

    kept: Tensor | None = None
    start: int = 0
    given: int = 0
    layers: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Overlap:
    """Run a decoder over a stream so that its pieces, concatenated, are the decode of the whole.

    Attributes:
        decode: the decoder, [B, n, ...] to [B, up n - dropped, ...].
        chain: its layers along time.
        up: outputs per input.
        dropped: outputs that the first input lacks (an LTX-2 autoencoder gives 1 of 8, or 1 of 4).
        shape: of one output.
        horizon: inputs that an output waits for at most; None waits for all it depends on, which is exact. With fewer,
            the decoder treats the inputs so far as the whole stream, and an output lacks what later inputs would add.
    """

    decode: Callable[[Tensor], Tensor] = field(repr=False)
    chain: Chain = field(repr=False)
    up: int
    dropped: int = 0
    shape: tuple[int, ...] = ()
    horizon: int | None = None

    @property
    def reach(self) -> tuple[int, int]:
        """Inputs before and after its own that an output depends on at most; the horizon limits both."""
        spans = [self.span(range(t - self.dropped, t - self.dropped + 1)) for t in range(self.up)]
        return max(-span.start for span in spans), max(span.stop - 1 for span in spans)

    @property
    def delay(self) -> int:
        """Outputs by which a stream lags behind its input."""
        seen = sum(self.reach) + 1
        return self.up * seen - self.dropped - self._ready(0, seen)

    def span(self, outputs: range) -> range:
        """Give the inputs that a stretch of outputs waits for, no further away than the horizon."""
        needed = needs(self.chain, outputs)
        if self.horizon is None:
            return needed
        first, last = ((t + self.dropped) // self.up for t in (outputs.start, outputs.stop - 1))
        return range(max(needed.start, first - self.horizon), min(needed.stop, last + self.horizon + 1))

    def step(self, state: Tail, new: Tensor, *, last: bool = False) -> Tensor:
        """Take the next inputs of a stream, or the last ones, and give the outputs that are final.

        Shapes: [B, n, ...] to [B, m, ...]; n and m may be 0.
        """
        kept = new if state.kept is None else torch.cat([state.kept, new], 1)
        seen = state.start + kept.shape[1]
        ready = max(0, self.up * seen - self.dropped) if last else self._ready(state.given, seen)
        if ready == state.given:
            state.kept = kept
            return new.new_zeros(len(new), 0, *self.shape)
        outputs, keep = self._decoded(state, kept, ready)
        state.kept, state.start, state.given = kept[:, keep - state.start :], keep, ready
        return outputs

    def _decoded(self, state: Tail, kept: Tensor, ready: int) -> tuple[Tensor, int]:
        """Give the outputs up to the first `ready`, and the number of the first input that later ones need."""
        # The decoder drops outputs of the first input that it is given: begin one input earlier than needed.
        begin = max(state.start, self.span(range(state.given, ready)).start - 1)
        outputs = self.decode(kept[:, begin - state.start :])
        keep = max(begin, self.span(range(ready, ready + 1)).start - 1)
        return outputs[:, state.given - self.up * begin : ready - self.up * begin], keep

    def _ready(self, given: int, seen: int) -> int:
        """Count the outputs that depend on no input after the first `seen`."""
        outputs = range(given, max(given, self.up * seen - self.dropped))
        return given + bisect_right(outputs, seen, key=lambda t: self.span(range(t, t + 1)).stop)
