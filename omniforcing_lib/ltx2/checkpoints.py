"""Checkpoints of LTX-2's transformer: load them strictly, write them, say what they hold. Only safetensors are read.

`headers` reads what the files say of themselves, without a tensor.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from omniforcing_lib import files, safetensors_io
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.ltx2 import exports, formats, lora, low_memory, parts
from omniforcing_lib.ltx2.exports import BESIDE, SCALE
from omniforcing_lib.ltx2.headers import SHIPPED as SHIPPED
from omniforcing_lib.ltx2.headers import Checkpoint, read
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.safetensors_io import Reader
from omniforcing_lib.transformer import Transformer, empty, fresh_sinks

_log = logging.getLogger(__name__)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_USES = {"decode": ("video VAE", "audio VAE", "vocoder"), "encode prompts": ("text connectors", "text projection")}


def fitting(model: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint as `read` does; ValueError where its tensors are not those that its config describes."""
    checkpoint = read(model)
    if not (report := checkpoint.report()).ok:
        raise ValueError(f"{checkpoint.path} does not fit its own config: {report}")
    return checkpoint


def student(model: str | os.PathLike[str]) -> RolloutConfig:
    """Say how a student generates.

    Raises:
        ValueError: it is no causal student, or does not fit its own config.
    """
    if (causal := fitting(model).causal) is None:
        raise ValueError(f"{model} is no causal student (its config has no `omniforcing` part); train stage2 first")
    return causal


def load(
    model: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    sinks: int | None = None,
    changes: Mapping[str, object] | None = None,
    weights: str | None = None,
    offload: bool = False,
    loras: Sequence[str] = (),
) -> Transformer:
    """Load a transformer strictly, tensor by tensor, straight into its dtype and device.

    Settings that no tensor shows and the file does not say are named in a line of the log, as in `inspect`; so is a
    keyframe embedding that the config asks for and the file does not hold, which counts as zeros (specification 1.12).

    Args:
        model: `teacher`, `student` or the path of a file, an index or a folder in any format that `formats` knows.
        device: where it runs.
        dtype: of all its weights; on the CPU, weights that have it in the file stay mapped to the file.
        sinks: give a checkpoint this many new sinks; None keeps the file's.
        changes: config fields to override on purpose (an experiment with the wrong RoPE, say).
        weights: "fp8" keeps the weights of the blocks' linear layers in e4m3 with one scale per row, and computes in
            `dtype`.
        offload: keep the blocks in main memory and copy each to `device` when its turn comes; inference only.
        loras: files to add to the weights, in float32 and rounded once: each PATH or PATH:SCALE (`lora.read`).

    Raises:
        ValueError: names or shapes that do not fit, a LoRA's too, a tensor that is not finite, unknown `weights` or
            `dtype`.
    """
    if weights not in (None, "fp8"):
        raise ValueError(f"weights is None (in dtype) or 'fp8', found {weights!r}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is one of {', '.join(map(str, _DTYPES))}, found {dtype}")
    # 1. An empty model: as the config says, with new sinks and fp8 layers where they are asked for.
    checkpoint = fitting(model)
    terms = lora.read(loras, checkpoint.bare_shapes)
    added = f"{', '.join(loras)} added to {len(terms)} weights; no LoRA says which LTX-2 it was made for"
    for line in [*checkpoint.assumed(), *([added] if terms else [])]:
        _log.warning("%s: %s", checkpoint.path.name, line)
    config = replace(checkpoint.config, **(changes or {}))
    has_new_sinks = sinks is not None and sinks != config.num_audio_sink_tokens
    config = config.with_sinks(sinks) if has_new_sinks else config
    transformer = empty(config)
    if weights:
        with torch.device("meta"):
            transformer = low_memory.with_fp8_layers(transformer)
    fp8_layers = low_memory.fp8_names(transformer) if weights else set()
    # 2. Its tensors, one at a time.
    reader, state = Reader(checkpoint.entries), {}
    for bare in checkpoint.transformer:
        home = "cpu" if offload and bare.startswith("transformer_blocks.") else device
        if not (has_new_sinks and bare == "audio_sink_tokens"):
            to_fp8 = bare.removesuffix(".weight") in fp8_layers
            state |= _tensors(checkpoint, reader, bare, home, None if to_fp8 else dtype, terms.get(bare, ()))
    if has_new_sinks and sinks:
        state["audio_sink_tokens"] = fresh_sinks(config).to(device, dtype)
    transformer.load_state_dict(_with_keyframes(state, config), strict=True, assign=True)
    transformer.requires_grad_(False).eval()
    return low_memory.offload(transformer, device) if offload else transformer


