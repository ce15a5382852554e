"""The formats of LTX-2's transformer: tensor names and configs, as functions on names and shapes alone.

A *bare* name is the transformer's own (`patchify_proj.weight`); a *stored* name is what a file calls it. Source:
specification 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, fields

from omniforcing_lib.config import ModelConfig

PREFIX = "model.diffusion_model."
DIFFUSERS_CLASS = "LTX2VideoTransformer3DModel"
_GATE = "transformer_blocks.0.attn1.to_gate_logits.weight"
KEYFRAMES = "keyframes_abs_pos_embedding"
"""Bare name of the one tensor that a file may promise and not hold: it counts as zeros then (specification 1.12)."""
RELEASED_CODE = {"rope_type": "interleaved", "frequencies_precision": "float32", "av_ca_timestep_scale_multiplier": 1}
"""What OmniForcing's released causal code runs LTX-2's weights with, whatever the file says (specification 1.9)."""
TAOMATE_CODE = RELEASED_CODE | {"rope_type": "split"}
"""What TaoMate's causal code runs LTX-2.3's weights with."""
MEMORY = "learned memory"
_MEMORY = re.compile(
    r"model\.(learned_memory_(video|audio)_encoder\.(weight|bias)|transformer_blocks\.\d+\.((video|audio)_memory_attn\."
    r"(to_[qkv]\.weight|to_out\.(weight|bias))|video_color_film\.net\.[02]\.(weight|bias)))"
)
"""TaoMate's branch beside the transformer, 172 tensors in 12 of 48 blocks; without memory it adds nothing at all."""

_TO_DIFFUSERS = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
    "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}

_OURS_ALONE = (
    "positional_embedding_max_pos",
    "audio_positional_embedding_max_pos",
    "use_middle_indices_grid",
    "frequencies_precision",
    "caption_proj_before_connector",
    "num_audio_sink_tokens",
    "cross_modal_sigma",
)
_RENAMED = {
    "positional_embedding_theta": "rope_theta",
    "av_ca_timestep_scale_multiplier": "cross_attn_timestep_scale_multiplier",
    "apply_gated_attention": "gated_attn",
    "cross_attention_adaln": "cross_attn_mod",
}
_DIFFUSERS_FIELDS = {f.name: _RENAMED.get(f.name, f.name) for f in fields(ModelConfig) if f.name not in _OURS_ALONE}
_DIFFUSERS_FIXED = {
    "patch_size": 1,
    "patch_size_t": 1,
    "audio_patch_size": 1,
    "audio_patch_size_t": 1,
    "vae_scale_factors": [8, 32, 32],
    "audio_scale_factor": 4,
    "audio_sampling_rate": 16_000,
    "audio_hop_length": 160,
    "causal_offset": 1,
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False,
    "attention_bias": True,
    "attention_out_bias": True,
}
GROUPS = {
    "text connectors": (PREFIX + "video_embeddings_connector.", PREFIX + "audio_embeddings_connector."),
    "text projection": ("text_embedding_projection.",),
    "video VAE": ("vae.", "encoder.", "decoder.", "per_channel_statistics."),
    "audio VAE": ("audio_vae.",),
    "vocoder": ("vocoder.",),
    "duration head": ("duration_head.",),
    "tokenizer": ("tokenizer_json", "hf_asset__"),
    "masks": ("model.mask_builder.",),
    "text encoder": (
        *(f"model.{part}." for part in ("layers", "embed_tokens", "norm", "language_model")),
        *(f"model.{part}." for part in ("vision_embedder", "embed_vision", "embed_audio")),
        *("vision_model.", "multi_modal_projector.", "audio_projector."),
    ),
}
"""Starts of the names of the other models, in a single file or in split files beside one another."""
FOLDERS = {
    "text connectors": "connectors",
    "text projection": "connectors",
    "video VAE": "vae",
    "audio VAE": "audio_vae",
    "vocoder": "vocoder",
}
"""Subfolders of a diffusers pipeline that hold the same models."""


