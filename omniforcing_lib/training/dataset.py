"""What the stages train on: prompts, clips as latents, and the teacher's trajectories (ODE pairs), in safetensors.

Prompts and pairs are held in memory, or read row by row from a folder of shards (`records`): `live` tells which.

Shapes: N clips, K kept noise levels, F video and T audio latents, L text tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from omniforcing_lib.cache import OpenBlock
from omniforcing_lib.files import write_tensors
from omniforcing_lib.flow import Guidance, block_noise, guided_denoiser, ltx2_sigmas, snap_indices, trajectory
from omniforcing_lib.interfaces import TextEncoder
from omniforcing_lib.layout import AV
from omniforcing_lib.rollout import RolloutConfig, new_cache, predict, update_cache
from omniforcing_lib.training import records
from omniforcing_lib.training.distributed import ALONE, DistributedContext
from omniforcing_lib.transformer import Transformer


@dataclass(frozen=True)
class Prompts:
    """Hold the text context of a list of prompts; the last row is the unconditional prompt.

    Shapes: context AV [P + 1, L, C].

    Attributes:
        names: the prompts.
        context: of each.
        text: what encoded them, in words or as a hash; empty where nobody knows.
    """

    names: tuple[str, ...]
    context: AV[Tensor]
    text: str = ""
    live = False

    def __len__(self) -> int:
        return len(self.names)

    @property
    def device(self) -> torch.device:
        """Where contexts are given."""
        return self.context.video.device

    @classmethod
    def of(cls, text: TextEncoder, names: Sequence[str], device: str | torch.device = "cpu") -> Prompts:
        """Encode prompts once."""
        return cls(tuple(names), text.encode([*names, ""], device), identity(text))

    @property
    def negative(self) -> AV[Tensor]:
        """Context of the unconditional prompt. Shapes: AV [1, L, C]."""
        return self.context.map(lambda c: c[-1:])

    def take(self, index: Tensor) -> AV[Tensor]:
        """Give the contexts of prompt numbers; -1 is the unconditional prompt. Shapes: [B] to AV [B, L, C].

        Raises:
            ValueError: a number that is no prompt; while a CUDA graph is recorded nobody can look.
        """
        check_numbers(index, len(self))
        return self.context.map(lambda c: c[index])


class StoredPrompts:
    """Contexts of a folder that `store_prompts` wrote, read when they are asked for.

    Args:
        folder: of shards.
        device: where contexts are given.
        group: the processes.

    Raises:
        ValueError: see `records.Records`; or the folder holds something else.
    """

    live = True

    def __init__(
        self, folder: str | Path, device: str | torch.device = "cpu", group: DistributedContext = ALONE
    ) -> None:
        self._records, self.device = _records_of("prompts", folder, group), torch.device(device)
        self.names, self.text = tuple(self._records.notes["names"]), self._records.notes.get("text", "")
        self.negative = self.take(torch.tensor([-1]))

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: Tensor) -> AV[Tensor]:
        """Read the contexts of prompt numbers; see `Prompts.take`."""
        check_numbers(index, len(self))
        rows = self._records.rows([i if i >= 0 else len(self) for i in index.tolist()])
        return AV(rows["video"], rows["audio"]).map(lambda c: c.to(self.device, torch.float32))


def store_prompts(folder: str | Path, text: TextEncoder, names: Sequence[str], *, rows_per_shard: int = 64) -> Path:
    """Encode prompts shard by shard, in bf16, as `StoredPrompts` reads them; shards that are there are kept."""
    rows = [*names, ""]

    def encode(span: range) -> dict[str, Tensor]:
        return text.encode(rows[span.start : span.stop], dtype=torch.bfloat16)._asdict()

    notes = {"kind": "prompts", "names": list(names), "text": identity(text)}
    return records.write(folder, len(rows), rows_per_shard, encode, notes)


def identity(text: TextEncoder) -> str:
    """Say which encoder it is, and with which weights."""
    return getattr(text, "identity", None) or repr(text)


def check_numbers(index: Tensor, count: int) -> None:
    """Refuse numbers of prompts that do not exist; a CUDA graph that is being recorded cannot be asked.

    Raises:
        ValueError: a number that is neither below `count` nor -1, the unconditional prompt.
    """
    if not len(index) or (index.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if wrong := [i for i in map(int, index.aminmax()) if not -1 <= i < count]:
        raise ValueError(f"prompts are numbered from 0 to {count - 1}, asked for number {wrong[0]}")


@dataclass(frozen=True)
class Clips:
    """Hold clips as latents with the number of their prompt.

    Shapes: latents AV([N, F, h, w, C], [N, T, C]), prompt [N].
    """

    latents: AV[Tensor]
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True)
class Pairs:
    """Hold teacher trajectories at the student's noise levels, noise first, clean last (Stage 2, paper Sec. 4).

    Shapes: states AV([N, K, F, h, w, C], [N, K, T, C]), sigmas [K], prompt [N].

    Attributes:
        states: the trajectories.
        sigmas: their noise levels.
        prompt: number of each one's prompt.
        notes: the settings that they were made under, see `pair_notes`; stored with them.
    """

    states: AV[Tensor]
    sigmas: Tensor
    prompt: Tensor
    notes: Mapping[str, object] = field(default_factory=dict)
    live = False

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def shapes(self) -> AV[tuple[int, ...]]:
        """Shapes of one trajectory: AV([K, F, h, w, C], [K, T, C])."""
        return self.states.map(lambda s: tuple(s.shape[1:]))

    def take(self, index: Tensor) -> tuple[AV[Tensor], Tensor]:
        """Give trajectories and the numbers of their prompts. Shapes: [B] to AV [B, K, ...] and [B]."""
        return self.states.map(lambda s: s[index]), self.prompt[index]

    def save(self, path: str | Path, names: Sequence[str], notes: Mapping[str, object] | None = None) -> Path:
        """Write as safetensors, atomically, with prompts and notes; states in bf16."""
        tensors = self.states.map(lambda s: s.to("cpu", torch.bfloat16).contiguous())._asdict()
        tensors |= {"sigmas": self.sigmas.cpu(), "prompt": self.prompt.cpu()}
        metadata = {"prompts": json.dumps(list(names)), "notes": json.dumps(dict(notes or {}))}
        return write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Pairs:
        """Read what `save` wrote.

        Raises:
            ValueError: the file cannot be read, or holds no trajectories.
        """
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name).to(device) for name in ("video", "audio", "sigmas", "prompt")}
                metadata = {name: json.loads(text) for name, text in file.metadata().items()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} holds no trajectories ({error}); `train pairs` makes them") from error
        states = AV(tensors["video"], tensors["audio"]).map(torch.Tensor.float)
        notes = {"prompts": by_names(metadata["prompts"])} | metadata.get("notes", {})
        return cls(states, tensors["sigmas"], tensors["prompt"], notes)


class StoredPairs:
    """Trajectories of a folder of shards, read when they are asked for; see `Pairs`.

    Args:
        folder: of shards.
        device: where states are given.
        group: the processes.

    Raises:
        ValueError: see `records.Records`; or the folder holds something else.
    """

    live = True

    def __init__(
        self, folder: str | Path, device: str | torch.device = "cpu", group: DistributedContext = ALONE
    ) -> None:
        self._records, self._device = _records_of("pairs", folder, group), torch.device(device)
        self.notes = self._records.notes
        self.sigmas = torch.tensor(self.notes["sigmas"])
        self.shapes = self.take(torch.tensor([0]))[0].map(lambda s: tuple(s.shape[1:]))

    def __len__(self) -> int:
        return len(self._records)

    def take(self, index: Tensor) -> tuple[AV[Tensor], Tensor]:
        """Read trajectories and the numbers of their prompts; see `Pairs.take`."""
        rows = self._records.rows(index.tolist())
        states = AV(rows["video"], rows["audio"]).map(lambda s: s.to(self._device).float())
        return states, rows["prompt"].to(self._device)


def by_names(names: Sequence[str]) -> dict[str, str]:
    """Give the setting of a list of prompts."""
    return records.by_content(f"{len(names)} prompts", records.digest(list(names)))


def pair_notes(prompts: Prompts | StoredPrompts, **more: object) -> dict[str, object]:
    """Give the settings that pairs are made under: prompts, what encoded them, and more by name."""
    return {"prompts": by_names(prompts.names), **more} | ({"text": prompts.text} if prompts.text else {})


def check_pairs(path: str | Path, pairs: Pairs | StoredPairs, notes: Mapping[str, object]) -> None:
    """Refuse pairs that were made under other settings; settings that their file does not say are printed.

    Raises:
        ValueError: with the settings that differ.
    """
    frames, height, width = pairs.shapes.video[1:4]
    sizes = {"count": len(pairs), "latents": [frames, pairs.shapes.audio[1]], "grid": [height, width]}
    kept = {**pairs.notes, **sizes, "sigmas": pairs.sigmas.tolist()}
    kept, notes = (
        settings | {"sigmas": [round(sigma, 4) for sigma in settings["sigmas"]]} if "sigmas" in settings else settings
        for settings in (kept, notes)
    )
    if changed := "; ".join(records.differences(kept, notes)):
        raise ValueError(f"{path} was made under other settings: {changed}; use those, or other pairs")
    if names := ", ".join(records.unknown(kept, notes)):
        print(f"{path} does not say its {names}: taken on trust", flush=True)


def _records_of(kind: str, folder: str | Path, group: DistributedContext) -> records.Records:
    opened = records.Records(folder, group)
    if opened.notes.get("kind") != kind:
        raise ValueError(f"{folder} holds {opened.notes.get('kind')!r}, expected {kind!r}")
    return opened


@torch.no_grad()
def ode_pairs(
    teacher: Transformer,
    prompts: Prompts | StoredPrompts,
    guidance: Guidance,
    step_list: Sequence[int],
    seeds: Sequence[int],
    latents: AV[int],
    grid: tuple[int, int],
    *,
    steps: int = 40,
    batch: int = 16,
    progress: bool = True,
    first: int = 0,
) -> Pairs:
    """Run the guided teacher and keep its states at the student's noise levels (paper Sec. 4).

    The prompt of clip i is `first` + i modulo the number of prompts; its noise comes from its seed alone.
    """
    device, shapes = teacher.proj_out.weight.device, teacher.config.latent_shapes(latents, grid)
    sigmas, keep = ltx2_sigmas(steps).to(device), snap_indices(step_list, steps)
    index = torch.arange(first, first + len(seeds), device=device) % len(prompts)

    def states(rows: slice) -> AV[Tensor]:
        noise = block_noise(seeds[rows], 0, shapes).map(lambda x: x.to(device))
        denoise = guided_denoiser(teacher, prompts.take(index[rows]), prompts.negative, guidance)
        return trajectory(denoise, noise, sigmas, keep)

    return _in_batches(states, sigmas[list(keep)], index, batch, "teacher trajectories" if progress else "")


@torch.no_grad()
def first_block_pairs(
    model: Transformer,
    causal: RolloutConfig,
    prompts: Prompts,
    seeds: Sequence[int],
    grid: tuple[int, int],
    *,
    blocks: int = 2,
    steps: int = 40,
    batch: int = 128,
) -> Pairs:
    """Run a causal model on the first blocks, one by one, and keep its states at the student's noise levels.

    Where a trajectory of block k ends depends on the clean blocks before it, its own noise, the prompt, and nothing
    else: the student can learn to jump there from its noise, as Causal-Forcing has it. The prompt of clip i is i
    modulo the number of prompts.

    Shapes: states AV([N, K, F, h, w, C], [N, K, T, C]), F and T latents of the blocks together.
    """
    sigmas, keep = ltx2_sigmas(steps).to(prompts.device), snap_indices(causal.steps, steps)
    index = (torch.arange(len(seeds)) % len(prompts)).to(prompts.device)

    def states(rows: slice) -> AV[Tensor]:
        text, parts = prompts.take(index[rows]), []
        cache = new_cache(model, causal, grid, len(text.video), blocks=blocks)
        for k in range(blocks):
            shapes, block = model.config.latent_shapes(causal.layout.block(k).map(len), grid), cache.open(k)
            noise = block_noise(seeds[rows], k, shapes).map(lambda x: x.to(prompts.device))

            def denoise(x: AV[Tensor], sigma: Tensor, block: OpenBlock = block) -> AV[Tensor]:
                return predict(model, x, float(sigma), text, cache, block)

            parts.append(trajectory(denoise, noise, sigmas, keep))
            update_cache(model, cache, k, text, parts[-1].map(lambda s: s[:, -1]), 0.0)
        return AV(*(torch.cat(streams, 2) for streams in zip(*parts, strict=True)))

    return _in_batches(states, sigmas[list(keep)], index, batch, "first blocks")


def _in_batches(states: Callable[[slice], AV[Tensor]], sigmas: Tensor, index: Tensor, batch: int, bar: str) -> Pairs:
    """Make the trajectories of all clips, batch by batch, under a progress bar with that name; "" shows none."""
    starts = tqdm(range(0, len(index), batch), desc=bar, disable=not bar, leave=False)
    parts = [states(slice(start, start + batch)) for start in starts]
    return Pairs(AV(*map(torch.cat, zip(*parts, strict=True))), sigmas.float().cpu(), index)


def store_pairs(
    folder: str | Path,
    make: Callable[[range], Pairs],
    count: int,
    notes: Mapping[str, object],
    *,
    rows_per_shard: int = 16,
    group: DistributedContext = ALONE,
) -> Path:
    """Make trajectories shard by shard, each process its share; shards that are there are kept.

    Args:
        folder: of shards.
        make: gives the trajectories of some clips.
        count: clips in all.
        notes: what the trajectories depend on, their `sigmas` among it; JSON.
        rows_per_shard: clips of a shard.
        group: the processes.
    """

    def tensors(rows: range) -> dict[str, Tensor]:
        pairs = make(rows)
        states = pairs.states.map(lambda s: s.to("cpu", torch.bfloat16).contiguous())
        return states._asdict() | {"prompt": pairs.prompt.cpu()}

    return records.write(folder, count, rows_per_shard, tensors, {"kind": "pairs", **notes}, group)