def _with_keyframes(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Add the keyframe embedding as zeros where the config asks for it and the file does not hold it."""
    zeros = torch.zeros_like(state["scale_shift_table"][:1])
    return {formats.KEYFRAMES: zeros} | state if config.use_keyframes_abs_pos_embedding else state


def _tensors(
    checkpoint: Checkpoint,
    reader: Reader,
    bare: str,
    home: str | torch.device,
    dtype: torch.dtype | None,
    terms: Sequence[lora.Term] = (),
) -> dict[str, Tensor]:
    """Read one tensor in `dtype`, or for None as an fp8 weight with its scale; nothing else stays in memory."""
    name, scale = checkpoint.transformer[bare], checkpoint.scales.get(bare)
    if terms:
        weight = _tensors(checkpoint, reader, bare, home, torch.float32)[bare]
        weight = sum((term.of(home) for term in terms), start=weight)
        tensors = low_memory.quantise(weight) if dtype is None else (weight.to(dtype),)
        checked = tensors[dtype is None :]
    elif checkpoint.entries[name].dtype == "F8_E4M3" and (dtype is None or scale):
        weight = reader.get(name, device=home)
        scales = reader.get(scale, torch.float32, home) if scale else torch.ones(1, device=home)
        tensors = weight, scales.reshape(-1, 1).expand(len(weight), 1).contiguous()
        if dtype is not None:
            tensors = (low_memory.dequantise(*tensors, dtype),)
            reader.drop(name)
        checked = tensors
    elif dtype is None:
        tensors = low_memory.quantise(reader.get(name, device=home))
        checked = tensors[1:]  # where an entry of a row is not finite, the row's scale is not finite either
        reader.drop(name)
    else:
        checked = tensors = (reader.get(name, dtype, home),)
    if not all(map(safetensors_io.finite, checked)):
        raise ValueError(f"{checkpoint.path}: {name} holds values that are not finite")
    return dict(zip((bare, bare + "_scale"), tensors, strict=False))


def save(
    model: Transformer,
    path: str | os.PathLike[str],
    *,
    causal: RolloutConfig | None = None,
    notes: Mapping[str, object] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    version: str = "miniature",
) -> Path:
    """Write a transformer as an LTX-2 single file, atomically; fp8 weights and their scales are kept as they are.

    Args:
        model: on any device, offloaded or not.
        path: a .safetensors file.
        causal: how a student generates.
        notes: go to the metadata as JSON.
        dtype: of the tensors.
        version: which model it is, `model_version` of the metadata; a student has its teacher's.

    Raises:
        ValueError: the format cannot hold the model.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        is_fp8 = tensor.dtype == low_memory.FP8 or name.endswith(SCALE)
        state[name] = tensor.detach().to("cpu", tensor.dtype if is_fp8 else dtype)
    return exports.write(state, model.config, causal, _origin(version, notes or {}), files.given(path), "ltx2")


def export(model: str | os.PathLike[str], out: str | os.PathLike[str], *, to: str = "ltx2") -> Path:
    """Write the transformer of a checkpoint in another format, bit for bit, without building it.

    Args:
        model: what `load` takes.
        out: a .safetensors file, or for diffusers a folder that is not there yet.
        to: "ltx2" is an LTX-2 single file, "diffusers" a folder for `LTX2VideoTransformer3DModel.from_pretrained`.

    Raises:
        ValueError: the checkpoint does not fit its own config, or the format cannot hold it.
    """
    out = files.given(out)
    exports.check_path(out, to)
    checkpoint = fitting(model)
    reader = Reader(checkpoint.entries)
    names = checkpoint.transformer | {f"{bare}_scale": name for bare, name in checkpoint.scales.items()}
    state = {bare: reader.get(name) for bare, name in names.items()}
    if wrong := [bare for bare, tensor in state.items() if not safetensors_io.finite(tensor)]:
        raise ValueError(f"{checkpoint.path}: {names[wrong[0]]} holds values that are not finite")
    metadata = checkpoint.metadata
    origin = _origin(metadata.get("model_version", checkpoint.format.name), checkpoint.notes)
    state = _with_keyframes(state, checkpoint.config)
    return exports.write(state, checkpoint.config, checkpoint.causal, origin, out, to)


def _origin(version: str, notes: Mapping[str, object]) -> dict[str, str]:
    return {"model_version": version, "notes": json.dumps(dict(notes))}


def left_out(checkpoint: Checkpoint, to: str) -> list[str]:
    """List what an export of a checkpoint does not carry over, in one line each."""
    lines = []
    if others := checkpoint.others:
        lines.append(f"not of the transformer, left in {checkpoint.path}: {_listed(others)}")
    if to == "diffusers" and checkpoint.causal:
        lines.append(
            f"diffusers has no blocks, sinks or few-step schedules: they are in {BESIDE}, which is read here and "
            "not there; diffusers runs the weights bidirectionally"
        )
    return lines


def inspect(model: str | os.PathLike[str]) -> str:
    """Say what a checkpoint holds: format, version, config, dtypes, the key report, and what is missing for which use.

    Raises:
        ValueError: as `read`.
    """
    checkpoint = read(model)
    config, causal, names = checkpoint.config, checkpoint.causal, checkpoint.transformer.values()
    size = sum(math.prod(checkpoint.entries[name].shape) for name in names)
    dtypes = Counter(checkpoint.entries[name].dtype for name in names)
    folder = files.given(model)
    name = f"{Path(os.path.abspath(folder)).name}/" if folder.is_dir() else checkpoint.path.name
    features = {
        "gated attention": config.apply_gated_attention,
        "AdaLN of text attention": config.cross_attention_adaln,
        "AdaLN of the prompt": config.modulates_prompt_by_sigma,
        "no caption projection": config.caption_proj_before_connector,
        "no bias in the video's feed-forward layers": not config.ff_bias,
        "keyframe embedding": config.use_keyframes_abs_pos_embedding,
    }
    lines = [
        f"{name}: {checkpoint.format.name}, {size / 1e6:,.2f} M transformer parameters in {_listed(dtypes)}",
        f"version: LTX-{formats.version_of(checkpoint.transformer)} by its tensors, "
        f"{checkpoint.metadata.get('model_version', 'nothing')} by its metadata",
        f"other tensors: {_listed(checkpoint.others) or 'none'}",
        f"layers {config.num_layers}, widths {config.video_dim} video and {config.audio_dim} audio, "
        f"heads {config.num_attention_heads}",
        f"features: {', '.join(name for name, there in features.items() if there) or 'those of LTX-2.0'}",
        f"rope {config.rope_type}, grid {config.frequencies_precision}, "
        f"gate multiplier {config.av_ca_timestep_scale_multiplier}",
        *checkpoint.assumed(),
        f"audio sinks {config.num_audio_sink_tokens}",
        f"keys: {checkpoint.report()}",
    ]
    if causal:
        first, step = tuple(causal.layout.first), tuple(causal.layout.step)
        lines.append(f"causal student: first block {first}, then {step}, steps {causal.steps}")
    return "\n".join([*lines, *_missing(checkpoint)])


def _missing(checkpoint: Checkpoint) -> list[str]:
    """Say for each use what it needs that is not in the checkpoint, and which files beside it hold that."""
    there = set(checkpoint.others)
    if checkpoint.format is formats.DIFFUSERS:
        pipeline = checkpoint.path.parent.parent
        there |= {group for group, folder in formats.FOLDERS.items() if (pipeline / folder / "config.json").is_file()}
    lines = []
    for use, groups in _USES.items():
        if absent := [group for group in groups if group not in there]:
            lines.append(f"to {use}, missing: {', '.join(absent)}")
    files, missing = parts.companions(checkpoint.path, checkpoint.version)
    if others := [file.name for file in files if file != Path(os.path.abspath(checkpoint.path))]:
        lines.append(f"beside it: {', '.join(others)}; then missing: {', '.join(sorted(missing)) or 'nothing'}")
    if isinstance(trained := checkpoint.metadata.get("gemma_source_checkpoint"), dict):
        lines.append(f"to encode prompts, a Gemma of version {trained.get('gemma_version')}")
    if not checkpoint.causal:
        lines.append("to stream, missing: an `omniforcing` part, which Stage 2 adds to a causal student")
    return lines


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common())
