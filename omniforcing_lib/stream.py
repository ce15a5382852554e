"""Stream a student: blocks become frames and samples as they come, for as long as anyone watches (paper Sec. 3.4).

The `Streamer` is the only stateful object a user meets. Its noise comes from (seed, block), so the same seed gives the
same stream, whole or cut.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from omniforcing_lib import checkpoints
from omniforcing_lib.codecs import Codec, TinyCodec, load_codec
from omniforcing_lib.files import write_tensors
from omniforcing_lib.flow import Guidance, block_noise, euler, guided_denoiser, ltx2_sigmas
from omniforcing_lib.layout import AV
from omniforcing_lib.rollout import Causal, new_cache, next_block, seeded_noise
from omniforcing_lib.text import TextEncoder, TinyText
from omniforcing_lib.transformer import Transformer


class Chunk(NamedTuple):
    """One block as a viewer gets it.

    Shapes: frames uint8 [F, H, W, 3], samples float32 [N] mono or [N, 2] stereo.
    """

    frames: np.ndarray
    samples: np.ndarray
    start_s: float
    prompt: str


@dataclass
class Streamer:
    """Yield one chunk a block, without end; `with` frees its caches at the end.

    Args:
        model: a causal student.
        causal: its blocks, steps and window.
        codec: decodes both streams with carried state.
        text: encodes prompts.
        prompt: what to show; change it with `set_prompt`.
        seed: of all noise.
    """

    model: Transformer
    causal: Causal
    codec: Codec
    text: TextEncoder
    prompt: str
    seed: int = 0
    block: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._cache = new_cache(self.model, self.causal, self.codec.grid, batch=1)
        self._decoder = self.codec.start()
        self._last: AV[Tensor] | None = None
        self.set_prompt(self.prompt)

    def __enter__(self) -> Streamer:
        self._check_open()
        return self

    def __exit__(self, *error: object) -> None:
        self._cache = None

    def __iter__(self) -> Iterator[Chunk]:
        while self._cache is not None:
            yield self.step()

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values held."""
        return self._cache.nbytes if self._cache else 0

    def set_prompt(self, prompt: str) -> None:
        """Follow another prompt from the next block on; unknown words raise ValueError."""
        self._check_open()
        device = self.model.proj_out.weight.device
        self._context = self.text.encode([prompt], device, self.model.proj_out.weight.dtype)
        self._cache.forget_text()
        self.prompt = prompt

    @torch.inference_mode()
    def step(self) -> Chunk:
        """Generate and decode the next block; RuntimeError once the stream is closed."""
        self._check_open()
        k = self.block
        noise = seeded_noise([self.seed], self.model.proj_out.weight)
        self._last = next_block(self.model, self.causal, self._cache, self._context, noise, k, self._last)
        start_s = self._decoder.shown(self.codec.clock) / self.codec.clock.fps
        clip = to_arrays(self.codec.decode(self._last, self._decoder))
        self.block += 1
        return Chunk(clip.video, clip.audio, start_s, self.prompt)

    @torch.inference_mode()
    def finish(self) -> Chunk | None:
        """Give what a codec that looks ahead still owes of the blocks so far; None where it owes nothing."""
        start_s = self._decoder.shown(self.codec.clock) / self.codec.clock.fps
        rest = self.codec.finish(self._decoder)
        return None if rest is None else Chunk(*to_arrays(rest), start_s, self.prompt)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Store where the stream stands, atomically: `resume` goes on with the same bits."""
        if self._last is None:
            raise ValueError("nothing to save before the first block; step once")
        tensors = {**self._cache.tensors(), **self._decoder.tensors(), "video": self._last.video}
        tensors["audio"] = self._last.audio
        said = {"prompt": self.prompt, "seed": self.seed, "block": self.block}
        return write_tensors(path, tensors, {"stream": json.dumps(said)})

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Go on where `save` left a stream of the same model, blocks and window; seed and prompt come with it."""
        with safe_open(path, "pt") as file:
            said, tensors = json.loads(file.metadata()["stream"]), {n: file.get_tensor(n) for n in file.keys()}
        weight = self.model.proj_out.weight
        self._last = AV(tensors["video"], tensors["audio"]).map(lambda t: t.to(weight.device))
        self.seed, self.block = said["seed"], said["block"]
        self._cache.fill(tensors)
        self._cache.open(self.block - 1)
        self._decoder = type(self._decoder).from_tensors(tensors, weight.device)
        self.set_prompt(said["prompt"])

    def _check_open(self) -> None:
        if self._cache is None:
            raise RuntimeError("this Streamer was closed; make a new one")


