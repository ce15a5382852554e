"""How every shipped file is made, from nothing: codec, teacher, Stage 2, Stage 3.

Each stage is a config whose fields are the options of `python -m omniforcing_lib train STAGE`. Its `run` checks all
that it is asked for, loads models and data, trains, resuming from its folder, and writes one file with its settings
and last metrics in the metadata. Its `train` takes models and data that are loaded already. Under torchrun the same
command trains with all its processes.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from omniforcing_lib import backends, files
from omniforcing_lib.bounce import evaluate, world
from omniforcing_lib.bounce.codecs import TinyCodec, load_codec, save_codec
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.config import MINIATURE, ModelConfig
from omniforcing_lib.flow import Guidance
from omniforcing_lib.layout import AV, LAYOUTS, Clock
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.options import Command, Parser, check_output, option, options_of
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.safetensors_io import FLOATS, Reader
from omniforcing_lib.training import dataset, distributed, plan, records, run_folder, stages, train
from omniforcing_lib.training.dataset import Clips, Pairs, Prompts, StoredPairs, StoredPrompts
from omniforcing_lib.training.distributed import ALONE, DistributedContext
from omniforcing_lib.training.stages import DMDConfig, OnPolicyConfig, StudentClips
from omniforcing_lib.training.train import History, Learner, OptimConfig
from omniforcing_lib.transformer import Transformer, fresh_sinks, initialise

_log = logging.getLogger(__name__)
MODEL_VERSION = "miniature"
"""`model_version` of what is trained here from nothing; a student has its teacher's."""
CODEC = str(files.DATA / "codec.safetensors")
DEVICE = "cpu, cuda, one GPU of several as cuda:1, or auto, a GPU if there is one"
TEACHER = "teacher, or a checkpoint file, index or folder"
STUDENT = "stage2, student, or a checkpoint file, index or folder: where the student starts"
PAIRS = ".safetensors file or folder of shards; what is not there is made and kept there, if a name is given"
BATCH = "clips of a step, of all processes together"
PROMPTS = "folder of shards with prompts and their contexts; without one those of the world"
SCORE = "clips of the world that a finished miniature is measured on, for its file's metadata; 0 measures nothing"
LAYOUT = f"layout of blocks: {' or '.join(LAYOUTS)}"


