"""Make clips of the world in batches: rendered, encoded, rolled out by a student, sampled by a teacher, or passed on.

Shapes: n clips of whole seconds, F video and T audio latents.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from omniforcing_lib.bounce import world
from omniforcing_lib.bounce.codecs import TinyCodec
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.layout import AV
from omniforcing_lib.rollout import RolloutConfig, join, rollout, seeded_noise
from omniforcing_lib.stream import teacher_clips, to_clips
from omniforcing_lib.transformer import Transformer

Clip = AV[np.ndarray]


class HeldOut(NamedTuple):
    """Clips of the world that training never drew, with their prompts."""

    clips: list[Clip]
    prompts: list[str]


def held_out(count: int, seed: int, seconds: int) -> HeldOut:
    """Render clips of the world's evaluation seeds; another `seed` gives others.

    Shapes: `count` clips AV(uint8 [24K + 1, H, W, 3], float32 [16000K + 160]).
    """
    scenes = [world.scene(world.HELD_OUT + 1_000 * seed + i) for i in range(count)]
    return HeldOut([world.render(scene, seconds=seconds) for scene in scenes], [scene.prompt for scene in scenes])


@torch.no_grad()
def encoded(codec: TinyCodec, clips: Sequence[Clip]) -> AV[Tensor]:
    """Encode clips of one length, on the codec's device.

    Shapes: N clips AV(uint8 [24K + 1, H, W, 3], float32 [16000K + 160]) to AV([N, F, h, w, C], [N, T, C]).
    """
    arrays = AV(*(np.stack(part) for part in zip(*clips, strict=True)))
    device = next(codec.parameters()).device
    video, audio = arrays.map(lambda array: torch.from_numpy(array).to(device))
    return codec.encode(AV(video.float() / 127.5 - 1, audio))


def true_clips(
    prompts: Sequence[str],
    seeds: Sequence[int],
    seconds: int,
    draw: Callable[[int, str], world.Scene] = world.scene,
) -> list[Clip]:
    """Render clips of the world, one per prompt and seed; `draw` makes a scene of them."""
    return [world.render(draw(s, p), seconds=seconds) for s, p in zip(seeds, prompts, strict=True)]


@torch.no_grad()
def roll(
    model: Transformer,
    causal: RolloutConfig,
    codec: TinyCodec,
    prompts: Sequence[str],
    seeds: Sequence[int],
    seconds: int,
    *,
    history: AV[Tensor] | None = None,
    batch: int = 18,
) -> AV[Tensor]:
    """Roll a student out, one clip per prompt and seed; with a `history` each block follows that, not its own past.

    Shapes: history and result AV([n, F, h, w, C], [n, T, C]).
    """
    weight, clips = model.proj_out.weight, []
    starts, frames = range(0, len(seeds), batch), codec.clock.latents(seconds).video
    total = len(starts) * causal.layout.count(frames)
    with tqdm(total=total, desc=f"rolling out {len(seeds)} clips", unit="block", delay=2, leave=False) as bar:
        for start in starts:
            rows = slice(start, start + batch)
            text = TinyText().encode(list(prompts[rows]), weight.device, weight.dtype)
            past = history and history.map(lambda x, rows=rows: x[rows].to(weight))
            noise, blocks = seeded_noise(seeds[rows], weight), []
            for block in rollout(model, causal, text, noise, codec.grid, frames, history=past):
                blocks.append(block)
                bar.update()
            clips.append(join(blocks))
    return AV(*zip(*clips, strict=True)).map(torch.cat)


@torch.no_grad()
def decoded(codec: TinyCodec, latents: AV[Tensor], batch: int = 18) -> list[Clip]:
    """Decode latents to clips. Shapes: AV([n, F, h, w, C], [n, T, C])."""
    pieces = list(zip(*(stream.split(batch) for stream in latents), strict=True))
    bar = tqdm(pieces, desc=f"decoding {len(latents.video)} clips", delay=2, leave=False)
    return [clip for piece in bar for clip in to_clips(codec.decode(AV(*piece)))]


def sample(
    model: Transformer,
    causal: RolloutConfig | None,
    codec: TinyCodec,
    prompts: Sequence[str],
    seeds: Sequence[int],
    seconds: int,
    *,
    steps: int = 40,
    batch: int = 16,
) -> list[Clip]:
    """Make clips by a student, or by a guided teacher in `steps` where `causal` is None; "" is no prompt."""
    if causal is not None:
        return decoded(codec, roll(model, causal, codec, prompts, seeds, seconds, batch=batch), batch)
    clips: list[Clip] = []
    for start in tqdm(range(0, len(seeds), batch), desc="sampling batches", delay=2, leave=False):
        asked = [list(x[start : start + batch]) for x in (prompts, seeds)]
        clips += teacher_clips(model, codec, TinyText(), *asked, seconds, steps=steps)
    return clips


@torch.no_grad()
def round_trip(codec: TinyCodec, clips: Sequence[Clip], batch: int = 16) -> list[Clip]:
    """Encode and decode clips: the best that any model of the codec's latents can look and sound."""
    batches = [clips[start : start + batch] for start in range(0, len(clips), batch)]
    return [clip for piece in batches for clip in to_clips(codec.decode(encoded(codec, piece)))]


def through_file(clips: Sequence[Clip]) -> list[Clip]:
    """Write every clip to an mp4 and read it back."""
    from omniforcing_lib import media  # not above: training, which scores at its end, starts without PyAV

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        return [media.read_clip(media.write_clip(path, clip)) for clip in tqdm(clips, desc="mp4", leave=False)]
