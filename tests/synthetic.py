"""Checkpoints with LTX-2's full key list and metadata at tiny dims: what a user's 38 GB file looks like from outside.

The transformer is whole and runs with the miniature's codec and text; everything else in the file (text connectors,
VAEs, vocoder) is a stub of a few numbers under the real names, there to be left out.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from omniforcing_lib.config import MINIATURE, ModelConfig
from omniforcing_lib.files import write_tensors
from omniforcing_lib.layout import AV, PAPER
from omniforcing_lib.transformer import Transformer

PREFIX = "model.diffusion_model."
CONFIGS = {
    "2.0": replace(
        MINIATURE,
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=20,
        cross_attention_dim=80,
        audio_num_attention_heads=4,
        audio_attention_head_dim=16,
        audio_cross_attention_dim=64,
    ),
    "2.3": replace(
        MINIATURE,
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=16,
        cross_attention_dim=64,
        audio_num_attention_heads=4,
        audio_attention_head_dim=16,
        audio_cross_attention_dim=64,
        apply_gated_attention=True,
        cross_attention_adaln=True,
        caption_proj_before_connector=True,
    ),
}
CONFIGS["2.5"] = replace(CONFIGS["2.3"], ff_bias=False, use_keyframes_abs_pos_embedding=True)
"""Tiny dims that the miniature's codec (32 channels) and text (64 features) fit; video RoPE has to pad."""

_STUBS = {
    PREFIX + "video_embeddings_connector.learnable_registers": (2, 4),
    PREFIX + "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q.weight": (4, 4),
    PREFIX + "audio_embeddings_connector.learnable_registers": (2, 4),
    PREFIX + "audio_embeddings_connector.transformer_1d_blocks.0.attn1.to_q.weight": (4, 4),
    "vae.encoder.conv_in.conv.weight": (2, 3, 1, 1, 1),
    "vae.decoder.conv_in.conv.weight": (2, 3, 1, 1, 1),
    "vae.per_channel_statistics.mean-of-means": (2,),
    "vae.per_channel_statistics.std-of-means": (2,),
    "audio_vae.encoder.conv_in.conv.weight": (2, 2, 1, 1),
    "audio_vae.decoder.conv_in.conv.weight": (2, 2, 1, 1),
    "audio_vae.per_channel_statistics.mean-of-means": (2,),
    "audio_vae.per_channel_statistics.std-of-means": (2,),
}
STUBS = {
    "2.0": _STUBS | {"text_embedding_projection.aggregate_embed.weight": (2, 4), "vocoder.conv_pre.weight": (2, 2, 1)},
    "2.3": _STUBS
    | {
        PREFIX + "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_gate_logits.weight": (2, 4),
        "text_embedding_projection.video_aggregate_embed.weight": (2, 4),
        "text_embedding_projection.audio_aggregate_embed.weight": (2, 4),
        "vocoder.vocoder.conv_pre.weight": (2, 2, 1),
        "vocoder.bwe_generator.conv_pre.weight": (2, 2, 1),
    },
}
STUBS["2.5"] = STUBS["2.3"]


def ltx2_file(
    path: str | Path,
    version: str = "2.0",
    *,
    config: ModelConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Write an LTX-2 single file of `version` 2.0, 2.3 or 2.5, random weights that matter everywhere; give its path."""
    config = config or CONFIGS[version]
    generator = torch.Generator().manual_seed(seed)
    stubs = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in STUBS[version].items()}
    tensors = {PREFIX + name: tensor for name, tensor in weights(config, generator, dtype).items()} | stubs
    metadata = {"config": json.dumps(metadata_of(config)), "model_version": version}
    return write_tensors(path, tensors, metadata)


def weights(config: ModelConfig, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Draw a transformer's tensors: nothing is zero, and activations keep their size."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}

    def draw(name: str, shape: torch.Size) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            return 1 + 0.1 * noise
        return noise / shape[-1] ** 0.5 if name.endswith("weight") else 0.1 * noise

    return {name: draw(name, shape).to(dtype) for name, shape in shapes.items()}


def inputs(video_latents: int = 4, seed: int = 0) -> tuple[AV[Tensor], AV[Tensor]]:
    """Draw latents of the miniature's shape and text for both streams."""
    generator = torch.Generator().manual_seed(seed)
    audio_latents = PAPER.audio_latents(video_latents)
    shapes = ((1, video_latents, 4, 4, 32), (1, audio_latents, 32), (1, 6, 64), (1, 6, 64))
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return AV(*drawn[:2]), AV(*drawn[2:])


def metadata_of(config: ModelConfig) -> dict[str, object]:
    """Give the whole `config` of an LTX-2 file: the transformer's part in full, the other parts as stubs."""
    transformer = config.to_metadata()
    del transformer["num_audio_sink_tokens"]
    transformer |= {"_class_name": "AVTransformer3DModel", "causal_temporal_positioning": True}
    return {
        "transformer": transformer,
        "vae": {"_class_name": "CausalVideoAutoencoder", "latent_channels": config.in_channels},
        "audio_vae": {"model": {"params": {"sampling_rate": 16000}}},
        "vocoder": {"resblock": "1"},
        "scheduler": {"_class_name": "RectifiedFlowScheduler"},
    }
