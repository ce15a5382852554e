"""Time a stream against its teacher, and whatever else should be compared in one run.

A machine shared with others is fast one second and slow the next. So everything that is compared is timed in turn,
round after round, and told by medians; a speed is a ratio of two such medians of one run.

Shapes: K blocks, F video latents.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from omniforcing_lib import masks
from omniforcing_lib.config import MINIATURE, ModelConfig
from omniforcing_lib.flow import LTX2_GUIDANCE, MINIATURE_GUIDANCE, Guidance, Skip, guided_denoiser
from omniforcing_lib.layout import AV, Clock
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
REAL_GRID = (16, 24)
"""Tokens of a frame of 512 x 768 pixels."""
TEXT_TOKENS = 6
RELEASED_BLOCKS = {"fp32": (1.7, 4.1), "bf16": (1.5, 3.8)}
"""Seconds of the first and of the tenth second of the released causal code, five passes each: random weights of the
size of `BENCH`, frames of `REAL_GRID`, the two cores that the shipped figures come from."""
FULL_GUIDANCE = replace(LTX2_GUIDANCE, stg_blocks=frozenset({2}))
"""LTX-2's own guidance, four passes a step, on a model of few blocks."""


class Percentiles(NamedTuple):
    """Median and slow end of some times, in the unit of the times."""

    p50: float
    p95: float
    p99: float


def percentiles(times: Sequence[float]) -> Percentiles:
    """Give the 50th, 95th and 99th percentile."""
    return Percentiles(*(float(p) for p in np.percentile(times, (50, 95, 99))))


def synchronise() -> None:
    """Wait for the accelerator, if there is one: it works on while Python has moved on."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object]) -> float:
    """Time one call."""
    synchronise()
    began = time.perf_counter()
    call()
    synchronise()
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
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Watched(NamedTuple):
    """A stretch of stream as it was made: chunks, and of every block seconds, keys' bytes and resident bytes."""

    chunks: list[Chunk]
    seconds: list[float]
    cache_bytes: list[int]
    resident: list[int]

    @property
    def frames_a_second(self) -> float:
        """Frames a second of a median block after the first, decoding included."""
        return len(self.chunks[-1].frames) / statistics.median(self.seconds[1:])

    @property
    def first_chunk_s(self) -> float:
        """Seconds until block 0 and block 1 are made and decoded (spec 6.5)."""
        return sum(self.seconds[:2])


def watch(streamer: Streamer, blocks: int, keep: int | None = None) -> Watched:
    """Run a stream and time every block, decoding included; only `keep` chunks and the last are held."""
    seen = Watched([], [], [], [])
    for k in tqdm(range(blocks), desc="streaming", unit="block", delay=2, leave=False):
        made: list[Chunk] = []
        seen.seconds.append(seconds_of(lambda made=made: made.append(streamer.step())))
        seen.cache_bytes.append(streamer.cache_bytes)
        seen.resident.append(resident_bytes())
        if keep is None or k < keep or k == blocks - 1:
            seen.chunks.extend(made)
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
    seconds = np.median([[[s for s, _ in row] for row in made] for made in rounds], axis=0).T
    held = [[nbytes for _, nbytes in column] for column in zip(*rounds[0], strict=True)]
    return dict(zip(policies, seconds.tolist(), strict=True)), dict(zip(policies, held, strict=True))


