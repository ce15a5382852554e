"""The other models of an LTX-2 file in diffusers' words: names of tensors, and configs.

Names and config keys are those of ltx-core 1.0.0, Lightricks' own loader, which reads a tiny file of ours to the same
bits; no released file was opened here. Source: specification 1.2 and 1.12.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from omniforcing_lib.layout import AV
from omniforcing_lib.ltx2.formats import GROUPS

CONNECTORS = GROUPS["text connectors"]
(PROJECTIONS,) = GROUPS["text projection"]
_STRIDES = {"compress_time": "temporal", "compress_space": "spatial", "compress_all": "spatiotemporal"}


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


def encoder_alone(config: Mapping) -> dict[str, object]:
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
