"""The benchmark counts what the network does and times in turn; no time is asserted."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
from diffusers.pipelines.ltx2 import LTX2Vocoder
from test_transformer import GRID, TINY, inputs, tiny
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from omniforcing_lib import model_bundle
from omniforcing_lib.bounce import world
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.flow import Skip
from omniforcing_lib.layout import AV, PAPER, RELEASED
from omniforcing_lib.rollout import RolloutConfig, new_cache, next_block, seeded_noise
from omniforcing_lib.stream import Chunk
from studies import bench, cost, decoders, roofline, switching
from studies.cost import Rates, Work

COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


def test_a_longer_wait_of_the_decoder_is_nearer_to_the_whole_decode():
    """On random latents and on a true clip; the tiny decoder waits for nothing."""
    whole, now, later, tiny = decoders.rows(model_bundle.of(), 0, 1, (0, 2))
    assert [row["a frame waits, s"] for row in (whole, now, later, tiny)] == ["for the clip", "0.00", "0.67", "0.00"]
    for column in ("dB, random latents", "dB, a true clip"):
        assert float(tiny[column]) < float(now[column]) < float(later[column]) < 60 and whole[column] == "whole"


WAYS = {
    "own pass": {},
    "merged": {"context_pass": "fused"},
    "no pass": {"context_pass": "skip"},
    "fewer steps later": {"later_steps": (1000, 0)},
}


@torch.inference_mode()
@pytest.mark.parametrize("layout", [PAPER, RELEASED], ids=["paper", "released"])
@pytest.mark.parametrize("way", WAYS)
def test_counted_work_is_what_the_network_does(layout, way):
    """To the last operation: every block after the first ones, before and after the window is full.

    The work of remembering a block is counted with the block, and done with the next one: equal once both are alike.
    """
    causal = RolloutConfig(layout, steps=(1000, 500, 0), window=1, **WAYS[way])
    model = tiny(TINY.with_sinks(layout.sinks))
    text = inputs(layout, layout.first.video)[2]
    cache, noise, before = new_cache(model, causal, GRID, 1), seeded_noise([0], text.video), None
    model.register_forward_pre_hook(lambda *_: counts.append(1))
    for k in range(6):
        counts: list[int] = []
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            before = next_block(model, causal, cache, text, noise, k, before)
        work = cost.block_work(model.config, causal, 4, k, text.video.shape[1])
        if k > 3:
            assert counter.get_total_flops() == work.flops and len(counts) == work.passes
    assert work == cost.block_work(model.config, causal, 4, 1000, text.video.shape[1])


def test_without_a_window_work_grows_and_with_one_it_does_not():
    rolling, growing = RolloutConfig(window=2), RolloutConfig(window=10_000)
    works = [[cost.block_work(TINY, c, 4, k, 6).flops for k in range(1, 30)] for c in (rolling, growing)]
    assert len(set(works[0][2:])) == 1 and len(set(works[1])) == 29
    assert works[0][:3] == works[1][:3] and max(works[0]) < works[1][3]


def test_a_pass_of_the_19b_costs_two_flops_a_weight_and_token():
    """The linear part against the weights that each stream's tokens meet (specification 1.1), attention aside."""
    video, audio = (cost.pass_work(ModelConfig(), tokens, AV(0, 0), 0).linear for tokens in (AV(1000, 0), AV(0, 1000)))
    assert video / 2000 == pytest.approx(12.89e9 - 48 * 2 * 4096**2 + 48 * 4 * 4096 * 2048, rel=0.01)
    assert audio / 2000 == pytest.approx(3.22e9 - 48 * 2 * 2048**2 + 48 * 4 * 2048 * 2048, rel=0.01)


def test_known_rates_are_found_and_sizes_not_fitted_are_predicted():
    true = Rates(linear=5e10, attention=2e10, pass_s=0.004)
    fitted, held_out = (
        [cost.pass_work(bench.BENCH, AV(3 * r * c, 25), AV(16 * r * c, 142), 6) for r, c in grids]
        for grids in bench.sizes((16, 24))
    )
    found = cost.fit(fitted, [true.seconds(work) for work in fitted])
    for work in held_out:
        assert found.seconds(work) == pytest.approx(true.seconds(work), rel=1e-6)
    with pytest.raises(ValueError, match="at least 3"):
        cost.fit(fitted[:2], [1.0, 2.0])


