"""Laws of the memory plan: a dry run counts what a real one holds and keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import CAUSAL, GRID, new_learner
from test_transformer import TINY

from omniforcing_lib.config import ModelConfig
from omniforcing_lib.layout import AV
from omniforcing_lib.rollout import RolloutConfig, fresh_noise, new_cache, rollout
from omniforcing_lib.training import plan, recipes

CLIP = plan.Clip(batch=2, seconds=1, grid=GRID, text=4)


def test_two_layers_tell_what_three_keep():
    config = replace(TINY, num_layers=3)
    whole = plan.dry_run(config, CAUSAL, CLIP, torch.float32)
    counted = plan.count(config, CAUSAL, CLIP, torch.float32)
    assert counted.parameters == whole.parameters and counted.kept == whole.kept and counted.cache == whole.cache
    assert all(a > b for a, b in zip(counted.inputs, whole.inputs, strict=True))


def test_a_dry_run_keeps_what_a_real_one_keeps():
    """Bytes that autograd saves in a roll-out, and bytes of the cache."""
    counted = plan.dry_run(TINY, CAUSAL, CLIP, torch.float32)
    model = new_learner().model
    frames = model.clock.latents(CLIP.seconds).video
    text = AV(torch.randn(2, 4, 6), torch.randn(2, 4, 6))
    with plan._saving(model) as found:
        blocks = [*rollout(model, CAUSAL, text, fresh_noise(torch.Generator(), 2), GRID, frames, exit_step=0)]
    assert found() == (counted.kept[0], counted.inputs[0])
    assert new_cache(model, CAUSAL, GRID, 2, len(blocks)).nbytes == counted.cache


def test_components_are_what_a_player_holds():
    counted, learner = plan.count(TINY, CAUSAL, CLIP, torch.float32), new_learner()
    learner.update(learner.model.proj_out.weight.sum() + sum(p.sum() for p in learner.model.parameters()))
    parts, held = plan.components(counted, 1, amp=False), learner.state_dict()
    size = {name: sum(v.nbytes for k, v in held.items() if k.startswith(name)) for name in ("model.", "average.")}
    assert size["model."] == parts["generator: weights, fp32"] == parts["generator: gradients, fp32"]
    assert size["average."] == parts["generator: average"]
    assert sum(v.nbytes for k, v in held.items() if "exp_avg" in k) == parts["generator: AdamW"]


def test_the_19b_needs_what_its_makers_used():
    """Its parameters are those of specification 1.1; with blocks recomputed it fits 8 GPUs of 141 GB, not of 80."""
    counted = plan.count(ModelConfig(), RolloutConfig(), plan.Clip())
    assert counted.parameters[1] == pytest.approx(18.88e9, rel=2e-3)
    total = {n: sum(plan.components(counted, n).values()) for n in (1, 8, 16)}
    assert total[16] < plan.BOARDS["80 GB"] < total[8] < plan.BOARDS["141 GB"] < total[1]
    assert sum(plan.components(counted, 8, recompute=False).values()) > plan.BOARDS["192 GB"]
    page = (Path(__file__).parents[1] / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert "Distillation takes 8 GPUs of 141 GB, or 16 of 80 GB" in page


def test_the_plan_is_a_stage_of_the_command_line(capsys):
    recipes.main(*"plan --model teacher --grid 4 4 --text 6 --gpus 1 2 4".split())
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-6:] == ["1", "GPU", "2", "GPUs", "4", "GPUs"]
    assert any(line.startswith("fits 80 GB, activations kept") and line.endswith("yes") for line in lines)
