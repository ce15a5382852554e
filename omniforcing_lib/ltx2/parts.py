"""The other models of an LTX-2 file (VAEs, vocoder, text connectors) as diffusers' classes: names, configs, loading.

A single file holds them under `vae.`, `audio_vae.`, `vocoder.`, `text_embedding_projection.` and
`model.diffusion_model.*_embeddings_connector.`, described by the JSON `config` of its metadata; a diffusers folder
holds each in a subfolder. From LTX-2.5 on the parts come in files of their own, found beside one another, and `opened`
reads them as one. All are loaded strictly. Names and config keys are those of ltx-core 1.0.0, Lightricks' own
loader, which reads a tiny file of ours to the same bits; no released file was opened here. Source: specification 1.2
and 1.12.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from omniforcing_lib import files, safetensors_io
from omniforcing_lib.layout import AV
from omniforcing_lib.ltx2.formats import GROUPS, group, version_number
from omniforcing_lib.safetensors_io import Reader

NAMES = ("vae", "audio_vae", "vocoder", "connectors")
"""What `load` loads: the names of the subfolders of a diffusers folder."""
CONNECTORS = GROUPS["text connectors"]
(PROJECTIONS,) = GROUPS["text projection"]
_STRIDES = {"compress_time": "temporal", "compress_space": "spatial", "compress_all": "spatiotemporal"}
_UNUSED = re.compile(r"per_channel_statistics\.(channel|mean-of-stds)|decoder\.(coarse_|type_emb$)")
DIFFUSES = "vae.decoder.conv_in_x_t.weight"
"""A tensor that LTX-2.5's diffusion decoder has, and no other decoder (specification 1.12)."""
NEEDED = frozenset({"text connectors", "text projection", "video VAE", "audio VAE", "vocoder"})
"""What runs a transformer, besides a text encoder."""


class Names(NamedTuple):
    """Pair the names of an LTX-2 file with diffusers': starts of names (the longest counts), and parts between dots."""

    starts: Sequence[tuple[str, str]]
    parts: Sequence[tuple[str, str]] = ()

    def to_diffusers(self, name: str) -> str:
        """Rename a tensor of an LTX-2 file for diffusers."""
        return _rename(name, self.starts, self.parts)

    def to_ltx2(self, name: str) -> str:
        """Rename a tensor of diffusers' module for an LTX-2 file."""
        return _rename(name, *([(new, old) for old, new in pairs] for pairs in self))


def _rename(name: str, starts: Sequence[tuple[str, str]], parts: Sequence[tuple[str, str]]) -> str:
    old, new = max((pair for pair in starts if name.startswith(pair[0])), key=lambda pair: len(pair[0]))
    dotted = f".{new}{name[len(old) :]}."
    for old, new in parts:
        dotted = dotted.replace(f".{old}.", f".{new}.")
    return dotted[1:-1]


def _with_statistics(prefix: str) -> list[tuple[str, str]]:
    statistics = f"{prefix}per_channel_statistics."
    return [(prefix, ""), (statistics + "mean-of-means", "latents_mean"), (statistics + "std-of-means", "latents_std")]


AUDIO_VAE = Names(_with_statistics("audio_vae."))
VOCODER = Names(
    [("vocoder.", "")],
    [
        ("conv_pre", "conv_in"),
        ("conv_post", "conv_out"),
        ("act_post", "act_out"),
        ("resblocks", "resnets"),
        ("ups", "upsamplers"),
        ("downsample.lowpass", "downsample"),
    ],
)
TEXT = Names(
    [
        (CONNECTORS[0], "video_connector."),
        (CONNECTORS[1], "audio_connector."),
        (PROJECTIONS, ""),
        (PROJECTIONS + "aggregate_embed.", "text_proj_in."),
        (PROJECTIONS + "video_aggregate_embed.", "video_text_proj_in."),
        (PROJECTIONS + "audio_aggregate_embed.", "audio_text_proj_in."),
    ],
    [("transformer_1d_blocks", "transformer_blocks"), ("q_norm", "norm_q"), ("k_norm", "norm_k")],
)


