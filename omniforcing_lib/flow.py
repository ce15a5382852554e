"""Flow matching: noise schedules, x0 and velocity, guidance, and the Euler sampler.

The convention everywhere: x = (1 - sigma) x0 + sigma eps, velocity = eps - x0, so x0 = x - sigma velocity.
Noise levels may be one number, one per sample [B], or one per latent [B, F]. Arithmetic is in float32 at least,
whatever the latents are stored in: 0.906229 and its nearest bfloat16 are different noise levels (specification 8.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from omniforcing_lib.layout import AV

RELEASED_STEPS = (1000, 909, 725, 421, 0)
PAPER_STEPS = (1000, 757, 522, 0)
DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
"""Noise levels that LTX-2's distilled files are sampled at, without guidance (specification 1.10)."""
ZEROS, ONES = AV(0.0, 0.0), AV(1.0, 1.0)


class Skip(NamedTuple):
    """Parts of the transformer that a guidance pass leaves out (specification 1.11).

    Attributes:
        self_attention: blocks whose video and audio self-attention is perturbed (STG).
        cross_modal: leave both cross-modal attentions out, in all blocks (modality guidance).
        branch: drop a perturbed self-attention altogether, as LTX-2.0's first code did, and not only its mixing of
            tokens: Lightricks' code has since put each token's own values in its place.
    """

    self_attention: frozenset[int] = frozenset()
    cross_modal: bool = False
    branch: bool = False


Model = Callable[..., AV[Tensor]]
"""model(x, sigma, text, skip=Skip()) -> velocity, all pairs; `skip` is left out when nothing is skipped."""

Denoiser = Callable[[AV[Tensor], Tensor | AV[Tensor]], AV[Tensor]]
"""denoise(x, sigma) -> x0 of both streams; sigma is [] or [B], shared by the streams or a pair."""


def ltx2_sigmas(steps: int, tokens: int = 4096) -> Tensor:
    """Compute the shifted and stretched schedule of LTX-2, from 1 to 0 (specification 1.10).

    `tokens` is 4096 in Lightricks' pipelines, whatever the clip; diffusers gives the video tokens of the clip.

    Shapes: float64 [steps + 1] on the CPU; the last non-zero entry is 0.1.
    """
    if steps < 1:
        raise ValueError(f"a schedule has at least 1 step, found {steps}")
    even = 1 - torch.arange(steps, dtype=torch.float64) / steps
    shift = math.exp((2.05 - 0.95) * (tokens - 1024) / (4096 - 1024) + 0.95)
    clean = 1 - shift / (shift + 1 / even - 1)
    if steps > 1:
        clean = clean * (1 - 0.1) / clean[-1]
    return torch.cat([1 - clean, clean.new_zeros(1)])


def snap_indices(step_list: Sequence[int], steps: int = 40) -> tuple[int, ...]:
    """Find the entry of the `steps`-step schedule that is nearest to each value / 1000 (specification 5.0)."""
    if not step_list or [*step_list] != sorted({*step_list}, reverse=True) or not {*step_list} <= {*range(1001)}:
        raise ValueError(f"a step list falls within 1000 .. 0, like {RELEASED_STEPS}; found {step_list}")
    wanted = torch.tensor(step_list, dtype=torch.float64) / 1000
    indices = (ltx2_sigmas(steps) - wanted[:, None]).abs().argmin(1).tolist()
    if len({*indices}) < len(indices):
        raise ValueError(f"two of {step_list} fall on one entry of the {steps}-step schedule; use more steps")
    return tuple(indices)


def snap(step_list: Sequence[int], steps: int = 40) -> Tensor:
    """Return the noise levels that a step list stands for: entries of the `steps`-step schedule (specification 5.0).

    Shapes: float64 [len(step_list)] on the CPU.
    """
    return ltx2_sigmas(steps)[list(snap_indices(step_list, steps))]


def dmd_lut() -> Tensor:
    """Return the noise level of each integer timestep 0 .. 1000: the 1000-step schedule, reversed (specification 5.0).

    Shapes: float64 [1001] on the CPU.
    """
    return ltx2_sigmas(1000).flip(0)


