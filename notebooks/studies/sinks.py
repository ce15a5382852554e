"""What audio sinks do for a teacher that is made causal: short Stage 2 runs with one thing changed at a time.

The paper reports that causal distillation without sinks explodes, because early audio rows see very few keys, and that
learnable sinks with identity RoPE cure it (paper Sec. 3.2). A `variants.Variant` is one recipe, `train` runs it
and records every step; what single rows of attention do is in `rows`.

Shapes: B batch, F video and T audio latents, S sinks, D width of the audio stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from omniforcing_lib import flow, masks
from omniforcing_lib.bounce.evaluate import Estimate
from omniforcing_lib.layout import AV
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.model_bundle import ModelBundle
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.training import stages
from omniforcing_lib.training import train as training
from omniforcing_lib.training.dataset import Pairs, Prompts
from omniforcing_lib.transformer import Transformer
from studies import distill, exposure_bias, rows
from studies.variants import Variant, build, masks_of

STORED_PAIRS = 90
"""Trajectories of the shipped teacher that `data` has."""


class Reported(NamedTuple):
    """What the paper reports of one variant: infinite and NaN for a run that broke, None where it is silent."""

    norm: float | None
    loss: float | None


PAPER = {
    0: Reported(math.inf, math.nan),
    1: Reported(math.inf, math.nan),
    2: Reported(math.inf, math.nan),
    4: Reported(49.71, 0.141),
    8: Reported(21.95, 0.129),
    16: Reported(9.23, 0.081),
    24: Reported(9.15, 0.110),
}
"""Largest gradient norm and one-step loss at sigma 0.5 by number of sinks."""
PAPER_OTHERS = {"counted": Reported(None, 0.402), "qk_norm": Reported(None, 0.232), "tanh_gate": Reported(None, 1.258)}
"""The same for S = 16 with counted positions and for other stabilisers without sinks."""


@dataclass(frozen=True)
class Study:
    """Hold what every variant learns from and is judged by.

    Attributes:
        teacher: the checkpoint.
        prompts: text of the trajectories.
        pairs: guided teacher trajectories to train on, cut to the first seconds: a causal student's early blocks do
            not depend on what follows.
        held: trajectories that nothing trains on.
    """

    teacher: str
    prompts: Prompts
    pairs: Pairs
    held: Pairs

    @property
    def device(self) -> str:
        """Where the trajectories are."""
        return str(self.pairs.prompt.device)

    @property
    def shared(self) -> int:
        """Count the held-out trajectories that are also trained on, by their noise."""
        held, seen = (part.states.audio[:, 0].flatten(1) for part in (self.held, self.pairs))
        return int((held[:, None] == seen).all(-1).any(1).sum())

    def half_noisy(self, pairs: Pairs | None = None) -> tuple[AV[Tensor], AV[Tensor], AV[Tensor], AV[Tensor]]:
        """Give the states nearest to sigma 0.5, that sigma, their text and their clean ends; the held-out ones."""
        pairs = pairs or self.held
        level = int((pairs.sigmas - 0.5).abs().argmin())
        states, clean = (pairs.states.map(lambda s, k=k: s[:, k]) for k in (level, -1))
        sigma = torch.full((len(pairs),), float(pairs.sigmas[level]), device=self.device)
        return states, AV(sigma, sigma), self.prompts.take(pairs.prompt), clean

    def student(self, variant: Variant) -> Transformer:
        """Build a variant's student, untrained."""
        return build(variant, self.teacher, self.device, self.half_noisy(self.pairs)[:3])

    def untrained(self, variant: Variant | None) -> tuple[Transformer, masks.Masks | None]:
        """Give a variant's student with its masks, or the teacher itself, which sees everything."""
        if variant is None:
            return checkpoints.load(self.teacher, device=self.device), None
        return self.student(variant), masks_of(variant.causal, self.held.states.video[:, 0])


