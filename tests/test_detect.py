"""Laws of the detectors: they find the world's events in pixels and samples, and invent none."""

from functools import cache

import numpy as np
import pytest

from omniforcing_lib.bounce import detect, world
from omniforcing_lib.layout import AV

SEEDS = range(30_000, 30_012)


EXTENDED = {"hum": True, "hidden": True}


@cache
def clip(seed: int, **switches: bool) -> AV:
    return world.render(world.scene(seed, **switches), seconds=5)


def inner(events: list, end_s: float = 5.0) -> list:
    """Leave out what happens too near the ends of a clip to be seen from both sides."""
    return [e for e in events if 0.15 < e.time_s < end_s - 0.15]


def by_wall(events: list) -> dict[str, list[float]]:
    return {wall: [e.time_s for e in inner(events) if e.wall == wall] for wall in world.WALLS}


@pytest.mark.parametrize("seed", SEEDS)
def test_every_impact_is_seen_at_its_wall_within_a_quarter_of_a_frame(seed):
    expected, seen = by_wall(world.impacts(world.scene(seed), 0, 5)), by_wall(detect.seen_impacts(clip(seed).video))
    for wall in world.WALLS:
        np.testing.assert_allclose(seen[wall], expected[wall], atol=0.25 / 24)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_tone_is_heard_at_its_wall_within_5_ms(seed):
    expected, heard = by_wall(world.impacts(world.scene(seed), 0, 5)), by_wall(detect.heard_onsets(clip(seed).audio))
    for wall in world.WALLS:
        np.testing.assert_allclose(heard[wall], expected[wall], atol=0.005)


def test_the_timbre_is_told_by_ear():
    heard = [o.timbre == world.scene(s).timbre for s in SEEDS for o in inner(detect.heard_onsets(clip(s).audio))]
    assert len(heard) > 80 and np.mean(heard) >= 0.98


def test_one_ball_of_the_right_colour_in_every_frame():
    for seed in SEEDS:
        track = detect.track(clip(seed).video)
        assert (track.count == 1).all() and (track.colour == world.scene(seed).colour).all()


def test_the_centre_is_found_to_a_tenth_of_a_pixel():
    track = detect.track(clip(SEEDS[0]).video)
    truth = world.positions(world.scene(SEEDS[0]), np.arange(len(track.centre)) / 24)
    assert np.abs(track.centre - truth).max() < 0.1


def test_two_balls_are_counted_as_two_apart_and_touching():
    frames = clip(SEEDS[0]).video[:1].repeat(2, axis=0)
    x, y = detect.track(frames).centre[0].round().astype(int)
    ball = frames[0, y - 8 : y + 8, x - 8 : x + 8].copy()
    for frame, left in zip(frames, (x + 5 if x < 32 else x - 21, 0 if x > 32 else 48), strict=True):
        frame[y - 8 : y + 8, left : left + 16] = np.maximum(frame[y - 8 : y + 8, left : left + 16], ball)
    assert detect.track(frames).count.tolist() == [2, 2]


def test_a_shaking_track_with_gaps_neither_hides_nor_invents_impacts():
    rng = np.random.default_rng(0)
    for seed in SEEDS:
        truth = world.impacts(world.scene(seed), 0, 5)
        centre = world.positions(world.scene(seed), np.arange(121) / 24) + rng.normal(0, 0.3, (121, 2))
        centre[rng.random(121) < 0.05] = np.nan
        seen = detect.turns(centre)
        assert all(min(abs(s.time_s - t.time_s) for t in truth if t.wall == s.wall) < 1.5 / 24 for s in inner(seen))
        assert len(inner(seen)) >= len(inner(truth)) - 1


def test_a_ball_that_jumps_has_not_turned():
    steps = np.arange(48)
    centre = np.stack([10 + steps % 24, 20 + 0.5 * steps], axis=1)
    assert detect.turns(centre) == []


