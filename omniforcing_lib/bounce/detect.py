"""Read the world's events from pixels and samples alone: where the ball is, when it turns, which tone starts.

Nothing here knows the scene or the prompt, and nothing depends on phase: a sound re-rendered by an oscillator bank
or decoded from AAC reads like the original. Thresholds are set for imperfect, generated clips: a track that jitters
by a third of a pixel or misses frames gives no impact of its own making.

Shapes: `F` frames, `N` samples, `T` analysis steps of the sound, `P` partials.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy import ndimage

from omniforcing_lib.bounce.world import (
    BACKGROUND,
    BANK_HZ,
    CLOCK,
    COLOURS,
    HIGH,
    HUM_LEVEL,
    HUM_NOTES,
    LOW,
    RADIUS,
    TIMBRES,
    WALL_NOTES,
    WALLS,
    Crossing,
    Impact,
    fold,
    tone,
)

# Brightest channel: the frame stays below 60, and a ball at two thirds of its light is still a whole ball.
DARK, BRIGHT = 70, 150
# Frames on either side of a turn: few to find it, more to date it.
LOOK, FIT, FEWEST = 5, 8, 3
# A turn changes the speed along its axis by at least this many pixels per frame (the world's slowest: 1.57) ...
LEAST_TURN = 0.7
# ... and both legs are straight to within a pixel.
STRAIGHT = 1.0
WINDOW, HOP = 400, 40
SEMITONES = tuple(sorted({up for timbre in TIMBRES.values() for up in timbre.semitones}))
# Steps of 2.5 ms from the onset at which a tone is looked at; none sees the attack but the first.
BEFORE, LOOKS = -6, (6, 18, 40)
LEAST_RISE, LEAST_LIKENESS = 0.02, 0.75
# Within 25 ms of a louder start, anything below a quarter of it is that start's own spectral splash.
SPLASH, SPLASH_STEPS = 0.25, 10
APART = 48
# A hum is what sounds in nine of ten windows of a second: there is always a tenth in which a bell has died down.
HUM_WINDOW, HUM_HOP, HUM_POINTS, LEAST_SHARE = 1000, 200, 8192, 0.1
LEAST_HUM, LOWEST_HZ = HUM_LEVEL / 2, 200.0
# A ball that is gone for fewer frames only flickers (the world's shortest way out and back: 25), and one that was
# further from the edge than two frames' way did not leave by it.
GONE, NEAR = 8, 6.0
# Frames of a leg by which its crossing is told, and the fewest by which a way out foretells the way back.
LEG, LEAST_LEG = 24, 12
# Of a unit wave in 10 ms, whose power is 80, this much counts as noise: it keeps notes a semitone apart from trading.
RIDGE = 2.0


class Track(NamedTuple):
    """Follow the ball: how many there are, where the largest is (NaN if none) and its colour name ("" if none).

    Shapes: count int [F], centre float [F, 2] in pixels (x, y), colour str [F].
    """

    count: np.ndarray
    centre: np.ndarray
    colour: np.ndarray


class Onset(NamedTuple):
    """Say when which wall's pitch starts to sound in which timbre."""

    time_s: float
    wall: str
    timbre: str


def track(frames: np.ndarray) -> Track:
    """Find the balls of every frame: connected bright areas, each counted as the nearest number of ball areas.

    Shapes: uint8 [F, H, W, 3] -> Track of F frames.
    """
    cover = np.clip((frames.max(axis=-1).astype(np.float32) - DARK) / (BRIGHT - DARK), 0.0, 1.0)
    in_plane = np.zeros((3, 3, 3), dtype=bool)
    in_plane[1] = True
    labels, blobs = ndimage.label(cover > 0, in_plane)
    where = np.nonzero(labels)
    label, weight = labels[where] - 1, cover[where]
    area = np.bincount(label, weight, blobs)
    sums = [np.bincount(label, weight * v, blobs) for v in (where[2] + 0.5, where[1] + 0.5, *frames[where].T)]
    mean = np.stack(sums, axis=1) / area[:, None]
    frame = np.zeros(blobs, dtype=int)
    frame[label] = where[0]
    return _largest(frame, np.rint(area / (math.pi * RADIUS**2)).astype(int), area, mean, len(frames))


