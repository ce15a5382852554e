"""TinyCodec: the miniature's stand-in for LTX-2's two autoencoders and its vocoder.

It has LTX-2's temporal geometry (specification 2): the first video latent is one frame and every later one eight, the
first audio latent is one mel hop and every later one four. Both decoders look at one latent at a time, so a stream
decodes to what the whole clip decodes to. Video is a small convolutional autoencoder. Audio is phase-free, as a mel
spectrogram with a vocoder is: a latent holds four knots of the amplitudes of a bank of oscillators whose phases
follow from the absolute sample index alone.

Letters: B batch, F video latents, T audio latents, f frames, n samples, m hops, t frames of a latent, p knots of a
latent, k oscillators, c channels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from omniforcing_lib.bounce.codec_parts import (
    Analysis,
    AudioDecoder,
    AudioEncoder,
    CodecConfig,
    OscillatorBank,
    VideoDecoder,
    VideoEncoder,
)
from omniforcing_lib.files import DATA, sha256, write_tensors
from omniforcing_lib.interfaces import START, Codec, DecodeState
from omniforcing_lib.layout import AV, Clock

FORMAT = "omniforcing-tinycodec-1"
SHIPPED = DATA / "codec.safetensors"


@dataclass
class EncodeState:
    """Remember where a streamed encoding stands: latents made of each stream, last samples heard."""

    latents: AV[int] = START
    heard: Tensor | None = None


class TinyCodec(nn.Module, Codec):
    """Encode clips of the world to latents of about unit variance, and decode them, whole or as a stream.

    Source: specification 2.
    """

    def __init__(self, config: CodecConfig | None = None, clock: Clock | None = None) -> None:
        super().__init__()
        self.config, self.clock = config or CodecConfig(), clock or Clock()
        self.grid = (self.config.size // self.config.patch,) * 2
        self.channels = self.config.channels
        self.analysis = Analysis(self.config, self.clock)
        stride = AV(self.clock.video_stride, self.clock.audio_stride)
        self.encoders = nn.ModuleList(
            [VideoEncoder(self.config, stride.video), AudioEncoder(self.config, self.analysis.features, stride.audio)]
        )
        self.decoders = nn.ModuleList(
            [VideoDecoder(self.config, stride.video), AudioDecoder(self.config, stride.audio)]
        )
        # Tokens are normalised each for itself: the still background would otherwise be most of the variance.
        spread = AV(self.grid[0] * self.grid[1] * self.channels.video, self.channels.audio)
        self.scales = nn.ModuleList(nn.BatchNorm1d(width, affine=False) for width in spread)
        self.bank = OscillatorBank(self.config, self.clock)
        self.metrics: dict[str, float] = {}

    def encode(self, clip: AV[Tensor], state: EncodeState | None = None) -> AV[Tensor]:
        """Encode a clip, or the next piece of one when a state is given.

        Shapes: video [B, f, H, W, 3], audio [B, n], both in [-1, 1] -> AV([B, F, h, w, c], [B, T, c]).

        Raises:
            ValueError: a piece that is no whole number of latents, or frames of another size.
        """
        state = state or EncodeState()
        latents = AV(self._encode_video(clip.video, state), self._encode_audio(clip.audio, state))
        state.latents = state.latents.map(lambda seen, new: seen + new.shape[1], latents)
        return latents

    def decode(self, latents: AV[Tensor], state: DecodeState | None = None) -> AV[Tensor]:
        """Decode latents, or the next ones of a stream when a state is given (which it moves on).

        Shapes: AV([B, F, h, w, c], [B, T, c]) -> video [B, f, H, W, 3], audio [B, n], both in [-1, 1].

        Raises:
            ValueError: latents of another grid or width.
        """
        state = state or DecodeState()
        self._check_latents(latents)
        # one latent at a time: the size of a batch changes the last bits of a convolution
        pictures = [self.frames(latents.video[:, i : i + 1]) for i in range(latents.video.shape[1])]
        empty = latents.video.new_zeros(len(latents.video), 0, self.config.size, self.config.size, 3)
        frames = torch.cat([empty, *pictures], 1)[:, self._skip(latents.video, state.latents.video) :]
        knots = self._carry(self.knots(latents.audio)[:, self._skip(latents.audio, state.latents.audio) :], state)
        samples = self.bank(knots, self.clock.mels(range(state.latents.audio, state.latents.audio + 1)).start)
        state.latents = state.latents.map(lambda seen, new: seen + new.shape[1], latents)
        return AV(frames, samples).map(lambda signal: signal.clamp(-1, 1))

    def tokens(self, frames: Tensor) -> Tensor:
        """Encode every eight frames to one video latent. Shapes: [B, 8F, H, W, 3] -> [B, F, h, w, c]."""
        pixels = rearrange(frames, "b (f t) h w c -> (b f) (t c) h w", t=self.clock.video_stride)
        tokens = self.encoders[0](pixels.contiguous(memory_format=torch.channels_last)).to(frames)
        return self._normalise(0, rearrange(tokens, "(b f) c h w -> b f h w c", b=len(frames)))

    def frames(self, latents: Tensor) -> Tensor:
        """Decode every video latent to its eight frames, unclamped. Shapes: [B, F, h, w, c] -> [B, 8F, H, W, 3]."""
        pixels = self.decoders[0](rearrange(latents, "b f h w c -> (b f) c h w")).to(latents)
        return rearrange(pixels, "(b f) (t c) h w -> b (f t) h w c", b=len(latents), t=self.clock.video_stride)

    def knots(self, latents: Tensor) -> Tensor:
        """Decode every audio latent to its four knots of amplitudes. Shapes: [B, T, c] -> [B, 4T, k]."""
        return self.decoders[1](latents)

    def _encode_video(self, frames: Tensor, state: EncodeState) -> Tensor:
        size, stride = self.config.size, self.clock.video_stride
        if frames.shape[2:] != (size, size, 3):
            raise ValueError(f"frames are {size} x {size} x 3, found {tuple(frames.shape[2:])}: resize them first")
        if not frames.shape[1]:
            return frames.new_zeros(len(frames), 0, *self.grid, self.channels.video)
        missing = stride - 1 if state.latents.video == 0 else 0
        if (frames.shape[1] + missing) % stride:
            raise ValueError(f"frames must be {stride}k + {(-missing) % stride}, found {frames.shape[1]}")
        return self.tokens(torch.cat([frames[:, :1].expand(-1, missing, -1, -1, -1), frames], 1))

    def _encode_audio(self, samples: Tensor, state: EncodeState) -> Tensor:
        hops, stride = divmod(samples.shape[1], self.clock.hop), self.clock.audio_stride
        missing = stride - 1 if state.latents.audio == 0 and samples.shape[1] else 0
        if hops[1] or (hops[0] + missing) % stride:
            unit, rest = stride * self.clock.hop, self.clock.hop if missing else 0
            raise ValueError(f"samples must be {unit}k + {rest}, found {samples.shape[1]}")
        heard = samples.new_zeros(len(samples), self.analysis.context) if state.heard is None else state.heard
        # the first latent is one hop: silence stands in for the three hops before the clip
        samples = torch.cat([heard, samples.new_zeros(len(samples), missing * self.clock.hop), samples], 1)
        state.heard = samples[:, samples.shape[1] - self.analysis.context :]
        if hops[0] == 0:
            return samples.new_zeros(len(samples), 0, self.channels.audio)
        return self._normalise(1, self.encoders[1](self.analysis(samples)))

    def _normalise(self, stream: int, latents: Tensor) -> Tensor:
        return self.scales[stream](latents.flatten(0, 1).flatten(1)).reshape(latents.shape)

    def _skip(self, latents: Tensor, seen: int) -> int:
        stride = self.clock.video_stride if latents.ndim == 5 else self.clock.audio_stride
        return stride - 1 if seen == 0 and latents.shape[1] else 0

    def _carry(self, knots: Tensor, state: DecodeState) -> Tensor:
        # before the clip the bank sounds as it does at its first knot: starting from silence would be heard as an onset
        knots = torch.cat([knots[:, :1] if state.knots is None else state.knots, knots], 1)
        state.knots = knots[:, -1:] if knots.shape[1] else None
        return knots

    def _check_latents(self, latents: AV[Tensor]) -> None:
        expected = AV((*self.grid, self.channels.video), (self.channels.audio,))
        for name, stream, shape in zip(AV._fields, latents, expected, strict=True):
            if stream.shape[2:] != shape:
                raise ValueError(f"{name} latents are {shape} each, found {tuple(stream.shape[2:])}")


def save_codec(codec: TinyCodec, path: str | os.PathLike[str], metrics: Mapping[str, float] | None = None) -> Path:
    """Write weights and the JSON metadata `config` and `metrics` to one safetensors file, atomically."""
    config = {"format": FORMAT, "codec": asdict(codec.config), "clock": asdict(codec.clock)}
    config["codec"]["channels"] = list(codec.channels)
    metadata = {"config": json.dumps(config), "metrics": json.dumps(dict(metrics or codec.metrics))}
    return write_tensors(path, {name: stored(tensor) for name, tensor in codec.state_dict().items()}, metadata)


def stored(tensor: Tensor) -> Tensor:
    """Halve the weights: convolutions and matrices go to the file in float16, everything else as it is."""
    return (tensor.half() if tensor.ndim > 1 else tensor).detach().cpu().contiguous()


def load_codec(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> TinyCodec:
    """Read a codec written by `save_codec`, ready to use: float32, frozen, in evaluation mode.

    Raises:
        ValueError: not such a file, or its tensors do not fit its config.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}): `omniforcing train codec` makes one"
        ) from error
    config = json.loads(metadata.get("config", "{}"))
    if config.get("format") != FORMAT:
        raise ValueError(f"{path}: metadata 'config' is of format {config.get('format')!r}, expected {FORMAT!r}")
    codec = TinyCodec(CodecConfig(**config["codec"]), Clock(**config["clock"]))
    try:
        codec.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path}: tensors do not fit the config in its metadata: {error}") from error
    codec.metrics = json.loads(metadata.get("metrics", "{}"))
    return codec.requires_grad_(False).eval().to(device)


