"""Write a transformer's tensors as an LTX-2 single file or as a diffusers folder, atomically; convert a pickle."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from omniforcing_lib import files
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.ltx2 import formats
from omniforcing_lib.rollout import RolloutConfig

FORMATS = ("ltx2", "diffusers")
BESIDE = "omniforcing.safetensors"
"""What a diffusers folder has no place for (sinks, `omniforcing` config, origin): diffusers does not read this file."""
INDEX = ".safetensors.index.json"
SCALE = ".weight_scale"
_SHARD_BYTES = 5_000_000_000
_STATES = ("generator_ema", "generator", "model", "state_dict")
"""Under which of its names a published pickle holds the student's tensors; the first one there counts."""


def check_path(path: Path, to: str) -> None:
    """Refuse a path that does not suit its format, or cannot be written, before any work.

    Args:
        path: a .safetensors file, or for diffusers a folder that is not there yet.
        to: one of `FORMATS`.

    Raises:
        ValueError: with what is wrong.
    """
    if to not in FORMATS:
        raise ValueError(f"a checkpoint is written as one of {', '.join(FORMATS)}, found {to!r}")
    if to == "ltx2" and path.suffix != ".safetensors":
        raise ValueError(f"an LTX-2 file ends in .safetensors, found {path}")
    if to == "diffusers":
        files.check_new(path)
        if find_spec("huggingface_hub") is None:
            raise ValueError("a diffusers folder is written by huggingface_hub; pip install 'omniforcing-lib[ltx2]'")
    files.check_file(path)


def write(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    causal: RolloutConfig | None,
    origin: Mapping[str, str],
    path: Path,
    to: str,
) -> Path:
    """Write tensors with all that the format can hold of config, student and origin.

    Args:
        state: bare names to tensors on the CPU.
        config: the model's.
        causal: how a student generates.
        origin: metadata on which model it is (`model_version`) and how it was made (`notes`).
        path: see `check_path`.
        to: one of `FORMATS`.

    Raises:
        ValueError: the format cannot hold the model, or the path does not suit it.
    """
    check_path(path, to)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    student = {"omniforcing": causal.to_metadata()} if causal else {}
    if to == "ltx2":
        metadata = {"config": json.dumps({"transformer": config.to_metadata()} | student), **origin}
        return files.write_tensors(path, {formats.LTX2.stored(k): v for k, v in state.items()}, metadata)

    if scales := [name for name in state if name.endswith(SCALE)]:
        raise ValueError(f"diffusers has no fp8 weights with scales ({scales[0]}); load them in a dtype and save that")
    settings = formats.to_diffusers(config)
    sinks = {name: state.pop(name) for name in list(state) if name == "audio_sink_tokens"}
    with files.filling(path) as folder:
        _write_shards(folder, {formats.DIFFUSERS.stored(name): tensor for name, tensor in state.items()})
        beside = {name: json.dumps(part) for name, part in student.items()}
        files.write_tensors(folder / BESIDE, sinks, {**origin, **beside})
        files.write_json(folder / "config.json", settings)
    return path


def convert(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Turn a published pickle of tensors into a .safetensors file with the same names and numbers.

    PyTorch's unpickler for tensors alone (`weights_only`) reads it, mapped to the file: nothing in it is executed.

    Raises:
        ValueError: it is no such pickle, or holds anything but tensors.
    """
    path, out = files.given(path), files.given(out)
    check_path(out, "ltx2")
    try:
        held = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        first = str(error).split("\n")[0]
        raise ValueError(f"{path} is no pickle of tensors alone, and nothing of it was executed: {first}") from error
    named = isinstance(held, dict) and next((name for name in _STATES if isinstance(held.get(name), dict)), None)
    state = held[named] if named else held
    wrong = [n for n, t in state.items() if not isinstance(t, Tensor)] if isinstance(state, dict) else [type(state)]
    if wrong or not state:
        raise ValueError(f"{path} is to hold names and tensors, also under {', '.join(_STATES)}; found {wrong[:1]}")
    return files.write_tensors(out, {name: tensor.detach() for name, tensor in state.items()})


def _write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file, or several of at most `_SHARD_BYTES` and their index, under diffusers' names."""
    from huggingface_hub import split_torch_state_dict_into_shards

    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    shards = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=_SHARD_BYTES)
    for name, members in shards.filename_to_tensors.items():
        files.write_tensors(folder / name, {member: tensors[member] for member in members}, {"format": "pt"})
    if shards.is_sharded:
        listing = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        files.write_json(folder / pattern.format(suffix="").replace(".safetensors", INDEX), listing)
