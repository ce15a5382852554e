"""Time a stream against its teacher, and whatever else should be compared in one run.

A machine shared with others is fast one second and slow the next. So everything that is compared is timed in turn,
round after round, and told by medians; a speed is a ratio of two such medians of one run.

Shapes: K blocks, F video latents.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor
from tqdm.auto import tqdm

from omniforcing_lib import masks
from omniforcing_lib.cache import KVCache
from omniforcing_lib.config import MINIATURE, ModelConfig
from omniforcing_lib.flow import LTX2_GUIDANCE, MINIATURE_GUIDANCE, Guidance, Skip, guided_denoiser
from omniforcing_lib.layout import AV, Clock
from omniforcing_lib.ltx2 import low_memory
from omniforcing_lib.rollout import RolloutConfig, join, new_cache, next_block, rollout, seeded_noise
from omniforcing_lib.stream import Chunk, Streamer, threads, to_arrays
from omniforcing_lib.transformer import Transformer
from studies.cost import Work, block_work

BENCH = replace(
    MINIATURE,
    num_layers=4,
    attention_head_dim=64,
    audio_attention_head_dim=32,
    cross_attention_dim=256,
    audio_cross_attention_dim=128,
    in_channels=128,
    out_channels=128,
    audio_in_channels=128,
    audio_out_channels=128,
)
"""The 19B's latents at a sixteenth of its width and a twelfth of its depth."""
CLOCK = Clock()
REAL_GRID = (16, 24)
"""Tokens of a frame of 512 x 768 pixels."""
TEXT_TOKENS = 6
RELEASED_BLOCKS = {"fp32": (1.7, 4.1), "bf16": (1.5, 3.8)}
"""Seconds of the first and of the tenth second of the released causal code, five passes each: random weights of the
size of `BENCH`, frames of `REAL_GRID`, the two cores that the shipped figures come from."""
FULL_GUIDANCE = replace(LTX2_GUIDANCE, stg_blocks=frozenset({2}))
"""LTX-2's own guidance, four passes per step, on a model of few blocks."""


class Percentiles(NamedTuple):
    """Median and slow end of some times, in the unit of the times."""

    p50: float
    p95: float
    p99: float


def percentiles(times: Sequence[float]) -> Percentiles:
    """Give the 50th, 95th and 99th percentile."""
    return Percentiles(*(float(p) for p in np.percentile(times, (50, 95, 99))))


def seconds_of(call: Callable[[], object]) -> float:
    """Time one call; an accelerator works on while Python has moved on, so it is waited for."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def alternate(calls: Mapping[str, Callable[[], object]], turns: int, warm: int = 1) -> dict[str, list[float]]:
    """Time calls in turn, so that a slow moment of the machine falls on all of them; in seconds."""
    for _ in range(warm):
        for call in calls.values():
            call()
    bar = tqdm(range(turns), desc=f"timing {', '.join(calls)}", unit="turn", delay=2, leave=False)
    rounds = [{name: seconds_of(call) for name, call in calls.items()} for _ in bar]
    return {name: [times[name] for times in rounds] for name in calls}


def resident_bytes() -> int:
    """Memory of this process: of the accelerator if there is one, else what the system says is resident."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


class Watched(NamedTuple):
    """A stretch of stream as it was made: chunks, and of every block seconds, keys' bytes and resident bytes."""

    chunks: list[Chunk]
    seconds: list[float]
    cache_bytes: list[int]
    resident: list[int]

    @property
    def frames_a_second(self) -> float:
        """Frames per second of a median block after the first, decoding included."""
        return len(self.chunks[-1].frames) / statistics.median(self.seconds[1:])

    def seconds_to(self, frames: int) -> float:
        """Seconds until so many frames are there to be shown; a decoder that looks ahead holds some back."""
        there = accumulate(len(chunk.frames) for chunk in self.chunks)
        return sum(self.seconds[: next(k for k, count in enumerate(there, 1) if count >= frames)])


