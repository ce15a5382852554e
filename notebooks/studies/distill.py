"""Run Stages 2 and 3 in front of the reader, a few steps or for real, and ask them where their gradients go.

The stages themselves are in `training.stages` and `training.stage3`; here they get learners, and a witness that notes
what reaches the model.

Shapes: B batch, F video and T audio latents, K blocks.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from omniforcing_lib import files, losses, masks
from omniforcing_lib.bounce import distributions
from omniforcing_lib.bounce.codecs import TinyCodec
from omniforcing_lib.bounce.evaluate import Estimate, by_halves
from omniforcing_lib.flow import MINIATURE_CFG, MINIATURE_GUIDANCE, ONES, Guidance, noise_like, x0_of
from omniforcing_lib.layout import AV, BlockLayout
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.rollout import RolloutConfig, rollout
from omniforcing_lib.training import dataset, recipes, records, stage3, stages
from omniforcing_lib.training.dataset import Pairs, Prompts
from omniforcing_lib.training.train import History, OptimConfig
from omniforcing_lib.transformer import Transformer

BARS = "▁▂▃▄▅▆▇"
PLAIN = stage3.DMDConfig(MINIATURE_CFG)


class Lesson(NamedTuple):
    """What a stage leaves: the student, its numbers step by step, and the noise levels that reached it."""

    student: Transformer
    history: History
    levels: list[AV[Tensor]]


def teacher_pairs(
    source: str,
    codec: TinyCodec,
    prompts: Prompts,
    causal: RolloutConfig,
    count: int,
    *,
    seed: int = 0,
    guidance: Guidance = MINIATURE_CFG,
    steps: int = 40,
) -> Pairs:
    """Take the stored trajectories of 5 seconds, as many as there are; the teacher, or another one, makes the rest.

    Prompts take turns. Raises ValueError when the stored levels are not those of `causal`, or the prompts others.
    """
    device, parts = prompts.context.video.device, []
    first, seeds = 0, range(seed * count, (seed + 1) * count)
    if source in ("", "teacher"):
        stored = stored_pairs(files.DATA / "ode_pairs.safetensors", prompts, causal)
        if len(stored) >= count:
            return cut(stored, slice(count))
        parts, first, seeds = [stored], len(stored), range(len(stored), count)
    sizes = {"latents": codec.clock.latents(5), "grid": codec.grid, "steps": steps, "first": first}
    teacher = checkpoints.load(source or "teacher", device=device)
    fresh = dataset.ode_pairs(teacher, prompts, guidance, causal.steps, seeds, **sizes, progress=len(seeds) > 90)
    parts.append(fresh)
    states = AV(*map(torch.cat, zip(*(part.states for part in parts), strict=True)))
    return Pairs(states, parts[0].sigmas, torch.cat([part.prompt for part in parts]))


def stored_pairs(path: str | Path, prompts: Prompts, causal: RolloutConfig, **settings: object) -> Pairs:
    """Read trajectories from a file.

    Raises ValueError where they keep other levels than those of `causal`, are of other prompts, or say that they were
    made under others of the `settings`, see `PairsConfig.pair_notes`.
    """
    stored = Pairs.load(path, prompts.context.video.device)
    levels = stored.sigmas.double().cpu()
    if levels.shape != causal.sigmas.shape or not torch.allclose(levels, causal.sigmas, atol=1e-4):
        raise ValueError(f"the stored pairs keep {stored.sigmas.tolist()}, the student steps {causal.sigmas.tolist()}")
    if differences := records.differences(stored.notes, dataset.pair_notes(prompts, **settings)):
        raise ValueError(f"the stored pairs were made under other settings: {'; '.join(differences)}")
    return stored


def cut(pairs: Pairs, rows: slice, latents: AV[int] | None = None) -> Pairs:
    """Give some trajectories, cut to their first latents if asked."""
    latents = latents or pairs.states.map(lambda s: s.shape[2])
    states = pairs.states.map(lambda s, length: s[rows, :, :length].contiguous(), latents)
    return Pairs(states, pairs.sigmas, pairs.prompt[rows])


def ends(pairs: Pairs) -> AV[Tensor]:
    """Give the clean ends of trajectories: the guided teacher's clips. Shapes: AV([N, F, h, w, C], [N, T, C])."""
    return pairs.states.map(lambda states: states[:, -1])