def _largest(frame: np.ndarray, balls: np.ndarray, area: np.ndarray, mean: np.ndarray, frames: int) -> Track:
    count = np.bincount(frame, balls, frames).astype(int)
    centre, colour = np.full((frames, 2), np.nan), np.full(frames, "", dtype="<U8")
    # The last write wins, so the largest blob of a frame stays.
    order = [b for b in np.argsort(area) if balls[b]]
    centre[frame[order]] = mean[order, :2]
    colour[frame[order]] = name_colours(mean[order, 2:])
    return Track(count, centre, colour)


def name_colours(rgb: np.ndarray) -> np.ndarray:
    """Name the palette colour whose direction from the background is nearest: dimming does not change the name.

    Shapes: [..., 3] in [0, 255] -> str [...].
    """

    def direction(values: np.ndarray) -> np.ndarray:
        away = values - np.array(BACKGROUND, dtype=float)
        return away / np.maximum(np.linalg.norm(away, axis=-1, keepdims=True), 1e-9)

    palette = direction(np.array(list(COLOURS.values()), dtype=float))
    return np.array(list(COLOURS))[np.argmax(direction(rgb) @ palette.T, axis=-1)]


def seen_impacts(frames: np.ndarray, fps: float = CLOCK.fps) -> list[Impact]:
    """List the impacts that the picture shows, see `turns`.

    Shapes: uint8 [F, H, W, 3].
    """
    return turns(track(frames).centre, fps)


def turns(centre: np.ndarray, fps: float = CLOCK.fps) -> list[Impact]:
    """Date the turning points of a track between frames, each axis by itself so that corners give two.

    A turn is where straight legs before and after point opposite ways; its time is where they cross.
    Shapes: [F, 2] pixels, NaN where no ball was found.
    """
    impacts = []
    for axis, walls in enumerate((WALLS[:2], WALLS[2:])):
        splits = _splits(centre[:, axis])
        for i, split in enumerate(splits):
            # A leg ends where the next turn begins.
            low = max(split - FIT, splits[i - 1] if i else 0)
            high = min(split + FIT, splits[i + 1] if i + 1 < len(splits) else len(centre))
            time, leaving = _crossing(centre[:, axis], low, split, high)
            impacts.append(Impact(time / fps, walls[0] if leaving > 0 else walls[1]))
    return sorted(impacts)


def _splits(x: np.ndarray) -> list[int]:
    """Find turns of one axis: the first frame of each leg that runs opposite to the leg before it."""
    legs = sliding_window_view(np.pad(x, LOOK, constant_values=np.nan), LOOK)
    before, after = (_line(leg, np.arange(LOOK)) for leg in (legs[:-LOOK], legs[LOOK:]))
    turned = (before.slope * after.slope < 0) & (np.abs(after.slope - before.slope) > LEAST_TURN)
    straight = np.maximum(before.error, after.error) < STRAIGHT
    candidates = np.nonzero(turned & straight & (np.minimum(before.points, after.points) >= FEWEST))[0]
    groups = np.split(candidates, np.nonzero(np.diff(candidates) > LOOK)[0] + 1)
    error = before.error**2 + after.error**2
    return [int(group[np.argmin(error[group])]) for group in groups if len(group)]


class _Line(NamedTuple):
    slope: np.ndarray
    start: np.ndarray
    error: np.ndarray
    points: np.ndarray


