"""Laws of what only the ear can tell: real clips score at the ceiling, every planted fault costs its own measure."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from omniforcing_lib import files, model_bundle, stream
from omniforcing_lib.bounce import codecs, detect, evaluate, heard, world
from omniforcing_lib.layout import AV
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.training import recipes
from studies import protocol

SEEDS = range(60_000, 60_008)


@cache
def scenes() -> list[world.Scene]:
    return [world.scene(seed, hum=True, hidden=True) for seed in SEEDS]


@cache
def real() -> list[AV]:
    return [world.render(scene, seconds=5) for scene in scenes()]


@cache
def truth() -> list[heard.Hearing]:
    return [heard.hear(evaluate.read(clip)) for clip in real()]


def sounding(sounds: list[np.ndarray]) -> list[heard.Hearing]:
    """Hear the hum of other sounds in the same clips."""
    heard_hums = [(detect.hum_cents(sound), detect.first_hum_cents(sound)) for sound in sounds]
    return [h._replace(hum=hum, first=first) for h, (hum, first) in zip(truth(), heard_hums, strict=True)]


def rehummed(cents_of_time) -> list[heard.Hearing]:
    """Hear the same clips with a hum that is off by so many cents at these seconds."""
    sounds, times = [], np.arange(80_160) / 16_000
    for scene in scenes():
        hertz = world.BANK_HZ[scene.hum] * 2 ** (cents_of_time(times) / 1200)
        hum = world.HUM_LEVEL * np.sin(2 * np.pi * np.cumsum(hertz) / 16_000)
        sounds.append(world.render(replace(scene, hum=None), AV(range(0), range(126))).audio + hum)
    return sounding(sounds)


def mean(tallies: list[evaluate.Tally]) -> dict[str, float]:
    return {name: estimate.mean for name, estimate in evaluate.estimates(tallies, draws=2).items()}


def hum(hearings: list[heard.Hearing], given: bool = False) -> dict[str, float]:
    pitches = [scene.hum_cents if given else None for scene in scenes()]
    return mean([heard.hum_tally(h, c) for h, c in zip(hearings, pitches, strict=True)])


def test_real_clips_keep_their_hum_and_come_back_as_foretold():
    for scores in (hum(truth()), hum(truth(), given=True)):
        assert scores["hum_heard"] == scores["hum_kept"] == scores["hum_first"] == 1
        assert scores["hum_drift_cents"] < 1 and scores["hum_first_cents"] < 1
    counts = [heard.reentry_tally(h) for h in truth()]
    scores = mean(counts)
    assert sum(count["reentry_right"][1] for count in counts) >= 5 and scores["reentry_right"] == 1
    assert scores["reentry_px"] < 0.5 and scores["reentry_frames"] < 0.25


def test_a_drifting_hum_is_not_kept_and_its_cents_show_by_second():
    drifting = rehummed(lambda t: 12 * t)
    scores = hum(drifting)
    assert scores["hum_kept"] == 0 and scores["hum_drift_cents"] == pytest.approx(24, abs=1)
    by_second = [s["hum_drift_cents"].mean for s in heard.hum_by_second(drifting, draws=2).values()]
    np.testing.assert_allclose(by_second, [0, 12, 24, 36, 48], atol=1)


def test_a_hum_that_changes_its_note_is_steady_until_then():
    scores = heard.hum_by_second(rehummed(lambda t: np.where(t < 3, 0, 200)), draws=2)
    assert [s["hum_kept"].mean for s in scores.values()] == [1, 1, 1, 0, 0]


def test_a_wrong_pitch_fails_the_true_past_but_not_itself():
    wrong = rehummed(lambda t: 100 + 0 * t)
    given = hum(wrong, given=True)
    assert hum(wrong)["hum_kept"] == 1 and given["hum_kept"] == 0
    assert given["hum_drift_cents"] == pytest.approx(100, abs=1)


def test_a_hum_that_starts_late_costs_the_first_latent():
    late = sounding([np.where(np.arange(len(clip.audio)) < 160, 0, clip.audio) for clip in real()])
    scores = hum(late, given=True)
    assert scores["hum_first"] == 0 and np.isnan(scores["hum_first_cents"]) and scores["hum_kept"] == 1


def test_another_clips_sound_is_the_floor():
    floor = [heard.hear(evaluate.read(clip)) for clip in evaluate.shuffled(real())]
    assert hum(floor, given=True)["hum_kept"] < 0.3 and hum(floor, given=True)["hum_first_cents"] > 300
    scores = mean([heard.reentry_tally(h) for h in floor])
    assert scores["reentry_right"] < 0.2 and scores["reentry_frames"] > 5 and scores["reentry_px"] > 3


def test_silence_and_an_absence_without_end_are_no_success():
    silent = [h._replace(right=[]) for h in sounding([np.zeros_like(clip.audio) for clip in real()])]
    scores = mean([heard.reentry_tally(h) for h in silent])
    assert scores["reentry_right"] == 0 and np.isnan(scores["reentry_px"])
    assert hum(silent)["hum_heard"] == hum(silent)["hum_kept"] == 0
    never = [h._replace(passages=[p._replace(back=None) for p in h.passages]) for h in truth()]
    assert mean([heard.reentry_tally(h) for h in never])["reentry_right"] == 0


def test_an_empty_picture_holds_no_absence():
    assert detect.passages(np.full((49, 2), np.nan)) == []


def test_a_clip_below_a_second_is_refused_with_its_length():
    short = AV(real()[0].video[:9], real()[0].audio[:5920])
    with pytest.raises(ValueError, match=r"whole seconds, found a clip of 0\.37 s"):
        heard.hum_tally(heard.hear(evaluate.read(short)))


@torch.inference_mode()
def test_the_codec_of_the_extended_world_keeps_its_hum_and_its_returns():
    """The codec of the plain world, which has never heard a hum, loses it."""
    kept = {}
    for name in ("codec", "codec_hum"):
        codec = codecs.load_codec(files.DATA / f"{name}.safetensors")
        made = stream.to_clips(codec.decode(codec.encode(world.render_batch(scenes(), 5))))
        hearings = [heard.hear(evaluate.read(clip)) for clip in made]
        counts = [
            heard.hum_tally(h, s.hum_cents) | heard.reentry_tally(h) for h, s in zip(hearings, scenes(), strict=True)
        ]
        kept[name] = evaluate.estimates(counts, draws=1)
    assert kept["codec_hum"]["hum_kept"].mean == kept["codec_hum"]["reentry_right"].mean == 1
    assert kept["codec"]["hum_kept"].mean == 0


def test_a_teacher_goes_on_from_a_checkpoint_in_the_world_that_is_asked_for(tmp_path, monkeypatch):
    asked, scene = [], world.scene
    monkeypatch.setattr(world, "scene", lambda seed, **how: asked.append(how) or scene(seed, **how))
    scored, codec = [], codecs.load_codec(files.DATA / "codec_hum.safetensors")
    monkeypatch.setattr(evaluate, "brief", lambda model, causal, by, count: scored.append(by) or {})
    how = {"start": "teacher", "hum": True, "hidden": True, "clips": 2, "batch": 2, "seconds": 1}
    how |= {"codec": str(files.DATA / "codec_hum.safetensors"), "score": 1}
    path = recipes.TrainTeacher(out=str(tmp_path / "further.safetensors"), steps=1, lr=1e-9, **how).run()
    assert asked == [{"hum": True, "hidden": True}] * 2
    assert all(map(torch.equal, scored[0].parameters(), codec.parameters())), "scored by the codec that it was made for"
    start, further = (checkpoints.load(name) for name in ("teacher", path))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(start.parameters(), further.parameters(), strict=True))


def test_the_protocol_of_the_extended_world_tells_what_is_heard_of_it(tmp_path):
    """Real clips and round trips of its codec keep their hum; the record names that codec and that world."""
    codec = str(files.DATA / "codec_hum.safetensors")
    trial = protocol.Trial(clips=6, seeds=1, hum=True, hidden=True, codec=codec)
    rows = protocol.run({}, trial, tmp_path, one_prompt=protocol.Trial(2, 1, prompt="a red ball, bell")).rows
    for name in ("real clips", "codec round trip"):
        assert rows[name]["hum_kept"].mean == rows[name]["reentry_right"].mean == 1
    assert rows["shuffled sound"]["reentry_right"].mean < 0.5
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["hum"] and record["hidden"] and [*record["files"]] == ["codec_hum.safetensors"]
    plain = protocol.Trial(1, 1)
    assert "hum_kept" not in plain.tallies(evaluate.read_all(plain.real()), plain.prompts)[0]


def test_a_miniature_goes_with_the_codec_of_its_latents_and_no_other(tmp_path):
    """Of two codecs with latents of one size the wrong one would be silent: it makes pictures, and loses the hum."""
    teacher, plain = str(files.DATA / "teacher_hum.safetensors"), str(files.DATA / "codec.safetensors")
    for model, codec in ((teacher, "codec_hum"), ("teacher", "codec")):
        wanted = codecs.load_codec(files.DATA / f"{codec}.safetensors")
        assert all(map(torch.equal, model_bundle.of(model).codec.parameters(), wanted.parameters()))
    with pytest.raises(ValueError, match=r"makes latents of codec_hum.safetensors .* found the codec .*codec.safet"):
        recipes.Stage2(teacher=teacher, out=str(tmp_path / "student.safetensors")).run()
    trial = protocol.Trial(clips=6, seeds=1, hum=True, hidden=True, codec=plain)
    with pytest.raises(ValueError, match=r"makes latents of codec_hum\.safetensors"):
        protocol.run({"teacher": protocol.System(teacher, 2)}, trial, tmp_path)
    trial = replace(trial, codec=str(files.DATA / "codec_hum.safetensors"))
    with pytest.raises(ValueError, match=r"teacher\S* makes latents of codec\.safetensors"):
        protocol.run({"teacher": protocol.System("teacher", 2)}, trial, tmp_path)
    notes = checkpoints.read(teacher).notes | {"codec": {"name": "lost.safetensors", "sha256": "0" * 16}}
    checkpoints.save(checkpoints.load(teacher), tmp_path / "model.safetensors", notes=notes)
    with pytest.raises(ValueError, match=r"latents of lost.safetensors .* put that file beside it"):
        model_bundle.of(str(tmp_path / "model.safetensors"))
