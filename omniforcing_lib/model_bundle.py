"""What stands beside a checkpoint: codec, text encoder, prompts, and whether anyone knows the truth about its clips.

The shipped miniature has the Bounce world: clips with known events, and detectors for them. A real LTX-2 has none of
that, so what needs it is left out, in so many words, and never made up. Where a checkpoint comes without its codec or
text encoder, stand-ins of the right shapes take their place: good for questions of structure and time, for no other.

Shapes: B batch, F video and T audio latents, h w token grid, C latent channels, L text tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from omniforcing_lib import backends, files, safetensors_io
from omniforcing_lib.bounce import codecs, world
from omniforcing_lib.bounce.codec_parts import CodecConfig
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.flow import LTX2_GUIDANCE, MINIATURE_GUIDANCE, Guidance, block_noise
from omniforcing_lib.interfaces import Codec, DecodeState, TextEncoder
from omniforcing_lib.layout import AV, Clock
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.ltx2.codec import LTX2Codec, LTX2DecodeState, load_ltx2_codec
from omniforcing_lib.ltx2.gemma import GemmaText, user_cache
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.training.dataset import Prompts, latent_shapes
from omniforcing_lib.transformer import Transformer, fresh_sinks
from studies import anatomy, cost

SENTENCES = (
    "rain falls on a tin roof while a dog barks in the yard",
    "a woman plays a slow tune on a piano in an empty hall",
    "waves break on a pebble beach, gulls cry overhead",
    "a red ball bounces down a stone staircase",
    "a blacksmith hammers glowing iron, sparks fly",
    "a train passes a level crossing at night, its bell ringing",
)
PIXELS = 4
"""Side of the square of pixels that the stand-in codec makes of a token."""


class Mono(Codec):
    """LTX-2's codec with both ears mixed to one: clips of this project are mono."""

    def __init__(self, codec: LTX2Codec) -> None:
        self._codec, self.grid, self.clock = codec, codec.grid, codec.clock

    def start(self) -> LTX2DecodeState:
        """Begin a streamed decoding."""
        return self._codec.start()

    def decode(self, latents: AV[Tensor], state: LTX2DecodeState | None = None) -> AV[Tensor]:
        """Decode as `LTX2Codec.decode` does. Shapes: samples [B, n]."""
        return _mixed(self._codec.decode(latents, state))

    def finish(self, state: LTX2DecodeState) -> AV[Tensor]:
        """Give what a stream still owes. Shapes: as `decode`."""
        return _mixed(self._codec.finish(state))


def _mixed(clip: AV[Tensor]) -> AV[Tensor]:
    return AV(clip.video, clip.audio.mean(-1))


class StandInCodec(Codec):
    """Turn latents into pixels and samples by fixed random matrices: right lengths, right clock, no meaning.

    Each latent decodes alone, so a stream decodes to what the whole clip does.
    """

    def __init__(self, config: ModelConfig, grid: tuple[int, int], device: str | torch.device = "cpu") -> None:
        self.grid, self.clock = grid, Clock()
        self.channels = AV(config.in_channels, config.audio_in_channels)
        sizes = AV(self.clock.video_stride * PIXELS**2 * 3, self.clock.audio_stride * self.clock.hop)
        generator = torch.Generator().manual_seed(0)
        self._paint = AV(
            *(
                torch.randn(c, n, generator=generator).to(device) / c**0.5
                for c, n in zip(self.channels, sizes, strict=True)
            )
        )

    def decode(self, latents: AV[Tensor], state: DecodeState | None = None) -> AV[Tensor]:
        """Decode latents, or the next ones of a stream when a state is given (which it moves on).

        Shapes: AV([B, F, h, w, C], [B, T, C]) -> video [B, f, 4h, 4w, 3], audio [B, n], both in [-1, 1].
        """
        state = state or DecodeState()
        video, audio = latents.map(lambda x, paint: torch.tanh(x.to(paint) @ paint), self._paint)
        shape = {"t": self.clock.video_stride, "p": PIXELS, "q": PIXELS}
        frames = rearrange(video, "b f h w (t p q c) -> b (f t) (h p) (w q) c", **shape)
        samples = audio.flatten(1)
        first = state.latents.map(lambda seen: seen == 0)
        state.latents = state.latents.map(lambda seen, x: seen + x.shape[1], latents)
        state.knots = samples[:, -1:, None]
        late = (self.clock.video_stride - 1) * first.video, (self.clock.audio_stride - 1) * self.clock.hop * first.audio
        return AV(frames[:, late[0] :], samples[:, late[1] :])