def to_arrays(clip: AV[Tensor]) -> AV[np.ndarray]:
    """Turn the first decoded clip of a batch into frames and samples.

    Shapes: AV([B, F, H, W, 3], [B, N] or [B, N, 2]) in [-1, 1] to AV(uint8 [F, H, W, 3], float32 [N] or [N, 2]).
    """
    # one half more, and the cast to whole numbers rounds; a decoder has clamped already
    frames = (clip.video[0] * 127.5).add_(128).to(torch.uint8)
    return AV(frames.cpu().numpy(), clip.audio[0].float().cpu().numpy())


def to_clips(clip: AV[Tensor]) -> list[AV[np.ndarray]]:
    """Turn a decoded batch into clips."""
    return [to_arrays(clip.map(lambda x, i=i: x[i : i + 1])) for i in range(len(clip.video))]


def shipped_codec(device: str | torch.device = "cpu") -> TinyCodec:
    """Load the codec of the miniature."""
    return load_codec(checkpoints.DATA / "codec.safetensors", device)


MINIATURE_CFG = Guidance(cfg=AV(3.0, 3.0))
"""Guidance of the miniature's real score and ODE pairs: CFG alone, as the paper's."""

MINIATURE_GUIDANCE = Guidance(cfg=AV(3.0, 3.0), rescale=AV(0.7, 0.7))
"""Guidance of the miniature teacher (LOG.md says how it was chosen)."""


@torch.inference_mode()
def teacher_clips(
    model: Transformer,
    codec: Codec,
    prompts: list[str],
    seeds: list[int],
    seconds: int,
    *,
    steps: int = 40,
    guidance: Guidance = MINIATURE_GUIDANCE,
    text: TextEncoder | None = None,
) -> list[AV[np.ndarray]]:
    """Sample clips with the guided bidirectional teacher, one a prompt and seed, as one batch."""
    weight, latents = model.proj_out.weight, codec.clock.latents(seconds)
    shapes = AV((latents.video, *codec.grid, model.config.in_channels), (latents.audio, model.config.audio_in_channels))
    context = (text or TinyText()).encode([*prompts, ""], weight.device, weight.dtype)
    negative = context.map(lambda t: t[-1:])
    noise = block_noise(seeds, 0, shapes).map(lambda x: x.to(weight.device))
    denoise = guided_denoiser(model, context.map(lambda t: t[:-1]), negative, guidance)
    return to_clips(codec.decode(euler(denoise, noise, ltx2_sigmas(steps))))


def generate(
    prompt: str,
    seconds: int,
    seed: int,
    model: str | os.PathLike[str] = "student",
    *,
    codec: Codec | None = None,
    text: TextEncoder | None = None,
    guidance: Guidance = MINIATURE_GUIDANCE,
) -> AV[np.ndarray]:
    """Make one clip: streamed by a causal student, sampled whole by a bidirectional teacher under `guidance`.

    Codec and text encoder are the miniature's unless others are given.

    Shapes: AV(uint8 [24K + 1, H, W, 3], float32 [R K + hop] or [R K + hop, 2]), R samples a second.
    """
    if seconds < 1:
        raise ValueError(f"a clip lasts 1 second or more, found {seconds}")
    causal, codec, text = checkpoints.read(model).causal, codec or shipped_codec(), text or TinyText()
    loaded = checkpoints.load(model)
    if causal is None:
        return teacher_clips(loaded, codec, [prompt], [seed], seconds, guidance=guidance, text=text)[0]
    wanted = codec.clock.latents(seconds)
    with Streamer(loaded, causal, codec, text, prompt, seed) as stream:
        chunks = [stream.step() for _ in range(causal.layout.count(wanted.video))]
        chunks += [rest] if (rest := stream.finish()) else []
    frames, samples = (np.concatenate(part) for part in zip(*((c.frames, c.samples) for c in chunks), strict=True))
    ends = codec.clock.frames(range(wanted.video)).stop, codec.clock.samples(range(wanted.audio)).stop
    return AV(frames[: ends[0]], samples[: ends[1]])
