"""Score clips of the world by what can be seen and heard in them.

Every measure is a ratio of two counts or sums of a clip, so a mean over clips, over the seconds of a clip or over a
bootstrap resample is always the same pooled ratio. Matching is one to one: a seen impact and a heard onset belong
together when they are at most a frame and a half apart; among all such assignments the largest is taken, and of
these the one with the smallest delays. An event within 0.1 s of a clip's end that finds no partner is not counted:
the other half of it may lie outside.

Shapes: F frames, N samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from tqdm.auto import tqdm

from omniforcing_lib.bounce import detect, sampling, world
from omniforcing_lib.bounce.codecs import TinyCodec
from omniforcing_lib.bounce.distributions import decibels
from omniforcing_lib.bounce.world import CLOCK, WALLS, Impact, parse
from omniforcing_lib.layout import AV, Clock
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.transformer import Transformer

TOLERANCE_S = 1.5 / 24
EDGE_S = 0.1
# Of two partners that are equally near, a corner's two tones, the one of the same wall is taken.
OTHER_WALL_S = 0.01
SILENCE_DB = -120.0
Tally = dict[str, tuple[float, float]]


class Pair(NamedTuple):
    """Join a seen impact with the onset that belongs to it."""

    seen: Impact
    heard: detect.Onset


@dataclass(frozen=True)
class Reading:
    """Hold all that the detectors find in a clip, so that it is scored in any span without detecting again.

    Attributes:
        clip: frames uint8 [F, H, W, 3] and samples float [N].
        clock: rates of the clip.
        track: the ball, frame by frame.
        pairs: impacts with their onsets.
        seen: impacts without an onset, away from the ends.
        heard: onsets without an impact, away from the ends.
        turns: all turns of the ball, in seconds.
    """

    clip: AV[np.ndarray]
    clock: Clock
    track: detect.Track
    pairs: tuple[Pair, ...]
    seen: tuple[Impact, ...]
    heard: tuple[detect.Onset, ...]
    turns: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Length that both streams cover."""
        return min(len(self.clip.video) / self.clock.fps, len(self.clip.audio) / self.clock.sample_rate)


def read(clip: AV[np.ndarray], clock: Clock = CLOCK) -> Reading:
    """Run the detectors over a clip and match what is seen with what is heard.

    Shapes: AV(uint8 [F, H, W, 3], float [N] in [-1, 1]).
    """
    track = detect.track(clip.video)
    seen, heard = detect.turns(track.centre, clock.fps), detect.heard_onsets(clip.audio, clock.sample_rate)
    pairs = match(seen, heard)
    end_s = min(len(clip.video) / clock.fps, len(clip.audio) / clock.sample_rate) - EDGE_S
    rest = AV(_without(seen, (p.seen for p in pairs), end_s), _without(heard, (p.heard for p in pairs), end_s))
    return Reading(clip, clock, track, tuple(pairs), rest.video, rest.audio, tuple(s.time_s for s in seen))


def read_all(clips: Sequence[AV[np.ndarray]], name: str = "clips", clock: Clock = CLOCK) -> list[Reading]:
    """Run the detectors over every clip, with a bar under that name where it takes a while."""
    return [read(clip, clock) for clip in tqdm(clips, desc=f"reading {name}", delay=2, leave=False)]


def match(seen: Sequence[Impact], heard: Sequence[detect.Onset]) -> list[Pair]:
    """Assign onsets to impacts one to one within the tolerance: most pairs first, then least delay."""
    delay = np.abs(np.subtract.outer([s.time_s for s in seen], [h.time_s for h in heard]))
    walls = ([WALLS.index(e.wall) for e in events] for events in (seen, heard))
    # A pair beyond the tolerance costs more than any number of pairs within.
    cost = np.where(delay <= TOLERANCE_S, delay + OTHER_WALL_S * np.not_equal.outer(*walls), 1e3)
    rows, columns = linear_sum_assignment(cost)
    return [Pair(seen[i], heard[j]) for i, j in zip(rows, columns, strict=True) if delay[i, j] <= TOLERANCE_S]


def _without(events: Sequence[Impact | detect.Onset], paired: Iterable, end_s: float) -> tuple:
    used = set(paired)
    return tuple(e for e in events if e not in used and EDGE_S <= e.time_s <= end_s)


