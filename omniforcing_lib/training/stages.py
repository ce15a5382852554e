"""The three stages as steps: flow matching, causal ODE regression, self-forcing DMD (paper Sec. 3.3 and 4).

A stage is a function `step(i, generator) -> metrics` over one or two learners.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from omniforcing_lib import losses, masks
from omniforcing_lib.flow import (
    DMD_GUIDANCE,
    ONES,
    Guidance,
    both,
    euler,
    guided_denoiser,
    ltx2_sigmas,
    noised,
    snap_indices,
    x0_of,
)
from omniforcing_lib.graphs import recorded
from omniforcing_lib.layout import AV
from omniforcing_lib.rollout import RolloutConfig, fresh_noise, join, rollout
from omniforcing_lib.training.dataset import Clips, Pairs, Prompts, StoredPairs, StoredPrompts, check_numbers
from omniforcing_lib.training.distributed import MicroBatch
from omniforcing_lib.training.train import Learner, Metrics, Step
from omniforcing_lib.transformer import Transformer

Sampler = Callable[[Transformer, torch.Generator, int], tuple[AV[Tensor], AV[Tensor]]]
"""sampler(student, generator, exit step) -> text AV [B, L, C] and clips AV([B, F, h, w, C], [B, T, C]) made for it."""


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
    weights: AV[float] = ONES,
) -> Step:
    """Train by flow matching: the bidirectional teacher, or a `causal` model by teacher forcing.

    Under the masks of a causal model one block of a clip is noisy and learnt; the blocks before it are clean (as
    Causal-Forcing trains its autoregressive teacher). A share `drop` of the prompts is dropped for CFG.
    """
    check_numbers(clips.prompt, len(prompts))
    frames, height, width = clips.latents.video.shape[1:4]
    masked = {}
    if causal is not None:
        masked["masks"] = masks.build(causal.layout, frames, height * width, window=causal.window)
        blocks, count = _block_numbers(causal, frames, prompts.device), causal.layout.count(frames)

    def terms(generator: torch.Generator, micro_batch: MicroBatch) -> Metrics:
        index = pick(len(clips), batch, generator)
        x0 = clips.latents.map(lambda x: x[micro_batch.of(index)].float())
        dropped = torch.rand(batch, generator=generator, device=generator.device) < drop
        text = prompts.take(micro_batch.of(torch.where(dropped, -1, clips.prompt[index])))
        level, eps = training_sigma(batch, generator), micro_batch.noise(x0, generator)
        sigma, noisy, shares = both(micro_batch.of(level)), None, both(micro_batch.share)
        if causal is not None:
            block = torch.randint(count, (batch, 1), generator=generator, device=generator.device)
            shares = blocks.map(lambda of: micro_batch.of(of == block).sum() / (of == block).sum().clamp_min(1))
            noisy = blocks.map(lambda of: micro_batch.of(of == block).float())
            sigma = blocks.map(lambda of: micro_batch.of(level[:, None] * (of >= block)))
        with learner.autocast():
            velocity = learner.model(x0.map(noised, eps, sigma), sigma, text, **masked)
        return losses.flow_matching(velocity, x0, eps, noisy).map(torch.mul, shares)._asdict()

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
    terms, live = _regression(learner, pairs, prompts, causal, batch), pairs.live or prompts.live
    learn = recorded(lambda g: learner.learn(batch, g, partial(terms, g), weights), learner, live=live)
    return lambda i, generator: learn(generator)


def _block_numbers(causal: RolloutConfig, frames: int, device: torch.device) -> AV[Tensor]:
    """Number the block of each latent of a clip. Shapes: [F] and [T]."""
    return causal.layout.block_index(frames).map(lambda index: torch.tensor(index, device=device))


def _regression(
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
    block_of = _block_numbers(causal, frames, prompts.device)
    learnt = block_of.map(lambda blocks: blocks >= first)

    def terms(generator: torch.Generator, micro_batch: MicroBatch) -> Metrics:
        index = pick(len(pairs), batch, generator)
        block_levels = torch.randint(len(sigmas), (batch, count), generator=generator, device=generator.device)
        levels, counts = block_of.map(lambda blocks: block_levels[:, blocks]), learnt
        if forced:
            block = torch.randint(count, (batch, 1), generator=generator, device=generator.device)
            levels = levels.map(lambda number, of: number.masked_fill(of < block, len(sigmas) - 1), block_of)
            counts = block_of.map(lambda of: of == block)
        level = levels.map(micro_batch.of)
        states, prompt = pairs.take(micro_batch.of(index))
        x = states.map(take_level, level)
        sigma = level.map(lambda number: sigmas[number])
        with learner.autocast():
            velocity = learner.model(x, sigma, prompts.take(prompt), masks=mask)
        # Only noisy latents count, so each micro-batch counts by how many of the batch's it has.
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


@dataclass(frozen=True)
class StudentClips:
    """Say what clips a student rolls out on its own past: what Stage 3 learns from.

    Attributes:
        prompts: contexts, drawn at random.
        causal: blocks, steps, window.
        grid: tokens of a video frame.
        video_latents: length of a clip.
        batch: clips of a step, of all processes together.
    """

    prompts: Prompts | StoredPrompts
    causal: RolloutConfig
    grid: tuple[int, int]
    video_latents: int
    batch: int

    def sample(
        self,
        student: Transformer,
        generator: torch.Generator,
        exit_step: int,
        micro_batch: MicroBatch,
        watch: Callable[[AV[Tensor]], None] | None = None,
    ) -> tuple[AV[Tensor], AV[Tensor]]:
        """Roll out the clips of a micro-batch; `watch` gets each block's state at the exit step.

        Shapes: text AV [B, L, C], clips AV([B, F, h, w, C], [B, T, C]).
        """
        text = self.prompts.take(micro_batch.of(pick(len(self.prompts), self.batch, generator)))
        draw = fresh_noise(generator, self.batch)

        def noise(block: int, shapes: AV[tuple[int, ...]], number: int) -> AV[Tensor]:
            return draw(block, shapes, number).map(micro_batch.of)

        size = self.grid, self.video_latents
        blocks = rollout(student, self.causal, text, noise, *size, exit_step=exit_step, watch=watch)
        return text, join(list(blocks))

    def check(self, student: Learner) -> None:
        """Refuse to recompute blocks of a roll-out whose past has left the cache by then.

        Raises:
            ValueError: with the length that fits.
        """
        blocks, window = self.causal.layout.count(self.video_latents), self.causal.window
        if student.config.recompute and blocks > window + 2:
            raise ValueError(
                f"recomputing needs a window that keeps the whole clip: {blocks} blocks, a window of {window}; "
                f"train clips of {window + 2} blocks, or without recomputing"
            )


@dataclass(frozen=True)
class DMDConfig:
    """Say how Stage 3 distils by distribution matching.

    Attributes:
        guidance: of the teacher's scores.
        ratio: critic steps for each step of the student.
        weights: of the streams' losses.
        most: highest timestep at which scores are compared; below the usual one, noise leaves the course of a clip
            alone. Against collapse, and not in the paper.
        regression: weight of the loss of `ode_stage`, where there are pairs (as DMD first did, Yin et al. 2024).
    """

    guidance: Guidance = DMD_GUIDANCE
    ratio: int = 5
    weights: AV[float] = ONES
    most: int = losses.MAX_TIMESTEP
    regression: float = 1.0


def self_forcing_stage(
    student: Learner,
    critic: Learner,
    teacher: Transformer,
    clips: StudentClips,
    config: DMDConfig = DMDConfig(),
    *,
    sampler: Sampler | None = None,
    pairs: Pairs | StoredPairs | None = None,
) -> Step:
    """Stage 3: joint self-forcing DMD through the rolling cache (paper Sec. 3.3).

    Every step trains the critic on the student's own clips; every `ratio`-th trains the student first. All blocks of
    a clip leave at one step, drawn from the non-zero noise levels. A `sampler` may make the clips in another way
    than `StudentClips.sample`; it makes whole batches. With `pairs` each step of the student adds a regression.

    Besides losses and gradient norms a step tells the health of the student's clips: `gap`, how far critic and
    teacher are apart on them, as a share of how far the clips are from the teacher's; `motion`, the mean absolute
    difference of successive video latents; `loudness`, the mean square of the audio latents.

    Raises:
        ValueError: the batch cannot be cut as asked, or blocks leave the window, so that they can't be recomputed.
    """
    batch, prompts = clips.batch, clips.prompts
    cuts = [p.group.size * len(p.group.micro_batches(batch, p.config.accumulate)) for p in (student, critic)]
    if sampler and max(cuts) > 1:
        raise ValueError("a sampler makes whole batches: use it with one process, and accumulate 1")
    clips.check(student)
    regress = _regression(student, pairs, prompts, clips.causal, batch) if pairs else None

    def sample(generator: torch.Generator, exit_step: int, micro_batch: MicroBatch) -> tuple[AV[Tensor], AV[Tensor]]:
        with student.autocast():
            if sampler:
                return sampler(student.model, generator, exit_step)
            return clips.sample(student.model, generator, exit_step, micro_batch)

    def dmd_terms(generator: torch.Generator, exit_step: int, micro_batch: MicroBatch) -> Metrics:
        text, x_hat = sample(generator, exit_step, micro_batch)
        sigma = micro_batch.of(losses.sample_dmd_sigma(batch, generator, config.most))
        eps = micro_batch.noise(x_hat, generator)
        fake = guided_denoiser(critic.model, text)
        real = guided_denoiser(teacher, text, prompts.negative, config.guidance)
        with student.autocast():
            loss = losses.dmd(x_hat, fake, real, sigma, eps)
        metrics = loss._asdict() | health(x_hat) | {"gap": sum(loss).detach()}
        metrics = {name: value * micro_batch.share for name, value in metrics.items()}
        added = regress(generator, micro_batch) if regress else {}
        return metrics | {name: metrics[name] + config.regression * value for name, value in added.items()}

    def critic_terms(generator: torch.Generator, exit_step: int, micro_batch: MicroBatch) -> Metrics:
        with torch.no_grad():
            text, x_hat = sample(generator, exit_step, micro_batch)
        sigma = micro_batch.of(losses.sample_dmd_sigma(batch, generator, config.most))
        eps = micro_batch.noise(x_hat, generator)
        with critic.autocast():
            loss = losses.critic(x_hat, guided_denoiser(critic.model, text), sigma, eps)
        return loss.map(lambda value: value * micro_batch.share)._asdict()

    def train_student(generator: torch.Generator, exit_step: int) -> Metrics:
        metrics = student.learn(batch, generator, partial(dmd_terms, generator, exit_step), config.weights)
        first = {"dmd_video": metrics.pop("video"), "dmd_audio": metrics.pop("audio"), "norm": metrics.pop("norm")}
        return first | metrics | {"gap": metrics["gap"].sqrt()}

    def train_critic(generator: torch.Generator, exit_step: int) -> Metrics:
        metrics = critic.learn(batch, generator, partial(critic_terms, generator, exit_step), config.weights)
        return {f"critic_{name}": value for name, value in metrics.items()}

    live = prompts.live or (pairs is not None and pairs.live)
    train_student = recorded(train_student, student, critic, live=live)
    train_critic = recorded(train_critic, student, critic, live=live)

    def step(i: int, generator: torch.Generator) -> Metrics:
        on_cpu = torch.Generator().manual_seed(generator.initial_seed())
        exits = torch.randint(len(clips.causal.steps) - 1, (2,), generator=on_cpu).tolist()
        metrics = train_student(generator, exits[0]) if i % config.ratio == 0 else {}
        return metrics | train_critic(generator, exits[1])

    return step


@dataclass(frozen=True)
class OnPolicyConfig:
    """Say how Stage 3 distils without a critic.

    Attributes:
        guidance: of the teacher.
        stride: the teacher takes every `stride`-th level of its 40-step schedule.
        regression: weight of the loss on trajectories.
        first_blocks: clips of first blocks per clip of a batch, where these have trajectories of their own.
        weights: of the streams' losses.
    """

    guidance: Guidance = DMD_GUIDANCE
    stride: int = 2
    regression: float = 0.2
    first_blocks: int = 8
    weights: AV[float] = ONES


def on_policy_stage(
    student: Learner,
    teacher: Transformer,
    pairs: Pairs | StoredPairs,
    clips: StudentClips,
    config: OnPolicyConfig = OnPolicyConfig(),
    *,
    first_blocks: Pairs | StoredPairs | None = None,
) -> Step:
    """Stage 3 without a critic: regress the student, on its own past, on the teacher's end of its own states.

    The student rolls out as in `self_forcing_stage`, up to an exit step after the first. The states that its blocks
    leave from are together a noised clip; the guided teacher follows its ODE from there to the end, and each block
    learns to jump to that end. So Stage 2's regression is made at the states that the student really reaches (as
    DAgger does, Ross et al. 2011). The end is a function of the state: no mode is sought, and nothing is averaged
    over noise.

    Block 0 and the step from pure noise choose among motions, and on policy nothing would notice it if they drifted.
    They are left to the loss of `ode_stage` on the teacher's own trajectories, `pairs`. This is not in the paper;
    `LOG.md` says what was tried before.

    Where a trajectory of the teacher ends depends on the noise of the whole clip, and a block has its own noise alone:
    from pure noise, regression teaches it the mean of all ends. For later blocks the past decides; block 0, which
    chooses where a ball starts, and block 1, which chooses where it goes, learn a picture without a ball and a motion
    with kinks. So the first blocks can have trajectories that depend on their own noise and the clean past alone,
    `first_blocks`: those of a causal model trained with teacher forcing (as Causal-Forcing does for every block), see
    `dataset.first_block_pairs`. `pairs` then teach the other blocks.

    Raises:
        ValueError: the student has one step only, so that all its states are pure noise; or blocks leave the window,
            so that they can't be recomputed.
    """
    batch, prompts, causal = clips.batch, clips.prompts, clips.causal
    entries, schedule = snap_indices(causal.steps), ltx2_sigmas(40)
    if len(entries) < 3:
        raise ValueError(f"steps {causal.steps} have no noise level between noise and data; use three steps or more")
    clips.check(student)
    first = causal.layout.count(first_blocks.shapes.video[1]) if first_blocks else 0
    regress = _regression(student, pairs, prompts, causal, batch, first=first)
    many = config.first_blocks
    start = _regression(student, first_blocks, prompts, causal, batch * many, forced=True) if first_blocks else None
    after_first_block = _block_numbers(causal, clips.video_latents, prompts.device).map(lambda of: (of > 0).float())

    def terms(generator: torch.Generator, exit_step: int, micro_batch: MicroBatch) -> Metrics:
        # 1. The student's clips, and the states that its blocks leave from.
        states: list[AV[Tensor]] = []
        with student.autocast():
            text, x_hat = clips.sample(student.model, generator, exit_step, micro_batch, states.append)
        # 2. The teacher's ends of these states, by every `stride`-th level that remains, and the last one, 0.
        levels = schedule[entries[exit_step] :]
        levels = torch.cat([levels[: -1 : config.stride], levels[-1:]])
        with torch.no_grad(), student.autocast():
            denoise = guided_denoiser(teacher, text, prompts.negative, config.guidance)
            ends = euler(denoise, join(states), levels)
        counted = x_hat.map(lambda x, weight: weight.expand(len(x), -1), after_first_block)
        loss = losses.ode_regression(x_hat, ends, counted).map(lambda value: value * micro_batch.share)
        # 3. The loss of Stage 2 beside it.
        stored = regress(generator, micro_batch)
        total = loss.map(lambda own, other: own + config.regression * other, AV(stored["video"], stored["audio"]))
        told = {name: value * micro_batch.share for name, value in health(x_hat).items()}
        # 4. Block 0 on trajectories of its own; micro-batches share them out as they do clips.
        if start:
            first = start(generator, micro_batch.times(many))
            total = total.map(torch.add, AV(first["video"], first["audio"]))
            told |= {"first_video": first["video"].detach(), "first_audio": first["audio"].detach()}
        return total._asdict() | told | {"own_video": loss.video.detach(), "own_audio": loss.audio.detach()}

    def learn(generator: torch.Generator, exit_step: int) -> Metrics:
        return student.learn(batch, generator, partial(terms, generator, exit_step), config.weights)

    live = prompts.live or pairs.live or (first_blocks is not None and first_blocks.live)
    learn = recorded(learn, student, live=live)

    def step(i: int, generator: torch.Generator) -> Metrics:
        on_cpu = torch.Generator().manual_seed(generator.initial_seed())
        return learn(generator, 1 + int(torch.randint(len(entries) - 2, (), generator=on_cpu)))

    return step


@torch.no_grad()
def health(clips: AV[Tensor]) -> dict[str, Tensor]:
    """Tell at a glance whether clips move and sound: see `self_forcing_stage`. Shapes: AV([B, F, ...], [B, T, C])."""
    return {"motion": clips.video.diff(dim=1).abs().mean(), "loudness": clips.audio.square().mean()}
