"""What a block costs: matrix products counted from token numbers, rates fitted to timings, carried to other machines.

Only matrix products are counted, in the two kinds that run at different rates: *linear* layers, whose work grows with
the tokens of the open block, and *attention*, whose work grows with what the block sees. Everything else a pass does
is a constant in the fit. `torch.utils.flop_counter` agrees to the last operation (tests/test_bench.py).

Shapes: FLOPs count a multiplication and an addition as two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from omniforcing_lib.config import ModelConfig
from omniforcing_lib.flow import LTX2_GUIDANCE
from omniforcing_lib.layout import AV
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.training.plan import parameters, training_bytes
from studies import dry_run

GPUS = {"H100": (989.0, 3.35), "H200": (989.0, 4.8), "B200": (2250.0, 8.0)}
"""Dense bf16 TFLOP/s and memory TB/s that NVIDIA states for the SXM boards."""

PUBLISHED = (
    {"who": "paper, one GPU", "frames a second": "about 25", "first chunk": "0.7 s", "steps": "3"},
    {"who": "paper, 5-second clip in 5.7 s", "frames a second": "21.2", "first chunk": "", "steps": "3"},
    {"who": "authors later, H200", "frames a second": "about 20", "first chunk": "", "steps": "4"},
    {"who": "third party, H200", "frames a second": "12.1", "first chunk": "", "steps": "4"},
)
"""What others measured on the 19B (specification 6.5)."""


class Work(NamedTuple):
    """FLOPs of a piece of work, and the network passes in it."""

    linear: float
    attention: float
    passes: int = 1

    @property
    def flops(self) -> float:
        """All FLOPs."""
        return self.linear + self.attention

    def times(self, passes: int) -> Work:
        """Give the work of `passes` such passes."""
        return Work(passes * self.linear, passes * self.attention, passes * self.passes)


def plus(*works: Work) -> Work:
    """Add pieces of work."""
    return Work(*(sum(part) for part in zip(*works, strict=True)))


def pass_work(config: ModelConfig, queries: AV[int], keys: AV[int], text: int) -> Work:
    """Count one pass whose modulation and text keys are at hand: a streamed block's steady state (specification 1.5).

    Args:
        config: widths and layers.
        queries: tokens that run, of each stream, sinks among them.
        keys: tokens that they see.
        text: tokens of the prompt.
    """
    wide, narrow = config.video_dim, config.audio_dim
    a2v, v2a = (wide + wide) * narrow, (narrow + narrow) * narrow
    video = 4 * wide**2 + 2 * wide**2 + a2v + 2 * wide * narrow + 8 * wide**2
    audio = 4 * narrow**2 + 2 * narrow**2 + v2a + 2 * narrow**2 + 8 * narrow**2
    ends = AV(config.in_channels + config.out_channels, config.audio_in_channels + config.audio_out_channels)
    linear = config.num_layers * (video * queries.video + audio * queries.audio)
    linear += queries.video * wide * ends.video + queries.audio * narrow * ends.audio
    inside = queries.video * (keys.video + text) * wide + queries.audio * (keys.audio + text) * narrow
    cross = (queries.video * keys.audio + queries.audio * keys.video) * narrow
    return Work(2.0 * linear, 4.0 * config.num_layers * (inside + cross))


def seen(causal: RolloutConfig, tokens: int, k: int) -> AV[int]:
    """Count the tokens that block `k` sees, itself among them: no more than the window allows, for ever.

    `tokens` is that of a video frame.
    """
    layout, past = causal.layout, min(k, causal.window + 1)
    return AV(
        tokens * (layout.first.video + past * layout.step.video),
        layout.sinks + layout.first.audio + past * layout.step.audio,
    )


def block_work(config: ModelConfig, causal: RolloutConfig, tokens: int, k: int, text: int) -> Work:
    """Count a streamed block: its denoising steps and its being remembered, a pass of its own or not."""
    video, audio = causal.layout.block(k).map(len)
    queries = AV(tokens * video, audio + (causal.layout.sinks if k == 0 else 0))
    steps, once = len(causal.steps_of(k)) - 1, pass_work(config, queries, seen(causal, tokens, k), text)
    if causal.context_pass == "skip":
        return once.times(steps)
    return once.times(steps + 1)._replace(passes=steps + (causal.context_pass == "separate"))


def stream_works(config: ModelConfig, causal: RolloutConfig, tokens: int, text: int, blocks: int) -> list[Work]:
    """Count the first blocks of a stream, one by one."""
    return [block_work(config, causal, tokens, k, text) for k in range(blocks)]


def audio_share(config: ModelConfig, causal: RolloutConfig, tokens: int, text: int) -> float:
    """Give the share of a steady block's work that the audio stream's tokens cause: what concurrency could hide."""
    keys, step = seen(causal, tokens, causal.window + 2), causal.layout.step
    both, audio = (pass_work(config, AV(n, step.audio), keys, text).flops for n in (tokens * step.video, 0))
    return audio / both


def clip_work(config: ModelConfig, latents: AV[int], tokens: int, text: int, passes: int) -> Work:
    """Count a clip by the bidirectional teacher, where every pass runs all tokens and every token sees all."""
    whole = AV(tokens * latents.video, latents.audio)
    return pass_work(config, whole, whole, text).times(passes)


def decoding(latents: AV[int], grid: tuple[int, int]) -> AV[float]:
    """Count FLOPs of LTX-2's own decoders, run once over some latents: picture, and mel with vocoder (specification 2).

    diffusers' defaults are the 19B's sizes; on the meta device, nothing is allocated. A stream does more: its frames
    overlap, because the picture's decoder is not causal.
    """
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2 import LTX2Vocoder
    from torch.utils.flop_counter import FlopCounterMode

    def counted(*calls: Callable[[Tensor], Tensor], x: Tensor) -> float:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            for call in calls:
                x = call(x)
        return counter.get_total_flops()

    with torch.device("meta"):
        picture, sound, vocoder = AutoencoderKLLTX2Video(), AutoencoderKLLTX2Audio(), LTX2Vocoder()
        mels = sound.config.mel_bins // sound.mel_compression_ratio
        seen = torch.empty(1, picture.config.latent_channels, latents.video, *grid)
        heard = torch.empty(1, sound.config.latent_channels, latents.audio, mels)
    return AV(counted(picture.decoder, x=seen), counted(sound.decoder, vocoder, x=heard))


class Gain(NamedTuple):
    """Operations of a teacher's clip, over those of the student's clip and of its first chunk."""

    clip: float
    first_chunk: float


def gain(
    config: ModelConfig,
    causal: RolloutConfig,
    latents: AV[int],
    grid: tuple[int, int],
    text: int,
    passes: int,
    decoders: Callable[[AV[int], tuple[int, int]], AV[float]] = lambda latents, grid: AV(0.0, 0.0),
) -> Gain:
    """Divide the operations of a teacher by a student's: what the speed-up is if both run at the same rate.

    Args:
        config: widths and layers of both.
        causal: how the student streams; its first chunk is blocks 0 and 1 (specification 6.5).
        latents: of the clip.
        grid: tokens of a frame.
        text: tokens of the prompt.
        passes: of the teacher over the whole clip.
        decoders: what decoding costs, added to teacher and student alike: `decoding` is LTX-2's.
    """
    tokens, layout = grid[0] * grid[1], causal.layout
    works = stream_works(config, causal, tokens, text, layout.count(latents.video))
    opened = layout.block(1).map(lambda span: span.stop)
    teacher = clip_work(config, latents, tokens, text, passes).flops + sum(decoders(latents, grid))
    student = plus(*works).flops + sum(decoders(latents, grid))
    return Gain(teacher / student, teacher / (plus(*works[:2]).flops + sum(decoders(opened, grid))))


def cache_bytes(config: ModelConfig, causal: RolloutConfig, tokens: int, bytes_each: int = 2) -> int:
    """Count the rolling cache's bytes: keys and values, of both attentions that read a stream, in every layer."""
    places, dims = seen(causal, tokens, causal.window + 1), AV(config.video_dim, config.audio_dim)
    wide = dims.map(lambda dim, n: n * (dim + config.audio_dim), places)
    return 2 * bytes_each * config.num_layers * sum(wide)


