"""LTX-2 end to end on a tiny whole file: prompt, Gemma, connectors, transformer, guided sampling, VAEs, vocoder, mp4.

The reference is diffusers: its transformer, its scheduler and the guidance of its pipeline, driven by hand.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import av
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2.pipeline_ltx2 import calculate_shift, rescale_noise_cfg
from tiny_ltx2 import SIZE, gemma_folder, split_files, whole_file

from omniforcing_lib import media
from omniforcing_lib.flow import Guidance, block_noise, euler, guided_denoiser, ltx2_sigmas
from omniforcing_lib.layout import AV, PAPER, RELEASED
from omniforcing_lib.ltx2 import checkpoints, formats
from omniforcing_lib.ltx2.codec import load_ltx2_codec
from omniforcing_lib.ltx2.gemma import GemmaText
from omniforcing_lib.rollout import RolloutConfig, join, rollout, seeded_noise
from omniforcing_lib.stream import Sampling, Streamer, make_clip, teacher_clips, to_arrays

GUIDANCE = Guidance(AV(3.0, 7.0), AV(1.0, 1.0), AV(3.0, 3.0), AV(0.7, 0.7), frozenset({1}))
PROMPT, STEPS = "a red ball, bell", 8


@pytest.fixture(scope="module", params=["2.0", "2.3", "2.5"])
def real(request, tmp_path_factory):
    """A whole file, or from 2.5 on split files, with what it takes to run them."""
    folder = tmp_path_factory.mktemp("ltx2")
    if request.param == "2.5":
        path, gemma, *vaes = split_files(folder).values()
        source = [path, gemma, *vaes]
    else:
        path = source = whole_file(folder / "ltx2.safetensors", request.param)
        gemma = gemma_folder(folder / "gemma")
    text = GemmaText(gemma, source, folder / "cache", length=16, dtype=torch.float32)
    return path, load_ltx2_codec(source, SIZE), text


def diffusers_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build the scheduler that LTX-2's diffusers folder describes."""
    shift = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "max_image_seq_len": 4096}
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1, **shift)


def diffusers_sigmas(steps: int, tokens: int = 4096) -> torch.Tensor:
    scheduler = diffusers_scheduler()
    config = scheduler.config
    mu = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas


@pytest.mark.parametrize("steps", [8, 30, 40])
def test_the_schedule_is_that_of_diffusers(steps):
    assert torch.allclose(diffusers_sigmas(steps), ltx2_sigmas(steps).float(), rtol=0, atol=1e-6)


def diffusers_velocity(model: LTX2VideoTransformer3DModel, x: AV, sigma: float, text: AV, **skip) -> AV:
    """Run diffusers' transformer on our latents; time and space as its pipeline gives them."""
    batch, frames, height, width, _ = x.video.shape
    mask, level = torch.ones(batch, text.video.shape[1]), torch.full((batch,), 1000 * sigma)
    video, audio = model(
        hidden_states=x.video.flatten(1, 3),
        audio_hidden_states=x.audio,
        encoder_hidden_states=text.video,
        audio_encoder_hidden_states=text.audio,
        timestep=level,
        sigma=level,
        encoder_attention_mask=mask,
        audio_encoder_attention_mask=mask,
        num_frames=frames,
        height=height,
        width=width,
        fps=24.0,
        audio_num_frames=x.audio.shape[1],
        use_cross_timestep=True,
        video_keyframes_mask=(torch.arange(frames * height * width) < height * width)[None, :, None].expand(
            batch, -1, 1
        ),
        return_dict=False,
        **skip,
    )
    return AV(video.reshape(x.video.shape), audio)


def diffusers_sample(model: LTX2VideoTransformer3DModel, noise: AV, text: AV, negative: AV, tokens: int) -> AV:
    """Sample with diffusers' transformer and the guidance of its pipeline: deltas in x0, rescaled, Euler."""
    run, x = partial(diffusers_velocity, model), noise
    for sigma, after in pairwise(diffusers_sigmas(STEPS, tokens).tolist()):
        made = [run(x, sigma, text), run(x, sigma, negative), run(x, sigma, text, spatio_temporal_guidance_blocks=[1])]
        made.append(run(x, sigma, text, isolate_modalities=True))
        cond, *others = [x.map(lambda part, v, s=sigma: part - v * s, velocity) for velocity in made]
        weights = AV((2.0, 1.0, 2.0), (6.0, 1.0, 2.0))

        def guided(c, w, *negatives):
            total = c + sum(weight * (c - n) for weight, n in zip(w, negatives, strict=True))
            return rescale_noise_cfg(total, c, guidance_rescale=0.7)

        x0 = cond.map(guided, weights, *others)
        x = x.map(lambda part, data, s=sigma, t=after: part + (t - s) * (part - data) / s, x0)
    return x


