"""How every shipped file is made, from nothing: codec, teacher, Stage 2, Stage 3.

Each function runs one stage, resumes from its working folder, and writes one file with its settings and last numbers
in the metadata. `python -m omniforcing_lib train STAGE --help` lists the options, which are the arguments here and the
fields of `TrainConfig`, each with what its docstring says. Under torchrun the same
command trains with all its processes.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from omniforcing_lib import backends, files
from omniforcing_lib.bounce import world
from omniforcing_lib.bounce.codecs import TinyCodec, load_codec
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.config import MINIATURE, ModelConfig
from omniforcing_lib.flow import Guidance
from omniforcing_lib.layout import AV, Clock
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.training import dataset, distributed, provenance, records, run_folder, stages, train
from omniforcing_lib.training import plan as memory_plan
from omniforcing_lib.training.dataset import Clips, Pairs, Prompts, StoredPairs, StoredPrompts
from omniforcing_lib.training.distributed import DistributedContext
from omniforcing_lib.training.train import Learner, OptimConfig
from omniforcing_lib.transformer import Transformer, fresh_sinks, initialise
from studies import protocol

MADE = "miniature"
"""`model_version` of what is trained here from nothing; a student has its teacher's."""
CODEC = str(files.DATA / "codec.safetensors")
FILE = ".safetensors"
MODELS, DATA = ("teacher", "student", "model"), ("codec", "pairs", "prompts")
"""Options whose content counts, and not what the file is called: checkpoints; files and folders of shards."""
ASIDE = {"team", "options", "out", "folder", "steps", "every", "minutes", "score"}
ASIDE |= {"device", "accumulate", "checkpoint_activations", "replicas"}
"""Options that a run may change on the way: where it runs, how long, in which parts; they are no settings."""
LEAST, MOST = {"score": 0, "final": 0, "rescale": 0}, {"final": 1, "rescale": 1, "seed": 2**32 - 1}
"""Bounds of numbers; of any other option the default tells: above 0, or at least a default that is not."""


