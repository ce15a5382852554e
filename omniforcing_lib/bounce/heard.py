"""Score what only the ear can tell of the extended world: the hum that goes on, the ball that comes back.

`world.scene(..., hum=True, hidden=True)` makes such clips. As in `evaluate`, every measure is a ratio of two counts or
sums of a clip, so `evaluate.estimates` pools clips and gives intervals, and `evaluate.shuffled` gives the floor of
what joins sight and sound.

Shapes: S whole seconds of a clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from omniforcing_lib.bounce import detect, world
from omniforcing_lib.bounce.evaluate import EDGE_S, Estimate, Reading, Tally, estimates

HUM_CENTS = 20.0
# The closed form doubles the error of the sound: twice the frame and a half of a pair of seen and heard.
REENTRY_PX, REENTRY_FRAMES = 3.0, 3.0
# The slowest ball needs this long from the edge of sight to the hidden wall.
LONGEST_S = (world.WIDE - world.SIZE) / (world.SPEED[0] * math.sin(world.STEEPEST))


class Hearing(NamedTuple):
    """Hold what is heard of a clip's hum and seen of its ball's absences.

    Attributes:
        hum: pitch by second in cents above 220 Hz, NaN where none is heard: [S].
        first: pitch in the first audio latent, one of the twelve hums in cents, or NaN.
        passages: how the ball leaves on the right and comes back.
        right: moments in seconds at which the right wall is heard.
        seconds: length of the clip.
        fps: frames per second.
    """

    hum: np.ndarray
    first: float
    passages: list[detect.Passage]
    right: list[float]
    seconds: float
    fps: int


def hear(reading: Reading) -> Hearing:
    """Run the detectors of the extended world over a clip that `evaluate.read` has read.

    Raises ValueError when the sound is not at 16 kHz.
    """
    clock, onsets = reading.clock, [*reading.heard, *(pair.heard for pair in reading.pairs)]
    return Hearing(
        detect.hum_cents(reading.clip.audio, clock.sample_rate),
        detect.first_hum_cents(reading.clip.audio, clock.sample_rate),
        detect.passages(reading.track.centre, clock.fps),
        sorted(onset.time_s for onset in onsets if onset.wall == "right"),
        reading.seconds,
        clock.fps,
    )


def hum_tally(hearing: Hearing, cents: float | None = None, start: int = 0, end: int | None = None) -> Tally:
    """Count how well a clip keeps its hum in seconds `start` to `end`: numerator and denominator.

    * hum_heard: seconds in which a hum is heard, of all seconds.
    * hum_kept: clips whose hum is within 20 cents of the reference in every second, of all clips.
    * hum_drift_cents: distance from the reference in cents, over the seconds in which a hum is heard.
    * hum_first: clips whose first audio latent (10 ms) already hums at the reference, of all clips.
    * hum_first_cents: distance of the first latent's hum from the reference, over clips in which it hums.

    Args:
        hearing: what is heard of the clip.
        cents: the reference, such as `world.Scene.hum_cents` of the true past; None takes the clip's own pitch, the
            one heard in its first second.
        start: first second.
        end: second after the last one; None is the clip's end.
    """
    if not len(hearing.hum):
        raise ValueError(f"a hum is judged by whole seconds, found a clip of {hearing.seconds:.2f} s")
    reference = float(hearing.hum[0]) if cents is None else cents
    away, first = np.abs(hearing.hum[start:end] - reference), abs(hearing.first - reference)
    heard = np.isfinite(away)
    return {
        "hum_heard": (float(np.isfinite(hearing.hum[start:end]).sum()), len(away)),
        "hum_kept": (float((away <= HUM_CENTS).all()), 1),
        "hum_drift_cents": (float(away[heard].sum()), float(heard.sum())),
        "hum_first": (float(first <= HUM_CENTS), 1),
        "hum_first_cents": (first, 1) if math.isfinite(first) else (0.0, 0),
    }


def hum_by_second(
    hearings: Sequence[Hearing], cents: Sequence[float] | None = None, *, draws: int = 1000, seed: int = 0
) -> dict[int, dict[str, Estimate]]:
    """Score the hum second by second, pooled over clips: what a roll-out forgets of what it heard first."""
    references = [None] * len(hearings) if cents is None else cents
    return {
        second: estimates(
            [hum_tally(h, c, second, second + 1) for h, c in zip(hearings, references, strict=True)],
            draws=draws,
            seed=seed,
        )
        for second in range(min(len(h.hum) for h in hearings))
    }


def reentry_tally(hearing: Hearing) -> Tally:
    """Compare where the ball comes back with what its heard impact foretells (`world.reentry`).

    The first sound of the right wall after the ball has left is its impact. An absence that the clip's end cuts short
    before the ball should be back is not counted.

    * reentry_right: absences that end within 3 px and 3 frames of the closed form, of all absences; one without a
      sound, or without an end, is wrong.
    * reentry_px: distance along the edge of sight in pixels, over absences with a sound and an end.
    * reentry_frames: distance in time in frames, over the same.
    """
    right, errors, total = 0, [], 0
    for out, back in hearing.passages:
        heard = [t for t in hearing.right if out.time_s < t < out.time_s + LONGEST_S]
        told = world.reentry(out, heard[0]) if heard else None
        due = told.time_s if told else out.time_s + 2 * LONGEST_S
        if back is None and due > hearing.seconds - EDGE_S:
            continue
        total += 1
        if told and back:
            errors.append((abs(told.y - back.y), abs(told.time_s - back.time_s) * hearing.fps))
            right += errors[-1][0] <= REENTRY_PX and errors[-1][1] <= REENTRY_FRAMES
    px, frames = np.sum(errors, axis=0) if errors else (0.0, 0.0)
    return {
        "reentry_right": (float(right), total),
        "reentry_px": (float(px), len(errors)),
        "reentry_frames": (float(frames), len(errors)),
    }
