"""What audio sinks do for a teacher that is made causal: short Stage 2 runs with one thing changed at a time.

The paper reports that causal distillation without sinks explodes, because early audio rows see very few keys, and that
learnable sinks with identity RoPE cure it (paper Sec. 3.2; spec 4). A `variants.Variant` is one recipe, `train` runs it
and records every step; what single rows of attention do is in `rows`.

Shapes: B batch, F video and T audio latents, S sinks, D width of the audio stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from omniforcing_lib import flow, losses, masks
from omniforcing_lib.lab import rows
from omniforcing_lib.lab.companions import Companions
from omniforcing_lib.lab.variants import Variant, build
from omniforcing_lib.layout import AV
from omniforcing_lib.pages import verdicts
from omniforcing_lib.rollout import Causal
from omniforcing_lib.training import dataset, stages
from omniforcing_lib.training import train as training
from omniforcing_lib.training.dataset import Pairs, Prompts
from omniforcing_lib.transformer import Transformer
from omniforcing_lib.weights import checkpoints

STORED_PAIRS = checkpoints.DATA / "ode_pairs.safetensors"
CLIP_SECONDS = 5


class Reported(NamedTuple):
    """What the paper reports of one variant: infinite and NaN for a run that broke, None where it is silent."""

    norm: float | None
    loss: float


PAPER = {
    0: Reported(math.inf, math.nan),
    1: Reported(math.inf, math.nan),
    2: Reported(math.inf, math.nan),
    4: Reported(49.71, 0.141),
    8: Reported(21.95, 0.129),
    16: Reported(9.23, 0.081),
    24: Reported(9.15, 0.110),
}
"""Largest gradient norm and one-step loss at sigma 0.5 by number of sinks (spec 4.4)."""
PAPER_OTHERS = {
    "counted": Reported(None, 0.402),
    "qk_norm": Reported(None, 0.232),
    "tanh_gate": Reported(None, 1.258),
}
"""The same for S = 16 with counted positions and for other stabilisers without sinks (spec 4.4)."""


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

    def half_noisy(self) -> tuple[AV[Tensor], AV[Tensor], AV[Tensor], AV[Tensor]]:
        """Give the held-out states nearest to sigma 0.5, that sigma, their text and their clean ends."""
        level = int((self.held.sigmas - 0.5).abs().argmin())
        states = self.held.states.map(lambda s: s[:, level])
        sigma = torch.full((len(self.held),), float(self.held.sigmas[level]), device=self.device)
        clean = self.held.states.map(lambda s: s[:, -1])
        return states, AV(sigma, sigma), self.prompts.take(self.held.prompt), clean


def prepare(beside: Companions, *, pairs: int, held: int, seconds: int, steps: int = 40) -> Study:
    """Take the stored trajectories of the shipped teacher, or sample another teacher's; keep the first `seconds`.

    Trajectories last 5 seconds, as in training; the last `held` of them are kept for judging.
    """
    prompts, codec = beside.context(), beside.codec
    if beside.source == "teacher" and STORED_PAIRS.exists():
        found = Pairs.load(STORED_PAIRS, beside.device)
    else:
        shape, seeds = (codec.clock.latents(CLIP_SECONDS), codec.grid), range(pairs + held)
        how = {"steps": steps, "progress": False}
        found = dataset.ode_pairs(beside.load(), prompts, beside.guidance, Causal().steps, seeds, *shape, **how)
    if len(found) < pairs + held:
        raise ValueError(f"{pairs} + {held} trajectories wanted, found {len(found)} in {STORED_PAIRS.name}")
    first, last = range(pairs), range(len(found) - held, len(found))
    return Study(beside.source, prompts, *(_cut(found, span, codec.clock.latents(seconds)) for span in (first, last)))


def _cut(pairs: Pairs, span: range, latents: AV[int]) -> Pairs:
    part = slice(span.start, span.stop)
    states = pairs.states.map(lambda s, n: s[part, :, :n].contiguous(), latents)
    return Pairs(states, pairs.sigmas, pairs.prompt[part])


@torch.no_grad()
def one_step(model: Transformer, study: Study, causal: Causal | None, *, autocast: bool = False) -> AV[float]:
    """Predict the held-out ends in one step from sigma 0.5: mean squared error, the paper's measure (spec 4.4).

    Without `causal` every token sees every token, as in the teacher.
    """
    x, sigma, text, clean = study.half_noisy()
    with torch.autocast(torch.device(study.device).type, torch.bfloat16, enabled=autocast):
        velocity = model(x, sigma, text, masks=causal and _masks(causal, x.video))
    return losses.ode_regression(x.map(flow.x0_of, velocity, sigma), clean, sigma).map(float)


def look(study: Study, variant: Variant | None) -> rows.Rows:
    """Measure the audio rows of an untrained variant, or of the teacher itself, on the held-out states at sigma 0.5."""
    x, sigma, text, _ = study.half_noisy()
    if variant is None:
        return rows.probe(checkpoints.load(study.teacher, device=study.device), x, sigma, text)
    model = build(variant, study.teacher, study.device)
    return rows.probe(model, x, sigma, text, _masks(variant.causal, x.video))


def _masks(causal: Causal, video: Tensor) -> masks.Masks:
    frames, height, width = video.shape[1:4]
    return masks.build(causal.layout, frames, height * width)


@dataclass
class Trace:
    """Record one training.

    Attributes:
        norm: gradient norm of every step, before clipping.
        sink_norm: the part of it that belongs to the sink tokens.
        loss: training loss of every step, both streams added.
        one_step: held-out one-step loss by number of steps done.
    """

    norm: list[float] = field(default_factory=list)
    sink_norm: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    one_step: dict[int, AV[float]] = field(default_factory=dict)

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
        return math.inf if self.diverged else max(math.sqrt(max(0.0, n**2 - own**2)) for n, own in pairs)

    @property
    def start(self) -> float:
        """One-step loss before the first step, both streams added."""
        return sum(self.one_step[0])

    @property
    def final(self) -> float:
        """One-step loss at the end, both streams added; NaN where the run broke."""
        return math.nan if self.diverged else sum(self.one_step[max(self.one_step)])


def train(variant: Variant, study: Study, *, steps: int, batch: int = 4, seed: int = 0, every: int = 20) -> Trace:
    """Run Stage 2 for a few steps (spec 5.4) and record each of them; `every` so many the held-out loss."""
    player = training.Player(build(variant, study.teacher, study.device), variant.recipe)
    stage = stages.ode_stage(player, study.pairs, study.prompts, variant.causal, batch)
    trace = Trace()

    def judge(done: int) -> None:
        if done % every == 0 or done == steps:
            trace.one_step[done] = one_step(player.model, study, variant.causal, autocast=variant.recipe.amp)

    def step(i: int, generator: torch.Generator) -> training.Numbers:
        judge(i)
        numbers = stage(i, generator)
        norm = float(numbers["norm"])
        trace.norm.append(norm)
        trace.sink_norm.append(_sink_norm(player.model, norm, variant.clip))
        trace.loss.append(float(numbers["video"] + numbers["audio"]))
        return numbers

    training.fit(step, {"student": player}, steps, seed=seed, progress=False)
    judge(steps)
    return trace


def _sink_norm(model: Transformer, norm: float, clip: float) -> float:
    """Norm of the sinks' gradient, with the clipping undone."""
    if not model.config.num_audio_sink_tokens:
        return 0.0
    return float(model.audio_sink_tokens.grad.float().norm()) * max(1.0, norm / clip)


