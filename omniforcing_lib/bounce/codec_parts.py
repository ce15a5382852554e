"""The networks of the TinyCodec, each of one latent at a time, and the oscillator bank that sounds its knots.

Letters: N latents of any clips, B batch, T audio latents, m hops, t frames of a latent, p knots of a latent,
k oscillators, c channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from omniforcing_lib.layout import AV, Clock

WIDTHS = AV(32, 32)


@dataclass(frozen=True)
class CodecConfig:
    """Hold the shapes of a `TinyCodec`; stored as JSON in its file.

    Attributes:
        size: side of the square frame in pixels.
        patch: pixels a side of the square that one token of the latent grid stands on.
        channels: latent channels of each stream.
        encoder: convolution widths of the video encoder, fine to coarse.
        decoder: convolution widths of the video decoder, coarse to fine.
        per_frame: channels that a frame brings to the mixture of the frames of a latent.
        mixed: width of that mixture.
        hidden: width of the audio networks.
        base_hz: frequency of the lowest oscillator.
        oscillators: size of the bank, a semitone apart.
        windows: lengths in samples of the audio analysis windows, the longest first.
        quiet: amplitude below which the audio scale is linear, above which it is logarithmic.
    """

    size: int = 64
    patch: int = 16
    channels: AV[int] = WIDTHS
    encoder: tuple[int, ...] = (32, 48, 64)
    decoder: tuple[int, ...] = (64, 48, 32, 16)
    per_frame: int = 24
    mixed: int = 128
    hidden: int = 192
    base_hz: float = 220.0
    oscillators: int = 62
    windows: tuple[int, ...] = (1024, 320, 96)
    quiet: float = 0.003

    def __post_init__(self) -> None:
        for name in ("encoder", "decoder", "windows"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "channels", AV(*self.channels))
        if self.size % self.patch:
            raise ValueError(f"size {self.size} is not a multiple of patch {self.patch}")
        if self.patch != 2 ** (len(self.encoder) + 1) or self.patch != 2 ** len(self.decoder):
            raise ValueError(f"patch {self.patch} does not fit {len(self.encoder)} and {len(self.decoder)} widths")


class Residual(nn.Module):
    """Add a 3x3 and a 1x1 convolution to the input; starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + f(x). Shapes: [N, c, h, w] -> the same."""
        return x + self.out(F.silu(self.mix(F.silu(x))))


class VideoEncoder(nn.Module):
    """Turn the frames of one latent into its tokens: every frame alone, then all of them together."""

    def __init__(self, config: CodecConfig, frames: int) -> None:
        super().__init__()
        self.frames = frames
        fine, *rest = widths = config.encoder
        layers: list[nn.Module] = [nn.PixelUnshuffle(4), nn.Conv2d(48, fine, 3, padding=1), Residual(fine)]
        for before, width in zip(widths, rest, strict=False):
            layers += [nn.Conv2d(before, width, 2, stride=2), Residual(width)]
        self.image = nn.Sequential(*layers, Residual(widths[-1]), nn.Conv2d(widths[-1], config.per_frame, 1))
        self.mix = nn.Sequential(
            nn.Conv2d(config.per_frame * frames, config.mixed, 1),
            Residual(config.mixed),
            Residual(config.mixed),
            nn.Conv2d(config.mixed, config.channels.video, 3, padding=1),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode. Shapes: [N, 3t, H, W] -> [N, c, h, w]."""
        features = self.image(rearrange(pixels, "n (t c) h w -> (n t) c h w", t=self.frames))
        return self.mix(rearrange(features, "(n t) c h w -> n (t c) h w", t=self.frames))


class VideoDecoder(nn.Module):
    """Turn the tokens of one latent into its frames: split them in time, then draw every frame alone.

    One network draws all frames, so it learns what a frame is eight times as fast as one that draws eight at once.
    """

    def __init__(self, config: CodecConfig, frames: int) -> None:
        super().__init__()
        self.frames = frames
        coarse, *rest = widths = config.decoder
        self.mix = nn.Sequential(
            nn.Conv2d(config.channels.video, config.mixed, 3, padding=1),
            Residual(config.mixed),
            Residual(config.mixed),
            nn.Conv2d(config.mixed, coarse * frames, 1),
        )
        layers: list[nn.Module] = [Residual(coarse)]
        for before, width in zip(widths, rest, strict=False):
            layers += [Residual(before), nn.Conv2d(before, 4 * width, 1), nn.PixelShuffle(2)]
        pixels = nn.Conv2d(widths[-1], 12, 3, padding=1)
        # most of the world is dark: begin there
        nn.init.constant_(pixels.bias, -0.9)
        self.image = nn.Sequential(*layers, Residual(widths[-1]), pixels, nn.PixelShuffle(2))

    def forward(self, tokens: Tensor) -> Tensor:
        """Decode. Shapes: [N, c, h, w] -> [N, 3t, H, W]."""
        features = rearrange(self.mix(tokens), "n (t c) h w -> (n t) c h w", t=self.frames)
        return rearrange(self.image(features), "(n t) c h w -> n (t c) h w", t=self.frames)