@dataclass(frozen=True)
class StandInText:
    """Give every prompt a random context of its own, the same each time: right shapes, no meaning.

    Attributes:
        widths: of the context of each stream.
        length: tokens of the context.
    """

    widths: AV[int]
    length: int = 16

    @property
    def channels(self) -> int:
        """Width of the video's context."""
        return self.widths.video

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
    """Latents to ask questions about, with their prompts; clips only where somebody knows the truth of them."""

    clips: list[AV[np.ndarray]]
    prompts: list[str]
    latents: AV[Tensor]


@dataclass(frozen=True)
class ModelBundle:
    """Hold a checkpoint and all that it takes to run it; `print` says what is real and what stands in.

    Attributes:
        source: the checkpoint's name or path.
        codec: of its latents.
        text: encodes prompts.
        names: prompts to ask it for.
        guidance: of the teacher.
        known: whether the truth about its clips is known.
        says: what was found, in one line.
        device: where models go.
        dtype: of their weights.
    """

    source: str
    codec: Codec
    text: TextEncoder
    names: tuple[str, ...]
    guidance: Guidance
    known: bool
    says: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.says

    @property
    def has_ground_truth(self) -> bool:
        """Tell whether the truth about the clips is known, as it is of the world's."""
        return self.known

    @property
    def decodes_at_once(self) -> bool:
        """Tell whether frames and samples come with their latents; LTX-2's decoders look ahead instead."""
        return not isinstance(self.codec, Mono)

    @property
    def fits_training(self) -> bool:
        """Tell whether the device's memory holds the training of a model of the checkpoint's size."""
        return cost.training_bytes(checkpoints.read(self.source).config) <= memory_of(self.device)

    def choose_attention(self) -> None:
        """Choose the attention of both streams now; ValueError where a named backend can't serve them."""
        config = checkpoints.read(self.source).config
        for size in (config.attention_head_dim, config.audio_attention_head_dim):
            backends.chosen(torch.empty(1, 1, 1, size, device=self.device, dtype=self.dtype))

    @cached_property
    def _weights(self) -> Transformer:
        return checkpoints.load(self.source, device=self.device, dtype=self.dtype)

    def load(self, sinks: int | None = None, changes: Mapping[str, object] | None = None) -> Transformer:
        """Give the checkpoint's transformer, with fresh sinks or other settings; all share one copy of the weights."""
        return sharing(self._weights, sinks, changes)

    @property
    def shipped(self) -> dict[str, str]:
        """Name the students that come with the checkpoint, by stage; only the miniature has any."""
        return {"Stage 2": "stage2", "Stage 3": "student"} if self.known else {}

    def student(self, model: str = "student") -> tuple[Transformer, RolloutConfig]:
        """Load a causal student; for `student`, a teacher that has none lends its own weights, under fresh sinks."""
        if not self.known and model == "student":
            causal = RolloutConfig()
            return self.load(sinks=causal.layout.sinks), causal
        causal = checkpoints.student(model)
        return checkpoints.load(model, device=self.device, dtype=self.dtype), causal

    def context(self) -> Prompts:
        """Encode all prompts once, the unconditional one last."""
        return Prompts.of(self.text, self.names, self.device)

    def encode(self, prompts: Sequence[str]) -> AV[Tensor]:
        """Encode prompts where the models are, in their dtype. Shapes: AV [B, L, C]."""
        return self.text.encode(prompts, self.device, self.dtype)

    def examples(self, count: int, seed: int, seconds: int) -> Examples:
        """Encode clips of the world that training never drew; without a known truth, draw latents at random."""
        if self.known:
            real = anatomy.held_out(count, seed, seconds)
            return Examples(real.clips, real.prompts, anatomy.encoded(self.codec, real.clips))
        shapes = latent_shapes(self._weights, self.codec.clock.latents(seconds), self.codec.grid)
        latents = block_noise(range(seed * count, (seed + 1) * count), 0, shapes)
        prompts = [self.names[i % len(self.names)] for i in range(count)]
        return Examples([], prompts, latents.map(lambda x: x.to(self.device)))


