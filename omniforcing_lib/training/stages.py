"""The three stages as steps: flow matching, causal ODE regression, self-forcing DMD (paper Sec. 3.3 and 4; spec 5).

A stage is a function `step(i, generator) -> numbers` over one or two players.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from omniforcing_lib import losses, masks
from omniforcing_lib.flow import (
    DMD_GUIDANCE,
    ONES,
    Guidance,
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
from omniforcing_lib.training.dataset import Clips, Pairs, Prompts, check_numbers
from omniforcing_lib.training.distributed import MicroBatch
from omniforcing_lib.training.train import Learner, Metrics, Step
from omniforcing_lib.transformer import Transformer

Sampler = Callable[[Transformer, torch.Generator, int], tuple[AV[Tensor], AV[Tensor]]]
"""sampler(student, generator, exit step) -> text AV [B, L, C] and clips AV([B, F, h, w, C], [B, T, C]) made for it."""


def pick(count: int, batch: int, generator: torch.Generator) -> Tensor:
    """Draw `batch` numbers below `count`."""
    return torch.randint(count, (batch,), generator=generator, device=generator.device)


def training_sigma(batch: int, generator: torch.Generator, shifts: tuple[float, float] = (2.0, 7.8)) -> Tensor:
    """Draw noise levels: uniform, then shifted towards noise as LTX-2's schedule is (spec 1.10).

    Half of a batch takes a mild shift (details), half LTX-2's own e^2.05 (the course of a whole clip).

    Shapes: float32 [batch].
    """
    even = torch.rand(batch, generator=generator, device=generator.device).clamp_min(1e-3)
    shift = torch.where(torch.arange(batch, device=even.device) % 2 == 0, *shifts)
    return shift * even / (1 + (shift - 1) * even)


def flow_stage(
    player: Learner, clips: Clips, prompts: Prompts, batch: int, *, drop: float = 0.1, weights: AV[float] = ONES
) -> Step:
    """Train the bidirectional teacher by flow matching; prompts are dropped for CFG."""
    check_numbers(clips.prompt, len(prompts))

    def terms(generator: torch.Generator, part: MicroBatch) -> Metrics:
        index = pick(len(clips), batch, generator)
        x0 = clips.latents.map(lambda x: x[part.of(index)].float())
        dropped = torch.rand(batch, generator=generator, device=generator.device) < drop
        text = prompts.take(part.of(torch.where(dropped, -1, clips.prompt[index])))
        level, eps = part.of(training_sigma(batch, generator)), part.noise(x0, generator)
        sigma = AV(level, level)
        with player.autocast():
            velocity = player.model(x0.map(noised, eps, sigma), sigma, text)
        return losses.flow_matching(velocity, x0, eps).map(lambda loss: loss * part.share)._asdict()

    piece = recorded(lambda g: player.learn(batch, g, partial(terms, g), weights), player, live=prompts.live)
    return lambda i, generator: piece(generator)


def ode_stage(
    player: Learner,
    pairs: Pairs,
    prompts: Prompts,
    causal: RolloutConfig,
    batch: int,
    *,
    weights: AV[float] = ONES,
) -> Step:
    """Stage 2: regress the end of the teacher's trajectories under the causal masks (spec 5.4).

    Each block of a clip has its own noise level, clean included; audio takes its block's, by the block table.
    """
    terms, live = _regression(player, pairs, prompts, causal, batch), pairs.live or prompts.live
    piece = recorded(lambda g: player.learn(batch, g, partial(terms, g), weights), player, live=live)
    return lambda i, generator: piece(generator)


def _regression(
    player: Learner, pairs: Pairs, prompts: Prompts, causal: RolloutConfig, batch: int
) -> Callable[[torch.Generator, MicroBatch], Metrics]:
    """Prepare the losses of `ode_stage`."""
    if not pairs.live:
        check_numbers(pairs.prompt, len(prompts))
    (frames, height, width), audio = pairs.shapes.video[1:4], pairs.shapes.audio[1]
    causal.layout.check(AV(frames, audio))
    kind = masks.build(causal.layout, frames, height * width, window=causal.window)
    device, count = prompts.device, causal.layout.count(frames)
    table = causal.layout.block_index(frames).map(lambda index: torch.tensor(index, device=device))
    sigmas = pairs.sigmas.to(device)

    def terms(generator: torch.Generator, part: MicroBatch) -> Metrics:
        index = pick(len(pairs), batch, generator)
        level = torch.randint(len(sigmas), (batch, count), generator=generator, device=generator.device)
        drawn = table.map(lambda blocks: level[:, blocks])
        chosen = drawn.map(part.of)
        states, prompt = pairs.take(part.of(index))
        x = states.map(take_level, chosen)
        sigma = chosen.map(lambda c: sigmas[c])
        with player.autocast():
            velocity = player.model(x, sigma, prompts.take(prompt), masks=kind)
        loss = losses.ode_regression(x.map(x0_of, velocity, sigma), states.map(lambda s: s[:, -1]), sigma)
        # only noisy latents count, so parts of a batch count by how many they have
        noisy = drawn.map(lambda c: sigmas[c] > 1e-6)
        share = noisy.map(lambda n: part.of(n).sum() / n.sum().clamp_min(1))
        return loss.map(torch.mul, share)._asdict()

    return terms


def take_level(states: Tensor, level: Tensor) -> Tensor:
    """Pick a state of the trajectory for each latent. Shapes: states [B, K, F, ...], level [B, F] to [B, F, ...]."""
    index = level[:, None].reshape(len(level), 1, -1, *[1] * (states.dim() - 3))
    return states.gather(1, index.expand(-1, 1, *states.shape[2:])).squeeze(1)


def own_clips(
    prompts: Prompts, causal: RolloutConfig, grid: tuple[int, int], video_latents: int, batch: int
) -> Sampler:
    """Let a student roll out clips on its own past: what Stage 3 learns from."""

    def sample(
        student: Transformer,
        generator: torch.Generator,
        exit_step: int,
        part: MicroBatch | None = None,
        watch: Callable[[AV[Tensor]], None] | None = None,
    ) -> tuple[AV[Tensor], AV[Tensor]]:
        part = part or MicroBatch(batch, slice(0, batch))
        text = prompts.take(part.of(pick(len(prompts), batch, generator)))
        whole, how = fresh_noise(generator, batch), {"exit_step": exit_step, "watch": watch}
        blocks = rollout(student, causal, text, lambda *of: whole(*of).map(part.of), grid, video_latents, **how)
        return text, join(list(blocks))

    return sample


def self_forcing_stage(
    student: Learner,
    critic: Learner,
    teacher: Transformer,
    prompts: Prompts,
    causal: RolloutConfig,
    grid: tuple[int, int],
    video_latents: int,
    batch: int,
    *,
    guidance: Guidance = DMD_GUIDANCE,
    ratio: int = 5,
    weights: AV[float] = ONES,
    sampler: Sampler | None = None,
    most: int = losses.MAX_TIMESTEP,
    pairs: Pairs | None = None,
    regression: float = 1.0,
) -> Step:
    """Stage 3: joint self-forcing DMD through the rolling cache (paper Sec. 3.3; spec 5.7).

    Every step trains the critic on the student's own clips; every `ratio`-th trains the student first. All blocks of
    a clip leave at one step, drawn from the non-zero noise levels. A `sampler` may make the clips in another way
    than `own_clips`; it makes whole batches. Two changes against collapse, neither in the paper: scores are compared at
    timesteps up to `most` only, where noise leaves the course of a clip alone; and with `pairs` each step of the
    student adds `regression` times the loss of `ode_stage` (as DMD first did, Yin et al. 2024).

    Besides losses and gradient norms a step tells the health of the student's clips: `gap`, how far critic and
    teacher are apart on them, as a share of how far the clips are from the teacher's; `motion`, the mean absolute
    difference of successive video latents; `loudness`, the mean square of the audio latents.

    Raises:
        ValueError: the batch cannot be cut as asked, or blocks leave the window, so that they can't be recomputed.
    """
    levels = len(causal.steps) - 1
    whole = all(len(p.team.parts(batch, p.recipe.accumulate)) == 1 and p.team.size == 1 for p in (student, critic))
    if sampler and not whole:
        raise ValueError("a sampler makes whole batches: use it with one process, and accumulate 1")
    _check_window(student, causal, video_latents)
    clips = own_clips(prompts, causal, grid, video_latents, batch)
    regress = _regression(student, pairs, prompts, causal, batch) if pairs else None

    def sample(generator: torch.Generator, exit_step: int, part: MicroBatch) -> tuple[AV[Tensor], AV[Tensor]]:
        with student.autocast():
            if sampler:
                return sampler(student.model, generator, exit_step)
            return clips(student.model, generator, exit_step, part)

    def dmd_terms(generator: torch.Generator, exit_step: int, part: MicroBatch) -> Metrics:
        text, x_hat = sample(generator, exit_step, part)
        sigma, eps = part.of(losses.sample_dmd_sigma(batch, generator, most)), part.noise(x_hat, generator)
        fake = guided_denoiser(critic.model, text)
        real = guided_denoiser(teacher, text, prompts.negative, guidance)
        with student.autocast():
            loss = losses.dmd(x_hat, fake, real, sigma, eps)
        numbers = loss._asdict() | health(x_hat) | {"gap": sum(loss).detach()}
        numbers = {name: value * part.share for name, value in numbers.items()}
        beside = regress(generator, part) if regress else {}
        return numbers | {name: numbers[name] + regression * value for name, value in beside.items()}

    def critic_terms(generator: torch.Generator, exit_step: int, part: MicroBatch) -> Metrics:
        with torch.no_grad():
            text, x_hat = sample(generator, exit_step, part)
        sigma, eps = part.of(losses.sample_dmd_sigma(batch, generator, most)), part.noise(x_hat, generator)
        with critic.autocast():
            loss = losses.critic(x_hat, guided_denoiser(critic.model, text), sigma, eps)
        return loss.map(lambda value: value * part.share)._asdict()

    def generate(generator: torch.Generator, exit_step: int) -> Metrics:
        numbers = student.learn(batch, generator, partial(dmd_terms, generator, exit_step), weights)
        named = {"dmd_video": numbers.pop("video"), "dmd_audio": numbers.pop("audio"), "norm": numbers.pop("norm")}
        return named | numbers | {"gap": numbers["gap"].sqrt()}

    def judge(generator: torch.Generator, exit_step: int) -> Metrics:
        numbers = critic.learn(batch, generator, partial(critic_terms, generator, exit_step), weights)
        return {f"critic_{name}": value for name, value in numbers.items()}

    live = prompts.live or (pairs is not None and pairs.live)
    parts = (recorded(generate, student, critic, live=live), recorded(judge, student, critic, live=live))

    def step(i: int, generator: torch.Generator) -> Metrics:
        dice = torch.Generator().manual_seed(generator.initial_seed())
        exits = torch.randint(levels, (2,), generator=dice).tolist()
        made = parts[0](generator, exits[0]) if i % ratio == 0 else {}
        return made | parts[1](generator, exits[1])

    return step


def _check_window(student: Learner, causal: RolloutConfig, video_latents: int) -> None:
    """Refuse to recompute blocks of a roll-out whose past has left the cache by then."""
    blocks = causal.layout.count(video_latents)
    if student.recipe.recompute and blocks > causal.window + 2:
        raise ValueError(
            f"recomputing needs a window that keeps the whole clip: {blocks} blocks, a window of {causal.window}; "
            f"train clips of {causal.window + 2} blocks, or without recomputing"
        )


def on_policy_stage(
    student: Learner,
    teacher: Transformer,
    pairs: Pairs,
    prompts: Prompts,
    causal: RolloutConfig,
    grid: tuple[int, int],
    video_latents: int,
    batch: int,
    *,
    guidance: Guidance = DMD_GUIDANCE,
    stride: int = 2,
    regression: float = 0.2,
    weights: AV[float] = ONES,
) -> Step:
    """Stage 3 without a critic: regress the student, on its own past, on the teacher's end of its own states.

    The student rolls out as in `self_forcing_stage`, up to an exit step after the first. The states that its blocks
    leave from are together a noised clip; the guided teacher follows its ODE from there to the end, and each block
    learns to jump to that end. So Stage 2's regression is made where the student really comes by (as DAgger does,
    Ross et al. 2011). The end is a function of the state: no mode is sought, and nothing is averaged over noise.

    What comes first, block 0 and the step from pure noise, chooses among motions, and on policy nothing would notice
    it drift. It is left to the loss of `ode_stage`, `regression` times, on the teacher's own trajectories. This is not
    in the paper; `LOG.md` says what was tried before.

    Args:
        student: who learns.
        teacher: frozen.
        pairs: the teacher's trajectories.
        prompts: contexts.
        causal: blocks, steps, window.
        grid: tokens of a video frame.
        video_latents: length of the clips.
        batch: clips a step of either loss, of all processes together.
        guidance: of the teacher.
        stride: the teacher takes every `stride`-th level of its 40-step schedule.
        regression: weight of the loss on trajectories.
        weights: of the streams' losses.

    Raises:
        ValueError: the student has one step only, so that all its states are pure noise; or blocks leave the window,
            so that they can't be recomputed.
    """
    entries, schedule = snap_indices(causal.steps), ltx2_sigmas(40)
    if len(entries) < 3:
        raise ValueError(f"steps {causal.steps} have no noise level between noise and data; use three steps or more")
    _check_window(student, causal, video_latents)
    clips = own_clips(prompts, causal, grid, video_latents, batch)
    regress = _regression(student, pairs, prompts, causal, batch)
    later = causal.layout.block_index(video_latents).map(
        lambda blocks: (torch.tensor(blocks, device=prompts.device) > 0).float()
    )

    def terms(generator: torch.Generator, exit_step: int, part: MicroBatch) -> Metrics:
        states: list[AV[Tensor]] = []
        with student.autocast():
            text, x_hat = clips(student.model, generator, exit_step, part, states.append)
        rest = _to_the_end(schedule[entries[exit_step] :], stride)
        with torch.no_grad(), student.autocast():
            end = euler(guided_denoiser(teacher, text, prompts.negative, guidance), join(states), rest)
        counted = x_hat.map(lambda x, of: of.expand(len(x), -1), later)
        loss = losses.ode_regression(x_hat, end, counted).map(lambda value: value * part.share)
        beside = regress(generator, part)
        numbers = loss.map(lambda own, other: own + regression * other, AV(beside["video"], beside["audio"]))._asdict()
        told = {name: value * part.share for name, value in health(x_hat).items()}
        return numbers | told | {"own_video": loss.video.detach(), "own_audio": loss.audio.detach()}

    def learn(generator: torch.Generator, exit_step: int) -> Metrics:
        return student.learn(batch, generator, partial(terms, generator, exit_step), weights)

    piece = recorded(learn, student, live=prompts.live or pairs.live)

    def step(i: int, generator: torch.Generator) -> Metrics:
        dice = torch.Generator().manual_seed(generator.initial_seed())
        return piece(generator, 1 + int(torch.randint(len(entries) - 2, (), generator=dice)))

    return step


def _to_the_end(levels: Tensor, stride: int) -> Tensor:
    """Take every `stride`-th level, and the last one, which is 0. Shapes: [N] to [M]."""
    some = levels[:-1:stride]
    return torch.cat([some, levels[-1:]])


@torch.no_grad()
def health(clips: AV[Tensor]) -> dict[str, Tensor]:
    """Tell at a glance whether clips move and sound: see `self_forcing_stage`. Shapes: AV([B, F, ...], [B, T, C])."""
    return {"motion": clips.video.diff(dim=1).abs().mean(), "loudness": clips.audio.square().mean()}