@dataclass(frozen=True)
class Format:
    """Say how a format calls the transformer's tensors, and whether OmniForcing's causal code made it.

    Attributes:
        name: of the format, in words.
        prefix: of all names.
        spelling: what the format calls a part of a name, between dots, by the name here.
        causal_release: it is read with the released causal code's settings.
    """

    name: str
    prefix: str = ""
    spelling: Mapping[str, str] = field(default_factory=dict, hash=False)
    causal_release: bool = False

    def bare(self, stored: str) -> str | None:
        """Give the transformer's own name for a stored one; None for what is not the transformer's."""
        if not stored.startswith(self.prefix) or group(stored):
            return None
        return _parts(stored.removeprefix(self.prefix), {theirs: ours for ours, theirs in self.spelling.items()})

    def stored(self, bare: str) -> str:
        """Give the name under which the format keeps a tensor."""
        return self.prefix + _parts(bare, self.spelling)


LTX2 = Format("LTX-2 single file", PREFIX)
STUDENT = Format("student of this project", PREFIX)
DIFFUSERS = Format("diffusers folder", spelling=_TO_DIFFUSERS)
RELEASES = (
    Format("OmniForcing release, bidirectional", "model.velocity_model."),
    Format("OmniForcing release, causal", "model.", causal_release=True),
    Format("OmniForcing release, causal, bare names", causal_release=True),
)
"""What the released code writes: bidirectional with LTX-2's settings, causal with `RELEASED_CODE`."""
TAOMATE = Format("TaoMate release, causal", "model.", causal_release=True)
BARE = Format("LTX-2 transformer, bare names")
"""A transformer of 2.3 or later cut out of its file: OmniForcing's students are of 2.0, which has no gates."""


def detect(names: Iterable[str]) -> Format:
    """Tell the format from the names of its tensors.

    Raises:
        ValueError: no transformer of a known format.
    """
    names = list(names)
    for known in (LTX2, *RELEASES[:2]):
        if any(name.startswith(known.stored("transformer_blocks.0.")) for name in names):
            # the prefix does not tell them apart: OmniForcing's students are of LTX-2.0, which has no gates
            return TAOMATE if known is RELEASES[1] and known.prefix + _GATE in names else known
    if any(name.split(".")[0] in _TO_DIFFUSERS.values() for name in names):
        return DIFFUSERS
    if any(name.startswith("transformer_blocks.0.") for name in names):
        return RELEASES[2] if version_of(names) == "2.0" else BARE
    if parts := {part for name in names if (part := group(name))}:
        held = ", ".join(sorted(parts))
        raise ValueError(f"holds no transformer but {held}; give the transformer's file, and this one as a part of it")
    known = ", ".join(f.name for f in (LTX2, STUDENT, DIFFUSERS, *RELEASES, TAOMATE))
    raise ValueError(f"holds no transformer of a known format; known are {known}; it has {', '.join(names[:3]) or '-'}")


def group(stored: str) -> str | None:
    """Say which other part of an LTX-2 file a tensor belongs to; None for the transformer's and for unknown ones."""
    if _MEMORY.fullmatch(stored):
        return MEMORY
    return next((part for part, prefixes in GROUPS.items() if stored.startswith(prefixes)), None)


def version_of(bare: Container[str]) -> str:
    """Tell the generation of LTX-2 from bare tensor names: 2.3 brought gates, 2.5 feed-forward layers without bias."""
    if _GATE not in bare:
        return "2.0"
    return "2.3" if "transformer_blocks.0.ff.net.2.bias" in bare else "2.5"


def version_number(text: str | None) -> tuple[int, ...]:
    """Read the numbers that begin a `model_version`: "2.3.rc1" is (2, 3), "miniature" or None is ()."""
    found = re.match(r"\d+(\.\d+)*", text or "")
    return tuple(map(int, found[0].split("."))) if found else ()


def to_diffusers(config: ModelConfig) -> dict[str, object]:
    """Give the `config.json` of diffusers' transformer.

    Raises:
        ValueError: diffusers has no setting for it.
    """
    if config.audio_cross_attention_dim != config.audio_dim:
        raise ValueError(
            "diffusers turns cross-modal keys by audio_cross_attention_dim, which must be the audio width: found "
            f"{config.audio_cross_attention_dim} and {config.audio_dim}"
        )
    time, height, width = config.positional_embedding_max_pos
    return {
        "_class_name": DIFFUSERS_CLASS,
        **_DIFFUSERS_FIXED,
        **{theirs: getattr(config, ours) for ours, theirs in _DIFFUSERS_FIELDS.items()},
        "audio_gated_attn": config.apply_gated_attention,
        "audio_cross_attn_mod": config.cross_attention_adaln,
        "perturbed_attn": config.cross_attention_adaln,
        "use_prompt_embeddings": not config.caption_proj_before_connector,
        "rope_double_precision": config.frequencies_precision == "float64",
        "pos_embed_max_pos": time,
        "base_height": height,
        "base_width": width,
        "audio_pos_embed_max_pos": config.audio_positional_embedding_max_pos[0],
    }


