"""Roll a causal student out: denoise one block, cache it clean, go on (paper Sec. 3.3; specification 5.7, 6.3).

One function, `next_block`, serves streaming, evaluation and training. Where gradients flow is one argument,
`exit_step`: every block stops at that step, which alone is run with gradients; all earlier steps and the history are
detached.

Shapes: B batch, F video and T audio latents of a block, K blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from omniforcing_lib import backends
from omniforcing_lib.backends import computed_in
from omniforcing_lib.cache import KVCache, OpenBlock
from omniforcing_lib.flow import PAPER_STEPS, block_noise, precise, snap
from omniforcing_lib.layout import AV, LAYOUTS, PAPER, BlockLayout
from omniforcing_lib.transformer import Transformer

Noise = Callable[[int, AV[tuple[int, ...]], int], AV[Tensor]]
"""noise(block, shapes [F, ...] of each stream, draw) -> AV [B, F, ...]; draw i is added before step i."""

Watch = Callable[[AV[Tensor]], None]
"""watch(state AV [B, F, ...]) is told each block's state before its last step."""


CONTEXT_PASSES = ("separate", "fused", "skip")
OLDER_NAMES = {"own": "separate", "merged": "fused", "none": "skip"}
"""What files written before 2026-11-28 call the context passes."""


@dataclass(frozen=True)
class RolloutConfig:
    """How a student generates; stored in its checkpoint.

    Attributes:
        layout: blocks and sinks.
        steps: noise levels x 1000 of a block, ending in 0; snapped to the 40-step schedule (specification 5.0).
        window: past blocks that a block sees besides block 0; 4 is all of a 5-second clip.
        reanchor: past the window, let sinks and block 0 follow it (see `KVCache`).
        context_noise: sigma at which a finished block is stored in the cache; 0 is clean.
        context_pass: how a finished block gets into the cache: in a `separate` pass; `fused` into the pass of the
            next block's first step, which is the same to rounding; or `skip`, as its last step left it, still noisy.
        later_steps: noise levels of the blocks from 2 on, where they are others than `steps`.
    """

    layout: BlockLayout = PAPER
    steps: tuple[int, ...] = PAPER_STEPS
    window: int = 4
    reanchor: bool = True
    context_noise: float = 0.0
    context_pass: str = "separate"
    later_steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.context_pass not in CONTEXT_PASSES:
            raise ValueError(f"context_pass is one of {', '.join(CONTEXT_PASSES)}; found {self.context_pass!r}")

    @property
    def sigmas(self) -> Tensor:
        """Noise levels of the steps, the final 0 included. Shapes: float64 [steps + 1]."""
        return snap(self.steps)

    def steps_of(self, k: int) -> tuple[int, ...]:
        """Noise levels x 1000 of block `k`."""
        return self.later_steps if self.later_steps and k > 1 else self.steps

    @property
    def trainable(self) -> bool:
        """Tell whether self-forcing can train what this generates: clean history, one list of steps."""
        return self.context_pass != "skip" and not self.later_steps

    def to_metadata(self) -> dict[str, object]:
        """Give the `omniforcing` part of a checkpoint's `config`."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_metadata(cls, config: dict) -> RolloutConfig:
        """Read the `omniforcing` part of a checkpoint's `config`."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        if "context_pass" in fields:
            fields["context_pass"] = OLDER_NAMES.get(fields["context_pass"], fields["context_pass"])
        fields["layout"] = BlockLayout(**config["layout"])
        return cls(**fields)

    @classmethod
    def from_layout(cls, name: str, sinks: int | None = None, **changes: Any) -> RolloutConfig:
        """Take one of the two named layouts, with its own or another number of sinks."""
        if name not in LAYOUTS:
            raise ValueError(f"unknown layout {name!r}; choose one of {', '.join(LAYOUTS)}")
        layout = LAYOUTS[name] if sinks is None else replace(LAYOUTS[name], sinks=sinks)
        return cls(layout, **changes)


