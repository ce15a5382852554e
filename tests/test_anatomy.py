"""Anatomy of a checkpoint and a codec: everything is counted once and measured where the answer is known."""

import math

import numpy as np
import pytest
import torch

from omniforcing_lib.bounce import codecs, world
from omniforcing_lib.config import MINIATURE, ModelConfig
from omniforcing_lib.layout import AV, Clock
from omniforcing_lib.ltx2 import checkpoints
from studies import anatomy

CLOCK = Clock()


@pytest.fixture(scope="module")
def codec():
    return codecs.shipped_codec()


@pytest.mark.parametrize("config", [MINIATURE.with_sinks(16), ModelConfig()], ids=["miniature", "19B"])
def test_every_parameter_is_counted_once(config):
    shapes = anatomy.shapes_of(config)
    counts = anatomy.parameters(shapes)
    assert sum(counts.values()) == sum(math.prod(shape) for shape in shapes.values())
    assert sum(anatomy.stream_shares(counts).values()) == pytest.approx(1)
    assert all(stream == "both" for stream, part in counts if part == "cross-modal")


def test_a_tensor_of_no_known_part_is_refused():
    with pytest.raises(ValueError, match="belongs to no part"):
        anatomy.purpose("transformer_blocks.0.mystery.weight")


def test_the_shipped_teacher_has_the_names_of_the_19b():
    ours, full = (
        anatomy.patterns(shapes)
        for shapes in (checkpoints.read("teacher").transformer, anatomy.shapes_of(ModelConfig()))
    )
    assert ours == full


def test_a_latent_decodes_to_what_the_clock_says(codec):
    latents = anatomy.encoded(codec, [world.render(world.scene(3), seconds=1)])
    for index in (0, 1, 3):
        assert anatomy.decoded_by(codec, latents, 0, index) == CLOCK.frames(range(index, index + 1))
    for index in (1, 9):
        samples, expected = anatomy.decoded_by(codec, latents, 1, index), CLOCK.samples(range(index, index + 1))
        # amplitudes run straight from knot to knot, so the last knot of a latent fades within the next hop
        assert samples.start == expected.start and expected.stop <= samples.stop < expected.stop + CLOCK.hop


def test_psnr_is_that_of_the_textbook():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert anatomy.psnr(black, black) == math.inf
    assert anatomy.psnr(black, black + 255) == 0
    assert anatomy.psnr(black, black + 1) == pytest.approx(48.13, abs=0.01)


def test_a_shift_of_the_sound_is_measured():
    clip = world.render(world.scene(5), seconds=4)
    late = AV(clip.video, np.concatenate([np.zeros(320, np.float32), clip.audio[:-320]]))
    shift = anatomy.onset_shift([clip, clip], [late, clip])
    assert shift.onsets > 4 and shift.kept == 1
    assert np.median(shift.moves_ms[: shift.onsets // 2]) == pytest.approx(20, abs=2)
    assert (shift.moves_ms[shift.onsets // 2 :] == 0).all()
    assert anatomy.onset_shift([clip], [AV(clip.video, 0 * clip.audio)]).kept == 0


def test_a_model_that_says_nothing_loses_the_variance_of_data_and_noise():
    latents = AV(torch.zeros(3, 16, 4, 4, 32), torch.zeros(3, 400, 32))
    loss = anatomy.velocity_loss(anatomy.silent, latents, world.prompts()[:3])
    for stream_loss in loss:
        assert stream_loss.shape == (3,) and stream_loss.mean().item() == pytest.approx(1, abs=0.03)


def test_the_wrong_rope_is_worse_than_saying_nothing(codec):
    data = anatomy.held_out(2, 0, 2)
    latents = anatomy.encoded(codec, data.clips)
    right, wrong = (
        anatomy.velocity_loss(checkpoints.load("teacher", changes=changes), latents, data.prompts, sigmas=(0.5,))
        for changes in ({}, anatomy.RELEASED_CODE)
    )
    blind = anatomy.velocity_loss(anatomy.silent, latents, data.prompts, sigmas=(0.5,))
    assert (right.video < blind.video).all() and (wrong.video > blind.video).all()
    assert (wrong.audio > 2 * right.audio).all()


def test_other_seeds_hold_out_other_clips():
    one, other = anatomy.held_out(2, 0, 1), anatomy.held_out(2, 1, 1)
    assert not np.array_equal(one.clips[0].video, other.clips[0].video)
    assert np.array_equal(one.clips[1].audio, anatomy.held_out(2, 0, 1).clips[1].audio)
