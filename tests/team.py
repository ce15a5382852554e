"""What the processes of a test run: a tiny model's stages in a team; also the script that torchrun starts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from test_train import CAUSAL, FRAMES, GRID, QUICK, pairs, player, prompts

from omniforcing_lib import distributed, train
from omniforcing_lib.distributed import Team
from omniforcing_lib.files import write_json
from omniforcing_lib.train import Player, Recipe


def stage(name: str, team: Team, *, batch: int = 4, **changes: object) -> tuple[dict[str, Player], train.Step]:
    """Build Stage 2 or 3 of the tiny model for a team; every process draws the same weights."""
    recipe = replace(QUICK, **changes)

    def learner(recipe: Recipe, **how: int) -> Player:
        return Player(player(**how).model, recipe, team)

    if name == "ode":
        student = learner(recipe)
        return {"student": student}, train.ode_stage(student, pairs(), prompts(), CAUSAL, batch)
    student, critic = learner(recipe, seed=1), learner(replace(recipe, ema=0.0), sinks=0)
    teacher = team.shard(player(sinks=0).model.requires_grad_(False).eval(), amp=recipe.amp)
    step = train.self_forcing_stage(student, critic, teacher, prompts(), CAUSAL, GRID, FRAMES, batch, ratio=2)
    return {"student": student, "critic": critic}, step


def run(name: str, team: Team, steps: int, folder: str | None = None, **changes: object) -> dict[str, list[float]]:
    players, step = stage(name, team, **changes)
    return train.fit(step, players, steps, folder=folder, every=7, progress=False).numbers


def weights(name: str, team: Team, steps: int, folder: str) -> dict[str, torch.Tensor]:
    players, step = stage(name, team)
    train.fit(step, players, steps, folder=folder, every=7, progress=False)
    whole = team.gathered(players["student"].best, torch.float32)
    return {} if whole is None else dict(whole.state_dict())


def work(rank: int, size: int, port: int, out: str, jobs: list[tuple]) -> None:
    """Be one of `size` processes that do the jobs; the first one writes what they give."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    with distributed.joined() as team:
        for number, (name, steps, folder, changes) in enumerate(jobs):
            numbers = run(name, team, steps, folder, **changes)
            if team.leads:
                write_json(Path(out) / f"{size}-{number}.json", numbers)