@lru_cache
def _sigmas(steps: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(snap(steps).tolist())


def seeded_noise(seeds: Sequence[int], like: Tensor) -> Noise:
    """Draw noise from (seed, block, draw) alone, so that a stream can be resumed or re-cut; for a GPU a block ahead."""

    def drawn(block: int, shapes: AV[tuple[int, ...]], draw: int) -> AV[Tensor]:
        return block_noise(seeds, block, shapes, draw).map(lambda x: x.to(like.dtype))

    if backends.on_gpu(like.device):
        return NoiseAhead(drawn, like.device)
    return lambda *question: drawn(*question).map(lambda x: x.to(like.device))


class NoiseAhead:
    """Draw the next block's noise in a thread while this block is made, into memory that is copied without a wait.

    Args:
        drawn: noise on the CPU, in the dtype that is wanted.
        device: where it goes.
    """

    def __init__(self, drawn: Noise, device: torch.device) -> None:
        self._drawn, self._device = drawn, device
        self._maker = ThreadPoolExecutor(1, "noise")
        self._coming: dict[tuple, Future[AV[Tensor]]] = {}

    def __call__(self, block: int, shapes: AV[tuple[int, ...]], draw: int) -> AV[Tensor]:
        """Give noise, and begin that of the same draw of the next block."""
        self._coming = {asked: noise for asked, noise in self._coming.items() if asked[0] >= block}
        coming = self._coming.pop((block, shapes, draw), None)
        now = coming.result() if coming else self._pinned(block, shapes, draw)
        ahead = block + 1, shapes, draw
        self._coming[ahead] = self._maker.submit(self._pinned, *ahead)
        return now.map(lambda x: x.to(self._device, non_blocking=True))

    def _pinned(self, block: int, shapes: AV[tuple[int, ...]], draw: int) -> AV[Tensor]:
        return self._drawn(block, shapes, draw).map(lambda x: x.pin_memory() if torch.cuda.is_available() else x)


def fresh_noise(generator: torch.Generator, batch: int) -> Noise:
    """Draw noise in sequence from one generator: what training uses."""

    def draw(block: int, shapes: AV[tuple[int, ...]], index: int) -> AV[Tensor]:
        return shapes.map(lambda s: torch.randn(batch, *s, generator=generator, device=generator.device))

    return draw


def predict(
    model: Transformer, x: AV[Tensor], sigma: float, text: AV[Tensor], cache: KVCache, block: OpenBlock
) -> AV[Tensor]:
    """Predict x0 of an open block; sigma is one number for both streams, in fp32 (specification 8.1.7)."""
    velocity = model(x, AV(sigma, sigma), text, cache=cache, blocks=(block,), sigma_key=sigma)
    return x.map(lambda x, v: torch.sub(precise(x), precise(v), alpha=sigma), velocity)


def predict_behind(
    model: Transformer,
    x: AV[Tensor],
    sigma: float,
    before: AV[Tensor],
    context_sigma: float,
    text: AV[Tensor],
    cache: KVCache,
    blocks: tuple[OpenBlock, OpenBlock],
) -> AV[Tensor]:
    """Predict x0 of a block in one pass with the block before it, whose keys and values are stored that way."""
    # 1. Both blocks stand one after the other, each at its own noise level.
    sizes = before.map(lambda b: b.shape[1])
    pair = before.map(lambda b, x: torch.cat([b.to(x), x], dim=1), x)
    sigmas = pair.map(lambda t, n: (context_sigma,) * n + (sigma,) * (t.shape[1] - n), sizes)
    # 2. Sinks have a noise level too, so a pass with sinks in front has another key.
    key = sigmas, blocks[0].k == 0
    velocity = model(pair, sigmas, text, cache=cache, blocks=blocks, sigma_key=key).map(lambda v, n: v[:, n:], sizes)
    # 3. Only the second block's velocity is used; the pass of the first one has stored its keys and values.
    return x.map(lambda x, v: torch.sub(precise(x), precise(v), alpha=sigma), velocity)


def denoise_block(
    model: Transformer,
    cache: KVCache,
    block: OpenBlock,
    text: AV[Tensor],
    sigmas: Sequence[float],
    noise: Callable[[int], AV[Tensor]],
    exit_step: int | None = None,
    first: Callable[[AV[Tensor]], AV[Tensor]] | None = None,
    watch: Watch | None = None,
) -> AV[Tensor]:
    """Denoise an open block from pure noise; with `exit_step` stop there, with gradients (specification 5.7).

    `first` predicts at the first step, where that is done otherwise; `watch` is told the state before the last step.

    Shapes: `noise(i)` is AV([B, F, h, w, C], [B, T, C]), added before step i; the result is x0 of the same shapes.
    """
    last = len(sigmas) - 2 if exit_step is None else exit_step
    # 1. Every block begins as pure noise.
    x = noise(0)
    for i in range(last + 1):
        if watch and i == last:
            watch(x)
        # 2. Predict clean data. Only the exit step has gradients, if the caller has not switched them off; it stores
        #    nothing in the cache.
        gradients = exit_step is not None and i == last and torch.is_grad_enabled()
        with torch.set_grad_enabled(gradients):
            opened = block._replace(writes=not gradients)
            x0 = first(x) if first and i == 0 else predict(model, x, sigmas[i], text, cache, opened)
        # 3. Go to the next noise level with fresh noise.
        if i < last:
            x = x0.map(lambda data, eps, i=i: renoised(data, eps, sigmas[i + 1]), noise(i + 1))
    return x0


def renoised(x0: Tensor, eps: Tensor, sigma: float) -> Tensor:
    """Mix data with fresh noise at a level known on the host, (1 - sigma) x0 + sigma eps."""
    return torch.lerp(x0, eps.to(x0), sigma)


def as_context(causal: RolloutConfig, noise: Noise, k: int, block: AV[Tensor]) -> AV[Tensor]:
    """Give block `k` as it is stored in the cache: without gradients, clean or at the context noise."""
    block, sigma = block.map(Tensor.detach), causal.context_noise
    if not sigma:
        return block
    # The steps have taken draws 0 to n - 1 of this block's noise, so this is the next one.
    eps = noise(k, block.map(lambda x: tuple(x.shape[1:])), len(causal.steps_of(k)))
    return block.map(lambda data, eps: renoised(data, eps, sigma), eps)


@torch.no_grad()
def update_cache(
    model: Transformer, cache: KVCache, k: int, text: AV[Tensor], context: AV[Tensor], sigma: float
) -> None:
    """Store the keys and values of block `k`, at the sigma that `as_context` gave it."""
    predict(model, context, sigma, text, cache, cache.open(k))


def recache_window(
    model: Transformer,
    causal: RolloutConfig,
    cache: KVCache,
    text: AV[Tensor],
    noise: Noise,
    k: int,
    latents: Mapping[int, AV[Tensor]],
) -> None:
    """Store all that block `k` will see again, under another text; `next_block` does the block before it.

    `latents` holds those of block 0 and of the window, by block. Raises ValueError where no pass stores a block.
    """
    if causal.context_pass == "skip":
        raise ValueError("context_pass is 'skip': no pass stores a finished block, so none can be stored again")
    for i in cache.restart(k):
        if i < k - 1:
            # A block is stored at the level, and with the noise, that it had when it was first stored.
            context = as_context(causal, noise, i, latents[i])
            update_cache(model, cache, i, text, context, causal.context_noise)


def next_block(
    model: Transformer,
    causal: RolloutConfig,
    cache: KVCache,
    text: AV[Tensor],
    noise: Noise,
    k: int,
    before: AV[Tensor] | None,
    *,
    block: AV[range] | None = None,
    exit_step: int | None = None,
    watch: Watch | None = None,
) -> AV[Tensor]:
    """Store the block before in the cache, then denoise block `k`, in the passes that `causal` says.

    Args:
        model: the student.
        causal: blocks, steps, and how a finished block is stored.
        cache: what came before.
        text: AV [B, L, C].
        noise: where noise comes from.
        k: the block.
        before: block k - 1; None for block 0.
        block: latents of block `k` where it is partial.
        exit_step: see `rollout`; then every block is stored in a separate pass.
        watch: see `denoise_block`.

    Shapes: AV([B, F, h, w, C], [B, T, C]) of block k - 1 to those of block k.
    """
    block, config, sigmas, first = block or causal.layout.block(k), model.config, _sigmas(causal.steps_of(k)), None
    # 1. The block before goes into the cache: in a pass of its own, or with this block's first step.
    if before is not None and causal.context_pass != "skip":
        context, context_sigma = as_context(causal, noise, k - 1, before), causal.context_noise
        # LTX-2.3 modulates the text, and one stream for the other, by one sigma for each sample
        if causal.context_pass == "fused" and exit_step is None and not config.cross_attention_adaln:
            rest = {"text": text, "cache": cache, "blocks": cache.open_pair(k, block)}
            first = partial(predict_behind, model, sigma=sigmas[0], before=context, context_sigma=context_sigma, **rest)
        else:
            update_cache(model, cache, k - 1, text, context, context_sigma)
    # 2. This block is denoised against the cache.
    shapes = config.latent_shapes(block.map(len), cache.grid)
    opened = cache.open(k, block)
    return denoise_block(model, cache, opened, text, sigmas, lambda i: noise(k, shapes, i), exit_step, first, watch)


def new_cache(
    model: Transformer, causal: RolloutConfig, grid: tuple[int, int], batch: int, blocks: int | None = None
) -> KVCache:
    """Allocate a cache for `causal`, no larger than a clip of `blocks` needs."""
    weight = model.proj_out.weight
    window = causal.window if blocks is None else max(0, min(causal.window, blocks - 2))
    options = {"reanchor": causal.reanchor, "clock": model.clock, "device": weight.device}
    return KVCache(model.config, causal.layout, grid, batch, window, dtype=computed_in(weight), **options)


def rollout(
    model: Transformer,
    causal: RolloutConfig,
    text: AV[Tensor],
    noise: Noise,
    grid: tuple[int, int],
    video_latents: int,
    *,
    exit_step: int | None = None,
    history: AV[Tensor] | None = None,
    watch: Watch | None = None,
) -> Iterator[AV[Tensor]]:
    """Yield the blocks of a clip one by one.

    Args:
        model: the student.
        causal: blocks, steps, window.
        text: AV [B, L, C].
        noise: where noise comes from.
        grid: tokens of a video frame.
        video_latents: length of the clip.
        exit_step: step at which every block stops, with gradients; None runs all steps.
        history: clean latents that are stored in place of the student's own (teacher forcing), AV of the clip.
        watch: is told each block's state before its last step, AV([B, F, h, w, C], [B, T, C]).
    """
    if not causal.trainable and exit_step is not None:
        raise ValueError(
            "self-forcing stores clean blocks, and all blocks stop at the same step; train with context_pass "
            f"'separate' or 'fused' and without later_steps, found {causal.context_pass!r} and {causal.later_steps}"
        )
    if causal.context_pass == "skip" and history is not None:
        raise ValueError("a history is stored by a separate pass, and context_pass is 'skip'; use 'separate'")
    # 1. One cache for all clips of the batch, no longer than they need.
    blocks, before = causal.layout.blocks(video_latents), None
    cache = new_cache(model, causal, grid, len(text.video), len(blocks))
    for k, block in enumerate(blocks):
        out = next_block(model, causal, cache, text, noise, k, before, block=block, exit_step=exit_step, watch=watch)
        yield out
        # 2. The next block is told what came before: the student's own block, or that of the history.
        before = out if history is None else history.map(lambda h, span: h[:, span.start : span.stop], block)


def join(blocks: Sequence[AV[Tensor]]) -> AV[Tensor]:
    """Join blocks along time. Shapes: AV([B, F, ...], [B, T, ...]) of each block to that of the clip."""
    return AV(*zip(*blocks, strict=True)).map(lambda parts: torch.cat(parts, dim=1))
