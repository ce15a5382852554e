"""Stage 3 as a step: a student learns on its own roll-outs, by DMD or without a critic (paper Sec. 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from omniforcing_lib import losses
from omniforcing_lib.flow import DMD_GUIDANCE, ONES, Guidance, euler, guided_denoiser, ltx2_sigmas, snap_indices
from omniforcing_lib.graphs import recorded
from omniforcing_lib.layout import AV
from omniforcing_lib.rollout import Noise, RolloutConfig, Watch, fresh_noise, join, rollout
from omniforcing_lib.training.dataset import Pairs, Prompts, StoredPairs, StoredPrompts
from omniforcing_lib.training.distributed import MicroBatch
from omniforcing_lib.training.stages import block_numbers, pick, regression_terms
from omniforcing_lib.training.train import Learner, Metrics
from omniforcing_lib.transformer import Transformer


@dataclass(frozen=True)
class StudentClips:
    """Say what clips a student rolls out on its own past: what Stage 3 learns from.

    A class that learns from others overrides `draw`, or `sample` where they are made in another way.

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
        watch: Watch | None = None,
    ) -> tuple[AV[Tensor], AV[Tensor]]:
        """Roll out the clips of a micro-batch; `watch` gets each block's state at the exit step.

        Shapes: text AV [B, L, C], clips AV([B, F, h, w, C], [B, T, C]).
        """
        text, past = self.draw(generator, micro_batch)
        noise, size = self.noise(generator, micro_batch), (self.grid, self.video_latents)
        how = {"exit_step": exit_step, "watch": watch, "history": past}
        return text, join(list(rollout(student, self.causal, text, noise, *size, **how)))

    def draw(self, generator: torch.Generator, micro_batch: MicroBatch) -> tuple[AV[Tensor], AV[Tensor] | None]:
        """Draw the contexts of a micro-batch, and the clean clips that its blocks see as their past, if not their own.

        Shapes: text AV [B, L, C], clips AV([B, F, h, w, C], [B, T, C]).
        """
        return self.prompts.take(micro_batch.of(pick(len(self.prompts), self.batch, generator))), None

    def noise(self, generator: torch.Generator, micro_batch: MicroBatch) -> Noise:
        """Draw the noise of a micro-batch's blocks, for the whole batch as all that is random."""
        draw = fresh_noise(generator, self.batch)
        return lambda block, shapes, number: draw(block, shapes, number).map(micro_batch.of)

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
        regression: weight of the loss of `stages.ode_stage`, where there are pairs (as DMD first did, Yin et al. 2024).
    """

    guidance: Guidance = DMD_GUIDANCE
    ratio: int = 5
    weights: AV[float] = ONES
    most: int = losses.MAX_TIMESTEP
    regression: float = 1.0


@dataclass
class SelfForcing:
    """Stage 3: joint self-forcing DMD through the rolling cache (paper Sec. 3.3).

    Every step trains the critic on the student's own clips; every `ratio`-th trains the student first. All blocks of
    a clip leave at one step, drawn from the non-zero noise levels. With `pairs` each step of the student adds a
    regression.

    Besides losses and gradient norms a step tells the health of the student's clips: `gap`, how far critic and
    teacher are apart on them, as a share of how far the clips are from the teacher's; `motion`, the mean absolute
    difference of successive video latents; `loudness`, the mean square of the audio latents.

    Raises:
        ValueError: the batch cannot be cut as asked, or blocks leave the window, so that they can't be recomputed.
    """

    student: Learner
    critic: Learner
    teacher: Transformer
    clips: StudentClips
    config: DMDConfig = DMDConfig()
    pairs: Pairs | StoredPairs | None = None

    def __post_init__(self) -> None:
        both, batch, prompts, pairs = (self.student, self.critic), self.clips.batch, self.clips.prompts, self.pairs
        for learner in both:
            learner.group.micro_batches(batch, learner.config.accumulate)
        self.clips.check(self.student)
        self.regress = regression_terms(self.student, pairs, prompts, self.clips.causal, batch) if pairs else None
        live = prompts.live or (pairs is not None and pairs.live)
        self.train_student = recorded(self._train_student, *both, live=live)
        self.train_critic = recorded(self._train_critic, *both, live=live)

    def __call__(self, i: int, generator: torch.Generator) -> Metrics:
        """Train the student at every `ratio`-th step, and the critic at every one."""
        on_cpu = torch.Generator().manual_seed(generator.initial_seed())
        exits = torch.randint(len(self.clips.causal.steps) - 1, (2,), generator=on_cpu).tolist()
        metrics = self.train_student(generator, exits[0]) if i % self.config.ratio == 0 else {}
        return metrics | self.train_critic(generator, exits[1])

    def _train_student(self, generator: torch.Generator, exit_step: int) -> Metrics:
        terms = partial(self._dmd_terms, generator, exit_step)
        metrics = self.student.learn(self.clips.batch, generator, terms, self.config.weights)
        first = {"dmd_video": metrics.pop("video"), "dmd_audio": metrics.pop("audio"), "norm": metrics.pop("norm")}
        return first | metrics | {"gap": metrics["gap"].sqrt()}

    def _train_critic(self, generator: torch.Generator, exit_step: int) -> Metrics:
        terms = partial(self._critic_terms, generator, exit_step)
        metrics = self.critic.learn(self.clips.batch, generator, terms, self.config.weights)
        return {f"critic_{name}": value for name, value in metrics.items()}

    def _dmd_terms(self, generator: torch.Generator, exit_step: int, micro_batch: MicroBatch) -> Metrics:
        # 1. The student's own clips, and the noise at which the two scores are compared on them.
        with self.student.autocast():
            text, x_hat = self.clips.sample(self.student.model, generator, exit_step, micro_batch)
        sigma = micro_batch.of(losses.sample_dmd_sigma(self.clips.batch, generator, self.config.most))
        eps = micro_batch.noise(x_hat, generator)
        # 2. The critic's score and the guided teacher's.
        with self.student.autocast():
            loss = self.student_loss(x_hat, text, sigma, eps)
        metrics = loss._asdict() | health(x_hat) | {"gap": sum(loss).detach()}
        metrics = {name: value * micro_batch.share for name, value in metrics.items()}
        # 3. The loss of Stage 2 beside it, where there are pairs.
        added = self.regress(generator, micro_batch) if self.regress else {}
        return metrics | {name: metrics[name] + self.config.regression * value for name, value in added.items()}

    def _critic_terms(self, generator: torch.Generator, exit_step: int, micro_batch: MicroBatch) -> Metrics:
        with torch.no_grad(), self.student.autocast():
            text, x_hat = self.clips.sample(self.student.model, generator, exit_step, micro_batch)
        sigma = micro_batch.of(losses.sample_dmd_sigma(self.clips.batch, generator, self.config.most))
        eps = micro_batch.noise(x_hat, generator)
        with self.critic.autocast():
            loss = self.critic_loss(x_hat, text, sigma, eps)
        return loss.map(lambda value: value * micro_batch.share)._asdict()

    def student_loss(
        self, x_hat: AV[Tensor], text: AV[Tensor], sigma: Tensor, eps: AV[Tensor], weight: AV[Tensor] | None = None
    ) -> AV[Tensor]:
        """Compare the two scores on the student's clips; shapes as in `losses.dmd`, text AV [B, L, C]."""
        fake = guided_denoiser(self.critic.model, text)
        real = guided_denoiser(self.teacher, text, self.clips.prompts.negative, self.config.guidance)
        return losses.dmd(x_hat, fake, real, sigma, eps, weight)

    def critic_loss(self, x_hat: AV[Tensor], text: AV[Tensor], sigma: Tensor, eps: AV[Tensor]) -> AV[Tensor]:
        """Judge the critic on the student's clips; shapes as in `losses.critic`, text AV [B, L, C]."""
        return losses.critic(x_hat, guided_denoiser(self.critic.model, text), sigma, eps)


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