def stream_memory(config: ModelConfig, causal: RolloutConfig, weights: str | None = None) -> dict[str, float]:
    """Count the bytes of a stream of 512 x 768 pixels in bf16 (or with fp8 `weights`), from dry runs.

    Two layers are run and one; layers are alike. Text keys are those of one prompt, anchors the pinned keys at their
    own positions, tables the rotations that are kept, and working what a block's first pass holds at once.
    """
    runs = [dry_run.stream_pass(dry_run.model_of(replace(config, num_layers=n), weights), causal) for n in (1, 2)]
    parts = [
        {"weights": r.weights, "cache": r.rings, "text keys": r.text, "anchors": r.anchors, "tables": r.tables}
        for r in runs
    ]
    whole = {name: a + (config.num_layers - 1) * (parts[1][name] - a) for name, a in parts[0].items()}
    kept = whole.pop("anchors") + whole.pop("tables")
    return whole | {"anchors and tables": kept, "working": runs[1].first.peak}


def memory_rows(config: ModelConfig, causal: RolloutConfig, seconds: int = 5) -> list[dict[str, str]]:
    """Table what needs how much memory, in GB of 1e9 bytes, from dry runs; the text encoder comes on top.

    A guided teacher makes its passes on a whole clip, one after another but for the two prompts. Stage 2 holds a
    student that learns, Stage 3 a critic that learns and a frozen teacher besides, all in fp32.
    """
    columns = ("weights", "cache", "text keys", "anchors and tables", "working")

    def row(use: str, parts: dict[str, float]) -> dict[str, str]:
        cells = {name: f"{parts[name] / 1e9:.1f}" if name in parts else "" for name in columns}
        missing = {} if "working" in parts else {"working": "by batch"}
        return {"use": use} | cells | missing | {"total": f"{sum(parts.values()) / 1e9:.1f}"}

    rows = [
        row(f"stream, bf16, window of {c.window} s", stream_memory(config, c))
        for c in (causal, replace(causal, window=20))
    ]
    rows.append(row(f"stream, fp8 weights, window of {causal.window} s", stream_memory(config, causal, "fp8")))
    codec = dry_run.decoders()
    weights = sum(p.nbytes for part in codec for n, p in part.named_parameters() if "encoder" not in n)
    peak = dry_run.decoding(codec, causal, 3)[-1][0].peak
    rows.append(row("its decoders, horizon of 3 latents", {"weights": weights, "working": peak}))
    weights, two = parameters(config), replace(config, num_layers=2, num_audio_sink_tokens=0)
    guidance = replace(LTX2_GUIDANCE, stg_blocks=frozenset({1}))
    step = dry_run.teacher_step(dry_run.model_of(two), guidance, seconds)
    rows.append(row(f"teacher, {seconds} s, four passes a step", {"weights": 2 * weights, "working": step.peak}))
    student, critic = (training_bytes(config, average) for average in (True, False))
    rows.append(row("Stage 2, all processes together", {"weights": student}))
    rows.append(row("Stage 3, all processes together", {"weights": student + critic + 4 * weights}))
    return rows