def test_other_phases_and_slower_attacks_sound_the_same(monkeypatch):
    rng = np.random.default_rng(1)

    def rerendered(timbre: str, note: int, ages: np.ndarray) -> np.ndarray:
        parts = zip(*world.TIMBRES[timbre], strict=True)
        waves = (
            share
            * np.exp(-ages / decay)
            * np.sin(2 * np.pi * world.BANK_HZ[note + up] * ages + rng.uniform(0, 2 * np.pi))
            for up, share, decay in parts
        )
        return 0.3 * np.minimum(ages / 0.01, 1) * sum(waves)

    detect._templates()
    monkeypatch.setattr(world, "tone", rerendered)
    for seed in SEEDS:
        scene = world.scene(seed)
        heard = inner(detect.heard_onsets(world.render(scene, seconds=5).audio))
        truth = inner(world.impacts(scene, 0, 5))
        assert sorted(o.wall for o in heard) == sorted(t.wall for t in truth)
        assert np.mean([o.timbre == scene.timbre for o in heard]) >= 0.9


@pytest.mark.parametrize(
    "sound", [np.zeros(80_160), np.random.default_rng(2).normal(0, 0.02, 80_160)], ids=["0", "noise"]
)
def test_silence_and_noise_hold_no_onset(sound):
    assert detect.heard_onsets(sound.astype(np.float32)) == []


def test_an_empty_or_still_picture_shows_no_impact():
    empty = np.full((49, 64, 64, 3), 14, dtype=np.uint8)
    assert detect.seen_impacts(empty) == [] and not detect.track(empty).count.any()
    assert detect.seen_impacts(clip(SEEDS[0]).video[:1].repeat(49, axis=0)) == []


def test_another_rate_is_refused_by_name():
    with pytest.raises(ValueError, match="16000 Hz, found 48000"):
        detect.heard_onsets(np.zeros(48_000, dtype=np.float32), 48_000)


def test_the_hum_is_told_within_20_cents_in_99_of_100_seconds_and_not_heard_without_one():
    away = [detect.hum_cents(clip(s, **EXTENDED).audio) - world.scene(s, **EXTENDED).hum_cents for s in SEEDS]
    assert np.shape(away) == (len(SEEDS), 5) and np.mean(np.abs(away) <= 20) >= 0.99
    assert np.isnan([detect.hum_cents(clip(s).audio) for s in SEEDS]).all()


@pytest.mark.parametrize("cents", [-60, -25, 7, 33])
def test_a_hum_between_the_notes_is_told_within_two_cents(cents):
    for note in world.HUM_NOTES:
        hertz = 220 * 2 ** ((100 * note + cents) / 1200)
        sound = clip(SEEDS[0]).audio[:16_000] + 0.05 * np.sin(2 * np.pi * hertz * np.arange(16_000) / 16_000)
        assert detect.hum_cents(sound)[0] == pytest.approx(100 * note + cents, abs=2)


def test_ten_milliseconds_tell_which_of_the_twelve_hums():
    scenes = [world.scene(seed, hum=True) for seed in range(31_000, 31_200)]
    first = AV(range(0), range(0, 1))
    told = [detect.first_hum_cents(world.render(s, first).audio) == s.hum_cents for s in scenes]
    assert np.mean(told) >= 0.98
    assert np.isnan(detect.first_hum_cents(np.zeros(160)))


def test_under_a_hum_every_tone_is_heard_as_before_and_unseen_impacts_too():
    for seed in SEEDS:
        scene = world.scene(seed, **EXTENDED)
        expected, heard = by_wall(world.impacts(scene, 0, 5)), inner(detect.heard_onsets(clip(seed, **EXTENDED).audio))
        for wall in world.WALLS:
            np.testing.assert_allclose([o.time_s for o in heard if o.wall == wall], expected[wall], atol=0.005)
        assert all(o.timbre == scene.timbre for o in heard)


def test_an_absence_is_dated_within_a_quarter_of_a_frame_and_a_pixel():
    found = 0
    for seed in SEEDS:
        scene = world.scene(seed, hidden=True)
        for out, back in detect.passages(detect.track(clip(seed, hidden=True).video).centre):
            hit = next(h for h in world.impacts(scene, out.time_s, 9) if h.wall == "right")
            away = (88 - 56) / abs(scene.velocity[0])
            for seen, moment in ((out, hit.time_s - away), (back, hit.time_s + away)):
                if seen:
                    assert seen.time_s == pytest.approx(moment, abs=0.25 / 24)
                    assert seen.y == pytest.approx(world.positions(scene, np.array([moment]))[0, 1], abs=1)
                    found += 1
    assert found >= 12
    assert not any(detect.passages(detect.track(clip(seed).video).centre) for seed in SEEDS)