@dataclass
class OnPolicy:
    """Stage 3 without a critic: regress the student, on its own past, on the teacher's end of its own states.

    The student rolls out as in `SelfForcing`, up to an exit step after the first. The states that its blocks
    leave from are together a noised clip; the guided teacher follows its ODE from there to the end, and each block
    learns to jump to that end. So Stage 2's regression is made at the states that the student really reaches (as
    DAgger does, Ross et al. 2011). The end is a function of the state: no mode is sought, and nothing is averaged
    over noise.

    Block 0 and the step from pure noise choose among motions, and on policy nothing would notice it if they drifted.
    They are left to the loss of `stages.ode_stage` on the teacher's own trajectories, `pairs`. This is not in the
    paper; `LOG.md` says what was tried before.

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

    student: Learner
    teacher: Transformer
    pairs: Pairs | StoredPairs
    clips: StudentClips
    config: OnPolicyConfig = OnPolicyConfig()
    first_blocks: Pairs | StoredPairs | None = None

    def __post_init__(self) -> None:
        clips, own, prompts, causal = self.clips, self.first_blocks, self.clips.prompts, self.clips.causal
        self.entries, self.schedule = snap_indices(causal.steps), ltx2_sigmas(40)
        if len(self.entries) < 3:
            raise ValueError(
                f"steps {causal.steps} have no noise level between noise and data; use three steps or more"
            )
        clips.check(self.student)
        first = causal.layout.count(own.shapes.video[1]) if own else 0
        self.regress = regression_terms(self.student, self.pairs, prompts, causal, clips.batch, first=first)
        many = clips.batch * self.config.first_blocks
        self.start = regression_terms(self.student, own, prompts, causal, many, forced=True) if own else None
        numbers = block_numbers(causal, clips.video_latents, prompts.device)
        self.after_first_block = numbers.map(lambda of: (of > 0).float())
        live = prompts.live or self.pairs.live or (own is not None and own.live)
        self.learn = recorded(self._learn, self.student, live=live)

    def __call__(self, i: int, generator: torch.Generator) -> Metrics:
        """Draw the exit step, after the first one, and learn."""
        on_cpu = torch.Generator().manual_seed(generator.initial_seed())
        return self.learn(generator, 1 + int(torch.randint(len(self.entries) - 2, (), generator=on_cpu)))

    def _learn(self, generator: torch.Generator, exit_step: int) -> Metrics:
        terms = partial(self._terms, generator, exit_step)
        return self.student.learn(self.clips.batch, generator, terms, self.config.weights)

    def _terms(self, generator: torch.Generator, exit_step: int, micro_batch: MicroBatch) -> Metrics:
        # 1. The student's clips, and the states that its blocks leave from.
        states: list[AV[Tensor]] = []
        with self.student.autocast():
            text, x_hat = self.clips.sample(self.student.model, generator, exit_step, micro_batch, states.append)
        # 2. The teacher's ends of these states, by every `stride`-th level that remains, and the last one, 0.
        levels = self.schedule[self.entries[exit_step] :]
        levels = torch.cat([levels[: -1 : self.config.stride], levels[-1:]])
        with torch.no_grad(), self.student.autocast():
            denoise = guided_denoiser(self.teacher, text, self.clips.prompts.negative, self.config.guidance)
            ends = euler(denoise, join(states), levels)
        counted = x_hat.map(lambda x, weight: weight.expand(len(x), -1), self.after_first_block)
        loss = losses.ode_regression(x_hat, ends, counted).map(lambda value: value * micro_batch.share)
        # 3. The loss of Stage 2 beside it.
        stored = self.regress(generator, micro_batch)
        weight, told = self.config.regression, health(x_hat)
        total = loss.map(lambda own, other: own + weight * other, AV(stored["video"], stored["audio"]))
        told = {name: value * micro_batch.share for name, value in told.items()}
        # 4. Block 0 on trajectories of its own; micro-batches share them out as they do clips.
        if self.start:
            first = self.start(generator, micro_batch.times(self.config.first_blocks))
            total = total.map(torch.add, AV(first["video"], first["audio"]))
            told |= {"first_video": first["video"].detach(), "first_audio": first["audio"].detach()}
        return total._asdict() | told | {"own_video": loss.video.detach(), "own_audio": loss.audio.detach()}


@torch.no_grad()
def health(clips: AV[Tensor]) -> dict[str, Tensor]:
    """Tell at a glance whether clips move and sound: see `SelfForcing`. Shapes: AV([B, F, ...], [B, T, C])."""
    return {"motion": clips.video.diff(dim=1).abs().mean(), "loudness": clips.audio.square().mean()}