def codec_of(model: str | os.PathLike[str], notes: Mapping[str, object]) -> Path:
    """Find the codec of whose latents a miniature was made: the one that its notes name, or the shipped one.

    Args:
        model: the checkpoint; its folder is looked through first, then `data`.
        notes: of its metadata.

    Raises:
        ValueError: the codec is in neither.
    """
    if not notes.get("codec"):
        return SHIPPED
    name, digest = _named(notes)
    folders = Path(model).parent, DATA
    for path in (*(folder / name for folder in folders), *DATA.glob("codec*.safetensors")):
        if _is(path, digest):
            return path
    raise ValueError(f"{_latents(model, notes)}, which is neither beside it nor in data/: put that file beside it")


def check_codec(model: str | os.PathLike[str], notes: Mapping[str, object], codec: str | os.PathLike[str]) -> None:
    """Refuse a codec that is not the one of whose latents a miniature was made, see `codec_of`.

    Raises:
        ValueError: with both.
    """
    if not _is(Path(codec), _named(notes)[1]):
        raise ValueError(
            f"{_latents(model, notes)}, found the codec {codec}: name the one that the model was made with (--codec)"
        )


def _named(notes: Mapping[str, object]) -> tuple[str, str]:
    """Give the name of the notes' codec and the start of its SHA-256; notes without one are of the shipped codec."""
    named = notes.get("codec") or {"name": SHIPPED.name, "sha256": sha256(SHIPPED)}
    return named["name"], named["sha256"][:16]


def _latents(model: str | os.PathLike[str], notes: Mapping[str, object]) -> str:
    return "{} makes latents of {} (SHA-256 {}...)".format(model, *_named(notes))


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path).startswith(digest)


def shipped_codec(device: str | torch.device = "cpu") -> TinyCodec:
    """Load the codec of the miniature."""
    return load_codec(SHIPPED, device)