def to_go(pairs: Pairs) -> AV[Tensor]:
    """Measure how far each kept state is from the end, as a root mean square over clips. Shapes: AV([K], [K])."""
    return pairs.states.map(lambda s: (s - s[:, -1:]).square().mean(dim=(0, *range(2, s.dim()))).sqrt())


def last_part(steps: int, parts: int) -> float:
    """Give the decay of an average that spans the last of so many parts of a run."""
    return max(0.0, 1 - parts / steps)


@contextmanager
def witness(model: nn.Module) -> Iterator[list[AV[Tensor]]]:
    """Note the noise levels of every call of a model."""
    seen: list[AV[Tensor]] = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(AV(*args[1])))
    try:
        yield seen
    finally:
        hook.remove()


def out_of_block(levels: Sequence[AV[Tensor]], layout: BlockLayout) -> int:
    """Count audio latents whose noise level is not the one of the video of their block."""
    frames = levels[0].video.shape[1]
    first = torch.tensor([block.video.start for block in layout.blocks(frames)])
    table = torch.tensor(layout.block_index(frames).audio)
    return sum(int((sigma.video[:, first[table]] != sigma.audio).sum()) for sigma in levels)


def by_ratio(layout: BlockLayout, frames: int) -> list[int]:
    """Give every audio latent the block that the released code's rule finds for it (paper Sec. 3.1).

    That rule cuts audio at the nearest whole multiples of T / F, whatever the blocks are.
    Shapes: F video latents to [T] block numbers.
    """
    table, length = layout.block_index(frames), layout.audio_latents(frames)
    starts = [round(frame * length / frames) for frame in range(frames)]
    return [table.video[bisect_right(starts, latent) - 1] for latent in range(length)]


@torch.no_grad()
def regression_loss(
    model: Transformer, pairs: Pairs, prompts: Prompts, causal: RolloutConfig, *, batch: int = 8, seed: int = 0
) -> AV[float]:
    """Compute the loss of Stage 2 at drawn levels that stay the same from call to call, so that models compare.

    `batch` pairs are judged, the first ones, or all where there are fewer.
    """
    batch = min(batch, len(pairs.prompt))
    generator, frames = torch.Generator().manual_seed(seed), pairs.states.video.shape[2]
    built = masks.build(causal.layout, frames, pairs.states.video[0, 0, 0, ..., 0].numel(), window=causal.window)
    level = torch.randint(len(pairs.sigmas) - 1, (batch, causal.layout.count(frames)), generator=generator)
    chosen = causal.layout.block_index(frames).map(lambda index: level[:, index].to(pairs.prompt.device))
    sigma = chosen.map(lambda c: pairs.sigmas.to(c.device)[c])
    x = pairs.states.map(lambda s, c: stages.take_level(s[: len(c)], c), chosen)
    velocity = model(x, sigma, prompts.take(pairs.prompt[:batch]), masks=built)
    return losses.ode_regression(x.map(x0_of, velocity, sigma), ends(pairs).map(lambda e: e[:batch]), sigma).map(float)


