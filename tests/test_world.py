"""Laws of the world: exact impacts, seamless rendering, two renderers that agree."""

from itertools import pairwise

import numpy as np
import pytest

from omniforcing_lib.bounce import world
from omniforcing_lib.layout import AV

SEEDS = [0, 1, 2]


def pieces(parts: list[AV]) -> AV:
    return AV(*(np.concatenate(stream) for stream in zip(*parts, strict=True)))


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_rendered_apart_equal_the_whole_to_the_bit(seed):
    scene = world.scene(seed)
    cuts = [AV(range(0, 1), range(0, 1)), AV(range(1, 4), range(1, 26)), AV(range(4, 7), range(26, 51))]
    whole = world.render(scene, seconds=2)
    for stream, expected in zip(pieces([world.render(scene, cut) for cut in cuts]), whole, strict=True):
        np.testing.assert_array_equal(stream, expected)


@pytest.mark.parametrize("start_s", [0.0, -7.0, 3600.0])
def test_impacts_are_where_the_ball_touches_a_wall(start_s):
    scene = world.scene(5)
    hits = world.impacts(scene, start_s, start_s + 10)
    assert 10 <= len(hits) <= 20 and hits == sorted(hits)
    for time_s, wall in hits:
        axis, edge = world.WALLS.index(wall) // 2, (world.LOW, world.HIGH)[world.WALLS.index(wall) % 2]
        assert world.positions(scene, np.array([time_s]))[0, axis] == pytest.approx(edge, abs=1e-6)


def test_impacts_of_neighbouring_windows_join_without_loss():
    scene = world.scene(7)
    edges = np.linspace(0, 60, 200)
    joined = [hit for a, b in pairwise(edges) for hit in world.impacts(scene, a, b)]
    assert joined == world.impacts(scene, 0, 60)


def test_a_sound_starts_at_the_sample_after_its_impact():
    scene = world.scene(3, "a red ball, wood")
    samples = world.render(scene, seconds=5).audio
    hits = [hit.time_s for hit in world.impacts(scene, -1, 5)]
    alone = [t for before, t in pairwise(hits) if t > 0 and t - before > 0.5]
    assert alone
    for time_s in alone:
        first = int(np.ceil(time_s * 16_000))
        assert not samples[first - 100 : first].any() and samples[first : first + 100].any()


@pytest.mark.parametrize("timbre", world.TIMBRES)
def test_both_renderers_agree(timbre):
    scenes = [world.scene(seed, f"a {c} ball, {timbre}") for seed, c in zip(SEEDS, world.COLOURS, strict=False)]
    batch = world.render_batch(scenes, 2)
    for i, scene in enumerate(scenes):
        clip = world.render(scene, seconds=2)
        assert np.abs((batch.video[i].numpy() + 1) * 127.5 - clip.video).max() <= 1.0
        assert np.abs(batch.audio[i].numpy() - clip.audio).max() <= 1e-4


def test_sound_never_clips():
    scenes = [world.scene(seed) for seed in range(24)]
    assert 0.5 < np.abs([world.render(s, seconds=3).audio for s in scenes]).max() < 1


def test_every_partial_lies_on_the_bank():
    tops = [note + max(t.semitones) for note in world.WALL_NOTES.values() for t in world.TIMBRES.values()]
    assert max(tops) < len(world.BANK_HZ) and world.BANK_HZ[-1] < world.CLOCK.sample_rate / 2


def test_prompts_parse_back_in_any_case_and_spacing():
    assert len(set(world.prompts())) == 18
    for prompt in world.prompts():
        colour, timbre = world.parse("  " + prompt.upper().replace(" ", "   "))
        assert prompt == f"a {colour} ball, {timbre}"


@pytest.mark.parametrize("wrong", ["", "a red ball", "a pink ball, bell", "a red ball, gong", "a red cat, bell"])
def test_a_prompt_outside_the_grammar_names_the_valid_words(wrong):
    with pytest.raises(ValueError, match=r"red, green, blue.*bell, wood, pluck"):
        world.parse(wrong)


def test_a_seed_moves_alike_under_every_prompt():
    first, *others = [world.scene(11, prompt) for prompt in world.prompts()]
    assert all((s.position, s.velocity) == (first.position, first.velocity) for s in others)
    assert world.scene(11) == world.scene(11) != world.scene(12)
