"""A checkpoint with all that it takes to run it: codec, text encoder, prompts and guidance.

The shipped miniature comes with the Bounce world: the events of its clips are known, and detectors find them again.
Nobody knows that of the clips of a real LTX-2, so what needs a ground truth is left out there. Where a checkpoint
comes without its codec or text encoder, stand-ins of the right shapes replace them: they serve questions of structure
and time, but not of quality.

Shapes: B batch, F video and T audio latents, h w token grid, C latent channels, L text tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from einops import rearrange
from torch import Tensor

from omniforcing_lib import backends, files
from omniforcing_lib.bounce import codecs, sampling, world
from omniforcing_lib.bounce.codec_parts import CodecConfig
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.flow import DISTILLED_SIGMAS, LTX2_GUIDANCE, MINIATURE_GUIDANCE, Guidance, block_noise
from omniforcing_lib.interfaces import Codec, DecodeState, TextEncoder
from omniforcing_lib.layout import AV, Clock
from omniforcing_lib.ltx2 import checkpoints, formats
from omniforcing_lib.ltx2 import parts as ltx2_parts
from omniforcing_lib.ltx2.codec import LTX2Codec, load_ltx2_codec
from omniforcing_lib.ltx2.gemma import GemmaText, user_cache
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.stream import Sampling
from omniforcing_lib.training import plan
from omniforcing_lib.training.dataset import Prompts
from omniforcing_lib.transformer import Transformer, empty, fresh_sinks

SENTENCES = (
    "rain falls on a tin roof while a dog barks in the yard",
    "a woman plays a slow tune on a piano in an empty hall",
    "waves break on a pebble beach, gulls cry overhead",
    "a red ball bounces down a stone staircase",
    "a blacksmith hammers glowing iron, sparks fly",
    "a train passes a level crossing at night, its bell ringing",
)
PIXELS = 4
"""Side in pixels of the square that the stand-in codec makes of a token."""


class StandInCodec(Codec):
    """Turn latents into pixels and samples by fixed random matrices: right lengths, right clock, no meaning.

    Each latent is decoded alone, so a stream decodes to the same as the whole clip.
    """

    def __init__(self, config: ModelConfig, grid: tuple[int, int], device: str | torch.device = "cpu") -> None:
        self.grid, self.clock = grid, Clock()
        self.channels = AV(config.in_channels, config.audio_in_channels)
        sizes = AV(self.clock.video_stride * PIXELS**2 * 3, self.clock.audio_stride * self.clock.hop)
        generator = torch.Generator().manual_seed(0)

        def matrix(channels: int, size: int) -> Tensor:
            return torch.randn(channels, size, generator=generator).to(device) / channels**0.5

        self._matrices = self.channels.map(matrix, sizes)

    def decode(self, latents: AV[Tensor], state: DecodeState | None = None) -> AV[Tensor]:
        """Decode latents, or the next ones of a stream when a state is given, which is updated.

        Shapes: AV([B, F, h, w, C], [B, T, C]) -> video [B, f, 4h, 4w, 3], audio [B, n], both in [-1, 1].
        """
        state = state or DecodeState()
        video, audio = latents.map(lambda x, matrix: torch.tanh(x.to(matrix) @ matrix), self._matrices)
        sizes = {"t": self.clock.video_stride, "p": PIXELS, "q": PIXELS}
        frames = rearrange(video, "b f h w (t p q c) -> b (f t) (h p) (w q) c", **sizes)
        samples = audio.flatten(1)
        # The first latent of each stream stands for one frame, or one mel hop, only.
        dropped_frames = 0 if state.latents.video else self.clock.video_stride - 1
        dropped_samples = 0 if state.latents.audio else (self.clock.audio_stride - 1) * self.clock.hop
        state.latents = state.latents.map(lambda count, x: count + x.shape[1], latents)
        state.knots = samples[:, -1:, None]
        return AV(frames[:, dropped_frames:], samples[:, dropped_samples:])


@dataclass(frozen=True)
class StandInText:
    """Give every prompt a random context of its own, the same each time: right shapes, no meaning.

    Attributes:
        widths: width of the context of each stream.
        length: tokens of the context.
    """

    widths: AV[int]
    length: int = 16

    def encode(
        self, prompts: Sequence[str], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> AV[Tensor]:
        """Encode a batch of prompts. Shapes: pair [B, length, width]."""
        seeds = [int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7]) for prompt in prompts]

        def draw(width: int) -> Tensor:
            drawn = [torch.randn(self.length, width, generator=torch.Generator().manual_seed(s)) for s in seeds]
            return torch.stack(drawn).to(device, dtype)

        return self.widths.map(draw)


class Examples(NamedTuple):
    """Hold latents with their prompts; `clips` is empty where no ground truth is known."""

    clips: list[AV[np.ndarray]]
    prompts: list[str]
    latents: AV[Tensor]


@dataclass(frozen=True)
class ModelBundle:
    """Hold a checkpoint and all that it takes to run it; `print` says what is real and what stands in.

    Attributes:
        source: the checkpoint's name or path.
        codec: decodes its latents.
        text: encodes prompts.
        names: prompts to ask it for.
        guidance: of the teacher.
        has_ground_truth: whether the events of its clips are known, as those of the Bounce world are.
        description: what was found, in one line.
        device: where models run.
        dtype: of their weights.
        distilled: version of LTX-2 of a distilled teacher, which is sampled without guidance at its own noise levels.
    """

    source: str
    codec: Codec
    text: TextEncoder
    names: tuple[str, ...]
    guidance: Guidance
    has_ground_truth: bool
    description: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    distilled: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.description

    def sampling(self, steps: int) -> Sampling:
        """Say how a teacher is sampled: in `steps` under its guidance, or as a distilled file wants."""
        if not self.distilled:
            return Sampling(steps, self.guidance)
        return Sampling(DISTILLED_SIGMAS, Guidance(), ancestral=self.distilled >= (2, 5))

    @property
    def decodes_at_once(self) -> bool:
        """Tell whether each latent decodes to its frames and samples at once; LTX-2's own decoders look ahead."""
        return not isinstance(self.codec, LTX2Codec)

    @cached_property
    def training_bytes(self) -> int:
        """Bytes that training all weights takes, batch and cache not counted."""
        return plan.training_bytes(self.config)

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that the device has."""
        if torch.device(self.device).type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return psutil.virtual_memory().total

    @property
    def fits_training(self) -> bool:
        """Tell whether the device has the memory to train all weights."""
        return self.training_bytes <= self.memory_bytes

    @cached_property
    def config(self) -> ModelConfig:
        """The config of the checkpoint's transformer."""
        return checkpoints.read(self.source).config

    def choose_attention(self) -> None:
        """Choose the attention kernel of both streams now; ValueError where a named backend cannot serve them."""
        for size in (self.config.attention_head_dim, self.config.audio_attention_head_dim):
            backends.chosen(torch.empty(1, 1, 1, size, device=self.device, dtype=self.dtype))

    @cached_property
    def _weights(self) -> Transformer:
        return checkpoints.load(self.source, device=self.device, dtype=self.dtype)

    def load(self, sinks: int | None = None, changes: Mapping[str, object] | None = None) -> Transformer:
        """Give the checkpoint's transformer, with fresh sinks or other settings; all share one copy of the weights."""
        return sharing(self._weights, sinks, changes)

    @property
    def shipped(self) -> dict[str, str]:
        """Name the files of the students that come with the checkpoint; only the miniature has any."""
        return {"Stage 2": "stage2", "student": "student"} if self.has_ground_truth else {}

    def student(self, model: str = "student") -> tuple[Transformer, RolloutConfig]:
        """Load a causal student; where none comes with the checkpoint, `student` is the teacher with fresh sinks."""
        if model == "student" and not self.shipped:
            causal = RolloutConfig()
            return self.load(sinks=causal.layout.sinks), causal
        causal = checkpoints.student(model)
        return checkpoints.load(model, device=self.device, dtype=self.dtype), causal

    def context(self) -> Prompts:
        """Encode all prompts once, the unconditional one last."""
        return Prompts.of(self.text, self.names, self.device)

    def encode(self, prompts: Sequence[str]) -> AV[Tensor]:
        """Encode prompts on the models' device, in their dtype. Shapes: AV [B, L, C]."""
        return self.text.encode(prompts, self.device, self.dtype)

    def examples(self, count: int, seed: int, seconds: int) -> Examples:
        """Encode clips of the world that training never drew; without a ground truth, draw random latents."""
        if self.has_ground_truth and isinstance(self.codec, codecs.TinyCodec):
            real = sampling.held_out(count, seed, seconds)
            return Examples(real.clips, real.prompts, sampling.encoded(self.codec, real.clips))
        shapes = self.config.latent_shapes(self.codec.clock.latents(seconds), self.codec.grid)
        latents = block_noise(range(seed * count, (seed + 1) * count), 0, shapes)
        prompts = [self.names[i % len(self.names)] for i in range(count)]
        return Examples([], prompts, latents.map(lambda x: x.to(self.device)))


