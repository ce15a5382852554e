"""Integer arithmetic of time: how many frames, mel frames and samples a latent stands for, and which block it is in.

Two streams run on two clocks, always in the order video, audio. A *latent* is one step of the codec in time: a video
latent is 8 pixel frames (the first one 1), an audio latent is 4 mel frames (the first one 1). A *block* is the unit of
causality: the tokens of a block see each other, and no token sees a later block. Masks, places in the cache, RoPE
positions, noise levels by block and decoded spans all follow from the ranges given here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T", covariant=True)
R = TypeVar("R")


class AV(NamedTuple, Generic[T]):
    """Hold one thing for each stream, in the order video, audio."""

    video: T
    audio: T

    def map(self, fn: Callable[..., R], *others: AV) -> AV[R]:
        """Apply `fn` to the video entries and to the audio entries."""
        return AV(*map(fn, self, *others))


@dataclass(frozen=True)
class Clock:
    """Convert latents to frames, samples and seconds (specification 2; paper Sec. 3.1).

    Attributes:
        fps: pixel frames per second.
        video_stride: pixel frames per video latent, after the first.
        mel_rate: mel frames per second.
        audio_stride: mel frames per audio latent, after the first.
        sample_rate: samples per second of the decoded waveform.
    """

    fps: int = 24
    video_stride: int = 8
    mel_rate: int = 100
    audio_stride: int = 4
    sample_rate: int = 16_000

    def __post_init__(self) -> None:
        if self.sample_rate % self.mel_rate:
            raise ValueError(f"sample_rate {self.sample_rate} is not a multiple of mel_rate {self.mel_rate}")
        for rate, stride, name in ((self.fps, self.video_stride, "video"), (self.mel_rate, self.audio_stride, "audio")):
            if rate % stride:
                raise ValueError(f"{name} rate {rate} is not a multiple of its stride {stride}")

    @property
    def hop(self) -> int:
        """Samples per mel frame."""
        return self.sample_rate // self.mel_rate

    @property
    def latent_rate(self) -> AV[int]:
        """Latents per second: (3, 25) for LTX-2 at 24 fps."""
        return AV(self.fps // self.video_stride, self.mel_rate // self.audio_stride)

    def latents(self, seconds: int) -> AV[int]:
        """Latents of a clip of whole seconds: (3K + 1, 25K + 1), with nothing truncated (paper Sec. 3.1)."""
        if seconds != int(seconds) or seconds < 0:
            raise ValueError(f"a clip lasts a whole number of seconds (0, 1, 2, ...), found {seconds}")
        return self.latent_rate.map(lambda rate: rate * int(seconds) + 1)

    def video_latents_of(self, frames: int) -> int:
        """Video latents that hold `frames` pixel frames; `frames` must be 8k + 1."""
        if frames < 1 or (frames - 1) % self.video_stride:
            raise ValueError(f"pixel frames must be {self.video_stride}k + 1, found {frames}")
        return (frames - 1) // self.video_stride + 1

    def frames(self, latents: range) -> range:
        """Pixel frames that a range of video latents decodes to."""
        return _grow(latents, self.video_stride)

    def mels(self, latents: range) -> range:
        """Mel frames that a range of audio latents decodes to."""
        return _grow(latents, self.audio_stride)

    def samples(self, latents: range) -> range:
        """Waveform samples that a range of audio latents decodes to."""
        mels = self.mels(latents)
        return range(mels.start * self.hop, mels.stop * self.hop)

    def samples_of(self, frames: int) -> int:
        """Samples that go with the first `frames` pixel frames: one mel hop for the first, so 24K + 1 have K s."""
        return self.hop + round(Fraction((frames - 1) * self.sample_rate, self.fps)) if frames else 0

    def frames_of(self, samples: int) -> int:
        """Pixel frames whose sound is all among the first `samples`."""
        frames = max(0, (samples - self.hop) * self.fps // self.sample_rate + 2)
        return next(count for count in range(frames, -1, -1) if self.samples_of(count) <= samples)

    def seconds(self, latents: AV[range]) -> AV[tuple[Fraction, Fraction]]:
        """Exact start and end of a range of latents of each stream, in seconds."""
        frames, samples = self.frames(latents.video), self.samples(latents.audio)
        return AV(
            (Fraction(frames.start, self.fps), Fraction(frames.stop, self.fps)),
            (Fraction(samples.start, self.sample_rate), Fraction(samples.stop, self.sample_rate)),
        )

    def midpoints(self, latents: AV[range]) -> AV[list[float]]:
        """Middle of each latent in seconds: the temporal RoPE position (specification 1.8)."""
        strides, rates = AV(self.video_stride, self.audio_stride), AV(self.fps, self.mel_rate)
        return latents.map(
            lambda span, stride, rate: [(_grow_edge(i, stride) + _grow_edge(i + 1, stride)) / 2 / rate for i in span],
            strides,
            rates,
        )

    def edges(self, latents: AV[Tensor]) -> AV[Tensor]:
        """First pixel frame (video) and mel frame (audio) of latents whose numbers are tensors, on their device."""
        return latents.map(
            lambda i, stride: (stride * (i - 1) + 1).clamp_min(0), AV(self.video_stride, self.audio_stride)
        )


def _grow_edge(latent: int, stride: int) -> int:
    """First finer step of a latent: latent 0 is one step, latent i > 0 starts at stride (i - 1) + 1."""
    return max(0, stride * (latent - 1) + 1)


def _grow(latents: range, stride: int) -> range:
    return range(_grow_edge(latents.start, stride), _grow_edge(latents.stop, stride))


@dataclass(frozen=True)
class BlockLayout:
    """Cut both streams into aligned blocks (paper Sec. 3.1; specification 3).

    Attributes:
        first: latents of block 0, the global prefix.
        step: latents of every later block (one second).
        sinks: learnable audio tokens in front of the audio stream; they belong to block 0.
    """

    first: AV[int]
    step: AV[int]
    sinks: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", AV(*self.first))
        object.__setattr__(self, "step", AV(*self.step))
        if min(self.first.video, self.first.audio, self.step.video, self.step.audio) < 1:
            raise ValueError(f"a block holds at least one latent of each stream, found {self.first} and {self.step}")
        if self.sinks < 0:
            raise ValueError(f"the number of sinks is 0 or more, found {self.sinks}")

    def block(self, k: int) -> AV[range]:
        """Latents of the whole block `k` of each stream."""
        if k < 0:
            raise ValueError(f"blocks count from 0, found {k}")
        return self.first.map(
            lambda first, step: range(0, first) if k == 0 else range(first + (k - 1) * step, first + k * step),
            self.step,
        )

    def blocks(self, video_latents: int) -> tuple[AV[range], ...]:
        """Cut a clip into blocks; the last one may be partial, its audio rounded down (specification 3.2)."""
        if video_latents < self.first.video:
            raise ValueError(f"a clip holds block 0, {self.first.video} video latents, or more; found {video_latents}")
        *whole, (video, audio) = map(self.block, range(self.count(video_latents)))
        # only the last block can be partial
        if video.stop > video_latents:
            video = range(video.start, video_latents)
            audio = range(audio.start, audio.start + self.step.audio * len(video) // self.step.video)
        return (*whole, AV(video, audio))

    def count(self, video_latents: int) -> int:
        """Number of blocks of a clip, a partial last one counted."""
        return 1 + -(-(video_latents - self.first.video) // self.step.video)

    def audio_latents(self, video_latents: int) -> int:
        """Audio latents that go with a clip of `video_latents`."""
        return self.blocks(video_latents)[-1].audio.stop

    def check(self, latents: AV[int]) -> None:
        """Raise unless the two lengths belong together under this layout."""
        expected = self.audio_latents(latents.video)
        if latents.audio != expected:
            raise ValueError(
                f"{latents.video} video latents go with {expected} audio latents in layout "
                f"first={tuple(self.first)} step={tuple(self.step)}, found {latents.audio}"
            )

    def tokens(self, video_latents: int, tokens_per_frame: int) -> AV[tuple[range, ...]]:
        """Tokens of each block of a clip; sinks are the first tokens of audio block 0."""
        blocks = self.blocks(video_latents)
        return AV(
            tuple(range(v.start * tokens_per_frame, v.stop * tokens_per_frame) for v, _ in blocks),
            tuple(range(a.start + self.sinks * (k > 0), a.stop + self.sinks) for k, (_, a) in enumerate(blocks)),
        )

    def block_index(self, video_latents: int) -> AV[list[int]]:
        """Block number of every latent of a clip, for each stream; per-block values are spread with this."""
        return AV(*zip(*self.blocks(video_latents), strict=True)).map(
            lambda spans: [k for k, span in enumerate(spans) for _ in span]
        )


PAPER = BlockLayout(first=AV(1, 1), step=AV(3, 25), sinks=16)
RELEASED = BlockLayout(first=AV(4, 26), step=AV(3, 25), sinks=0)
LAYOUTS = {"paper": PAPER, "released": RELEASED}
