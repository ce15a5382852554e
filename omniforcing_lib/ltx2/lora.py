"""LoRA files added to LTX-2's weights while they are loaded: W + scale · alpha / rank · up @ down.

Names are read in the spelling of ComfyUI and ltx-trainer (`diffusion_model.`, `lora_A` and `lora_B`), of diffusers
(`transformer.`, its own names of the layers) and of kohya (`lora_down`, `lora_up`, `alpha`, dots or underscores).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from omniforcing_lib.files import given
from omniforcing_lib.ltx2.formats import DIFFUSERS
from omniforcing_lib.safetensors_io import Reader, one_file

_PREFIX = re.compile(r"lora_unet_|(base_model\.model\.)?(model\.diffusion_model\.|diffusion_model\.|transformer\.)?")
_PARTS = {"lora_A.weight": "down", "lora_down.weight": "down", "lora_B.weight": "up", "lora_up.weight": "up"}
_PARTS |= {"alpha": "alpha"}
_NAME = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _PARTS))})")
_OTHER = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr"}


class Term(NamedTuple):
    """What one file adds to one weight."""

    reader: Reader
    up: str
    down: str
    scale: float

    def of(self, device: str | torch.device) -> Tensor:
        """Compute it. Shapes: float32 [out, in]."""
        up, down = (self.reader.get(name, torch.float32, device) for name in (self.up, self.down))
        return self.scale * (up @ down)


def read(named: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Term]]:
    """Find what LoRA files add to which weights; nothing but their alphas is loaded.

    Args:
        named: PATH or PATH:SCALE of each.
        shapes: of the transformer, by bare names.

    Returns the terms of each weight, by its bare name.

    Raises:
        ValueError: a file that is not there or empty, a name that fits no layer or is there twice, half of a pair, a
            wrong shape, or another algebra: DoRA, LoHa, LoKr.
    """
    layers = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2}
    flat = {spelled.replace(".", "_"): bare for bare in layers for spelled in (bare, DIFFUSERS.stored(bare))}
    terms = defaultdict(list)
    for spec in named:
        path, factor = _named(spec)
        file = one_file(path)
        for bare, parts in _modules(path, file.entries, layers, flat).items():
            if not {"up", "down"} <= parts.keys():
                raise ValueError(f"{path}: {bare} has {', '.join(parts)}; a LoRA has both of lora_A and lora_B")
            up, down = (file.entries[parts[part]].shape for part in ("up", "down"))
            if len(up) != 2 or len(down) != 2 or (up[0], down[1], up[1]) != (*layers[bare], down[0]):
                raise ValueError(f"{path}: {bare} is {list(layers[bare])}, its LoRA {list(up)} times {list(down)}")
            reader, rank = Reader(file.entries), down[0]
            alpha = reader.get(parts["alpha"]).item() if "alpha" in parts else _alpha(path, file.metadata, rank)
            terms[f"{bare}.weight"].append(Term(reader, parts["up"], parts["down"], factor * alpha / rank))
    return dict(terms)


def _named(spec: str) -> tuple[Path, float]:
    path, colon, factor = spec.rpartition(":")
    try:
        path, scale = (spec, 1.0) if not colon or given(spec).is_file() else (path, float(factor))
    except ValueError:
        path, scale = spec, 1.0
    if not given(path).is_file():
        raise ValueError(f"no LoRA at {path}: give PATH or PATH:SCALE of a .safetensors file")
    return given(path), scale


def _modules(
    path: Path, names: Sequence[str], layers: Mapping[str, tuple[int, ...]], flat: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """Sort a file's names by layer (bare) and part (up, down, alpha)."""
    modules = defaultdict(dict)
    for name in names:
        if kind := next((kind for sign, kind in _OTHER.items() if sign in name), None):
            raise ValueError(f"{path} is a {kind} ({name}), which is not supported; only plain LoRA is")
        found = _NAME.fullmatch(name)
        layer = found[1][_PREFIX.match(found[1]).end() :] if found else name
        bare = flat.get(layer, DIFFUSERS.bare(layer))
        if not found or bare not in layers:
            raise ValueError(f"{path}: {name} fits no layer of this transformer; is the LoRA for another model?")
        if twice := modules[bare].get(_PARTS[found[2]]):
            raise ValueError(f"{path}: {name} and {twice} are the same; a file is to hold each once")
        modules[bare][_PARTS[found[2]]] = name
    if not modules:
        raise ValueError(f"{path} holds no tensor; get the file again")
    return modules


def _alpha(path: Path, metadata: Mapping[str, str], rank: int) -> float:
    """Give the alpha that diffusers keeps in the metadata; without one it is the rank."""
    kept = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    said = {name.removeprefix("transformer."): value for name, value in kept.items()}
    if odd := [n for n in ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora") if said.get(n)]:
        raise ValueError(f"{path}: {odd[0]} of its metadata is not supported; only one alpha for all layers is")
    return said.get("lora_alpha", rank)