def video_names(config: Mapping) -> Names:
    """Name the tensors of the video VAE that the `vae` part of a config describes.

    LTX-2 counts residual stacks and resamplers in one list; diffusers puts a resampler into the stage it belongs to.
    """
    starts = _with_statistics("vae.")
    down, up = len(config["encoder_blocks"]), len(config["decoder_blocks"])
    for i in range(down):
        stage = f"down_blocks.{i // 2}." + ("downsamplers.0." if i % 2 else "")
        starts.append((f"vae.encoder.down_blocks.{i}.", "encoder." + ("mid_block." if i == down - 1 else stage)))
    for i in range(up):
        stage = f"up_blocks.{(i - 1) // 2}." + ("upsamplers.0." if i % 2 else "")
        starts.append((f"vae.decoder.up_blocks.{i}.", "decoder." + (stage if i else "mid_block.")))
    return Names(starts, [("res_blocks", "resnets")])


DIFFUSION_PARTS = (
    ("t_embedder.mlp.0", "t_embedder.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "t_embedder.timestep_embedder.linear_2"),
    ("attn.proj", "attn.to_out.0"),
    ("q_norm", "norm_q"),
    ("k_norm", "norm_k"),
    ("res_blocks", "resnets"),
)


def _encoder_alone(config: Mapping) -> dict[str, object]:
    """Describe the encoder of a nested `vae` part as that of a flat one, with a small decoder to be replaced."""
    encoder = config["encoder"]
    decoder = {"decoder_base_channels": 1, "decoder_blocks": [["res_x", 1], ["compress_all", {}], ["res_x", 1]]}
    flat = {"encoder_blocks": encoder["blocks"], "latent_channels": encoder["out_channels"]}
    return {**encoder, **decoder, **flat, "timestep_conditioning": False}


def diffusion_decoder(config: Mapping, tensors: dict[str, Tensor]) -> nn.Module:
    """Build diffusers' diffusion decoder from the nested `vae` part of a config, and adapt its tensors (in place).

    The file keeps queries, keys and values in one tensor, and may hold constant gates, which are multiplied into the
    layers before them.
    """
    from diffusers.models.autoencoders.ltx2_diffusion_decoder import LTX2VideoDiffusionDecoder3d

    for name in [name for name in tensors if ".attn.qkv." in name]:
        thirds = zip(("to_q", "to_k", "to_v"), tensors.pop(name).chunk(3), strict=True)
        tensors |= {name.replace(".qkv.", f".{part}."): third.clone() for part, third in thirds}
    gates = {".gate_msa": ".attn.to_out.0", ".gate_mlp": ".mlp.w_down", ".gate_ctx": ".context_proj"}
    for name in [name for name in tensors if name.endswith(tuple(gates))]:
        block, _, gate = name.rpartition(".")
        values = tensors.pop(name).float().flatten()
        for layer in (f"{block}{gates['.' + gate]}.{kind}" for kind in ("weight", "bias")):
            if layer in tensors:
                old = tensors[layer]
                tensors[layer] = (values.reshape(-1, *[1] * (old.ndim - 1)) * old.float()).to(old.dtype)
    decoder, strides = config["decoder"], [tuple(stride) for stride, _ in config["decoder"]["upsamples"]]
    return LTX2VideoDiffusionDecoder3d(
        in_channels=config["encoder"]["out_channels"],
        patch_size=decoder.get("patch_size", 4),
        head_dim=decoder.get("head_dim") or decoder.get("na_head_dim") or 64,
        # one more than there are upsamplings; files may name the last stage apart
        stage_channels=(*decoder["stage_channels"], decoder.get("stage5_channels", 0))[: len(strides) + 1],
        stage_depths=tuple(decoder["stage_depths"]),
        stage_kernels=tuple(map(tuple, decoder["stage_kernels"]))[: len(strides)],
        upsample_strides=tuple(strides),
        upsample_channel_reductions=tuple(reduction for _, reduction in decoder["upsamples"]),
        stage5_kernel=tuple(decoder["stage5_kernel"]),
        t_emb_dim=decoder.get("t_emb_dim", 384),
        timestep_scale_multiplier=decoder.get("timestep_scale_multiplier", 1.0),
        model_output_type=config.get("model_output_type", "v"),
        default_num_inference_steps=decoder.get("default_num_inference_steps", 2),
    )


def video_config(config: Mapping) -> dict[str, object]:
    """Translate the `vae` part of a config for `AutoencoderKLLTX2Video` (specification 2).

    Raises:
        ValueError: blocks other than residual stacks with a resampler between each two.
    """
    down = _blocks(config, "encoder_blocks")
    up = _blocks(config, "decoder_blocks")[::-1]  # listed from pixels to latents, run the other way round
    encoder_widths = [config.get("latent_channels", 128)]
    decoder_widths = [config.get("decoder_base_channels", 128) * 8]
    for _, params in down[1::2]:
        encoder_widths.append(encoder_widths[-1] * params.get("multiplier", 2))
    for _, params in up[1::2]:
        decoder_widths.append(decoder_widths[-1] // params.get("multiplier", 1))
    padding = config.get("spatial_padding_mode")
    return {
        "in_channels": config.get("in_channels", 3),
        "out_channels": config.get("out_channels", 3),
        "latent_channels": encoder_widths[0],
        "block_out_channels": tuple(encoder_widths[1:]),
        "down_block_types": ("LTX2VideoDownBlock3D",) * (len(down) // 2),
        "layers_per_block": tuple(params["num_layers"] for _, params in down[::2]),
        "spatio_temporal_scaling": (True,) * (len(down) // 2),
        "downsample_type": tuple(_STRIDES[name.removesuffix("_res")] for name, _ in down[1::2]),
        "decoder_block_out_channels": tuple(decoder_widths[:-1][::-1]),
        "decoder_layers_per_block": tuple(params["num_layers"] for _, params in up[::-2]),
        "decoder_spatio_temporal_scaling": (True,) * (len(up) // 2),
        "decoder_inject_noise": tuple(params.get("inject_noise", False) for _, params in up[::-2]),
        # Of the decoder's lists, diffusers reads this one alone from the latents to the pixels.
        "upsample_type": tuple(_STRIDES[name] for name, _ in up[1::2]),
        "upsample_residual": tuple(params.get("residual", False) for _, params in up[-2::-2]),
        "upsample_factor": tuple(params.get("multiplier", 1) for _, params in up[-2::-2]),
        "patch_size": config.get("patch_size", 4),
        "decoder_causal": config.get("causal_decoder", False),
        "timestep_conditioning": config.get("timestep_conditioning", True),
        "encoder_spatial_padding_mode": config.get("encoder_spatial_padding_mode", padding or "zeros"),
        "decoder_spatial_padding_mode": config.get("decoder_spatial_padding_mode", padding or "reflect"),
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    }


def _blocks(config: Mapping, name: str) -> list[tuple[str, dict]]:
    """Read a list of blocks, [kind, layers or parameters] each; a resampler stands between each two stacks."""
    blocks = [(kind, {"num_layers": rest} if isinstance(rest, int) else rest) for kind, rest in config.get(name, ())]
    ending = "_res" if name == "encoder_blocks" else ""
    resamplers = {stride + ending for stride in _STRIDES}
    expected = [{"res_x"}, resamplers]
    if len(blocks) % 2 == 0 or any(kind not in expected[i % 2] for i, (kind, _) in enumerate(blocks)):
        kinds = ", ".join(kind for kind, _ in blocks) or "none"
        raise ValueError(f"config.vae.{name} is res_x and {', '.join(sorted(resamplers))} in turns, found {kinds}")
    return blocks


def audio_config(config: Mapping, names: Iterable[str] = ()) -> dict[str, object]:
    """Translate the `audio_vae` part of a config for `AutoencoderKLLTX2Audio`; `names` tell whether it attends."""
    params, features = config["model"]["params"], config.get("preprocessing", {})
    details, stft = params.get("ddconfig", {}), features.get("stft", {})
    return {
        "base_channels": details.get("ch", 128),
        "output_channels": details.get("out_ch", 2),
        "ch_mult": tuple(details.get("ch_mult", (1, 2, 4))),
        "num_res_blocks": details.get("num_res_blocks", 2),
        "attn_resolutions": tuple(details.get("attn_resolutions", ())) or None,
        "in_channels": details.get("in_channels", 2),
        "resolution": details.get("resolution", 256),
        "latent_channels": details.get("z_channels", 8),
        "norm_type": details.get("norm_type", "pixel"),
        "causality_axis": details.get("causality_axis", "height"),
        "mid_block_add_attention": any(".mid.attn_1." in name for name in names),
        "sample_rate": params.get("sampling_rate", 16_000),
        "mel_hop_length": stft.get("hop_length", 160),
        "is_causal": stft.get("causal", True),
        "mel_bins": details.get("mel_bins") or features.get("mel", {}).get("n_mel_channels") or 64,
        "double_z": details.get("double_z", True),
    }


def vocoder_config(config: Mapping) -> dict[str, object]:
    """Translate the `vocoder` part of a config: flat for `LTX2Vocoder`, nested for `LTX2VocoderWithBWE`."""
    if "bwe" not in config:
        return _generator(config) | {"output_sampling_rate": config.get("output_sampling_rate", 24_000)}
    extension = config["bwe"]
    generator = {f"bwe_{name}": value for name, value in (_generator(extension) | {"final_act_fn": None}).items()}
    return (
        _generator(config.get("vocoder", {}))
        | generator
        | {
            "filter_length": extension["n_fft"],
            "window_length": extension["n_fft"],
            "num_mel_channels": extension["num_mels"],
            "hop_length": extension["hop_length"],
            "input_sampling_rate": extension["input_sampling_rate"],
            "output_sampling_rate": extension["output_sampling_rate"],
        }
    )


def _generator(config: Mapping) -> dict[str, object]:
    kind = config.get("resblock", "1")
    if kind not in ("1", "AMP1") or not config.get("stereo", True):
        raise ValueError(f"config.vocoder is stereo with resblock 1 or AMP1, found resblock {kind!r}, {dict(config)}")
    antialias = kind == "AMP1"
    return {
        "hidden_channels": config.get("upsample_initial_channel", 1024),
        "upsample_kernel_sizes": config.get("upsample_kernel_sizes", [16, 15, 8, 4, 4]),
        "upsample_factors": config.get("upsample_rates", [6, 5, 2, 2, 2]),
        "resnet_kernel_sizes": config.get("resblock_kernel_sizes", [3, 7, 11]),
        "resnet_dilations": config.get("resblock_dilation_sizes", [[1, 3, 5]] * 3),
        "act_fn": config.get("activation", "snake") if antialias else "leaky_relu",
        "antialias": antialias,
        "final_act_fn": "tanh" if config.get("use_tanh_at_final", True) else "clamp",
        "final_bias": config.get("use_bias_at_final", True),
    }


def connector_config(transformer: Mapping, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Translate what the `transformer` part of a config says of the text connectors for `LTX2TextConnectors`.

    Sizes come from the tensors (under diffusers' names), heads and RoPE from the config (specification 1.7, 1.12).
    """
    per_stream = "video_text_proj_in.weight" in tensors
    projection = tensors["video_text_proj_in.weight" if per_stream else "text_proj_in.weight"]
    heads, width = transformer.get("connector_num_attention_heads", 30), transformer.get("caption_channels", 3840)
    config: dict[str, object] = {
        "caption_channels": width,
        "text_proj_in_factor": projection.shape[1] // width,
        "connector_rope_base_seq_len": transformer.get("connector_positional_embedding_max_pos", [4096])[0],
        "rope_theta": float(transformer.get("positional_embedding_theta", 10_000.0)),
        "rope_double_precision": str(transformer.get("frequencies_precision", "")).endswith("float64"),
        "rope_type": transformer.get("rope_type", "interleaved"),
        "per_modality_projections": per_stream,
        "proj_bias": "video_text_proj_in.bias" in tensors,
    }
    if per_stream:
        config["video_hidden_dim"] = len(projection)
        config["audio_hidden_dim"] = len(tensors["audio_text_proj_in.weight"])
    stream_heads = AV(heads, transformer.get("audio_connector_num_attention_heads", heads))
    for stream, count in stream_heads._asdict().items():
        prefix = f"{stream}_connector."
        connector = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        registers = connector.get("learnable_registers")
        layers = [int(name.split(".")[1]) for name in connector if name.startswith("transformer_blocks.")]
        config |= {
            f"{stream}_connector_num_attention_heads": count,
            f"{stream}_connector_attention_head_dim": len(connector["transformer_blocks.0.attn1.to_q.weight"]) // count,
            f"{stream}_connector_num_layers": 1 + max(layers),
            f"{stream}_connector_num_learnable_registers": None if registers is None else len(registers),
            f"{stream}_gated_attn": any(".to_gate_logits." in name for name in connector),
        }
    return config


Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A file or diffusers folder, or the files that together hold the parts; the first that holds a part gives it."""


def load(source: Source, part: str, **place: torch.device | torch.dtype) -> nn.Module:
    """Load one of `NAMES` from LTX-2 files or a diffusers folder, strictly and frozen.

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
    described, stored = _part_config(source, "transformer" if part == "connectors" else part), opened(source).entries
    diffuses = part == "vae" and DIFFUSES in stored
    if diffuses:
        names = Names([*video_names(_encoder_alone(described)).starts, ("vae.decoder.", "decoder.")], DIFFUSION_PARTS)
    else:
        names = {"audio_vae": AUDIO_VAE, "vocoder": VOCODER, "connectors": TEXT}.get(part) or video_names(described)
    prefixes = tuple(start for start, _ in names.starts)
    wanted = [name for name in stored if name.startswith(prefixes) and not _UNUSED.search(name)]
    if not wanted:
        raise ValueError(f"{source} has no tensors under {prefixes[0]}; use a file that holds the whole model")
    reader = Reader(stored)
    tensors = {names.to_diffusers(name): reader.get(name) for name in wanted}
    match part:
        case "vae" if diffuses:
            decoder = diffusion_decoder(described, tensors)
            return "AutoencoderKLLTX2Video", video_config(_encoder_alone(described)), tensors, decoder
        case "vae":
            return "AutoencoderKLLTX2Video", video_config(described), tensors, None
        case "audio_vae":
            return "AutoencoderKLLTX2Audio", audio_config(described, tensors), tensors, None
        case "vocoder":
            kind = "LTX2VocoderWithBWE" if "bwe" in described else "LTX2Vocoder"
            return kind, vocoder_config(described), tensors, None
    if not described.get("connector_ff_bias", True):
        raise ValueError(f"{source}: connector_ff_bias is false; diffusers' connectors have biases only")
    return "LTX2TextConnectors", connector_config(described, tensors), tensors, None


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


def context_widths(source: Source) -> AV[int]:
    """Read how wide a text context is in each stream, from the connectors' own description; nothing is loaded."""
    if folder := _folder(source):
        config = safetensors_io.read_json(folder / "connectors" / "config.json")
        sizes = ("num_attention_heads", "attention_head_dim")
        return AV(*(prod(config[f"{stream}_connector_{size}"] for size in sizes) for stream in AV._fields))
    entries = opened(source).entries
    return AV(*(entries[f"{prefix}transformer_1d_blocks.0.attn1.to_q.weight"].shape[0] for prefix in CONNECTORS))


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