def test_the_decoders_of_ltx2_are_counted_to_the_last_product():
    """Each convolution by hand, two FLOPs a weight and position: outputs of a plain one, inputs of a transposed one."""
    work = {"video": 0, "audio": 0}

    def count(module, args, out, stream):
        places = args[0] if isinstance(module, torch.nn.ConvTranspose1d) else out
        work[stream] += 2 * module.weight.numel() * math.prod(places.shape[2:])

    with torch.device("meta"):
        picture, sound, vocoder = AutoencoderKLLTX2Video().decoder, AutoencoderKLLTX2Audio().decoder, LTX2Vocoder()
        for stream, part in (("video", picture), ("audio", sound), ("audio", vocoder)):
            for module in part.modules():
                if "Conv" in type(module).__name__ and hasattr(module, "weight"):
                    module.register_forward_hook(partial(count, stream=stream))
        frames, mel = picture(torch.empty(1, 128, 4, 2, 3)), sound(torch.empty(1, 8, 26, 16))
        samples = vocoder(mel)
    assert (frames.shape[2:], mel.shape[2:], samples.shape[2]) == ((25, 64, 96), (101, 64), 101 * 240)
    assert cost.decoding(AV(4, 26), (2, 3))._asdict() == work


def test_the_speed_up_is_counted_at_the_19bs_own_widths():
    """A narrow model with the 19B's tokens flatters: attention, which the student's past spares, weighs too much."""
    giant, clip, size = ModelConfig(), AV(16, 126), (16, 24)
    two, four = (cost.gain(giant, RolloutConfig(), clip, size, 1024, 40 * passes) for passes in (2, 4))
    assert two == pytest.approx((21.35, 91.15), rel=1e-3) and four == pytest.approx((42.69, 182.29), rel=1e-3)
    narrow = cost.gain(bench.BENCH, RolloutConfig(), clip, size, bench.TEXT_TOKENS, 80)
    assert narrow.clip > 1.3 * two.clip and narrow.first_chunk > 1.3 * two.first_chunk
    decoded = cost.gain(giant, RolloutConfig(), clip, size, 1024, 80, cost.decoding)
    assert decoded == pytest.approx((19.77, 84.92), rel=1e-3)


def test_audio_is_the_smaller_part_and_predictions_come_with_their_errors():
    assert (
        cost.audio_share(ModelConfig(), RolloutConfig(), 384, 1024)
        < 0.02
        < cost.audio_share(TINY, RolloutConfig(), 4, 6)
        < 1
    )
    rows, errors = cost.predicted(Rates(1e9, 1e9, 0.0), [(Work(1e9, 1e9), 1.0), (Work(1e9, 0), 2.0)])
    assert errors == [1.0, -0.5] and rows[0]["predicted, ms"] == "2000.0"


def test_work_adds_up():
    total = cost.plus(Work(1, 2), Work(3, 4).times(2))
    assert total == Work(7, 10, 3) and total.flops == 17


def test_a_faster_machine_and_fewer_steps_make_more_frames():
    four, three = (
        cost.carried(ModelConfig(), RolloutConfig(steps=steps), 384, 1024, 0.4)
        for steps in ((1000, 909, 725, 421, 0), (1000, 757, 522, 0))
    )
    rate = [[float(row["frames a second at 40% of peak"]) for row in rows] for rows in (four, three)]
    assert [row["GPU"] for row in four] == list(cost.GPUS)
    assert rate[0][0] == rate[0][1] < rate[0][2] and all(a < b for a, b in zip(*rate, strict=True))


def test_calls_are_timed_in_turn():
    order = []
    times = bench.alternate({name: partial(order.append, name) for name in "ab"}, turns=3, warm=1)
    assert "".join(order) == "abababab"
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3} and min(map(min, times.values())) >= 0
    assert bench.percentiles(range(101)) == (50, 95, 99)


