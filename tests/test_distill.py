"""Laws of what notebook 04 shows of the stages: levels by block, gradients where they belong, honest tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from omniforcing_lib.bounce import codecs, distributions, world
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.layout import AV, PAPER, RELEASED, BlockLayout
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.training.dataset import Pairs, Prompts
from omniforcing_lib.training.train import History
from studies import distill

SMALL = BlockLayout(AV(1, 1), AV(3, 10), sinks=3)


@pytest.fixture(scope="module")
def prompts():
    return Prompts.of(TinyText(), world.prompts())


@pytest.mark.parametrize("layout", [PAPER, RELEASED, SMALL], ids=["paper", "released", "small"])
def test_levels_by_block_have_no_strangers_and_levels_by_ratio_do(layout):
    frames = 16
    level = torch.rand(2, layout.count(frames), generator=torch.Generator().manual_seed(0))
    right = layout.block_index(frames).map(lambda index: level[:, index])
    assert distill.out_of_block([right, right], layout) == 0
    ruled = distill.by_ratio(layout, frames)
    misplaced = [
        a for a, (rule, block) in enumerate(zip(ruled, layout.block_index(frames).audio, strict=True)) if rule != block
    ]
    assert distill.out_of_block([AV(right.video, level[:, ruled])], layout) == 2 * len(misplaced) > 0
    late = [*range(26, 32), *range(51, 55), *range(76, 79), 101]
    assert misplaced == {PAPER: [*range(1, 8), *late], RELEASED: late}.get(layout, misplaced)


@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_gradients_flow_through_the_exit_step_alone(prompts, exit_step):
    """Each block learns through its own noise of the exit step; every parameter, text and sinks included, learns."""
    model = checkpoints.load("stage2")
    causal = checkpoints.read("stage2").causal
    flow = distill.gradient_flow(model, causal, prompts, (4, 4), 2, exit_step)
    assert flow.sources == tuple(frozenset({(k, exit_step)}) for k in range(3))
    assert flow.silent == () and flow.text[0] == flow.text[1] > 0
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_the_loss_of_a_state_that_is_known_is_its_distance(prompts):
    """A model that predicts no velocity leaves states as they are: its loss is how far they are from the end."""
    causal = checkpoints.read("stage2").causal
    pairs = distill.teacher_pairs("", codecs.shipped_codec(), prompts, causal, 4)
    model = checkpoints.load("teacher", sinks=16)
    for name in ("proj_out", "audio_proj_out"):
        for p in getattr(model, name).parameters():
            p.zero_()
    loss, far = distill.regression_loss(model, pairs, prompts, causal, batch=4), distill.to_go(pairs)
    assert all(f[2] ** 2 * 0.8 < value < f[0] ** 2 * 1.2 for value, f in zip(loss, far, strict=True))
    assert all((f[:-1] > f[1:]).all() and f[-1] == 0 for f in far)


def test_more_pairs_than_are_stored_are_the_stored_ones_and_fresh_ones(prompts, monkeypatch):
    """The prompts go on in turn, and no noise is drawn twice."""
    causal, codec = checkpoints.read("stage2").causal, codecs.shipped_codec()
    stored = distill.teacher_pairs("", codec, prompts, causal, 90)

    def fresh(teacher, prompts, guidance, step_list, seeds, *, first, **sizes):
        index = torch.arange(first, first + len(seeds)) % len(prompts)
        return Pairs(stored.states.map(lambda s: -s[: len(seeds)]), stored.sigmas, index)

    monkeypatch.setattr(distill.dataset, "ode_pairs", fresh)
    pairs = distill.teacher_pairs("", codec, prompts, causal, 95)
    assert pairs.prompt.tolist() == [i % 18 for i in range(95)]
    for all_states, old in zip(pairs.states, stored.states, strict=True):
        assert torch.equal(all_states[:90], old) and torch.equal(all_states[90:], -old[:5])


def test_stored_pairs_of_other_levels_are_refused(prompts):
    causal = replace(checkpoints.read("stage2").causal, steps=(1000, 909, 725, 421, 0))
    with pytest.raises(ValueError, match="stored pairs keep"):
        distill.teacher_pairs("", codecs.shipped_codec(), prompts, causal, 4)


def test_stored_pairs_of_other_prompts_are_refused(prompts):
    turned = Prompts.of(TinyText(), prompts.names[::-1])
    with pytest.raises(ValueError, match="stored pairs were made under other settings: prompts"):
        distill.teacher_pairs("teacher", codecs.shipped_codec(), turned, checkpoints.read("stage2").causal, 4)


def test_a_course_rises_and_falls_as_its_numbers():
    assert distill.sparkline(np.arange(7.0)) == distill.BARS
    assert distill.sparkline(np.ones(3)) == distill.BARS[0] * 3
    assert len(distill.sparkline(np.random.default_rng(0).random(500))) == 24
    rows = distill.health_rows(History({"loss": [4.0, 3.0, 2.0, 1.0, 0.5]}))
    assert rows[0]["first fifth"] == "4" and rows[0]["last fifth"] == "0.5" and rows[0]["course"].startswith("▇")


def test_ratios_compare_with_the_base():
    rng = np.random.default_rng(0)
    near, far, real = (AV(*(rng.normal(m, 1, (40, d)) for d in (15, 24))) for m in (1, 3, 0))
    assert all(r == 1 for r, _, _ in distill.frechet_ratio(real, near, near, draws=20))
    assert all(r.low > 2 for r in distill.frechet_ratio(real, far, near, draws=20))
    assert distill.distance(real, far).energy > distill.distance(real, near).energy


def test_the_interval_of_a_frechet_ratio_holds_the_truth_near_the_floor():
    """The mean of many ratios lies in half of the intervals or more, and in a fifth of those of a bootstrap."""
    rng = np.random.default_rng(0)

    def three() -> tuple[np.ndarray, ...]:
        return tuple(rng.normal(mean, 1, (54, 15)) for mean in (0, 0.5, 0))

    def ratio(real: np.ndarray, other: np.ndarray, base: np.ndarray) -> float:
        return distributions.frechet(real, other) / distributions.frechet(real, base)

    truth, inside = np.mean([ratio(*three()) for _ in range(200)]), []
    for sets in [three() for _ in range(20)]:
        whole, few = distill.frechet_ratio(*(AV(x, x[:, :2]) for x in sets), draws=40)
        inside.append(whole.low <= truth <= whole.high)
        assert whole.mean == pytest.approx(ratio(*sets)) and 0 < few.low <= few.mean <= few.high
    assert np.mean(inside) >= 0.5
