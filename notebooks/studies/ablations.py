"""What each part of Stage 3 is worth: short runs with one thing changed, each seed from a start of its own.

An `Arm` says what is changed; `run` trains and measures every arm and seed, one JSON file each, so that it goes on
where it stopped; `table` and `gains` read such files. The start is a short Stage 2, far enough from the teacher for
differences to show; a seed is that of both stages and of the roll-outs that are measured, and it is the unit of every
interval: clips of one training tell nothing of the next.

Shapes: B batch, F video and T audio latents, n clips.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omniforcing_lib import files
from omniforcing_lib.bounce import codecs, distributions, evaluate, world
from omniforcing_lib.bounce.codecs import TinyCodec
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.flow import ONES, RELEASED_STEPS, noise_like, noised
from omniforcing_lib.interfaces import DecodeState
from omniforcing_lib.layout import AV, BlockLayout
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.rollout import RolloutConfig, fresh_noise, join, rollout
from omniforcing_lib.training import stages
from omniforcing_lib.training.dataset import Pairs, Prompts
from omniforcing_lib.training.stages import Sampler
from omniforcing_lib.transformer import Transformer
from series import origins, verdicts
from studies import distill, exposure_bias, stored_runs

STORED = files.DATA.parent / "reports" / "ablations"
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
        batch: clips a step of either stage.
        clips: held-out roll-outs a seed, prompts in turn.
        seconds: length of these roll-outs.
    """

    start: int = 100
    steps: int = 20
    batch: int = 4
    clips: int = 24
    seconds: int = 15


def true_past(pairs: Pairs, prompts: Prompts, causal: RolloutConfig, grid: tuple[int, int], batch: int) -> Sampler:
    """Make every block of a clip behind the teacher's clip, not behind the student's own blocks."""
    clips = distill.ends(pairs)

    def sample(student: Transformer, generator: torch.Generator, exit_step: int) -> tuple[AV[Tensor], AV[Tensor]]:
        index = stages.pick(len(pairs), batch, generator)
        past, text = clips.map(lambda clip: clip[index]), prompts.take(pairs.prompt[index])
        noise, frames = fresh_noise(generator, batch), past.video.shape[1]
        way = {"exit_step": exit_step, "history": past}
        return text, join(list(rollout(student, causal, text, noise, grid, frames, **way)))

    return sample


def late_windows(
    codec: TinyCodec, prompts: Prompts, causal: RolloutConfig, video_latents: int, batch: int, late: int = 5
) -> Sampler:
    """Roll up to `late` blocks further than a clip and learn from the last clip's length, begun by `opening`.

    The window's start is drawn anew each time; what lies before it has no gradient.
    """

    def sample(student: Transformer, generator: torch.Generator, exit_step: int) -> tuple[AV[Tensor], AV[Tensor]]:
        skipped = int(torch.randint(late + 1, (), generator=generator, device=generator.device))
        text = prompts.take(stages.pick(len(prompts.names), batch, generator))
        noise, frames = fresh_noise(generator, batch), video_latents + skipped * causal.layout.step.video
        blocks = rollout(student, causal, text, noise, codec.grid, frames, exit_step=exit_step)
        if not skipped:
            return text, join(list(blocks))
        with torch.no_grad():
            *_, before = (next(blocks) for _ in range(skipped + 1))
        return text, join([opening(codec, causal.layout, skipped, before), *blocks])

    return sample