def _line(x: np.ndarray, t: np.ndarray) -> _Line:
    """Fit x = start + slope t to the last axis, without its NaN; the error is the residual's rms."""
    valid = np.isfinite(x)
    points = valid.sum(-1)
    share = valid / np.maximum(points, 1)[..., None]
    x = np.where(valid, x, 0.0)
    mean_x, mean_t = (share * x).sum(-1), (share * t).sum(-1)
    late = t - mean_t[..., None]
    slope = (share * late * x).sum(-1) / np.maximum((share * late**2).sum(-1), 1e-9)
    rest = x - mean_x[..., None] - slope[..., None] * late
    return _Line(slope, mean_x - slope * mean_t, np.sqrt((share * rest**2).sum(-1)), points)


def _crossing(x: np.ndarray, low: int, split: int, high: int) -> tuple[float, float]:
    """Cross the legs before and after `split`: time in frames, and the speed after it."""
    before, after = (_line(x[span], np.r_[span]) for span in (slice(low, split), slice(split, high)))
    time = (before.start - after.start) / (after.slope - before.slope)
    return float(np.clip(time, split - 1.5, split + 0.5)), float(after.slope)


def heard_onsets(samples: np.ndarray, rate: int = CLOCK.sample_rate) -> list[Onset]:
    """List the tones that start: a wall's fundamental rises, and its partials look like one of the timbres.

    Shapes: float [N] mono at 16 kHz.
    """
    _check_rate(rate)
    level = _levels(samples)
    rise = _rise(level)
    loudest = ndimage.maximum_filter1d(rise.max(axis=1), 2 * SPLASH_STEPS + 1)
    onsets = []
    for wall in range(len(WALLS)):
        steps = _peaks(np.where(rise[:, wall] > SPLASH * loudest, rise[:, wall], 0.0))
        onsets += [onset for step in steps for onset in _judge(level, rise[:, wall], wall, step)]
    return sorted(onsets)


@cache
def _bank() -> np.ndarray:
    """Hann-windowed oscillators, one for each wall and partial: complex64 [WINDOW, walls * P]."""
    hertz = np.array([[BANK_HZ[WALL_NOTES[wall] + up] for up in SEMITONES] for wall in WALLS]).ravel()
    window = np.hanning(WINDOW + 1)[:WINDOW]
    angle = 2j * np.pi * np.arange(WINDOW)[:, None] / CLOCK.sample_rate * hertz
    return (2 / window.sum() * window[:, None] * np.exp(angle)).astype(np.complex64)