def as_stored(model: str, sinks: int | None = None) -> tuple[Transformer, dict[str, Tensor]]:
    """Map a checkpoint: a model in the dtype of most of its tensors, and every tensor as the file holds it.

    Nothing that stays mapped is copied to main memory; the few tensors of another dtype are read again.
    """
    checkpoint = checkpoints.read(model)
    dtypes = {bare: FLOATS[checkpoint.entries[name].dtype] for bare, name in checkpoint.transformer.items()}
    ((most, _),) = Counter(dtypes.values()).most_common(1)
    most = most if most.itemsize > 1 else torch.float32  # fp8 weights have scales
    mapped, reader = checkpoints.load(model, dtype=most, sinks=sinks), Reader(checkpoint.entries)
    sources = dict(mapped.named_parameters())
    others = [bare for bare, dtype in dtypes.items() if dtype != most and dtype.itemsize > 1 and bare in sources]
    return mapped, sources | {bare: reader.get(checkpoint.transformer[bare]) for bare in others}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Command):
    """Say what every stage wants to know: how a run runs, whatever it learns.

    Attributes:
        group: the processes, see `distributed.joined`.
        keep_bar: the progress bar stays when the run has ended.
    """

    stage: ClassVar[str]
    seed: int = option("seed of everything random", 0, low=0, high=2**32 - 1)
    device: str = option(DEVICE, "cpu", setting=False)
    folder: str = option("folder of state and history; without one nothing is kept", "", setting=False, writes="folder")
    every: int = option("steps between two checkpoints", 500, setting=False)
    minutes: float = option("minutes after which the run ends early; 0 has no limit", 0.0, low=0, setting=False)
    amp: bool = option("compute in bfloat16; master weights stay float32", False)
    accumulate: int = option("micro-batches that each process cuts its rows of a batch into", 1, setting=False)
    checkpoint_activations: bool = option("run blocks again for their gradients", False, setting=False)
    limit: float = option("gradient norm above which a step changes nothing", 1e4)
    replicas: int = option("copies of the models over the processes; 1 shards over all of them", 1, setting=False)
    prompts: str = option(PROMPTS, "", content="data")
    score: int = option(SCORE, 18, low=0, setting=False)
    group: DistributedContext = ALONE
    keep_bar: bool = True

    @property
    def settings(self) -> dict[str, object]:
        """Say what the outcome depends on, by name, files and folders by content: kept with all that is made.

        Raises:
            ValueError: a file is not there, or cannot be read.
        """
        asked = {entry.name: entry.metadata for entry, _, _ in options_of(type(self)) if entry.metadata["setting"]}
        if any(getattr(self, "grid", ())):
            asked.pop("codec", None)
        contents = {name: known(getattr(self, name), about["content"]) for name, about in asked.items()}
        return {"stage": self.stage, **contents}

    def check(self) -> None:
        """Refuse, before any work, what cannot be trained, and a folder whose run began under other settings."""
        if self.group.is_main:
            super().check()
        self.group.micro_batches(getattr(self, "batch", 0), self.accumulate)
        settings = self.settings
        if self.folder:
            run_folder.newest_state(Path(self.folder), settings)

    @property
    def place(self) -> torch.device:
        """The device of this process."""
        return self.group.device if self.group.mesh else torch.device(self.device)

    @property
    def optim(self) -> OptimConfig:
        """What all learners of the run share."""
        shared = OptimConfig(limit=self.limit, accumulate=self.accumulate)
        return replace(shared, amp=self.amp, recompute=self.checkpoint_activations)

    def contexts(self) -> Prompts | StoredPrompts:
        """Give the prompts to train on."""
        if self.prompts:
            return StoredPrompts(self.prompts, self.place, self.group)
        return Prompts.of(TinyText(), world.prompts(), self.place)

    def load(self, model: str, sinks: int | None = None, *, frozen: bool = False) -> Transformer:
        """Load a model in float32: whole onto one process, or each process's shards alone.

        Several processes map the file and copy what they need of it, a tensor at a time: none ever holds a whole
        model. With `amp` a `frozen` model of a bfloat16 file is kept as it is stored.
        """
        if self.group.mesh is None:
            return checkpoints.load(model, device=self.place, sinks=sinks)
        mapped, sources = as_stored(model, sinks)
        with torch.device("meta"):
            sharded = Transformer(mapped.config, mapped.clock)
        sharded = sharded.to(mapped.proj_out.weight.dtype if self.amp and frozen else torch.float32)
        sharded = self.group.shard(sharded, amp=self.amp).to_empty(device=self.place).requires_grad_(False).eval()
        if sinks and sinks != checkpoints.read(model).config.num_audio_sink_tokens:
            # The mapped model has new sinks in the file's dtype.
            sources["audio_sink_tokens"] = fresh_sinks(sharded.config)
        for name, shard in sharded.named_parameters():
            distributed.local(shard).copy_(distributed.local(self.group.distribute(sources[name], shard)))
        return sharded

    def fit(self, step: train.Step, learners: Mapping[str, Learner], label: str) -> History:
        """Run a stage for its steps, within the limit in minutes."""
        deadline = time.monotonic() + 60 * self.minutes if self.minutes else inf
        return train.fit(
            step,
            learners,
            self.steps,
            seed=self.seed,
            folder=self.folder or None,
            every=self.every,
            label=label,
            leave=self.keep_bar,
            stop=lambda: time.monotonic() > deadline,
            settings=self.settings if self.folder else None,
        )

    def save(
        self, learner: Learner, history: History, names: Sequence[str], causal: RolloutConfig | None = None
    ) -> Path:
        """Write what was learnt, with its settings, the steps taken, last means of the named metrics and its scores."""
        model = self.group.gather_model(learner.best, torch.bfloat16)
        teacher = getattr(self, "teacher", "") or getattr(self, "start", "")
        if model is None:
            return Path(self.out)
        version = checkpoints.read(teacher).metadata.get("model_version", "LTX-2") if teacher else MODEL_VERSION
        notes = self.settings | {"steps": history.done}
        notes |= {"of": self.steps} if self.steps != history.done else {}
        notes |= {"changes": history.changes} if history.changes else {}
        notes |= {name: round(history.mean(name), 5) for name in names if name in history.numbers}
        path = checkpoints.save(model, self.out, notes=notes, causal=causal, version=version)
        scored = self.score and version == MODEL_VERSION
        if scored and not backends.installed("av"):
            _log.warning("%s is not scored, which takes PyAV: pip install av", path)
        elif scored:
            notes |= {"scores": evaluate.brief(checkpoints.load(path), causal, self.score)}
            checkpoints.save(model, self.out, notes=notes, causal=causal, version=version)
        return path


