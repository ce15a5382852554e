"""Compare sets of clips by hand-made features, without any pretrained network.

The distances are the Fréchet and the energy distance *on these named features*; they are not FVD or FAD and share
no scale with them. Features are divided by their standard deviation in the reference set, so the reference comes
first; where it hardly varies (there is always one ball), by a tenth.

Shapes: `n` clips, `d` features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from omniforcing_lib.bounce import detect
from omniforcing_lib.bounce.world import CLOCK
from omniforcing_lib.layout import AV, Clock

# The four fundamentals have a band each.
BAND_HZ = (0, 300, 450, 570, 750, 1100, 1600, 2300, 3200, 4500, 8000)
WINDOW, HOP = 1024, 512
QUIET_DB = -90.0
LEAST_SPREAD = 0.1
FEATURES = AV(
    (
        *("balls", "x_mean", "x_std", "y_mean", "y_std", "speed_x", "speed_y", "speed_std"),
        *("red", "green", "blue", "brightness_std", "change", "change_std", "turns_a_second"),
    ),
    (
        *(f"band_{low}_mean" for low in BAND_HZ[:-1]),
        *(f"band_{low}_std" for low in BAND_HZ[:-1]),
        *("loudness_rise", "loudness_fall", "flatness", "onsets_a_second"),
    ),
)


def features(clip: AV[np.ndarray], clock: Clock = CLOCK) -> AV[np.ndarray]:
    """Describe a clip by the numbers named in `FEATURES`, finite for any clip.

    Shapes: AV(uint8 [F, H, W, 3], float [N]) -> AV([15], [24]).
    """
    return AV(_picture_features(clip.video, clock.fps), _sound_features(clip.audio, clock.sample_rate))


def _picture_features(frames: np.ndarray, fps: int) -> np.ndarray:
    track = detect.track(frames)
    seen = np.isfinite(track.centre[:, 0])
    centre = track.centre[seen] if seen.any() else np.zeros((1, 2))
    steps = np.diff(track.centre, axis=0)
    steps = steps[np.isfinite(steps[:, 0])] if np.isfinite(steps).any() else np.zeros((1, 2))
    light = frames.mean(axis=(1, 2), dtype=np.float64)
    change = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2, 3)) if len(frames) > 1 else np.zeros(1)
    place = np.stack([centre.mean(0), centre.std(0)], axis=1).ravel()
    speed = np.linalg.norm(steps, axis=1)
    return np.array(
        [
            *(track.count.mean(), *place, *np.abs(steps).mean(0), speed.std()),
            *(*light.mean(0), light.mean(1).std(), change.mean(), change.std()),
            len(detect.turns(track.centre, fps)) * fps / len(frames),
        ]
    )


def _sound_features(samples: np.ndarray, rate: int) -> np.ndarray:
    padded = np.pad(samples, (0, max(0, WINDOW - len(samples))))
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP] * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(windows)) ** 2 / WINDOW
    edges = np.searchsorted(np.fft.rfftfreq(WINDOW, 1 / rate), BAND_HZ[:-1])
    bands = decibels(np.add.reduceat(power, edges, axis=1) + 1e-12, QUIET_DB)
    loudness = decibels(power.sum(1) + 1e-12, QUIET_DB)
    # The last step counts as still, so that one window alone has no rise and no fall.
    step = np.diff(loudness, append=loudness[-1:])
    rise, fall = np.maximum(step, 0).mean(), np.minimum(step, 0).mean()
    flatness = np.log(power + 1e-9).mean() - math.log(power.mean() + 1e-9)
    onsets = len(detect.heard_onsets(samples, rate)) * rate / len(samples)
    return np.array([*bands.mean(0), *bands.std(0), rise, fall, flatness, onsets])


def decibels(power: np.ndarray | float, least: float) -> np.ndarray:
    """Write power in dB of full scale, no less than `least`."""
    return np.maximum(10 * np.log10(np.maximum(power, 1e-30)), least)


def feature_sets(clips: Sequence[AV[np.ndarray]], clock: Clock = CLOCK) -> AV[np.ndarray]:
    """Describe many clips, see `features`.

    Shapes: n clips -> AV([n, 15], [n, 24]).
    """
    return AV(*(np.stack(stream) for stream in zip(*(features(clip, clock) for clip in clips), strict=True)))


def frechet(reference: np.ndarray, other: np.ndarray) -> float:
    """Measure the Fréchet distance between the Gaussians fitted to two feature sets.

    It grows with small sets; compare only numbers from sets of one size.
    Shapes: [n, d], [m, d] -> |mean difference|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), in squared standard deviations.
    """
    a, b = _scaled(reference, other)
    cov_a, cov_b = np.cov(a.T, ddof=0), np.cov(b.T, ddof=0)
    root = _root(cov_a)
    bures = np.trace(cov_a + cov_b - 2 * _root(root @ cov_b @ root))
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + max(bures, 0.0))


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def energy_distance(reference: np.ndarray, other: np.ndarray) -> float:
    """Measure the energy distance between two feature sets, without bias: its mean is zero for equal laws.

    Shapes: [n, d], [m, d] -> 2 E|a - b| - E|a - a'| - E|b - b'|, in standard deviations; may fall below zero.
    """
    a, b = _scaled(reference, other)
    within = sum(_apart(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b))
    return float(2 * _apart(a, b).mean() - within)


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a[:, None] - b[None], axis=-1)


def _scaled(reference: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    for name, features in (("reference", reference), ("other", other)):
        if features.ndim != 2 or features.shape[0] < 2 or features.shape[1] != reference.shape[-1]:
            raise ValueError(
                f"two feature sets [n >= 2, d] with one d are compared, found {name} {features.shape} beside reference "
                f"{reference.shape}: stack them with feature_sets"
            )
    spread = np.maximum(reference.std(0), LEAST_SPREAD)
    return reference / spread, other / spread
