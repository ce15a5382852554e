"""Laws of the world: exact impacts, seamless rendering, two renderers that agree, switches that are off."""

import hashlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from omniforcing_lib.bounce import world
from omniforcing_lib.layout import AV

SEEDS = [0, 1, 2]
BOTH = {"hum": True, "hidden": True}


def pieces(parts: list[AV]) -> AV:
    return AV(*(np.concatenate(stream) for stream in zip(*parts, strict=True)))


@pytest.mark.parametrize("switches", [{}, BOTH], ids=["bounce", "extended"])
@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_rendered_apart_equal_the_whole_to_the_bit(seed, switches):
    scene = world.scene(seed, **switches)
    cuts = [AV(range(0, 1), range(0, 1)), AV(range(1, 4), range(1, 26)), AV(range(4, 7), range(26, 51))]
    whole = world.render(scene, seconds=2)
    for stream, expected in zip(pieces([world.render(scene, cut) for cut in cuts]), whole, strict=True):
        np.testing.assert_array_equal(stream, expected)


@pytest.mark.parametrize("right", [56, 88], ids=["seen", "hidden"])
@pytest.mark.parametrize("start_s", [0.0, -7.0, 3600.0])
def test_impacts_are_where_the_ball_touches_a_wall(start_s, right):
    scene = world.scene(5, hidden=right == 88)
    hits = world.impacts(scene, start_s, start_s + 10)
    assert 10 <= len(hits) <= 20 and hits == sorted(hits)
    for time_s, wall in hits:
        axis, edge = world.WALLS.index(wall) // 2, {"left": 8, "right": right, "top": 8, "bottom": 56}[wall]
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


@pytest.mark.parametrize("switches", [{}, BOTH], ids=["bounce", "extended"])
@pytest.mark.parametrize("timbre", world.TIMBRES)
def test_both_renderers_agree(timbre, switches):
    asked = [f"a {colour} ball, {timbre}" for colour in world.COLOURS]
    scenes = [world.scene(seed, prompt, **switches) for seed, prompt in zip(SEEDS, asked, strict=False)]
    # Scenes of both kinds may share a batch.
    scenes += [world.scene(3, asked[3])]
    batch = world.render_batch(scenes, 2)
    for i, scene in enumerate(scenes):
        clip = world.render(scene, seconds=2)
        assert np.abs((batch.video[i].numpy() + 1) * 127.5 - clip.video).max() <= 1.0
        assert np.abs(batch.audio[i].numpy() - clip.audio).max() <= 1e-4


def test_sound_never_clips():
    scenes = [world.scene(seed, hum=seed % 2 == 1) for seed in range(24)]
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


def test_with_both_switches_off_every_draw_and_every_bit_is_as_it_was():
    """The digest was taken before there were switches; samples are rounded to 16 bits for other machines' sines."""
    digest = hashlib.sha256()
    for seed in SEEDS:
        clip = world.render(world.scene(seed), seconds=1)
        digest.update(clip.video.tobytes() + np.rint(clip.audio * 32767).astype(np.int16).tobytes())
    assert digest.hexdigest() == "1f36a0273e883f02d9694fe014a511b0329eae6c2db807f30d41d9ce39a0b961"
    assert world.scene(11).prompt == world.scene(11, **BOTH).prompt == "a red ball, pluck"
    assert world.scene(11) == replace(world.scene(11, **BOTH), hum=None, hidden=False)


def test_the_hum_is_drawn_by_the_seed_alone_and_uniformly():
    assert len({world.scene(11, prompt, hum=True).hum for prompt in world.prompts()}) == 1
    drawn = [world.scene(seed, hum=True).hum for seed in range(1200)]
    counts = [drawn.count(note) for note in world.HUM_NOTES]
    assert sum(counts) == 1200 and min(counts) > 60 and max(counts) < 140


def test_the_hum_is_one_steady_tone_of_the_stated_pitch_an_hour_in_too():
    scene, latents = world.scene(4, hum=True), AV(range(0), range(25 * 3600 + 1, 25 * 3600 + 26))
    with_hum, without = (world.render(s, latents).audio.astype(float) for s in (scene, replace(scene, hum=None)))
    start = world.CLOCK.samples(latents.audio).start
    hertz = 220 * 2 ** (scene.hum_cents / 1200)
    cycles = np.mod(hertz * ((start + np.arange(len(with_hum))) / 16_000), 1)
    np.testing.assert_allclose(with_hum - without, world.HUM_LEVEL * np.sin(2 * np.pi * cycles), atol=1e-6)


def test_no_tone_has_a_partial_on_a_hum_and_no_hum_is_near_a_walls_fundamental():
    partials = {n + up for n in world.WALL_NOTES.values() for t in world.TIMBRES.values() for up in t.semitones}
    assert len(set(world.HUM_NOTES)) == 12 and not partials & set(world.HUM_NOTES)
    walls = world.BANK_HZ[[*world.WALL_NOTES.values()]]
    assert np.abs(np.subtract.outer(world.BANK_HZ[[*world.HUM_NOTES]], walls)).min() > 114


def test_a_hidden_ball_is_back_when_and_where_its_impact_foretells():
    gone = 0
    for seed in range(40):
        scene = world.scene(seed, hidden=True)
        for hit in world.impacts(scene, 0, 20):
            if hit.wall != "right":
                continue
            away = (88 - 56) / abs(scene.velocity[0])
            (x, y), (_, later) = world.positions(scene, np.array([hit.time_s - away, hit.time_s - away + 1e-6]))
            back = world.reentry(world.Crossing(hit.time_s - away, y, (later - y) * 1e6), hit.time_s)
            (seen_x, seen_y), (_, next_y) = world.positions(scene, np.array([back.time_s, back.time_s + 1e-6]))
            assert (x, seen_x) == pytest.approx((56, 56), abs=1e-6) and back.y == pytest.approx(seen_y, abs=1e-4)
            assert back.speed_y == pytest.approx((next_y - seen_y) * 1e6, rel=1e-4)
            gone += 1
    assert gone > 200


def test_out_of_sight_shows_no_ball_and_no_right_wall():
    scene = world.scene(0, hidden=True)
    clip = world.render(scene, seconds=8).video
    x = world.positions(scene, np.arange(len(clip)) / 24)[:, 0]
    assert (x > 72).sum() > 12 and not (clip[x > 72].max(axis=(1, 2, 3)) > 60).any()
    assert (clip[x < 56].max(axis=(1, 2, 3)) > 150).all()
    assert (clip[x > 72][:, 1:-1, -1] == world.BACKGROUND).all()


def test_a_hum_off_the_twelve_notes_is_refused_by_number():
    with pytest.raises(ValueError, match=r"one of the notes \(28, .*found 29"):
        replace(world.scene(0), hum=29)