def test_the_machine_has_roofs():
    found = roofline.machine(turns=1, size=64)
    assert min(*found.gemm.values(), found.attention) > 0 and set(found.gemm) == {
        "float32",
        "bfloat16",
    }


def test_a_pass_is_held_against_the_rates_around_it(monkeypatch):
    """A machine three times as slow after the pass as before counts as twice as slow: so does its floor."""
    ticks = iter([*[1.0] * 3, 8.0, *[3.0] * 3] * 3)
    monkeypatch.setattr(roofline, "seconds_of", lambda call: next(ticks))
    ratio, least, most = roofline.over_floor(lambda: None, Work(2 * 64**3, 0), turns=2, size=64)
    assert ratio == least == most == pytest.approx(8 / 2)


def test_streams_meet_in_cross_modal_attention_and_nowhere_else():
    model = tiny(dtype=torch.float32)
    assert bench.moved_by_the_other(model, GRID, Skip(cross_modal=True)) == (0, 0)
    assert min(bench.moved_by_the_other(model, GRID, None)) > 0


def test_every_timed_block_comes_with_its_work():
    model, causal = tiny(TINY.with_sinks(16), dtype=torch.float32), RolloutConfig(window=1)
    for way in (causal, replace(causal, context_pass="fused"), replace(causal, later_steps=(1000, 0))):
        timed = bench.block_times(model, way, [(1, 2), (2, 2)], turns=1)
        assert [work for work, _ in timed] == [
            cost.block_work(model.config, way, n, 100, bench.TEXT_TOKENS) for n in (2, 4)
        ]
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        call = bench.steady_block(model, causal, GRID)
        call()
        once = counter.get_total_flops()
        call()
    assert counter.get_total_flops() - once == cost.block_work(model.config, causal, 4, 100, bench.TEXT_TOKENS).flops
    policies = {"rolling": causal, "growing": RolloutConfig(window=9)}
    seconds, held = bench.in_turn(model, policies, GRID, 4, turns=2)
    assert [len(s) for s in seconds.values()] == [4, 4] and min(map(min, seconds.values())) > 0
    assert len(set(held["rolling"])) == 1 and held["rolling"][0] < held["growing"][0]
    blocks = list(bench.block_seconds(model, causal, GRID, 4))
    assert len(blocks) == 4 and len({nbytes for _, nbytes in blocks}) == 1


def test_the_released_code_is_quoted_at_its_own_size_only():
    timed = {"ours": [0.1] * 10}
    there, elsewhere = (bench.beside_released(timed, grid, "bf16") for grid in (bench.REAL_GRID, (8, 12)))
    assert [(row["block"], row["released code, s"]) for row in there] == [(0, "1.5"), (9, "3.8")]
    assert [(row["block"], "released code, s" in row) for row in elsewhere] == [(0, False), (9, False)]


def test_a_training_step_is_timed_both_ways_and_leaves_the_model_as_it_was():
    """Both renderings give one gradient; peak memory sees what a call holds for a moment."""
    model, grads = tiny(TINY.with_sinks(16), dtype=torch.float32), {}
    for kind in ("sliced", "dense"):
        torch.manual_seed(0)
        own = copy.deepcopy(model).requires_grad_(True)
        own.zero_grad = lambda set_to_none, own=own, kind=kind: grads.update({kind: own.proj_out.weight.grad})
        bench.training_step(own, RolloutConfig(), GRID, 2, kind)()
    assert torch.allclose(grads["sliced"], grads["dense"], atol=1e-5) and grads["dense"].abs().max() > 0
    rows, faster, smaller = roofline.training_rows(model.requires_grad_(False), RolloutConfig(), GRID, 2, turns=1)
    assert [row["attention"] for row in rows] == ["sliced", "dense"] and faster > 0 and smaller > 0
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_peak_memory_is_what_a_call_holds_at_a_time():
    """To the byte: what was freed before is not counted, what is held together is."""

    def hold() -> None:
        for _ in range(3):
            torch.ones(1_000_000)
        together = torch.ones(500_000), torch.ones(750_000)
        assert len(together) == 2

    assert roofline.peak_bytes(hold) == 5_000_000