class Analysis(nn.Module):
    """Measure how loud each note of the bank is in windows that end with each hop."""

    def __init__(self, config: CodecConfig, clock: Clock) -> None:
        super().__init__()
        self.hop, self.quiet, self.windows = clock.hop, config.quiet, config.windows
        for length in config.windows:
            angle = torch.outer(torch.arange(length, dtype=torch.float64), bank_cycles(config, clock)) * 2 * math.pi
            window = torch.hann_window(length, dtype=torch.float64)[:, None]
            kernel = torch.cat([angle.cos(), angle.sin()], 1) * window * 2 / window.sum()
            self.register_buffer(f"kernel{length}", kernel.float(), persistent=False)

    @property
    def context(self) -> int:
        """Samples before a hop that its windows reach back to."""
        return max(self.windows) - self.hop

    @property
    def features(self) -> int:
        """Numbers per hop: the notes in each window, and the loudness of four parts of the hop."""
        return sum(getattr(self, f"kernel{length}").shape[1] // 2 for length in self.windows) + 4

    def forward(self, samples: Tensor) -> Tensor:
        """Return compressed loudness. Shapes: samples [B, context + 160 m] -> [B, m, features]."""
        frames = samples.unfold(-1, self.context + self.hop, self.hop)
        notes = [self._notes(frames, length) for length in self.windows]
        parts = rearrange(frames[..., -self.hop :], "b m (part s) -> b m part s", part=4)
        return torch.cat([*notes, self._compress(parts.pow(2).mean(-1).add(1e-12).sqrt())], -1)

    def _notes(self, frames: Tensor, length: int) -> Tensor:
        cos, sin = (frames[..., -length:] @ getattr(self, f"kernel{length}")).chunk(2, -1)
        return self._compress((cos**2 + sin**2 + 1e-12).sqrt())

    def _compress(self, amplitude: Tensor) -> Tensor:
        return torch.log1p(amplitude / self.quiet) / 2


class AudioEncoder(nn.Module):
    """Turn the analysis of the hops of one latent into the latent."""

    def __init__(self, config: CodecConfig, features: int, knots: int) -> None:
        super().__init__()
        self.knots = knots
        self.hop = nn.Linear(features, config.hidden // 2)
        self.join = nn.Linear(config.hidden // 2 * knots, config.hidden)
        self.out = nn.Linear(config.hidden, config.channels.audio)

    def forward(self, features: Tensor) -> Tensor:
        """Return raw latents. Shapes: [B, pT, features] -> [B, T, c]."""
        hops = rearrange(F.silu(self.hop(features)), "b (t p) c -> b t (p c)", p=self.knots)
        return self.out(F.silu(self.join(hops)))


class AudioDecoder(nn.Module):
    """Turn each latent into knots: amplitudes of the bank at the end of each of its hops."""

    BIAS = -2.0
    """Of the last layer at the start: nearly silent, where a softplus still passes a gradient."""

    def __init__(self, config: CodecConfig, knots: int) -> None:
        super().__init__()
        self.knots, self.quiet = knots, config.quiet
        self.layers = nn.Sequential(
            nn.Linear(config.channels.audio, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, knots * config.oscillators),
        )
        nn.init.constant_(self.layers[-1].bias, self.BIAS)

    def forward(self, latents: Tensor) -> Tensor:
        """Return amplitudes in [0, 1]. Shapes: [B, T, c] -> [B, pT, k]."""
        loudness = rearrange(F.softplus(self.layers(latents)), "b t (p k) -> b (t p) k", p=self.knots)
        return self.quiet * torch.expm1(loudness.clamp(max=math.log1p(1 / self.quiet)))


class OscillatorBank(nn.Module):
    """Sound fixed notes whose phase depends on the absolute sample index alone."""

    def __init__(self, config: CodecConfig, clock: Clock) -> None:
        super().__init__()
        self.hop, self.cycles = clock.hop, bank_cycles(config, clock)
        angle = torch.outer(self.cycles, torch.arange(self.hop, dtype=torch.float64)) * 2 * math.pi
        rise = torch.arange(1, self.hop + 1, dtype=torch.float64) / self.hop
        tables = [wave * ramp for ramp in (1 - rise, rise) for wave in (angle.cos(), angle.sin())]
        self.register_buffer("table", torch.cat(tables).float(), persistent=False)

    def forward(self, knots: Tensor, first_hop: int) -> Tensor:
        """Interpolate between knots. Shapes: knots [B, m + 1, k], the first one the carried one -> [B, 160 m].

        sin(a + b) is split over the phase a at the start of a hop, reduced in float64 so that an hour changes
        nothing, and the phase b inside the hop, which is a table: the whole bank is one matrix product.
        """
        hops = (first_hop + torch.arange(max(0, knots.shape[1] - 1), dtype=torch.float64)) * self.hop
        turn = torch.outer(hops, self.cycles).remainder(1) * 2 * math.pi
        sin, cos = (part.to(knots) for part in (turn.sin(), turn.cos()))
        before, after = knots[:, :-1], knots[:, 1:]
        waves = torch.cat([before * sin, before * cos, after * sin, after * cos], -1) @ self.table
        return rearrange(waves, "b m s -> b (m s)")


def bank_cycles(config: CodecConfig, clock: Clock) -> Tensor:
    """Return the cycles per sample of each oscillator, a semitone apart. Shapes: [k] float64."""
    semitones = torch.arange(config.oscillators, dtype=torch.float64)
    return config.base_hz * 2 ** (semitones / 12) / clock.sample_rate