def tally(reading: Reading, prompt: str, start_s: float = 0.0, end_s: float = math.inf) -> Tally:
    """Count every measure within a span: numerator and denominator, to be added up over clips.

    * one_ball: frames with exactly one ball, of all frames.
    * colour: frames whose ball has the prompt's colour, of all frames; no ball is a wrong colour.
    * timbre: onsets in the prompt's timbre, of all onsets; silence counts as one wrong onset.
    * sync_precision, sync_recall, sync_f1: pairs of onsets, of impacts, of their mean.
    * offset_ms: onset less impact, over pairs; positive when sound is late.
    * wall_pitch: pairs whose pitch belongs to the wall that is hit, of all pairs.
    * speed_cv: standard deviation by mean of the steps from frame to frame that hold no turn; one per clip.
    * motion: mean of these steps in pixels per second; loudness_db: rms of the samples; one per clip.

    An empty prompt asks for no colour and no timbre: there is nothing to be measured.
    """
    colour, timbre = parse(prompt) if prompt else (None, None)
    rates = AV(reading.clock.fps, reading.clock.sample_rate)
    frames, samples = reading.clip.map(lambda steps, rate: _span(len(steps), rate, start_s, end_s), rates)
    pairs = [p for p in reading.pairs if start_s <= p.seen.time_s < end_s]
    seen, heard = ([e for e in events if start_s <= e.time_s < end_s] for events in (reading.seen, reading.heard))
    onsets = [p.heard for p in pairs] + heard
    count, total = len(pairs), frames.stop - frames.start
    return {
        "one_ball": (float((reading.track.count[frames] == 1).sum()), total),
        "colour": (float((reading.track.colour[frames] == colour).sum()), total if prompt else 0),
        "timbre": (sum(o.timbre == timbre for o in onsets), max(len(onsets), 1) if prompt else 0),
        "sync_f1": (2 * count, 2 * count + len(seen) + len(heard)),
        "sync_precision": (count, count + len(heard)),
        "sync_recall": (count, count + len(seen)),
        "offset_ms": (1000 * sum(p.heard.time_s - p.seen.time_s for p in pairs), count),
        "wall_pitch": (sum(p.seen.wall == p.heard.wall for p in pairs), count),
        **_motion(reading, frames),
        "loudness_db": (_loudness(reading.clip.audio[samples]), 1),
    }


def tallies(
    readings: Sequence[Reading], prompts: Sequence[str], start_s: float = 0.0, end_s: float = math.inf
) -> list[Tally]:
    """Count every measure of many clips within a span, see `tally`."""
    return [tally(r, p, start_s, end_s) for r, p in zip(readings, prompts, strict=True)]


def _span(length: int, rate: int, start_s: float, end_s: float) -> slice:
    """Steps of a stream that begin within a span of seconds."""
    start, stop = (math.ceil(min(max(edge * rate, 0), length)) for edge in (start_s, end_s))
    return slice(start, stop)


def _motion(reading: Reading, frames: slice) -> Tally:
    steps = speeds(reading)[frames]
    steps = steps[np.isfinite(steps)]
    # A ball that is not there, or stands still, has no steadiness to measure.
    if len(steps) < 2 or steps.mean() < 1e-6:
        return {"speed_cv": (0.0, 0), "motion": (0.0, 1)}
    return {"speed_cv": (float(steps.std() / steps.mean()), 1), "motion": (float(steps.mean()), 1)}


def speeds(reading: Reading) -> np.ndarray:
    """Speed from each frame to the next in pixels per second, NaN where the ball is missing or turns: [F]."""
    fps = reading.clock.fps
    speed = np.append(np.linalg.norm(np.diff(reading.track.centre, axis=0), axis=1) * fps, np.nan)
    # A turn dated a hair before a frame belongs to the step on either side.
    for turn in reading.turns:
        speed[max(round(turn * fps) - 1, 0) : round(turn * fps) + 1] = np.nan
    return speed


def _loudness(samples: np.ndarray) -> float:
    power = np.square(samples, dtype=np.float64).mean() if len(samples) else 0.0
    return float(decibels(power, SILENCE_DB))


def score(clip: AV[np.ndarray], prompt: str, clock: Clock = CLOCK) -> dict[str, float]:
    """Score one clip against its prompt: every measure of `tally` as a ratio, NaN where nothing was to be measured.

    Shapes: AV(uint8 [F, H, W, 3], float [N]).
    """
    return {name: _ratio(*parts) for name, parts in tally(read(clip, clock), prompt).items()}


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


