"""Laws of the judge: it knows the world's law, finds what is broken where it is broken, and nothing else."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from omniforcing_lib.bounce import codecs, evaluate, world
from omniforcing_lib.layout import AV, PAPER
from omniforcing_lib.ltx2 import checkpoints
from studies import exposure_bias, protocol
from studies.anatomy import encoded

SECONDS = 4


@pytest.fixture(scope="module")
def codec():
    return codecs.shipped_codec()


@pytest.fixture(scope="module")
def clips():
    return [world.render(world.scene(world.HELD_OUT + i), seconds=SECONDS) for i in range(3)]


@pytest.fixture(scope="module")
def latents(codec, clips):
    return encoded(codec, clips)


def test_the_law_carries_any_ball_on_within_half_a_pixel(clips):
    for clip in clips:
        centre = evaluate.read(clip).track.centre
        for start in (24, 40, 72):
            off = np.linalg.norm(
                exposure_bias.ahead(centre[start - 24 : start], 24) - centre[start : start + 24], axis=1
            )
            assert off.max() < 0.5


def test_the_law_bridges_frames_without_a_ball(clips):
    centre = evaluate.read(clips[0]).track.centre[:48].copy()
    centre[3:9] = np.nan
    assert np.abs(exposure_bias.ahead(centre[:24], 24) - centre[24:]).max() < 0.5
    assert np.isnan(exposure_bias.ahead(np.full((24, 2), np.nan), 5)).all()


def test_windows_hold_two_blocks_that_start_together(codec, clips, latents):
    """Frames are those of the clip from the block before on; the sound runs on the same clock."""
    whole = exposure_bias.decoded(codec, latents)
    for k, window in enumerate(exposure_bias.windows(codec, PAPER, latents), start=exposure_bias.FIRST):
        start = codec.clock.frames(PAPER.block(k - 1).video).start
        sample = round(start / codec.clock.fps * codec.clock.sample_rate)
        for clip, two in zip(whole, window, strict=True):
            assert np.array_equal(two.video, clip.video[start : start + 48])
            np.testing.assert_allclose(two.audio, clip.audio[sample : sample + len(two.audio)], atol=1e-5)
            assert abs(len(two.audio) / 16_000 - 2) < 0.04


def test_real_clips_obey_the_law_in_sight_and_sound(codec, latents):
    errors = exposure_bias.by_block(codec, PAPER, latents)
    assert errors.video.shape == errors.audio.shape == (3, SECONDS + 1 - exposure_bias.FIRST)
    assert np.nanmax(errors.video) < 0.5 and np.nanmean(errors.audio) < 8


def test_a_clip_judged_on_itself_is_judged_freely(codec, latents):
    forced, free = (exposure_bias.by_block(codec, PAPER, latents, history) for history in (latents, None))
    for a, b in zip(forced, free, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_foreign_block_is_found_in_its_own_place(codec, latents):
    """One block of another clip: with the true past only that block is wrong, without it the next one is too."""
    out = latents.map(torch.clone)
    block = PAPER.block(3)
    for stream_, span in zip(out, block, strict=True):
        stream_[:, span.start : span.stop] = stream_.roll(1, 0)[:, span.start : span.stop]
    forced, free = (exposure_bias.by_block(codec, PAPER, out, history).video for history in (latents, None))
    assert (forced[:, 1] > 5).all() and np.delete(forced, 1, axis=1).max() < 0.5
    assert (free[:, 1:] > 5).all() and free[:, 0].max() < 0.5


def test_a_strangers_sound_is_late(codec, latents):
    strange = AV(latents.video, latents.audio.roll(1, 0))
    errors = exposure_bias.by_block(codec, PAPER, strange)
    assert np.nanmax(errors.video) < 0.5 and np.nanmean(errors.audio) > 30


def test_a_student_forced_on_its_own_past_is_free(codec):
    model, causal = checkpoints.load("student"), checkpoints.read("student").causal
    free = exposure_bias.roll(model, causal, codec, ["a red ball, bell"] * 2, [1, 2], 2)
    forced = exposure_bias.roll(model, causal, codec, ["a red ball, bell"] * 2, [1, 2], 2, history=free)
    alone = exposure_bias.roll(model, causal, codec, ["a red ball, bell"] * 2, [1, 2], 2, batch=1)
    for a, b, c in zip(free, forced, alone, strict=True):
        # a batch of another size, a slice in another place: the last bits differ, and three steps a block add up
        torch.testing.assert_close(a, b, atol=1e-2, rtol=0)
        torch.testing.assert_close(a, c, atol=1e-2, rtol=0)


def test_pooling_counts_every_value_once():
    errors = np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, 8.0]])
    assert exposure_bias.pooled(errors).mean == 4.0


def test_a_gap_has_a_sign_and_an_interval_that_knows_chance():
    rng = np.random.default_rng(0)
    low, high = rng.normal(1, 1, (40, 4)), rng.normal(3, 1, (30, 4))
    low, high = exposure_bias.sums(low), exposure_bias.sums(high)
    there, back, none = exposure_bias.gap(high, low), exposure_bias.gap(low, high), exposure_bias.gap(low, low)
    assert there.low > 1.5 and there.high < 2.5 and back.mean == pytest.approx(-there.mean)
    assert none.mean == 0 and none.low < 0 < none.high


@pytest.mark.parametrize("width", [2, 3, 10])
def test_spans_of_a_drift_cover_the_clip_once(clips, width):
    readings, prompts = [evaluate.read(clip) for clip in clips], ["a red ball, bell"] * 3
    spans = evaluate.drift(readings, prompts, width)
    assert [*spans] == ([0, 2] if width == 2 else [0])
    frames = [evaluate.tally(r, p, 0) for r, p in zip(readings, prompts, strict=True)]
    whole = sum(t["motion"][0] for t in frames) / 3
    assert np.mean([span["motion"].mean for span in spans.values()]) == pytest.approx(whole, rel=0.05)


def test_a_seam_is_a_jump_at_block_edges(clips):
    readings = [evaluate.read(clip) for clip in clips]
    assert exposure_bias.seam(readings, PAPER) == pytest.approx(1, abs=0.05)
    for reading in readings:
        for block in PAPER.blocks(3 * SECONDS + 1)[1:]:
            reading.track.centre[8 * (block.video.start - 1) + 1 :] += 3.0
    assert exposure_bias.seam(readings, PAPER) > 1.5


def test_a_seam_is_found_where_it_is_seen_or_heard(clips):
    """A picture that flickers, or a sound that changes level, at block edges alone."""
    blocks, found = PAPER.blocks(3 * SECONDS + 1)[1:], {}
    for of in ("picture", "sound"):
        broken = []
        for clip in clips:
            video, audio = clip.video.copy(), clip.audio.copy() + 1e-2 * np.sin(np.arange(len(clip.audio)))
            for k, block in enumerate(blocks):
                frames, samples = world.CLOCK.frames(block.video), world.CLOCK.samples(block.audio)
                video[frames.start : frames.stop] = np.clip(video[frames.start : frames.stop] + 20.0 * (k % 2), 0, 255)
                audio[samples.start : samples.stop] *= 1 + k % 2
            whole = AV(clip.video, clip.audio + 1e-2 * np.sin(np.arange(len(clip.audio))))
            broken.append(AV(video, whole.audio) if of == "picture" else AV(whole.video, audio))
        readings = [evaluate.read(clip) for clip in broken]
        found[of] = {kind: exposure_bias.seam(readings, PAPER, kind) for kind in ("picture", "sound")}
    assert found["picture"]["picture"] > 5 * found["sound"]["picture"]
    assert found["sound"]["sound"] > 5 * found["picture"]["sound"]


def test_what_is_kept_is_a_ratio_and_for_levels_a_difference():
    rng = np.random.default_rng(0)
    first = [{"sync_f1": (int(n), 10), "loudness_db": (-20.0, 1)} for n in rng.integers(6, 10, 30)]
    last = [{"sync_f1": (t["sync_f1"][0] / 2, 10), "loudness_db": (-23.0, 1)} for t in first]
    kept = exposure_bias.kept(first, last)
    assert kept["sync_f1"] == pytest.approx((0.5, 0.5, 0.5)) and kept["loudness_db"] == pytest.approx((-3, -3, -3))


def test_true_clips_lose_nothing_in_a_long_roll_out(tmp_path, monkeypatch):
    trial = protocol.Trial(clips=4, seeds=1, seconds=6)
    monkeypatch.setattr(protocol, "sample", lambda system, trial, batch: trial.real())
    text = protocol.run_long({"student": protocol.System("student")}, trial, tmp_path, width=2)
    record = json.loads((tmp_path / "long.json").read_text())["spans"]
    assert record["student"] == record["real clips"] and "last / first" in text
    spans = record["student"]["measures"]
    assert [*spans] == ["0 to 2 s", "2 to 4 s", "4 to 6 s", "last / first"]
    assert all(spans[name][m][0] == 1 for name in spans for m in ("one_ball", "colour", "sync_f1"))
    with pytest.raises(ValueError, match="no causal student"):
        protocol.run_long({"teacher": protocol.System("teacher")}, trial, tmp_path, width=2)
    with pytest.raises(ValueError, match="two or more whole spans"):
        protocol.run_long({}, trial, tmp_path, width=4)