def known(value: object, content: str) -> object:
    """Give an option as a setting: a checkpoint, a file or a folder of shards by its content, where it is there.

    Args:
        value: of the option.
        content: "checkpoint", "data", "made" for data that a stage makes if they are not there, or empty.

    Raises:
        ValueError: it is not there, and no stage makes it; or it cannot be read.
    """
    if content == "checkpoint" and value:
        return records.by_content(value, checkpoints.read(value).fingerprint)
    if content and value and (content == "data" or records.complete(value)):
        return records.content(value)
    return list(value) if isinstance(value, tuple) else value


def average(steps: int, share: float = 1 / 20) -> float:
    """Choose the decay of the average so that it spans about the last `share` of a run."""
    return max(0.9, min(0.9995, 1 - 1 / max(1, share * steps)))


@dataclass(frozen=True, kw_only=True)
class WorldConfig(Command):
    """Say which world is learnt from: Bounce as shipped, or the extended one (see `world.scene`)."""

    hum: bool = option("a steady tone lies under the bounces", False)
    hidden: bool = option("the box goes on to the right, out of sight", False)

    @property
    def draw(self) -> Callable[..., world.Scene]:
        """Draw a scene of this world by its seed."""
        return partial(world.scene, hum=self.hum, hidden=self.hidden)


@dataclass(frozen=True, kw_only=True)
class RealClipsConfig(WorldConfig, TrainConfig):
    """Say which clips of the world are learnt from."""

    codec: str = option(".safetensors file of the world's codec", CODEC, content="data")
    clips: int = option("clips of the world to draw from, rendered at the start", 8_192)

    def real_clips(self, prompts: Prompts | StoredPrompts, seconds: int) -> Clips:
        """Render and encode the clips.

        Raises:
            ValueError: the prompts are not the world's, or the seed draws clips that are held out.
        """
        if tuple(prompts.names) != tuple(world.prompts()):
            raise ValueError(f"--prompts {self.prompts}: clips of the world have the world's own prompts, in its order")
        first, last = self.seed * self.clips, (self.seed + 1) * self.clips
        if last > world.HELD_OUT:
            raise ValueError(
                f"--seed {self.seed} draws clips that are held out; (seed + 1) x clips is at most {world.HELD_OUT}"
            )
        codec = load_codec(self.codec, self.place)
        return world_clips(codec, range(first, last), seconds, progress=self.group.is_main, draw=self.draw)


