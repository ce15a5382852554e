"""The sink experiment: what moves when positions are counted, what a row measures, what a run records."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from omniforcing_lib import masks, rope
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.bounce.world import prompts
from omniforcing_lib.lab import rows, sinks, variants
from omniforcing_lib.lab.sinks import Trace
from omniforcing_lib.lab.variants import Variant
from omniforcing_lib.layout import AV, PAPER, RELEASED, Clock
from omniforcing_lib.training.dataset import Pairs, Prompts
from omniforcing_lib.transformer import Transformer
from tests.test_transformer import GRID, TINY, inputs, tiny

LATENTS = AV(range(7), range(51))
DEVICE = torch.device("cpu")


def turns(kind, sinks=3):
    return kind(TINY.with_sinks(sinks)).rotations(LATENTS, GRID, sinks)


def test_identity_sinks_are_not_rotated_and_leave_the_audio_in_place():
    own = turns(Transformer).own.audio
    plain = rope.tables(TINY, Clock(), LATENTS, GRID, 0, DEVICE).own.audio
    assert (own.cos[:, :3] == 1).all() and (own.sin[:, :3] == 0).all()
    assert torch.equal(own.cos[:, 3:], plain.cos)


def test_counted_positions_move_the_audio_by_the_number_of_sinks():
    moved = AV(LATENTS.video, range(54))
    through = rope.tables(TINY.with_sinks(3), Clock(), moved, GRID, 0, DEVICE)
    assert all(
        torch.equal(a, b) for a, b in zip(turns(variants.CountedSinks).own.audio, through.own.audio, strict=True)
    )
    assert torch.equal(turns(variants.CountedSinks).cross.audio.sin, through.cross.audio.sin)


def test_counted_positions_agree_between_a_whole_clip_and_a_later_block():
    model = variants.CountedSinks(TINY.with_sinks(3))
    whole = model.rotations(LATENTS, GRID, 3).own.audio.sin
    later = model.rotations(AV(range(4, 7), range(26, 51)), GRID, 0).own.audio.sin
    assert torch.equal(whole[:, 29:], later)


def test_earlier_sinks_come_one_latent_apart_before_an_audio_that_stays():
    timed, plain = turns(variants.EarlierSinks), turns(Transformer)
    for a, b in zip((*timed.own.audio, *timed.cross.audio), (*plain.own.audio, *plain.cross.audio), strict=True):
        assert torch.equal(a[:, 3:], b[:, 3:]) and not torch.equal(a[:, :3], b[:, :3])
    angle = torch.atan2(timed.own.audio.sin, timed.own.audio.cos)[0, :, 0]
    steps = [float(b - a) for a, b in pairwise(angle[:3])]
    assert steps == pytest.approx([math.pi / 2 * 2 / 20 / 25] * 2, rel=1e-3)


def probed(layout, sharpen=1.0):
    model = tiny(TINY.with_sinks(layout.sinks), dtype=torch.float32)
    for block in model.transformer_blocks:
        block.audio_attn1.q_norm.weight.data.mul_(sharpen)
    x, sigma, text = inputs(layout, 7, dtype=torch.float32)
    return rows.probe(model, x, sigma, text, masks.build(layout, 7, 4))


def test_without_sinks_one_row_sees_one_key_and_cannot_be_moved():
    found = probed(replace(PAPER, sinks=0))
    assert found.keys.tolist() == [1] + 25 * [26] + 25 * [51]
    assert (found.entropy[:, 0] == 0).all() and found.gain[:, 0].max() < 1e-3
    assert found.size[:, 0].tolist() == pytest.approx([1.0] * len(found.size), abs=1e-4)
    assert found.gain[:, 1:].min() > 0.01


def test_keys_of_rows_are_the_sinks_plus_the_blocks_so_far():
    assert probed(replace(PAPER, sinks=2)).keys.tolist() == 3 * [3] + 25 * [28] + 25 * [53]
    assert probed(RELEASED).keys.tolist() == 26 * [26] + 25 * [51]


def test_row_causal_audio_sees_the_sinks_and_what_it_has_heard():
    kind = masks.build(replace(PAPER, sinks=2), 7, 4)
    by_row = variants.row_causal(kind)
    seen = by_row.audio_self.dense
    assert seen.sum(1).tolist() == [3, 3, *range(3, 54)] and not (seen & ~kind.audio_self.dense).any()
    assert by_row.a2v == kind.a2v


def test_flat_logits_spread_attention_evenly():
    found = probed(replace(PAPER, sinks=2), sharpen=0.0)
    assert torch.allclose(found.entropy, torch.ones_like(found.entropy), atol=1e-5)
    assert torch.allclose(found.on_sinks[0, [0, 3, 28]], 2 / torch.tensor([3.0, 28, 53]), atol=1e-5)


def test_gain_is_the_size_of_the_derivative_by_the_logits():
    layout = replace(PAPER, sinks=2)
    model = tiny(TINY.with_sinks(2), dtype=torch.float32)
    x, sigma, text = inputs(layout, 4, dtype=torch.float32)
    kind = masks.build(layout, 4, 4)
    with rows.watched(model) as calls:
        model.requires_grad_(False)(x, sigma, text, masks=kind)
    logits, values = rows.logits_values(calls[0])
    row = 2
    seen = logits[0, 0, row, :3]
    by_logit = torch.autograd.functional.jacobian(lambda z: z.softmax(-1) @ values[0, 0, :3], seen)
    typical = values[0, 0, :3].square().sum(-1).mean()
    one_head = rows.of_softmax(logits[:, :1], values[:, :1], kind.audio_self.dense)
    assert float(one_head.gain[0, 0, row]) == pytest.approx(float(by_logit.norm() / typical.sqrt()), rel=1e-4)


def test_sharpening_scales_the_logits_and_nothing_else():
    plain, sharp = probed(PAPER), probed(PAPER, 4.0)
    assert torch.allclose(sharp.logits[0], 4 * plain.logits[0], rtol=1e-4)


def test_an_extra_norm_brings_every_head_to_unit_size_and_a_tanh_gate_starts_shut():
    normed = variants.build(Variant(sinks=0, stabiliser="qk_norm")).transformer_blocks[0].audio_attn1
    heads = normed.q_norm(torch.randn(2, 5, 80)).unflatten(-1, (4, 20))
    assert torch.allclose(heads.square().mean(-1), torch.ones(2, 5, 4), atol=1e-4)
    shut = variants.build(Variant(sinks=0, stabiliser="tanh_gate")).transformer_blocks[0].audio_attn1
    assert not shut(torch.randn(1, 3, 80)).any()


def test_a_word_that_no_variant_knows_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="identity, counted, before"):
        Variant(positions="none")


@pytest.fixture(scope="module")
def study():
    generator = torch.Generator().manual_seed(0)
    states = AV((4, 4, 4, 4, 4, 32), (4, 4, 26, 32)).map(lambda shape: torch.randn(shape, generator=generator))
    pairs = Pairs(states, torch.tensor([1.0, 0.75, 0.54, 0.0]), torch.arange(4))
    return sinks.Study("teacher", Prompts.of(TinyText(), prompts()), pairs, pairs)


def test_trajectories_that_are_trained_on_and_judged_are_counted(study):
    fresh = replace(study.held, states=study.held.states.map(lambda x: x + 1))
    assert study.shared == 4 and replace(study, held=fresh).shared == 0


def test_a_run_records_every_step_and_repeats_to_the_bit(study):
    first, again = (sinks.train(Variant(sinks=2), study, steps=2, batch=2, every=2) for _ in range(2))
    assert first == again and len(first.norm) == len(first.loss) == 2 and list(first.one_step) == [0, 2]
    assert all(0 < own < whole for own, whole in zip(first.sink_norm, first.norm, strict=True))
    assert first.rest_norm < first.max_norm and not first.diverged
    assert first.final == pytest.approx(sum(first.one_step[2]))


def test_the_sinks_share_of_a_clipped_gradient_is_that_of_the_whole_one(study):
    free, clipped = (sinks.train(Variant(clip=c), study, steps=1, batch=2) for c in (math.inf, 0.1))
    assert clipped.norm == free.norm and clipped.sink_norm == pytest.approx(free.sink_norm, rel=1e-3)


def test_a_gradient_that_is_not_finite_is_a_broken_run():
    broken = Trace([1.0, math.nan], [0.0, 0.0], [1.0, 1.0], {0: AV(1.0, 1.0), 2: AV(1.0, 1.0)})
    found = sinks.summarise([broken])
    assert broken.diverged and found.broken == 1 and found.norm == math.inf and math.isnan(found.final)


def test_variants_are_compared_seed_by_seed():
    """Seeds that differ more from each other than two variants do still tell the variants apart."""

    def ended(*finals):
        return sinks.summarise([Trace([1.0], [0.0], [1.0], {0: AV(1.0, 1.0), 2: AV(x, 0.0)}) for x in finals])

    easy, hard = ended(0.10, 0.20, 0.30), ended(0.14, 0.25, 0.36)
    mean, (low, high) = sinks.gap(hard, easy)
    assert mean == pytest.approx(0.05) and 0 < low < mean < high < 0.1
    assert hard.final - easy.final < hard.spread and sinks.gap(ended(0.4), ended(0.1)) == (pytest.approx(0.3), None)


@pytest.mark.parametrize(
    "change", [{"precision": "bf16"}, {"settings": "released"}, {"positions": "counted"}, {"audio_rows": "row"}]
)
def test_every_switch_reaches_the_student(study, change):
    plain, changed = (sinks.train(v, study, steps=1, batch=2) for v in (Variant(), Variant(**change)))
    assert plain.norm != changed.norm and not changed.diverged