@torch.no_grad()
@pytest.mark.parametrize("tokens", [4096, 16], ids=["Lightricks' count of tokens", "the clip's, as in diffusers"])
def test_guided_sampling_is_that_of_diffusers(real, tokens):
    """Eight steps, four passes each: our transformer and sampler against diffusers' transformer, to 1e-4."""
    path, codec, encoder = real
    model = checkpoints.load(path)
    described = formats.to_diffusers(model.config)
    del described["_class_name"]
    described["perturbed_attn"] = True  # diffusers switches this off for 2.0; Lightricks' code passes values in all
    reference = LTX2VideoTransformer3DModel(**described).eval()
    names = {formats.DIFFUSERS.stored(name): tensor for name, tensor in model.state_dict().items()}
    reference.load_state_dict(names, strict=True)
    text, negative = (encoder.encode([prompt]) for prompt in (PROMPT, ""))
    noise = block_noise([3], 0, AV((4, *codec.grid, 16), (26, 32)))
    ours = euler(guided_denoiser(model, text, negative, GUIDANCE), noise, ltx2_sigmas(STEPS, tokens))
    theirs = diffusers_sample(reference, noise, text, negative, tokens)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp_min(1)
        assert b.std() > 0.1


def test_a_prompt_becomes_an_mp4(real, tmp_path):
    """The teacher's whole way, by hand and by `make_clip`, into a file that plays in stereo."""
    path, codec, encoder = real
    model = checkpoints.load(path)
    (clip,) = teacher_clips(model, codec, encoder, [PROMPT], [0], 1, steps=2, guidance=GUIDANCE)
    again = make_clip(model, None, codec, encoder, PROMPT, 1, 0, Sampling(2, GUIDANCE))
    assert all(np.array_equal(a, b) for a, b in zip(clip, again, strict=True))
    rate = codec.clock.sample_rate
    assert clip.video.shape == (25, *SIZE, 3) and clip.audio.shape == (rate + rate // 100, 2)
    written = media.write_clip(tmp_path / "clip.mp4", clip, codec.clock)
    with av.open(str(written)) as container:
        sound, picture = container.streams.audio[0], container.streams.video[0]
        assert (sound.rate, sound.layout.name, picture.frames) == (rate, "stereo", 25)
    with pytest.warns(media.MediaNote, match="stereo"):
        back = media.read_clip(written, clock=codec.clock, size=SIZE)
    assert back.video.shape == clip.video.shape and np.abs(back.video.astype(int) - clip.video).mean() < 20


@torch.inference_mode()
def test_a_student_streams_through_the_real_codec(real, tmp_path):
    """Rolling window, streaming decode with look-ahead: all chunks together are the offline decode of the roll-out."""
    path, codec, encoder = real
    layout = PAPER if codec.clock.sample_rate == 24_000 else RELEASED
    taught = checkpoints.load(path, sinks=layout.sinks)
    student = RolloutConfig(layout, steps=(1000, 500, 0), window=2)
    stored = checkpoints.save(taught, tmp_path / "student.safetensors", causal=student, dtype=torch.float32)
    model, causal = checkpoints.load(stored), checkpoints.read(stored).causal
    with Streamer(model, causal, codec, encoder, PROMPT, seed=5) as stream:
        chunks = [stream.step() for _ in range(5)]
        saved = stream.save(tmp_path / "stream.safetensors")
        rest = stream.finish()
    text, latents = encoder.encode([PROMPT]), causal.layout.block(4).video.stop
    made = join(list(rollout(model, causal, text, seeded_noise([5], text.video), codec.grid, latents)))
    offline = to_arrays(codec.decode(made))
    frames, samples = (np.concatenate(p) for p in zip(*((c.frames, c.samples) for c in [*chunks, rest]), strict=True))
    assert frames.shape == offline.video.shape and samples.shape == offline.audio.shape
    assert np.abs(frames.astype(int) - offline.video).max() <= 1
    assert np.abs(samples - offline.audio).max() <= 1e-4
    shown = np.cumsum([0, *(len(c.frames) for c in chunks)])
    assert [c.start_s for c in [*chunks, rest]] == [n / 24 for n in shown]
    resumed = Streamer(model, causal, codec, encoder, "a blue ball", seed=1)
    resumed.resume(saved)
    last = resumed.finish()
    assert np.array_equal(last.frames, rest.frames) and np.array_equal(last.samples, rest.samples)
