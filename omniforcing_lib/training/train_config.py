"""What every stage of training is asked: how a run runs, on which processes, and what it writes.

A stage is a config whose fields are the options of `python -m omniforcing_lib train STAGE`. Its `run` checks all that
it is asked for before any work. The stages themselves are in `recipes` and `data_recipes`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from omniforcing_lib import backends
from omniforcing_lib.bounce import evaluate, world
from omniforcing_lib.bounce.codecs import SHIPPED, load_codec
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.layout import LAYOUTS
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.options import Command, option, options_of
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.safetensors_io import FLOATS, Reader
from omniforcing_lib.training import distributed, records, run_folder, train
from omniforcing_lib.training.dataset import Prompts, StoredPrompts
from omniforcing_lib.training.distributed import ALONE, DistributedContext
from omniforcing_lib.training.train import History, Learner, OptimConfig
from omniforcing_lib.transformer import Transformer, empty, fresh_sinks

_log = logging.getLogger(__name__)
MODEL_VERSION = "miniature"
"""`model_version` of what is trained here from nothing; a student has its teacher's."""
CODEC = str(SHIPPED)
DEVICE = "cpu, cuda, one GPU of several as cuda:1, or auto, a GPU if there is one"
TEACHER = "teacher, or a checkpoint file, index or folder"
STUDENT = "stage2, student, or a checkpoint file, index or folder: where the student starts"
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
        dtype = mapped.proj_out.weight.dtype if self.amp and frozen else torch.float32
        sharded = empty(mapped.config, mapped.clock).to(dtype)
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
            codec = load_codec(getattr(self, "codec", CODEC))
            notes |= {"scores": evaluate.brief(checkpoints.load(path), causal, codec, self.score)}
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