def from_diffusers(described: Mapping[str, object]) -> ModelConfig:
    """Read diffusers' `config.json`; what it leaves out has diffusers' own default.

    Raises:
        ValueError: another class, or a setting that this model would silently do differently.
    """
    if described.get("_class_name") != DIFFUSERS_CLASS:
        raise ValueError(f"config.json describes {described.get('_class_name')!r}, expected {DIFFUSERS_CLASS!r}")
    for name, expected in _DIFFUSERS_FIXED.items():
        if (value := described.get(name, expected)) != expected:
            raise ValueError(f"config.json: {name} is {value!r}; only {expected!r} is supported")
    for name in ("gated_attn", "cross_attn_mod"):
        if described.get(name, False) != described.get("audio_" + name, False):
            raise ValueError(f"config.json: {name} and audio_{name} differ; only the same for both is supported")
    same = {ours: described[theirs] for ours, theirs in _DIFFUSERS_FIELDS.items() if theirs in described}
    space = [described.get(n, d) for n, d in (("pos_embed_max_pos", 20), ("base_height", 2048), ("base_width", 2048))]
    return ModelConfig.from_metadata(
        {"rope_type": "interleaved"}
        | same
        | {
            "caption_proj_before_connector": not described.get("use_prompt_embeddings", True),
            "frequencies_precision": "float64" if described.get("rope_double_precision", True) else "float32",
            "positional_embedding_max_pos": space,
            "audio_positional_embedding_max_pos": [described.get("audio_pos_embed_max_pos", 20)],
        }
    )


def from_shapes(shapes: Mapping[str, tuple[int, ...]], heads: int = 32) -> ModelConfig:
    """Work a config out from the shapes of the tensors, for files that carry none.

    Shapes do not tell the number of heads: it is `heads`, that of the 19B, unless there are gates to count.

    Raises:
        ValueError: a tensor that tells something is missing.
    """
    first = "transformer_blocks.0."
    try:
        video, channels = shapes["patchify_proj.weight"]
        audio, audio_channels = shapes["audio_patchify_proj.weight"]
        gates = shapes.get(first + "attn1.to_gate_logits.weight")
        caption = shapes.get("caption_projection.linear_1.weight")
        heads = gates[0] if gates else heads
        modulated = shapes[first + "scale_shift_table"][0] == 9
        known = {
            "num_layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("transformer_blocks.")),
            "num_attention_heads": heads,
            "audio_num_attention_heads": heads,
            "attention_head_dim": video // heads,
            "audio_attention_head_dim": audio // heads,
            "in_channels": channels,
            "audio_in_channels": audio_channels,
            "out_channels": shapes["proj_out.weight"][0],
            "audio_out_channels": shapes["audio_proj_out.weight"][0],
            "cross_attention_dim": shapes[first + "attn2.to_k.weight"][1],
            "audio_cross_attention_dim": shapes[first + "audio_attn2.to_k.weight"][1],
            "apply_gated_attention": gates is not None,
            "cross_attention_adaln": modulated,
            "use_prompt_adaln_single": not modulated or "prompt_adaln_single.linear.weight" in shapes,
            "caption_proj_before_connector": caption is None,
            "ff_bias": first + "ff.net.2.bias" in shapes,
            "audio_ff_bias": first + "audio_ff.net.2.bias" in shapes,
            "use_keyframes_abs_pos_embedding": KEYFRAMES in shapes,
        } | ({"caption_channels": caption[1]} if caption else {})
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"the shapes do not tell the model's config: {error} is missing or misshapen") from error
    if video % heads or audio % heads:
        raise ValueError(f"widths {video} and {audio} do not divide into {heads} heads")
    return ModelConfig(**known)


def _parts(name: str, renamed: Mapping[str, str]) -> str:
    return ".".join(renamed.get(part, part) for part in name.split("."))