def of(
    source: str = "teacher",
    *,
    device: str = "cpu",
    dtype: str = "float32",
    grid: tuple[int, int] = (4, 4),
    parts: str = "",
    gemma: str = "",
    horizon: int | None = None,
    contexts: str = "",
) -> ModelBundle:
    """Find what belongs to a checkpoint: the miniature's world, LTX-2's own parts, or stand-ins.

    LTX-2's parts are used where there is a Gemma: a folder `gemma*` beside the checkpoint, or the one that is named.

    Args:
        source: `teacher`, or the path of a checkpoint.
        device: where models go, see `backends.device`.
        dtype: of their weights, by name.
        grid: tokens of a frame, 32 x 32 pixels each in LTX-2; the miniature has its own.
        parts: LTX-2 file or diffusers folder with VAEs, vocoder and connectors; else the checkpoint itself, or
            `ltx-2*.safetensors` beside it.
        gemma: folder of Gemma 3.
        horizon: video latents that a streamed frame waits for, see `LTX2Codec`.
        contexts: folder that keeps Gemma's contexts; else the user's cache, see `gemma.user_cache`.

    Raises:
        ValueError: a named part or the device is not there, or is not what it should be.
    """
    device = str(backends.device(device))
    checkpoint, kind = checkpoints.read(source), {"device": device, "dtype": getattr(torch, dtype)}
    fits = checkpoint.config.in_channels == CodecConfig().channels.video
    if checkpoint.metadata.get("model_version") == "miniature" and fits:
        codec, says = codecs.shipped_codec(device), "the miniature: its codec and its world, whose truth is known"
        return ModelBundle(source, codec, TinyText(), tuple(world.prompts()), MINIATURE_GUIDANCE, True, says, **kind)
    config, name = checkpoint.config, checkpoint.path.name
    encoder = gemma or next((str(path.parent) for path in _beside(checkpoint.path, "gemma*/config.json")), "")
    if encoder:
        where = files.given(parts) if parts else _parts_of(checkpoint.path)
        text = GemmaText(files.given(encoder), where, files.given(contexts) if contexts else user_cache(), **kind)
        codec = Mono(load_ltx2_codec(where, (32 * grid[0], 32 * grid[1]), horizon=horizon, **kind))
        says = f"{name}: decoded by {where.name}, prompted by {Path(encoder).name}; no truth is known"
    else:
        codec, text = StandInCodec(config, grid, device), StandInText(text_widths(config))
        says = (
            f"{name}: no Gemma folder (gemma*) beside it, so a stand-in decodes its latents (frames of {grid[0]} x "
            f"{grid[1]} tokens) and random contexts stand for prompts: structure and time, no quality"
        )
    return ModelBundle(source, codec, text, SENTENCES, guidance_of(config), False, says, **kind)


def _beside(path: Path, pattern: str) -> list[Path]:
    """Find files beside a checkpoint, or beside the folder that it is in; a link's are beside the link."""
    folder = Path(os.path.abspath(path)).parent
    return [found for place in (folder, folder.parent) for found in sorted(place.glob(pattern))]


def _parts_of(path: Path) -> Path:
    """Find the file that holds VAEs, vocoder and connectors: the checkpoint itself, or an LTX-2 file beside it."""
    for file in (path, *_beside(path, "ltx-2*.safetensors")):
        if file.suffix == ".safetensors" and any(
            name.startswith("vocoder.") for name in safetensors_io.one_file(file).entries
        ):
            return file
    raise ValueError(f"{path} holds no VAEs and no vocoder, and no ltx-2*.safetensors beside it does; name one (parts)")


def memory_of(device: str) -> int:
    """Bytes of memory that a device has."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def text_widths(config: ModelConfig) -> AV[int]:
    """Give the widths of the text context that each stream takes (spec 1.3, 1.12)."""
    if config.caption_proj_before_connector:
        return AV(config.cross_attention_dim, config.audio_cross_attention_dim)
    return AV(config.caption_channels, config.caption_channels)


def guidance_of(config: ModelConfig) -> Guidance:
    """Give LTX-2's guidance, with the layer that is skipped in a model of that depth (spec 1.11, 1.12)."""
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
    with torch.device("meta"):
        built = Transformer(config, model.clock)
    built.load_state_dict(state, strict=True, assign=True)
    return built.requires_grad_(False).eval()