def prepare(beside: ModelBundle, *, pairs: int, held: int, seconds: int, steps: int = 40) -> Study:
    """Take the stored trajectories of the shipped teacher, or sample another teacher's; keep the first `seconds`.

    Trajectories last 5 seconds, as in training; the last `held` of them are kept for judging.
    """
    prompts, codec = beside.context(), beside.codec
    count = max(pairs + held, STORED_PAIRS if beside.source == "teacher" else 0)
    made_by = {"guidance": beside.guidance, "steps": steps}
    every = distill.teacher_pairs(beside.source, codec, prompts, RolloutConfig(), count, **made_by)
    latents = codec.clock.latents(seconds)
    rows = slice(pairs), slice(count - held, count)
    return Study(beside.source, prompts, *(distill.cut(every, some, latents) for some in rows))


def one_step(
    model: Transformer, built: masks.Masks | None, study: Study, *, clips: slice = slice(None), autocast: bool = False
) -> AV[Tensor]:
    """Predict the held-out ends in one step from sigma 0.5: squared errors, whose mean is the paper's.

    Shapes: AV([n, F], [n, T]), of every clip and latent.
    """
    x, sigma, text, clean = (streams.map(lambda part: part[clips]) for streams in study.half_noisy())
    with torch.autocast(torch.device(study.device).type, torch.bfloat16, enabled=autocast):
        velocity = model(x, sigma, text, masks=built)
    ends = x.map(flow.x0_of, velocity, sigma)
    return ends.map(lambda a, b: (flow.precise(a) - flow.precise(b)).square().flatten(2).mean(2), clean)


def look(study: Study, variant: Variant | None) -> rows.Rows:
    """Measure the audio rows of an untrained variant, or of the teacher itself, on the held-out states at sigma 0.5."""
    x, sigma, text, _ = study.half_noisy()
    model, built = study.untrained(variant)
    return rows.probe(model, x, sigma, text, built)


class ByLatent(NamedTuple):
    """What every audio latent costs an untrained variant, by held-out clip.

    The pull is the norm of a gradient by the weights that the teacher has too: by the sinks' own it would be larger.

    Shapes: loss [n, T]; pull [n, 2], of the first latent's loss, and of the mean of all others'.
    """

    loss: np.ndarray
    pull: np.ndarray


def by_latent(study: Study, variant: Variant | None) -> ByLatent:
    """Take the one-step loss apart by audio latent, and the gradient that the first one sends."""
    model, built = study.untrained(variant)
    model.requires_grad_(True)
    weights = [weight for name, weight in model.named_parameters() if name != "audio_sink_tokens"]

    def norm(loss: Tensor) -> float:
        parts = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        return float(torch.stack([part.norm() for part in parts if part is not None]).norm())

    losses, pull = [], []
    for i in range(len(study.held)):
        loss = one_step(model, built, study, clips=slice(i, i + 1)).audio[0]
        losses.append(loss.detach())
        pull.append((norm(loss[0]), norm(loss[1:].mean())))
    return ByLatent(torch.stack(losses).cpu().numpy(), np.array(pull))


SPANS = {"0": slice(1), "1": slice(1, 2), "2 to 5": slice(2, 6), "6 on": slice(6, None)}
"""Audio latents that are told apart: the lone one of block 0, and the head of block 1 (the paper's layout)."""


def by_span(loss: np.ndarray, less: np.ndarray | None = None) -> dict[str, Estimate]:
    """Average a loss over clips and the latents of each span, or its difference from another's, clip by clip.

    Shapes: [n, T]. Intervals are over clips.
    """
    if less is None:
        return {name: exposure_bias.pooled(loss[:, span]) for name, span in SPANS.items()}
    pairs = {name: [exposure_bias.sums(part[:, span]) for part in (loss, less)] for name, span in SPANS.items()}
    return {name: exposure_bias.gap(*pair, paired=True) for name, pair in pairs.items()}