def _levels(samples: np.ndarray) -> np.ndarray:
    """Measure the amplitude of every wall's every partial, each 2.5 ms over 25 ms: [T, walls, P]."""
    # Reflected, a tail that runs into the clip's start is no onset.
    padded = np.pad(np.asarray(samples, dtype=np.float32), WINDOW // 2, mode="reflect")
    windows = np.ascontiguousarray(sliding_window_view(padded, WINDOW)[::HOP])
    level = np.hypot(windows @ _bank().real, windows @ _bank().imag)
    return level.reshape(len(level), len(WALLS), len(SEMITONES))


def _rise(level: np.ndarray) -> np.ndarray:
    """Subtract the fundamentals half a window ago from those half a window ahead: [T, walls]."""
    half = WINDOW // HOP // 2
    edged = np.pad(level[..., 0], ((half, half), (0, 0)), mode="edge")
    return edged[2 * half :] - edged[: -2 * half]


def _peaks(rise: np.ndarray) -> list[int]:
    """Pick the highest steps above the threshold, none within 120 ms of a higher one."""
    peaks: list[int] = []
    inner = rise[1:-1]
    tops = np.nonzero((inner >= rise[:-2]) & (inner > rise[2:]) & (inner > LEAST_RISE))[0] + 1
    for step in tops[np.argsort(-rise[tops])]:
        if all(abs(step - other) > APART for other in peaks):
            peaks.append(int(step))
    return sorted(peaks)


def _judge(level: np.ndarray, rise: np.ndarray, wall: int, step: int) -> list[Onset]:
    """Name the timbre that the partials after a rise look like, if any, and date the onset by its template."""
    seen = _look(level, wall, step)
    models, lateness = _templates()
    likeness = models[wall] @ seen / max(np.linalg.norm(seen), 1e-9)
    best = int(np.argmax(likeness))
    if likeness[best] < LEAST_LIKENESS or seen[0] < LEAST_RISE:
        return []
    time_s = (step + _vertex(rise[step - 1 : step + 2])) * HOP / CLOCK.sample_rate - lateness[wall, best]
    return [Onset(float(time_s), WALLS[wall], list(TIMBRES)[best])]


def _look(level: np.ndarray, wall: int, step: int) -> np.ndarray:
    """Gather a wall's partials at three moments after a step, less what sounded before: [3 P]."""
    steps = np.clip(step + np.array((BEFORE, *LOOKS)), 0, len(level) - 1)
    before, *after = level[steps, wall]
    return np.maximum(np.stack(after) - before, 0.0).ravel()


def _vertex(three: np.ndarray) -> float:
    """Place the top of the parabola through three steps, relative to the middle one."""
    left, middle, right = (float(v) for v in three)
    return (left - right) / (2 * min(left - 2 * middle + right, -1e-12))


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Measure every tone alone as any sound is measured: unit looks [walls, timbres, 3 P], lateness in seconds."""
    looks, late = np.zeros((len(WALLS), len(TIMBRES), len(LOOKS) * len(SEMITONES))), np.zeros((4, len(TIMBRES)))
    start = CLOCK.sample_rate // 5
    ages = np.arange(CLOCK.sample_rate // 2) / CLOCK.sample_rate
    for w, wall in enumerate(WALLS):
        for t, timbre in enumerate(TIMBRES):
            level = _levels(np.concatenate([np.zeros(start), tone(timbre, WALL_NOTES[wall], ages)]))
            rise = _rise(level)[:, w]
            step = int(np.argmax(rise))
            look = _look(level, w, step)
            looks[w, t] = look / np.linalg.norm(look)
            late[w, t] = (step + _vertex(rise[step - 1 : step + 2])) * HOP / CLOCK.sample_rate - 0.2
    return looks, late


def hum_cents(samples: np.ndarray, rate: int = CLOCK.sample_rate) -> np.ndarray:
    """Tell the pitch of the steady tone in every whole second, in cents above 220 Hz; NaN where none is heard.

    Shapes: float [N] mono at 16 kHz -> [N // 16000].
    """
    _check_rate(rate)
    samples = np.asarray(samples, dtype=np.float32)
    return np.array([_steady_cents(samples[k : k + rate]) for k in range(0, len(samples) - rate + 1, rate)])


def _steady_cents(second: np.ndarray) -> float:
    """Find the loudest frequency of what is in almost every window of 62.5 ms, between bins of 2 Hz."""
    window = np.hanning(HUM_WINDOW + 1)[:HUM_WINDOW].astype(np.float32)
    windows = sliding_window_view(second, HUM_WINDOW)[::HUM_HOP] * window
    level = np.quantile(np.abs(np.fft.rfft(windows, HUM_POINTS)), LEAST_SHARE, axis=0) * 2 / window.sum()
    step = CLOCK.sample_rate / HUM_POINTS
    level[: math.ceil(LOWEST_HZ / step)] = 0
    top = int(np.argmax(level[:-1]))
    if level[top] < LEAST_HUM:
        return math.nan
    return 1200 * math.log2((top + _vertex(level[top - 1 : top + 2])) * step / BANK_HZ[0])


def first_hum_cents(samples: np.ndarray, rate: int = CLOCK.sample_rate) -> float:
    """Tell which of the twelve hums sounds in the first audio latent, 10 ms, in cents above 220 Hz; NaN if none does.

    So little sound has no pitch to be read off a spectrum: all notes of the world are fitted to it at once.
    Shapes: float [N] mono at 16 kHz, N >= 160.
    """
    _check_rate(rate)
    first = np.asarray(samples[: CLOCK.hop], dtype=float)
    sizes = np.linalg.norm((_first_fit() @ first).reshape(2, -1), axis=0)[-len(HUM_NOTES) :]
    return 100.0 * HUM_NOTES[int(np.argmax(sizes))] if sizes.max() >= LEAST_HUM else math.nan


@cache
def _first_fit() -> np.ndarray:
    """Fit all notes to the first hop, hums last: [2 notes, 160], cosines first; the ridge keeps near notes apart."""
    tones = {WALL_NOTES[wall] + up for wall in WALLS for timbre in TIMBRES.values() for up in timbre.semitones}
    hertz = BANK_HZ[[*sorted(tones), *HUM_NOTES]]
    angle = 2 * np.pi * np.arange(CLOCK.hop)[:, None] / CLOCK.sample_rate * hertz
    waves = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    return np.linalg.solve(waves.T @ waves + RIDGE * np.eye(waves.shape[1]), waves.T)


class Passage(NamedTuple):
    """Follow the ball out of sight on the right, and back; `back` is None where it is not seen again."""

    out: Crossing
    back: Crossing | None


def passages(centre: np.ndarray, fps: float = CLOCK.fps) -> list[Passage]:
    """List how the ball leaves on the right and comes back: when its centre passes x = `HIGH`, and at which height.

    What leaves within half a second of the clip's start is left out: too little of its way was seen.
    Shapes: [F, 2] pixels, NaN where no ball was found.
    """
    found = []
    whole = np.nonzero(centre[:, 0] <= HIGH)[0]
    bounces = [(turn.time_s * fps, turn.wall) for turn in turns(centre, fps) if turn.wall in WALLS[2:]]
    # The last frame before each absence, and the first one after it.
    for last, first in zip_longest(whole, whole[1:]):
        if (len(centre) if first is None else first) - last <= GONE or centre[last, 0] < HIGH - NEAR:
            continue
        # A bounce in the first frames of a clip cannot be told, so these frames say nothing of the way.
        leg = range(max(last - LEG, FEWEST), last + 1)
        out = _passing(centre, bounces, leg, last, fps) if len(leg) >= LEAST_LEG else None
        back = None if first is None else _passing(centre, bounces, range(first, first + LEG), first, fps)
        if out:
            found.append(Passage(out, back))
    return found


def _passing(
    centre: np.ndarray, bounces: list[tuple[float, str]], leg: range, edge: int, fps: float
) -> Crossing | None:
    """Date the crossing by a line through x near the edge, and y by one through its unfolded way along the leg."""
    frames = np.array([f for f in leg if f < len(centre) and np.isfinite(centre[f, 0])])
    near = frames[np.abs(frames - edge) < FIT]
    if len(near) < FEWEST:
        return None
    x = _line(centre[near, 0], near)
    time = float(np.clip(edge + (HIGH - centre[edge, 0]) / x.slope, edge - 1.5, edge + 1.5)) if x.slope else edge
    y = centre[frames, 1].copy()
    for moment, wall in bounces:
        # Seen from the edge, what lies beyond a bounce is mirrored in its wall.
        beyond = (frames < moment) if moment <= edge else (frames > moment)
        y[beyond] = 2 * (LOW if wall == WALLS[2] else HIGH) - y[beyond]
    way = _line(y, frames)
    run, speed = float(way.start + way.slope * time) - LOW, float(way.slope) * fps
    turned = math.floor(run / (HIGH - LOW)) % 2
    return Crossing(time / fps, float(fold(run)), -speed if turned else speed)


def _check_rate(rate: int) -> None:
    if rate != CLOCK.sample_rate:
        raise ValueError(f"sounds are read at {CLOCK.sample_rate} Hz, found {rate} Hz: resample with media.read_clip")
