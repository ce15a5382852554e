"""Train the TinyCodec on the world: pixels against pixels, amplitudes of the oscillator bank against the true ones.

The latents are what a diffusion model will learn to make, with errors. So both decoders are trained on latents with
noise added, which also makes neighbouring latents mean neighbouring things.

Letters: B clips, f frames, m hops, k oscillators.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from omniforcing_lib.bounce import world
from omniforcing_lib.bounce.codecs import TinyCodec
from omniforcing_lib.layout import AV, Clock

NOISE = AV(0.2, 0.25)
BOTH = AV(True, True)
BETA, FURTHER_BETA = 0.2, 4.0
"""Errors of loudness below it are squared, see `knot_loss`. A codec that is trained further begins with squares: they
seek a mean, so that a note which seldom sounds is learnt; absolute values seek the median, which is silence."""
Draw = Callable[[int], world.Scene]
"""How a seed becomes a scene: `world.scene`, or `functools.partial(world.scene, hum=True)`."""


class Batch(NamedTuple):
    """Hold rendered clips and the true knots of their sound (float32 [B, m, k])."""

    clip: AV[Tensor]
    knots: Tensor


def true_knots(scenes: Sequence[world.Scene], hops: int, clock: Clock) -> np.ndarray:
    """Fit the amplitude that each oscillator should have at the end of each hop, by least squares.

    A knot is where straight lines between knots come closest to the envelope of the partial: sampling the envelope
    instead would put every onset half a hop early or late.
    Shapes: -> float64 [B, m, k], >= 0.
    """
    times, fit = _spline(hops, clock.mel_rate)
    return np.stack([np.clip(fit @ np.abs(_partials(scene, times)), 0, 1) for scene in scenes])


@lru_cache(maxsize=4)
def _spline(hops: int, rate: int, parts: int = 8, lead: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return times, eight per hop, and the matrix that fits straight lines between hop ends to values there."""
    times = (np.arange(-lead * parts, (hops + lead) * parts) + 0.5) / (parts * rate)
    ends = np.arange(1 - lead, hops + lead) / rate
    hats = np.clip(1 - np.abs(times[:, None] - ends) * rate, 0, None)
    return times, np.linalg.pinv(hats)[lead : lead + hops]


def _partials(scene: world.Scene, times: np.ndarray) -> np.ndarray:
    """Add up the tones as phasors, oscillator by oscillator. Shapes: [n] -> complex [n, k]."""
    timbre, phasors = world.TIMBRES[scene.timbre], np.zeros((len(times), len(world.BANK_HZ)), complex)
    for hit in world.impacts(scene, times[0] - timbre.tail_s, times[-1]):
        age = times - hit.time_s
        attack = world.LEVEL * np.clip(age / world.ATTACK_S, 0, 1)
        for up, share, decay in zip(*timbre, strict=True):
            note = world.WALL_NOTES[hit.wall] + up
            phase = np.exp(-2j * np.pi * world.BANK_HZ[note] * hit.time_s)
            phasors[:, note] += share * attack * np.exp(-np.maximum(age, 0) / decay) * phase
    if scene.hum is not None:
        phasors[:, scene.hum] += world.HUM_LEVEL
    return phasors


