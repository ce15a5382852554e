"""Say what a checkpoint holds, what is missing for which use, and what an export leaves out."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path

from omniforcing_lib import files
from omniforcing_lib.ltx2 import checkpoints, formats, parts
from omniforcing_lib.ltx2.checkpoints import Checkpoint
from omniforcing_lib.ltx2.exports import BESIDE

_USES = {"decode": ("video VAE", "audio VAE", "vocoder"), "encode prompts": ("text connectors", "text projection")}


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
    checkpoint = checkpoints.read(model)
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