@dataclass(frozen=True)
class TrainConfig:
    """Say what every stage wants to know: how a run runs, whatever it learns.

    Attributes:
        seed: seed of everything random.
        device: cpu, cuda, one GPU of several as cuda:1, or auto, a GPU if there is one.
        folder: folder of the run's state and history; without one nothing is kept, and nothing goes on.
        every: steps between two checkpoints.
        minutes: minutes after which the run ends early, with a checkpoint; 0 has no limit.
        amp: compute in bfloat16; master weights stay float32.
        accumulate: parts that each process cuts its rows of a batch into.
        checkpoint_activations: keep the inputs of blocks alone, and run the blocks again for their gradients.
        limit: gradient norm above which a step changes nothing.
        replicas: copies of the models over the processes; 1 shards over all of them.
        prompts: folder of shards with prompts and their contexts; without one those of the world.
        score: clips of the world that a finished miniature is measured on, for its file's metadata; 0 measures nothing.
        team: the processes, see `distributed.joined`.
        options: what the stage was asked for, its name among it, see `stage`.
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
    team: DistributedContext = field(default_factory=DistributedContext)
    options: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def usual(cls) -> dict[str, object]:
        """Give the default of each field that is an option."""
        return {f.name: f.default for f in fields(cls) if f.name not in ("team", "options")}

    @property
    def settings(self) -> dict[str, object]:
        """Say what the outcome depends on, by name, files and folders by content: kept with all that is made.

        Raises:
            ValueError: a file is not there, or cannot be read.
        """
        asked = {name: getattr(self, name) for name in self.usual()} | dict(self.options)
        if any(asked.get("grid", ())):
            asked.pop("codec", None)
        return {name: known(name, value) for name, value in asked.items() if name not in ASIDE}

    def check(self) -> None:
        """Refuse, before any work, what cannot be trained, and a folder whose run began under other settings."""
        if "batch" in self.options:
            self.team.parts(self.options["batch"], self.accumulate)
        asked, made = self.settings, str(self.options.get("pairs", ""))
        if made and not records.there(made):
            _check_out(made)
        if self.folder:
            files.check_folder(Path(self.folder))
            run_folder.agreeing(Path(self.folder), asked)

    @property
    def place(self) -> torch.device:
        """The device of this process."""
        return self.team.device if self.team.mesh else backends.device(self.device)

    def contexts(self) -> Prompts | StoredPrompts:
        """Give the prompts to train on."""
        if self.prompts:
            return StoredPrompts(self.prompts, self.place, self.team)
        return Prompts.of(TinyText(), world.prompts(), self.place)

    def load(self, model: str, sinks: int | None = None, *, frozen: bool = False) -> Transformer:
        """Load a model onto this process, or its shards onto every process."""
        return load_sharded(model, self.team, self.place, amp=self.amp, sinks=sinks, frozen=frozen)

    def player(self, model: Transformer, **recipe: object) -> Learner:
        """Let a model learn as this job says."""
        how = {"amp": self.amp, "accumulate": self.accumulate, "recompute": self.checkpoint_activations}
        return Learner(model, OptimConfig(limit=self.limit, **how, **recipe), self.team)

    def run(self, step: train.Step, players: Mapping[str, Learner], steps: int, label: str) -> train.History:
        """Fit, within the limit in minutes."""
        deadline = time.monotonic() + 60 * self.minutes if self.minutes else float("inf")
        how = {"seed": self.seed, "folder": self.folder or None, "every": self.every, "label": label}
        how["settings"] = self.settings
        return train.fit(step, players, steps, **how, stop=lambda: time.monotonic() > deadline)

    def save(
        self,
        player: Learner,
        out: str,
        history: train.History,
        names: Sequence[str],
        causal: RolloutConfig | None = None,
    ) -> Path:
        """Write what was learnt, with its settings, the steps taken, last means of the named numbers and its scores."""
        whole, teacher = self.team.gathered(player.best, torch.bfloat16), self.options.get("teacher")
        if whole is None:
            return Path(out)
        version = checkpoints.read(teacher).metadata.get("model_version", "LTX-2") if teacher else MADE
        how, planned = {"causal": causal, "version": version}, self.options["steps"]
        notes = self.settings | {"steps": history.done} | ({"of": planned} if planned != history.done else {})
        notes |= {"changes": history.changes} if history.changes else {}
        notes |= {name: round(history.mean(name), 5) for name in names if name in history.numbers}
        path = checkpoints.save(whole, out, notes=notes, **how)
        if self.score and version == MADE:
            checkpoints.save(whole, out, notes=notes | {"scores": protocol.brief(out, self.score)}, **how)
        return path


def known(name: str, value: object) -> object:
    """Give an option as a setting: a checkpoint, a file or a folder of shards by its content, if it is there yet.

    Raises:
        ValueError: it is not there, and no stage makes it; or it cannot be read.
    """
    if name in MODELS:
        return provenance.by_content(value, checkpoints.read(value).fingerprint)
    if name in DATA and value and (name != "pairs" or records.there(value)):
        return records.content(value)
    return value


def stage(function: Callable[..., object]) -> Callable[..., object]:
    """Let a stage begin when all that it is asked for has a meaning and can be done; then its job knows it too.

    Raises:
        ValueError: a number without a meaning, a file that is not there, a place that cannot be written.
    """
    usual = {name: p.default for name, p in inspect.signature(function).parameters.items()}

    @functools.wraps(function)
    def begun(*args: object, **given: object) -> object:
        bound = inspect.signature(function).bind(*args, **given)
        bound.apply_defaults()
        job = bound.arguments.pop("job", None)
        asked = _checked(bound.arguments, usual)
        if "out" in asked and (job is None or job.team.is_main):
            if usual["out"].endswith(FILE) and not asked["out"].endswith(FILE):
                raise ValueError(f"--out is a {FILE} file, found {asked['out']}")
            _check_out(asked["out"])
        if job is not None:
            own = _checked({name: getattr(job, name) for name in TrainConfig.usual()}, TrainConfig.usual())
            job = asked["job"] = replace(job, **own, options={"stage": function.__name__, **asked})
            job.check()
        return function(**asked)

    return begun


def _checked(asked: Mapping[str, object], usual: Mapping[str, object]) -> dict[str, object]:
    """Refuse numbers without a meaning and devices that are not there; give the paths that are meant."""
    found = {}
    for name, value in asked.items():
        numbers = value if isinstance(value, Sequence) else (value,)
        for number in numbers:
            if isinstance(number, int | float) and not isinstance(number, bool):
                _check_number(name, number, usual[name])
        if name == "grid" and any(numbers) and not all(numbers):
            raise ValueError(f"--grid is two numbers above 0, found {' '.join(map(str, numbers))}")
        value = str(backends.device(value)) if name == "device" else value
        found[name] = str(files.given(value)) if isinstance(value, str) and value.startswith("~") else value
    return found


def _check_number(name: str, number: float, usual: object) -> None:
    usual = usual[0] if isinstance(usual, Sequence) else usual
    least, most = LEAST.get(name, usual if usual <= 0 else None), MOST.get(name, math.inf)
    low = number <= 0 if least is None else number < least
    if not math.isfinite(number) or low or number > most:
        bounds = "above 0" if least is None else f"at least {least}"
        bounds += f", at most {most}" if name in MOST else ""
        raise ValueError(f"--{name.replace('_', '-')} is {bounds}, found {number}")


def _check_out(out: str) -> None:
    (files.check_file if out.endswith(FILE) else files.check_folder)(Path(out))


@stage
def teacher(
    out: str = "teacher.safetensors",
    codec: str = CODEC,
    steps: int = 20_000,
    batch: int = 16,
    clips: int = 8_192,
    seconds: int = 5,
    lr: float = 1.5e-3,
    job: TrainConfig = TrainConfig(),
) -> Path:
    """Train the bidirectional miniature LTX-2 on clips of the world by flow matching.

    Args:
        out: .safetensors file to write.
        codec: .safetensors file of the world's codec.
        steps: steps of the optimiser.
        batch: clips a step, of all processes together.
        clips: clips of the world to draw from, rendered at the start.
        seconds: length of a clip in seconds.
        lr: peak learning rate.
        job: how the run runs.
    """
    seed, place, prompts = job.seed, job.place, job.contexts()
    if tuple(prompts.names) != tuple(world.prompts()):
        raise ValueError(f"--prompts {job.prompts}: clips of the world have the world's own prompts, in its order")
    if (seed + 1) * clips > world.HELD_OUT:
        raise ValueError(f"--seed {seed} draws clips that are held out; (seed + 1) x clips is at most {world.HELD_OUT}")
    data = world_clips(
        load_codec(codec, place),
        range(seed * clips, (seed + 1) * clips),
        seconds,
        device=place,
        progress=job.team.is_main,
    )
    model = initialise(Transformer(MINIATURE), torch.Generator().manual_seed(seed)).to(place)
    player = job.player(model, lr=lr, steps=steps, warmup=min(500, steps // 10), ema=average(steps))
    step = stages.flow_stage(player, data, prompts, batch)
    history = job.run(step, {"teacher": player}, steps, "teacher")
    return job.save(player, out, history, ("video", "audio"))


@torch.no_grad()
def world_clips(
    codec: TinyCodec,
    seeds: Sequence[int],
    seconds: int,
    *,
    device: str | torch.device = "cpu",
    batch: int = 64,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> Clips:
    """Render and encode clips of the world; prompts are numbered as in `world.prompts()`."""
    codec, names = codec.to(device), world.prompts()
    latents, numbers = [], []
    for start in tqdm(range(0, len(seeds), batch), desc="rendering clips", disable=not progress, leave=False):
        scenes = [world.scene(seed) for seed in seeds[start : start + batch]]
        encoded = codec.encode(world.render_batch(scenes, seconds, device))
        latents.append(encoded.map(lambda x: x.to(dtype)))
        numbers += [names.index(f"a {s.colour} ball, {s.timbre}") for s in scenes]
    return Clips(AV(*map(torch.cat, zip(*latents, strict=True))), torch.tensor(numbers, device=device))


@stage
def prompts(
    out: str = "prompts", lines: str = "prompts.txt", model: str = "teacher", gemma: str = "", device: str = "cpu"
) -> Path:
    """Encode a text file, a prompt a line, by a model's own Gemma and connectors: what `--prompts` takes.

    Args:
        out: folder of shards to write.
        lines: text file in UTF-8, a prompt a line.
        model: teacher, or a checkpoint file, index or folder; its prompts are encoded.
        gemma: folder of Gemma 3; without one, gemma* beside the model.
        device: cpu, cuda, one GPU of several as cuda:1, or auto, a GPU if there is one.
    """
    from omniforcing_lib import model_bundle

    names = files.read_lines(lines)
    beside = model_bundle.of(model, device=device, dtype="bfloat16", gemma=gemma)
    if isinstance(beside.text, model_bundle.StandInText):
        raise ValueError(f"{beside}; training needs real ones: name a Gemma folder (--gemma)")
    if beside.has_ground_truth:
        beside.text.encode(names)  # one outside the world's grammar is refused before any is stored
    return dataset.store_prompts(out, beside.text, names)


@stage
def pairs(
    out: str = "pairs",
    teacher: str = "teacher",
    codec: str = CODEC,
    count: int = 512,
    layout: str = "paper",
    seconds: int = 5,
    grid: Sequence[int] = (0, 0),
    cfg: Sequence[float] = (3.0, 3.0),
    job: TrainConfig = TrainConfig(),
) -> Path:
    """Make the teacher's ODE pairs, and train nothing: what Stage 2 takes as `--pairs`.

    Args:
        out: folder of shards, or .safetensors file, to write; what was cut off goes on.
        teacher: teacher, or a checkpoint file, index or folder.
        codec: .safetensors file of the world's codec, for clock and grid.
        count: trajectories, prompts in turn.
        layout: blocks whose noise levels are kept: paper or released.
        seconds: length of a clip in seconds.
        grid: height and width of a video frame in tokens, on LTX-2's clock; 0 0 takes the codec's of both.
        cfg: guidance scales of video and audio.
        job: how the run runs.
    """
    causal, (clock, shape) = RolloutConfig.from_layout(layout), geometry(codec, grid)
    made = ode_pairs(out, teacher, job.contexts(), causal, count, clock.latents(seconds), shape, tuple(cfg), job)
    dataset.check_pairs(out, made, {"seed": job.seed, "amp": job.amp})
    return Path(out)


@stage
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
    job: TrainConfig = TrainConfig(),
) -> Path:
    """Make the teacher causal: ODE pairs, then regression under the causal masks.

    Args:
        out: .safetensors file to write.
        teacher: teacher, or a checkpoint file, index or folder: where the student starts, and who makes pairs.
        codec: .safetensors file of the world's codec, for clock and grid.
        pairs: .safetensors file or folder of shards; what is not there is made and kept there, if a name is given.
        count: trajectories, prompts in turn.
        layout: layout of blocks: paper or released.
        sinks: audio sink tokens; -1 takes the layout's own number.
        steps: steps of the optimiser.
        batch: clips a step, of all processes together.
        seconds: length of a clip in seconds.
        grid: height and width of a video frame in tokens, on LTX-2's clock; 0 0 takes the codec's of both.
        lr: peak learning rate.
        cfg: guidance scales of video and audio, of the pairs.
        job: how the run runs.
    """
    causal = RolloutConfig.from_layout(layout, None if sinks < 0 else sinks)
    prompts, (clock, shape) = job.contexts(), geometry(codec, grid)
    data = ode_pairs(pairs, teacher, prompts, causal, count, clock.latents(seconds), shape, tuple(cfg), job)
    model = job.load(teacher, causal.layout.sinks)
    player = job.player(model, lr=lr, steps=steps, warmup=min(100, steps // 10), ema=average(steps))
    step = stages.ode_stage(player, data, prompts, causal, batch)
    history = job.run(step, {"student": player}, steps, "stage 2")
    return job.save(player, out, history, ("video", "audio"), causal)


@stage
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
    job: TrainConfig = TrainConfig(),
) -> Path:
    """Distil on the student's own roll-outs: joint self-forcing DMD.

    Args:
        out: .safetensors file to write.
        student: stage2, student, or a checkpoint file, index or folder: where the student starts.
        teacher: teacher, or a checkpoint file, index or folder: of the scores, and where the critic starts.
        codec: .safetensors file of the world's codec, for clock and grid.
        steps: steps of the critic.
        batch: clips a step, of all processes together.
        seconds: length of a clip in seconds.
        grid: height and width of a video frame in tokens, on LTX-2's clock; 0 0 takes the codec's of both.
        lr: peak learning rate of the student.
        critic_lr: peak learning rate of the critic.
        final: share of both rates that a cosine decay leaves at the end; 1 is none.
        ratio: critic steps for each step of the student.
        cfg: guidance scales of video and audio, of the teacher's scores.
        job: how the run runs.
    """
    causal = checkpoints.student(student)
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
    return job.save(player, out, history, ("dmd_video", "dmd_audio", "critic_video", "critic_audio"), causal)


@stage
def on_policy(
    out: str = "student.safetensors",
    student: str = "stage2",
    teacher: str = "teacher",
    codec: str = CODEC,
    pairs: str = str(files.DATA / "ode_pairs.safetensors"),
    count: int = 90,
    steps: int = 100,
    batch: int = 8,
    seconds: int = 5,
    grid: Sequence[int] = (0, 0),
    lr: float = 1e-4,
    final: float = 0.05,
    stride: int = 2,
    regression: float = 0.2,
    cfg: Sequence[float] = (3.0, 3.0),
    rescale: Sequence[float] = (0.7, 0.7),
    job: TrainConfig = TrainConfig(),
) -> Path:
    """Distil on the student's own roll-outs without a critic: regress them on the teacher's ends of their states.

    Args:
        out: .safetensors file to write.
        student: stage2, student, or a checkpoint file, index or folder: where the student starts.
        teacher: teacher, or a checkpoint file, index or folder: whose ODE ends the student's states.
        codec: .safetensors file of the world's codec, for clock and grid.
        pairs: .safetensors file or folder of shards; what is not there is made and kept there, if a name is given.
        count: trajectories, prompts in turn.
        steps: steps of the student.
        batch: clips a step, of all processes together.
        seconds: length of a clip in seconds.
        grid: height and width of a video frame in tokens, on LTX-2's clock; 0 0 takes the codec's of both.
        lr: peak learning rate.
        final: share of the rate that a cosine decay leaves at the end; 1 is none.
        stride: the teacher takes every so many-th of the 40 levels of its schedule, from the student's level on.
        regression: weight of the loss on the pairs.
        cfg: guidance scales of video and audio, of the teacher and of the pairs.
        rescale: shares of the guided result, of video and audio, that take the spread of the unguided one.
        job: how the run runs.
    """
    causal, prompts = checkpoints.student(student), job.contexts()
    clock, shape = geometry(codec, grid)
    data = ode_pairs(pairs, teacher, prompts, causal, count, clock.latents(seconds), shape, tuple(cfg), job)
    recipe = {"betas": (0.9, 0.999), "warmup": 3, "steps": steps, "final": final, "ema": average(steps, 1 / 10)}
    player, frozen = job.player(job.load(student), lr=lr, **recipe), job.load(teacher, frozen=True)
    how = {"guidance": Guidance(cfg=AV(*cfg), rescale=AV(*rescale)), "stride": stride, "regression": regression}
    frames = clock.latents(seconds).video
    step = stages.on_policy_stage(player, frozen, data, prompts, causal, shape, frames, batch, **how)
    history = job.run(step, {"student": player}, steps, "on policy")
    return job.save(player, out, history, ("own_video", "own_audio"), causal)


@stage
def codec(out: str = "codec.safetensors", steps: int = 4_000, seed: int = 0, device: str = "cpu") -> Path:
    """Train the codec on clips of the world.

    Args:
        out: .safetensors file to write.
        steps: steps of the optimiser.
        seed: seed of everything random.
        device: cpu, cuda, one GPU of several as cuda:1, or auto, a GPU if there is one.
    """
    from omniforcing_lib.bounce.codecs import save_codec
    from omniforcing_lib.bounce.train_codec import train_codec

    return save_codec(train_codec(seed=seed, steps=steps, device=device), out)


def load_sharded(
    model: str,
    team: DistributedContext,
    device: torch.device,
    *,
    amp: bool = False,
    sinks: int | None = None,
    frozen: bool = False,
) -> Transformer:
    """Load a model in float32: whole onto one process, or each process's shards alone.

    A team maps the file and copies what it needs of it, a tensor at a time: no process ever holds a whole model. With
    `amp` it keeps a `frozen` model of a bfloat16 file as it is stored.
    """
    if team.mesh is None:
        return checkpoints.load(model, device=device, sinks=sinks)
    found = checkpoints.read(model)
    kinds = set(found.dtypes.values())
    mapped = checkpoints.load(model, dtype=torch.bfloat16 if kinds == {"BF16"} else torch.float32, sinks=sinks)
    with torch.device("meta"):
        made = Transformer(mapped.config, mapped.clock)
    made = made.to(mapped.proj_out.weight.dtype if amp and frozen else torch.float32)
    made = team.shard(made, amp=amp).to_empty(device=device).requires_grad_(False).eval()
    for mine, whole in zip(made.parameters(), mapped.parameters(), strict=True):
        distributed.local(mine).copy_(distributed.local(team.cut(whole, mine)))
    if sinks and sinks != found.config.num_audio_sink_tokens:
        # the map has them in the file's dtype
        mine = made.audio_sink_tokens
        distributed.local(mine).copy_(distributed.local(team.cut(fresh_sinks(made.config), mine)))
    return made


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
    causal: RolloutConfig,
    count: int,
    latents: AV[int],
    grid: tuple[int, int],
    cfg: tuple[float, float],
    job: TrainConfig,
) -> Pairs | StoredPairs:
    """Read ODE pairs from a file or a folder of shards, or make them (and keep them there if a path is given).

    Every process of a team makes its own shards with a teacher of its own, in bfloat16 with `amp`.

    Raises:
        ValueError: they were made under other settings; a team has no folder to share out the work over.
    """
    file, notes = path.endswith(FILE), {"teacher": known("teacher", teacher), "cfg": list(cfg)}
    notes |= {"count": count, "latents": list(latents), "grid": list(grid), "steps": list(causal.steps)}
    notes = dataset.pair_notes(prompts, **notes, sigmas=causal.sigmas.float().tolist())
    if records.there(path):
        found = Pairs.load(path, job.place) if file else StoredPairs(path, job.place, job.team)
        dataset.check_pairs(path, found, notes)
        return found
    if job.team.mesh and (file or not path):
        raise ValueError(f"several processes share out their ODE pairs in a folder: give --pairs one, found {path!r}")
    notes |= {"seed": job.seed, "amp": job.amp}
    dtype = torch.bfloat16 if job.amp and path and not file else torch.float32
    model = checkpoints.load(teacher, device=job.place, dtype=dtype)
    seeds, guidance = range(job.seed * count, (job.seed + 1) * count), Guidance(cfg=AV(*cfg))

    def make(rows: range) -> Pairs:
        how = {"first": rows.start, "progress": file or not path}  # shards have a bar of their own
        some = seeds[rows.start : rows.stop]
        # contexts may be wider than the weights
        with torch.autocast(job.place.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            return dataset.ode_pairs(model, prompts, guidance, causal.steps, some, latents, grid, **how)

    if not path:
        return replace(make(range(count)), notes=notes)
    if file:
        return Pairs.load(make(range(count)).save(path, prompts.names, notes), job.place)
    return StoredPairs(dataset.store_pairs(path, make, count, notes, team=job.team), job.place, job.team)


def average(steps: int, share: float = 1 / 20) -> float:
    """Choose the decay of the average so that it spans about the last `share` of a run."""
    return max(0.9, min(0.9995, 1 - 1 / max(1, share * steps)))


@stage
def plan(
    model: str = "",
    gpus: Sequence[int] = (1, 8, 16, 32, 64),
    batch: int = 1,
    seconds: int = 5,
    grid: Sequence[int] = (16, 24),
    text: int = 1024,
    layout: str = "paper",
    amp: bool = True,
) -> str:
    """Print the memory of Stage 3 on each GPU, by component: a dry run on the meta device.

    Args:
        model: checkpoint file, index or folder; without one LTX-2's 19B.
        gpus: numbers of GPUs to plan for, a column each.
        batch: clips a GPU.
        seconds: length of a clip in seconds.
        grid: height and width of a video frame in tokens.
        text: tokens of a prompt.
        layout: layout of blocks: paper or released.
        amp: compute in bfloat16; master weights stay float32.
    """
    config = checkpoints.read(model).config if model else ModelConfig()
    clip = memory_plan.Clip(batch, seconds, tuple(grid), text)
    counted = memory_plan.count(
        config, RolloutConfig.from_layout(layout), clip, torch.bfloat16 if amp else torch.float32
    )
    size, compute = f"{counted.parameters[0] / 1e9:,.3g} G parameters", "bf16" if amp else "fp32"
    head = f"{size}; {batch} x {seconds} s a GPU, {grid[0]} x {grid[1]} tokens a frame, computed in {compute}"
    return f"{head}\n{memory_plan.table(counted, tuple(gpus), amp=amp)}"


STAGES = {
    "codec": codec,
    "teacher": teacher,
    "prompts": prompts,
    "pairs": pairs,
    "stage2": stage2,
    "stage3": stage3,
    "on-policy": on_policy,
    "plan": plan,
}


def main(argv: Sequence[str], kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> Path | str:
    """Run a stage from the command line; its arguments and the fields of `TrainConfig` are the options."""
    name, *rest = argv
    function = STAGES[name]
    parser = kind(prog=f"omniforcing train {name}", description=inspect.getdoc(function).partition("\n\nArgs:")[0])
    own = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    shared = TrainConfig.usual() if own.pop("job", None) else {}
    said = documented(TrainConfig) | documented(function)
    for option, default in (own | shared).items():
        _add(parser, f"--{option.replace('_', '-')}", default, said[option])
    given = vars(parser.parse_args(rest))
    if not shared:
        made = function(**given)
        print(made)
        return made
    with distributed.joined(given["device"], replicas=given["replicas"]) as team:
        job = TrainConfig(**{name: given[name] for name in shared}, team=team)
        made = function(**{name: given[name] for name in own}, job=job)
        if team.is_main:
            print(made)
    return made


def documented(thing: Callable[..., object]) -> dict[str, str]:
    """Give what a docstring says of each argument or attribute."""
    part = re.split(r"\n(?:Args|Attributes):\n", inspect.getdoc(thing))[1].split("\n\n")[0]
    return {name: " ".join(said.split()) for name, said in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", part, re.M)}


def _add(parser: argparse.ArgumentParser, option: str, default: object, said: str) -> None:
    if isinstance(default, bool):
        kind, shown = {"action": argparse.BooleanOptionalAction}, "yes" if default else "no"
    elif isinstance(default, tuple):
        kind = {"nargs": 2 if len(default) == 2 else "+", "type": type(default[0])}
        shown = " ".join(map(str, default))
    else:
        kind, shown = {"type": type(default)}, "none" if default == "" else str(default)
    action = parser.add_argument(option, default=default, **kind)
    action.help = f"{said.rstrip('.')} (default: {shown})".replace("%", "%%")
