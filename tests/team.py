"""What the processes of a test do: stages of a tiny model, alone or together; torchrun starts this file as a script.

python tests/team.py STAGE STEPS FOLDER [nap=SECONDS] [die=RANK:STEP] [silent=RANK:STEP]
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from test_train import CAUSAL, QUICK, clips, pairs, prompts
from test_transformer import TINY

from omniforcing_lib.files import write_json, write_tensors
from omniforcing_lib.training import distributed, stage3, stages, train
from omniforcing_lib.training.distributed import DistributedContext
from omniforcing_lib.training.stage3 import DMDConfig
from omniforcing_lib.training.train import Learner, OptimConfig
from omniforcing_lib.transformer import Transformer


def model(sinks: int, seed: int = 0) -> Transformer:
    """Build the tiny model with one layer; every process draws the same weights."""
    made = Transformer(replace(TINY, num_layers=1).with_sinks(sinks))
    generator = torch.Generator().manual_seed(seed)
    for weight in made.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.15
    return made


def stage(name: str, group: DistributedContext, **changes: object) -> tuple[dict[str, Learner], train.Step]:
    """Build Stage 2 (`ode`) or Stage 3 (`forcing`) for a group of processes."""
    config = replace(QUICK, **changes)

    def learner(config: OptimConfig, sinks: int, seed: int = 0) -> Learner:
        return Learner(model(sinks, seed), config, group)

    if name == "ode":
        student = learner(config, 2)
        return {"student": student}, stages.ode_stage(student, pairs(), prompts(), CAUSAL, batch=4)
    student, critic = learner(config, 2, 1), learner(replace(config, ema=0.0), 0)
    teacher = group.shard(model(0).requires_grad_(False).eval(), amp=config.amp)
    step = stage3.SelfForcing(student, critic, teacher, clips(4), DMDConfig(ratio=4))
    return {"student": student, "critic": critic}, step


def run(
    name: str, group: DistributedContext, steps: int, folder: str | None = None, **changes: object
) -> dict[str, list[float]]:
    """Train; give the numbers of the steps that ran."""
    learners, step = stage(name, group, **changes)
    return train.fit(step, learners, steps, folder=folder, every=7, progress=False).numbers


def work(rank: int, size: int, port: int, out: str, jobs: list[tuple[str, int, str | None, dict]]) -> None:
    """Be one of `size` processes that do the jobs one after another; the first one writes their numbers."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    changes = dict(jobs[0][3])
    with distributed.joined(replicas=changes.pop("replicas", 1)) as group:
        for number, (name, steps, folder, changes) in enumerate(jobs):
            changes.pop("replicas", None)
            numbers = run(name, group, steps, folder, **changes)
            if group.is_main:
                write_json(Path(out) / f"{number}.json", numbers)


def main(name: str, steps: str, folder: str, *faults: str) -> None:
    """Train with faults; the first process writes the weights that it ends with."""
    fault = dict(text.split("=") for text in faults)
    rank = os.environ.get("RANK", "0")
    with distributed.joined() as group:
        learners, plain = stage(name, group)

        def step(i: int, generator: torch.Generator) -> train.Metrics:
            time.sleep(float(fault.get("nap", 0)))
            if fault.get("die") == f"{rank}:{i}":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault.get("silent") == f"{rank}:{i}":
                time.sleep(600)
            return plain(i, generator)

        train.fit(step, learners, int(steps), folder=folder, every=3, progress=False)
        whole = group.gather_model(learners["student"].best, torch.float32)
        if whole is not None:
            write_tensors(Path(folder) / "final.safetensors", whole.state_dict())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