@torch.no_grad()
def opening(codec: TinyCodec, layout: BlockLayout, k: int, block: AV[Tensor]) -> AV[Tensor]:
    """Encode the last frame and hop of block k as a clip's first latents: a clip that starts there begins with them.

    The first latent of a clip holds one frame; all later ones hold eight (spec 2).
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
    arms: Sequence[str] = tuple(ARMS),
    seeds: int = 2,
    budget: Budget | None = None,
    teacher: str = "teacher",
) -> Path:
    """Train and measure arms seed by seed from the stored trajectories; finished runs in the folder are kept.

    Raises ValueError for an unknown arm, or a folder with runs of another budget or from another teacher.
    """
    if unknown := sorted(set(arms) - set(ARMS)):
        raise ValueError(f"unknown arms {', '.join(unknown)}; choose from {', '.join(ARMS)}")
    folder, budget = Path(folder), budget or Budget()
    start = checkpoints.read(teacher).fingerprint[:16]
    _check([*stored_runs.read(folder).values()], budget, start)
    bench, judged = _Bench(teacher, budget), origins.of(teacher, "codec", "ode_pairs")
    for seed in range(seeds):
        for name in arms:
            path = stored_runs.path_of(folder, name, seed)
            if not path.exists():
                record = judged | {"arm": name, "seed": seed, "teacher": start} | vars(budget)
                stored_runs.write(path, record | bench.trial(ARMS[name], seed))
    return folder


class _Bench:
    """Hold what all runs share: codec, prompts, trajectories, real clips, and a seed's Stage 2 once it is trained."""

    def __init__(self, teacher: str, budget: Budget) -> None:
        self.teacher, self.budget = teacher, budget
        self.codec, self.causal = codecs.shipped_codec(), checkpoints.read("stage2").causal
        self.prompts = Prompts.of(TinyText(), world.prompts())
        self.pairs = distill.teacher_pairs(teacher, self.codec, self.prompts, self.causal, 90)
        self.names = [self.prompts.names[i % len(self.prompts.names)] for i in range(budget.clips)]
        first = world.HELD_OUT + 700_000
        real = exposure_bias.true_clips(self.names, range(first, first + budget.clips), budget.seconds)
        self.reference = distributions.feature_sets([cut for clip in real for cut in cuts(clip)])
        self._starts: dict[tuple[str, int, int], Transformer] = {}

    def trial(self, arm: Arm, seed: int) -> dict[str, object]:
        """Train and measure one arm with one seed."""
        start = self._start(arm, seed)
        causal = replace(self.causal, **arm.causal)
        return self._judge(self._distil(arm, start, causal, seed) if arm.share else start, causal, seed)

    def _start(self, arm: Arm, seed: int) -> Transformer:
        steps = self.budget.start + arm.regression * ODE_STEPS * self.budget.steps
        key = (arm.start, steps, seed)
        if key not in self._starts:
            pairs = self.pairs if arm.start == "trajectories" else noised_pairs(self.pairs, seed)
            way = {"steps": steps, "batch": self.budget.batch, "seed": seed}
            self._starts[key] = distill.stage2(self.teacher, pairs, self.prompts, self.causal, **way).student
        return self._starts[key]

    def _distil(self, arm: Arm, start: Transformer, causal: RolloutConfig, seed: int) -> Transformer:
        batch, frames = self.budget.batch, self.codec.clock.latents(CLIP_SECONDS).video
        sampler = {
            "own": None,
            "true": true_past(self.pairs, self.prompts, causal, self.codec.grid, batch),
            "late": late_windows(self.codec, self.prompts, causal, frames, batch),
        }[arm.past]
        way = {"steps": self.budget.steps * arm.share, "batch": batch, "weights": arm.weights, "sampler": sampler}
        return distill.stage3(start, self.teacher, self.prompts, causal, self.codec, **way, seed=seed).student

    def _judge(self, student: Transformer, causal: RolloutConfig, seed: int) -> dict[str, object]:
        first, seconds = world.HELD_OUT + 600_000 + 1000 * seed, self.budget.seconds
        numbers = range(first, first + self.budget.clips)
        latents = exposure_bias.roll(student, causal, self.codec, self.names, numbers, seconds)
        clips = exposure_bias.decoded(self.codec, latents)
        readings = evaluate.read_all(clips)
        whole, late = (
            [evaluate.tally(r, p, from_s) for r, p in zip(readings, self.names, strict=True)]
            for from_s in (0, seconds - CLIP_SECONDS)
        )
        counts = {name: [tally[name] for tally in whole] for name in MEASURES}
        counts["sync_f1, last 5 s"] = [tally["sync_f1"] for tally in late]
        off = exposure_bias.by_block(self.codec, causal.layout, latents).map(
            lambda error: exposure_bias.sums(error).tolist()
        )
        counts |= {"ball off its way, px": off.video, "sound off its impact, ms": off.audio}
        found = distributions.feature_sets([cut for clip in clips for cut in cuts(clip)])
        apart = distill.distance(self.reference, found).frechet
        return {
            "counts": {name: np.round(pairs, 4).tolist() for name, pairs in counts.items()},
            "frechet": {name: round(value, 3) for name, value in apart._asdict().items()},
        }