class Summary(NamedTuple):
    """One variant over its seeds: largest gradient norms of all, means of the losses, runs that broke.

    `norm` is of the whole gradient, `sink_norm` of the sinks' part, `rest_norm` of the whole without it; `finals` are
    the seeds' own final losses.
    """

    norm: float
    sink_norm: float
    rest_norm: float
    start: float
    final: float
    spread: float
    broken: int
    finals: tuple[float, ...]


def compare(
    variants: Mapping[str, Variant], study: Study, seeds: Sequence[int], *, steps: int, batch: int = 4
) -> dict[str, Summary]:
    """Train every variant once a seed and sum up; the same seed draws the same batches for all of them."""
    jobs = [(name, seed) for name in variants for seed in seeds]
    traces: dict[str, list[Trace]] = {name: [] for name in variants}
    for name, seed in tqdm(jobs, desc="short stage 2 runs", unit="run", delay=2, leave=False):
        traces[name].append(train(variants[name], study, steps=steps, batch=batch, seed=seed))
    return {name: summarise(runs) for name, runs in traces.items()}


def summarise(traces: Sequence[Trace]) -> Summary:
    """Sum up the seeds of a variant; `spread` is half the range of the final loss."""
    finals = [trace.final for trace in traces]
    return Summary(
        norm=max(trace.max_norm for trace in traces),
        sink_norm=max(max(trace.sink_norm) for trace in traces),
        rest_norm=max(trace.rest_norm for trace in traces),
        start=sum(trace.start for trace in traces) / len(traces),
        final=sum(finals) / len(finals),
        spread=(max(finals) - min(finals)) / 2,
        broken=sum(trace.diverged for trace in traces),
        finals=tuple(finals),
    )


def gap(a: Summary, b: Summary) -> tuple[float, tuple[float, float] | None]:
    """Subtract the final loss of `b` from that of `a`, seed by seed, with its 95 % interval over seeds, if several."""
    return verdicts.over_seeds([x - y for x, y in zip(a.finals, b.finals, strict=True)])


def table(summaries: Mapping[str, Summary], paper: Mapping[str, Reported] | None = None) -> list[dict[str, object]]:
    """Give summaries as rows of a table, beside what the paper reports."""
    lines = []
    for name, s in summaries.items():
        line = {"variant": name, "loss before": s.start, "loss after": f"{s.final:.4f} ± {s.spread:.4f}"}
        line |= {"largest gradient norm": s.norm, "the sinks' own": s.sink_norm, "without it": s.rest_norm}
        line |= {"broke": s.broken}
        if paper:
            found = paper.get(name)
            line |= {
                "paper: norm": _or_dash(found and found.norm),
                "paper: loss": _or_dash(found and found.loss),
            }
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
    own = ([s for s in counts if s], [summaries[s].sink_norm for s in counts if s])
    paper = {name: (known, [getattr(PAPER[s], name) for s in known]) for name in Reported._fields}
    return {
        "largest gradient norm": {"ours": ours["norm"], "the sinks' own": own, "paper": paper["norm"]},
        "one-step loss at sigma 0.5": {"ours": ours["final"], "paper": paper["loss"]},
    }
