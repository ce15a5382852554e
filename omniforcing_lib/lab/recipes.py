"""How every shipped file is made, from nothing: codec, teacher, Stage 2, Stage 3.

Each function runs one stage, resumes from its working folder, and writes one file with its settings and last numbers
in the metadata. `python -m omniforcing_lib train STAGE --help` lists the options, which are the arguments here and the
fields of `Job`. Under torchrun the same command trains with all its processes.
"""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from omniforcing_lib.bounce import world
from omniforcing_lib.bounce.codecs import load_codec
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.config import MINIATURE
from omniforcing_lib.flow import Guidance
from omniforcing_lib.lab import protocol
from omniforcing_lib.layout import AV, Clock
from omniforcing_lib.rollout import Causal
from omniforcing_lib.training import dataset, distributed, plan, stages, train
from omniforcing_lib.training.dataset import Pairs, Prompts, StoredPairs, StoredPrompts
from omniforcing_lib.training.distributed import Team
from omniforcing_lib.training.train import Player, Recipe
from omniforcing_lib.transformer import Transformer, initialise
from omniforcing_lib.weights import checkpoints

MADE = "miniature"
"""`model_version` of what is trained here from nothing; a student has its teacher's."""
CODEC = str(checkpoints.DATA / "codec.safetensors")


@dataclass(frozen=True)
class Job:
    """Say what every stage wants to know: how a run runs, whatever it learns.

    Attributes:
        seed: of everything random.
        device: cpu or cuda.
        folder: where the run keeps its state and history; without one nothing is kept, and nothing goes on.
        every: steps between two checkpoints.
        minutes: after which the run ends early, with a checkpoint; 0 has no limit.
        amp: compute in bfloat16; master weights stay float32.
        accumulate: parts that each process cuts its rows of a batch into.
        checkpoint_activations: keep the inputs of blocks alone, and run the blocks again for their gradients.
        limit: gradient norm above which a step changes nothing.
        replicas: copies of the models over the processes; 1 shards over all of them.
        prompts: folder of shards with prompts and their contexts; without one those of the world.
        score: clips of the world that a finished miniature is measured on, for its file's metadata; 0 measures nothing.
        team: the processes, see `distributed.joined`.
    """

    seed: int = 0
    device: str = "cpu"
    folder: str = ""
    every: int = 500
    minutes: float = 0.0
    amp: bool = False
    accumulate: int = 1
    checkpoint_activations: bool = False
    limit: float = 1e4
    replicas: int = 1
    prompts: str = ""
    score: int = 18
    team: Team = field(default_factory=Team)

    @property
    def place(self) -> torch.device:
        """The device of this process."""
        return self.team.device if self.team.mesh else torch.device(self.device)

    def contexts(self) -> Prompts | StoredPrompts:
        """Give the prompts to train on."""
        if self.prompts:
            return StoredPrompts(self.prompts, self.place, self.team)
        return Prompts.of(TinyText(), world.prompts(), self.place)

    def load(self, model: str, sinks: int | None = None, *, frozen: bool = False) -> Transformer:
        """Load a model onto this process, or its shards onto every process."""
        return distributed.load(model, self.team, self.place, amp=self.amp, sinks=sinks, frozen=frozen)

    def player(self, model: Transformer, **recipe: object) -> Player:
        """Let a model learn as this job says."""
        how = {"amp": self.amp, "accumulate": self.accumulate, "recompute": self.checkpoint_activations}
        return Player(model, Recipe(limit=self.limit, **how, **recipe), self.team)

    def run(self, step: train.Step, players: Mapping[str, Player], steps: int, label: str) -> train.History:
        """Fit, within the limit in minutes."""
        deadline = time.monotonic() + 60 * self.minutes if self.minutes else float("inf")
        how = {"seed": self.seed, "folder": self.folder or None, "every": self.every, "label": label}
        return train.fit(step, players, steps, **how, stop=lambda: time.monotonic() > deadline)

    def save(
        self, player: Player, out: str, history: train.History, names: Sequence[str], causal: Causal | None = None, **of
    ) -> Path:
        """Write what was learnt, with its settings, the last means of the named numbers and its scores."""
        numbers = {name: round(history.mean(name), 5) for name in names if name in history.numbers}
        whole = self.team.gathered(player.best, torch.bfloat16)
        if whole is None:
            return Path(out)
        version = checkpoints.read(of["teacher"]).metadata.get("model_version", "LTX-2") if "teacher" in of else MADE
        how = {"causal": causal, "version": version}
        notes = {**of, "seed": self.seed} | numbers
        path = checkpoints.save(whole, out, notes=notes, **how)
        if self.score and version == MADE:
            checkpoints.save(whole, out, notes=notes | {"scores": protocol.brief(out, self.score)}, **how)
        return path