def band(loss: np.ndarray) -> tuple[range, tuple[float, ...], tuple[tuple[float, ...], tuple[float, ...]]]:
    """Give the mean of every latent with its interval over clips: what `plots.curves` draws. Shapes: [n, T]."""
    mean, *edges = zip(*(exposure_bias.pooled(column[:, None]) for column in loss.T), strict=True)
    return range(len(mean)), mean, tuple(edges)


@dataclass
class Trace:
    """Record one training.

    Attributes:
        norm: gradient norm of every step, before clipping.
        sink_norm: the part of it that belongs to the sink tokens.
        loss: training loss of every step, both streams added.
        one_step: held-out one-step loss by number of steps done.
        latents: the same of every audio latent.
    """

    norm: list[float] = field(default_factory=list)
    sink_norm: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    one_step: dict[int, AV[float]] = field(default_factory=dict)
    latents: dict[int, list[float]] = field(default_factory=dict)

    @property
    def diverged(self) -> bool:
        """Tell whether a gradient, or a loss, was not finite."""
        last = [value for pair in self.one_step.values() for value in pair]
        return not all(map(math.isfinite, (*self.norm, *self.loss, *last)))

    @property
    def max_norm(self) -> float:
        """Largest gradient norm; infinite where the run broke."""
        return math.inf if self.diverged else max(self.norm)

    @property
    def rest_norm(self) -> float:
        """Largest norm of the gradient without the sinks' part; infinite where the run broke."""
        pairs = zip(self.norm, self.sink_norm, strict=True)
        return math.inf if self.diverged else max(math.sqrt(max(0.0, n**2 - sinks**2)) for n, sinks in pairs)

    @property
    def start(self) -> float:
        """One-step loss before the first step, both streams added."""
        return sum(self.one_step[0])

    @property
    def final(self) -> float:
        """One-step loss at the end, both streams added; NaN where the run broke."""
        return math.nan if self.diverged else sum(self.one_step[max(self.one_step)])


def train(variant: Variant, study: Study, *, steps: int, batch: int = 4, seed: int = 0, every: int = 20) -> Trace:
    """Run Stage 2 for a few steps (paper Sec. 3.2) and record each of them; `every` so many the held-out loss.

    A run that breaks, by a gradient that is not finite, ends there.
    """
    model, built = study.untrained(variant)
    learner, trace = training.Learner(model, variant.recipe), Trace()
    stage = stages.ode_stage(learner, study.pairs, study.prompts, variant.causal, batch)

    @torch.no_grad()
    def judge() -> None:
        errors, done = one_step(model, built, study, autocast=variant.recipe.amp), len(trace.norm)
        trace.one_step[done] = errors.map(lambda values: float(values.mean()))
        trace.latents[done] = errors.audio.mean(0).tolist()

    def step(i: int, generator: torch.Generator) -> training.Metrics:
        if i % every == 0:
            judge()
        metrics = stage(i, generator)
        norm = float(metrics["norm"])
        trace.norm.append(norm)
        # The norm is that before clipping; the sinks' gradient is clipped already.
        tokens = getattr(learner.model, "audio_sink_tokens", None)
        sinks = 0.0 if tokens is None else float(tokens.grad.float().norm())
        trace.sink_norm.append(sinks * max(1.0, norm / variant.clip))
        trace.loss.append(float(metrics["video"] + metrics["audio"]))
        return metrics

    training.fit(step, {"student": learner}, steps, seed=seed, progress=False, stop=lambda: trace.diverged)
    judge()
    return trace


class Summary(NamedTuple):
    """One variant over its seeds: largest gradient norms of all, means of the losses, runs that broke.

    `norm` is of the whole gradient, `sink_norm` of the sinks' part, `rest_norm` of the whole without it.
    """

    norm: float
    sink_norm: float
    rest_norm: float
    start: float
    final: float
    spread: float
    broken: int


