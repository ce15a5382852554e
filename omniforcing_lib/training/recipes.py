"""How every shipped file is made, from nothing: codec, teacher, Stage 2, Stage 3.

Each stage loads models and data, trains, resuming from its folder, and writes one file with its settings and last
metrics in the metadata. Its `train` takes models and data that are loaded already. Under torchrun the same command
trains with all its processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from omniforcing_lib import files
from omniforcing_lib.bounce.codecs import load_codec, save_codec
from omniforcing_lib.config import MINIATURE, ModelConfig
from omniforcing_lib.flow import Guidance
from omniforcing_lib.layout import AV
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.options import Command, Parser, option
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.training import dataset, distributed, plan, stage3, stages
from omniforcing_lib.training.data_recipes import (
    PAIRS,
    DistilConfig,
    EncodePrompts,
    FirstBlock,
    MakePairs,
    RealClipsConfig,
    TakesPairs,
    WorldConfig,
)
from omniforcing_lib.training.dataset import Pairs, Prompts, StoredPairs, StoredPrompts
from omniforcing_lib.training.stage3 import DMDConfig, OnPolicyConfig, StudentClips
from omniforcing_lib.training.train import History, Learner, OptimConfig
from omniforcing_lib.training.train_config import BATCH, DEVICE, LAYOUT, STUDENT, TrainConfig, average
from omniforcing_lib.transformer import Transformer, initialise


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
class TrainTeacher(RealClipsConfig):
    """Train the bidirectional miniature LTX-2 on clips of the world by flow matching."""

    stage = "teacher"
    out: str = option(".safetensors file to write", "teacher.safetensors", setting=False, writes=".safetensors")
    steps: int = option("steps of the optimiser", 20_000, setting=False)
    batch: int = option(BATCH, 16)
    seconds: int = option("length of a clip in seconds", 5)
    lr: float = option("peak learning rate", 1.5e-3)
    start: str = option("checkpoint that is trained further; without one random weights", "", content="checkpoint")
    steady: float = option("weight of the error of a clip's mean sound: learns what lasts, as a hum", 0.0, low=0)

    def _run(self) -> Path:
        prompts = self.contexts()
        clips = self.real_clips(prompts, self.seconds)
        if self.start:
            model = self.load(self.start)
        else:
            model = initialise(Transformer(MINIATURE), torch.Generator().manual_seed(self.seed)).to(self.place)
        optim = replace(self.optim, lr=self.lr, steps=self.steps, ema=average(self.steps))
        learner = Learner(model, replace(optim, warmup=min(500, self.steps // 10)), self.group)
        step = stages.flow_stage(learner, clips, prompts, self.batch, steady=self.steady)
        history = self.fit(step, {"teacher": learner}, "teacher")
        return self.save(learner, history, ("video", "audio"))


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
        pairs: Pairs | StoredPairs | None = None,
        method: Callable[..., stage3.SelfForcing] = stage3.SelfForcing,
    ) -> tuple[Learner, History]:
        """Train a student and its critic by Stage 3, as `optim` says, or by this config's own decay and average.

        The rates of both are this config's; `method` makes the step, as `SelfForcing` does.
        """
        own = replace(self.optim, betas=(0.0, 0.999), warmup=10, steps=self.steps, final=self.final)
        optim = optim or replace(own, ema=average(self.steps // self.ratio, 1 / 4))
        learner = Learner(student, replace(optim, lr=self.lr), self.group)
        critic = Learner(critic, replace(optim, lr=self.critic_lr, ema=0.0), self.group)
        step = method(learner, critic, teacher, clips, config, pairs=pairs)
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
        step = stage3.OnPolicy(learner, teacher, pairs, clips, config, first_blocks=first_blocks)
        return learner, self.fit(step, {"student": learner}, "on policy")


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
