"""Invariants 5 and 6: one clock, zero truncation; blocks cover a clip without gap or overlap."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniforcing_lib.layout import AV, LAYOUTS, PAPER, RELEASED, BlockLayout, Clock

CLOCK = Clock()
sizes = st.integers(1, 6)
layouts = st.builds(BlockLayout, st.builds(AV, sizes, sizes), st.builds(AV, sizes, sizes), st.integers(0, 24))


@given(st.integers(0, 100_000))
def test_zero_truncation(seconds):
    """24K + 1 frames are 3K + 1 video latents are 25K + 1 audio latents, in both layouts, for every K."""
    video, audio = CLOCK.latents(seconds)
    assert (video, audio) == (3 * seconds + 1, 25 * seconds + 1)
    assert CLOCK.frames(range(video)).stop == 24 * seconds + 1
    assert CLOCK.video_latents_of(24 * seconds + 1) == video
    for layout in LAYOUTS.values():
        if video >= layout.first.video and seconds < 100:
            assert layout.audio_latents(video) == audio


@pytest.mark.parametrize("layout", [PAPER, RELEASED], ids=["paper", "released"])
@pytest.mark.parametrize("k", [1, 2, 59, 3600, 10**6])
def test_a_block_is_the_same_second_in_both_streams(layout, k):
    """Both streams of block k end within 32 ms of each other, at any length: the lag never changes."""
    video, audio = CLOCK.seconds(layout.block(k))
    assert video[1] - video[0] == audio[1] - audio[0] == 1
    assert video[1] - audio[1] == Fraction(1, 24) - Fraction(1, 100)


@given(layouts, st.integers(0, 30))
def test_blocks_partition_a_clip(layout, more):
    video_latents = layout.first.video + more
    blocks = layout.blocks(video_latents)
    assert len(blocks) == layout.count(video_latents)
    for stream, end in enumerate((video_latents, layout.audio_latents(video_latents))):
        assert [i for block in blocks for i in block[stream]] == list(range(end))
        assert [k for k, block in enumerate(blocks) for _ in block[stream]] == layout.block_index(video_latents)[stream]
    tokens = layout.tokens(video_latents, 4)
    assert [i for span in tokens.video for i in span] == list(range(4 * video_latents))
    assert [i for span in tokens.audio for i in span] == list(range(layout.sinks + blocks[-1].audio.stop))


def test_the_five_second_clip_of_the_paper():
    """121 frames: 16 = 1 + 5 * 3 video latents, 126 = 1 + 5 * 25 audio latents, 6 blocks (specification 3.2)."""
    assert [tuple(map(len, block)) for block in PAPER.blocks(16)] == [(1, 1)] + [(3, 25)] * 5
    assert [tuple(map(len, block)) for block in RELEASED.blocks(16)] == [(4, 26)] + [(3, 25)] * 4
    assert tuple(map(len, PAPER.blocks(3)[-1])) == (2, 16)


@given(st.integers(0, 5000), st.integers(1, 50))
def test_spans_of_neighbours_touch(start, length):
    for convert, stride in ((CLOCK.frames, 8), (CLOCK.mels, 4), (CLOCK.samples, 640)):
        whole = convert(range(start, start + length))
        parts = [convert(range(i, i + 1)) for i in range(start, start + length)]
        assert [i for part in parts for i in (part.start, part.stop)][1:-1:2] == [p.start for p in parts[1:]]
        assert (whole.start, whole.stop) == (parts[0].start, parts[-1].stop)
        assert {len(part) for part in parts[1:]} <= {stride}


@given(st.integers(1, 10**6), st.sampled_from([Clock(), Clock(sample_rate=24_000), Clock(fps=8, sample_rate=44_100)]))
def test_frames_and_samples_of_one_time_go_together(frames, clock):
    """A whole second ends with both streams of its latents; a frame is there once its last sample is."""
    ends = clock.latents(frames)
    assert clock.samples_of(clock.frames(range(ends.video)).stop) == clock.samples(range(ends.audio)).stop
    assert clock.frames_of(clock.samples_of(frames)) == frames
    assert clock.frames_of(clock.samples_of(frames) - 1) == frames - 1


def test_midpoints_are_those_of_the_reference():
    """Middle of cells in seconds (specification 1.8): 1/48, 0.2083, 0.5417 for video; 0.005, 0.03, 0.07 for audio."""
    video, audio = CLOCK.midpoints(AV(range(3), range(3)))
    assert video == pytest.approx([1 / 48, 5 / 24, 13 / 24]) and audio == pytest.approx([0.005, 0.03, 0.07])


def test_what_does_not_fit_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"16 video latents go with 126 audio .* found 125"):
        PAPER.check(AV(16, 125))
    with pytest.raises(ValueError, match=r"whole number of seconds.*found 2\.5"):
        CLOCK.latents(2.5)
    with pytest.raises(ValueError, match=r"8k \+ 1, found 120"):
        CLOCK.video_latents_of(120)
    with pytest.raises(ValueError, match="4 video latents, or more; found 3"):
        RELEASED.blocks(3)
    with pytest.raises(ValueError, match="sample_rate 16001"):
        Clock(sample_rate=16001)
