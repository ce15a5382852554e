"""What the method asks of everything around the transformer: a codec and a text encoder.

`ltx2` and `bounce` each bring both.

Letters: B batch, F video latents, T audio latents, L text tokens, f frames, n samples, c channels, h w token grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from omniforcing_lib.layout import AV, Clock

START = AV(0, 0)


@dataclass
class DecodeState:
    """Where a streamed decoding stands: latents decoded of each stream, last amplitudes of the oscillators."""

    latents: AV[int] = START
    knots: Tensor | None = None

    def shown(self, clock: Clock) -> int:
        """Frames given so far."""
        return clock.frames(range(self.latents.video)).stop

    def tensors(self) -> dict[str, Tensor]:
        """Give all of it as named tensors, to be stored."""
        knots = {} if self.knots is None else {"decoder.knots": self.knots}
        return {"decoder.latents": torch.tensor(self.latents), **knots}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], device: str | torch.device = "cpu") -> DecodeState:
        """Take up a decoding where `tensors` left it."""
        knots = tensors.get("decoder.knots")
        return cls(AV(*tensors["decoder.latents"].tolist()), None if knots is None else knots.to(device))


class Codec(Protocol):
    """Turn latents into frames and samples, whole or as they come; what the transformer's latents mean.

    Attributes:
        grid: tokens of a video latent, (h, w).
        clock: of its frames and samples.
    """

    grid: tuple[int, int]
    clock: Clock

    def decode(self, latents: AV[Tensor], state: Any = None) -> AV[Tensor]:
        """Decode latents whole, or the next ones of a stream when its state is given (see `start`), which moves on.

        A codec that looks ahead gives frames and samples later, and always gives both streams up to the same time.

        Shapes: AV([B, F, h, w, c], [B, T, c]) -> video [B, f, H, W, 3], audio [B, n] or [B, n, 2], both in [-1, 1].
        """
        ...

    def start(self) -> Any:
        """Begin a streamed decoding; the state can be stored (`tensors`) and says what was `shown`."""
        return DecodeState()

    def finish(self, state: Any) -> AV[Tensor] | None:
        """Give what is still owed at the end of a stream; None where each latent is decoded at once."""
        return None


class TextEncoder(Protocol):
    """Turn prompts into the context that both streams attend to; "" is the unconditional prompt."""

    def encode(
        self, prompts: Sequence[str], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> AV[Tensor]:
        """Encode a batch of prompts.

        Shapes: pair [B, L, C], C the model's `caption_channels`.
        """
        ...
