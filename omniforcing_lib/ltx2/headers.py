"""What the files of a checkpoint say of themselves: format, config, names, shapes and dtypes; no tensor is loaded.

What is read: LTX-2 single files (prefix `model.diffusion_model.`, JSON `config` in the metadata), diffusers folders,
OmniForcing's and TaoMate's releases, and students of this project: LTX-2 files with `audio_sink_tokens` and an
`omniforcing` part in their config. The miniature's files are of the first and the last. Source: specification 1.2.
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

from omniforcing_lib import files, safetensors_io
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.flow import PAPER_STEPS, RELEASED_STEPS
from omniforcing_lib.layout import PAPER, RELEASED
from omniforcing_lib.ltx2 import formats
from omniforcing_lib.ltx2.exports import BESIDE, INDEX, SCALE
from omniforcing_lib.ltx2.formats import Format
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.safetensors_io import FLOATS, Entry
from omniforcing_lib.transformer import empty

SHIPPED = ("teacher", "stage2", "student")
"""Names of the checkpoints in `files.DATA`, which stand for their paths."""
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
        for kind in ("missing", "unexpected", "mismatched"):
            if names := getattr(self, kind):
                more = f", ... ({len(names)} in all)" if len(names) > 4 else ""
                lines.append(f"{kind}: {', '.join(names[:4])}{more}")
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
    def version(self) -> str:
        """The generation of LTX-2 by the metadata, or by the tensors where that is no number."""
        said = self.metadata.get("model_version", "")
        return said if formats.version_number(said) else formats.version_of(self.transformer)

    @property
    def notes(self) -> dict:
        """What `checkpoints.save` noted of how it was made; empty for others' files."""
        return self.metadata.get("notes", {})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Map the file's names to shapes."""
        return {name: entry.shape for name, entry in self.entries.items()}

    @cached_property
    def transformer(self) -> dict[str, str]:
        """Map bare transformer names to the file's names."""
        return {bare: name for bare, name in self._bare.items() if not self._belongs_to_fp8(bare)}

    @property
    def bare_shapes(self) -> dict[str, tuple[int, ...]]:
        """Map bare transformer names to shapes."""
        return {bare: self.entries[name].shape for bare, name in self.transformer.items()}

    @cached_property
    def scales(self) -> dict[str, str]:
        """Map bare names of fp8 weights to the file's names of their scales."""
        scales = ((bare, name) for bare, name in self._bare.items() if bare.endswith(SCALE))
        return {bare.removesuffix("_scale"): name for bare, name in scales if self._belongs_to_fp8(bare)}

    @cached_property
    def _bare(self) -> dict[str, str]:
        return {bare: name for name in self.entries if (bare := self.format.bare(name)) is not None}

    def _belongs_to_fp8(self, bare: str) -> bool:
        """Tell whether a tensor is the scale of an fp8 weight, or of the activations that it was made for."""
        layer = bare.removesuffix(SCALE).removesuffix(".input_scale")
        weight = self.entries.get(self.format.stored(f"{layer}.weight"))
        return layer != bare and weight is not None and weight.dtype == "F8_E4M3"

    @cached_property
    def fingerprint(self) -> str:
        """Hash settings and the beginning of every tensor: 38 GB take a moment, and the file's name does not count."""
        settings = [self.config.identity, self.causal and self.causal.to_metadata()]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for bare, name in sorted((self.transformer | {f"{k} scale": v for k, v in self.scales.items()}).items()):
            entry = self.entries[name]
            with entry.path.open("rb") as file:
                file.seek(entry.start)
                digest.update(f"{bare} {entry.dtype} {entry.shape}".encode())
                digest.update(file.read(min(_SAMPLE, entry.stop - entry.start)))
        return digest.hexdigest()

    @cached_property
    def others(self) -> Counter[str]:
        """Count the tensors that are not the transformer's, by what they belong to."""
        names = (name for name in self.entries if self.format.bare(name) is None)
        return Counter(formats.group(name) or "unknown" for name in names)

    def assumed(self) -> list[str]:
        """Say what was not read: settings that no tensor shows, zeros for keyframes, a memory that is left out."""
        lines = []
        if self.config.use_keyframes_abs_pos_embedding and formats.KEYFRAMES not in self.transformer:
            why = "the config asks for it and the file does not hold it"
            lines.append(f"{formats.KEYFRAMES}: {why}; it counts as zeros")
        if memory := self.others[formats.MEMORY]:
            names = "learned_memory_*, *_memory_attn, video_color_film"
            lines.append(f"left out: {memory} tensors of a learned memory ({names}); without memory they add nothing")
        if self.format is formats.DIFFUSERS:
            return lines
        if "config" not in self.metadata:
            return [*lines, f"settings: the file carries none; they are those of a {self.format.name}"]
        absent = [name for name in _DECISIVE if name not in self.metadata["config"]["transformer"]]
        values = ", ".join(str(getattr(self.config, name)) for name in absent)
        if absent:
            lines.append(f"settings: the file does not say {', '.join(absent)}; taken from LTX-2.0: {values}")
        return lines

    def report(self) -> KeyReport:
        """Compare names, shapes and dtypes with the model on the meta device."""
        expected = {name: tuple(tensor.shape) for name, tensor in empty(self.config).state_dict().items()}
        stored = {bare: self.entries[name] for bare, name in self.transformer.items()}
        both, wrong = expected.keys() & stored.keys(), {}
        for bare in sorted(both):
            entry, shape = stored[bare], expected[bare]
            scale = self.entries.get(self.scales.get(bare))
            if entry.shape != shape:
                wrong[bare] = f"{bare} is {list(entry.shape)}, expected {list(shape)}"
            elif entry.dtype not in FLOATS:
                wrong[bare] = f"{bare} is {entry.dtype}, expected one of {', '.join(FLOATS)}"
            elif scale and math.prod(scale.shape) not in (1, shape[0]):
                wrong[bare] = f"{bare}_scale is not one number, nor one for each of {shape[0]} rows"
        return KeyReport(
            tuple(sorted(both - wrong.keys())),
            tuple(sorted(expected.keys() - stored.keys() - {formats.KEYFRAMES})),
            tuple(sorted(stored.keys() - expected.keys())),
            tuple(wrong.values()),
        )


