"""Checkpoints of LTX-2's transformer: say what a file holds, load it strictly, write it. Only safetensors, ever.

Four formats are read: LTX-2 single files (prefix `model.diffusion_model.`, JSON `config` in the metadata, spec 1.2),
diffusers folders, OmniForcing releases, and students of this project: LTX-2 files with `audio_sink_tokens` and an
`omniforcing` part in their config. The miniature's files are of the first and the last.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from omniforcing_lib import files, safetensors_io
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.files import DATA
from omniforcing_lib.flow import RELEASED_STEPS
from omniforcing_lib.layout import PAPER, RELEASED
from omniforcing_lib.ltx2 import exports, formats, low_memory
from omniforcing_lib.ltx2.exports import BESIDE, INDEX, SCALE, Origin
from omniforcing_lib.ltx2.formats import Format
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.safetensors_io import Entry, Shards
from omniforcing_lib.transformer import Transformer, fresh_sinks

SHIPPED = ("teacher", "stage2", "student")
"""Names of the checkpoints in `DATA`, which stand for their paths."""
_UNUSED_SCALE = ".input_scale"
_DECISIVE = ("rope_type", "frequencies_precision", "timestep_scale_multiplier", "av_ca_timestep_scale_multiplier")
_SAMPLE = 4096  # bytes of every tensor that a fingerprint reads


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
    """Describe a checkpoint without loading its tensors; `causal` says how a student generates."""

    path: Path
    format: Format
    metadata: dict
    config: ModelConfig
    causal: RolloutConfig | None
    entries: dict[str, Entry]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Map the file's names to shapes."""
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """Map the file's names to dtypes, as safetensors calls them."""
        return {name: entry.dtype for name, entry in self.entries.items()}

    @cached_property
    def transformer(self) -> dict[str, str]:
        """Map bare transformer names to the file's names."""
        return {bare: name for bare, name in self._own.items() if not self._is_scale(bare)}

    @cached_property
    def scales(self) -> dict[str, str]:
        """Map bare names of fp8 weights to the file's names of their scales."""
        return {
            bare.removesuffix("_scale"): name
            for bare, name in self._own.items()
            if bare.endswith(SCALE) and self._is_scale(bare)
        }

    @cached_property
    def _own(self) -> dict[str, str]:
        return {bare: name for name in self.entries if (bare := self.format.bare(name)) is not None}

    def _is_scale(self, bare: str) -> bool:
        """Tell whether a tensor only belongs to the fp8 weight beside it."""
        layer = bare.removesuffix(SCALE).removesuffix(_UNUSED_SCALE)
        weight = self.entries.get(self.format.stored(f"{layer}.weight"))
        return layer != bare and weight is not None and weight.dtype == "F8_E4M3"

    @cached_property
    def fingerprint(self) -> str:
        """Hash settings and the beginning of every tensor: 38 GB take a moment, and the file's name does not count."""
        settings = [self.config.to_metadata(), self.causal and self.causal.to_metadata()]
        found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for bare, name in sorted((self.transformer | {f"{k} scale": v for k, v in self.scales.items()}).items()):
            entry = self.entries[name]
            with entry.path.open("rb") as file:
                file.seek(entry.start)
                found.update(f"{bare} {entry.dtype} {entry.shape}".encode())
                found.update(file.read(min(_SAMPLE, entry.stop - entry.start)))
        return found.hexdigest()

    def report(self) -> KeyReport:
        """Compare names, shapes and kinds with the model on the meta device."""
        with torch.device("meta"):
            expected = {k: tuple(v.shape) for k, v in Transformer(self.config).state_dict().items()}
        found = {bare: self.entries[name] for bare, name in self.transformer.items()}
        both = expected.keys() & found.keys()
        wrong = {k: f"{k} {why}" for k in both if (why := _misfit(found[k], expected[k]))}
        for bare in self.scales.keys() & both:
            if math.prod(self.entries[self.scales[bare]].shape) not in (1, expected[bare][0]):
                wrong[bare] = f"{bare}_scale is not one number, nor one for each of {expected[bare][0]} rows"
        return KeyReport(
            tuple(sorted(both - wrong.keys())),
            tuple(sorted(expected.keys() - found.keys())),
            tuple(sorted(found.keys() - expected.keys())),
            tuple(wrong[k] for k in sorted(wrong)),
        )


def _misfit(entry: Entry, shape: tuple[int, ...]) -> str | None:
    if entry.shape != shape:
        return f"is {list(entry.shape)}, expected {list(shape)}"
    return (
        None
        if entry.dtype in safetensors_io.FLOATS
        else f"is {entry.dtype}, expected one of {', '.join(safetensors_io.FLOATS)}"
    )