def of(
    source: str = "teacher",
    *,
    device: str = "cpu",
    dtype: str = "float32",
    grid: tuple[int, int] = (4, 4),
    parts: str | Sequence[str] = (),
    gemma: str = "",
    variant: str = "",
    horizon: int | None = None,
    decoder: Sequence[str] = (),
    contexts: str = "",
) -> ModelBundle:
    """Find what belongs to a checkpoint: the miniature's world, LTX-2's own parts, or stand-ins.

    LTX-2's parts are used where there is a Gemma: a folder `gemma*` beside the checkpoint, or the one that is named.

    Args:
        source: `teacher`, or the path of a checkpoint.
        device: where models run, see `backends.device`.
        dtype: of their weights, by name.
        grid: tokens of a frame, 32 x 32 pixels each in LTX-2; the miniature has its own.
        parts: LTX-2 files or a diffusers folder with VAEs, vocoder and connectors; what they lack is taken from the
            checkpoint itself and from the files beside it (`parts.companions`).
        gemma: folder of Gemma 3 or 4, or LTX-2.5's text encoder.
        variant: "dev" or "distilled", which no tensor and no metadata tells; by default as the file's name says.
        horizon: video latents that a streamed frame waits for, see `LTX2Codec`.
        decoder: the word tiny and a TAEHV file whose decoder makes the frames; by default LTX-2's own does.
        contexts: folder that keeps Gemma's contexts; by default the user's cache, see `gemma.user_cache`.

    Raises:
        ValueError: a named part or the device is not there, or is not what it should be; a part is named for the
            miniature, or its codec is not there; a tiny decoder where LTX-2's own codec is not there or not asked for.
    """
    device = str(backends.device(device))
    checkpoint, place = checkpoints.read(source), {"device": device, "dtype": getattr(torch, dtype)}
    config, name = checkpoint.config, checkpoint.path.name
    kind, tiny = decoder or ("tiny", "")
    if kind != "tiny":
        raise ValueError(f"a decoder is the word tiny and a TAEHV file, found {kind!r}; leave it out for LTX-2's own")
    # 1. The miniature has its own world.
    fits_world = config.in_channels == CodecConfig().channels.video
    if checkpoint.metadata.get("model_version") == "miniature" and fits_world:
        named = {"parts": parts, "gemma": gemma, "contexts": contexts, "horizon": horizon, "decoder": decoder}
        if unused := [option for option, value in named.items() if value not in ("", (), [], None)]:
            raise ValueError(f"the miniature has its own codec and text encoder: leave out {', '.join(unused)}")
        description = "the miniature: its codec and its world, whose truth is known"
        prompts = tuple(world.prompts())
        codec, text = codecs.load_codec(codecs.codec_of(checkpoint.path, checkpoint.notes), device), TinyText()
        return ModelBundle(source, codec, text, prompts, MINIATURE_GUIDANCE, True, description, **place)
    # 2. LTX-2's own parts where there is a text encoder, stand-ins elsewhere.
    encoder = files.given(gemma) if gemma else _gemma_beside(checkpoint.path, checkpoint.version)
    if tiny and not encoder:
        raise ValueError(f"{name}: {tiny} decodes the picture alone; name Gemma's folder and LTX-2's parts")
    if encoder:
        named = [files.given(part) for part in ([parts] if isinstance(parts, str) else parts) if part]
        where = _files_of(checkpoint, [*named, *([encoder] if encoder.is_file() else [])])
        text = GemmaText(encoder, where, files.given(contexts) if contexts else user_cache(), **place)
        codec = load_ltx2_codec(where, (32 * grid[0], 32 * grid[1]), horizon=horizon, tiny=tiny, **place)
        by = ", ".join(Path(file).name for file in (tiny, *where) if file)
        description = f"{name}: decoded by {by}, prompted by {encoder.name}; no ground truth is known"
    else:
        codec, text = StandInCodec(config, grid, device), StandInText(text_widths(config))
        description = (
            f"{name}: no Gemma folder (gemma*) beside it, so a stand-in decodes its latents (frames of {grid[0]} x "
            f"{grid[1]} tokens) and random contexts stand for prompts: structure and time, no quality"
        )
    # 3. How a teacher is sampled.
    distilled = variant == "distilled" or (not variant and "distilled" in name.lower())
    if not (variant or checkpoint.causal):
        description += f"; taken for {'distilled' if distilled else 'dev'} by its name (variant)"
    guidance, version = guidance_of(config), ()
    if distilled:
        guidance, version = Guidance(), formats.version_number(checkpoint.version)
    return ModelBundle(source, codec, text, SENTENCES, guidance, False, description, distilled=version, **place)


