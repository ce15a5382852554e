"""How every shipped file is made, from nothing: codec, teacher, Stage 2, Stage 3.

Each function runs one stage, resumes from its working folder, and writes one file with its settings and last numbers
in the metadata. `python -m omniforcing_lib train STAGE --help` lists the options, which are the arguments here.
"""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from omniforcing_lib import checkpoints, dataset, train, world
from omniforcing_lib.codecs import TinyCodec, load_codec
from omniforcing_lib.config import MINIATURE
from omniforcing_lib.dataset import Pairs, Prompts
from omniforcing_lib.flow import Guidance
from omniforcing_lib.layout import AV
from omniforcing_lib.rollout import Causal
from omniforcing_lib.text import TinyText
from omniforcing_lib.transformer import Transformer, initialise

CODEC = str(checkpoints.DATA / "codec.safetensors")


def teacher(
    out: str = "teacher.safetensors",
    codec: str = CODEC,
    steps: int = 20_000,
    batch: int = 16,
    clips: int = 8_192,
    seconds: int = 5,
    lr: float = 1.5e-3,
    seed: int = 0,
    device: str = "cpu",
    folder: str = "",
    minutes: float = 0.0,
    amp: bool = False,
) -> Path:
    """Train the bidirectional miniature LTX-2 on clips of the world by flow matching."""
    data = dataset.world_clips(
        load_codec(codec, device), range(seed * clips, (seed + 1) * clips), seconds, device=device
    )
    prompts = Prompts.of(TinyText(), world.prompts(), device)
    model = initialise(Transformer(MINIATURE), torch.Generator().manual_seed(seed)).to(device)
    recipe = train.Recipe(lr=lr, steps=steps, warmup=min(500, steps // 10), ema=average(steps), amp=amp)
    player = train.Player(model, recipe)
    step = train.flow_stage(player, data, prompts, batch)
    history = run(step, {"teacher": player}, steps, seed, folder, minutes, "teacher")
    settings = {"stage": "teacher", "steps": steps, "batch": batch, "clips": clips, "lr": lr, "seed": seed}
    return checkpoints.save(player.best, out, notes=settings | last(history, "video", "audio"))


def stage2(
    out: str = "stage2.safetensors",
    teacher: str = "teacher",
    codec: str = CODEC,
    pairs: str = "",
    count: int = 512,
    layout: str = "paper",
    sinks: int = -1,
    steps: int = 1_500,
    batch: int = 8,
    seconds: int = 5,
    lr: float = 5e-4,
    cfg: Sequence[float] = (3.0, 3.0),
    seed: int = 0,
    device: str = "cpu",
    folder: str = "",
    minutes: float = 0.0,
    amp: bool = False,
) -> Path:
    """Make the teacher causal: ODE pairs, then regression under the causal masks."""
    world_codec = load_codec(codec, device)
    causal = Causal.from_layout(layout, None if sinks < 0 else sinks)
    prompts = Prompts.of(TinyText(), world.prompts(), device)
    data = ode_pairs(pairs, teacher, world_codec, prompts, causal, count, seconds, tuple(cfg), seed, device)
    model = checkpoints.load(teacher, device=device, sinks=causal.layout.sinks)
    recipe = train.Recipe(lr=lr, steps=steps, warmup=min(100, steps // 10), ema=average(steps), amp=amp)
    player = train.Player(model, recipe)
    step = train.ode_stage(player, data, prompts, causal, batch)
    history = run(step, {"student": player}, steps, seed, folder, minutes, "stage 2")
    settings = {"stage": "stage 2", "steps": steps, "batch": batch, "pairs": len(data), "lr": lr, "seed": seed}
    return checkpoints.save(player.best, out, causal=causal, notes=settings | last(history, "video", "audio"))


def stage3(
    out: str = "student.safetensors",
    student: str = "stage2",
    teacher: str = "teacher",
    codec: str = CODEC,
    steps: int = 3_000,
    batch: int = 8,
    seconds: int = 5,
    lr: float = 1e-4,
    critic_lr: float = 1e-4,
    ratio: int = 5,
    cfg: Sequence[float] = (3.0, 3.0),
    seed: int = 0,
    device: str = "cpu",
    folder: str = "",
    minutes: float = 0.0,
    amp: bool = False,
) -> Path:
    """Distil on the student's own roll-outs: joint self-forcing DMD; `steps` counts critic steps."""
    world_codec = load_codec(codec, device)
    causal = checkpoints.read(student).causal
    if causal is None:
        raise ValueError(f"{student} is no causal student (its config has no `omniforcing` part); train stage2 first")
    prompts = Prompts.of(TinyText(), world.prompts(), device)
    updates = steps // ratio
    recipe = train.Recipe(lr=lr, betas=(0.0, 0.999), warmup=10, ema=min(0.99, average(updates)), amp=amp)
    player = train.Player(checkpoints.load(student, device=device), recipe)
    critic_recipe = train.Recipe(lr=critic_lr, betas=(0.0, 0.999), warmup=10, ema=0.0, amp=amp)
    critic = train.Player(checkpoints.load(teacher, device=device), critic_recipe)
    real = checkpoints.load(teacher, device=device)
    latents, guidance = world_codec.clock.latents(seconds), Guidance(cfg=AV(*cfg))
    step = train.self_forcing_stage(
        player, critic, real, prompts, causal, world_codec.grid, latents.video, batch, guidance=guidance, ratio=ratio
    )
    history = run(step, {"student": player, "critic": critic}, steps, seed, folder, minutes, "stage 3")
    settings = {"stage": "stage 3", "steps": steps, "batch": batch, "lr": lr, "seed": seed, "cfg": list(cfg)}
    numbers = last(history, "dmd_video", "dmd_audio", "critic_video", "critic_audio")
    return checkpoints.save(player.best, out, causal=causal, notes=settings | numbers)


def codec(out: str = "codec.safetensors", steps: int = 4_000, seed: int = 0, device: str = "cpu") -> Path:
    """Train the codec on clips of the world."""
    from omniforcing_lib.codecs import save_codec
    from omniforcing_lib.train_codec import train_codec

    return save_codec(train_codec(seed=seed, steps=steps, device=device), out)


def ode_pairs(
    path: str,
    teacher: str,
    codec: TinyCodec,
    prompts: Prompts,
    causal: Causal,
    count: int,
    seconds: int,
    cfg: tuple[float, float],
    seed: int,
    device: str,
) -> Pairs:
    """Read ODE pairs from a file, or make them (and keep them there if a path is given)."""
    if path and Path(path).exists():
        return Pairs.load(path, device)
    made = dataset.ode_pairs(
        checkpoints.load(teacher, device=device),
        prompts,
        Guidance(cfg=AV(*cfg)),
        causal.steps,
        range(seed * count, (seed + 1) * count),
        codec.clock.latents(seconds),
        codec.grid,
    )
    if path:
        made.save(path, prompts.names)
    return made


def average(steps: int) -> float:
    """Choose the decay of the average so that it spans about the last twentieth of a run."""
    return max(0.9, min(0.9995, 1 - 20 / max(1, steps)))


def run(step, players, steps, seed, folder, minutes, label) -> train.History:
    """Fit with an optional working folder and an optional limit in minutes."""
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    return train.fit(
        step, players, steps, seed=seed, folder=folder or None, label=label, stop=lambda: time.monotonic() > deadline
    )


def last(history: train.History, *names: str) -> dict[str, float]:
    """Last means of the named numbers, for a file's metadata."""
    return {name: round(history.mean(name), 5) for name in names if name in history.numbers}


STAGES = {"codec": codec, "teacher": teacher, "stage2": stage2, "stage3": stage3}


def main(argv: Sequence[str]) -> Path:
    """Run a stage from the command line; every argument of its function is an option."""
    stage, *rest = argv
    function = STAGES[stage]
    parser = argparse.ArgumentParser(prog=f"omniforcing train {stage}", description=function.__doc__)
    for name, parameter in inspect.signature(function).parameters.items():
        option = f"--{name.replace('_', '-')}"
        default = parameter.default
        if isinstance(default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=default)
        elif isinstance(default, tuple):
            parser.add_argument(option, nargs=len(default), type=type(default[0]), default=default)
        else:
            parser.add_argument(option, type=type(default), default=default, help=f"default {default!r}")
    path = function(**vars(parser.parse_args(rest)))
    print(path)
    return path