def resolve(model: str | os.PathLike[str]) -> Path:
    """Turn `teacher`, `student` or a path into the path of a file, or of an index over files, that is there.

    Links are not followed: in a content-addressed cache the file behind one is named by its hash, alone in its folder.

    Raises:
        ValueError: nothing is there, or a pickle, or a folder with more than one checkpoint.
    """
    path = DATA / f"{model}.safetensors" if str(model) in SHIPPED else files.given(model)
    if not path.exists():
        raise ValueError(f"no checkpoint at {path}: give teacher, student, a .safetensors file, an index or a folder")
    if path.is_dir():
        folder = path / "transformer" if (path / "model_index.json").is_file() else path
        alone = [file for file in sorted(folder.glob("*.safetensors")) if file.name != BESIDE]
        inside = sorted(folder.glob("*" + INDEX)) or alone
        if len(inside) != 1:
            names = ", ".join(file.name for file in inside) or "neither"
            raise ValueError(f"{folder} is to hold one index ({INDEX}) or one .safetensors file, found {names}")
        return inside[0]
    if not path.name.endswith((".safetensors", INDEX)):
        raise ValueError(f"{path} is not a .safetensors file; pickles (.pt, .ckpt, .bin) are refused")
    return path


def read(model: str | os.PathLike[str]) -> Checkpoint:
    """Read format, config, names, shapes and dtypes of any of the four formats; no tensor is loaded.

    Raises:
        ValueError: what is there is damaged, of no known format, or asks for what this model does not do.
    """
    path = resolve(model)
    found = safetensors_io.many_files(path) if path.name.endswith(INDEX) else safetensors_io.one_file(path)
    try:
        return _described(path, found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _described(path: Path, found: Shards) -> Checkpoint:
    kind = formats.detect(found.entries)
    entries, metadata = found.entries, {k: _maybe_json(v) for k, v in found.metadata.items()}
    if kind is formats.DIFFUSERS and (beside := path.parent / BESIDE).is_file():
        extra = safetensors_io.one_file(beside)
        entries, metadata = entries | extra.entries, metadata | {k: _maybe_json(v) for k, v in extra.metadata.items()}
    shapes = {bare: entry.shape for name, entry in entries.items() if (bare := kind.bare(name)) is not None}
    config = _config(kind, path, metadata, shapes)
    sinks = shapes.get("audio_sink_tokens", ())
    config = config.with_sinks(sinks[1] if len(sinks) == 3 else 0)
    causal = _causal(kind, metadata, config)
    if kind is formats.LTX2 and causal:
        kind = formats.STUDENT
    return Checkpoint(path, kind, metadata, config, causal, entries)


def _config(kind: Format, path: Path, metadata: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    if kind is formats.DIFFUSERS:
        beside = path.parent / "config.json"
        if not beside.is_file():
            raise ValueError("the names are those of diffusers, but there is no config.json beside them")
        return formats.from_diffusers(safetensors_io.read_json(beside))
    if "config" in metadata:
        part = metadata["config"].get("transformer") if isinstance(metadata["config"], dict) else None
        if not isinstance(part, dict):
            raise ValueError("`config` in its metadata is no JSON table with a `transformer` part; LTX-2 files have it")
        return ModelConfig.from_metadata(part)
    if kind is formats.LTX2:
        raise ValueError(f"no `config` in its metadata (found: {', '.join(metadata) or 'none'}); LTX-2 files have it")
    config = formats.from_shapes(shapes)
    return replace(config, **formats.RELEASED_CODE) if kind.causal_release else config


def _causal(kind: Format, metadata: Mapping, config: ModelConfig) -> RolloutConfig | None:
    part = metadata.get("omniforcing") or metadata.get("config", {}).get("omniforcing")
    if part:
        try:
            return RolloutConfig.from_metadata(part)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"its `omniforcing` part is damaged: {error!r}") from error
    if not kind.causal_release or "config" in metadata:
        return None
    if sinks := config.num_audio_sink_tokens:
        return RolloutConfig(replace(PAPER, sinks=sinks))
    return RolloutConfig(RELEASED, RELEASED_STEPS)


def _maybe_json(text: str) -> object:
    try:
        return json.loads(text) if text.startswith("{") else text
    except (json.JSONDecodeError, RecursionError):
        return text


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
) -> Transformer:
    """Load a transformer strictly, tensor by tensor, straight into its dtype and device.

    Args:
        model: `teacher`, `student` or the path of a file, an index or a folder in any of the four formats.
        device: where it runs.
        dtype: of all its weights; those of a file on the CPU that has it already stay mapped to the file.
        sinks: give a checkpoint without sinks this many new ones; None keeps the file's.
        changes: config fields to override on purpose (an experiment with the wrong RoPE, say).
        weights: "fp8" keeps the weights of the blocks' linear layers in e4m3 with a scale a row, computed in `dtype`.
        offload: keep the blocks in main memory and bring each to `device` when its turn comes; inference only.

    Raises:
        ValueError: names or shapes that do not fit, a tensor that is not finite, unknown `weights` or `dtype`.
    """
    if weights not in (None, "fp8"):
        raise ValueError(f"weights is None (in dtype) or 'fp8', found {weights!r}")
    if dtype not in (allowed := (torch.float32, torch.bfloat16, torch.float16, torch.float64)):
        raise ValueError(f"dtype is one of {', '.join(map(str, allowed))}, found {dtype}")
    checkpoint = fitting(model)
    config = replace(checkpoint.config, **(changes or {}))
    fresh = sinks is not None and sinks != config.num_audio_sink_tokens
    with torch.device("meta"):
        built = Transformer(config.with_sinks(sinks) if fresh else config)
        built = low_memory.with_fp8_layers(built) if weights else built
    narrow = low_memory.fp8_names(built) if weights else set()
    reader, state = safetensors_io.Reader(checkpoint.entries), {}
    for bare in checkpoint.transformer:
        home = "cpu" if offload and bare.startswith("transformer_blocks.") else device
        if not (fresh and bare == "audio_sink_tokens"):
            state |= _tensors(checkpoint, reader, bare, home, dtype, bare.removesuffix(".weight") in narrow)
    if fresh and sinks:
        state["audio_sink_tokens"] = fresh_sinks(config.with_sinks(sinks)).to(device, dtype)
    built.load_state_dict(state, strict=True, assign=True)
    built.requires_grad_(False).eval()
    return low_memory.offload(built, device) if offload else built


