"""Laws of variety: real clips are varied, and every way of collapsing shows in the measure that is made for it."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest

from omniforcing_lib.bounce import evaluate, variety, world
from series import claims
from studies import protocol

COUNT = 48
FIRST = 60_000


@cache
def readings(first: int, keep: str = "all") -> tuple[evaluate.Reading, ...]:
    """Read clips whose scenes were chosen: all, those that go right, or one scene over and over with a jitter."""
    scenes = [world.scene(first + i, "a red ball, wood") for i in range(20 * COUNT)]
    if keep == "right":
        scenes = [s for s in scenes if s.velocity[0] > 0]
    elif keep == "one":
        scenes = sorted(scenes, key=lambda s: np.hypot(*np.subtract(s.position, (16, 32))) + (s.velocity[0] < 0) * 99)
        scenes = [s for s in scenes if s.velocity[1] > 0]
    elif keep == "slow":
        scenes = sorted(scenes, key=lambda s: np.hypot(*s.velocity))
    return tuple(evaluate.read(world.render(s, seconds=2)) for s in scenes[:COUNT])


@cache
def found(keep: str = "all") -> dict[str, float]:
    other = readings(FIRST + 5_000, keep)
    return {name: e.mean for name, e in variety.measures(readings(FIRST), other).items()}


def test_the_motion_of_a_real_clip_is_that_of_its_scene():
    for i, move in enumerate(variety.motions(readings(FIRST))):
        scene = world.scene(FIRST + i, "a red ball, wood")
        np.testing.assert_allclose(move, [*scene.position, *scene.velocity], atol=0.8)


def test_folding_stays_in_the_box_and_is_a_triangle():
    folded = variety.folded(np.array([0.0, world.SPAN / 2, world.SPAN, 1.5 * world.SPAN, 2 * world.SPAN, -3.0]))
    middle = (world.LOW + world.HIGH) / 2
    np.testing.assert_allclose(folded, [world.LOW, middle, world.HIGH, middle, world.LOW, world.LOW + 3])


def test_real_clips_are_as_varied_as_real_clips():
    real = found()
    assert min(real[n] for n in ("precision", "recall", "coverage", "sound_precision", "sound_recall")) > 0.8
    assert real["direction_entropy"] > 0.95 and 0.3 < real["start_right"] < 0.7
    assert 11 < real["angle_sd"] < 18 and 2 < real["speed_sd"] < 4 and abs(real["energy_motion"]) < 0.15


@pytest.mark.parametrize(
    ("keep", "drops"),
    [
        ("one", ("recall", "coverage", "sound_recall", "direction_entropy", "start_x_sd", "start_y_sd")),
        ("right", ("recall", "direction_entropy", "sound_recall")),
        ("slow", ("speed_sd",)),
    ],
)
def test_a_collapsed_set_shows(keep, drops):
    """One mode, half of the directions, one speed: what is made to see it drops, and the energy distance rises."""
    real, fallen = found(), found(keep)
    for name in drops:
        assert fallen[name] < 0.85 * real[name], name
    assert fallen["energy_motion"] > real["energy_motion"] + 0.02


@cache
def drawn(count: int) -> np.ndarray:
    """Draw motions straight from the world's scenes."""
    scenes = (world.scene(FIRST + 50_000 + i) for i in range(count))
    return np.array([[*scene.position, *scene.velocity] for scene in scenes])


def test_a_ratio_of_variety_tells_collapse_from_chance():
    real, base, found = drawn(192 * 3).reshape(3, 192, 4)
    fair = variety.ratios(real, found, base)
    assert [*fair] == [*variety.RATIOS] and all(r.low < 1 < r.high for r in fair.values())
    assert all(r.low > 0.75 for r in fair.values())
    one_way = np.concatenate([found[:, :2], np.abs(found[:, 2:])], axis=1)
    fallen = variety.ratios(real, one_way, base)
    assert max(fallen["recall"].high, fallen["direction_entropy"].high) < 0.9 and fallen["angle_sd"].high > 1
    steep = found[np.argsort(np.abs(found[:, 2]))[:64]]
    assert variety.ratios(real, steep, base)["angle_sd"].high < 0.85


def test_the_interval_of_a_ratio_holds_the_truth():
    """Sets of one law have the ratio 1: 95 % intervals that hold it in half of all draws would lean."""
    sets = drawn(48 * 60).reshape(20, 3, 48, 4)
    held = [[low <= 1 <= high for _, low, high in variety.ratios(*three, draws=80).values()] for three in sets]
    assert (np.mean(held, axis=0) >= 0.85).all()


def test_the_intervals_of_neighbours_hold_the_truth():
    """What sets of this size give in the mean lies in nine of ten intervals or more."""
    pairs = drawn(48 * 80).reshape(40, 2, 48, 4)
    truth = {n: np.mean([variety.neighbours(*p, draws=2)[n].mean for p in pairs]) for n in ("recall", "coverage")}
    for name, mean in truth.items():
        estimates = [variety.neighbours(*two, draws=60)[name] for two in pairs[:20]]
        assert np.mean([low <= mean <= high for _, low, high in estimates]) >= 0.85, name


def test_a_broken_motion_costs_precision_and_no_recall_hides_it():
    """Balls that stand still or race are no clips of the world, however varied they are."""
    moves = variety.motions(readings(FIRST))
    wild = moves.copy()
    wild[:, 2:] *= np.random.default_rng(0).uniform(0.0, 3.0, (COUNT, 1))
    assert variety.neighbours(moves, wild)["precision"].mean < 0.8


def test_clips_of_one_prompt_are_near_one_another_when_collapsed():
    assert variety.nearest(readings(FIRST, "one")).mean < 0.7 * variety.nearest(readings(FIRST)).mean


def test_a_set_beside_itself_has_no_distance_and_its_interval_holds_zero():
    halves = variety.motions(readings(FIRST)), variety.motions(readings(FIRST + 5_000))
    estimate = variety.energy(*halves)
    assert estimate.low <= estimate.mean <= estimate.high and estimate.low < 0.05


def test_too_few_clips_have_no_neighbours():
    with pytest.raises(ValueError, match="more than 3 clips, found 3"):
        variety.neighbours(np.zeros((3, 4)), np.zeros((9, 4)))


def test_clips_without_a_ball_are_no_variety():
    blank = tuple(
        evaluate.read(clip._replace(video=np.zeros_like(clip.video)))
        for clip in (world.render(world.scene(i), seconds=1) for i in range(6))
    )
    assert variety.spread(variety.motions(blank))["angle_sd"].mean == 0


def test_stored_motions_have_the_names_of_the_report_and_no_file_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"motions\.json is not there; `python -m omniforcing_lib score`"):
        protocol.stored_motions(claims.SYSTEMS, tmp_path)
    stored = {"teacher, 40 steps": [[1, 2, 3, 4]], "stage2": [[0, 0, 1, 1]] * 2, "another": [[0, 0, 0, 0]]}
    (tmp_path / "motions.json").write_text(json.dumps(stored))
    found = protocol.stored_motions(claims.SYSTEMS, tmp_path)
    assert {name: moves.shape for name, moves in found.items()} == {"teacher": (1, 4), "Stage 2": (2, 4)}