def watch(streamer: Streamer, blocks: int, keep: int | None = None) -> Watched:
    """Run a stream and time every block, decoding included; only `keep` chunks and the last are held."""
    seen = Watched([], [], [], [])
    for k in tqdm(range(blocks), desc="streaming", unit="block", delay=2, leave=False):
        new: list[Chunk] = []
        seen.seconds.append(seconds_of(lambda new=new: new.append(streamer.step())))
        seen.cache_bytes.append(streamer.cache_bytes)
        seen.resident.append(resident_bytes())
        if keep is None or k < keep or k == blocks - 1:
            seen.chunks.extend(new)
    return seen


def aged(old: Streamer, fresh: Streamer, turns: int) -> float:
    """Give the time of a block of an old stream over that of a fresh one whose window is full; median of turns.

    A block each in turn: what the machine does in the meantime falls on both, growth falls on one.
    """
    watch(fresh, fresh.causal.window + 2, keep=0)
    times = alternate({"old": old.step, "fresh": fresh.step}, turns)
    return statistics.median(a / b for a, b in zip(times["old"], times["fresh"], strict=True))


def ways(causal: RolloutConfig) -> dict[str, RolloutConfig]:
    """Give a student's way to make a block and those that spend fewer passes on it, or fewer calls, by name."""
    noisy, fewer = replace(causal, context_pass="skip"), (causal.steps[0], *causal.steps[2:])
    return {
        "as shipped": causal,
        "remembered in the next block's first step": replace(causal, context_pass="fused"),
        "never remembered clean": noisy,
        "a step less from block 2 on": replace(causal, later_steps=fewer),
        "both": replace(noisy, later_steps=fewer),
    }


def race(make: Callable[[], Streamer], whole: Callable[[], object], blocks: int, turns: int) -> dict[str, float]:
    """Time, in turn, the first chunk of a new stream, its first `blocks` blocks, and a clip made whole; medians.

    The stream runs on one thread, the clip on all.
    """

    def streamed(count: int) -> None:
        with threads(1), make() as streamer:
            watch(streamer, count, keep=0)

    calls = {"first chunk": partial(streamed, 2), "student": partial(streamed, blocks), "teacher": whole}
    return {name: statistics.median(times) for name, times in alternate(calls, turns).items()}


def in_turn(
    model: Transformer, policies: Mapping[str, RolloutConfig], grid: tuple[int, int], blocks: int, turns: int
) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Roll streams of one model out, a block of each in turn: medians of each block's seconds, and cache bytes."""
    rounds = []
    for _ in tqdm(range(turns), desc=f"timing {', '.join(policies)}", unit="turn", delay=2, leave=False):
        rolls = [block_seconds(model, causal, grid, blocks) for causal in policies.values()]
        rounds.append(list(zip(*rolls, strict=True)))
    seconds, nbytes = np.moveaxis(np.array(rounds), (3, 2), (0, 1))  # by policy, turn and block
    medians, first = np.median(seconds, axis=1).tolist(), nbytes[:, 0].astype(int).tolist()
    return dict(zip(policies, medians, strict=True)), dict(zip(policies, first, strict=True))


def random_model(
    config: ModelConfig,
    sinks: int,
    seed: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    fp8: bool = False,
) -> Transformer:
    """Build a model of random weights, drawn on its device, so that the host never holds them: for time, not pictures.

    With `fp8` the blocks' weights are rounded to e4m3, one layer after another.
    """
    with torch.device("meta"):
        model = Transformer(config.with_sinks(sinks)).to(dtype)
        model = low_memory.with_fp8_layers(model) if fp8 else model
    model = model.to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dtype == low_memory.FP8:
            wide = torch.empty(parameter.shape, dtype=dtype, device=device)
            wide.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            parameter.data, scale = low_memory.quantise(wide)
            model.get_submodule(name.removesuffix(".weight")).weight_scale.data = scale
        elif name.endswith("norm.weight"):
            parameter.fill_(1)
        elif not name.endswith("weight_scale"):
            small = parameter.dim() < 2 or name.endswith("table")
            parameter.normal_(0, 0.02 if small else parameter.shape[-1] ** -0.5, generator=generator)
    return model


def random_text(model: Transformer, length: int = TEXT_TOKENS) -> AV[Tensor]:
    """Draw the context of a prompt on a model's device and in its dtype. Shapes: AV [1, L, caption channels]."""
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, length, model.config.caption_channels, generator=generator)
    return AV(context, context).map(lambda t: t.to(model.proj_out.weight))