class Rates(NamedTuple):
    """How fast a machine works off FLOPs, and what a pass costs besides."""

    linear: float
    attention: float
    pass_s: float

    def seconds(self, work: Work) -> float:
        """Predict the time of a piece of work."""
        return work.linear / self.linear + work.attention / self.attention + work.passes * self.pass_s


def fit(works: Sequence[Work], seconds: Sequence[float]) -> Rates:
    """Fit the three rates to timings, none of them negative, by least relative squares.

    Raises:
        ValueError: fewer than three timings.
    """
    if len(works) < 3:
        raise ValueError(f"three rates need at least 3 timings, found {len(works)}")
    rows = np.array(works, float) / np.array(seconds, float)[:, None]
    scale = rows.max(0)
    slow, _ = nnls(rows / scale, np.ones(len(rows)))
    slow = np.maximum(slow / scale, 1e-30)
    return Rates(1 / slow[0], 1 / slow[1], slow[2])


def predicted(rates: Rates, timed: Sequence[tuple[Work, float]]) -> tuple[list[dict[str, object]], list[float]]:
    """Table timings of other sizes beside their predictions; give the relative errors too."""
    guesses = [rates.seconds(work) for work, _ in timed]
    rows = [
        {
            "GFLOP": f"{work.flops / 1e9:.2f}",
            "measured, ms": f"{1000 * seconds:.1f}",
            "predicted, ms": f"{1000 * guess:.1f}",
        }
        for (work, seconds), guess in zip(timed, guesses, strict=True)
    ]
    return rows, [guess / seconds - 1 for (_, seconds), guess in zip(timed, guesses, strict=True)]


def carried(
    config: ModelConfig, causal: RolloutConfig, tokens: int, text: int, share: float
) -> list[dict[str, object]]:
    """Predict the steady state of a large model on named GPUs that reach `share` of their stated peak.

    Decoding is left out, and so is memory: weights are read once per pass, a small part of its time. A block lasts a
    second, so FLOPs per block are FLOP/s for real time. The first chunk is block 0 and block 1 (specification 6.5).
    """
    steady = block_work(config, causal, tokens, causal.window + 2, text)
    first = plus(*(block_work(config, causal, tokens, k, text) for k in (0, 1)))
    rows = []
    for name, (teraflops, _) in GPUS.items():
        rate = share * teraflops * 1e12
        rows.append(
            {
                "GPU": name,
                "stated peak, TFLOP/s": f"{teraflops:.0f}",
                "TFLOP a block": f"{steady.flops / 1e12:.0f}",
                "share of peak for real time": f"{steady.flops / (teraflops * 1e12):.0%}",
                f"frames a second at {share:.0%} of peak": f"{24 * rate / steady.flops:.0f}",
                "first chunk": f"{first.flops / rate:.2f} s",
            }
        )
    return rows
