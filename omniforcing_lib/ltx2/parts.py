"""The other models of an LTX-2 file (VAEs, vocoder, text connectors) as diffusers' classes: finding and loading.

A single file holds them under `vae.`, `audio_vae.`, `vocoder.`, `text_embedding_projection.` and
`model.diffusion_model.*_embeddings_connector.`, described by the JSON `config` of its metadata; a diffusers folder
holds each in a subfolder. From LTX-2.5 on the parts come in files of their own, found beside one another, and `opened`
reads them as one. All are loaded strictly. Source: specification 1.2 and 1.12.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from omniforcing_lib import files, safetensors_io
from omniforcing_lib.ltx2 import part_configs as configs
from omniforcing_lib.ltx2.formats import group, version_number
from omniforcing_lib.safetensors_io import Reader

_UNUSED = re.compile(r"per_channel_statistics\.(channel|mean-of-stds)|decoder\.(coarse_|type_emb$)")
DIFFUSES = "vae.decoder.conv_in_x_t.weight"
"""A tensor that LTX-2.5's diffusion decoder has, and no other decoder (specification 1.12)."""
NEEDED = frozenset({"text connectors", "text projection", "video VAE", "audio VAE", "vocoder"})
"""What runs a transformer, besides a text encoder."""

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A file or diffusers folder, or the files that together hold the parts; the first that holds a part gives it."""


def load(source: Source, part: str, **place: torch.device | torch.dtype) -> nn.Module:
    """Load a part from LTX-2 files or a diffusers folder, strictly and frozen.

    Args:
        source: see `Source`.
        part: "vae" is `AutoencoderKLLTX2Video`, whose decoder is `LTX2VideoDiffusionDecoder3d` where the file holds
            that; "audio_vae" `AutoencoderKLLTX2Audio`, "vocoder" `LTX2Vocoder` (24 kHz) or `LTX2VocoderWithBWE`
            (48 kHz), "connectors" `LTX2TextConnectors`, the projection and both connectors.
        place: device and dtype, as `Module.to` takes them; float32 by default.

    Raises:
        ValueError: the part is missing, names or shapes do not fit its config, or a value is not finite.
    """
    classes, folder = _classes(part), _folder(source)
    class_name, config, tensors, decoder = _from_folder(folder / part) if folder else _from_files(source, part)
    if class_name not in classes:
        raise ValueError(f"{source}: {part} is of class {class_name!r}, expected {' or '.join(classes)}")
    module = classes[class_name](**config)
    if decoder:
        module.decoder = decoder
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{class_name}: the tensors do not fit the config: {error}") from error
    if broken := [name for name, tensor in tensors.items() if not safetensors_io.finite(tensor)]:
        raise ValueError(f"{class_name}: {broken[0]} holds values that are not finite; get the file again")
    # diffusers' own `to` warns at each change of dtype, whether or not it matters
    return nn.Module.to(module, **place).requires_grad_(False).eval()


def _classes(part: str) -> dict[str, type[nn.Module]]:
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE

    classes = {
        "vae": (AutoencoderKLLTX2Video,),
        "audio_vae": (AutoencoderKLLTX2Audio,),
        "vocoder": (LTX2Vocoder, LTX2VocoderWithBWE),
        "connectors": (LTX2TextConnectors,),
    }
    return {cls.__name__: cls for cls in classes[part]}


def _from_files(source: Source, part: str) -> tuple[str, dict[str, object], dict[str, Tensor], nn.Module | None]:
    """Read class, config and tensors of a part of LTX-2 files, under diffusers' names, and a decoder of its own."""
    said, stored = _part_config(source, "transformer" if part == "connectors" else part), opened(source).entries
    diffuses = part == "vae" and DIFFUSES in stored
    video = configs.encoder_alone(said) if diffuses else said
    names = {"audio_vae": configs.AUDIO_VAE, "vocoder": configs.VOCODER, "connectors": configs.TEXT}.get(part)
    names = names or configs.video_names(video)
    if diffuses:
        names = configs.Names([*names.starts, ("vae.decoder.", "decoder.")], configs.DIFFUSION_PARTS)
    prefixes = tuple(start for start, _ in names.starts)
    wanted = [name for name in stored if name.startswith(prefixes) and not _UNUSED.search(name)]
    if not wanted:
        raise ValueError(f"{source} has no tensors under {prefixes[0]}; use a file that holds the whole model")
    reader = Reader(stored)
    tensors = {names.to_diffusers(name): reader.get(name) for name in wanted}
    match part:
        case "vae":
            decoder = configs.diffusion_decoder(said, tensors) if diffuses else None
            return "AutoencoderKLLTX2Video", configs.video_config(video), tensors, decoder
        case "audio_vae":
            return "AutoencoderKLLTX2Audio", configs.audio_config(said, tensors), tensors, None
        case "vocoder":
            kind = "LTX2VocoderWithBWE" if "bwe" in said else "LTX2Vocoder"
            return kind, configs.vocoder_config(said), tensors, None
    if not said.get("connector_ff_bias", True):
        raise ValueError(f"{source}: connector_ff_bias is false; diffusers' connectors have biases only")
    return "LTX2TextConnectors", configs.connector_config(said, tensors), tensors, None