def precise(x: Tensor) -> Tensor:
    """Raise a tensor to float32 unless it is more precise already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def spread(sigma: Tensor, x: Tensor) -> Tensor:
    """Shape noise levels so that they multiply `x`, in its dtype, float32 at least.

    Shapes: sigma [], [B] or [B, F]; x [B, F, ...] -> [], [B, 1, ...] or [B, F, 1, ...].
    """
    if sigma.ndim > 2 or any(s not in (1, n) for s, n in zip(sigma.shape, x.shape, strict=False)):
        raise ValueError(f"sigma of a tensor {[*x.shape]} is [], [B] or [B, F]; found {[*sigma.shape]}")
    shape = sigma.shape + (1,) * (x.ndim - sigma.ndim if sigma.ndim else 0)
    return sigma.reshape(shape).to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


def both(sigma: Tensor | AV[Tensor]) -> AV[Tensor]:
    """Give one noise level to both streams, unless each has its own already."""
    return sigma if isinstance(sigma, AV) else AV(sigma, sigma)


def noised(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """Mix data and noise, (1 - sigma) x0 + sigma eps, in float32 at least."""
    level = spread(sigma, x0)
    return (1 - level) * precise(x0) + level * precise(eps)


def x0_of(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """Turn a velocity into a prediction of the data, x - sigma velocity, in float32 at least."""
    return precise(x) - spread(sigma, x) * precise(velocity)


def velocity_of(x0: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """Turn a prediction of the data into a velocity, (x - x0) / max(sigma, 1e-8), in float32 at least."""
    return (precise(x) - precise(x0)) / spread(sigma, x).clamp_min(1e-8)


@dataclass(frozen=True)
class Guidance:
    """Weights of the passes of guidance, per stream; the defaults switch all of them off (specification 1.11).

    Attributes:
        cfg: prompt against negative prompt; off at 1.
        stg: whole model against self-attention perturbed in `stg_blocks`; off at 0.
        modality: joint streams against separate streams; off at 1.
        rescale: share of the result that takes the standard deviation of the unguided prediction; off at 0.
        stg_blocks: transformer blocks that STG perturbs.
        stg_drops_branch: see `Skip.branch`.
    """

    cfg: AV[float] = ONES
    stg: AV[float] = ZEROS
    modality: AV[float] = ONES
    rescale: AV[float] = ZEROS
    stg_blocks: frozenset[int] = frozenset()
    stg_drops_branch: bool = False

    def __post_init__(self) -> None:
        for name in ("cfg", "stg", "modality", "rescale"):
            object.__setattr__(self, name, AV(*getattr(self, name)))
        object.__setattr__(self, "stg_blocks", frozenset(self.stg_blocks))
        if any(self.stg) and not self.stg_blocks:
            raise ValueError(f"STG with weights {tuple(self.stg)} needs stg_blocks, the blocks to perturb; found none")

    @property
    def weights(self) -> AV[tuple[float, float, float]]:
        """Weights of (prediction - negative) of each stream, in the order prompt, STG, modality; 0 is off."""
        return self.cfg.map(lambda cfg, stg, modality: (cfg - 1, stg, modality - 1), self.stg, self.modality)


LTX2_GUIDANCE = Guidance(AV(3.0, 7.0), AV(1.0, 1.0), AV(3.0, 3.0), AV(0.7, 0.7), frozenset({29}))
DMD_GUIDANCE = Guidance(cfg=AV(3.0, 5.0))
MINIATURE_CFG = Guidance(cfg=AV(3.0, 3.0))
"""Guidance of the miniature's real score and ODE pairs: CFG alone, as the paper's."""

MINIATURE_GUIDANCE = Guidance(cfg=AV(3.0, 3.0), rescale=AV(0.7, 0.7))
"""Guidance of the miniature teacher (LOG.md says how it was chosen)."""


def guide(
    guidance: Guidance,
    cond: AV[Tensor],
    uncond: AV[Tensor] | None = None,
    perturbed: AV[Tensor] | None = None,
    unimodal: AV[Tensor] | None = None,
) -> AV[Tensor]:
    """Combine the passes of one step in x0 space, in float32 at least (specification 1.11).

    Rescaling takes its standard deviations over each sample, so that a sample does not depend on its batch.

    Shapes: all passes and the result are pairs of x0 [B, F, ...]; a pass whose weights are 0 may be None.
    """
    # Each pass moves the prediction away from what it leaves out, by its own weight for each stream.
    out = cond.map(precise)
    for i, (name, negative) in enumerate((("uncond", uncond), ("perturbed", perturbed), ("unimodal", unimodal))):
        weight = guidance.weights.map(lambda weights, i=i: weights[i])
        if not any(weight):
            continue
        if negative is None:
            raise ValueError(f"guidance weights {tuple(weight)} need the pass `{name}`, found None")
        out = out.map(lambda x, w, c, u: x + w * (precise(c) - precise(u)), weight, cond, negative)
    return out.map(_rescale, cond, guidance.rescale)


def _rescale(guided: Tensor, cond: Tensor, share: float) -> Tensor:
    if not share:
        return guided
    ratio = precise(cond).flatten(1).std(1) / guided.flatten(1).std(1).clamp_min(1e-8)
    return guided * spread(share * ratio + (1 - share), guided)


def guided_denoiser(
    model: Model, text: AV[Tensor], negative: AV[Tensor] | None = None, guidance: Guidance = Guidance()
) -> Denoiser:
    """Wrap a velocity model as a denoiser that runs only the passes whose weights are not 0.

    Prompt and negative prompt run as one batch; a pass that skips a part of the model runs on its own.

    Shapes: text and negative are pairs [B, L, C] or [1, L, C].
    """
    cfg, stg, modality = (any(weights) for weights in zip(guidance.weights.video, guidance.weights.audio, strict=True))
    if cfg and negative is None:
        raise ValueError(f"CFG weights {tuple(guidance.cfg)} need `negative`, the text of the negative prompt")
    prompts = [text, negative] if cfg else [text]

    def predict(x: AV[Tensor], sigma: AV[Tensor], texts: list[AV[Tensor]], **skip: Skip) -> list[AV[Tensor]]:
        n, batch = len(texts), len(x.video)
        contexts = [prompt.map(lambda part: part.expand(batch, -1, -1)) for prompt in texts]
        x, sigma = (pair.map(lambda part: torch.cat([part] * n)) for pair in (x, sigma))
        velocity = model(x, sigma, AV(*map(torch.cat, zip(*contexts, strict=True))), **skip)
        x0 = x.map(x0_of, velocity, sigma)
        return [AV(*pair) for pair in zip(*(part.split(batch) for part in x0), strict=True)]

    def denoise(x: AV[Tensor], sigma: Tensor | AV[Tensor]) -> AV[Tensor]:
        # the model takes one noise level for each sample
        levels = both(sigma).map(lambda s, part: s.expand(len(part)) if s.ndim == 0 else s, x)
        cond, *uncond = predict(x, levels, prompts)
        perturbed = (
            predict(x, levels, [text], skip=Skip(guidance.stg_blocks, branch=guidance.stg_drops_branch))
            if stg
            else [None]
        )
        unimodal = predict(x, levels, [text], skip=Skip(cross_modal=True)) if modality else [None]
        return guide(guidance, cond, *(uncond or [None]), *perturbed, *unimodal)

    return denoise


def _path(
    denoise: Denoiser, noise: AV[Tensor], sigmas: Tensor, fresh: Callable[[], AV[Tensor]] | None = None
) -> Iterator[AV[Tensor]]:
    """Yield the state at each noise level, the first of them `noise` itself."""
    steps = list(pairwise(sigmas.tolist()))
    if not steps or any(now <= after for now, after in steps) or steps[-1][1] < 0:
        raise ValueError(f"a schedule falls from noise to data, like [1, 0.9, 0]; found {sigmas.tolist()}")
    x = noise.map(precise)
    yield x
    for now, after in steps:
        # filled on the device: a copy from the host could not be recorded in a CUDA graph
        x0 = denoise(x, x.video.new_full((), now))
        down = after * after / now if fresh else after
        x = x0.map(lambda end, start, left=down / now: end + left * (start - end) if left else end, x)
        if fresh and after:
            keep = (1 - after) / (1 - down)
            more = math.sqrt(max(0.0, after**2 - (down * keep) ** 2))
            x = x.map(lambda part, eps, keep=keep, more=more: keep * part + more * eps, fresh())
        yield x


def euler(
    denoise: Denoiser,
    noise: AV[Tensor],
    sigmas: Tensor,
    callback: Callable[[int, AV[Tensor]], object] | None = None,
    *,
    fresh: Callable[[], AV[Tensor]] | None = None,
) -> AV[Tensor]:
    """Integrate the flow by Euler steps on (x - x0) / sigma; a step to 0 returns x0 exactly (specification 1.11).

    With `fresh`, normal noise of x's shapes at each call, the steps are ancestral as LTX-2.5's distilled file wants
    them: each goes down further than to the next level, and back up to it by noise (specification 1.10).

    Shapes: noise [B, F, ...] per stream; sigmas [N + 1], falling; `callback(i, x)` sees each state, i = 0 .. N.
    """
    for i, x in enumerate(_path(denoise, noise, sigmas, fresh)):
        if callback is not None:
            callback(i, x)
    return x


def ancestral_noise(seeds: Sequence[int], like: AV[Tensor]) -> Callable[[], AV[Tensor]]:
    """Give the draws of an ancestral sampler: one generator a sample, seeded with its seed + 10000, video first.

    Drawn on the CPU, the same on every device. Shapes: like [B, F, ...] of each stream, B seeds.
    """
    generators = [torch.Generator().manual_seed(seed + 10_000) for seed in seeds]

    def draw() -> AV[Tensor]:
        drawn = [[torch.randn(part.shape[1:], generator=g) for part in like] for g in generators]
        return AV(*zip(*drawn, strict=True)).map(lambda parts, x: torch.stack(parts).to(x.device), like)

    return draw


def trajectory(denoise: Denoiser, noise: AV[Tensor], sigmas: Tensor, keep: Sequence[int]) -> AV[Tensor]:
    """Integrate like `euler` and keep the states at sigmas[keep], noise first: an ODE pair (specification 5.4).

    Shapes: noise [B, F, ...] per stream -> [B, len(keep), F, ...].
    """
    if list(keep) != sorted({*keep}) or not {*keep} <= {*range(len(sigmas))}:
        raise ValueError(f"kept entries rise within 0 .. {len(sigmas) - 1}, found {list(keep)}")
    states = [x for i, x in enumerate(_path(denoise, noise, sigmas)) if i in keep]
    return AV(*(torch.stack(parts, 1) for parts in zip(*states, strict=True)))


def noise_like(x: AV[Tensor], generator: torch.Generator) -> AV[Tensor]:
    """Draw normal noise with the shapes, dtypes and devices of `x`, on the generator's device."""
    return x.map(lambda part: torch.randn(part.shape, generator=generator, device=generator.device).to(part))


def block_noise(seeds: Sequence[int], block: int, shapes: AV[tuple[int, ...]], draw: int = 0) -> AV[Tensor]:
    """Draw the noise of a block from (seed, block, draw, stream) alone, so that streams can be resumed and cut anew.

    Drawn on the CPU: the caller moves it, and it is the same on every device. A shorter cut of a block gets
    the noise of its first latents. `draw` is 0 for the start and i for the noise added before step i.

    Shapes: shapes are [F, ...] of each stream; the result is float32 [len(seeds), F, ...].
    """

    def stream(shape: tuple[int, ...], index: int) -> Tensor:
        generators = (np.random.default_rng([seed, block, draw, index]) for seed in seeds)
        return torch.from_numpy(np.stack([g.standard_normal(shape, np.float32) for g in generators]))

    return shapes.map(stream, AV(0, 1))