@dataclass(frozen=True)
class Course:
    """Run stages, each on a model that is loaded: say what they share.

    Attributes:
        teacher: the checkpoint that is distilled.
        prompts: contexts of the clips.
        causal: blocks, steps and window of the student.
        codec: gives clock and grid.
        batch: clips of a step.
        seconds: length of a rolled out clip.
        seed: of all that is random.
    """

    teacher: str
    prompts: Prompts
    causal: RolloutConfig
    codec: TinyCodec
    batch: int
    seconds: int = 5
    seed: int = 0

    @property
    def clips(self) -> stage3.StudentClips:
        """The clips that a student rolls out."""
        latents = self.codec.clock.latents(self.seconds).video
        return stage3.StudentClips(self.prompts, self.causal, self.codec.grid, latents, self.batch)

    def load(self, sinks: int | None = None) -> Transformer:
        """Load the teacher where the prompts are; with `sinks`, fresh ones."""
        return checkpoints.load(self.teacher, device=self.prompts.context.video.device, sinks=sinks)

    def stage2(self, model: str | Transformer, pairs: Pairs, *, steps: int, optim: OptimConfig | None = None) -> Lesson:
        """Regress the ends of trajectories under the causal masks, from a student, or from the teacher if it is named.

        A teacher gets fresh sinks.
        """
        model = self.load(self.causal.layout.sinks) if isinstance(model, str) else model
        optim = optim or OptimConfig(lr=5e-4, warmup=min(20, steps // 4), steps=steps, ema=0.0)
        stage = recipes.Stage2(steps=steps, batch=self.batch, seed=self.seed, keep_bar=False)
        with witness(model) as levels:
            learner, history = stage.train(model, pairs, self.prompts, self.causal, optim)
        return Lesson(learner.best.eval(), history, levels)

    def stage3(
        self,
        student: Transformer,
        *,
        steps: int,
        lr: tuple[float, float] = (1e-4, 2e-4),
        config: stage3.DMDConfig = PLAIN,
        clips: stage3.StudentClips | None = None,
        pairs: Pairs | None = None,
        method: Callable[..., stage3.SelfForcing] = stage3.SelfForcing,
    ) -> Lesson:
        """Distil a copy of a student by `stage3.SelfForcing`, or a `method` that takes the same parts.

        `steps` are the student's own; `lr` of student and critic; `clips` what it learns from, if not `self.clips`.
        """
        optim = OptimConfig(betas=(0.0, 0.999), warmup=3, ema=last_part(steps, 4))
        # It ends on a step of the student: no step of the critic need follow.
        turns = (steps - 1) * config.ratio + 1
        stage = recipes.Stage3(steps=turns, lr=lr[0], critic_lr=lr[1], seed=self.seed, keep_bar=False)
        models = copy.deepcopy(student), self.load(), self.load()
        learner, history = stage.train(*models, clips or self.clips, config, optim, pairs, method)
        return Lesson(learner.best.eval(), history, [])

    def on_policy(
        self,
        student: Transformer,
        pairs: Pairs,
        *,
        steps: int,
        guidance: Guidance = MINIATURE_GUIDANCE,
        weights: AV[float] = ONES,
        clips: stage3.StudentClips | None = None,
    ) -> Lesson:
        """Regress a copy of a student on the teacher's ends of its own states: `stage3.OnPolicy`.

        `weights` are those of the streams' losses; `clips` what it learns from, if not `self.clips`.
        """
        optim = OptimConfig(lr=1e-4, betas=(0.9, 0.999), warmup=3, steps=steps, final=0.05, ema=last_part(steps, 10))
        stage = recipes.OnPolicy(steps=steps, seed=self.seed, keep_bar=False)
        config, clips = stage3.OnPolicyConfig(guidance, weights=weights), clips or self.clips
        learner, history = stage.train(copy.deepcopy(student), self.load(), pairs, clips, config, optim)
        return Lesson(learner.best.eval(), history, [])


class Flow(NamedTuple):
    """Say where gradients go in a self-forced roll-out.

    Attributes:
        sources: for every block the (block, draw) of all noise that its output is differentiable by.
        silent: parameters without gradient.
        text: parameters of the text path whose gradient is not zero, of how many.
    """

    sources: tuple[frozenset[tuple[int, int]], ...]
    silent: tuple[str, ...]
    text: tuple[int, int]


def gradient_flow(
    model: Transformer, causal: RolloutConfig, prompts: Prompts, grid: tuple[int, int], seconds: int, exit_step: int
) -> Flow:
    """Roll out with an exit step as Stage 3 does and ask autograd what each block depends on (paper Sec. 3.3)."""
    model.requires_grad_(True).train()
    generator, leaves = torch.Generator(model.proj_out.weight.device).manual_seed(0), {}

    def draw(block: int, shapes: AV[tuple[int, ...]], index: int) -> AV[Tensor]:
        """Draw noise that can be differentiated by, and keep it by (block, draw, stream)."""
        noise = noise_like(shapes.map(lambda shape: torch.empty(1, *shape, device=generator.device)), generator)
        leaves.update({(block, index, stream): x.requires_grad_() for stream, x in enumerate(noise)})
        return noise

    text, frames = prompts.context.map(lambda c: c[:1]), model.clock.latents(seconds).video
    blocks = [*rollout(model, causal, text, draw, grid, frames, exit_step=exit_step)]
    outputs = [sum(stream.square().sum() for stream in block) for block in blocks]
    sources = []
    for output in outputs:
        grads = torch.autograd.grad(output, [*leaves.values()], retain_graph=True, allow_unused=True)
        sources.append(frozenset(key[:2] for key, grad in zip(leaves, grads, strict=True) if grad is not None))
    sum(outputs).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    text_path = [g for name, g in grads.items() if "attn2.to_k" in name or "caption_projection" in name]
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False).eval()
    return Flow(
        tuple(sources),
        tuple(name for name, g in grads.items() if g is None),
        (sum(g is not None and bool(g.any()) for g in text_path), len(text_path)),
    )


def health_rows(history: History) -> list[dict[str, object]]:
    """Table the numbers of a stage: mean of its first and last fifth, and its course."""
    rows = []
    for name, values in history.numbers.items():
        course = np.array([float(v) for v in values])
        fifth = max(1, len(course) // 5)
        means = {"first fifth": f"{course[:fifth].mean():.3g}", "last fifth": f"{course[-fifth:].mean():.3g}"}
        rows.append({"number": name, "steps": len(course)} | means | {"course": sparkline(course)})
    return rows


def sparkline(values: np.ndarray, width: int = 24) -> str:
    """Draw a course as a line of text, from its lowest to its highest mean."""
    means = np.array([part.mean() for part in np.array_split(values, min(width, len(values)))])
    span = np.ptp(means) or 1.0
    return "".join(BARS[int(np.clip((m - means.min()) / span * len(BARS), 0, len(BARS) - 1))] for m in means)


class Distance(NamedTuple):
    """Distance of clips to real ones on named, hand-made features (never FVD or FAD), for each stream.

    Attributes:
        frechet: in squared standard deviations; it grows where clips are few.
        energy: in standard deviations; 0 in the mean for real clips.
    """

    frechet: AV[float]
    energy: AV[float]


def distance(real: AV[np.ndarray], other: AV[np.ndarray]) -> Distance:
    """Compare features of clips with those of as many real clips. Shapes: AV([n, 15], [n, 24]) both."""
    return Distance(real.map(distributions.frechet, other), real.map(distributions.energy_distance, other))


def frechet_ratio(
    real: AV[np.ndarray], other: AV[np.ndarray], base: AV[np.ndarray], *, draws: int = 200, seed: int = 0
) -> AV[Estimate]:
    """Divide the Fréchet distance of one system by another's, with 95 % intervals over clips.

    Intervals are from halves of all three sets, see `evaluate.by_halves`: near the distance's floor a bootstrap would
    lean. Halves are compared on the scale of the logarithm, since their small size pulls ratios towards 1; where
    sets differ little from the floor, such intervals are still somewhat too narrow.

    Shapes: AV([n, 15], [n, 24]) all three.
    """

    def ratio(real: np.ndarray, other: np.ndarray, base: np.ndarray) -> dict[str, float]:
        above, below = (max(distributions.frechet(real, x), 1e-9) for x in (other, base))
        return {"log": float(np.log(above / below))}

    def estimate(*sets: np.ndarray) -> Estimate:
        return Estimate(*map(float, np.exp(by_halves(ratio, *sets, draws=draws, seed=seed)["log"])))

    return real.map(estimate, other, base)
