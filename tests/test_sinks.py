"""The sink experiment: what moves when positions are counted, what a row measures, what a run records."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from omniforcing_lib import masks, rope
from omniforcing_lib.__main__ import main
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.bounce.world import prompts
from omniforcing_lib.layout import AV, PAPER, RELEASED, Clock
from omniforcing_lib.training.dataset import Pairs, Prompts
from omniforcing_lib.transformer import Transformer
from studies import rows, sink_runs, sinks, store, variants
from studies.sinks import Trace
from studies.variants import Variant
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


def biased(logit, sinks=0):
    """Give an attention of `TINY` with a bias, the plain one, and what both take."""
    model = tiny(TINY.with_sinks(sinks), dtype=torch.float32)
    layout = replace(PAPER, sinks=sinks)
    x, sigma, text = inputs(layout, 4, dtype=torch.float32)
    kind = masks.build(layout, 4, 4)
    with rows.watched(model) as calls, torch.no_grad():
        model(x, sigma, text, masks=kind)
    plain, at, rotation, _ = calls[0]
    own = variants.Biased(plain)
    own.logit.data.fill_(logit)
    return own, plain, {"rotations": (rotation, rotation), "visibility": kind.audio_self}, at


def test_a_bias_that_is_far_below_all_logits_is_plain_attention():
    own, plain, how, x = biased(-100.0)
    assert torch.allclose(own(x, **how), plain(x, **how), atol=1e-5)


def test_a_bias_is_one_more_key_without_a_value():
    """Row 0 sees one key: it passes sigmoid(logit - bias) of that key's value, and its logit gets a gradient."""
    own, plain, how, x = biased(0.3)
    logits, values = rows.logits_values(rows.Seen(plain, x, how["rotations"][0], None))
    share = (logits[:, :, :1, :1] - 0.3).sigmoid()
    wanted = plain._out(x[:, :1], share * values[:, :, :1])
    found = own(x, **how)[:, :1]
    assert torch.allclose(found, wanted, atol=1e-5)
    found.square().sum().backward()
    assert own.logit.grad.abs().min() > 0


def test_plain_scales_keep_the_size_of_what_they_replace_and_bound_nothing(study):
    kept, plain = study.student(Variant(sinks=0)), study.student(Variant(sinks=0, norms="plain"))
    x, sigma, text, _ = study.half_noisy(study.pairs)
    kind = variants.masks_of(Variant(sinks=0).causal, x.video)
    with rows.watched(kept) as calls, torch.no_grad():
        kept(x, sigma, text, masks=kind)
    for call, block in zip(calls, plain.transformer_blocks, strict=True):
        attention = block.audio_attn1
        for name in "qk":
            before, scale = (getattr(a, f"{name}_norm") for a in (call.attention, attention))
            projected = getattr(attention, f"to_{name}")(call.x).detach()
            ratio = scale(projected).square().mean() / before(projected).square().mean()
            assert 0.7 < ratio.item() < 1.4
            assert torch.allclose(scale(3 * projected), 3 * scale(projected))
    with pytest.raises(ValueError, match="seen"):
        variants.build(Variant(norms="plain"))


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


SWITCHES = {
    "precision": "bf16",
    "settings": "released",
    "positions": "counted",
    "audio_rows": "row",
    "norms": "plain",
    "stabiliser": "bias",
}


@pytest.fixture(scope="module")
def plain(study):
    return sinks.train(Variant(), study, steps=1, batch=2)


@pytest.mark.parametrize("change", [{name: value} for name, value in SWITCHES.items()], ids=SWITCHES)
def test_every_switch_reaches_the_student(study, plain, change):
    changed = sinks.train(Variant(**change), study, steps=1, batch=2)
    assert plain.norm != changed.norm and not changed.diverged