class Estimate(NamedTuple):
    """Give a mean over clips and its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, drawn: np.ndarray | Sequence[float]) -> Estimate:
        """Give a value with the middle 95 % of what was drawn; what is not finite is left out."""
        drawn = np.asarray(drawn)[np.isfinite(drawn)]
        low, high = np.quantile(drawn, (0.025, 0.975)) if len(drawn) else (math.nan, math.nan)
        return cls(float(value), float(low), float(high))

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "–"
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Table:
    """Hold estimates by system and measure; prints as Markdown, adds up row by row.

    Attributes:
        rows: system -> measure -> estimate.
    """

    rows: dict[str, dict[str, Estimate]]

    def __add__(self, other: Table) -> Table:
        return Table({**self.rows, **other.rows})

    def __str__(self) -> str:
        names = dict.fromkeys(name for row in self.rows.values() for name in row)
        return markdown([{"": name} | {n: str(row.get(name, "–")) for n, row in self.rows.items()} for name in names])


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Write rows as a Markdown table; the first one names the columns."""
    cells = [[*rows[0]], *([*row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def estimates(counts: Sequence[Tally], *, draws: int = 1000, seed: int = 0) -> dict[str, Estimate]:
    """Pool tallies of clips and resample the clips: mean and 95 % interval of every measure.

    A resample in which nothing was to be measured is left out of the interval.
    """
    if not counts:
        raise ValueError("a mean needs at least one clip, found none")
    picks = np.random.default_rng(seed).integers(len(counts), size=(draws, len(counts)))
    result = {}
    for name in counts[0]:
        part, whole = np.array([count[name] for count in counts], dtype=float).T
        parts, wholes = part[picks].sum(1), whole[picks].sum(1)
        drawn = parts[wholes > 0] / wholes[wholes > 0]
        result[name] = Estimate.of(_ratio(part.sum(), whole.sum()), drawn)
    return result


def by_halves(
    measure: Callable[..., Mapping[str, float]], *sets: np.ndarray, draws: int = 300, seed: int = 0
) -> dict[str, Estimate]:
    """Measure sets of clips together, with 95 % intervals from halves of all sets, drawn without replacement.

    A half varies about the whole as the whole does about the truth. The mean of all halves is subtracted, and with it
    what every half is off by because it is small: Fréchet distances and recall depend on the number of clips. In a
    bootstrap a clip may stand beside itself, which shrinks neighbourhoods and spoils distances near their floor.

    Shapes: sets [n, d], [m, d] and so on, as `measure` takes them.
    """
    whole, rng = measure(*sets), np.random.default_rng(seed)
    halves = ([rng.permutation(x)[: len(x) // 2] for x in sets] for _ in range(draws))
    drawn = np.array([[*measure(*half).values()] for half in halves])
    low, high = np.quantile(drawn - drawn.mean(0), (0.025, 0.975), axis=0)
    return {n: Estimate(v, float(v + a), float(v + b)) for (n, v), a, b in zip(whole.items(), low, high, strict=True)}


def table(
    clips: Sequence[AV[np.ndarray]],
    prompts: Sequence[str],
    *,
    name: str = "clips",
    draws: int = 1000,
    seed: int = 0,
    clock: Clock = CLOCK,
) -> Table:
    """Score clips against their prompts: one row with the mean and 95 % interval of every measure."""
    counts = tallies(read_all(clips, name, clock), prompts)
    return Table({name: estimates(counts, draws=draws, seed=seed)})


def drift(
    readings: Sequence[Reading], prompts: Sequence[str], width: int = 1, *, draws: int = 1000, seed: int = 0
) -> dict[int, dict[str, Estimate]]:
    """Score a roll-out span by span of `width` seconds, pooled over clips: what it loses as it goes on (paper Sec. 4).

    The keys are the first seconds of the spans; a rest shorter than a span joins the last one. A pair counts in the
    second of its impact; frames and samples in the second in which they begin.
    """
    starts = range(0, max(math.floor(min(r.seconds for r in readings)) - width, 0) + 1, width)
    return {
        start: estimates(tallies(readings, prompts, start, end), draws=draws, seed=seed)
        for start, end in zip(starts, [*starts[1:], math.inf], strict=True)
    }


def brief(
    model: Transformer, causal: RolloutConfig | None, codec: TinyCodec, count: int, *, steps: int = 20
) -> dict[str, float]:
    """Measure a miniature on a few held-out clips, through an mp4: the mean of every measure, for its file's metadata.

    Args:
        model: a student, or a teacher that is sampled in `steps`.
        causal: how the student rolls out; None for a teacher.
        codec: of the model's latents.
        count: clips of 5 seconds; prompts take turns.
        steps: of a teacher.
    """
    asked, first = world.prompts_in_turn(count), world.HELD_OUT + 10_000
    seeds = range(first, first + count)
    clips = sampling.sample(model, causal, codec, asked, seeds, 5, steps=steps)
    row = table(sampling.through_file(clips), asked, draws=1).rows["clips"]
    return {"clips": count} | {name: round(e.mean, 4) for name, e in row.items() if math.isfinite(e.mean)}


def shuffled(clips: Sequence[AV[np.ndarray]]) -> list[AV[np.ndarray]]:
    """Give every clip the sound of the next one: the floor of every measure that joins sight and sound."""
    if len(clips) < 2:
        raise ValueError(f"shuffling sounds needs 2 clips or more, found {len(clips)}")
    return [AV(clip.video, after.audio) for clip, after in zip(clips, [*clips[1:], clips[0]], strict=True)]
