"""What each part of Stage 3 is worth: short runs with one thing changed, each seed from a start of its own.

An `Arm` says what is changed; `run` trains and measures every arm and seed, one JSON file each, so that it goes on
where it stopped; `TRIALS` reads such files. The start is a short Stage 2, far enough from the teacher for
differences to show; a seed is that of both stages and of the roll-outs that are measured, and it is the unit of every
interval: clips of one training tell nothing of the next.

Shapes: B batch, F video and T audio latents, n clips.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omniforcing_lib.bounce import codecs, distributions, evaluate, sampling, world
from omniforcing_lib.bounce.codecs import TinyCodec
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.flow import MINIATURE_CFG, ONES, RELEASED_STEPS, noise_like, noised
from omniforcing_lib.interfaces import DecodeState
from omniforcing_lib.layout import AV, BlockLayout
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.rollout import RolloutConfig, Watch, join, rollout
from omniforcing_lib.training.dataset import Pairs, Prompts
from omniforcing_lib.training.distributed import MicroBatch
from omniforcing_lib.training.stage3 import DMDConfig, StudentClips
from omniforcing_lib.training.stages import pick
from omniforcing_lib.transformer import Transformer
from studies import distill, exposure_bias, store

STORED = store.ROOT / "reports" / "ablations"
CLIP_SECONDS = 5
ODE_STEPS = 11
"""Steps of Stage 2 that take as long as one step of the student in Stage 3, with five of its critic."""
MEASURES = ("sync_f1", "speed_cv", "one_ball", "wall_pitch", "colour", "timbre")


@dataclass(frozen=True)
class Arm:
    """Say what is changed against the paper's recipe.

    Attributes:
        causal: changed fields of `RolloutConfig`, in training and in use.
        weights: of the two streams' losses.
        past: whose past a block of training sees: the student's `own`, a `true` one, or its own of a `late` window.
        start: what Stage 2 regresses on: `trajectories`, or clean clips that are `noised` afresh.
        share: of the student's steps in Stage 3; 0 is Stage 2 alone.
        regression: of the time that Stage 3 takes, spent on Stage 2 before.
    """

    causal: Mapping[str, object] = field(default_factory=dict)
    weights: AV[float] = ONES
    past: str = "own"
    start: str = "trajectories"
    share: int = 1
    regression: int = 0


ARMS: dict[str, Arm] = {
    "Stage 2": Arm(share=0),
    "Stage 2, as long": Arm(share=0, regression=1),
    "Stage 3": Arm(),
    "true past": Arm(past="true"),
    "no audio loss": Arm(weights=AV(1.0, 0.0)),
    "late windows": Arm(past="late"),
    "2 steps": Arm({"steps": (1000, 757, 0)}),
    "4 steps": Arm({"steps": RELEASED_STEPS}),
    "context noise .1": Arm({"context_noise": 0.1}),
    "noised start": Arm(start="noised"),
}
BASE = "Stage 3"


@dataclass(frozen=True)
class Budget:
    """Say how much work every run does: the same for all arms.

    Attributes:
        start: steps of Stage 2.
        steps: student steps of Stage 3, with five times as many of the critic.
        batch: clips per step of either stage.
        clips: held-out roll-outs per seed, prompts in turn.
        seconds: length of these roll-outs.
    """

    start: int = 100
    steps: int = 20
    batch: int = 4
    clips: int = 24
    seconds: int = 15


@dataclass(frozen=True, kw_only=True)
class ClipsOnTruePast(StudentClips):
    """Make every block of a clip behind the teacher's clip, not behind the student's own blocks.

    Attributes:
        pairs: trajectories whose ends are the teacher's clips, as long as those that are made.
    """

    pairs: Pairs

    def draw(self, generator: torch.Generator, micro_batch: MicroBatch) -> tuple[AV[Tensor], AV[Tensor]]:
        """Draw clips of the teacher, with their contexts; see `StudentClips.draw`."""
        index = micro_batch.of(pick(len(self.pairs), self.batch, generator))
        return self.prompts.take(self.pairs.prompt[index]), distill.ends(self.pairs).map(lambda clip: clip[index])


@dataclass(frozen=True, kw_only=True)
class LateWindows(StudentClips):
    """Roll up to `late` blocks further than a clip and learn from the last clip's length, begun by `opening`.

    The window's start is drawn anew each time; what lies before it has no gradient.
    """

    codec: TinyCodec
    late: int = 5

    def sample(
        self,
        student: Transformer,
        generator: torch.Generator,
        exit_step: int,
        micro_batch: MicroBatch,
        watch: Watch | None = None,
    ) -> tuple[AV[Tensor], AV[Tensor]]:
        """Roll out, and cut a clip's length off the end; see `StudentClips.sample`.

        Raises ValueError where states are watched: those of the opening are nowhere.
        """
        if watch:
            raise ValueError("a late window has no state of its opening: nothing can learn from its states")
        skipped = int(torch.randint(self.late + 1, (), generator=generator, device=generator.device))
        text, _ = self.draw(generator, micro_batch)
        frames = self.video_latents + skipped * self.causal.layout.step.video
        noise = self.noise(generator, micro_batch)
        blocks = rollout(student, self.causal, text, noise, self.grid, frames, exit_step=exit_step)
        if not skipped:
            return text, join(list(blocks))
        with torch.no_grad():
            *_, before = (next(blocks) for _ in range(skipped + 1))
        return text, join([opening(self.codec, self.causal.layout, skipped, before), *blocks])


@torch.no_grad()
def opening(codec: TinyCodec, layout: BlockLayout, k: int, block: AV[Tensor]) -> AV[Tensor]:
    """Encode the last frame and hop of block k as a clip's first latents: a clip that starts there begins with them.

    The first latent of a clip holds one frame; all later ones hold eight (paper Sec. 3.1).
    Shapes: block k, AV([B, F, h, w, C], [B, T, C]) -> AV([B, 1, h, w, C], [B, 1, C]), without a graph.
    """
    state = DecodeState(layout.block(k).map(lambda span: span.stop - 1))
    end = codec.decode(block.map(lambda latents: latents[:, -1:]), state)
    return codec.encode(AV(end.video[:, -1:], end.audio[:, -codec.clock.hop :]))


def noised_pairs(pairs: Pairs, seed: int = 0) -> Pairs:
    """Replace the states of trajectories by their ends under fresh noise, which tells nothing of the clip."""
    eps, ends = noise_like(pairs.states, torch.Generator().manual_seed(seed)), distill.ends(pairs)
    states = ends.map(lambda end, noise: noised(end[:, None].expand_as(noise), noise, pairs.sigmas[None]), eps)
    return replace(pairs, states=states)


def run(
    folder: str | Path,
    *,
    arms: Sequence[str] = (),
    seeds: int = 2,
    budget: Budget | None = None,
    teacher: str = "teacher",
) -> Path:
    """Train and measure arms seed by seed from the stored trajectories; finished runs in the folder are kept.

    Raises ValueError for an unknown arm, or a folder with runs of another budget or from another teacher.
    """
    budget = budget or Budget()
    settings = {"teacher": checkpoints.read(teacher).fingerprint[:16]} | vars(budget)

    def prepare():
        bench, judged = _Bench(teacher, budget), store.origin(teacher, "codec", "ode_pairs")
        return lambda name, seed: judged | bench.trial(ARMS[name], seed)

    return TRIALS.run(folder, arms, seeds, lambda record: settings, prepare)


class _Bench:
    """Hold what all runs share: codec, prompts, trajectories, real clips, and a seed's Stage 2 once it is trained."""

    def __init__(self, teacher: str, budget: Budget) -> None:
        self.teacher, self.budget = teacher, budget
        self.codec, self.causal = codecs.shipped_codec(), checkpoints.read("stage2").causal
        self.prompts = Prompts.of(TinyText(), world.prompts())
        self.pairs = distill.teacher_pairs(teacher, self.codec, self.prompts, self.causal, 90)
        self.names = world.prompts_in_turn(budget.clips)
        first = world.HELD_OUT + 700_000
        real = sampling.true_clips(self.names, range(first, first + budget.clips), budget.seconds)
        self.reference = distributions.feature_sets([cut for clip in real for cut in cuts(clip)])
        self.stage2 = cache(self._stage2)

    def trial(self, arm: Arm, seed: int) -> dict[str, object]:
        """Train and measure one arm with one seed."""
        steps = self.budget.start + arm.regression * ODE_STEPS * self.budget.steps
        student, causal = self.stage2(arm.start, steps, seed), replace(self.causal, **arm.causal)
        return self._judge(self._distil(arm, student, causal, seed) if arm.share else student, causal, seed)

    def _stage2(self, start: str, steps: int, seed: int) -> Transformer:
        pairs = self.pairs if start == "trajectories" else noised_pairs(self.pairs, seed)
        return self._course(seed).stage2(self.teacher, pairs, steps=steps).student

    def _course(self, seed: int, causal: RolloutConfig | None = None) -> distill.Course:
        common = self.teacher, self.prompts, causal or self.causal, self.codec, self.budget.batch
        return distill.Course(*common, seconds=CLIP_SECONDS, seed=seed)

    def _distil(self, arm: Arm, student: Transformer, causal: RolloutConfig, seed: int) -> Transformer:
        course = self._course(seed, causal)
        own = vars(course.clips)
        clips = {
            "own": StudentClips,
            "true": partial(ClipsOnTruePast, pairs=self.pairs),
            "late": partial(LateWindows, codec=self.codec),
        }[arm.past](**own)
        config = DMDConfig(MINIATURE_CFG, weights=arm.weights)
        return course.stage3(student, steps=self.budget.steps * arm.share, config=config, clips=clips).student

    def _judge(self, student: Transformer, causal: RolloutConfig, seed: int) -> dict[str, object]:
        first, seconds = world.HELD_OUT + 600_000 + 1000 * seed, self.budget.seconds
        seeds = range(first, first + self.budget.clips)
        latents = sampling.roll(student, causal, self.codec, self.names, seeds, seconds)
        clips = sampling.decoded(self.codec, latents)
        readings = evaluate.read_all(clips)
        whole, late = (evaluate.tallies(readings, self.names, start) for start in (0, seconds - CLIP_SECONDS))
        counts = {name: [tally[name] for tally in whole] for name in MEASURES}
        counts["sync_f1, last 5 s"] = [tally["sync_f1"] for tally in late]
        off = exposure_bias.by_block(self.codec, causal.layout, latents).map(exposure_bias.sums)
        counts |= {"ball off its way, px": off.video, "sound off its impact, ms": off.audio}
        features = distributions.feature_sets([cut for clip in clips for cut in cuts(clip)])
        frechet = distill.distance(self.reference, features).frechet
        return {
            "counts": {name: np.round(parts, 4).tolist() for name, parts in counts.items()},
            "frechet": {name: round(value, 3) for name, value in frechet._asdict().items()},
        }


def cuts(clip: AV[np.ndarray]) -> Iterator[AV[np.ndarray]]:
    """Cut a long clip into clips of 5 seconds. Shapes: AV([F, H, W, 3], [N])."""
    steps = AV(world.CLOCK.fps, world.CLOCK.sample_rate).map(lambda rate: CLIP_SECONDS * rate)
    for i in range(len(clip.video) // steps.video):
        yield clip.map(lambda stream, step, i=i: stream[i * step : (i + 1) * step], steps)


def measured(trial: Mapping) -> dict[str, float]:
    """Pool the clips of one training: measure -> value."""
    sums = {name: np.sum(parts, axis=0) for name, parts in trial["counts"].items()}
    pooled = {name: float(part / whole) if whole else math.nan for name, (part, whole) in sums.items()}
    return pooled | {f"frechet, {stream}": trial["frechet"][stream] for stream in AV._fields}


TRIALS = store.Trials(ARMS, "ablate", measured, same=tuple(vars(Budget())))