def test_no_gradient_is_too_large_for_a_step_and_a_broken_run_ends_there(study, monkeypatch):
    """The trainer's own limit would leave such steps out and call the run steady; NaN would be skipped for ever."""
    model = study.student(Variant(sinks=0))
    before = model.proj_out.weight.detach().clone()
    monkeypatch.setattr(sinks.Study, "student", lambda *_: model)

    def steps(scale, count):
        monkeypatch.setattr(sinks.stages, "ode_stage", lambda player, *_: lambda i, g: stage(player, scale))
        return sinks.train(Variant(sinks=0, clip=math.inf), study, steps=count, every=count)

    def stage(player, scale):
        loss = scale * player.model.proj_out.weight.square().sum()
        zero = torch.zeros(())
        return {"norm": player.update(loss), "video": zero, "audio": zero}

    large = steps(1e6, 1)
    assert large.max_norm > 1e5 and not large.diverged and not torch.equal(before, model.proj_out.weight)
    broken = steps(math.nan, 40)
    assert broken.diverged and len(broken.norm) == 1 and math.isnan(broken.final)


def test_the_loss_by_latent_is_the_loss_and_row_0_pays_for_a_key_that_it_lost(study):
    found = sinks.by_latent(study, Variant(sinks=0))
    model, kind = study.untrained(Variant(sinks=0))
    with torch.no_grad():
        whole = sinks.one_step(model, kind, study).audio
    assert found.loss == pytest.approx(whole.numpy(), rel=1e-3, abs=1e-6)
    assert found.pull.shape == (len(study.held), 2) and found.pull.min() > 0
    assert sinks.by_span(found.loss)["0"].mean == pytest.approx(float(whole[:, 0].mean()), rel=1e-3)
    dearer = found.loss + np.where(np.arange(found.loss.shape[1]) == 0, 2.0, 0.0)
    apart = sinks.by_span(dearer, found.loss)
    assert apart["0"] == pytest.approx((2, 2, 2), rel=1e-3) and apart["2 to 5"] == pytest.approx((0, 0, 0), abs=1e-6)


def trace(final, norm=1.0, steps=2):
    judged = {done: AV(final / 2, final / 2) for done in (0, steps)}
    return Trace([norm] * steps, [0.0] * steps, [1.0] * steps, judged, {done: [final] * 3 for done in judged})


def test_a_stored_trace_reads_back_and_a_broken_one_stays_broken():
    whole, broken = trace(0.1234), trace(math.nan, math.inf)
    assert sink_runs.unpacked(sink_runs.packed(whole)) == whole
    again = sink_runs.unpacked(sink_runs.packed(broken))
    assert again.diverged and again.max_norm == math.inf and math.isnan(again.final)


def test_training_seeds_are_the_unit_and_more_comparisons_widen_every_interval():
    """Two arms that share the seeds' ups and downs differ by a tenth; t of 4 degrees of freedom is 2.776."""
    ups = (0.0, 0.5, 1.0, 2.0, 4.0)
    own = (0.09, 0.11, 0.1, 0.1, 0.1)
    traces = {
        "16 sinks": {seed: trace(1 + up) for seed, up in enumerate(ups)},
        "0 sinks": {seed: trace(1 + up + d) for seed, (up, d) in enumerate(zip(ups, own, strict=True))},
    }
    mean, (low, high) = sink_runs.differences(traces)["0 sinks"]
    half = 2.776 * math.sqrt(0.0002 / 4 / 5)
    assert (mean, low, high) == pytest.approx((0.1, 0.1 - half, 0.1 + half), rel=1e-3)
    mean, wider = sink_runs.differences(traces | {"2 sinks": traces["0 sinks"]})["0 sinks"]
    assert wider[0] < low and high < wider[1]
    assert store.over_seeds([0.3]) == (0.3, None) and store.over_seeds([0.3, math.nan])[1] is None
    with pytest.raises(ValueError, match="share no training seed"):
        sink_runs.differences({"16 sinks": {0: trace(1.0)}, "0 sinks": {1: trace(1.0)}})


@pytest.fixture
def counted_runs(monkeypatch):
    """Replace training by a count; the study's trajectories are not needed either."""
    runs = []
    monkeypatch.setattr(sink_runs.sinks, "prepare", lambda *_, **amount: amount)
    monkeypatch.setattr(
        sink_runs.sinks, "train", lambda variant, *_, seed, **__: runs.append(variant) or trace(0.1 + seed)
    )
    return runs


