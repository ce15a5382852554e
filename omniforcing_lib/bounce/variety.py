"""Measure how varied a set of clips is: what a score of single clips cannot see.

A clip is described by its *motion*: start and signed velocity of the ball, found from one second of its track by the
world's own law; and by its *pattern*: which walls sound when. A set is compared with real clips by k-nearest
neighbours (precision and recall, Kynkäänniemi et al. 2019; density and coverage, Naeem et al. 2020) and by the energy
distance, and it has a spread of its own: of directions, angles, starts and speeds, and of clips under one prompt.

Shapes: `n` and `m` clips, `d` features, `F` frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import cdist

from omniforcing_lib.bounce import world
from omniforcing_lib.bounce.distributions import LEAST_SPREAD, energy_distance
from omniforcing_lib.bounce.evaluate import Estimate, Reading, by_halves

FASTEST = 1.25 * world.SPEED[1]
NEIGHBOURS = 3
APART_S = 3
QUADRANTS = 4
RATIOS = ("recall", "angle_sd", "speed_sd", "direction_entropy")
"""Names of what `ratios` divides."""


def fit(seen: np.ndarray) -> tuple[float, float]:
    """Find the phase and speed of a ball along one axis: the triangle wave that is nearest in the mean.

    The phase is that of the first frame, in pixels of the unfolded way, 0 to 2 `world.SPAN`; the speed is in pixels a
    frame. The search is a grid that closes in, so a few wrong frames change nothing.

    Shapes: [F] pixels, NaN where no ball was found; fewer than two frames give NaN.
    """
    frames = np.flatnonzero(np.isfinite(seen))
    if len(frames) < 2:
        return math.nan, math.nan
    phases, speeds = np.arange(0, 2 * world.SPAN, 1.5), np.linspace(0, FASTEST / world.CLOCK.fps, 48)
    for _ in range(4):
        error = np.abs(folded(phases[:, None, None] + speeds[:, None] * frames) - seen[frames]).mean(-1)
        i, j = np.unravel_index(error.argmin(), error.shape)
        phase, speed = phases[i], speeds[j]
        phases, speeds = (
            np.linspace(c - d, c + d, 17) for c, d in ((phase, np.ptp(phases[:2])), (speed, np.ptp(speeds[:2])))
        )
    return float(phase), float(speed)


def folded(way: np.ndarray) -> np.ndarray:
    """Fold a straight way into the box: there and back again."""
    return world.LOW + np.abs(np.mod(way + world.SPAN, 2 * world.SPAN) - world.SPAN)


def motion(centre: np.ndarray) -> np.ndarray:
    """Find where a ball starts and where it goes, from a track of about a second.

    Shapes: [F, 2] pixels -> [4]: start x and y in pixels, signed velocity x and y in pixels per second.
    """
    fits = [fit(axis) for axis in centre.T]
    signs = [1 if phase % (2 * world.SPAN) < world.SPAN else -1 for phase, _ in fits]
    starts = [float(folded(np.float64(phase))) for phase, _ in fits]
    return np.array([*starts, *(sign * speed * world.CLOCK.fps for sign, (_, speed) in zip(signs, fits, strict=True))])


def motions(readings: Sequence[Reading], start_s: float = 0.0) -> np.ndarray:
    """Describe clips by the motion of the second that begins at `start_s`; clips without a ball are all alike, 0.

    Shapes: n clips -> [n, 4], see `motion`.
    """
    first = round(start_s * world.CLOCK.fps)
    moves = np.stack([motion(r.track.centre[first : first + world.CLOCK.fps]) for r in readings])
    return np.where(np.isfinite(moves).all(1, keepdims=True), moves, 0.0)


def patterns(readings: Sequence[Reading]) -> np.ndarray:
    """Describe the sound of clips by when each wall first sounds (the clip's length if never), and how often.

    Shapes: n clips -> [n, 8], seconds and counts, in the order of `world.WALLS`.
    """

    def pattern(reading: Reading) -> list[float]:
        onsets = [*(pair.heard for pair in reading.pairs), *reading.heard]
        times = [[onset.time_s for onset in onsets if onset.wall == wall] for wall in world.WALLS]
        return [*(min(heard, default=reading.seconds) for heard in times), *map(len, times)]

    return np.array([pattern(reading) for reading in readings])


def neighbours(real: np.ndarray, other: np.ndarray, k: int = NEIGHBOURS, *, draws: int = 300) -> dict[str, Estimate]:
    """Compare a set with real clips by k-nearest neighbours: `precision`, `recall`, `density`, `coverage`.

    * precision: clips that lie within the k-th neighbour of some real clip.
    * recall: real clips that lie within the k-th neighbour of some clip; a set that keeps to a few modes has little.
    * density: how many real neighbourhoods a clip lies in, by k; 1 in the mean for real clips.
    * coverage: real clips whose own neighbourhood holds a clip.

    Intervals (95 %) are from halves of both sets, see `evaluate.by_halves`. Recall grows with the number of clips:
    compare sets of one size.

    Shapes: [n, d], [m, d], any units; both are divided by the real standard deviations.
    """
    _check_sizes(k, real, other)
    measured = by_halves(partial(_neighbours, k=k), real, other, draws=draws)
    shares = {n: Estimate(e.mean, max(e.low, 0.0), min(e.high, 1.0)) for n, e in measured.items() if n != "density"}
    return measured | shares


def _check_sizes(k: int, *sets: np.ndarray) -> None:
    if (fewest := min(map(len, sets))) <= k:
        raise ValueError(f"the distance to the {k}-th neighbour needs more than {k} clips, found {fewest}")


def _neighbours(real: np.ndarray, other: np.ndarray, k: int) -> dict[str, float]:
    scale = np.maximum(real.std(0), 1e-9)
    inside = cdist(real / scale, other / scale) <= _radius(real / scale, k)[:, None]
    shares = {"precision": inside.any(0), "recall": _reached(real, other, k)}
    shares |= {"density": inside.sum(0) / k, "coverage": inside.any(1)}
    return {name: float(share.mean()) for name, share in shares.items()}


def _radius(x: np.ndarray, k: int) -> np.ndarray:
    """Distance to the k-th neighbour, or to the last one in half of a small set. Shapes: [n, d] to [n]."""
    return np.sort(cdist(x, x), axis=1)[:, min(k, len(x) - 1)]


def spread(moves: np.ndarray) -> dict[str, Estimate]:
    """Measure the variety of a set by itself, see `SPREADS`, with 95 % bootstrap intervals over clips.

    Shapes: [n, 4], see `motions`.
    """
    return {name: _estimated(moves, measure) for name, measure in SPREADS.items()}


def quadrants(moves: np.ndarray) -> np.ndarray:
    """Count the clips that start to the lower right, lower left, upper left, upper right. Shapes: [n, 4] to [4]."""
    right, down = moves[:, 2] > 0, moves[:, 3] > 0
    return np.bincount(np.select([right & down, ~right & down, ~right & ~down], [0, 1, 2], 3), minlength=QUADRANTS)


def _entropy(moves: np.ndarray) -> float:
    """Entropy of the quadrants, 1 where all are as many."""
    share = quadrants(moves) / len(moves)
    return float((share * np.log(1 / np.where(share > 0, share, 1.0))).sum() / math.log(QUADRANTS))


def _angles(moves: np.ndarray) -> np.ndarray:
    """Angle of the direction off the horizontal, in degrees: 20 to 70 in the world, in any quadrant."""
    return np.degrees(np.arctan2(np.abs(moves[:, 3]), np.abs(moves[:, 2])))


def _speeds(moves: np.ndarray) -> np.ndarray:
    return np.linalg.norm(moves[:, 2:], axis=1)


SPREADS: dict[str, Callable[[np.ndarray], float]] = {
    "start_right": lambda moves: float((moves[:, 2] > 0).mean()),
    "angle_sd": lambda moves: float(_angles(moves).std()),
    "start_x": lambda moves: float(moves[:, 0].mean()),
    "start_x_sd": lambda moves: float(moves[:, 0].std()),
    "start_y_sd": lambda moves: float(moves[:, 1].std()),
    "speed": lambda moves: float(_speeds(moves).mean()),
    "speed_sd": lambda moves: float(_speeds(moves).std()),
    "direction_entropy": _entropy,
}
"""What `spread` measures: degrees for angles, pixels for starts, pixels per second for speeds."""


def nearest(readings: Sequence[Reading]) -> Estimate:
    """Measure how far apart clips of one prompt are: mean distance in pixels from a clip's track to the nearest other.

    Missing frames are left out; the interval is a bootstrap over clips.
    """
    tracks = np.stack([reading.track.centre for reading in readings])
    apart = np.nanmean(np.linalg.norm(tracks[:, None] - tracks[None], axis=-1), axis=-1)
    np.fill_diagonal(apart, np.inf)
    return _estimated(apart.min(1), np.mean)


def energy(real: np.ndarray, other: np.ndarray, draws: int = 500) -> Estimate:
    """Give the energy distance to real clips, see `distributions.energy_distance`, with a 95 % bootstrap interval.

    The clips of `other` are drawn; a clip that is drawn twice is not compared with itself.

    Shapes: [n, d], [m, d].
    """
    scale = np.maximum(real.std(0), LEAST_SPREAD)
    across, inside = (cdist(a / scale, other / scale) for a in (real, other))
    rng, count = np.random.default_rng(0), len(other)
    whole = energy_distance(real, other)
    fixed = whole - 2 * across.mean() + inside.sum() / (count * (count - 1))

    def drawn() -> float:
        times = np.bincount(rng.integers(count, size=count), minlength=count)
        pairs = max(count**2 - np.square(times).sum(), 1)
        return float(2 * (across.mean(0) @ times) / count - times @ inside @ times / pairs + fixed)

    return Estimate.of(whole, [drawn() for _ in range(draws)])


class Described(NamedTuple):
    """Motions [n, 4] and patterns [n, 8] of the clips of a set."""

    moves: np.ndarray
    sounds: np.ndarray


def described(readings: Sequence[Reading]) -> Described:
    """Describe a set once, to be compared with many."""
    return Described(motions(readings), patterns(readings))


def compared(real: Described, other: Described) -> dict[str, Estimate]:
    """Give every measure of variety of clips beside real ones: neighbours, spread, energy distance; motion and sound.

    Those of the sound have names that begin with `sound_`.
    """
    heard = neighbours(real.sounds, other.sounds)
    return (
        neighbours(real.moves, other.moves)
        | spread(other.moves)
        | {"energy_motion": energy(real.moves, other.moves)}
        | {f"sound_{name}": heard[name] for name in ("precision", "recall")}
    )


def measures(real: Sequence[Reading], other: Sequence[Reading]) -> dict[str, Estimate]:
    """Describe two sets and compare them, see `compared`."""
    return compared(described(real), described(other))


def in_span(real: Sequence[Reading], other: Sequence[Reading], start_s: int, width_s: int) -> dict[str, Estimate]:
    """Give neighbours and spread of the motions within a span of long clips, one every `APART_S` seconds.

    Seconds of one clip are not independent: intervals of the spread are over these seconds, and too narrow.
    """
    starts = range(start_s, start_s + width_s, APART_S)
    moves = [np.concatenate([motions(readings, start) for start in starts]) for readings in (real, other)]
    return neighbours(*moves) | spread(moves[1])


def ratios(real: np.ndarray, other: np.ndarray, base: np.ndarray, *, draws: int = 300) -> dict[str, Estimate]:
    """Divide a set's variety by another's: `recall`, `angle_sd`, `speed_sd`, `direction_entropy`, 95 % intervals.

    Intervals come from halves of all three sets, see `evaluate.by_halves`. Drawing the real clips alone, beside
    neighbourhoods as they are, gives intervals that miss the truth half of the time.

    Shapes: [n, 4], [m, 4], [l, 4], see `motions`; more than `NEIGHBOURS` clips in each.
    """
    _check_sizes(NEIGHBOURS, real, other, base)
    return by_halves(_ratio, real, other, base, draws=draws)


def _ratio(real: np.ndarray, other: np.ndarray, base: np.ndarray) -> dict[str, float]:
    recalls = [_reached(real, moves).mean() for moves in (other, base)]
    spreads = ([of(moves) for moves in (other, base)] for of in map(SPREADS.get, RATIOS[1:]))
    return {n: float(a / b) if b else math.nan for n, (a, b) in zip(RATIOS, (recalls, *spreads), strict=True)}


def _reached(real: np.ndarray, other: np.ndarray, k: int = NEIGHBOURS) -> np.ndarray:
    """Tell which real clips lie within the k-th neighbour of some clip. Shapes: [n, d], [m, d] to bool [n]."""
    scale = np.maximum(real.std(0), 1e-9)
    return (cdist(real / scale, other / scale) <= _radius(other / scale, k)).any(1)


def _estimated(values: np.ndarray, measure: Callable[[np.ndarray], float]) -> Estimate:
    """Measure a set, with a 95 % bootstrap interval over its rows."""
    picks = np.random.default_rng(0).integers(len(values), size=(500, len(values)))
    return Estimate.of(measure(values), [measure(values[pick]) for pick in picks])
