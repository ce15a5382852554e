"""Write a transformer's tensors as an LTX-2 single file or as a diffusers folder, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from omniforcing_lib import files
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.ltx2 import formats
from omniforcing_lib.rollout import RolloutConfig

BESIDE = "omniforcing.safetensors"
"""What a diffusers folder has no place for (sinks, `omniforcing` config, origin): diffusers reads past this file."""

INDEX = ".safetensors.index.json"
SCALE = ".weight_scale"
_STEM = "diffusion_pytorch_model"
_SHARD_BYTES = 5_000_000_000


class Origin(NamedTuple):
    """Say which model it is (`model_version` of the metadata) and what to remember of its making, as JSON."""

    version: str
    notes: Mapping[str, object]

    @property
    def metadata(self) -> dict[str, str]:
        """Give both as texts."""
        return {"model_version": self.version, "notes": json.dumps(dict(self.notes))}


def check_path(path: Path, to: str) -> None:
    """Refuse a path that does not suit its format, or cannot be written, before any work.

    Args:
        path: a .safetensors file, or for diffusers a folder that is not there yet.
        to: "ltx2" or "diffusers".

    Raises:
        ValueError: with what is wrong.
    """
    if to not in _WRITERS:
        raise ValueError(f"a checkpoint is written as one of {', '.join(_WRITERS)}, found {to!r}")
    if to == "ltx2" and path.suffix != ".safetensors":
        raise ValueError(f"an LTX-2 file ends in .safetensors, found {path}")
    if to == "diffusers":
        files.check_new(path)
    files.check_file(path)


def write(
    state: Mapping[str, Tensor], config: ModelConfig, causal: RolloutConfig | None, origin: Origin, path: Path, to: str
) -> Path:
    """Write bare tensors with all that their format can hold of config, student and notes.

    Args:
        state: bare names to tensors on the CPU.
        config: the model's.
        causal: how a student generates.
        origin: which model it is, and how it was made.
        path: see `check_path`.
        to: "ltx2" or "diffusers".

    Raises:
        ValueError: the format cannot hold the model, or the path does not suit it.
    """
    check_path(path, to)
    return _WRITERS[to]({k: v.contiguous() for k, v in state.items()}, config, causal, origin, path)


def _write_ltx2(
    state: Mapping[str, Tensor], config: ModelConfig, causal: RolloutConfig | None, origin: Origin, path: Path
) -> Path:
    parts = {"transformer": config.to_metadata()} | ({"omniforcing": causal.to_metadata()} if causal else {})
    metadata = {"config": json.dumps(parts)} | origin.metadata
    return files.write_tensors(path, {formats.LTX2.stored(k): v for k, v in state.items()}, metadata)


def _write_diffusers(
    state: Mapping[str, Tensor], config: ModelConfig, causal: RolloutConfig | None, origin: Origin, path: Path
) -> Path:
    if narrow := [name for name in state if name.endswith(SCALE)]:
        raise ValueError(f"diffusers has no fp8 weights with scales ({narrow[0]}); load them in a dtype and save that")
    settings = formats.to_diffusers(config)
    sinks = {name: tensor for name, tensor in state.items() if name == "audio_sink_tokens"}
    renamed = {formats.DIFFUSERS.stored(name): tensor for name, tensor in state.items() if name not in sinks}
    with files.filling(path) as folder:
        _write_shards(folder, renamed)
        student = {"omniforcing": json.dumps(causal.to_metadata())} if causal else {}
        files.write_tensors(folder / BESIDE, sinks, origin.metadata | student)
        files.write_json(folder / "config.json", settings)
    return path


def _write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file, or several and their index."""
    pieces = list(_pieces(tensors, _SHARD_BYTES))
    if len(pieces) == 1:
        files.write_tensors(folder / f"{_STEM}.safetensors", tensors, {"format": "pt"})
        return
    where: dict[str, str] = {}
    for i, piece in enumerate(pieces, 1):
        name = f"{_STEM}-{i:05}-of-{len(pieces):05}.safetensors"
        files.write_tensors(folder / name, piece, {"format": "pt"})
        where |= dict.fromkeys(piece, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    files.write_json(folder / (_STEM + INDEX), {"metadata": {"total_size": total}, "weight_map": where})


_WRITERS = {"ltx2": _write_ltx2, "diffusers": _write_diffusers}


def _pieces(state: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """Cut tensors into runs of at most `limit` bytes, or of one tensor."""
    piece, held = {}, 0
    for name, tensor in state.items():
        if piece and held + tensor.nbytes > limit:
            yield piece
            piece, held = {}, 0
        piece[name], held = tensor, held + tensor.nbytes
    yield piece