def teacher(
    out: str = "teacher.safetensors",
    codec: str = CODEC,
    steps: int = 20_000,
    batch: int = 16,
    clips: int = 8_192,
    seconds: int = 5,
    lr: float = 1.5e-3,
    job: Job = Job(),
) -> Path:
    """Train the bidirectional miniature LTX-2 on clips of the world by flow matching."""
    seed, place = job.seed, job.place
    data = dataset.world_clips(
        load_codec(codec, place),
        range(seed * clips, (seed + 1) * clips),
        seconds,
        device=place,
        progress=job.team.leads,
    )
    model = initialise(Transformer(MINIATURE), torch.Generator().manual_seed(seed)).to(place)
    player = job.player(model, lr=lr, steps=steps, warmup=min(500, steps // 10), ema=average(steps))
    step = stages.flow_stage(player, data, job.contexts(), batch)
    history = job.run(step, {"teacher": player}, steps, "teacher")
    settings = {"stage": "teacher", "steps": steps, "batch": batch, "clips": clips, "lr": lr}
    return job.save(player, out, history, ("video", "audio"), **settings)


def prompts(
    out: str = "prompts", lines: str = "prompts.txt", model: str = "", gemma: str = "", device: str = "cpu"
) -> Path:
    """Encode a text file, a prompt a line, by a model's own Gemma and connectors: what `--prompts` takes."""
    from omniforcing_lib.lab import companions

    names = [line.strip() for line in Path(lines).read_text(encoding="utf-8").splitlines() if line.strip()]
    text = companions.of(model, device=device, dtype="bfloat16", gemma=gemma).text
    return dataset.store_prompts(out, text, names)


def pairs(
    out: str = "pairs",
    teacher: str = "teacher",
    codec: str = CODEC,
    count: int = 512,
    layout: str = "paper",
    seconds: int = 5,
    grid: Sequence[int] = (0, 0),
    cfg: Sequence[float] = (3.0, 3.0),
    job: Job = Job(),
) -> Path:
    """Make the teacher's ODE pairs, and train nothing: what Stage 2 takes as `--pairs`."""
    causal, (clock, shape) = Causal.from_layout(layout), geometry(codec, grid)
    ode_pairs(out, teacher, job.contexts(), causal, count, clock.latents(seconds), shape, tuple(cfg), job)
    return Path(out)


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
    grid: Sequence[int] = (0, 0),
    lr: float = 5e-4,
    cfg: Sequence[float] = (3.0, 3.0),
    job: Job = Job(),
) -> Path:
    """Make the teacher causal: ODE pairs, then regression under the causal masks.

    `pairs` is a .safetensors file or a folder of shards; what is not there is made and kept there.
    """
    causal = Causal.from_layout(layout, None if sinks < 0 else sinks)
    prompts, (clock, shape) = job.contexts(), geometry(codec, grid)
    data = ode_pairs(pairs, teacher, prompts, causal, count, clock.latents(seconds), shape, tuple(cfg), job)
    model = job.load(teacher, causal.layout.sinks)
    player = job.player(model, lr=lr, steps=steps, warmup=min(100, steps // 10), ema=average(steps))
    step = stages.ode_stage(player, data, prompts, causal, batch)
    history = job.run(step, {"student": player}, steps, "stage 2")
    settings = {"stage": "stage 2", "teacher": teacher, "steps": steps, "batch": batch, "pairs": len(data), "lr": lr}
    return job.save(player, out, history, ("video", "audio"), causal, **settings)


def stage3(
    out: str = "student.safetensors",
    student: str = "stage2",
    teacher: str = "teacher",
    codec: str = CODEC,
    steps: int = 3_000,
    batch: int = 8,
    seconds: int = 5,
    grid: Sequence[int] = (0, 0),
    lr: float = 6e-5,
    critic_lr: float = 1.5e-4,
    final: float = 1.0,
    ratio: int = 5,
    cfg: Sequence[float] = (3.0, 3.0),
    job: Job = Job(),
) -> Path:
    """Distil on the student's own roll-outs: joint self-forcing DMD; `steps` counts critic steps.

    `final` is the share of both rates that a cosine decay leaves at the end.
    """
    causal = checkpoints.read(student).causal
    if causal is None:
        raise ValueError(f"{student} is no causal student (its config has no `omniforcing` part); train stage2 first")
    clock, shape = geometry(codec, grid)
    recipe = {"betas": (0.0, 0.999), "warmup": 10, "steps": steps, "final": final}
    player = job.player(job.load(student), lr=lr, ema=average(steps // ratio, 1 / 4), **recipe)
    critic = job.player(job.load(teacher), lr=critic_lr, ema=0.0, **recipe)
    how = {"guidance": Guidance(cfg=AV(*cfg)), "ratio": ratio}
    frames = clock.latents(seconds).video
    step = stages.self_forcing_stage(
        player, critic, job.load(teacher, frozen=True), job.contexts(), causal, shape, frames, batch, **how
    )
    history = job.run(step, {"student": player, "critic": critic}, steps, "stage 3")
    settings = {"stage": "stage 3", "teacher": teacher, "steps": steps, "batch": batch, "cfg": list(cfg)}
    settings |= {"lr": lr, "critic_lr": critic_lr, "final": final}
    return job.save(
        player, out, history, ("dmd_video", "dmd_audio", "critic_video", "critic_audio"), causal, **settings
    )


def codec(out: str = "codec.safetensors", steps: int = 4_000, seed: int = 0, device: str = "cpu") -> Path:
    """Train the codec on clips of the world."""
    from omniforcing_lib.bounce.codecs import save_codec
    from omniforcing_lib.training.train_codec import train_codec

    return save_codec(train_codec(seed=seed, steps=steps, device=device), out)


def geometry(codec: str, grid: Sequence[int]) -> tuple[Clock, tuple[int, int]]:
    """Give the clock and the tokens of a video frame: the codec's, or LTX-2's clock with a `grid` that is given."""
    if any(grid):
        return Clock(), tuple(grid)
    world_codec = load_codec(codec)
    return world_codec.clock, world_codec.grid


def ode_pairs(
    path: str,
    teacher: str,
    prompts: Prompts | StoredPrompts,
    causal: Causal,
    count: int,
    latents: AV[int],
    grid: tuple[int, int],
    cfg: tuple[float, float],
    job: Job,
) -> Pairs | StoredPairs:
    """Read ODE pairs from a file or a folder of shards, or make them (and keep them there if a path is given).

    Every process of a team makes its own shards with a teacher of its own, in bfloat16 with `amp`.

    Raises:
        ValueError: a team has no folder to share out the work over.
    """
    file = path.endswith(".safetensors")
    if file and Path(path).exists():
        return Pairs.load(path, job.place)
    if path and not file and (Path(path) / "index.json").exists():
        return StoredPairs(path, job.place, job.team)
    if job.team.mesh and (file or not path):
        raise ValueError(f"several processes share out their ODE pairs in a folder: give --pairs one, found {path!r}")
    dtype = torch.bfloat16 if job.amp and path and not file else torch.float32
    model = checkpoints.load(teacher, device=job.place, dtype=dtype)
    seeds, guidance = range(job.seed * count, (job.seed + 1) * count), Guidance(cfg=AV(*cfg))

    def make(rows: range) -> Pairs:
        how = {"first": rows.start, "progress": file or not path}  # shards have a bar of their own
        some = seeds[rows.start : rows.stop]
        # contexts may be wider than the weights
        with torch.autocast(job.place.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            return dataset.ode_pairs(model, prompts, guidance, causal.steps, some, latents, grid, **how)

    if not path or file:
        made = make(range(count))
        if path:
            made.save(path, prompts.names)
        return made
    notes = {"teacher": Path(teacher).name, "cfg": list(cfg), "seed": job.seed, "grid": list(grid)}
    notes |= {"steps": list(causal.steps), "sigmas": causal.sigmas.float().tolist(), "latents": list(latents)}
    return StoredPairs(dataset.store_pairs(path, make, count, notes, team=job.team), job.place, job.team)


def average(steps: int, share: float = 1 / 20) -> float:
    """Choose the decay of the average so that it spans about the last `share` of a run."""
    return max(0.9, min(0.9995, 1 - 1 / max(1, share * steps)))


STAGES = {
    "codec": codec,
    "teacher": teacher,
    "prompts": prompts,
    "pairs": pairs,
    "stage2": stage2,
    "stage3": stage3,
    "plan": plan.plan,
}


def main(argv: Sequence[str]) -> Path | str:
    """Run a stage from the command line; every argument of its function, and every field of `Job`, is an option."""
    stage, *rest = argv
    function = STAGES[stage]
    parser = argparse.ArgumentParser(prog=f"omniforcing train {stage}", description=function.__doc__)
    own = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    shared = {f.name: f.default for f in fields(Job) if f.name != "team"} if own.pop("job", None) else {}
    for name, default in (own | shared).items():
        _add(parser, f"--{name.replace('_', '-')}", default)
    given = vars(parser.parse_args(rest))
    if not shared:
        made = function(**given)
        print(made)
        return made
    with distributed.joined(given["device"], replicas=given["replicas"]) as team:
        job = Job(**{name: given[name] for name in shared}, team=team)
        made = function(**{name: given[name] for name in own}, job=job)
        if team.leads:
            print(made)
    return made


def _add(parser: argparse.ArgumentParser, option: str, default: object) -> None:
    if isinstance(default, bool):
        parser.add_argument(option, action=argparse.BooleanOptionalAction, default=default)
    elif isinstance(default, tuple):
        pair = len(default) == 2
        parser.add_argument(option, nargs=2 if pair else "+", type=type(default[0]), default=default)
    else:
        parser.add_argument(option, type=type(default), default=default, help=f"default {default!r}")
