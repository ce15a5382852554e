"""Laws of the ablations: each arm changes what it says, runs go on where they stopped, tables pool what was run."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from omniforcing_lib.bounce import codecs, world
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.layout import AV, PAPER
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.training import stage3
from omniforcing_lib.training.dataset import Prompts
from omniforcing_lib.training.distributed import MicroBatch
from series import verdicts
from studies import ablations, distill, store
from studies.ablations import ARMS, Budget
from studies.anatomy import encoded

CAUSAL = RolloutConfig(PAPER)


@pytest.fixture(scope="module")
def codec():
    return codecs.shipped_codec()


@pytest.fixture(scope="module")
def prompts():
    return Prompts.of(TinyText(), world.prompts())


@pytest.fixture(scope="module")
def pairs(codec, prompts):
    return distill.teacher_pairs("", codec, prompts, checkpoints.read("stage2").causal, 8)


@pytest.fixture(scope="module")
def clip():
    return world.render(world.scene(world.HELD_OUT + 3), seconds=7)


def cut(codec, clip, k: int, seconds: int) -> AV[np.ndarray]:
    """Cut the clip that starts with the last frame and hop of block k."""
    block = PAPER.block(k)
    frame, sample = codec.clock.frames(block.video).stop - 1, codec.clock.samples(block.audio).stop - codec.clock.hop
    return AV(
        clip.video[frame : frame + 24 * seconds + 1],
        clip.audio[sample : sample + 16_000 * seconds + codec.clock.hop],
    )


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt())


@pytest.mark.parametrize("k", [1, 3])
def test_a_clip_that_starts_at_a_block_begins_with_its_opening(codec, clip, k):
    whole, there = encoded(codec, [clip]), encoded(codec, [cut(codec, clip, k, 1)])
    block = whole.map(lambda x, span: x[:, span.start : span.stop], PAPER.block(k))
    opening = ablations.opening(codec, PAPER, k, block)
    for made, true, late in zip(opening, there, block, strict=True):
        assert made.shape == true[:, :1].shape
        assert rms(made, true[:, :1]) < 0.5 < rms(late[:, -1:], true[:, :1])
    assert rms(opening.video, there.video[:, :1]) < 0.05


def test_a_late_window_of_a_true_clip_is_the_true_clip_that_starts_there(codec, prompts, clip, monkeypatch):
    """Blocks of a true clip stand in for the student's; what lies before the window is made without gradients."""
    whole, seen, what = encoded(codec, [clip]), {}, (prompts, CAUSAL, codec.grid)

    def blocks(student, causal, text, noise, grid, video_latents, *, exit_step):
        for k, block in enumerate(PAPER.blocks(video_latents)):
            seen[k] = torch.is_grad_enabled()
            yield whole.map(lambda x, span: x[:, span.start : span.stop], block)

    monkeypatch.setattr(ablations, "rollout", blocks)
    starts = set()
    for seed in range(12):
        seen.clear()
        clips = ablations.LateWindows(*what, codec.clock.latents(5).video, 1, codec=codec, late=2)
        _, window = clips.sample(None, torch.Generator().manual_seed(seed), 0, MicroBatch(1, slice(0, 1)))
        start = len(seen) - 6
        starts.add(start)
        assert [seen[k] for k in sorted(seen)] == [k > start or not start for k in range(start + 6)]
        there = encoded(codec, [cut(codec, clip, start, 5)]) if start else whole
        there = there.map(lambda x, n: x[:, :n], codec.clock.latents(5))
        assert window.map(torch.Tensor.size) == there.map(torch.Tensor.size)
        torch.testing.assert_close(window.video[:, 1:], there.video[:, 1:], atol=1e-4, rtol=0)
        assert rms(window.audio, there.audio) < 0.1
    assert starts == {0, 1, 2}
    with pytest.raises(ValueError, match="no state of its opening"):
        clips.sample(None, torch.Generator(), 0, MicroBatch(1, slice(0, 1)), watch=print)