def random_model(config: ModelConfig, sinks: int, seed: int, device: str = "cpu") -> Transformer:
    """Build a model of random weights: for time, not for pictures."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config.with_sinks(sinks))
    for parameter in model.parameters():
        spread = parameter.shape[-1] ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread
    return model.requires_grad_(False).eval().to(device)


def random_text(config: ModelConfig, like: torch.Tensor) -> AV[torch.Tensor]:
    """Draw the context of a prompt on the device and in the dtype of `like`. Shapes: AV [1, L, caption channels]."""
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, TEXT_TOKENS, config.caption_channels, generator=generator).to(like)
    return AV(context, context)


@torch.inference_mode()
def block_seconds(
    model: Transformer, causal: RolloutConfig, grid: tuple[int, int], blocks: int
) -> Iterator[tuple[float, int]]:
    """Yield seconds of each block of a roll-out, its being remembered included, and the bytes of its cache."""
    weight = model.proj_out.weight
    text, noise = random_text(model.config, weight), seeded_noise([0], weight)
    cache = new_cache(model, causal, grid, 1, blocks)
    made = rollout(model, causal, text, noise, grid, causal.layout.block(blocks - 1).video.stop)
    for _ in range(blocks):
        yield seconds_of(lambda: next(made)), cache.nbytes


@torch.inference_mode()
def teacher_step(
    model: Transformer, grid: tuple[int, int], seconds: int, guidance: Guidance = MINIATURE_GUIDANCE
) -> Callable[[], object]:
    """Prepare one guided step of the bidirectional teacher on a clip: calling it runs the step."""
    weight, latents = model.proj_out.weight, Clock().latents(seconds)
    text, device = random_text(model.config, weight), weight.device
    x = AV(
        torch.randn(1, latents.video, *grid, model.config.in_channels, device=device),
        torch.randn(1, latents.audio, model.config.audio_in_channels, device=device),
    )
    denoise, level = guided_denoiser(model, text, text, guidance), torch.tensor(0.7, device=device)
    return torch.inference_mode()(lambda: denoise(x, level))


def training_step(
    model: Transformer, causal: RolloutConfig, grid: tuple[int, int], seconds: int, rendering: str
) -> Callable[[], object]:
    """Prepare a masked training step on a clip: calling it runs forward and backward through the whole model.

    Each latent's sigma is its block's; `rendering` is how attention uses the masks (see `masks.build`).
    """
    weight, latents = model.proj_out.weight, Clock().latents(seconds)
    text, tokens = random_text(model.config, weight), grid[0] * grid[1]
    kind = masks.build(causal.layout, latents.video, tokens, rendering=rendering)
    x = AV(
        torch.randn(1, latents.video, *grid, model.config.in_channels, device=weight.device),
        torch.randn(1, latents.audio, model.config.audio_in_channels, device=weight.device),
    )
    sigma = latents.map(lambda n: torch.full((1, n), 0.7, device=weight.device))

    def step() -> None:
        out = model(x, sigma, text, masks=kind)
        (out.video.square().mean() + out.audio.square().mean()).backward()
        model.zero_grad(set_to_none=True)

    return step


def open_block(model: Transformer, causal: RolloutConfig, grid: tuple[int, int], k: int) -> Callable[[], object]:
    """Prepare one pass over block `k` against a cache full of noise: calling it costs what mid-stream costs."""
    weight, block = model.proj_out.weight, causal.layout.block(k)
    text, cache = random_text(model.config, weight), new_cache(model, causal, grid, 1)
    x = AV(
        torch.randn(1, len(block.video), *grid, model.config.in_channels, device=weight.device),
        torch.randn(1, len(block.audio), model.config.audio_in_channels, device=weight.device),
    )
    for tensor in cache.tensors().values():
        tensor.normal_()
    opened = cache.open(k)
    return torch.inference_mode()(lambda: model(x, AV(0.7, 0.7), text, cache=cache, blocks=(opened,), sigma_key=0.7))


@torch.inference_mode()
def steady_block(model: Transformer, causal: RolloutConfig, grid: tuple[int, int]) -> Callable[[], object]:
    """Prepare a block in mid-stream, its predecessor to be remembered: calling it costs what the stream costs."""
    weight, k, cache = model.proj_out.weight, causal.window + 2, new_cache(model, causal, grid, 1)
    text, noise = random_text(model.config, weight), seeded_noise([0], weight)
    for tensor in cache.tensors().values():
        tensor.normal_()
    before = next_block(model, causal, cache, text, noise, k, None)

    def block() -> None:
        next_block(model, causal, cache, text, noise, k + 1, before)

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
    timed: Mapping[str, Sequence[float]], grid: tuple[int, int], kind: str = "fp32"
) -> list[dict[str, object]]:
    """Table the seconds of the first ten blocks, of five passes each, with what is known of the released code.

    Its times are known at the ends only, and for frames of `REAL_GRID`.
    """
    first, last = RELEASED_BLOCKS[kind]
    known = {0: f"{first}", 9: f"{last}"} if grid == REAL_GRID else {}
    rows = zip(*timed.values(), strict=True)
    return [
        {"block": k, "released code, s": known.get(k, "between" if known else "not measured at this size")}
        | {f"{name}, s": f"{seconds:.2f}" for name, seconds in zip(timed, row, strict=True)}
        for k, row in enumerate(rows)
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
        made = rollout(model, causal, text, seeded_noise([streamer.seed], weight), codec.grid, latents)
        return to_arrays(codec.decode(join(list(made))))


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
    weight, latents = model.proj_out.weight, Clock().latents(1)
    shapes = AV((1, latents.video, *grid, model.config.in_channels), (1, latents.audio, model.config.audio_in_channels))
    x, level = shapes.map(lambda shape: torch.ones(shape, device=weight.device)), weight.new_full((1,), 0.7)
    text, run = random_text(model.config, weight), partial(model, skip=skip)
    before = run(x, AV(level, level), text)
    moved = AV(AV(x.video, -x.audio), AV(-x.video, x.audio))
    after = AV(*(run(other, AV(level, level), text)[i] for i, other in enumerate(moved)))
    return before.map(lambda a, b: (a - b).abs().max().item(), after)
