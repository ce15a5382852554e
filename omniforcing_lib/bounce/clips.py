"""Clips of the world that training never drew, and their latents: what a question about real clips is asked of.

Shapes: N clips of K seconds, F video and T audio latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from omniforcing_lib.bounce import world
from omniforcing_lib.bounce.codecs import TinyCodec
from omniforcing_lib.layout import AV


class HeldOut(NamedTuple):
    """Clips of the world that training never drew, with their prompts."""

    clips: list[AV[np.ndarray]]
    prompts: list[str]


def held_out(count: int, seed: int, seconds: int) -> HeldOut:
    """Render clips of the world's evaluation seeds; another `seed` gives others.

    Shapes: `count` clips AV(uint8 [24K + 1, H, W, 3], float32 [16000K + 160]).
    """
    scenes = [world.scene(world.HELD_OUT + 1_000 * seed + i) for i in range(count)]
    return HeldOut([world.render(scene, seconds=seconds) for scene in scenes], [scene.prompt for scene in scenes])


@torch.no_grad()
def encoded(codec: TinyCodec, clips: Sequence[AV[np.ndarray]]) -> AV[Tensor]:
    """Encode clips of one length, on the codec's device.

    Shapes: N clips AV(uint8 [24K + 1, H, W, 3], float32 [16000K + 160]) to AV([N, F, h, w, C], [N, T, C]).
    """
    arrays = AV(*(np.stack(part) for part in zip(*clips, strict=True)))
    device = next(codec.parameters()).device
    video, audio = arrays.map(lambda array: torch.from_numpy(array).to(device))
    return codec.encode(AV(video.float() / 127.5 - 1, audio))
