"""Prompts to the text context of the transformer: `TinyText` for the world's grammar.

It follows `interfaces.TextEncoder`. The caption projection of the transformer is
what learns, so an encoder holds no weights of ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omniforcing_lib.bounce.world import parse
from omniforcing_lib.layout import AV


@dataclass(frozen=True)
class TinyText:
    """Encode prompts of the world, "a red ball, bell", as fixed codes of +1 and -1, with nothing to train.

    A word's code is read from a hash of the word, so it depends on no library's random stream and on no other
    word: a checkpoint stays valid when a colour is added. A token is its word's code plus its position's.

    Attributes:
        channels: width of the context, a multiple of 8.
        length: tokens of the context, at least 4; the rest is padding.
    """

    channels: int = 64
    length: int = 6

    def __post_init__(self) -> None:
        if self.channels < 8 or self.channels % 8:
            raise ValueError(f"channels must be a positive multiple of 8, found {self.channels}")
        if self.length < 4:
            raise ValueError(f"a prompt has 4 words, so length must be at least 4, found {self.length}")

    def encode(
        self, prompts: Sequence[str], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> AV[Tensor]:
        """Encode prompts of the world; case and spaces don't matter, and "" is the unconditional prompt.

        Raises ValueError, listing the valid words, for a prompt outside the world's grammar.

        Shapes: pair [B, length, channels], unit variance; both streams get the same context.
        """
        context = torch.from_numpy(np.stack([self._context(prompt) for prompt in prompts])).to(device, dtype)
        return AV(context, context)

    def _context(self, prompt: str) -> np.ndarray:
        words = ()
        if prompt.strip():
            colour, timbre = parse(prompt)
            words = ("a", colour, "ball", timbre)
        padded = words + ("",) * (self.length - len(words))
        tokens = [self._code(f"word {word}") + self._code(f"position {i}") for i, word in enumerate(padded)]
        return np.stack(tokens) / np.sqrt(2)

    def _code(self, name: str) -> np.ndarray:
        digest = np.frombuffer(hashlib.shake_256(name.encode()).digest(self.channels // 8), np.uint8)
        return 2.0 * np.unpackbits(digest) - 1
