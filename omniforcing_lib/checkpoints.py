"""LTX-2 single files: read what they say, load strictly, write atomically. Only safetensors; no pickle, ever.

A checkpoint is one `.safetensors` file whose metadata holds a JSON `config`; the transformer's tensors carry the
prefix `model.diffusion_model.` (spec 1.2). The miniature's files have the same format. A student adds
`audio_sink_tokens` and an `omniforcing` part in its config.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omniforcing_lib.config import ModelConfig
from omniforcing_lib.files import write_tensors
from omniforcing_lib.rollout import Causal
from omniforcing_lib.transformer import Transformer

PREFIX = "model.diffusion_model."
NOT_TRANSFORMER = (PREFIX + "video_embeddings_connector.", PREFIX + "audio_embeddings_connector.")
DATA = Path(__file__).resolve().parent.parent / "data"


@dataclass(frozen=True)
class KeyReport:
    """Compare a file's transformer tensors with the model that its config describes."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Tell whether the file fits exactly."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} tensors match"]
        for name in ("missing", "unexpected", "mismatched"):
            if found := getattr(self, name):
                more = f", ... ({len(found)} in all)" if len(found) > 4 else ""
                lines.append(f"{name}: {', '.join(found[:4])}{more}")
        return "; ".join(lines)


@dataclass(frozen=True)
class Checkpoint:
    """Describe a file without loading its tensors."""

    path: Path
    metadata: dict
    config: ModelConfig
    causal: Causal | None
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @property
    def transformer(self) -> dict[str, str]:
        """Map bare transformer names to the file's names."""
        return {
            name.removeprefix(PREFIX): name
            for name in self.shapes
            if name.startswith(PREFIX) and not name.startswith(NOT_TRANSFORMER)
        }

    def report(self) -> KeyReport:
        """Compare names and shapes with the model on the meta device."""
        with torch.device("meta"):
            expected = {k: tuple(v.shape) for k, v in Transformer(self.config).state_dict().items()}
        found = {bare: self.shapes[name] for bare, name in self.transformer.items()}
        both = expected.keys() & found.keys()
        wrong = sorted(k for k in both if expected[k] != found[k])
        return KeyReport(
            tuple(sorted(both - set(wrong))),
            tuple(sorted(expected.keys() - found.keys())),
            tuple(sorted(found.keys() - expected.keys())),
            tuple(f"{k} is {list(found[k])}, expected {list(expected[k])}" for k in wrong),
        )


def resolve(model: str | os.PathLike[str]) -> Path:
    """Turn `teacher`, `student` or a path into the path of a file that is there."""
    shipped = DATA / f"{model}.safetensors"
    path = shipped if str(model) in ("teacher", "student", "stage2") else Path(model)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: give teacher, student or the path of a .safetensors file")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a .safetensors file; pickles (.pt, .ckpt, .bin) are refused")
    return path


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def read(model: str | os.PathLike[str]) -> Checkpoint:
    """Read config, names, shapes and dtypes of a file; no tensor is loaded."""
    path = resolve(model)
    with _opened(path) as file:
        raw = file.metadata() or {}
        slices = {name: file.get_slice(name) for name in file.keys()}
        shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
        dtypes = {name: str(s.get_dtype()) for name, s in slices.items()}
    if "config" not in raw:
        raise ValueError(
            f"{path} has no `config` in its metadata (found: {', '.join(raw) or 'none'}); LTX-2 files have it"
        )
    metadata = {k: _maybe_json(v) for k, v in raw.items()}
    config = ModelConfig.from_metadata(metadata["config"]["transformer"])
    sinks = shapes.get(PREFIX + "audio_sink_tokens", (1, 0, 0))[1]
    causal = metadata["config"].get("omniforcing")
    return Checkpoint(
        path, metadata, config.with_sinks(sinks), Causal.from_metadata(causal) if causal else None, shapes, dtypes
    )


def _maybe_json(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def load(
    model: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    sinks: int | None = None,
    changes: Mapping[str, object] | None = None,
) -> Transformer:
    """Load a transformer strictly, tensor by tensor, straight into its dtype and device.

    Args:
        model: `teacher`, `student` or a path.
        device: where it goes.
        dtype: of all its weights.
        sinks: give a checkpoint without sinks this many new ones; None keeps the file's.
        changes: config fields to override on purpose (an experiment with the wrong RoPE, say).

    Raises:
        ValueError: names or shapes that do not fit, a tensor that is not finite.
    """
    checkpoint = read(model)
    report = checkpoint.report()
    if not report.ok:
        raise ValueError(f"{checkpoint.path} does not fit its own config: {report}")
    config = replace(checkpoint.config, **(changes or {}))
    state = _tensors(checkpoint, device, dtype)
    if sinks is not None and sinks != config.num_audio_sink_tokens:
        config = config.with_sinks(sinks)
        state.pop("audio_sink_tokens", None)
        if sinks:
            generator = torch.Generator().manual_seed(0)
            fresh = torch.randn(1, sinks, config.audio_dim, generator=generator) * 0.02
            state["audio_sink_tokens"] = fresh.to(device, dtype)
    with torch.device("meta"):
        built = Transformer(config)
    built.load_state_dict(state, strict=True, assign=True)
    return built.requires_grad_(False).eval()


def _tensors(checkpoint: Checkpoint, device: str | torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    state = {}
    with _opened(checkpoint.path) as file:
        for bare, name in checkpoint.transformer.items():
            state[bare] = file.get_tensor(name).to(device, dtype)
            if not torch.isfinite(state[bare]).all():
                raise ValueError(f"{checkpoint.path}: {name} holds values that are not finite")
    return state


def save(
    model: Transformer,
    path: str | os.PathLike[str],
    *,
    causal: Causal | None = None,
    notes: Mapping[str, object] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a transformer as an LTX-2 single file, atomically; `notes` goes to the metadata as JSON."""
    config: dict[str, object] = {"transformer": model.config.to_metadata()}
    if causal is not None:
        config["omniforcing"] = causal.to_metadata()
    metadata = {"config": json.dumps(config), "model_version": "miniature", "notes": json.dumps(dict(notes or {}))}
    state = {PREFIX + k: v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
    return write_tensors(path, state, metadata)


def inspect(model: str | os.PathLike[str]) -> str:
    """Say what a file holds: config, parameters, dtypes and the key report."""
    checkpoint = read(model)
    config, causal = checkpoint.config, checkpoint.causal
    sizes = {name: torch.Size(shape).numel() for name, shape in checkpoint.shapes.items()}
    own = sum(sizes[name] for name in checkpoint.transformer.values())
    kinds = sorted({checkpoint.dtypes[name] for name in checkpoint.transformer.values()})
    lines = [
        f"{checkpoint.path.name}: {own / 1e6:,.2f} M transformer parameters in {', '.join(kinds)}",
        f"other tensors: {sum(sizes.values()) - own:,} numbers in {len(sizes) - len(checkpoint.transformer)}",
        f"layers {config.num_layers}, widths {config.video_dim} video and {config.audio_dim} audio, "
        f"heads {config.num_attention_heads}",
        f"rope {config.rope_type}, grid {config.frequencies_precision}, "
        f"gate multiplier {config.av_ca_timestep_scale_multiplier}",
        f"audio sinks {config.num_audio_sink_tokens}",
        f"keys: {checkpoint.report()}",
    ]
    if causal:
        first, step = tuple(causal.layout.first), tuple(causal.layout.step)
        lines.append(f"causal student: first block {first}, then {step}, steps {causal.steps}")
    return "\n".join(lines)