def test_stored_runs_go_on_where_they_stopped(tmp_path, counted_runs, capsys):
    sink_runs.run("study", tmp_path, arms=("16 sinks", "tanh gate"), seeds=1, steps=3)
    sink_runs.run("study", tmp_path, arms=("16 sinks", "tanh gate"), seeds=2, steps=3)
    assert counted_runs == 2 * [sink_runs.ARMS["16 sinks"], sink_runs.ARMS["tanh gate"]]
    found = sink_runs.stored("study", tmp_path)
    assert {arm: [*runs] for arm, runs in found.traces.items()} == {"16 sinks": [0, 1], "tanh gate": [0, 1]}
    assert found.budget.steps == 3 and found.outdated == 0
    words = ["sinks", "--plans", "study", "--arms", "16 sinks", "--seeds", "2", "--steps", "3", "--out", str(tmp_path)]
    assert main(words) == 0 and len(counted_runs) == 4
    assert "0 of 2" in capsys.readouterr().out


def test_runs_that_do_not_belong_together_are_refused_before_any_training(tmp_path, counted_runs, monkeypatch):
    sink_runs.run("study", tmp_path, arms=("16 sinks",), seeds=1, steps=3)
    for change, says in (
        ({"steps": 4}, "budget"),
        ({"arms": ("17 sinks",)}, "choose from"),
        ({"seeds": -1}, "found -1"),
    ):
        with pytest.raises(ValueError, match=says):
            sink_runs.run("study", tmp_path, **{"steps": 3} | change)
    with monkeypatch.context() as changed:
        changed.setitem(sink_runs.ARMS, "16 sinks", Variant(lr=1e-3))
        with pytest.raises(ValueError, match="variant"):
            sink_runs.stored("study", tmp_path)
    other = {"git": {}, "files": {"teacher.safetensors": "another"}}
    monkeypatch.setattr(store, "origin", lambda *names: other)
    with pytest.raises(ValueError, match="another"):
        sink_runs.run("study", tmp_path, steps=3)
    assert sink_runs.stored("study", tmp_path).outdated == 1
    with pytest.raises(ValueError, match="holds no runs; `python -m omniforcing_lib sinks --plans phase`"):
        sink_runs.stored("phase", tmp_path)
    assert main(["sinks", "--arms", "16 sinks"]) == 2 and len(counted_runs) == 1


def test_every_arm_differs_from_the_recipe_in_what_its_name_says():
    plain = asdict(Variant())
    changed = {
        name: {field: value for field, value in asdict(arm).items() if value != plain[field]}
        for name, arm in sink_runs.ARMS.items()
    }
    assert changed == {
        "0 sinks": {"sinks": 0},
        "2 sinks": {"sinks": 2},
        "16 sinks": {},
        "24 sinks": {"sinks": 24},
        "16 counted": {"positions": "counted"},
        "16 before": {"positions": "before"},
        "QK-norm": {"sinks": 0, "stabiliser": "qk_norm"},
        "tanh gate": {"sinks": 0, "stabiliser": "tanh_gate"},
    }
    assert all(arm.clip == math.inf for arm in sink_runs.PHASE.values())
    assert len({*sink_runs.PHASE.values()}) == len(sink_runs.ROWS) * len(sink_runs.COLUMNS)


def test_the_map_has_a_place_for_every_run_and_none_for_what_is_missing():
    traces = {name: {0: trace(0.1)} for name in sink_runs.PHASE}
    del traces["0 sinks, x 8, rate 0.005"]
    grid = sink_runs.phase_grid(traces)
    assert [*grid] == [*sink_runs.ROWS] and [*grid["16 sinks"]] == [*sink_runs.COLUMNS]
    assert "x 8, rate 0.005" not in grid["0 sinks"] and len(grid["0 sinks"]) == len(sink_runs.COLUMNS) - 1
