"""Laws of the scores: ceiling for real clips, floor for shuffled ones, honest intervals, right distances."""

import math
from functools import cache

import numpy as np
import pytest

from omniforcing_lib.bounce import detect, distributions, evaluate, world
from omniforcing_lib.bounce.world import Impact
from omniforcing_lib.layout import AV


@cache
def real(count: int = 18, first_seed: int = 40_000) -> tuple[list[AV], list[str]]:
    prompts = world.prompts()
    scenes = [world.scene(first_seed + i, prompts[i % len(prompts)]) for i in range(count)]
    return [world.render(s, seconds=3) for s in scenes], [s.prompt for s in scenes]


@cache
def readings() -> tuple[evaluate.Reading, ...]:
    return tuple(evaluate.read(clip) for clip in real()[0])


def late(clip: AV, seconds: float) -> AV:
    return AV(clip.video, np.roll(clip.audio, round(seconds * 16_000)))


def test_real_clips_score_at_the_ceiling():
    table = evaluate.table(*real(), name="real", draws=100)
    mean = {name: estimate.mean for name, estimate in table.rows["real"].items()}
    assert {"one_ball", "colour", "timbre", "sync_f1", "wall_pitch", "speed_cv", "motion"} < set(mean)
    assert mean["one_ball"] == mean["colour"] == 1
    assert min(mean["sync_f1"], mean["wall_pitch"], mean["timbre"]) >= 0.97
    assert abs(mean["offset_ms"]) < 2 and mean["speed_cv"] < 0.05 and 54 < mean["motion"] < 66


def test_shuffled_sound_scores_at_the_floor():
    clips, prompts = real()
    floor = evaluate.table(evaluate.shuffled(clips), prompts, draws=100).rows["clips"]
    assert floor["sync_f1"].mean < 0.4 and floor["wall_pitch"].mean < 0.6 and floor["timbre"].mean < 0.1
    assert floor["one_ball"].mean == 1


@pytest.mark.parametrize("delay_s", [-0.03, 0.02, 0.045])
def test_a_late_sound_shows_as_its_own_offset(delay_s):
    scores = [evaluate.score(late(clip, delay_s), p) for clip, p in zip(*real(), strict=True)]
    assert np.nanmean([s["offset_ms"] for s in scores]) == pytest.approx(1000 * delay_s, abs=2)


def test_sound_later_than_the_tolerance_is_out_of_sync():
    clips, prompts = real()
    assert evaluate.table([late(c, 0.12) for c in clips], prompts, draws=10).rows["clips"]["sync_f1"].mean < 0.3


def test_silence_is_no_success():
    clips, prompts = real()
    scores = evaluate.score(AV(clips[0].video, np.zeros_like(clips[0].audio)), prompts[0])
    assert scores["timbre"] == scores["sync_recall"] == scores["sync_f1"] == 0
    assert math.isnan(scores["sync_precision"]) and math.isnan(scores["wall_pitch"])
    assert scores["loudness_db"] == evaluate.SILENCE_DB


def test_an_empty_picture_has_no_ball_no_colour_and_no_motion():
    clips, prompts = real()
    scores = evaluate.score(AV(np.zeros_like(clips[0].video), clips[0].audio), prompts[0])
    assert scores["one_ball"] == scores["colour"] == scores["motion"] == 0
    assert math.isnan(scores["speed_cv"])


def test_the_wrong_prompt_costs_colour_and_timbre_only():
    right, wrong = (evaluate.tally(readings()[0], p) for p in (real()[1][0], "a cyan ball, wood"))
    assert {k for k in right if right[k] != wrong[k]} == {"colour", "timbre"}


def test_matching_is_one_to_one_and_takes_the_most_pairs():
    seen = [Impact(1.0, "left"), Impact(1.05, "top")]
    heard = [detect.Onset(1.04, "left", "bell"), detect.Onset(1.10, "top", "bell")]
    assert [(p.seen.wall, p.heard.wall) for p in evaluate.match(seen, heard)] == [("left", "left"), ("top", "top")]
    assert len(evaluate.match(seen[:1], [h._replace(time_s=1.0) for h in heard])) == 1
    assert evaluate.match(seen, []) == evaluate.match([], heard) == []
    assert evaluate.match(seen[:1], [detect.Onset(1.0 + 1.6 / 24, "left", "bell")]) == []


