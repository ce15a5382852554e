"""Laws of LTX-2's codec: its reach is what its convolutions say, streamed equals whole, diffusers agrees throughout."""

from __future__ import annotations

from copy import copy, deepcopy
from dataclasses import fields
from fractions import Fraction
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import LTX2Pipeline
from diffusers.loaders.single_file_utils import convert_ltx2_audio_vae_to_diffusers, convert_ltx2_vae_to_diffusers
from diffusers.models.autoencoders.autoencoder_mmaudio import mel_filterbank
from safetensors.torch import load_file
from tiny_ltx2 import SIZE, VAE, configs, diffusers_folder, modules, shaken, tiny_decoder_file, whole_file
from torch.utils.flop_counter import FlopCounterMode

from omniforcing_lib.files import write_tensors
from omniforcing_lib.layout import AV, PAPER, RELEASED, Clock
from omniforcing_lib.ltx2 import part_configs
from omniforcing_lib.ltx2.codec import LTX2Codec, LTX2DecodeState, load_ltx2_codec, stream_error
from omniforcing_lib.ltx2.overlap import Overlap, Tail, convolution, needs, repeated, transposed
from omniforcing_lib.ltx2.tiny import TinyDecoder, load_tiny_decoder

VARIANTS = {"2.0": ("2.0", False), "2.3, 48 kHz": ("2.3", False), "causal decoder": ("2.0", True)}


def codec_of(version: str = "2.0", causal: bool = False, **rest) -> LTX2Codec:
    made = modules(version, causal=causal)
    return LTX2Codec(made["vae"], made["audio_vae"], made["vocoder"], SIZE, **rest)


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def codec(request) -> LTX2Codec:
    return codec_of(*request.param)


