"""Whatever comes in is accepted or refused by a ValueError that can be read; `reliability/fuzz.py` tries thousands."""

import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omniforcing_lib import media, video_decode
from omniforcing_lib.config import MINIATURE, ModelConfig
from series import runner

sys.path.append(str(Path(__file__).parent / "reliability"))
import attacks
import fuzz

INPUTS = {"checkpoints": 60, "films": 60, "odd_films": 25, "prompts": 60, "commands": 40, "streams": 40}


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return fuzz.Targets(tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize("kind", INPUTS)
def test_no_input_breaks_the_law(targets, kind, record_property):
    tried = []

    @settings(
        max_examples=INPUTS[kind],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.integers(0, 2**64))
    def attacked(seed):
        with fuzz.limited(fuzz.SECONDS_EACH, fuzz.BYTES):
            tried.append(getattr(targets, kind)(fuzz.Random(seed)))

    attacked()
    record_property("inputs", len(tried))
    print(f"{kind}: {len(tried)} inputs, {sum(tried)} refused")
    assert len(tried) >= INPUTS[kind] // 2 and any(tried)


def film(path, size, times_ms):
    """Write black pictures at any times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=1000)
        stream.height, stream.width, stream.pix_fmt = *size, "bgr0"
        for time in times_ms:
            frame = av.VideoFrame.from_ndarray(np.zeros((*size, 3), np.uint8), "rgb24").reformat(format="bgr0")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"narrow.mkv: a picture of 20000x1 is too narrow for 64x64"):
        media.read_clip(film(tmp_path / "narrow.mkv", (1, 20_000), [0]))
    monkeypatch.setattr(video_decode, "MOST_PIXELS", 64 * 63)
    with pytest.raises(ValueError, match=r"large.mkv: expected a whole video file"):
        media.read_clip(film(tmp_path / "large.mkv", (64, 64), [0]))


def test_a_film_whose_times_would_fill_the_memory_is_refused_before_it_does(tmp_path):
    path = film(tmp_path / "gap.mkv", (64, 64), (0, 10**10))
    with pytest.raises(ValueError, match=r"at most 4.3 GB of frames, found 240000000 frames of 64x64"):
        media.read_clip(path)
    with pytest.warns(media.MediaNote):
        assert len(media.read_clip(path, seconds=1).video) == 25


@pytest.mark.parametrize("field", ["num_layers", "attention_head_dim", "caption_channels", "audio_in_channels"])
def test_a_config_that_would_fill_the_memory_is_refused_by_its_field(field):
    with pytest.raises(ValueError, match=rf"{field} is at most"):
        ModelConfig.from_metadata(MINIATURE.to_metadata() | {field: 2**40})


def test_brackets_without_end_are_text_and_no_crash():
    assert runner.parse(["prompt=" + "(" * 100_000])["prompt"].startswith("((")
    assert runner.parse(["prompt=" + "9" * 10_000])["prompt"].startswith("99")


def test_the_attacks_change_what_they_attack(targets):
    for attack in attacks.CHECKPOINT_ATTACKS:
        assert any(attack(fuzz.Random(i), targets.student) != targets.student for i in range(3)), attack.__name__