@dataclass(frozen=True, kw_only=True)
class TrainTeacher(RealClipsConfig):
    """Train the bidirectional miniature LTX-2 on clips of the world by flow matching."""

    stage = "teacher"
    out: str = option(".safetensors file to write", "teacher.safetensors", setting=False, writes=".safetensors")
    steps: int = option("steps of the optimiser", 20_000, setting=False)
    batch: int = option(BATCH, 16)
    seconds: int = option("length of a clip in seconds", 5)
    lr: float = option("peak learning rate", 1.5e-3)
    start: str = option("checkpoint that is trained further; without one random weights", "", content="checkpoint")

    def _run(self) -> Path:
        prompts = self.contexts()
        clips = self.real_clips(prompts, self.seconds)
        if self.start:
            model = self.load(self.start)
        else:
            model = initialise(Transformer(MINIATURE), torch.Generator().manual_seed(self.seed)).to(self.place)
        optim = replace(self.optim, lr=self.lr, steps=self.steps, ema=average(self.steps))
        learner = Learner(model, replace(optim, warmup=min(500, self.steps // 10)), self.group)
        history = self.fit(stages.flow_stage(learner, clips, prompts, self.batch), {"teacher": learner}, "teacher")
        return self.save(learner, history, ("video", "audio"))


@torch.no_grad()
def world_clips(
    codec: TinyCodec,
    seeds: Sequence[int],
    seconds: int,
    *,
    batch: int = 64,
    progress: bool = True,
    draw: Callable[[int], world.Scene] = world.scene,
) -> Clips:
    """Render and encode clips of the world where the codec is; prompts are numbered as in `world.prompts()`."""
    names, device = world.prompts(), next(codec.parameters()).device
    latents, numbers = [], []
    for start in tqdm(range(0, len(seeds), batch), desc="rendering clips", disable=not progress, leave=False):
        scenes = [draw(seed) for seed in seeds[start : start + batch]]
        latents.append(codec.encode(world.render_batch(scenes, seconds, device)))
        numbers += [names.index(f"a {s.colour} ball, {s.timbre}") for s in scenes]
    return Clips(AV(*map(torch.cat, zip(*latents, strict=True))), torch.tensor(numbers, device=device))


@dataclass(frozen=True, kw_only=True)
class EncodePrompts(Command):
    """Encode a text file, a prompt per line, by a model's own Gemma and connectors: what `--prompts` takes."""

    out: str = option("folder of shards to write", "prompts", writes="folder")
    lines: str = option("text file in UTF-8, a prompt per line", "prompts.txt")
    model: str = option(f"{TEACHER}; its prompts are encoded", "teacher")
    gemma: str = option("folder of Gemma 3 (default: gemma* beside the model)", "")
    device: str = option(DEVICE, "cpu")

    def _run(self) -> Path:
        from omniforcing_lib import model_bundle

        names = files.read_lines(self.lines)
        bundle = model_bundle.of(self.model, device=self.device, dtype="bfloat16", gemma=self.gemma)
        if isinstance(bundle.text, model_bundle.StandInText):
            raise ValueError(f"{bundle}; training needs real ones: name a Gemma folder (--gemma)")
        if bundle.has_ground_truth:
            bundle.text.encode(names)  # a prompt outside the world's grammar is refused before any is stored
        return dataset.store_prompts(self.out, bundle.text, names)


@dataclass(frozen=True, kw_only=True)
class DistilConfig(TrainConfig):
    """Say what Stages 2 and 3 share: the teacher, the size of clips, and guidance."""

    teacher: str = option(f"{TEACHER}: the model that is distilled", "teacher", content="checkpoint")
    codec: str = option(".safetensors file of the world's codec, for clock and grid", CODEC, content="data")
    seconds: int = option("length of a clip in seconds", 5)
    grid: tuple[int, int] = option(
        "height and width of a video frame in tokens, on LTX-2's clock; 0 0 takes the codec's of both", (0, 0), low=0
    )
    cfg: tuple[float, float] = option("guidance scales of video and audio, of the teacher", (3.0, 3.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(self.grid) and not all(self.grid):
            raise ValueError(f"--grid is two numbers above 0, found {' '.join(map(str, self.grid))}")

    def geometry(self) -> tuple[AV[int], tuple[int, int]]:
        """Give the latents of a clip and the tokens of a video frame."""
        if any(self.grid):
            return Clock().latents(self.seconds), self.grid
        codec = load_codec(self.codec)
        return codec.clock.latents(self.seconds), codec.grid


@dataclass(frozen=True, kw_only=True)
class PairsConfig(DistilConfig):
    """Say which of the teacher's ODE pairs are wanted: the one maker of pairs, of every stage and study."""

    count: int = option("trajectories, prompts in turn", 512)

    def pair_notes(self, prompts: Prompts | StoredPrompts, causal: RolloutConfig) -> dict[str, object]:
        """Give the settings that the pairs depend on."""
        latents, grid = self.geometry()
        sizes = {"count": self.count, "latents": list(latents), "grid": list(grid), "steps": list(causal.steps)}
        teacher = known(self.teacher, "checkpoint")
        sigmas = causal.sigmas.float().tolist()
        return dataset.pair_notes(prompts, teacher=teacher, cfg=list(self.cfg), **sizes, sigmas=sigmas)

    def pair_maker(
        self, prompts: Prompts | StoredPrompts, causal: RolloutConfig, *, narrow: bool = False, progress: bool = True
    ) -> Callable[[range], Pairs]:
        """Load the teacher, in bfloat16 if `narrow`; give what makes the trajectories of some clips by their numbers.

        Clip i has noise of seed `seed` x `count` + i, and prompt i modulo the number of prompts.
        """
        dtype = torch.bfloat16 if narrow else torch.float32
        model = checkpoints.load(self.teacher, device=self.place, dtype=dtype)
        latents, grid = self.geometry()
        guidance, start = Guidance(cfg=AV(*self.cfg)), self.seed * self.count

        def make(numbers: range) -> Pairs:
            seeds = range(start + numbers.start, start + numbers.stop)
            # Contexts may be wider than the weights.
            with torch.autocast(self.place.type, torch.bfloat16, enabled=narrow):
                return dataset.ode_pairs(
                    model,
                    prompts,
                    guidance,
                    causal.steps,
                    seeds,
                    latents,
                    grid,
                    first=numbers.start,
                    progress=progress,
                )

        return make

    def ode_pairs(self, path: str, prompts: Prompts | StoredPrompts, causal: RolloutConfig) -> Pairs | StoredPairs:
        """Read ODE pairs from a file or a folder of shards, or make them (and keep them there if a path is given).

        Each of several processes makes its own shards with a teacher of its own, in bfloat16 with `amp`.

        Raises:
            ValueError: they were made under other settings; several processes have no folder to share out the work.
        """
        is_file, notes = path.endswith(".safetensors"), self.pair_notes(prompts, causal)
        if records.complete(path):
            pairs = Pairs.load(path, self.place) if is_file else StoredPairs(path, self.place, self.group)
            dataset.check_pairs(path, pairs, notes)
            return pairs
        in_shards = bool(path) and not is_file
        if self.group.mesh and not in_shards:
            raise ValueError(
                f"several processes share out their ODE pairs in a folder: give --pairs one, found {path!r}"
            )
        notes |= {"seed": self.seed, "amp": self.amp}
        # Shards have a progress bar of their own.
        make = self.pair_maker(prompts, causal, narrow=self.amp and in_shards, progress=not in_shards)
        if in_shards:
            folder = dataset.store_pairs(path, make, self.count, notes, group=self.group)
            return StoredPairs(folder, self.place, self.group)
        pairs = replace(make(range(self.count)), notes=notes)
        return Pairs.load(pairs.save(path, prompts.names, notes), self.place) if path else pairs


@dataclass(frozen=True, kw_only=True)
class MakePairs(PairsConfig):
    """Make the teacher's ODE pairs, and train nothing: what Stage 2 takes as `--pairs`."""

    stage = "pairs"
    out: str = option(
        "folder of shards, or .safetensors file, to write; shards that are there are kept",
        "pairs",
        setting=False,
        writes="either",
    )
    layout: str = option(LAYOUT + ", whose noise levels are kept", "paper")

    def _run(self) -> Path:
        pairs = self.ode_pairs(self.out, self.contexts(), RolloutConfig.from_layout(self.layout))
        dataset.check_pairs(self.out, pairs, {"seed": self.seed, "amp": self.amp})
        return Path(self.out)


@dataclass(frozen=True, kw_only=True)
class FirstBlock(RealClipsConfig):
    """Make trajectories of the first blocks that their own noise decides: what `train on-policy --first-block` takes.

    A causal model learns the first blocks of real clips by flow matching with teacher forcing, and its ODE makes the
    trajectories; the model itself is not kept.
    """

    stage = "first-block"
    out: str = option(".safetensors file to write", "first_block.safetensors", setting=False, writes=".safetensors")
    student: str = option(STUDENT, "stage2", content="checkpoint")
    clips: int = option("clips of the world to draw from, rendered at the start", 6_144)
    count: int = option("trajectories, prompts in turn", 1_024)
    blocks: int = option("first blocks of a clip, 1 or more", 2)
    steps: int = option("steps of the optimiser", 1_000)
    batch: int = option(BATCH, 64)
    lr: float = option("peak learning rate", 5e-4)

    def _run(self) -> Path:
        if self.group.mesh:
            raise ValueError("first blocks are small, and made by one process: start this stage without torchrun")
        causal, prompts = checkpoints.student(self.student), self.contexts()
        last = causal.layout.block(self.blocks - 1).map(lambda span: span.stop)
        clock = load_codec(self.codec).clock
        seconds = next(s for s in itertools.count(1) if clock.latents(s).video >= last.video)
        clips = self.real_clips(prompts, seconds)
        clips = Clips(clips.latents.map(lambda x, count: x[:, :count].contiguous(), last), clips.prompt)
        optim = replace(self.optim, lr=self.lr, steps=self.steps, warmup=min(30, self.steps // 10), final=0.02)
        learner = Learner(self.load(self.student), replace(optim, ema=0.99), self.group)
        step = stages.flow_stage(learner, clips, prompts, self.batch, causal=causal)
        self.fit(step, {"model": learner}, "first block")
        pairs = dataset.first_block_pairs(
            learner.best.eval(),
            causal,
            prompts,
            range(self.count),
            tuple(clips.latents.video.shape[2:4]),
            blocks=self.blocks,
        )
        return pairs.save(self.out, prompts.names, self.settings | dataset.pair_notes(prompts))


@dataclass(frozen=True, kw_only=True)
class TakesPairs(PairsConfig):
    """Say where the pairs of a stage are."""

    pairs: str = option(PAIRS, "", content="made")

    def check(self) -> None:
        """Refuse, before any work, what cannot be trained, and pairs that could not be written."""
        super().check()
        if self.pairs and not records.complete(self.pairs):
            check_output(Path(self.pairs), folder=not self.pairs.endswith(".safetensors"))


@dataclass(frozen=True, kw_only=True)
class Stage2(TakesPairs):
    """Make the teacher causal: ODE pairs, then regression under the causal masks."""

    stage = "stage2"
    out: str = option(".safetensors file to write", "stage2.safetensors", setting=False, writes=".safetensors")
    layout: str = option(LAYOUT, "paper")
    sinks: int = option("audio sink tokens; -1 takes the layout's own number", -1, low=-1)
    steps: int = option("steps of the optimiser", 1_500, setting=False)
    batch: int = option(BATCH, 8)
    lr: float = option("peak learning rate", 5e-4)

    def _run(self) -> Path:
        causal = RolloutConfig.from_layout(self.layout, None if self.sinks < 0 else self.sinks)
        prompts = self.contexts()
        pairs = self.ode_pairs(self.pairs, prompts, causal)
        learner, history = self.train(self.load(self.teacher, causal.layout.sinks), pairs, prompts, causal)
        return self.save(learner, history, ("video", "audio"), causal)

    def train(
        self,
        model: Transformer,
        pairs: Pairs | StoredPairs,
        prompts: Prompts | StoredPrompts,
        causal: RolloutConfig,
        optim: OptimConfig | None = None,
    ) -> tuple[Learner, History]:
        """Train a model by Stage 2, as `optim` says, or by this config's own rates."""
        own = replace(self.optim, lr=self.lr, steps=self.steps, warmup=min(100, self.steps // 10))
        learner = Learner(model, optim or replace(own, ema=average(self.steps)), self.group)
        step = stages.ode_stage(learner, pairs, prompts, causal, self.batch)
        return learner, self.fit(step, {"student": learner}, "stage 2")


@dataclass(frozen=True, kw_only=True)
class Stage3(DistilConfig):
    """Distil on the student's own roll-outs: joint self-forcing DMD."""

    stage = "stage3"
    out: str = option(".safetensors file to write", "student.safetensors", setting=False, writes=".safetensors")
    student: str = option(STUDENT, "stage2", content="checkpoint")
    steps: int = option("steps of the critic", 3_000, setting=False)
    batch: int = option(BATCH, 8)
    lr: float = option("peak learning rate of the student", 6e-5)
    critic_lr: float = option("peak learning rate of the critic", 1.5e-4)
    final: float = option("share of both rates that a cosine decay leaves at the end; 1 is none", 1.0, low=0, high=1)
    ratio: int = option("critic steps for each step of the student", 5)

    def _run(self) -> Path:
        causal, (latents, grid) = checkpoints.student(self.student), self.geometry()
        student, critic = self.load(self.student), self.load(self.teacher)
        clips = StudentClips(self.contexts(), causal, grid, latents.video, self.batch)
        config = DMDConfig(guidance=Guidance(cfg=AV(*self.cfg)), ratio=self.ratio)
        learner, history = self.train(student, critic, self.load(self.teacher, frozen=True), clips, config)
        return self.save(learner, history, ("dmd_video", "dmd_audio", "critic_video", "critic_audio"), causal)

    def train(
        self,
        student: Transformer,
        critic: Transformer,
        teacher: Transformer,
        clips: StudentClips,
        config: DMDConfig,
        optim: OptimConfig | None = None,
        sampler: stages.Sampler | None = None,
        pairs: Pairs | StoredPairs | None = None,
    ) -> tuple[Learner, History]:
        """Train a student and its critic by Stage 3, as `optim` says, or by this config's own decay and average.

        The rates of both are this config's.
        """
        own = replace(self.optim, betas=(0.0, 0.999), warmup=10, steps=self.steps, final=self.final)
        optim = optim or replace(own, ema=average(self.steps // self.ratio, 1 / 4))
        learner = Learner(student, replace(optim, lr=self.lr), self.group)
        critic = Learner(critic, replace(optim, lr=self.critic_lr, ema=0.0), self.group)
        step = stages.self_forcing_stage(learner, critic, teacher, clips, config, sampler=sampler, pairs=pairs)
        return learner, self.fit(step, {"student": learner, "critic": critic}, "stage 3")


@dataclass(frozen=True, kw_only=True)
class OnPolicy(TakesPairs):
    """Distil on the student's own roll-outs without a critic: regress them on the teacher's ends of their states."""

    stage = "on_policy"
    out: str = option(".safetensors file to write", "student.safetensors", setting=False, writes=".safetensors")
    student: str = option(STUDENT, "stage2", content="checkpoint")
    pairs: str = option(PAIRS, str(files.DATA / "ode_pairs.safetensors"), content="made")
    count: int = option("trajectories, prompts in turn", 90)
    steps: int = option("steps of the student", 100, setting=False)
    batch: int = option(BATCH, 8)
    lr: float = option("peak learning rate", 1e-4)
    final: float = option("share of the rate that a cosine decay leaves at the end; 1 is none", 0.05, low=0, high=1)
    stride: int = option(
        "the teacher takes every so many-th of the 40 levels of its schedule, from the student's level on", 2
    )
    regression: float = option("weight of the loss on the pairs", 0.2)
    first_block: str = option("file of `train first-block`; without one the pairs teach block 0", "", content="data")
    rescale: tuple[float, float] = option(
        "shares of the guided result, of video and audio, that take the spread of the unguided one",
        (0.7, 0.7),
        low=0,
        high=1,
    )

    def _run(self) -> Path:
        causal, prompts, (latents, grid) = checkpoints.student(self.student), self.contexts(), self.geometry()
        first_block = self.first_pairs(prompts, causal)
        pairs = self.ode_pairs(self.pairs, prompts, causal)
        clips = StudentClips(prompts, causal, grid, latents.video, self.batch)
        guidance = Guidance(cfg=AV(*self.cfg), rescale=AV(*self.rescale))
        config = OnPolicyConfig(guidance=guidance, stride=self.stride, regression=self.regression)
        student, teacher = self.load(self.student), self.load(self.teacher, frozen=True)
        learner, history = self.train(student, teacher, pairs, clips, config, first_blocks=first_block)
        return self.save(learner, history, ("own_video", "own_audio"), causal)

    def first_pairs(self, prompts: Prompts | StoredPrompts, causal: RolloutConfig) -> Pairs | None:
        """Read the trajectories of block 0, if there are any.

        Raises:
            ValueError: the file has no first blocks, or they are of other prompts, noise levels or sizes.
        """
        if not self.first_block:
            return None
        pairs = Pairs.load(self.first_block, self.place)
        if "blocks" not in pairs.notes:
            raise ValueError(f"{self.first_block} holds no first blocks; make them with `train first-block`")
        last = causal.layout.block(causal.layout.count(pairs.shapes.video[1]) - 1)
        sizes = {"latents": list(last.map(lambda span: span.stop)), "grid": list(self.geometry()[1])}
        notes = dataset.pair_notes(prompts, **sizes, sigmas=causal.sigmas.float().tolist())
        dataset.check_pairs(self.first_block, pairs, notes)
        return pairs

    def train(
        self,
        student: Transformer,
        teacher: Transformer,
        pairs: Pairs | StoredPairs,
        clips: StudentClips,
        config: OnPolicyConfig,
        optim: OptimConfig | None = None,
        first_blocks: Pairs | None = None,
    ) -> tuple[Learner, History]:
        """Train a student on its own states, as `optim` says, or by this config's own rates."""
        own = replace(self.optim, lr=self.lr, betas=(0.9, 0.999), warmup=3, steps=self.steps, final=self.final)
        learner = Learner(student, optim or replace(own, ema=average(self.steps, 1 / 10)), self.group)
        step = stages.on_policy_stage(learner, teacher, pairs, clips, config, first_blocks=first_blocks)
        return learner, self.fit(step, {"student": learner}, "on policy")


@dataclass(frozen=True, kw_only=True)
class TrainCodec(WorldConfig):
    """Train the codec on clips of the world."""

    out: str = option(".safetensors file to write", "codec.safetensors", writes=".safetensors")
    steps: int = option("steps of the optimiser", 4_000)
    seed: int = option("seed of everything random", 0, low=0, high=2**32 - 1)
    device: str = option(DEVICE, "cpu")
    start: str = option("codec that is trained further; without one random weights", "")
    lr: float = option("peak learning rate", 2.5e-3)
    streams: str = option("whose networks learn", "both", choices=("both", "video", "audio"))

    def _run(self) -> Path:
        from omniforcing_lib.bounce.train_codec import train_codec

        start = load_codec(self.start) if self.start else None
        learns = AV(self.streams != "audio", self.streams != "video")
        how = {"steps": self.steps, "rate": self.lr, "seed": self.seed, "device": self.device}
        return save_codec(train_codec(start, draw=self.draw, learns=learns, **how), self.out)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan(Command):
    """Print the memory of Stage 3 on each GPU, by component: a dry run on the meta device."""

    model: str = option("checkpoint file, index or folder; without one LTX-2's 19B", "")
    gpus: tuple[int, ...] = option("numbers of GPUs to plan for, a column each", (1, 8, 16, 32, 64))
    batch: int = option("clips of a step on one GPU", 1)
    seconds: int = option("length of a clip in seconds", 5)
    grid: tuple[int, int] = option("height and width of a video frame in tokens", (16, 24))
    text: int = option("tokens of a prompt", 1024)
    layout: str = option(LAYOUT, "paper")
    amp: bool = option("compute in bfloat16; master weights stay float32", True)

    def _run(self) -> str:
        config = checkpoints.read(self.model).config if self.model else ModelConfig()
        clip, causal = plan.Clip(self.batch, self.seconds, self.grid, self.text), RolloutConfig.from_layout(self.layout)
        counted = plan.count(config, causal, clip, torch.bfloat16 if self.amp else torch.float32)
        size, dtype = f"{counted.parameters[0] / 1e9:,.3g} G parameters", "bf16" if self.amp else "fp32"
        tokens = f"{self.grid[0]} x {self.grid[1]} tokens of a frame"
        head = f"{size}; {self.batch} x {self.seconds} s per GPU, {tokens}, computed in {dtype}"
        return f"{head}\n{plan.table(counted, self.gpus, amp=self.amp)}"


STAGES: dict[str, type[Command]] = {
    "codec": TrainCodec,
    "teacher": TrainTeacher,
    "prompts": EncodePrompts,
    "pairs": MakePairs,
    "first-block": FirstBlock,
    "stage2": Stage2,
    "stage3": Stage3,
    "on-policy": OnPolicy,
    "plan": MemoryPlan,
}


def main(stage: str, *words: str) -> object:
    """Run a stage from the command line, with all processes that torchrun started; print what was made."""
    parser = Parser(prog=f"omniforcing train {stage}", description=STAGES[stage].__doc__)
    parser.add_options(STAGES[stage])
    config = STAGES[stage].of(vars(parser.parse_args(words)))
    if not isinstance(config, TrainConfig):
        result = config.run()
        print(result)
        return result
    with distributed.joined(config.device, replicas=config.replicas) as group:
        result = replace(config, group=group).run()
        if group.is_main:
            print(result)
    return result
