"""What the stages train on: clips as latents, and the teacher's trajectories (ODE pairs). Plain safetensors.

Shapes: N clips, K kept noise levels, F video and T audio latents, L text tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from omniforcing_lib import world
from omniforcing_lib.codecs import TinyCodec
from omniforcing_lib.files import write_tensors
from omniforcing_lib.flow import (
    Guidance,
    block_noise,
    guided_denoiser,
    ltx2_sigmas,
    snap_indices,
    trajectory,
)
from omniforcing_lib.layout import AV
from omniforcing_lib.text import TextEncoder
from omniforcing_lib.transformer import Transformer


@dataclass(frozen=True)
class Prompts:
    """Hold the text context of a list of prompts; the last row is the unconditional prompt.

    Shapes: context AV [P + 1, L, C].
    """

    names: tuple[str, ...]
    context: AV[Tensor]

    @classmethod
    def of(cls, text: TextEncoder, names: Sequence[str], device: str | torch.device = "cpu") -> Prompts:
        """Encode prompts once."""
        return cls(tuple(names), text.encode([*names, ""], device))

    @property
    def negative(self) -> AV[Tensor]:
        """Context of the unconditional prompt. Shapes: AV [1, L, C]."""
        return self.context.map(lambda c: c[-1:])

    def take(self, index: Tensor) -> AV[Tensor]:
        """Give the contexts of prompt numbers; -1 is the unconditional prompt. Shapes: [B] to AV [B, L, C]."""
        return self.context.map(lambda c: c[index])


@dataclass(frozen=True)
class Clips:
    """Hold clips as latents with the number of their prompt.

    Shapes: latents AV([N, F, h, w, C], [N, T, C]), prompt [N].
    """

    latents: AV[Tensor]
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True)
class Pairs:
    """Hold teacher trajectories at the student's noise levels, noise first, clean last (spec 5.4).

    Shapes: states AV([N, K, F, h, w, C], [N, K, T, C]), sigmas [K], prompt [N].
    """

    states: AV[Tensor]
    sigmas: Tensor
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.prompt)

    def save(self, path: str | Path, names: Sequence[str]) -> Path:
        """Write as safetensors, atomically; states in bf16."""
        tensors = {"video": self.states.video, "audio": self.states.audio}
        tensors = {k: v.to("cpu", torch.bfloat16).contiguous() for k, v in tensors.items()}
        tensors |= {"sigmas": self.sigmas.cpu(), "prompt": self.prompt.cpu()}
        return write_tensors(path, tensors, {"prompts": json.dumps(list(names))})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Pairs:
        """Read what `save` wrote."""
        with safe_open(path, "pt") as file:
            video, audio, sigmas, prompt = (
                file.get_tensor(n).to(device) for n in ("video", "audio", "sigmas", "prompt")
            )
        return cls(AV(video.float(), audio.float()), sigmas, prompt)


@torch.no_grad()
def world_clips(
    codec: TinyCodec,
    seeds: Sequence[int],
    seconds: int,
    *,
    device: str | torch.device = "cpu",
    batch: int = 64,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> Clips:
    """Render and encode clips of the world; prompts are numbered as in `world.prompts()`."""
    codec, names = codec.to(device), world.prompts()
    latents, numbers = [], []
    for start in tqdm(range(0, len(seeds), batch), desc="rendering clips", disable=not progress, leave=False):
        scenes = [world.scene(seed) for seed in seeds[start : start + batch]]
        encoded = codec.encode(world.render_batch(scenes, seconds, device))
        latents.append(encoded.map(lambda x: x.to(dtype)))
        numbers += [names.index(f"a {s.colour} ball, {s.timbre}") for s in scenes]
    return Clips(AV(*map(torch.cat, zip(*latents, strict=True))), torch.tensor(numbers, device=device))


@torch.no_grad()
def ode_pairs(
    teacher: Transformer,
    prompts: Prompts,
    guidance: Guidance,
    step_list: Sequence[int],
    seeds: Sequence[int],
    latents: AV[int],
    grid: tuple[int, int],
    *,
    steps: int = 40,
    batch: int = 16,
    progress: bool = True,
) -> Pairs:
    """Run the guided teacher and keep its states at the student's noise levels (spec 5.4).

    Prompt of clip i is i modulo the number of prompts; its noise comes from its seed alone.
    """
    device = teacher.proj_out.weight.device
    sigmas, keep = ltx2_sigmas(steps), snap_indices(step_list, steps)
    shapes = latent_shapes(teacher, latents, grid)
    index = torch.arange(len(seeds), device=device) % len(prompts.names)
    kept = []
    for start in tqdm(range(0, len(seeds), batch), desc="teacher trajectories", disable=not progress, leave=False):
        noise = block_noise(seeds[start : start + batch], 0, shapes).map(lambda x: x.to(device))
        text = prompts.take(index[start : start + batch])
        denoise = guided_denoiser(teacher, text, prompts.negative, guidance)
        kept.append(trajectory(denoise, noise, sigmas.to(device), keep))
    return Pairs(AV(*map(torch.cat, zip(*kept, strict=True))), sigmas[list(keep)].float(), index)


def latent_shapes(model: Transformer, latents: AV[int], grid: tuple[int, int]) -> AV[tuple[int, ...]]:
    """Give the shapes of a clip's latents without the batch: ([F, h, w, C], [T, C])."""
    return AV((latents.video, *grid, model.config.in_channels), (latents.audio, model.config.audio_in_channels))