def cuts(clip: AV[np.ndarray]) -> Iterator[AV[np.ndarray]]:
    """Cut a long clip into clips of 5 seconds. Shapes: AV([F, H, W, 3], [N])."""
    steps = AV(world.CLOCK.fps, world.CLOCK.sample_rate).map(lambda rate: CLIP_SECONDS * rate)
    for i in range(len(clip.video) // steps.video):
        yield clip.map(lambda stream_, step, i=i: stream_[i * step : (i + 1) * step], steps)


def _check(records: Sequence[Mapping], budget: Budget, teacher: str = "") -> None:
    for record in records:
        if teacher and (kept := record.get("teacher", teacher)) != teacher:
            raise ValueError(f"the folder holds runs of teacher {kept}, asked for {teacher}: use another folder")
        found = Budget(**{name: record[name] for name in vars(budget)})
        if found != budget:
            raise ValueError(f"the folder holds runs of {found}, asked for {budget}: use another folder")


def runs(folder: str | Path = STORED) -> dict[str, list[dict]]:
    """Read the runs of every arm, one a seed; ValueError where there is none, or where budgets differ."""
    records = [*stored_runs.read(folder).values()]
    if not records:
        raise ValueError(f"{folder} holds no runs; `python -m omniforcing_lib ablate` makes them")
    _check(records, Budget(**{name: records[0][name] for name in vars(Budget())}))
    found = {name: [r for r in records if r["arm"] == name] for name in ARMS}
    return {name: trials for name, trials in found.items() if trials}


def table(folder: str | Path = STORED) -> dict[str, dict[str, verdicts.OverSeeds]]:
    """Average the runs of every arm over training seeds: arm -> measure -> mean, 95 % interval (none for one seed)."""
    return {
        name: {m: verdicts.over_seeds([_value(trial, m) for trial in trials]) for m in _measures(trials[0])}
        for name, trials in runs(folder).items()
    }


def gains(folder: str | Path = STORED, base: str = BASE) -> dict[str, dict[str, verdicts.OverSeeds]]:
    """Subtract the paper's recipe from every other arm, seed by seed: arm -> measure -> mean difference, interval.

    A seed is one pair: both arms begin with the same Stage 2 and roll out the same prompts and noise. Seeds that only
    one of the two has do not count, arms without a common seed are left out, and one seed has no interval. Intervals
    are corrected for the number of arms by Bonferroni: of all differences of one measure together, 95 % hold.
    """
    found = runs(folder)
    of_base = {trial["seed"]: trial for trial in found.pop(base, [])}
    pairs = {n: [(t, of_base[t["seed"]]) for t in trials if t["seed"] in of_base] for n, trials in found.items()}
    pairs = {name: both for name, both in pairs.items() if both}
    return {
        name: {
            m: verdicts.over_seeds([_value(a, m) - _value(b, m) for a, b in both], comparisons=len(pairs))
            for m in _measures(both[0][0])
        }
        for name, both in pairs.items()
    }


def _measures(trial: Mapping) -> list[str]:
    return [*trial["counts"], *(f"frechet, {s}" for s in AV._fields)]


def _value(trial: Mapping, measure: str) -> float:
    """Pool the clips of one training."""
    if measure.startswith("frechet, "):
        return trial["frechet"][measure.removeprefix("frechet, ")]
    part, whole = np.sum(trial["counts"][measure], axis=0)
    return float(part / whole) if whole else math.nan