def latents(seconds: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> AV[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count = Clock().latents(seconds)
    shapes = AV((1, count.video, 2, 2, 16), (1, count.audio, 32))
    return shapes.map(lambda shape: torch.randn(shape, generator=generator, dtype=dtype))


def inputs_felt(decode, x: torch.Tensor, outputs: tuple[int, ...]) -> list[list[int]]:
    """Probe which inputs each output depends on: those with a gradient."""
    x = x.clone().requires_grad_(True)
    made = decode(x)
    gradients = (torch.autograd.grad(made[:, output].sum(), x, retain_graph=True)[0] for output in outputs)
    return [gradient.flatten(2).abs().sum(2)[0].nonzero().flatten().tolist() for gradient in gradients]


def test_what_an_output_needs_is_what_moves_it(codec):
    """The span read from the convolutions is the span with a gradient, input for input, in all three decoders."""
    double = LTX2Codec(*(m.double() for m in (codec.video, codec.audio, codec.vocoder)), SIZE)
    generator = torch.Generator().manual_seed(1)
    cases = [(double.overlaps.video, (2, 2, 16)), (double.overlaps.audio, (32,)), (double.waves, (2, 64))]
    for overlap, shape in cases:
        before, after = overlap.reach
        x = torch.randn(1, before + after + 4, *shape, generator=generator, dtype=torch.float64)
        middle = overlap.up * (before + 1)
        outputs = (middle, middle + overlap.up - 1, middle + overlap.up // 2)
        spans = [needs(overlap.chain, range(output, output + 1)) for output in outputs]
        expected = [[i for i in span if 0 <= i < x.shape[1]] for span in spans]
        assert inputs_felt(overlap.decode, x, outputs) == expected
    for module in (codec.video, codec.audio, codec.vocoder):
        module.float()


def streamed(
    codec: LTX2Codec, z: AV[torch.Tensor], cuts: AV[list[int]]
) -> tuple[list[AV[torch.Tensor]], LTX2DecodeState]:
    state = codec.start()
    spans = zip(pairwise(cuts.video), pairwise(cuts.audio), strict=True)
    made = [codec.decode(AV(z.video[:, v[0] : v[1]], z.audio[:, a[0] : a[1]]), state) for v, a in spans]
    return [*made, codec.finish(state)]


def test_streamed_decode_equals_whole_decode(codec):
    """Cut at random places, pieces without latents too; all that leaves is the whole decode, to rounding."""
    z, rng = latents(3), np.random.default_rng(0)
    cuts = z.map(lambda t: [0, *sorted(rng.integers(0, t.shape[1] + 1, 4).tolist()), t.shape[1]])
    pieces = streamed(codec, z, cuts)
    whole = codec.decode(z)
    assert whole.video.shape == (1, 73, *SIZE, 3)
    assert whole.audio.shape == (1, codec.clock.samples_of(73), 2)
    for part, made in zip(whole, zip(*pieces, strict=True), strict=True):
        assert part.std() > 0.01 and (part.abs() == 1).float().mean() < 0.1
        assert (torch.cat(made, 1) - part).abs().max() <= 2e-5


def test_frames_and_samples_leave_together_after_the_stated_delay(codec):
    """Second by second: what has left covers the same time in both streams, and is late by the later of two delays."""
    z, state, given = latents(5), codec.start(), AV(0, 0)
    late = max(codec.delays)
    for k in range(6):
        spans = AV(range(1), range(1)) if k == 0 else AV(range(3 * k - 2, 3 * k + 1), range(25 * k - 24, 25 * k + 1))
        piece = codec.decode(z.map(lambda t, s: t[:, s.start : s.stop], spans), state)
        given = given.map(lambda n, part: n + part.shape[1], piece)
        assert given.audio == codec.clock.samples_of(given.video)
        assert state.given == given
        if k > late + 1:
            assert 0 <= k + Fraction(1, 24) - late - Fraction(given.video, 24) <= Fraction(1, 24)
    rest = codec.finish(state)
    assert given.video + rest.video.shape[1] == 121
    assert given.audio + rest.audio.shape[1] == codec.clock.samples_of(121)


def test_a_stored_state_goes_on(codec, tmp_path):
    z = latents(2)
    state = codec.start()
    first = codec.decode(z.map(lambda t: t[:, : t.shape[1] // 2]), state)
    path = write_tensors(tmp_path / "state.safetensors", state.tensors())
    again = LTX2DecodeState.from_tensors(load_file(path))
    rest = z.map(lambda t: t[:, t.shape[1] // 2 :])
    for a, b in zip(codec.decode(rest, state), codec.decode(rest, again), strict=True):
        assert torch.equal(a, b)
    for a, b, c in zip(first, codec.finish(state), codec.finish(again), strict=True):
        assert torch.equal(b, c) and len(a) == 1


def test_a_stored_state_without_its_layers_is_refused():
    codec, z, state = codec_of(horizon=1), latents(3), LTX2DecodeState()
    codec.decode(z, state)
    stored = {name: t for name, t in state.tensors().items() if not name.startswith("decoder.video.")}
    with pytest.raises(ValueError, match="begin the stream anew"):
        codec.decode(z, LTX2DecodeState.from_tensors(stored))


def test_memory_of_a_stream_does_not_grow():
    """With the overlap filled, the state holds as much after every second."""
    codec, z = codec_of(), latents(8)
    state, held = codec.start(), []
    for k in range(8):
        codec.decode(AV(z.video[:, 3 * k : 3 * k + 3], z.audio[:, 25 * k : 25 * k + 25]), state)
        held.append(sum(t.numel() for t in state.tensors().values()))
    assert len(set(held[6:])) == 1


@pytest.mark.parametrize(("causal", "frames"), [(False, 173), (True, 0)], ids=["as released", "causal decoder"])
def test_the_delay_of_the_full_size_decoder_is_stated(causal, frames):
    """diffusers' own defaults at full size: 173 frames, 7.2 s, for video; 0.18 s for sound, 0.52 s with 48 kHz."""
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE

    ratios = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    with torch.device("meta"):
        video, audio = AutoencoderKLLTX2Video(decoder_causal=causal, **ratios), AutoencoderKLLTX2Audio()
        plain, wide = LTX2Vocoder(), LTX2VocoderWithBWE()
    codec = LTX2Codec(video, audio, plain)
    assert codec.grid == (16, 24) and codec.channels == AV(128, 128)
    assert codec.overlaps.video.reach == ((22, 22) if not causal else (44, 0))
    assert codec.overlaps.audio.reach == (33, 0) and codec.waves.reach == (18, 18)
    assert codec.delays == AV(Fraction(frames, 24), Fraction(4278, 24_000))
    assert LTX2Codec(video, audio, wide).delays.audio == Fraction(24_789, 48_000)


def test_a_shorter_horizon_is_sooner_and_less_exact():
    errors = [stream_error(codec_of(horizon=horizon), latents(3)) for horizon in (0, 2, 4)]
    assert errors[0] < errors[1] < errors[2] < float("inf")
    delays = [codec_of(horizon=horizon).delays.video for horizon in (0, 2, None)]
    assert delays[0] < delays[1] < delays[2] and delays[1] == Fraction(2 * 8, 24)


def overlapped(codec: LTX2Codec) -> LTX2Codec:
    """Decode the overlap again at every step, where the codec carries what lies before."""
    video = codec.overlaps.video
    how = (getattr(video, f.name) for f in fields(Overlap))
    made = copy(codec)
    made.overlaps = codec.overlaps._replace(video=Overlap(*how))
    return made


@pytest.mark.parametrize(("causal", "horizon"), [(True, None), (False, 0), (False, 2)])
def test_a_stream_decodes_what_is_new_and_what_the_horizon_held_back(causal, horizon):
    """Three latents a step: as much work as three latents of a long clip, and one more for each that waits."""
    codec, z = codec_of(causal=causal, horizon=horizon), torch.randn(1, 24, 2, 2, 16)

    def work(call) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        return counter.get_total_flops()

    def step(overlap: Overlap) -> int:
        state = Tail()
        return [work(partial(overlap.step, state, part)) for part in z.split(3, 1)][-1]

    whole = codec.overlaps.video.decode
    three = work(lambda: whole(z[:, :7])) - work(lambda: whole(z[:, :4]))
    done = step(codec.overlaps.video)
    assert done <= three * (3 + (horizon or 0)) / 3 < step(overlapped(codec).overlaps.video)
    assert done == three or horizon


def test_what_is_carried_costs_little_fidelity():
    """Against a step that decodes the overlap again, at the same horizon; what a shorter horizon costs is ten times."""
    for horizon in (0, 2, 4):
        codec = codec_of(horizon=horizon)
        carried, again = (stream_error(c, latents(3)) for c in (codec, overlapped(codec)))
        assert again - 1 < carried < float("inf")


def grown(decoder: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """Decode all latents at once as the published architecture is described: past is the input, one step later."""
    conv = torch.nn.functional.conv2d
    x = 3 * torch.tanh(x / 3)
    for at, layer in enumerate(decoder):
        weights = layer.state_dict()
        if at in (1, 8, 14, 20, 22):
            x = torch.relu(x) if at == 22 else x
            x = conv(x, weights["weight"], weights.get("bias"), padding=1)
            x = torch.relu(x) if at == 1 else x
        elif "conv.4.weight" in weights:
            y = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], 1)
            for i in (0, 2, 4):
                y = conv(torch.relu(y) if i else y, weights[f"conv.{i}.weight"], weights[f"conv.{i}.bias"], padding=1)
            x = torch.relu(x + y)
        elif "conv.weight" in weights:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            both = conv(x, weights["conv.weight"])
            x = torch.stack(both.chunk(2, 1), 1).flatten(0, 1)
    return 2 * torch.nn.functional.pixel_shuffle(x, 4).clamp(0, 1)[7:].permute(0, 2, 3, 1) - 1


@pytest.mark.parametrize("layout", [PAPER, RELEASED], ids=["paper", "released"])
def test_a_tiny_decoder_gives_the_first_frame_after_block_0_and_streams_to_the_bit(layout, tmp_path):
    """Every block's frames leave with it, its samples after the vocoder's delay; all together are the whole decode."""
    path = tiny_decoder_file(tmp_path / "taeltx_2.safetensors")
    codec, z = codec_of(tiny=load_tiny_decoder(path, SIZE)), latents(3)
    state, stored, made = codec.start(), codec.start(), []
    for k in range(layout.count(z.video.shape[1])):
        spans = layout.block(k)
        part = z.map(lambda t, s: t[:, s.start : s.stop], spans)
        made.append(codec.decode(part, state))
        assert made[-1].video.shape[1] == len(codec.clock.frames(spans.video)) > 0
        late = codec.clock.samples(spans.audio).stop - state.given.audio
        assert late <= codec.delays.audio * codec.clock.sample_rate and codec.delays.video == 0
        again = codec.decode(part, stored)
        assert torch.equal(again.video, made[-1].video)
        stored = LTX2DecodeState.from_tensors(stored.tensors())
    made.append(codec.finish(state))
    whole, streamed = codec.decode(z), AV(*(torch.cat(parts, 1) for parts in zip(*made, strict=True)))
    assert torch.equal(streamed.video, whole.video) and whole.video.shape == (1, 73, *SIZE, 3)
    assert (streamed.audio - whole.audio).abs().max() <= 2e-5
    reference = grown(codec.tiny.decoder, z.video[0].permute(0, 3, 1, 2))
    assert (whole.video[0] - reference).abs().max() <= 1e-5 and whole.video.std() > 0.01
    assert 0 < stream_error(codec, z) < 30


def test_the_tiny_decoders_tensors_are_those_that_are_published(tmp_path):
    """Names and shapes to the letter; what is missing, added, of another shape or of the wide variant is refused."""
    with torch.device("meta"):
        published = {name: tuple(t.shape) for name, t in TinyDecoder((512, 768)).state_dict().items()}
    assert len(published) == 64 and sum(map(np.prod, published.values())) == 10_194_160
    told = {"1.weight": (256, 128, 3, 3), "3.conv.0.weight": (256, 512, 3, 3), "7.conv.weight": (512, 256, 1, 1)}
    told |= {"8.weight": (128, 256, 3, 3), "13.conv.weight": (256, 128, 1, 1), "19.conv.weight": (128, 64, 1, 1)}
    told |= {"20.weight": (64, 64, 3, 3), "22.weight": (48, 64, 3, 3), "22.bias": (48,)}
    assert all(published[f"decoder.{name}"] == shape for name, shape in told.items())
    path = tiny_decoder_file(tmp_path / "taeltx_2.safetensors")
    good = load_file(path)
    changes = {
        "decoder.5.conv.4.bias is nothing, expected": {"decoder.5.conv.4.bias": None},
        "head.weight is .*, expected nothing": {"head.weight": torch.zeros(1)},
        r"decoder.22.bias is \[7\], expected \[48\]": {"decoder.22.bias": torch.zeros(7)},
        "decoder.1.weight' is missing": {"decoder.1.weight": None},
        "decoder.22.bias holds values that are not finite": {"decoder.22.bias": torch.full((48,), torch.nan)},
        "wide variant": {"decoder.3.conv.6.weight": torch.zeros(1)},
    }
    for message, change in changes.items():
        write_tensors(path, {name: t for name, t in (good | change).items() if t is not None})
        with pytest.raises(ValueError, match=message):
            load_tiny_decoder(path, SIZE)
    torch.save(good, path)
    with pytest.raises(ValueError, match="is a pickle whatever its name says"):
        load_tiny_decoder(path, SIZE)
    with pytest.raises(ValueError, match=r"takes the VAE's 16 channels and no horizon; .* 8 channels and horizon None"):
        codec_of(tiny=shaken(TinyDecoder(SIZE, 8, (8, 8, 8, 8))))


def dilated(x: torch.Tensor, weight: list[torch.Tensor]) -> torch.Tensor:
    x = torch.nn.functional.conv1d(x.transpose(1, 2), weight[0], padding=2, dilation=2)
    x = torch.nn.functional.conv_transpose1d(x, weight[2], stride=2, padding=1).repeat_interleave(3, -1)[..., 2:]
    return torch.nn.functional.conv1d(x, weight[1], padding=2).transpose(1, 2)


def repeated_first(x: torch.Tensor, weight: list[torch.Tensor]) -> torch.Tensor:
    x = x.transpose(1, 2).repeat_interleave(6, -1)[..., 5:]
    return torch.nn.functional.conv1d(x, weight[0], padding=1).transpose(1, 2)


CHAINS = {
    "dilated": (dilated, [convolution(3, 2, dilation=2), transposed(4, 2, 1), repeated(3, 2), convolution(5, 2)], 2),
    "repeated first": (repeated_first, [repeated(6, 5), convolution(3, 1)], 5),
}


@pytest.mark.parametrize(("decode", "chain", "dropped"), CHAINS.values(), ids=CHAINS)
def test_the_overlap_of_any_chain_is_exact(decode, chain, dropped):
    """Not only LTX-2's: dilated and transposed convolutions, and a first step that repeats, one input at a time."""
    generator = torch.Generator().manual_seed(0)
    weight = [torch.randn(2, 2, k, generator=generator, dtype=torch.float64) for k in (3, 5, 4)]
    overlap, state = Overlap(partial(decode, weight=weight), chain, up=6, dropped=dropped, shape=(2,)), Tail()
    x = torch.randn(1, 20, 2, generator=generator, dtype=torch.float64)
    pieces = [overlap.step(state, part) for part in x.split(1, 1)]
    pieces.append(overlap.step(state, x[:, :0], last=True))
    assert torch.allclose(torch.cat(pieces, 1), overlap.decode(x), rtol=0, atol=1e-12)
    assert state.kept.shape[1] <= sum(overlap.reach) + 2


@torch.no_grad()
def test_the_codec_is_what_the_pipeline_of_diffusers_does():
    """Normalisation, channel-major packing, decoders and vocoder: the pipeline's own functions, the same numbers."""
    codec, z = codec_of(), latents(1)
    packed = z.video.reshape(1, -1, 16)
    raw = LTX2Pipeline._unpack_latents(packed, 4, 2, 2)
    raw = LTX2Pipeline._denormalize_latents(raw, codec.video.latents_mean, codec.video.latents_std, 1.0)
    frames = codec.video.decode(raw, None, return_dict=False)[0].clamp(-1, 1)
    audio = LTX2Pipeline._denormalize_audio_latents(z.audio, codec.audio.latents_mean, codec.audio.latents_std)
    audio = LTX2Pipeline._unpack_audio_latents(audio, 26, num_mel_bins=16)
    wave = codec.vocoder(codec.audio.decode(audio, return_dict=False)[0])
    made = codec.decode(z)
    assert torch.equal(made.video, frames.permute(0, 2, 3, 4, 1))
    assert torch.equal(made.audio, wave.transpose(1, 2))


@pytest.mark.parametrize("version", ["2.0", "2.3"])
@torch.no_grad()
def test_the_vocoder_computes_in_float32_whatever_the_dtype(version, tmp_path):
    """In bfloat16 the wave of tiny random weights is off by 0.7 % (24 kHz) and by 7 % (48 kHz with extension), rms."""
    codec = load_ltx2_codec(whole_file(tmp_path / "ltx2.safetensors", version), SIZE, dtype=torch.bfloat16)
    assert {p.dtype for m in (codec.video, codec.audio) for p in m.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in codec.vocoder.parameters()} == {torch.float32}
    mel = torch.randn(1, 2, 100, 64, generator=torch.Generator().manual_seed(0))
    wave, rounded = codec.vocoder(mel), deepcopy(codec.vocoder).bfloat16()(mel.bfloat16()).float()
    error = ((rounded - wave).norm() / wave.norm()).item()
    assert error > {"2.0": 0.004, "2.3": 0.04}[version]
    assert codec.decode(latents(1)).audio.dtype == torch.float32


@torch.no_grad()
def test_encoded_clips_are_the_pipelines_latents():
    codec, generator = codec_of(), torch.Generator().manual_seed(2)
    frames = torch.rand(1, 25, *SIZE, 3, generator=generator) * 2 - 1
    samples = torch.randn(1, 16_160, 2, generator=generator) * 0.1
    z = codec.encode(AV(frames, samples))
    assert z.map(lambda t: t.shape) == AV((1, 4, 2, 2, 16), (1, 26, 32))
    video = codec.video.encode(frames.permute(0, 4, 1, 2, 3)).latent_dist.mode()
    video = LTX2Pipeline._normalize_latents(video, codec.video.latents_mean, codec.video.latents_std)
    audio = LTX2Pipeline._pack_audio_latents(codec.audio.encode(codec.spectrogram(samples)).latent_dist.mode())
    audio = LTX2Pipeline._normalize_audio_latents(audio, codec.audio.latents_mean, codec.audio.latents_std)
    assert torch.allclose(LTX2Pipeline._pack_latents(video), z.video.flatten(1, 3), atol=1e-6)
    assert torch.allclose(audio, z.audio, atol=1e-6)
    mono = codec.encode(AV(frames, samples[..., 0])).audio
    both = codec.encode(AV(frames, samples[..., :1].expand(-1, -1, 2))).audio
    assert torch.equal(mono, both)


def test_the_mel_spectrogram_is_slaneys():
    """The filters are those of an independent implementation; a sine fills the bin that holds its frequency."""
    codec = codec_of()
    assert torch.allclose(codec._filters().float(), mel_filterbank(16_000, 1024, 64, 0.0, 8000.0), atol=1e-6)
    time = torch.arange(16_160) / 16_000
    loud = codec.spectrogram(torch.sin(2 * torch.pi * 1000 * time)[None])[0, 0, 50]
    centre = (codec._filters() * torch.linspace(0, 8000, 513)).sum(1) / codec._filters().sum(1)
    assert loud.argmax() == (centre - 1000).abs().argmin()
    silence = codec.spectrogram(torch.zeros(1, 160))
    assert silence.shape == (1, 2, 1, 64) and torch.allclose(silence, torch.tensor(1e-5).log())


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_a_single_file_and_a_folder_load_the_same_codec(version, tmp_path):
    """From LTX-2's names and config, or from diffusers': the weights that were written, and the same decode."""
    made, z = modules(version), latents(1)
    one = load_ltx2_codec(whole_file(tmp_path / "ltx2.safetensors", version), SIZE)
    other = load_ltx2_codec(diffusers_folder(tmp_path / "folder", version), SIZE)
    for codec in (one, other):
        for part, module in (("vae", codec.video), ("audio_vae", codec.audio), ("vocoder", codec.vocoder)):
            state, written = module.state_dict(), made[part].state_dict()
            assert state.keys() == written.keys() and all(torch.equal(state[n], t) for n, t in written.items())
    assert all(torch.equal(a, b) for a, b in zip(one.decode(z), other.decode(z), strict=True))
    assert one.clock.sample_rate == {"2.0": 24_000, "2.3": 48_000}[version]


def test_names_agree_with_diffusers_where_it_has_them(tmp_path):
    tensors = load_file(whole_file(tmp_path / "ltx2.safetensors"))
    names = {"vae.": part_configs.video_names(VAE), "audio_vae.": part_configs.AUDIO_VAE}
    convert = {"vae.": convert_ltx2_vae_to_diffusers, "audio_vae.": convert_ltx2_audio_vae_to_diffusers}
    for prefix in names:
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        ours = {names[prefix].to_diffusers(name): tensor for name, tensor in own.items()}
        theirs = convert[prefix](dict(own))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
        assert {names[prefix].to_ltx2(name) for name in ours} == own.keys()


def test_the_full_size_config_of_ltx2_is_diffusers_default():
    """Lightricks' list of blocks gives the sizes that diffusers has as defaults."""
    blocks = [["compress_all", {"residual": True, "multiplier": 2}], ["res_x", {"num_layers": 5}]]
    squeezed = zip(("space", "time", "all", "all"), (6, 6, 2, 2), strict=True)
    described = {
        "encoder_blocks": [
            ["res_x", 4],
            *(b for kind, n in squeezed for b in ([f"compress_{kind}_res", {}], ["res_x", n])),
        ],
        "decoder_blocks": [["res_x", {"num_layers": 5}], *blocks * 3],
        "timestep_conditioning": False,
    }
    from diffusers import AutoencoderKLLTX2Video

    with torch.device("meta"):
        default = AutoencoderKLLTX2Video().state_dict()
        ours = AutoencoderKLLTX2Video(**part_configs.video_config(described)).state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in default.items()}


def test_what_cannot_be_done_is_refused_by_name(tmp_path):
    made = modules()
    with pytest.raises(ValueError, match="multiples of 32"):
        LTX2Codec(made["vae"], made["audio_vae"], made["vocoder"], (60, 64))
    made["vae"].register_to_config(timestep_conditioning=True)
    with pytest.raises(ValueError, match="timestep_conditioning"):
        LTX2Codec(made["vae"], made["audio_vae"], made["vocoder"], SIZE)
    with pytest.raises(ValueError, match="attn_res_x"):
        part_configs.video_config(VAE | {"decoder_blocks": [["attn_res_x", {"num_layers": 1}]]})
    with pytest.raises(ValueError, match="resblock '2'"):
        part_configs.vocoder_config({"resblock": "2"})
    path = write_tensors(tmp_path / "bare.safetensors", {"vae.x": torch.zeros(1)})
    with pytest.raises(ValueError, match="no part 'vae'"):
        load_ltx2_codec(path, SIZE)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="safetensors"):
        load_ltx2_codec(path, SIZE)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"config\.json"):
        load_ltx2_codec(tmp_path / "folder", SIZE)
    codec = codec_of()
    with pytest.raises(ValueError, match="video latents"):
        codec.decode(AV(torch.zeros(1, 1, 3, 2, 16), torch.zeros(1, 1, 32)))
    with pytest.raises(ValueError, match="640k \\+ 160"):
        codec.encode(AV(torch.zeros(1, 1, *SIZE, 3), torch.zeros(1, 161)))
    assert configs()["vae"] is VAE
