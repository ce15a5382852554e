"""Laws of the miniature's text encoder."""

from itertools import combinations

import pytest
import torch

from omniforcing_lib.bounce import world
from omniforcing_lib.bounce.text import TinyText


def test_every_prompt_has_its_own_context_and_none_is_the_unconditional_one():
    context = TinyText().encode([*world.prompts(), ""]).video
    assert context.shape == (len(world.prompts()) + 1, 6, 64)
    assert all((a - b).abs().sum(-1).gt(1).any() for a, b in combinations(context, 2))


def test_both_streams_read_the_same_context():
    video, audio = TinyText().encode(["a red ball, bell"])
    assert torch.equal(video, audio)


def test_case_and_spaces_do_not_matter():
    a, b = TinyText().encode(["a red ball, bell", "  A  Red ball,bell "]).video
    assert torch.equal(a, b)
    null = TinyText().encode(["", "   "]).video
    assert torch.equal(null[0], null[1])


def test_a_prompt_changes_its_own_words_only():
    red, blue, wood = TinyText().encode(["a red ball, bell", "a blue ball, bell", "a red ball, wood"]).video
    assert (red != blue).any(1).tolist() == [False, True, False, False, False, False]
    assert (red != wood).any(1).tolist() == [False, False, False, True, False, False]


def test_codes_are_frozen_and_of_unit_variance():
    context = TinyText().encode(["a cyan ball, pluck"]).video[0]
    assert ((context * 2**0.5).round().to(int).unique().tolist(), context.dtype) == ([-2, 0, 2], torch.float32)
    assert abs(context.square().mean() - 1) < 0.15
    signs = "".join("-0+"[int(v)] for v in (context[1, :16] / 2**0.5).round() + 1)
    assert signs == "+-+0++-0000000-0"  # a change makes every stored checkpoint unreadable


def test_a_prompt_outside_the_grammar_is_refused_with_the_valid_words():
    with pytest.raises(ValueError, match="cyan"):
        TinyText().encode(["a pink ball, bell"])
    with pytest.raises(ValueError, match="pluck"):
        TinyText().encode(["a red ball, drum"])


def test_sizes_that_cannot_hold_a_prompt_are_refused():
    with pytest.raises(ValueError, match="found 3"):
        TinyText(length=3)
    with pytest.raises(ValueError, match="found 60"):
        TinyText(channels=60)


def test_dtype_and_size_are_as_asked():
    context = TinyText(channels=16, length=9).encode(["", "a red ball, bell"], dtype=torch.float64)
    assert context.audio.shape == (2, 9, 16) and context.audio.dtype == torch.float64
