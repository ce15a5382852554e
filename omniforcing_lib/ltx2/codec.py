"""LTX-2's own autoencoders and vocoder (diffusers' classes) behind the `Codec` protocol, whole or as a stream.

LTX-2's video decoder is not causal: its convolutions look some 22 latents, 7 seconds, ahead. `horizon` shortens that
wait at a loss of fidelity that `stream_error` measures. In a stream its convolutions carry their past (`carried`). Its
audio decoder is causal, and its vocoder looks a fraction of a second ahead; both decode by overlap and crop
(`overlap`). Frames and samples of one time leave together; with a `TinyDecoder` frames leave at once, and their samples
follow.

Letters: B batch, F video latents, T audio latents, f frames, n samples, t mel frames, m mel bins, c channels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from omniforcing_lib.layout import AV, Clock
from omniforcing_lib.ltx2 import parts
from omniforcing_lib.ltx2.carried import Carried
from omniforcing_lib.ltx2.overlap import Chain, Layer, Overlap, Tail, convolution, repeated, transposed
from omniforcing_lib.ltx2.tiny import TinyDecoder, load_tiny_decoder

START = AV(0, 0)
LONGEST = 1_000_000  # outputs that a decoder without an end to its reach waits for: more than any clip has
N_FFT, QUIETEST = 1024, 1e-5  # of the mel spectrogram that the audio encoder takes (specification 2)


@dataclass
class LTX2DecodeState:
    """Where a streamed decoding stands: three overlaps, what one stream holds back for the other, what has left.

    Attributes:
        video: latents to frames.
        mel: latents to mel frames.
        wave: mel frames to samples.
        waiting: frames and samples that wait for the other stream.
        given: frames and samples that have left.
    """

    video: Tail = field(default_factory=Tail)
    mel: Tail = field(default_factory=Tail)
    wave: Tail = field(default_factory=Tail)
    waiting: AV[Tensor] | None = None
    given: AV[int] = START

    def shown(self, clock: Clock) -> int:
        """Frames given so far."""
        return self.given.video

    def tensors(self) -> dict[str, Tensor]:
        """Give all of it as named tensors, to be stored."""
        tails = {"video": self.video, "mel": self.mel, "wave": self.wave}
        counts = [n for tail in tails.values() for n in (tail.start, tail.given)]
        stored = {name: tail.kept for name, tail in tails.items() if tail.kept is not None}
        stored |= {f"video.{i}": tensor for i, tensor in enumerate(self.video.layers)}
        if self.waiting is not None:
            stored |= {f"held_{name}": part for name, part in self.waiting._asdict().items()}
        stored["counts"] = torch.tensor([*counts, *self.given])
        return {f"decoder.{name}": tensor for name, tensor in stored.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], device: str | torch.device = "cpu") -> LTX2DecodeState:
        """Continue a decoding from what `tensors` stored."""
        stored = {n.removeprefix("decoder."): t.to(device) for n, t in tensors.items() if n.startswith("decoder.")}
        *counts, frames, samples = stored["counts"].tolist()
        spans = zip(("video", "mel", "wave"), counts[::2], counts[1::2], strict=True)
        tails = {name: Tail(stored.get(name), start, given) for name, start, given in spans}
        tails["video"].layers = [stored[f"video.{i}"] for i in range(sum(n.startswith("video.") for n in stored))]
        waiting = AV(stored["held_video"], stored["held_audio"]) if "held_video" in stored else None
        return cls(**tails, waiting=waiting, given=AV(frames, samples))


class LTX2Codec(nn.Module):
    """Encode clips to LTX-2's latents and decode them, whole or as a stream (specification 2).

    Args:
        video: diffusers' `AutoencoderKLLTX2Video`.
        audio: diffusers' `AutoencoderKLLTX2Audio`.
        vocoder: diffusers' `LTX2Vocoder` (24 kHz) or `LTX2VocoderWithBWE` (48 kHz).
        size: height and width of the frames, multiples of 32.
        horizon: video latents that a streamed frame waits for at most; None waits for all, and equals the whole decode.
        tiny: decodes the picture instead of `video`, which goes on encoding; it waits for nothing.

    Attributes:
        grid: tokens of a video latent.
        channels: of a latent of each stream.
        clock: of what `decode` gives.
        input_clock: of what `encode` takes, at 16 kHz.
    """

    def __init__(
        self,
        video: nn.Module,
        audio: nn.Module,
        vocoder: nn.Module,
        size: tuple[int, int] = (512, 768),
        *,
        horizon: int | None = None,
        tiny: TinyDecoder | None = None,
    ) -> None:
        super().__init__()
        self.video, self.audio, self.vocoder, self.tiny = video, audio, vocoder, tiny
        config = audio.config
        self.input_clock = Clock(mel_rate=config.sample_rate // config.mel_hop_length, sample_rate=config.sample_rate)
        self.clock = Clock(mel_rate=self.input_clock.mel_rate, sample_rate=vocoder.config.output_sampling_rate)
        self.size, patch = tuple(size), video.spatial_compression_ratio
        if any(side < 2 * patch or side % patch for side in size):
            raise ValueError(f"frames have sides of 2 or more multiples of {patch}, found {size[0]} x {size[1]}")
        self.grid: tuple[int, int] = (size[0] // patch, size[1] // patch)
        self.mels = config.mel_bins // audio.mel_compression_ratio
        self.channels = AV(video.config.latent_channels, config.latent_channels * self.mels)
        if _diffuses(video.decoder) and any(
            n < least for n, least in zip(self.grid, video.decoder.det_stages[0][0].attn.kernel_size[1:], strict=True)
        ):
            least = " x ".join(str(n * patch) for n in video.decoder.det_stages[0][0].attn.kernel_size[1:])
            raise ValueError(f"the diffusion decoder takes frames of {least} or more, found {size[0]} x {size[1]}")
        self._check()
        if tiny and (tiny.channels, horizon) != (self.channels.video, None):
            found = f"latents of {tiny.channels} channels and horizon {horizon}"
            raise ValueError(f"a tiny decoder takes the VAE's {self.channels.video} channels and no horizon; {found}")
        strides = AV(self.clock.video_stride, self.clock.audio_stride)
        how = self._frames, video_chain(video.decoder), strides.video, strides.video - 1, (*self.size, 3), horizon
        self.overlaps = AV(
            tiny or (Overlap(*how) if _diffuses(video.decoder) else Carried(*how, decoder=video.decoder)),
            Overlap(self._mel, audio_chain(audio.decoder), strides.audio, strides.audio - 1, (2, config.mel_bins)),
        )
        self.waves = Overlap(self._samples, vocoder_chain(vocoder), self.clock.hop, shape=(2,))

    @property
    def delays(self) -> AV[Fraction]:
        """Seconds that each stream of a streamed decoding lags behind its latents; both leave with the later one."""
        wave = Fraction(self.waves.delay, self.clock.sample_rate)
        return AV(
            Fraction(self.overlaps.video.delay, self.clock.fps),
            wave + Fraction(self.overlaps.audio.delay, self.clock.mel_rate),
        )

    def start(self) -> LTX2DecodeState:
        """Begin a streamed decoding."""
        return LTX2DecodeState()

    @torch.no_grad()
    def encode(self, clip: AV[Tensor]) -> AV[Tensor]:
        """Encode a clip to normalised latents, the means of the posteriors.

        Shapes: video [B, f, H, W, 3], audio [B, n] or [B, n, 2] at 16 kHz, both in [-1, 1] -> AV([B, F, h, w, c],
        [B, T, c]).

        Raises:
            ValueError: frames that are not 8k + 1 or of another size, samples that are not 4k + 1 mel hops.
        """
        frames, samples = clip
        if frames.shape[2:] != (*self.size, 3):
            raise ValueError(f"frames are {(*self.size, 3)}, found {tuple(frames.shape[2:])}: resize them first")
        self.clock.video_latents_of(frames.shape[1])
        mel = _like(self.spectrogram(samples), self.audio)
        audio = rearrange(self.audio.encode(mel).latent_dist.mode(), "b c t m -> b t (c m)")
        return AV(self.encode_frames(frames), (audio - self.audio.latents_mean) / self.audio.latents_std)

    @torch.no_grad()
    def encode_frames(self, frames: Tensor) -> Tensor:
        """Encode the picture alone. Shapes: [B, f, H, W, 3] in [-1, 1] -> [B, F, h, w, c]."""
        video = self.video.encode(_like(rearrange(frames, "b f h w c -> b c f h w"), self.video)).latent_dist.mode()
        video = rearrange(video, "b c f h w -> b f h w c")
        return (video - self.video.latents_mean) * self.video.config.scaling_factor / self.video.latents_std

    def spectrogram(self, samples: Tensor) -> Tensor:
        """Give the log-mel spectrogram that the audio encoder takes: 64 Slaney bins, n_fft 1024, hop 160.

        Shapes: [B, n] or [B, n, 2] at 16 kHz, n = (4k + 1) hops -> [B, 2, 4k + 1, m]; mono goes to both channels.

        Raises:
            ValueError: another number of samples.
        """
        stereo = samples[..., None].expand(-1, -1, 2) if samples.ndim == 2 else samples
        hops, rest = divmod(samples.shape[1], self.input_clock.hop)
        if rest or hops % self.input_clock.audio_stride != 1:
            unit, one = self.input_clock.audio_stride * self.input_clock.hop, self.input_clock.hop
            raise ValueError(
                f"samples must be {unit}k + {one} at {self.input_clock.sample_rate} Hz, found {samples.shape[1]}"
            )
        flat = rearrange(stereo, "b n c -> (b c) n").float()
        flat = torch.nn.functional.pad(flat, (0, max(0, N_FFT // 2 + 1 - flat.shape[1])))
        window = torch.hann_window(N_FFT, device=flat.device)
        spectrum = torch.stft(flat, N_FFT, self.input_clock.hop, window=window, return_complex=True).abs()[..., :hops]
        mel = torch.log((self._filters().to(flat) @ spectrum).clamp_min(QUIETEST))
        return rearrange(mel, "(b c) m t -> b c t m", c=2)

    @torch.no_grad()
    def decode(self, latents: AV[Tensor], state: LTX2DecodeState | None = None) -> AV[Tensor]:
        """Decode latents whole, or the next ones of a stream when a state is given, which is updated.

        In a stream frames and samples come `delays` later than their latents; `finish` gives what is left.

        Shapes: AV([B, F, h, w, c], [B, T, c]) -> video [B, f, H, W, 3], audio [B, n, 2], float32.

        Raises:
            ValueError: latents of another grid or width.
        """
        expected = AV((*self.grid, self.channels.video), (self.channels.audio,))
        for name, stream, shape in zip(AV._fields, latents, expected, strict=True):
            if stream.shape[2:] != shape:
                raise ValueError(f"{name} latents are {shape} each, found {tuple(stream.shape[2:])}")
        return self._advance(latents, self.start(), last=True) if state is None else self._advance(latents, state)

    @torch.no_grad()
    def finish(self, state: LTX2DecodeState) -> AV[Tensor]:
        """Give the remaining frames and samples of a stream, up to the last one of each.

        Shapes: as those of `decode`; empty where no latent came.
        """
        none = AV(torch.zeros(1, 0, *self.grid, self.channels.video), torch.zeros(1, 0, self.channels.audio))
        inputs = AV(state.video.kept, state.mel.kept)
        return self._advance(none.map(lambda empty, x: empty if x is None else x[:, :0], inputs), state, last=True)

    def _advance(self, latents: AV[Tensor], state: LTX2DecodeState, *, last: bool = False) -> AV[Tensor]:
        # 1. Each stream gives what depends on no later latent.
        frames = self.overlaps.video.step(state.video, latents.video, last=last)
        mel = self.overlaps.audio.step(state.mel, latents.audio, last=last)
        ready = AV(frames, self.waves.step(state.wave, mel, last=last))
        if state.waiting is not None:
            ready = ready.map(lambda new, waiting: torch.cat([waiting, new], 1), state.waiting)
        # 2. Frames leave with their samples, up to the time that both streams have reached; tiny ones wait for none.
        ends = ready.map(lambda part, given: given + part.shape[1], state.given)
        if not last and not self.tiny:
            shared = min(ends.video, self.clock.frames_of(ends.audio))
            ends = AV(shared, self.clock.samples_of(shared))
        count = ends.map(lambda end, given: max(0, end - given), state.given)
        state.waiting = ready.map(lambda part, n: part[:, n:], count)
        state.given = state.given.map(int.__add__, count)
        return ready.map(lambda part, n: part[:, :n], count)

    def _frames(self, latents: Tensor, decoder: Callable[..., Tensor] | None = None) -> Tensor:
        raw = latents * self.video.latents_std / self.video.config.scaling_factor + self.video.latents_mean
        # the same noise for the same latents, wherever a diffusion decoder runs
        noise = {"generator": torch.Generator().manual_seed(0)} if _diffuses(self.video.decoder) else {}
        decoder = decoder or self.video.decoder
        pixels = decoder(_like(rearrange(raw, "b f h w c -> b c f h w"), self.video), **noise)
        return rearrange(pixels, "b c f h w -> b f h w c").float().clamp(-1, 1)

    def _mel(self, latents: Tensor) -> Tensor:
        raw = latents * self.audio.latents_std + self.audio.latents_mean
        mel = self.audio.decoder(_like(rearrange(raw, "b t (c m) -> b c t m", m=self.mels), self.audio))
        return rearrange(mel, "b c t m -> b t c m")

    def _samples(self, mel: Tensor) -> Tensor:
        wave = self.vocoder(_like(rearrange(mel, "b t c m -> b c t m"), self.vocoder))
        return rearrange(wave, "b c n -> b n c").float().clamp(-1, 1)

    def _filters(self) -> Tensor:
        from transformers.audio_utils import mel_filter_bank

        rate, bins = self.input_clock.sample_rate, self.audio.config.mel_bins
        bank = mel_filter_bank(N_FFT // 2 + 1, bins, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
        return torch.from_numpy(bank.T.copy())

    def _check(self) -> None:
        """Refuse, by a ValueError, what would be decoded wrong: another clock, noise or time steps in the decoder."""
        video, audio = self.video.config, self.audio.config
        settings = {
            "vae.timestep_conditioning": (video.timestep_conditioning, False),
            "vae.decoder_inject_noise": (bool(np.any(video.decoder_inject_noise)), False),
            "vae.patch_size_t": (video.patch_size_t, 1),
            "vae temporal compression": (self.video.temporal_compression_ratio, self.clock.video_stride),
            "audio_vae temporal compression": (self.audio.temporal_compression_ratio, self.clock.audio_stride),
            "audio_vae.causality_axis": (audio.causality_axis, "height"),
            "audio_vae.mid_block_add_attention": (audio.mid_block_add_attention, False),
            "audio_vae.attn_resolutions": (bool(audio.attn_resolutions), False),
            "audio_vae.latents_mean": (len(self.audio.latents_mean), self.channels.audio),
            "vocoder samples per mel frame": (_samples_per_mel(self.vocoder), self.clock.hop),
        }
        for name, (value, expected) in settings.items():
            if value != expected:
                raise ValueError(f"{name} is {value!r}; only {expected!r} is supported")


def load_ltx2_codec(
    source: parts.Source,
    size: tuple[int, int] = (512, 768),
    *,
    horizon: int | None = None,
    tiny: str | os.PathLike[str] = "",
    **place: torch.device | torch.dtype,
) -> LTX2Codec:
    """Load the codec of an LTX-2 single file or diffusers folder, frozen; `place` is that of `Module.to`.

    `tiny` names the file of a tiny decoder, see `load_tiny_decoder`.

    The vocoder computes in float32 whatever the dtype: in bfloat16, the wave of a tiny random one with bandwidth
    extension is off by 7 % (rms).

    Raises:
        ValueError: a part that is missing, does not fit its config, or that `LTX2Codec` refuses.
    """
    video, audio = (parts.load(source, part, **place) for part in ("vae", "audio_vae"))
    vocoder = parts.load(source, "vocoder", **place | {"dtype": torch.float32})
    decoder = load_tiny_decoder(tiny, size, **place) if tiny else None
    return LTX2Codec(video, audio, vocoder, size, horizon=horizon, tiny=decoder)


def stream_error(codec: LTX2Codec, latents: AV[Tensor], whole: Tensor | None = None) -> float:
    """Measure what a shorter wait costs: PSNR in dB of a codec's streamed frames against LTX-2's own whole decode.

    The codec has a `horizon` or a tiny decoder. The peak is 2, as frames lie in [-1, 1]; inf where they are equal.

    Shapes: latents as in `LTX2Codec.decode`, one latent a step; `whole` [B, f, H, W, 3], where it is known.
    """
    step, state = codec.overlaps.video.step, codec.start()
    with torch.no_grad():
        pieces = [step(state.video, part) for part in latents.video.split(1, 1)]
        pieces.append(step(state.video, latents.video[:, :0], last=True))
        whole = codec._frames(latents.video) if whole is None else whole
    error = (torch.cat(pieces, 1) - whole).square().mean()
    return (10 * torch.log10(4 / error)).item()


def video_chain(decoder: nn.Module) -> Chain:
    """List what diffusers' `LTX2VideoDecoder3d` sees along time: its submodules stand in the order they run in.

    LTX-2.5's diffusion decoder moves its windows at the clip's ends, and so sees all of the clip.
    """
    if _diffuses(decoder):
        return [convolution(2 * LONGEST + 1, LONGEST)]
    layers: list[Layer] = []
    for name, module in decoder.named_modules():
        if type(module).__name__ != "LTX2VideoCausalConv3d":
            continue
        kernel = module.kernel_size[0]
        layers.append(convolution(kernel, kernel - 1 if decoder.is_causal else (kernel - 1) // 2))
        parent = decoder.get_submodule(name.rpartition(".")[0])
        if type(parent).__name__ == "LTX2VideoUpsampler3d":
            layers.append(repeated(parent.stride[0], parent.stride[0] - 1))
    return layers


def _diffuses(decoder: nn.Module) -> bool:
    return hasattr(decoder, "conv_in_x_t")


def audio_chain(decoder: nn.Module) -> Chain:
    """List what diffusers' `LTX2AudioDecoder` sees along time; its levels run from the last to the first."""

    def convolutions(module: nn.Module) -> Iterator[Layer]:
        for name, layer in module.named_modules():
            if type(layer).__name__ == "LTX2AudioCausalConv2d" and "shortcut" not in name:
                kernel, dilation = layer.conv.kernel_size[0], layer.conv.dilation[0]
                yield convolution(kernel, layer.padding[2], dilation)

    layers = [*convolutions(decoder.conv_in), *convolutions(decoder.mid)]
    for stage in reversed(decoder.up):
        layers += convolutions(stage.block)
        if hasattr(stage, "upsample"):
            layers += [repeated(2, 0), *convolutions(stage.upsample), Layer(1, 1)]
    return [*layers, *convolutions(decoder.conv_out)]