def test_a_true_past_is_the_teachers_clip_of_the_same_prompt(codec, prompts, pairs, monkeypatch):
    told = {}

    def blocks(student, causal, text, noise, grid, video_latents, *, exit_step, history, watch):
        told.update(text=text, history=history, frames=video_latents)
        yield history

    monkeypatch.setattr(stage3, "rollout", blocks)
    pairs = replace(pairs, prompt=pairs.prompt.flip(0))
    clips = ablations.ClipsOnTruePast(prompts, CAUSAL, codec.grid, 16, 3, pairs=pairs)
    text, made = clips.sample(None, torch.Generator().manual_seed(1), 0, MicroBatch(3, slice(0, 3)))
    assert told["frames"] == 16 and made.video is not told["history"].video
    for clip, row in zip(told["history"].video, text.video, strict=True):
        (index,) = [i for i, end in enumerate(distill.ends(pairs).video) if torch.equal(end, clip)]
        assert torch.equal(row, prompts.context.video[pairs.prompt[index]])


def test_noised_pairs_keep_the_clip_and_forget_the_trajectory(pairs):
    noised = ablations.noised_pairs(pairs)
    for states, ends in zip(noised.states, distill.ends(pairs), strict=True):
        assert torch.equal(states[:, -1], ends)
        for k, sigma in enumerate(pairs.sigmas.tolist()):
            share = float((states[:, k] * ends).mean() / ends.square().mean())
            assert share == pytest.approx(1 - sigma, abs=0.03)
            assert float((states[:, k] - (1 - sigma) * ends).std()) == pytest.approx(sigma, abs=0.03)


class FakeBench:
    """Count trials; measure the same for every arm but one."""

    trials = 0

    def __init__(self, teacher: str, budget: Budget) -> None:
        self.budget = budget

    def trial(self, arm: ablations.Arm, seed: int) -> dict[str, object]:
        FakeBench.trials += 1
        rng = np.random.default_rng(seed)
        hits = rng.integers(5, 9, self.budget.clips) - (4 + seed) * (arm is ARMS["true past"])
        counts = {name: [[int(hit), 10] for hit in hits] for name in ablations.MEASURES}
        return {"counts": counts, "frechet": {"video": 10.0 + seed, "audio": 1.0}}


def test_runs_go_on_where_they_stopped_and_tables_pool_them(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "_Bench", FakeBench)
    arms, budget = ("Stage 2", "Stage 3", "true past"), Budget(clips=12)
    ablations.run(tmp_path, arms=arms, seeds=1, budget=budget)
    ablations.run(tmp_path, arms=arms, seeds=2, budget=budget)
    assert FakeBench.trials == 6 == len([*tmp_path.glob("*.json")])
    table, gains = ablations.TRIALS.table(tmp_path), ablations.TRIALS.gains(tmp_path, ablations.BASE)
    assert [*table] == [*arms] and [*gains] == ["Stage 2", "true past"]
    assert table["Stage 3"]["frechet, video"] == store.over_seeds([10.0, 11.0])
    assert gains["Stage 2"]["sync_f1"] == (0, (0, 0)) and gains["Stage 2"]["frechet, video"] == (0, (0, 0))


def test_the_training_seed_is_the_unit_and_arms_are_compared_at_once(tmp_path, monkeypatch):
    """A hundred clips of one training are one number; two arms beside the recipe make intervals wider."""
    monkeypatch.setattr(ablations, "_Bench", FakeBench)
    ablations.run(tmp_path, arms=("Stage 2", "Stage 3", "true past"), seeds=3, budget=Budget(clips=100))
    mean, (low, high) = ablations.TRIALS.gains(tmp_path, ablations.BASE)["true past"]["sync_f1"]
    apart = [-0.4, -0.5, -0.6]
    wanted = store.over_seeds(apart, comparisons=2)
    assert (mean, low, high) == pytest.approx((wanted[0], *wanted[1]))
    assert high - low > np.subtract(*reversed(store.over_seeds(apart)[1])) + 0.1


