"""What the notebooks' probes say is right where the answer is known, and turns when the thing probed is broken."""

from dataclasses import replace

import pytest
import torch
from test_transformer import TINY, inputs, tiny

from omniforcing_lib import masks
from omniforcing_lib.layout import AV, LAYOUTS, PAPER, RELEASED, BlockLayout
from studies import probes

SMALL = BlockLayout(AV(1, 1), AV(2, 5), sinks=2)
NAMES = ("video_self", "audio_self", "a2v", "v2a")

each_mask = pytest.mark.parametrize("name", NAMES)
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@each_layout
def test_whole_seconds_leave_nothing_over_and_audio_never_drifts(layout):
    assert probes.leftovers(layout, range(1, 400)) == (0, 0)
    assert len(probes.lags(layout, 400)) == 1


def test_a_layout_that_does_not_fit_the_clocks_is_seen():
    short = replace(PAPER, step=AV(3, 24))
    assert probes.leftovers(short, [5]) == (0, 5 * 4)
    assert len(probes.lags(short, 6)) == 6
    assert (probes.misplaced_by_ratio(PAPER, 5), probes.misplaced_by_ratio(RELEASED, 5)) == (21, 14)


@each_layout
@pytest.mark.parametrize("sinks", [0, 3])
def test_attention_sees_what_the_paper_says_under_every_rendering(layout, sinks):
    assert probes.renderings_agree(replace(layout, sinks=sinks), 7, 2) == dict.fromkeys(masks.RENDERINGS, True)


@each_mask
def test_a_mask_that_is_off_by_one_is_seen(name):
    wrong = probes.off_by_one(masks.build(SMALL, 7, 4), name)
    for other, wanted in probes.rule(SMALL, 7, 4).items():
        assert torch.equal(probes.seen(getattr(wrong, other)), wanted) == (other != name)


@each_mask
def test_a_leak_shows_in_the_past_and_without_one_the_past_is_still(name):
    model, right = tiny(TINY.with_sinks(2)), masks.build(SMALL, 5, 4)
    clip = probes.Inputs(*inputs(SMALL, 5))
    moved = probes.leak_matrix(model, clip, SMALL, right)
    assert probes.into_the_past(moved) == 0
    assert all((matrix.diagonal() > 0).all() for matrix in moved.values())
    assert probes.into_the_past(probes.leak_matrix(model, clip, SMALL, probes.off_by_one(right, name))) > 0


def test_a_cached_pass_is_the_masked_pass_and_not_that_of_other_blocks():
    model, clip = tiny(TINY.with_sinks(2)), probes.Inputs(*inputs(SMALL, 5))
    assert max(probes.cached_against_masked(model, clip, SMALL)) <= 1e-10
    whole = model(*clip, masks=masks.build(SMALL, 5, 4))
    other = probes.cached_pass(model, clip, replace(SMALL, first=AV(1, 1), step=AV(4, 10)))
    assert (whole.video - other.video).abs().max() > 1e-3


def test_block_slices_leave_out_what_the_mask_forbids():
    cost = probes.attention_cost(PAPER, [2], tokens_per_frame=2, heads=1, dim=8, repeats=1)[2]
    assert cost.tokens == 14 and cost.mask_mb == pytest.approx(14**2 / 1e6)
    assert cost.visible == pytest.approx((2 * 2 + 6 * 8 + 6 * 14) / 14**2)
    assert all(ms > 0 for ms in cost.ms.values())


def test_calls_take_turns_and_the_first_turn_does_not_count():
    order = []
    times = probes.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3 and {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}