def random_latents(model: Transformer, latents: AV[int], grid: tuple[int, int]) -> AV[Tensor]:
    """Draw latents of one clip on a model's device. Shapes: to AV([1, F, h, w, C], [1, T, C])."""
    shapes, device = model.config.latent_shapes(latents, grid), model.proj_out.weight.device
    return shapes.map(lambda shape: torch.randn(1, *shape, device=device))


def noisy_cache(model: Transformer, causal: RolloutConfig, grid: tuple[int, int]) -> KVCache:
    """Make a cache full of noise: a pass against it costs what it costs in mid-stream."""
    cache = new_cache(model, causal, grid, 1)
    for tensor in cache.tensors().values():
        tensor.normal_()
    return cache


@torch.inference_mode()
def block_seconds(
    model: Transformer, causal: RolloutConfig, grid: tuple[int, int], blocks: int, text: int = TEXT_TOKENS
) -> Iterator[tuple[float, int]]:
    """Yield seconds of each block of a roll-out, its being remembered included, and the bytes of its cache."""
    context, noise = random_text(model, text), seeded_noise([0], model.proj_out.weight)
    cache = new_cache(model, causal, grid, 1, blocks)
    stream = rollout(model, causal, context, noise, grid, causal.layout.block(blocks - 1).video.stop)
    for _ in range(blocks):
        yield seconds_of(lambda: next(stream)), cache.nbytes


@torch.inference_mode()
def teacher_step(
    model: Transformer, grid: tuple[int, int], seconds: int, guidance: Guidance = MINIATURE_GUIDANCE
) -> Callable[[], object]:
    """Prepare one guided step of the bidirectional teacher on a clip: calling it runs the step."""
    text, x = random_text(model), random_latents(model, CLOCK.latents(seconds), grid)
    denoise, level = guided_denoiser(model, text, text, guidance), torch.tensor(0.7, device=x.video.device)
    return torch.inference_mode()(lambda: denoise(x, level))


def training_step(
    model: Transformer,
    causal: RolloutConfig,
    grid: tuple[int, int],
    seconds: int,
    rendering: str,
    text: int = TEXT_TOKENS,
) -> Callable[[], object]:
    """Prepare a masked training step on a clip: calling it runs forward and backward through the whole model.

    Each latent's sigma is its block's; `rendering` is how attention uses the masks (see `masks.build`).
    """
    latents = CLOCK.latents(seconds)
    context, x = random_text(model, text), random_latents(model, latents, grid)
    built = masks.build(causal.layout, latents.video, grid[0] * grid[1], rendering=rendering)
    sigma = x.map(lambda stream: torch.full(stream.shape[:2], 0.7, device=stream.device))

    def step() -> None:
        out = model(x, sigma, context, masks=built)
        (out.video.square().mean() + out.audio.square().mean()).backward()
        model.zero_grad(set_to_none=True)

    return step


def open_block(
    model: Transformer, causal: RolloutConfig, grid: tuple[int, int], k: int, text: int = TEXT_TOKENS
) -> Callable[[], object]:
    """Prepare one pass over block `k`, see `noisy_cache`: calling it runs the pass."""
    context, cache = random_text(model, text), noisy_cache(model, causal, grid)
    x = random_latents(model, causal.layout.block(k).map(len), grid)
    blocks = (cache.open(k),)
    return torch.inference_mode()(lambda: model(x, AV(0.7, 0.7), context, cache=cache, blocks=blocks, sigma_key=0.7))


@torch.inference_mode()
def steady_block(
    model: Transformer, causal: RolloutConfig, grid: tuple[int, int], text: int = TEXT_TOKENS
) -> Callable[[], object]:
    """Prepare a block in mid-stream, its predecessor to be remembered: calling it costs what the stream costs."""
    k, context, noise = causal.window + 2, random_text(model, text), seeded_noise([0], model.proj_out.weight)
    cache = noisy_cache(model, causal, grid)
    before = next_block(model, causal, cache, context, noise, k, None)

    def block() -> None:
        next_block(model, causal, cache, context, noise, k + 1, before)

    return torch.inference_mode()(block)