def test_a_jump_and_a_click_are_found_at_the_edge_where_they_are():
    """A true clip cut into chunks has no seam; another ball from block 4 on is one, and so is a click."""
    whole, other = (world.render(world.scene(seed, "a red ball, bell"), seconds=6) for seed in (3, 4))
    plain, broken = (cut(whole), cut(whole)[:4] + cut(other)[4:])
    broken[5] = broken[5]._replace(samples=broken[5].samples + np.eye(1, 16_000, dtype=np.float32)[0])
    smooth, rough = switching.seams(plain), switching.seams(broken)
    assert smooth.map(len) == (5, 5) and smooth.video.max() < 1 and smooth.audio.max() < 0.5
    assert rough.video[2] > 3 and rough.audio[3] > 0.9 and rough.audio.argmax() == 3
    rows = switching.seam_rows({"a": [broken, broken]}, at=4)
    assert [row["edge"] for row in rows] == ["prompt changes", "other edges"]
    pairs = switching.prompt_pairs(world.prompts(), 20)
    assert len(pairs) == 20 and all(not set(a.split()) & set(b.split()) - {"a", "ball,"} for a, b in pairs)


def cut(clip: AV) -> list[Chunk]:
    """Cut a clip into the chunks of a stream."""
    starts = AV((0, *range(1, 146, 24)), (0, *range(160, 96_161, 16_000)))
    parts = clip.map(lambda x, at: [x[a:b] for a, b in pairwise(at)], starts)
    return [Chunk(frames, samples, k, "") for k, (frames, samples) in enumerate(zip(*parts, strict=True))]


def test_prepared_passes_run_in_their_own_dtype_and_shape():
    model = tiny(dtype=torch.float32)
    bench.open_block(tiny(TINY.with_sinks(16), dtype=torch.bfloat16), RolloutConfig(window=0), GRID, 3)()
    x0 = bench.teacher_step(model, GRID, 2)()
    assert x0.map(lambda t: tuple(t.shape)) == ((1, 7, *GRID, 3), (1, 51, 5))


def test_time_is_split_without_loss():
    layer = torch.nn.Linear(64, 64)
    x = torch.randn(512, 64)
    split, again = roofline.where_time_goes(lambda: layer(x).relu(), turns=2)
    assert set(split) == set(again) == {*roofline.KINDS, roofline.OTHER_KERNELS, "Python and dispatch"}
    assert split["linear layers"] > 0 and split[roofline.OTHER_KERNELS] > 0 and split["convolutions"] == 0


def test_shares_add_up_and_rates_stand_under_their_roofs():
    x = torch.randn(512, 64)
    found = roofline.shares(roofline.where_time_goes(lambda: x @ x.T, turns=2))
    assert sum(mean for mean, _, _ in found.values()) == pytest.approx(100)
    assert all(low <= mean <= high for mean, low, high in found.values())
    splits = [{"linear layers": s, "attention": 1.0, roofline.OTHER_KERNELS: 1.0} for s in (1.0, 2.0, 3.0)]
    top = roofline.Machine({"float32": 10.0}, 6.0)
    rates = roofline.reached(Work(4e9, 3e9), splits, 4.0, top)
    assert roofline.floor_s(Work(4e9, 3e9), top) == pytest.approx(0.4 + 0.5)
    assert rates["linear layers"] == (2, 0.2) and rates["attention"] == (3, 0.5)
    assert rates["the whole pass"] == pytest.approx((1.75, 0.9 / 4))


def test_what_the_profiler_says_does_not_show(capfd):
    with roofline.silent():
        os.write(2, b"not shown")
    os.write(2, b"shown")
    assert capfd.readouterr().err == "shown"


def test_random_models_are_the_same_for_a_seed():
    config = replace(TINY, num_layers=1)
    a, b, c = (bench.random_model(config, 2, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not any(torch.equal(a[n], c[n]) for n in a if not n.endswith("norm.weight"))
    assert all(t.isfinite().all() for t in a.values())