def resolve(model: str | os.PathLike[str]) -> Path:
    """Turn `teacher`, `student` or a path into the path of a file, or of an index over files, that is there.

    Links are not followed: in a content-addressed cache the file behind one is named by its hash, alone in its folder.

    Raises:
        ValueError: nothing is there, or a pickle, or a folder with more than one checkpoint.
    """
    path = files.DATA / f"{model}.safetensors" if str(model) in SHIPPED else files.given(model)
    if not path.exists() or not str(model):
        found = path if str(model) else "an empty name"
        raise ValueError(f"no checkpoint at {found}: give teacher, student, a .safetensors file, an index or a folder")
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
    """Read format, config, names, shapes and dtypes of any format that `formats` knows; no tensor is loaded.

    Raises:
        ValueError: what is there is damaged, of no known format, or asks for what this model does not do.
    """
    path = resolve(model)
    header = safetensors_io.many_files(path) if path.name.endswith(INDEX) else safetensors_io.one_file(path)
    entries, metadata = dict(header.entries), dict(header.metadata)
    try:
        # 1. The names of the tensors tell the format.
        format = formats.detect(entries)
        if format is formats.DIFFUSERS and (beside := path.parent / BESIDE).is_file():
            extra = safetensors_io.one_file(beside)
            entries, metadata = entries | extra.entries, metadata | extra.metadata
        metadata = {name: _maybe_json(text) for name, text in metadata.items()}
        # 2. The config stands in the metadata, in a file beside the weights, or follows from format and shapes.
        shapes = {bare: entry.shape for name, entry in entries.items() if (bare := format.bare(name)) is not None}
        config = _config(format, path, metadata, shapes)
        sinks = shapes.get("audio_sink_tokens", ())
        config = config.with_sinks(sinks[1] if len(sinks) == 3 else 0)
        # 3. A student says how it generates.
        causal = _causal(format, metadata, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    format = formats.STUDENT if causal and format is formats.LTX2 else format
    return Checkpoint(path, format, metadata, config, causal, entries)


def _config(format: Format, path: Path, metadata: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    if format is formats.DIFFUSERS:
        beside = path.parent / "config.json"
        if not beside.is_file():
            raise ValueError("the names are those of diffusers, but there is no config.json beside them")
        return formats.from_diffusers(safetensors_io.read_json(beside))
    if "config" in metadata:
        part = metadata["config"].get("transformer") if isinstance(metadata["config"], dict) else None
        if not isinstance(part, dict):
            raise ValueError("`config` in its metadata is no JSON table with a `transformer` part; LTX-2 files have it")
        return ModelConfig.from_metadata(part)
    if format is formats.LTX2:
        raise ValueError(f"no `config` in its metadata (found: {', '.join(metadata) or 'none'}); LTX-2 files have it")
    config = formats.from_shapes(shapes)
    settings = formats.TAOMATE_CODE if format is formats.TAOMATE else formats.RELEASED_CODE
    return replace(config, **settings) if format.causal_release else config


def _causal(format: Format, metadata: Mapping, config: ModelConfig) -> RolloutConfig | None:
    part = metadata.get("omniforcing") or metadata.get("config", {}).get("omniforcing")
    if part:
        try:
            return RolloutConfig.from_metadata(part)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"its `omniforcing` part is damaged: {error!r}") from error
    if not format.causal_release or "config" in metadata:
        return None
    if format is formats.TAOMATE:  # it sees block 0 and the two blocks before, at positions that never come back
        return RolloutConfig(RELEASED, PAPER_STEPS, window=2, reanchor=False)
    if sinks := config.num_audio_sink_tokens:
        return RolloutConfig(replace(PAPER, sinks=sinks))
    return RolloutConfig(RELEASED, RELEASED_STEPS)


def _maybe_json(text: str) -> object:
    try:
        return json.loads(text) if text.startswith("{") else text
    except (json.JSONDecodeError, RecursionError):
        return text