def block_times(
    model: Transformer, causal: RolloutConfig, grids: Sequence[tuple[int, int]], turns: int
) -> list[tuple[Work, float]]:
    """Time a block in mid-stream at several sizes of the frame, in turn; the median with the work it did."""
    calls = {str(grid): steady_block(model, causal, grid) for grid in grids}
    works = [
        block_work(model.config, causal, rows * columns, causal.window + 3, TEXT_TOKENS) for rows, columns in grids
    ]
    timed = alternate(calls, turns)
    return [(work, statistics.median(times)) for work, times in zip(works, timed.values(), strict=True)]


def beside_released(
    timed: Mapping[str, Sequence[float]], grid: tuple[int, int], dtype: str = "fp32"
) -> list[dict[str, object]]:
    """Table the seconds of the first and the tenth block, of five passes each, beside the released code's.

    Its times are known for frames of `REAL_GRID`; at another size there is no such column.
    """
    known = zip((0, 9), RELEASED_BLOCKS[dtype], strict=True)
    return [
        {"block": k, "numbers": dtype}
        | ({"released code, s": f"{seconds}"} if grid == REAL_GRID else {})
        | {f"{n}, s": f"{timed[n][k]:.2f}" for n in timed}
        for k, seconds in known
    ]


def sizes(grid: tuple[int, int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Give frame sizes up to `grid` to fit a cost model on, and others between them to test it on."""

    def scaled(*shares: tuple[float, float]) -> list[tuple[int, int]]:
        return [(int(grid[0] * rows), int(grid[1] * columns)) for rows, columns in shares]

    fitted = (0.25, 0.25), (0.5, 0.5), (0.5, 1), (0.75, 1), (1, 1)
    return scaled(*fitted), scaled((0.25, 0.5), (0.5, 0.75), (0.75, 0.75))


def offline(streamer: Streamer, blocks: int) -> AV[np.ndarray]:
    """Make what a new streamer's first blocks should be, in one piece: roll out, join, decode the whole.

    Shapes: AV(uint8 [F, H, W, 3], float32 [N]).
    """
    model, causal, codec = streamer.model, streamer.causal, streamer.codec
    weight = model.proj_out.weight
    with torch.inference_mode():
        text = streamer.text.encode([streamer.prompt], weight.device, weight.dtype)
        latents = causal.layout.block(blocks - 1).video.stop
        blocks = rollout(model, causal, text, seeded_noise([streamer.seed], weight), codec.grid, latents)
        return to_arrays(codec.decode(join(list(blocks))))


def joined(chunks: Sequence[Chunk]) -> AV[np.ndarray]:
    """Join chunks to a clip. Shapes: AV(uint8 [F, H, W, 3], float32 [N])."""
    return AV(*(np.concatenate(part) for part in zip(*((c.frames, c.samples) for c in chunks), strict=True)))


def equal(a: AV[np.ndarray], b: AV[np.ndarray], tolerance: float = 0.0) -> bool:
    """Tell whether two clips have the same frames, and samples within a tolerance."""
    close = a.audio.shape == b.audio.shape and np.abs(a.audio - b.audio).max(initial=0) <= tolerance
    return bool(close) and np.array_equal(a.video, b.video)


@torch.inference_mode()
def moved_by_the_other(model: Transformer, grid: tuple[int, int], skip: Skip | None) -> AV[float]:
    """Change all latents of one stream and tell how far the other stream's output moves.

    With cross-modal attention skipped it must not move at all: then the streams may run side by side.
    """
    x, level = random_latents(model, CLOCK.latents(1), grid).map(torch.ones_like), torch.tensor([0.7])
    text, sigma = random_text(model), AV(level, level).map(lambda t: t.to(x.video))
    before = model(x, sigma, text, skip=skip)
    others = AV(AV(x.video, -x.audio), AV(-x.video, x.audio))
    after = AV(*(model(other, sigma, text, skip=skip)[i] for i, other in enumerate(others)))
    return before.map(lambda a, b: (a - b).abs().max().item(), after)