def test_seconds_add_up_to_the_clip():
    for reading, prompt in zip(readings(), real()[1], strict=True):
        whole = evaluate.tally(reading, prompt)
        parts = [evaluate.tally(reading, prompt, k, k + 1) for k in range(4)]
        for name in ("one_ball", "colour", "sync_f1", "sync_recall", "wall_pitch", "offset_ms"):
            assert np.sum([p[name] for p in parts], axis=0) == pytest.approx(whole[name])


def test_drift_finds_the_second_in_which_the_sound_stops():
    clips, prompts = real()
    cut = [AV(c.video, np.where(np.arange(len(c.audio)) < 32_000, c.audio, 0)) for c in clips]
    by_second = evaluate.drift([evaluate.read(c) for c in cut], prompts, draws=50)
    recall = [second["sync_recall"].mean for second in by_second.values()]
    assert [*by_second] == [0, 1, 2] and min(recall[:2]) > 0.9 and recall[2] < 0.1


def test_intervals_cover_the_mean_at_their_nominal_rate():
    rng = np.random.default_rng(3)
    covered = []
    for trial in range(200):
        tallies = [{"x": (float(hit), 5)} for hit in rng.binomial(5, 0.6, size=40)]
        low, high = evaluate.estimates(tallies, draws=200, seed=trial)["x"][1:]
        covered.append(low <= 0.6 <= high)
    assert 0.88 <= np.mean(covered) <= 0.99


def test_the_same_seed_gives_the_same_table_and_rows_add_up():
    a, b = (
        evaluate.estimates([evaluate.tally(r, p) for r, p in zip(readings(), real()[1], strict=True)]) for _ in "ab"
    )
    assert a == b
    text = str(evaluate.Table({"real": a}) + evaluate.Table({"again": b})).splitlines()
    assert len({len(line) for line in text}) == 1 and len(text) == 2 + len(a)
    assert [cell.strip() for cell in text[0].split("|")[2:-1]] == ["real", "again"]


def test_features_are_named_and_finite_for_any_clip():
    nothing = AV(np.zeros((1, 64, 64, 3), dtype=np.uint8), np.zeros(160, dtype=np.float32))
    for clip in (real()[0][0], nothing):
        found = distributions.features(clip)
        for values, names in zip(found, distributions.FEATURES, strict=True):
            assert len(values) == len(names) and np.isfinite(values).all()


def test_frechet_distance_is_exact_for_gaussians_of_known_moments():
    rng = np.random.default_rng(4)
    a = rng.normal(size=(400, 3))
    a = (a - a.mean(0)) / a.std(0)
    assert distributions.frechet(a, a) == pytest.approx(0, abs=1e-9)
    # Shifted by 2 along one axis and stretched threefold along another: 2^2 + (3 - 1)^2.
    q, _ = np.linalg.qr(a)
    a = (q - q.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(q.T, ddof=0))).T
    assert distributions.frechet(a, a * [3, 1, 1] + [0, 2, 0]) == pytest.approx(8, rel=1e-6)


def test_energy_distance_is_zero_for_one_law_and_grows_with_a_shift():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 200, 4))
    assert abs(distributions.energy_distance(a, b)) < 0.05
    assert 0.1 < distributions.energy_distance(a, b + 0.5) < distributions.energy_distance(a, b + 1)


def test_distances_tell_real_clips_from_dim_ones():
    sets = [distributions.feature_sets(real(12, seed)[0]) for seed in (40_000, 41_000)]
    dim = distributions.feature_sets([AV((c.video * 0.5).astype(np.uint8), c.audio * 0.1) for c in real(12, 41_000)[0]])
    for a, b, other in zip(*sets, dim, strict=True):
        assert distributions.energy_distance(a, b) < distributions.energy_distance(a, other)
        assert distributions.frechet(a, b) < distributions.frechet(a, other)


def test_what_cannot_be_scored_is_refused_by_name():
    with pytest.raises(ValueError, match="2 clips or more, found 1"):
        evaluate.shuffled(real()[0][:1])
    with pytest.raises(ValueError, match="at least one clip"):
        evaluate.estimates([])
    with pytest.raises(ValueError, match=r"other \(3, 5\)"):
        distributions.frechet(np.zeros((3, 4)), np.zeros((3, 5)))