def test_one_training_seed_has_no_interval_and_no_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "_Bench", FakeBench)
    ablations.run(tmp_path, arms=("Stage 3", "true past"), seeds=1, budget=Budget(clips=12))
    mean, interval = ablations.TRIALS.gains(tmp_path, ablations.BASE)["true past"]["sync_f1"]
    assert mean == pytest.approx(-0.4) and interval is None
    assert verdicts.verdict(mean, interval, verdicts.at_most(0)) == verdicts.NO_POWER
    assert all(interval is None for row in ablations.TRIALS.table(tmp_path).values() for _, interval in row.values())


def test_seeds_and_arms_without_a_partner_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "_Bench", FakeBench)
    ablations.run(tmp_path, arms=("Stage 3",), seeds=1, budget=Budget(clips=12))
    ablations.run(tmp_path, arms=("true past",), seeds=2, budget=Budget(clips=12))
    assert ablations.TRIALS.gains(tmp_path, ablations.BASE)["true past"]["sync_f1"] == (pytest.approx(-0.4), None)
    (tmp_path / "Stage_3-0.json").unlink()
    assert ablations.TRIALS.gains(tmp_path, ablations.BASE) == {}


def test_every_seed_begins_with_a_stage_2_of_its_own(monkeypatch):
    """The same start for all seeds would be one training seed under many names."""
    bench = object.__new__(ablations._Bench)
    bench.teacher, bench.budget, bench.pairs, bench.prompts, bench.causal = "teacher", Budget(), "pairs", None, CAUSAL
    bench.codec = None
    bench.stage2, trained = cache(bench._stage2), []

    def stage2(course, model, pairs, *, steps):
        trained.append((pairs, steps, course.seed))
        return distill.Lesson(trained[-1], None, [])

    monkeypatch.setattr(ablations.distill.Course, "stage2", stage2)
    monkeypatch.setattr(ablations, "noised_pairs", lambda pairs, seed: f"noise {seed}")
    monkeypatch.setattr(bench, "_distil", lambda arm, student, causal, seed: student)
    monkeypatch.setattr(bench, "_judge", lambda student, causal, seed: student)
    arms = [ARMS[name] for name in ("Stage 2", "Stage 3", "noised start")]
    starts = [[bench.trial(arm, seed) for arm in arms] for seed in (0, 1)]
    assert starts == [[("pairs", 100, s), ("pairs", 100, s), (f"noise {s}", 100, s)] for s in (0, 1)]
    assert len(trained) == 4


def test_a_run_says_what_it_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "_Bench", FakeBench)
    ablations.run(tmp_path, arms=("Stage 3",), seeds=1, budget=Budget(clips=2))
    record = json.loads((tmp_path / "Stage_3-0.json").read_text())
    assert {*record["files"]} == {f"{n}.safetensors" for n in ("teacher", "codec", "ode_pairs")} and "commit" in record[
        "git"
    ]


def test_what_cannot_be_compared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "_Bench", FakeBench)
    ablations.run(tmp_path, arms=("Stage 3",), seeds=1, budget=Budget(clips=2))
    with pytest.raises(ValueError, match="use another folder"):
        ablations.run(tmp_path, budget=Budget(clips=3))
    with pytest.raises(ValueError, match=r"runs of teacher \w{16}, asked for \w{16}"):
        ablations.run(tmp_path, budget=Budget(clips=2), teacher="stage2")
    with pytest.raises(ValueError, match="unknown arms"):
        ablations.run(tmp_path, arms=("Stage 4",))
    with pytest.raises(ValueError, match="holds no runs"):
        ablations.TRIALS.table(tmp_path / "none")


def test_every_arm_differs_from_the_papers_recipe_in_one_field():
    plain = vars(ablations.Arm())
    for name, arm in ARMS.items():
        changed = [field for field, value in vars(arm).items() if value != plain[field]]
        assert len(changed) == {"Stage 3": 0, "Stage 2, as long": 2}.get(name, 1), name
        RolloutConfig(**arm.causal)
