"""Laws of the ablations: each arm changes what it says, runs go on where they stopped, tables pool what was run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from omniforcing_lib.bounce import world
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.lab import ablations, distill
from omniforcing_lib.lab.ablations import ARMS, Budget
from omniforcing_lib.lab.anatomy import encoded
from omniforcing_lib.layout import AV, PAPER
from omniforcing_lib.live import stream
from omniforcing_lib.rollout import Causal
from omniforcing_lib.training.dataset import Prompts
from omniforcing_lib.weights import checkpoints

CAUSAL = Causal(PAPER)


@pytest.fixture(scope="module")
def codec():
    return stream.shipped_codec()


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
    whole, seen = encoded(codec, [clip]), {}

    def blocks(student, causal, text, noise, grid, video_latents, *, exit_step):
        for k, block in enumerate(PAPER.blocks(video_latents)):
            seen[k] = torch.is_grad_enabled()
            yield whole.map(lambda x, span: x[:, span.start : span.stop], block)

    monkeypatch.setattr(ablations, "rollout", blocks)
    starts = set()
    for seed in range(12):
        seen.clear()
        sample = ablations.late_windows(codec, prompts, CAUSAL, codec.clock.latents(5).video, 1, late=2)
        _, window = sample(None, torch.Generator().manual_seed(seed), 0)
        start = len(seen) - 6
        starts.add(start)
        assert [seen[k] for k in sorted(seen)] == [k > start or not start for k in range(start + 6)]
        there = encoded(codec, [cut(codec, clip, start, 5)]) if start else whole
        there = there.map(lambda x, n: x[:, :n], codec.clock.latents(5))
        assert window.map(torch.Tensor.size) == there.map(torch.Tensor.size)
        torch.testing.assert_close(window.video[:, 1:], there.video[:, 1:], atol=1e-4, rtol=0)
        assert rms(window.audio, there.audio) < 0.1
    assert starts == {0, 1, 2}


def test_a_true_past_is_the_teachers_clip_of_the_same_prompt(codec, prompts, pairs, monkeypatch):
    told = {}

    def blocks(student, causal, text, noise, grid, video_latents, *, exit_step, history):
        told.update(text=text, history=history, frames=video_latents)
        yield history

    monkeypatch.setattr(ablations, "rollout", blocks)
    pairs = replace(pairs, prompt=pairs.prompt.flip(0))
    sample = ablations.true_past(pairs, prompts, CAUSAL, codec.grid, 3)
    text, made = sample(None, torch.Generator().manual_seed(1), 0)
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
        hits = rng.integers(5, 9, self.budget.clips) - 4 * (arm is ARMS["true past"])
        counts = {name: [[int(hit), 10] for hit in hits] for name in ablations.MEASURES}
        return {"counts": counts, "frechet": {"video": 10.0 + seed, "audio": 1.0}}


def test_runs_go_on_where_they_stopped_and_tables_pool_them(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "_Bench", FakeBench)
    arms, budget = ("Stage 2", "Stage 3", "true past"), Budget(clips=12)
    ablations.run(tmp_path, arms=arms, seeds=1, budget=budget)
    ablations.run(tmp_path, arms=arms, seeds=2, budget=budget)
    assert FakeBench.trials == 6 == len([*tmp_path.glob("*.json")])
    table, gains = ablations.table(tmp_path), ablations.gains(tmp_path)
    assert [*table] == [*arms] and [*gains] == ["Stage 2", "true past"]
    assert table["Stage 3"]["frechet, video"] == (10.5, 10.0, 11.0)
    assert gains["Stage 2"]["sync_f1"] == (0, 0, 0)
    assert gains["true past"]["sync_f1"] == pytest.approx((-0.4, -0.4, -0.4))


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
        ablations.table(tmp_path / "none")


def test_every_arm_differs_from_the_papers_recipe_in_one_field():
    plain = vars(ablations.Arm())
    for name, arm in ARMS.items():
        changed = [field for field, value in vars(arm).items() if value != plain[field]]
        assert len(changed) == {"Stage 3": 0, "Stage 2, as long": 2}.get(name, 1), name
        Causal(**arm.causal)
