"""How the data of the stages is made: clips of the world, contexts of prompts, trajectories of the teacher."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from omniforcing_lib import files
from omniforcing_lib.bounce import world
from omniforcing_lib.bounce.codecs import TinyCodec, check_codec, load_codec
from omniforcing_lib.flow import Guidance
from omniforcing_lib.layout import AV, Clock
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.options import Command, check_output, option
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.training import dataset, records, stages
from omniforcing_lib.training.dataset import Clips, Pairs, Prompts, StoredPairs, StoredPrompts
from omniforcing_lib.training.distributed import ALONE, DistributedContext
from omniforcing_lib.training.train import Learner
from omniforcing_lib.training.train_config import BATCH, CODEC, DEVICE, LAYOUT, STUDENT, TEACHER, TrainConfig, known

PAIRS = ".safetensors file or folder of shards; what is not there is made and kept there, if a name is given"


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
        return world_clips(codec, range(first, last), seconds, group=self.group, draw=self.draw)


@torch.no_grad()
def world_clips(
    codec: TinyCodec,
    seeds: Sequence[int],
    seconds: int,
    *,
    batch: int = 64,
    progress: bool = True,
    group: DistributedContext = ALONE,
    draw: Callable[[int], world.Scene] = world.scene,
) -> Clips:
    """Render and encode clips of the world where the codec is; prompts are numbered as in `world.prompts()`.

    The processes of a group share the work, batch by batch, and each gets all clips.
    """
    names, device, own = world.prompts(), next(codec.parameters()).device, []
    starts = range(0, len(seeds), batch)
    hidden = not (progress and group.is_main)
    for start in tqdm(starts[group.rank :: group.size], desc="rendering clips", disable=hidden, leave=False):
        scenes = [draw(seed) for seed in seeds[start : start + batch]]
        numbers = torch.tensor([names.index(f"a {s.colour} ball, {s.timbre}") for s in scenes])
        own.append((codec.encode(world.render_batch(scenes, seconds, device)).map(Tensor.cpu), numbers))
    shares = group.all_gather(own)
    latents, numbers = zip(*(shares[k % group.size][k // group.size] for k in range(len(starts))), strict=True)
    return Clips(
        AV(*map(torch.cat, zip(*latents, strict=True))).map(lambda x: x.to(device)), torch.cat(numbers).to(device)
    )


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

    def check(self) -> None:
        """Refuse, before any work, a codec that is not the models' own."""
        super().check()
        if not any(self.grid):
            for model in (self.teacher, getattr(self, "student", "")):
                if model:
                    check_codec(model, checkpoints.read(model).notes, self.codec)

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
                how = {"first": numbers.start, "progress": progress}
                return dataset.ode_pairs(model, prompts, guidance, causal.steps, seeds, latents, grid, **how)

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

    def check(self) -> None:
        """Refuse, before any work, a codec that is not the student's own."""
        super().check()
        check_codec(self.student, checkpoints.read(self.student).notes, self.codec)

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
        model, grid = learner.best.eval(), tuple(clips.latents.video.shape[2:4])
        pairs = dataset.first_block_pairs(model, causal, prompts, range(self.count), grid, blocks=self.blocks)
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