def compare(
    variants: Mapping[str, Variant], study: Study, seeds: Sequence[int], *, steps: int, batch: int = 4
) -> dict[str, Summary]:
    """Train every variant once per seed and sum up; the same seed draws the same batches for all of them."""
    jobs = [(name, seed) for name in variants for seed in seeds]
    traces: dict[str, list[Trace]] = {name: [] for name in variants}
    for name, seed in tqdm(jobs, desc="short stage 2 runs", unit="run", delay=2, leave=False):
        traces[name].append(train(variants[name], study, steps=steps, batch=batch, seed=seed, every=steps))
    return {name: summarise(runs) for name, runs in traces.items()}


def summarise(traces: Sequence[Trace]) -> Summary:
    """Sum up the seeds of a variant; `spread` is half the range of the final loss, NaN for one seed."""
    finals = [trace.final for trace in traces]
    spread = (max(finals) - min(finals)) / 2 if len(finals) > 1 else math.nan
    return Summary(
        norm=max(trace.max_norm for trace in traces),
        sink_norm=max(max(trace.sink_norm) for trace in traces),
        rest_norm=max(trace.rest_norm for trace in traces),
        start=sum(trace.start for trace in traces) / len(traces),
        final=sum(finals) / len(finals),
        spread=spread,
        broken=sum(trace.diverged for trace in traces),
    )


def table(summaries: Mapping[str, Summary], paper: Mapping[str, Reported] | None = None) -> list[dict[str, object]]:
    """Give summaries as rows of a table, beside what the paper reports."""
    lines = []
    for name, s in summaries.items():
        spread = f" ± {s.spread:.4f}" if math.isfinite(s.spread) else ""
        line = {"variant": name, "loss before": s.start, "loss after": f"{s.final:.4f}{spread}"}
        line |= {"largest gradient norm": s.norm, "the sinks' own": s.sink_norm, "without it": s.rest_norm}
        line |= {"broke": s.broken}
        if paper:
            reported = paper.get(name, Reported(None, None))
            line |= {f"paper: {field}": _or_dash(getattr(reported, field)) for field in Reported._fields}
        lines.append(line)
    return lines


def _or_dash(value: float | None) -> object:
    return "—" if value is None else value if math.isfinite(value) else "NaN"


EARLY = {"audio row 0": slice(0, 1), "rows of block 1": slice(1, 26), "rows of block 2": slice(26, 51)}


def early_rows(looks: Mapping[int, rows.Rows], measures: Sequence[str]) -> dict[str, dict[str, tuple]]:
    """Average measures of `rows.Rows` over layers and early rows of the paper's layout, by number of sinks.

    Gives measure -> rows -> (sinks, values), what `plots.by_sinks` draws.
    """

    def value(sinks: int, measure: str, span: slice) -> float:
        return float(getattr(looks[sinks], measure)[:, sinks:][:, span].mean())

    return {
        measure: {name: (list(looks), [value(s, measure, span) for s in looks]) for name, span in EARLY.items()}
        for measure in measures
    }


def by_sinks(summaries: Mapping[int, Summary]) -> dict[str, dict[str, tuple]]:
    """Give gradient norm and loss by number of sinks, ours and the paper's: what `plots.by_sinks` draws."""
    counts = list(summaries)
    known = [s for s in counts if s in PAPER]
    ours = {name: (counts, [getattr(summaries[s], name) for s in counts]) for name in Summary._fields}
    with_sinks = [s for s in counts if s]
    of_sinks = (with_sinks, [summaries[s].sink_norm for s in with_sinks])
    paper = {name: (known, [getattr(PAPER[s], name) for s in known]) for name in Reported._fields}
    return {
        "largest gradient norm": {"ours": ours["norm"], "the sinks' own": of_sinks, "paper": paper["norm"]},
        "one-step loss at sigma 0.5": {"ours": ours["final"], "paper": paper["loss"]},
    }
