"""Stages 1 and 2 as steps: flow matching, and causal ODE regression (paper Sec. 4); Stage 3 is in `stage3`.

A stage is a function `step(i, generator) -> metrics` over one or two learners.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from omniforcing_lib import losses, masks
from omniforcing_lib.flow import ONES, both, noised, x0_of
from omniforcing_lib.graphs import recorded
from omniforcing_lib.layout import AV
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.training.dataset import Clips, Pairs, Prompts, StoredPairs, StoredPrompts, check_numbers
from omniforcing_lib.training.distributed import MicroBatch
from omniforcing_lib.training.train import Learner, Metrics, Step


def pick(count: int, batch: int, generator: torch.Generator) -> Tensor:
    """Draw `batch` numbers below `count`."""
    return torch.randint(count, (batch,), generator=generator, device=generator.device)


def training_sigma(batch: int, generator: torch.Generator, shifts: tuple[float, float] = (2.0, 7.8)) -> Tensor:
    """Draw noise levels: uniform, then shifted towards noise as LTX-2's schedule is.

    Half of a batch takes a mild shift (details), half LTX-2's own e^2.05 (the course of a whole clip).

    Shapes: float32 [batch].
    """
    even = torch.rand(batch, generator=generator, device=generator.device).clamp_min(1e-3)
    shift = torch.where(torch.arange(batch, device=even.device) % 2 == 0, *shifts)
    return shift * even / (1 + (shift - 1) * even)


def flow_stage(
    learner: Learner,
    clips: Clips,
    prompts: Prompts,
    batch: int,
    *,
    causal: RolloutConfig | None = None,
    drop: float = 0.1,
    steady: float = 0.0,
    weights: AV[float] = ONES,
) -> Step:
    """Train by flow matching: the bidirectional teacher, or a `causal` model by teacher forcing.

    Under the masks of a causal model one block of a clip is noisy and learnt; the blocks before it are clean (as
    Causal-Forcing trains its autoregressive teacher). A share `drop` of the prompts is dropped for CFG. `steady` is
    the weight of `losses.steady_flow_matching` of the sound.

    Raises:
        ValueError: `steady` for a causal model, of whose clips one block alone is learnt.
    """
    if steady and causal is not None:
        raise ValueError(f"what lasts throughout a clip is learnt without masks, found steady {steady} under masks")
    check_numbers(clips.prompt, len(prompts))
    frames, height, width = clips.latents.video.shape[1:4]
    masked = {}
    if causal is not None:
        masked["masks"] = masks.build(causal.layout, frames, height * width, window=causal.window)
        blocks, count = block_numbers(causal, frames, prompts.device), causal.layout.count(frames)

    def terms(generator: torch.Generator, micro_batch: MicroBatch) -> Metrics:
        # 1. Clips, with their prompts but for a share that is dropped.
        index = pick(len(clips), batch, generator)
        x0 = clips.latents.map(lambda x: x[micro_batch.of(index)].float())
        dropped = torch.rand(batch, generator=generator, device=generator.device) < drop
        text = prompts.take(micro_batch.of(torch.where(dropped, -1, clips.prompt[index])))
        # 2. A noise level per clip; under masks the blocks before the one that is learnt stay clean.
        level, eps = training_sigma(batch, generator), micro_batch.noise(x0, generator)
        sigma, noisy, shares = both(micro_batch.of(level)), None, both(micro_batch.share)
        if causal is not None:
            block = torch.randint(count, (batch, 1), generator=generator, device=generator.device)
            shares = blocks.map(lambda of: micro_batch.of(of == block).sum() / (of == block).sum().clamp_min(1))
            noisy = blocks.map(lambda of: micro_batch.of(of == block).float())
            sigma = blocks.map(lambda of: micro_batch.of(level[:, None] * (of >= block)))
        # 3. The model's velocity against eps - x0.
        with learner.autocast():
            velocity = learner.model(x0.map(noised, eps, sigma), sigma, text, **masked)
        error = losses.flow_matching(velocity, x0, eps, noisy)
        if steady:
            lasting = losses.steady_flow_matching(velocity, x0, eps)
            error = AV(error.video, error.audio + steady * lasting.audio)
        return error.map(torch.mul, shares)._asdict()

    learn = recorded(lambda g: learner.learn(batch, g, partial(terms, g), weights), learner, live=prompts.live)
    return lambda i, generator: learn(generator)


def ode_stage(
    learner: Learner,
    pairs: Pairs | StoredPairs,
    prompts: Prompts | StoredPrompts,
    causal: RolloutConfig,
    batch: int,
    *,
    weights: AV[float] = ONES,
) -> Step:
    """Stage 2: regress the ends of the teacher's trajectories under the causal masks (paper Sec. 4).

    Each block of a clip has its own noise level, clean included; audio takes its block's, by the block table.
    """
    terms, live = regression_terms(learner, pairs, prompts, causal, batch), pairs.live or prompts.live
    learn = recorded(lambda g: learner.learn(batch, g, partial(terms, g), weights), learner, live=live)
    return lambda i, generator: learn(generator)


def block_numbers(causal: RolloutConfig, frames: int, device: torch.device) -> AV[Tensor]:
    """Number the block of each latent of a clip. Shapes: [F] and [T]."""
    return causal.layout.block_index(frames).map(lambda index: torch.tensor(index, device=device))


def regression_terms(
    learner: Learner,
    pairs: Pairs | StoredPairs,
    prompts: Prompts | StoredPrompts,
    causal: RolloutConfig,
    batch: int,
    *,
    first: int = 0,
    forced: bool = False,
) -> Callable[[torch.Generator, MicroBatch], Metrics]:
    """Prepare the losses of `ode_stage`.

    Blocks before `first` are seen by the others and not learnt. `forced` is teacher forcing: one block of a clip is
    learnt, and the blocks before it are clean.
    """
    if not pairs.live:
        check_numbers(pairs.prompt, len(prompts))
    (frames, height, width), audio = pairs.shapes.video[1:4], pairs.shapes.audio[1]
    causal.layout.check(AV(frames, audio))
    mask = masks.build(causal.layout, frames, height * width, window=causal.window)
    sigmas, count = pairs.sigmas.to(prompts.device), causal.layout.count(frames)
    block_of = block_numbers(causal, frames, prompts.device)
    learnt = block_of.map(lambda blocks: blocks >= first)

    def terms(generator: torch.Generator, micro_batch: MicroBatch) -> Metrics:
        # 1. Trajectories, and a noise level per block: one of those that they were kept at.
        index = pick(len(pairs), batch, generator)
        block_levels = torch.randint(len(sigmas), (batch, count), generator=generator, device=generator.device)
        levels, counts = block_of.map(lambda blocks: block_levels[:, blocks]), learnt
        if forced:
            block = torch.randint(count, (batch, 1), generator=generator, device=generator.device)
            levels = levels.map(lambda number, of: number.masked_fill(of < block, len(sigmas) - 1), block_of)
            counts = block_of.map(lambda of: of == block)
        # 2. Their states at these levels: what the student sees.
        level = levels.map(micro_batch.of)
        states, prompt = pairs.take(micro_batch.of(index))
        x = states.map(take_level, level)
        sigma = level.map(lambda number: sigmas[number])
        with learner.autocast():
            velocity = learner.model(x, sigma, prompts.take(prompt), masks=mask)
        # 3. Its x0 against the trajectories' ends. Only noisy latents count, so each micro-batch counts by how many of
        #    the batch's it has.
        noisy = levels.map(lambda number, counts: (sigmas[number] > 1e-6) & counts, counts)
        x0_hat, counted = x.map(x0_of, velocity, sigma), sigma.map(lambda level, n: level * micro_batch.of(n), noisy)
        loss = losses.ode_regression(x0_hat, states.map(lambda s: s[:, -1]), counted)
        share = noisy.map(lambda n: micro_batch.of(n).sum() / n.sum().clamp_min(1))
        return loss.map(torch.mul, share)._asdict()

    return terms


def take_level(states: Tensor, level: Tensor) -> Tensor:
    """Pick a state of the trajectory for each latent. Shapes: states [B, K, F, ...], level [B, F] to [B, F, ...]."""
    index = level[:, None].reshape(len(level), 1, -1, *[1] * (states.dim() - 3))
    return states.gather(1, index.expand(-1, 1, *states.shape[2:])).squeeze(1)