def vocoder_chain(vocoder: nn.Module) -> Chain:
    """List what diffusers' `LTX2Vocoder`, or `LTX2VocoderWithBWE`, sees along time."""
    if hasattr(vocoder, "bwe_generator"):
        stft = vocoder.mel_stft.stft_fn
        before = max(0, stft.window_length - stft.hop_length)
        heard = convolution(stft.forward_basis.shape[-1], before, stride=stft.hop_length)
        finer = [heard, *vocoder_chain(vocoder.bwe_generator)]
        return [*vocoder_chain(vocoder.vocoder), [finer, [_upsample(vocoder.resampler)]]]
    layers = [_same(vocoder.conv_in)]
    for index, up in enumerate(vocoder.upsamplers):
        blocks = vocoder.resnets[index * vocoder.resnets_per_upsample :][: vocoder.resnets_per_upsample]
        layers += [transposed(up.kernel_size[0], up.stride[0], up.padding[0]), [_resnet(block) for block in blocks]]
    return [*layers, *_activation(vocoder.act_out), _same(vocoder.conv_out)]


def _resnet(block: nn.Module) -> Chain:
    parts = zip(block.acts1, block.convs1, block.acts2, block.convs2, strict=True)
    return [x for a, b, c, d in parts for x in (*_activation(a), _same(b), *_activation(c), _same(d))]


def _activation(module: nn.Module) -> list[Layer]:
    """An antialiased activation sees its neighbours, any other only its own step."""
    if not hasattr(module, "downsample"):
        return []
    down = module.downsample
    return [_upsample(module.upsample), convolution(down.kernel_size, down.pad_left, stride=down.ratio)]


def _upsample(module: nn.Module) -> Layer:
    return transposed(module.kernel_size, module.ratio, module.pad_left - module.pad * module.ratio)


def _same(conv: nn.Conv1d) -> Layer:
    kernel, dilation = conv.kernel_size[0], conv.dilation[0]
    return convolution(kernel, (kernel - 1) * dilation // 2, dilation)


def _samples_per_mel(vocoder: nn.Module) -> int:
    config, samples = vocoder.config, math.prod(vocoder.config.upsample_factors)
    is_extended = hasattr(vocoder, "bwe_generator")
    return samples * config.output_sampling_rate // config.input_sampling_rate if is_extended else samples


def _like(x: Tensor, module: nn.Module) -> Tensor:
    parameter = next(module.parameters())
    return x.to(parameter.device, parameter.dtype)