def fitting(model: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint as `read` does; ValueError where its tensors are not those that its config describes."""
    checkpoint = read(model)
    if not (report := checkpoint.report()).ok:
        raise ValueError(f"{checkpoint.path} does not fit its own config: {report}")
    return checkpoint


def _tensors(
    checkpoint: Checkpoint,
    reader: safetensors_io.Reader,
    bare: str,
    home: str | torch.device,
    dtype: torch.dtype,
    narrow: bool,
) -> dict[str, Tensor]:
    """Read one tensor in `dtype`, or an fp8 weight and its scale; nothing but the result stays in memory."""
    name = checkpoint.transformer[bare]
    if checkpoint.entries[name].dtype == "F8_E4M3" and (narrow or bare in checkpoint.scales):
        made = told = reader.get(name, device=home), _scale(checkpoint, reader, bare, home)
        if not narrow:
            made = told = (low_memory.dequantise(*made, dtype),)
            reader.drop(name)
    elif narrow:
        made = low_memory.quantise(reader.get(name, device=home))
        told = made[1:]  # where an entry of a row is not finite, neither is the row's scale
        reader.drop(name)
    else:
        made = told = (reader.get(name, dtype, home),)
    if not all(map(_finite, told)):
        raise ValueError(f"{checkpoint.path}: {name} holds values that are not finite")
    return dict(zip((bare, bare + "_scale"), made, strict=False))


def _scale(checkpoint: Checkpoint, reader: safetensors_io.Reader, bare: str, home: str | torch.device) -> Tensor:
    """Give the scale of an fp8 weight a row; 1 where the file has none. Shapes: [out, 1]."""
    rows = checkpoint.entries[checkpoint.transformer[bare]].shape[0]
    name = checkpoint.scales.get(bare)
    scale = reader.get(name, torch.float32, home) if name else torch.ones(1, device=home)
    return scale.reshape(-1, 1).expand(rows, 1).contiguous()


def _finite(tensor: Tensor) -> bool:
    if tensor.is_meta:
        return True
    if tensor.dtype == low_memory.FP8:
        return not any((part & 0x7F == 0x7F).any() for part in tensor.view(torch.uint8).flatten().split(1 << 20))
    return torch.stack(tensor.aminmax()).isfinite().all()


def save(
    model: Transformer,
    path: str | os.PathLike[str],
    *,
    causal: RolloutConfig | None = None,
    notes: Mapping[str, object] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    to: str = "ltx2",
    version: str = "miniature",
) -> Path:
    """Write a transformer, atomically; fp8 weights and their scales are kept as they are.

    Args:
        model: on any device, offloaded or not.
        path: a .safetensors file, or for diffusers a folder that is not there yet.
        causal: how a student generates.
        notes: go to the metadata as JSON.
        dtype: of the tensors.
        to: "ltx2" is an LTX-2 single file, "diffusers" a folder for `LTX2VideoTransformer3DModel.from_pretrained`.
        version: which model it is, `model_version` of the metadata; a student has its teacher's.

    Raises:
        ValueError: the format cannot hold the model.
    """

    def stored(name: str, tensor: Tensor) -> Tensor:
        kept = tensor.dtype == low_memory.FP8 or name.endswith(SCALE)
        return tensor.detach().to("cpu", tensor.dtype if kept else dtype)

    state = {name: stored(name, tensor) for name, tensor in model.state_dict().items()}
    return exports.write(state, model.config, causal, Origin(version, notes or {}), files.given(path), to)


def export(model: str | os.PathLike[str], out: str | os.PathLike[str], *, to: str = "ltx2") -> Path:
    """Write the transformer of a checkpoint in another format, bit for bit, without building it.

    Args:
        model: what `load` takes.
        out: as `save`'s path.
        to: as `save`'s.

    Raises:
        ValueError: the checkpoint does not fit its own config, or the format cannot hold it.
    """
    out = files.given(out)
    exports.check_path(out, to)
    checkpoint = fitting(model)
    reader = safetensors_io.Reader(checkpoint.entries)
    names = checkpoint.transformer | {f"{bare}_scale": name for bare, name in checkpoint.scales.items()}
    state = {bare: reader.get(name) for bare, name in names.items()}
    if wrong := [bare for bare, tensor in state.items() if not _finite(tensor)]:
        raise ValueError(f"{checkpoint.path}: {names[wrong[0]]} holds values that are not finite")
    metadata = checkpoint.metadata
    origin = Origin(metadata.get("model_version", checkpoint.format.name), metadata.get("notes", {}))
    return exports.write(state, checkpoint.config, checkpoint.causal, origin, out, to)


def left_out(checkpoint: Checkpoint, to: str) -> list[str]:
    """Say in a line each what an export of a checkpoint does not carry over."""
    lines = []
    if others := _others(checkpoint):
        lines.append(f"not of the transformer, left in {checkpoint.path}: {others}")
    if to == "diffusers" and checkpoint.causal:
        lines.append(
            f"diffusers has no blocks, sinks or few-step schedules: they are in {BESIDE}, which is read here and "
            "not there; diffusers runs the weights bidirectionally"
        )
    return lines


def inspect(model: str | os.PathLike[str]) -> str:
    """Say what a checkpoint holds: format, config, parameters, dtypes and the key report."""
    checkpoint = read(model)
    config, causal, names = checkpoint.config, checkpoint.causal, checkpoint.transformer.values()
    size = sum(math.prod(checkpoint.entries[name].shape) for name in names)
    kinds = Counter(checkpoint.entries[name].dtype for name in names)
    folder = files.given(model)
    name = f"{Path(os.path.abspath(folder)).name}/" if folder.is_dir() else checkpoint.path.name
    features = {
        "gated attention": config.apply_gated_attention,
        "AdaLN of text attention": config.cross_attention_adaln,
        "AdaLN of the prompt": config.modulates_prompt_by_sigma,
        "no caption projection": config.caption_proj_before_connector,
    }
    lines = [
        f"{name}: {checkpoint.format.name}, {size / 1e6:,.2f} M transformer parameters in "
        + ", ".join(f"{dtype} ({count})" for dtype, count in kinds.most_common()),
        f"other tensors: {_others(checkpoint) or 'none'}",
        f"layers {config.num_layers}, widths {config.video_dim} video and {config.audio_dim} audio, "
        f"heads {config.num_attention_heads}",
        f"features: {', '.join(name for name, there in features.items() if there) or 'those of LTX-2.0'}",
        f"rope {config.rope_type}, grid {config.frequencies_precision}, "
        f"gate multiplier {config.av_ca_timestep_scale_multiplier}",
        f"audio sinks {config.num_audio_sink_tokens}",
        f"keys: {checkpoint.report()}",
    ]
    if assumed := _assumed(checkpoint):
        lines.insert(5, assumed)
    if causal:
        first, step = tuple(causal.layout.first), tuple(causal.layout.step)
        lines.append(f"causal student: first block {first}, then {step}, steps {causal.steps}")
    return "\n".join(lines)


def _assumed(checkpoint: Checkpoint) -> str:
    """Say which settings that no tensor shows were not read from the checkpoint but follow from its format."""
    if checkpoint.format is formats.DIFFUSERS:
        return ""
    if "config" not in checkpoint.metadata:
        return f"settings: the file carries none; these are what an {checkpoint.format.name} is run with"
    absent = [name for name in _DECISIVE if name not in checkpoint.metadata["config"]["transformer"]]
    return f"settings: the file does not say {', '.join(absent)}; taken from LTX-2.0" if absent else ""


def _others(checkpoint: Checkpoint) -> str:
    """Count the tensors that are not the transformer's, by what they belong to."""
    other = (name for name in checkpoint.entries if checkpoint.format.bare(name) is None)
    found = Counter(formats.group(name) or "unknown" for name in other)
    return ", ".join(f"{part} ({count})" for part, count in found.items())