def _from_folder(folder: Path) -> tuple[str | None, dict[str, object], dict[str, Tensor], None]:
    """Read class, config and tensors of one subfolder of a diffusers folder."""
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        raise ValueError(f"{folder} holds no config.json with safetensors weights; get this part of the model")
    described = safetensors_io.read_json(folder / "config.json")
    entries = {name: entry for path in weights for name, entry in safetensors_io.one_file(path).entries.items()}
    config = {name: value for name, value in described.items() if not name.startswith("_")}
    reader = Reader(entries)
    return described.get("_class_name"), config, {name: reader.get(name) for name in entries}, None


def paths(source: Source) -> list[Path]:
    """List the files or the folder that a source names."""
    return [files.given(path) for path in ([source] if isinstance(source, str | os.PathLike) else source)]


def _folder(source: Source) -> Path | None:
    return next((path for path in paths(source) if path.is_dir()), None)


def opened(source: Source) -> safetensors_io.Shards:
    """Read the headers of LTX-2 files as one: each part, and its config, from the first file that holds it.

    A video VAE in a file of its own has bare names; here they get the prefix that a whole file gives them.
    """
    entries, metadata, config = {}, {}, {}
    for path in paths(source):
        if not path.is_file():
            raise ValueError(f"{path} is not there; give a .safetensors file or a diffusers folder")
        header = safetensors_io.one_file(path)
        there = set(map(group, entries))
        for name, entry in header.entries.items():
            if (part := group(name)) not in there:
                bare = part == "video VAE" and not name.startswith("vae.")
                entries[f"vae.{name}" if bare else name] = entry
        metadata = header.metadata | metadata
        config = safetensors_io.table(path, header.metadata.get("config", "{}")) | config
    return safetensors_io.Shards(entries, metadata | {"config": json.dumps(config)})


def beside(path: Path, *patterns: str) -> list[Path]:
    """Find files beside a checkpoint, or beside the folder that it is in; a link's are beside the link."""
    folder = Path(os.path.abspath(path)).parent
    places = (folder, folder.parent)
    return [match for pattern in patterns for place in places for match in sorted(place.glob(pattern))]


def companions(path: Path, version: str, named: Sequence[Path] = ()) -> tuple[list[Path], frozenset[str]]:
    """Find the files that hold what a checkpoint needs: those named, itself, and LTX-2's beside it, in that order.

    Beside it are `ltx-2*.safetensors` and `gemma*.safetensors`, also in folders `vae` and `text_encoders`. A file of
    another version than `version` is passed by, and a convolutional video decoder goes before one that diffuses.

    Returns:
        The files, each with something that those before it lack, and what of `NEEDED` none holds.
    """
    if any(place.is_dir() for place in named):
        return list(named), frozenset()
    patterns = "ltx-2*", "vae/ltx-2*", "gemma*", "text_encoders/gemma*"
    found, same = beside(path, *(f"{name}.safetensors" for name in patterns)), version_number(version)[:2]
    of = {file: version_number(safetensors_io.one_file(file).metadata.get("model_version"))[:2] for file in found}
    found = sorted((f for f in found if of[f] in ((), same)), key=lambda f: (of[f] != same, "-conv" not in f.name))
    chosen, missing = [], set(NEEDED)
    for file in dict.fromkeys(Path(os.path.abspath(file)) for file in (*named, path, *found)):
        held = set(map(group, safetensors_io.one_file(file).entries)) if file.suffix == ".safetensors" else set()
        if held & missing:
            chosen.append(file)
            missing -= held
    return chosen, frozenset(missing)


def _part_config(source: Source, part: str) -> dict:
    """Read one part of the JSON `config` in the files' metadata; ValueError where it is not there."""
    config = json.loads(opened(source).metadata["config"])
    if part not in config:
        raise ValueError(f"{source}: the metadata's `config` has no part {part!r}, found {', '.join(config) or 'none'}")
    return config[part]