def _files_of(checkpoint: checkpoints.Checkpoint, named: Sequence[Path]) -> list[Path]:
    """Find the files of LTX-2's other models; ValueError where something is in none of them."""
    where, missing = ltx2_parts.companions(checkpoint.path, checkpoint.version, named)
    if missing:
        lacks = f"{checkpoint.path} lacks {', '.join(sorted(missing))}"
        raise ValueError(f"{lacks}, and so do {', '.join(p.name for p in where) or 'files'} beside it; name parts")
    return where


def _gemma_beside(path: Path, version: str) -> Path | None:
    """Find a text encoder beside a checkpoint: the file of LTX-2.5, or a folder of Gemma."""
    found = ltx2_parts.beside(path, "gemma*/config.json")
    if formats.version_number(version) >= (2, 4):
        found = [*ltx2_parts.beside(path, "gemma*.safetensors", "text_encoders/gemma*.safetensors"), *found]
    return next((file.parent if file.name == "config.json" else file for file in found), None)


def text_widths(config: ModelConfig) -> AV[int]:
    """Give the widths of the text context that each stream takes (specification 1.3, 1.12)."""
    if config.caption_proj_before_connector:
        return AV(config.cross_attention_dim, config.audio_cross_attention_dim)
    return AV(config.caption_channels, config.caption_channels)


def guidance_of(config: ModelConfig) -> Guidance:
    """Give LTX-2's guidance: STG skips layer 29 of LTX-2.0, layer 28 of later ones, or the last of a small model.

    Source: specification 1.11, 1.12.
    """
    layer = 28 if config.apply_gated_attention else 29
    return replace(LTX2_GUIDANCE, stg_blocks=frozenset({min(layer, config.num_layers - 1)}))


def sharing(model: Transformer, sinks: int | None = None, changes: Mapping[str, object] | None = None) -> Transformer:
    """Build a frozen model on the weights of another, with fresh sinks or other settings; nothing is copied."""
    config, state = replace(model.config, **(changes or {})), model.state_dict()
    if sinks is not None and sinks != config.num_audio_sink_tokens:
        config = config.with_sinks(sinks)
        state.pop("audio_sink_tokens", None)
        if sinks:
            state["audio_sink_tokens"] = fresh_sinks(config).to(model.proj_out.weight)
    built = empty(config, model.clock)
    built.load_state_dict(state, strict=True, assign=True)
    return built.requires_grad_(False).eval()