def batches(
    codec: TinyCodec,
    rng: np.random.Generator,
    *,
    size: int,
    seconds: int,
    device: torch.device | str,
    pooled: int,
    draw: Draw = world.scene,
) -> Iterator[Batch]:
    """Yield batches of clips for ever, drawn from the last `pooled` clips; every eighth batch is fresh."""
    pool: deque[Batch] = deque(maxlen=max(1, pooled // size))
    for step in count():
        if len(pool) < pool.maxlen or step % 8 == 0:
            pool.append(render(codec, rng.integers(world.HELD_OUT, size=size).tolist(), seconds, device, draw))
            yield pool[-1]
            continue
        rows = [(int(rng.integers(len(pool))), int(rng.integers(size))) for _ in range(size)]
        yield Batch(
            AV(*(torch.stack([pool[i].clip[stream][j] for i, j in rows]) for stream in range(2))),
            torch.stack([pool[i].knots[j] for i, j in rows]),
        )


def render(
    codec: TinyCodec, seeds: Sequence[int], seconds: int, device: torch.device | str, draw: Draw = world.scene
) -> Batch:
    """Render the clips of these seeds and their true knots."""
    scenes, clock = [draw(seed) for seed in seeds], codec.clock
    knots = true_knots(scenes, len(clock.mels(range(clock.latents(seconds).audio))), clock)
    clip = world.render_batch(scenes, seconds, device, clock=clock)
    return Batch(clip, torch.tensor(knots, dtype=torch.float32, device=device))


def train_codec(
    codec: TinyCodec | None = None,
    *,
    steps: int = 3000,
    batch: int = 16,
    seconds: int = 2,
    noise: AV[float] = NOISE,
    rate: float = 2.5e-3,
    pooled: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
    draw: Draw = world.scene,
    learns: AV[bool] = BOTH,
) -> TinyCodec:
    """Train a codec and measure it; `codec.metrics` holds the measures on clips that it has not seen.

    Args:
        codec: what to train further; None starts from nothing.
        steps: steps of Adam on a one-cycle cosine rate.
        batch: clips per step.
        seconds: length of a clip.
        noise: largest standard deviation of the noise on the latents of each stream.
        rate: peak learning rate.
        pooled: rendered clips to draw from.
        seed: of everything random.
        device: where to train.
        progress: whether to show a bar.
        draw: how a seed becomes a scene.
        learns: which streams' networks learn; those of the other stay as they are, to the bit.
    """
    rng, dice = np.random.default_rng(seed), torch.Generator(device).manual_seed(seed)
    further = 0.0 if codec is None else FURTHER_BETA
    if codec is None:
        codec = seeded(seed)
    codec = codec.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    networks = [_networks(codec, stream) for stream, yes in enumerate(learns) if yes]
    for network in networks:
        network.train().requires_grad_(True)
    learning = [p for network in networks for p in network.parameters()]
    adam = torch.optim.AdamW(learning, rate, betas=(0.9, 0.98), weight_decay=1e-4)
    cycle = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=steps, pct_start=0.1)
    if further and learns.audio:
        waken(codec, range(world.HELD_OUT - 16, world.HELD_OUT), device, draw)
    source = batches(codec, rng, size=batch, seconds=seconds, device=device, pooled=pooled, draw=draw)
    for step in (bar := tqdm(range(steps), desc="codec", disable=not progress)):
        ramp = min(1.0, 4 * step / steps)
        beta = max(BETA, further * (1 - ramp))
        losses = codec_losses(codec, next(source), noise.map(lambda most, ramp=ramp: most * ramp), dice, learns, beta)
        adam.zero_grad()
        (losses.video + losses.audio).backward()
        for network in networks:
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()
        cycle.step()
        bar.set_postfix(losses.map(lambda loss: f"{loss.item():.4f}")._asdict(), refresh=False)
    settle(codec, range(world.HELD_OUT - 96, world.HELD_OUT), device, draw=draw, learns=learns)
    codec.metrics = measure(codec, range(world.HELD_OUT, world.HELD_OUT + 16), device, draw=draw) | {"steps": steps}
    return codec


@torch.no_grad()
def waken(codec: TinyCodec, seeds: Sequence[int], device: torch.device | str, draw: Draw) -> list[int]:
    """Start the oscillators anew that sound in a world and that the codec has unlearnt; give their numbers.

    A softplus far below zero passes no gradient: without this they would stay silent for ever.
    """
    batch, last = render(codec, seeds, 2, device, draw), codec.decoders[1].layers[-1]
    decoded = codec.knots(codec.encode(AV(batch.clip.video[:, :0], batch.clip.audio)).audio)
    true, own = (knots.amax((0, 1)) for knots in (batch.knots, decoded))
    silent = (true > codec.config.quiet) & (own < true / 1000)
    rows = silent.repeat(codec.decoders[1].knots)
    dice = torch.Generator().manual_seed(0)
    drawn = last.weight[~rows].std() * torch.randn(last.weight[rows].shape, generator=dice).to(device)
    last.weight[rows], last.bias[rows] = drawn, codec.decoders[1].BIAS
    return silent.nonzero().flatten().tolist()


def _networks(codec: TinyCodec, stream: int) -> nn.ModuleList:
    """Give encoder, decoder and scale of a stream."""
    return nn.ModuleList([codec.encoders[stream], codec.decoders[stream], codec.scales[stream]])


def seeded(seed: int) -> TinyCodec:
    """Build a codec whose initial weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return TinyCodec()


def codec_losses(
    codec: TinyCodec,
    batch: Batch,
    noise: AV[float],
    dice: torch.Generator,
    learns: AV[bool] = BOTH,
    beta: float = BETA,
) -> AV[Tensor]:
    """Return the loss of each stream on one batch, through noisy latents; 0 for a stream that does not learn."""
    losses = [batch.knots.new_zeros(())] * 2
    if learns.video:
        frames = _moments(batch.clip.video, codec.clock.video_stride, dice)
        with torch.autocast(frames.device.type, torch.bfloat16):
            drawn = codec.frames(_shaken(codec.tokens(frames), noise.video, dice))
        losses[0] = video_loss(drawn, frames)
    if learns.audio:
        latents = codec.encode(AV(batch.clip.video[:, :0], batch.clip.audio)).audio
        losses[1] = knot_loss(codec, _shaken(latents, noise.audio, dice), batch.knots, beta)
    return AV(*losses)


def _moments(frames: Tensor, stride: int, dice: torch.Generator) -> Tensor:
    """Cut two moments of eight frames from each clip, anywhere; one clip in eight is a still, as first latents are."""
    starts = torch.randint(frames.shape[1] - stride + 1, (2,), generator=dice, device=frames.device)
    cut = torch.cat([frames[:, start : start + stride] for start in starts.tolist()], 1)
    stills = -(-len(cut) // 8)
    return torch.cat([cut[:stills, :1].expand(-1, 2 * stride, -1, -1, -1), cut[stills:]])


def _shaken(latents: Tensor, most: float, dice: torch.Generator) -> Tensor:
    shape = (*latents.shape[:2], *[1] * (latents.ndim - 2))
    level = torch.rand(shape, generator=dice, device=latents.device) * most
    return latents + level * torch.randn(latents.shape, generator=dice, device=latents.device)


def video_loss(decoded: Tensor, true: Tensor) -> Tensor:
    """Mix absolute and squared error, the bright pixels (the ball) weighing most. Shapes: [B, f, H, W, 3] -> []."""
    weight = 1 + 3 * (true.amax(-1, keepdim=True) + 1) / 2
    error = decoded - true
    return (weight * (error.abs() / 2 + 4 * error**2)).mean()


def knot_loss(codec: TinyCodec, latents: Tensor, true: Tensor, beta: float = BETA) -> Tensor:
    """Compare amplitudes on the codec's own scale of loudness, errors below `beta` squared.

    Shapes: latents [B, T, c], true [B, m, k] -> [].
    """
    decoded = codec.knots(latents)[:, codec.clock.audio_stride - 1 :]
    loud = AV(decoded, true).map(lambda knots: torch.log1p(knots / codec.config.quiet))
    return F.smooth_l1_loss(*loud, beta=beta) * max(1.0, beta) + F.l1_loss(decoded, true) * 10


@torch.no_grad()
def settle(
    codec: TinyCodec,
    seeds: Sequence[int],
    device: torch.device | str,
    *,
    seconds: int = 2,
    draw: Draw = world.scene,
    learns: AV[bool] = BOTH,
) -> None:
    """Set the scales from many clips at once, so that every channel has mean 0 and standard deviation 1."""
    for scale, yes in zip(codec.eval().scales, learns, strict=True):
        if yes:
            scale.reset_running_stats()
            scale.momentum = None
            scale.train()
    for start in range(0, len(seeds), 16):
        codec.encode(render(codec, seeds[start : start + 16], seconds, device, draw).clip)
    codec.eval()


@torch.no_grad()
def measure(
    codec: TinyCodec, seeds: Sequence[int], device: torch.device | str, *, seconds: int = 3, draw: Draw = world.scene
) -> dict[str, float]:
    """Measure the round trip in decibels: pixels, pixels with noise on the latents, knots."""
    batch = render(codec, seeds, seconds, device, draw)
    latents, dice = codec.encode(batch.clip), torch.Generator(device).manual_seed(0)
    shaken = latents.map(lambda z: z + 0.1 * torch.randn(z.shape, generator=dice, device=z.device))
    stride = codec.clock.audio_stride
    return {
        "psnr_db": _snr_db(codec.decode(latents).video, batch.clip.video, 2.0),
        "psnr_noise_0.1_db": _snr_db(codec.decode(shaken).video, batch.clip.video, 2.0),
        "knot_snr_db": _snr_db(codec.knots(latents.audio)[:, stride - 1 :], batch.knots, _rms(batch.knots)),
        "knot_snr_noise_0.1_db": _snr_db(codec.knots(shaken.audio)[:, stride - 1 :], batch.knots, _rms(batch.knots)),
        "video_kurtosis": latents.video.pow(4).mean().item(),
        "audio_kurtosis": latents.audio.pow(4).mean().item(),
    }


def _rms(signal: Tensor) -> float:
    return signal.pow(2).mean().sqrt().item()


def _snr_db(decoded: Tensor, true: Tensor, peak: float) -> float:
    return 20 * math.log10(peak / _rms(decoded - true))
