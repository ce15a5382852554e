"""A whole LTX-2 at tiny dims in its true format: transformer, connectors, VAEs and vocoder, and a Gemma beside it.

Everything is random and everything matters: no weight is zero, statistics are not 0 and 1.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from synthetic import PREFIX, metadata_of, weights
from torch import nn

from omniforcing_lib.config import MINIATURE, ModelConfig
from omniforcing_lib.files import write_tensors
from omniforcing_lib.ltx2 import part_configs
from omniforcing_lib.ltx2.tiny import TinyDecoder

SIZE = (64, 64)
MODEL = replace(
    MINIATURE,
    num_layers=3,
    num_attention_heads=2,
    attention_head_dim=12,
    cross_attention_dim=24,
    audio_num_attention_heads=2,
    audio_attention_head_dim=8,
    audio_cross_attention_dim=16,
    in_channels=16,
    out_channels=16,
    audio_in_channels=32,
    audio_out_channels=32,
    caption_channels=32,
)
NEWER = replace(MODEL, apply_gated_attention=True, cross_attention_adaln=True, caption_proj_before_connector=True)
NEWEST = replace(NEWER, ff_bias=False, use_keyframes_abs_pos_embedding=True)
MODELS = {"2.0": MODEL, "2.3": NEWER, "2.5": NEWEST}
RES = {"num_layers": 1}
VAE = {
    "latent_channels": 16,
    "encoder_blocks": [
        ["res_x", RES],
        ["compress_space_res", {"multiplier": 1}],
        ["res_x", RES],
        ["compress_time_res", {"multiplier": 2}],
        ["res_x", 1],
        ["compress_all_res", {"multiplier": 2}],
        ["res_x", RES],
        ["compress_all_res", {"multiplier": 1}],
        ["res_x", RES],
    ],
    "decoder_base_channels": 8,
    "decoder_blocks": [
        ["res_x", RES],
        ["compress_all", {"residual": True, "multiplier": 2}],
        ["res_x", RES],
        ["compress_all", {"residual": True, "multiplier": 2}],
        ["res_x", RES],
        ["compress_all", {"residual": True, "multiplier": 2}],
        ["res_x", RES],
    ],
    "causal_decoder": False,
    "timestep_conditioning": False,
    "encoder_spatial_padding_mode": "zeros",
    "decoder_spatial_padding_mode": "reflect",
}
NEWER_VAE = VAE | {
    "decoder_blocks": [
        ["res_x", RES],
        ["compress_space", {"multiplier": 2}],
        ["res_x", RES],
        ["compress_time", {"multiplier": 1}],
        ["res_x", RES],
        ["compress_all", {"multiplier": 2}],
        ["res_x", RES],
        ["compress_all", {"multiplier": 2}],
        ["res_x", {"num_layers": 2}],
    ],
    "decoder_spatial_padding_mode": "zeros",
}
DIFFUSION_VAE = {
    "_class_name": "CausalDiffusionVAE",
    "model_output_type": "x0",
    "encoder": {"blocks": VAE["encoder_blocks"], "out_channels": 16},
    "decoder": {
        "stage_channels": [64, 32, 16, 16, 8],
        "stage_depths": [1, 1, 1, 1, 2],
        "stage_kernels": [[3, 1, 1], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
        "upsamples": [[[1, 2, 2], 2], [[2, 1, 1], 2], [[2, 2, 2], 1], [[2, 2, 2], 2]],
        "stage5_kernel": [3, 3, 3],
        "head_dim": 8,
        "t_emb_dim": 16,
        "patch_size": 4,
        "timestep_scale_multiplier": 1000.0,
        "default_num_inference_steps": 1,
    },
}
GEMMA_VERSION = "gemma4-tiny-v1"
AUDIO_VAE = {
    "model": {"params": {"sampling_rate": 16000, "ddconfig": {"ch": 32, "ch_mult": [1, 1, 1], "z_channels": 2}}},
    "preprocessing": {"stft": {"hop_length": 160}, "mel": {"n_mel_channels": 64}},
}
AUDIO_VAE["model"]["params"]["ddconfig"] |= {"num_res_blocks": 1}
KERNELS = {"resblock_kernel_sizes": [3, 7], "resblock_dilation_sizes": [[1, 2, 1], [1, 1, 2]]}
VOCODER = {"resblock": "1", "stereo": True, "upsample_initial_channel": 64} | KERNELS
AMP = {
    "resblock": "AMP1",
    "stereo": True,
    "activation": "snakebeta",
    "use_bias_at_final": False,
    "use_tanh_at_final": False,
} | KERNELS
NEWER_VOCODER = {
    "vocoder": AMP
    | {"upsample_initial_channel": 64, "upsample_rates": [5, 2, 2, 2, 2, 2]}
    | {"upsample_kernel_sizes": [11, 4, 4, 4, 4, 4]},
    "bwe": AMP
    | {"upsample_initial_channel": 32, "upsample_rates": [6, 5, 2, 2, 2], "upsample_kernel_sizes": [12, 11, 4, 4, 4]}
    | {"input_sampling_rate": 16000, "output_sampling_rate": 48000, "hop_length": 80, "n_fft": 512, "num_mels": 64},
}
CONNECTOR = {
    "connector_num_attention_heads": 2,
    "connector_num_layers": 1,
    "connector_positional_embedding_max_pos": [4096],
}
LAYERS = 2  # of the tiny Gemma
LOUDNESS = {
    "AutoencoderKLLTX2Video": 0.3,
    "AutoencoderKLLTX2Audio": 0.3,
    "LTX2Vocoder": 0.3,
    "LTX2VocoderWithBWE": 0.03,
}
"""Of the last layers: nothing is to be clipped, where all would look equal."""
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
WORDS = ("a", "red", "blue", "ball", "bell", "wood", "worst", "quality", "blurry", ",")


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every weight of a module so that activations keep their size and no output is loud."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, old: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(old.shape, generator=generator)
        if "filter" in name:
            return old
        if name.endswith(("latents_std", "norm_q.weight", "norm_k.weight")):
            return 1 + 0.2 * noise
        if "basis" in name:
            return 0.05 * noise.abs()
        size = LOUDNESS.get(type(module).__name__, 1.0) if "conv_out" in name else 1.0
        return size * noise / old[0].numel() ** 0.5 if old.ndim > 1 else 0.1 * noise

    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(draw(name, tensor))
    return module.requires_grad_(False).eval()


def modules(version: str = "2.0", *, causal: bool = False) -> dict[str, nn.Module]:
    """Build the random modules of a tiny LTX-2 of `version` as diffusers' classes."""
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE

    old, names = version == "2.0", ("vae", "audio_vae", "vocoder")
    vae, audio, vocoder = (configs(version)[name] for name in names)
    vocoders = LTX2Vocoder if old else LTX2VocoderWithBWE
    text = {"text_proj_in_factor": LAYERS + 1, "caption_channels": 32, "rope_type": "split"}
    for stream in ("video", "audio"):
        text |= {f"{stream}_connector_{k}": v for k, v in {"num_attention_heads": 2, "num_layers": 1}.items()}
        text[f"{stream}_connector_num_learnable_registers"] = 8
        width = 32 if old else (MODEL.video_dim if stream == "video" else MODEL.audio_dim)
        text |= {f"{stream}_connector_attention_head_dim": width // 2, f"{stream}_gated_attn": not old}
    if not old:
        text |= {"per_modality_projections": True, "proj_bias": True}
        text |= {"video_hidden_dim": MODEL.video_dim, "audio_hidden_dim": MODEL.audio_dim}
    made = {
        "vae": AutoencoderKLLTX2Video(**part_configs.video_config(vae) | {"decoder_causal": causal}),
        "audio_vae": AutoencoderKLLTX2Audio(**part_configs.audio_config(audio)),
        "vocoder": vocoders(**part_configs.vocoder_config(vocoder)),
        "connectors": LTX2TextConnectors(**text),
    }
    return {name: shaken(module, seed) for seed, (name, module) in enumerate(made.items())}


def configs(version: str = "2.0") -> dict[str, object]:
    """Give the JSON `config` of a tiny LTX-2 file."""
    if version == "2.0":
        return metadata_of(MODEL) | {"vae": VAE, "audio_vae": AUDIO_VAE, "vocoder": VOCODER}
    return metadata_of(MODELS[version]) | {"vae": NEWER_VAE, "audio_vae": AUDIO_VAE, "vocoder": NEWER_VOCODER}


def whole_file(path: str | Path, version: str = "2.0", *, model: ModelConfig | None = None) -> Path:
    """Write a whole tiny LTX-2 single file, fp32; give its path."""
    model = model or MODELS[version]
    names = {
        "vae": part_configs.video_names(configs(version)["vae"]),
        "audio_vae": part_configs.AUDIO_VAE,
        "vocoder": part_configs.VOCODER,
        "connectors": part_configs.TEXT,
    }
    tensors = {PREFIX + n: t for n, t in weights(model, torch.Generator().manual_seed(0)).items()}
    for part, module in modules(version).items():
        tensors |= {names[part].to_ltx2(name): tensor for name, tensor in module.state_dict().items()}
    config = configs(version)
    config["transformer"] |= CONNECTOR
    return write_tensors(path, tensors, {"config": json.dumps(config), "model_version": version})


def tiny_decoder_file(path: str | Path) -> Path:
    """Write a random TAEHV file of a few channels, with a stub of its encoder; give its path."""
    tensors = shaken(TinyDecoder(SIZE, MODEL.in_channels, (16, 8, 8, 4)), 3).state_dict()
    return write_tensors(path, tensors | {"encoder.0.bias": torch.zeros(4)})


def diffusers_folder(path: str | Path, version: str = "2.0") -> Path:
    """Save the same parts as a diffusers folder."""
    for name, module in modules(version).items():
        module.save_pretrained(Path(path) / name)
    return Path(path)


def split_files(folder: str | Path) -> dict[str, Path]:
    """Write a tiny LTX-2.5 as it is published, a file for each part and both kinds of VAE; give the paths."""
    whole = whole_file(Path(folder) / "whole.safetensors", "2.5")
    tensors, config = load_file(whole), configs("2.5")
    whole.unlink()
    decoder = shaken(part_configs.diffusion_decoder(DIFFUSION_VAE, {}), 9).state_dict()
    names = part_configs.Names([("", "")], part_configs.DIFFUSION_PARTS)
    diffuses = {f"decoder.{names.to_ltx2(name)}": t for name, t in decoder.items() if ".attn.to_" not in name}
    for name in [name for name in decoder if ".attn.to_q." in name]:
        thirds = [decoder[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
        diffuses["decoder." + name.replace("to_q", "qkv")] = torch.cat(thirds)
    diffuses |= {f"decoder.{names.to_ltx2(n)}": t for n, t in decoder.items() if ".attn.to_out." in n}
    video = {name.removeprefix("vae."): t for name, t in tensors.items() if name.startswith("vae.")}
    described = {
        "diffusion_models/ltx-2.5-tiny-dev-transformer": ({"transformer": config["transformer"] | CONNECTOR}, PREFIX),
        "text_encoders/gemma4-tiny-with-proj-ltx-2.5": ({}, part_configs.PROJECTIONS),
        "vae/ltx-2.5-audio-vae": (
            {name: config[name] for name in ("audio_vae", "vocoder")},
            ("audio_vae.", "vocoder."),
        ),
        "vae/ltx-2.5-video-vae-conv": ({"vae": config["vae"]}, video),
        "vae/ltx-2.5-video-vae": (
            {"vae": DIFFUSION_VAE},
            {name: t for name, t in video.items() if not name.startswith("decoder.")} | diffuses,
        ),
    }
    source = {"ltx_version": "2.5.0", "gemma_version": GEMMA_VERSION}
    made = {}
    for name, (part, held) in described.items():
        held = held if isinstance(held, dict) else {n: t for n, t in tensors.items() if n.startswith(held)}
        metadata = {"model_version": "2.5.0", "config": json.dumps(part)}
        if "transformer" in part:
            metadata["gemma_source_checkpoint"] = json.dumps(source)
        if "gemma" in name:
            words, model = tokenizer(first=False), gemma_4()
            held |= {f"model.{n}": t for n, t in model.state_dict().items()}
            held["tokenizer_json"] = torch.tensor(list(words.to_str().encode()), dtype=torch.uint8)
            text = {
                "model_type": "gemma4_unified",
                "gemma_version": GEMMA_VERSION,
                "text_config": model.config.to_dict(),
            }
            metadata["gemma_config"] = json.dumps(text)
        made[name] = write_tensors(Path(folder) / f"{name}.safetensors", held, metadata)
    return made


GEMMA = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
"""Sizes of the tiny language models of both Gemmas."""


def gemma_4() -> nn.Module:
    """Build the language model of a tiny random Gemma 4."""
    from transformers import Gemma4UnifiedTextConfig, Gemma4UnifiedTextModel

    return shaken(
        Gemma4UnifiedTextModel(
            Gemma4UnifiedTextConfig(
                **GEMMA,
                num_key_value_heads=2,
                global_head_dim=32,
                num_global_key_value_heads=1,
                attention_k_eq_v=True,
            )
        ),
        7,
    )


def tokenizer(*, first: bool = True):
    """Build a word-level tokenizer, which begins each text with <bos>, or does not, as Gemma 4's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokens = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if first:
        words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return words


def gemma_folder(path: str | Path) -> Path:
    """Save a tiny random Gemma 3 text model with a word-level tokenizer, as transformers saves them."""
    from transformers import Gemma3TextConfig, Gemma3TextModel, PreTrainedTokenizerFast

    named = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(), **named).save_pretrained(path)
    config = Gemma3TextConfig(
        **GEMMA,
        num_key_value_heads=1,
    )
    shaken(Gemma3TextModel(config), 7).save_pretrained(path)
    return Path(path)
