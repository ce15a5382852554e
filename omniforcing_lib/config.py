"""The transformer's dimensions, RoPE and modulation, under the names that LTX-2's checkpoints use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from omniforcing_lib.layout import AV

_FIXED = {
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm",
    "norm_elementwise_affine": False,
    "standardization_norm": "rms_norm",
    "share_ff": False,
    "av_cross_ada_norm": True,
}
_CHECKED = {
    "num_embeds_ada_norm": 1000,
    "num_vector_embeds": None,
    "positional_embedding_type": "rope",
    "use_audio_video_cross_attention": True,
    "cross_attention_norm": True,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "double_self_attention": False,
    "upcast_attention": False,
}
"""What Lightricks' loader asks of every file, and what no fingerprint counts: it was not written from the start."""
_ROPE_TYPES = ("split", "interleaved")
_PRECISIONS = ("float64", "float32")
CROSS_MODAL_SIGMAS = ("gate", "all", "none")
"""What of the cross-modal modulation goes by the other stream's sigma. The gate alone, in Lightricks' code since May
2026; all of it, in ltx-core 1.0.0 and in diffusers' pipelines; nothing, in OmniForcing's and TaoMate's code."""
_MOST, _MOST_LAYERS = 2**20, 512  # far beyond any LTX; a file that claims more would only fill the memory
_TYPES = {"int": int, "float": (int, float), "bool": bool, "str": str, "tuple[int, ...]": tuple}


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of one LTX-2 transformer; the defaults are the 19B model (specification 1.1, 1.2).

    Field names are those of the `transformer` part of the safetensors metadata, so that a checkpoint can be read
    without a table of translations. `num_audio_sink_tokens` is OmniForcing's (paper Sec. 3.2).
    """

    num_layers: int = 48
    num_attention_heads: int = 32
    attention_head_dim: int = 128
    in_channels: int = 128
    out_channels: int = 128
    cross_attention_dim: int = 4096
    audio_num_attention_heads: int = 32
    audio_attention_head_dim: int = 64
    audio_in_channels: int = 128
    audio_out_channels: int = 128
    audio_cross_attention_dim: int = 2048
    caption_channels: int = 3840
    norm_eps: float = 1e-6
    positional_embedding_theta: float = 10_000.0
    positional_embedding_max_pos: tuple[int, ...] = (20, 2048, 2048)
    audio_positional_embedding_max_pos: tuple[int, ...] = (20,)
    use_middle_indices_grid: bool = True
    rope_type: str = "split"
    frequencies_precision: str = "float64"
    timestep_scale_multiplier: int = 1000
    av_ca_timestep_scale_multiplier: int = 1000
    apply_gated_attention: bool = False
    cross_attention_adaln: bool = False
    use_prompt_adaln_single: bool = True
    caption_proj_before_connector: bool = False
    ff_bias: bool = True
    audio_ff_bias: bool = True
    use_keyframes_abs_pos_embedding: bool = False
    num_audio_sink_tokens: int = 0
    cross_modal_sigma: str = "gate"

    def __post_init__(self) -> None:
        for name, count in (("positional_embedding_max_pos", 3), ("audio_positional_embedding_max_pos", 1)):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or len(value) != count:
                raise ValueError(f"{name} is a list of {count}, found {value!r}")
            object.__setattr__(self, name, tuple(value))
        self._check_types()
        named = {
            "rope_type": _ROPE_TYPES,
            "frequencies_precision": _PRECISIONS,
            "cross_modal_sigma": CROSS_MODAL_SIGMAS,
        }
        for name, known in named.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}; found {getattr(self, name)!r}")
        if not self.use_middle_indices_grid:
            raise ValueError(
                "use_middle_indices_grid must be true: positions are the middle of each cell (specification 1.8)"
            )
        if self.num_attention_heads != self.audio_num_attention_heads:
            raise ValueError(
                "cross-modal attention needs the same heads in both streams, found "
                f"{self.num_attention_heads} video and {self.audio_num_attention_heads} audio"
            )

    def _check_types(self) -> None:
        """Refuse a field of the wrong type or sign by its name: metadata is text that anybody may have written."""
        for field in fields(self):
            value, expected = getattr(self, field.name), _TYPES[str(field.type)]
            if not isinstance(value, expected) or isinstance(value, bool) != (expected is bool):
                raise ValueError(f"{field.name} is of type {field.type}, found {repr(value)[:80]}")
            least = 0 if field.name == "num_audio_sink_tokens" else 1e-12
            most = _MOST_LAYERS if field.name == "num_layers" else _MOST
            sizes = () if expected in (bool, str) else value if expected is tuple else (value,)
            if not all(isinstance(n, int | float) and n >= least for n in sizes):
                raise ValueError(f"{field.name} is above 0, found {repr(value)[:80]}")
            if max(sizes, default=0) > most:
                raise ValueError(f"{field.name} is at most {most:,}, found {repr(value)[:80]}")
        if max(self.video_dim, self.audio_dim) > _MOST:
            raise ValueError(f"widths are at most {_MOST:,}, found {self.video_dim:,} and {self.audio_dim:,}")

    @property
    def video_dim(self) -> int:
        """Width of the video stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def audio_dim(self) -> int:
        """Width of the audio stream, and of cross-modal attention in both directions."""
        return self.audio_num_attention_heads * self.audio_attention_head_dim

    def latent_shapes(self, latents: AV[int], grid: tuple[int, int]) -> AV[tuple[int, ...]]:
        """Give the shapes of a clip's latents without the batch: ([F, h, w, C], [T, C])."""
        return AV((latents.video, *grid, self.in_channels), (latents.audio, self.audio_in_channels))

    @property
    def modulates_prompt_by_sigma(self) -> bool:
        """Tell whether text keys depend on sigma (from LTX-2.3 on), so that they can't be cached over steps."""
        return self.cross_attention_adaln and self.use_prompt_adaln_single

    @classmethod
    def from_metadata(cls, transformer: Mapping[str, Any]) -> ModelConfig:
        """Read the `transformer` part of an LTX-2 `config`; refuse what this model would silently do differently."""
        for name, expected in (_FIXED | _CHECKED).items():
            value = transformer.get(name, expected)
            if value != expected:
                raise ValueError(f"config.transformer.{name} is {value!r}; only {expected!r} is supported")
        known = {f.name for f in fields(cls)}
        return cls(**{k: _normal(k, v) for k, v in transformer.items() if k in known and v is not None})

    def to_metadata(self) -> dict[str, object]:
        """Give the `transformer` part of an LTX-2 `config`."""
        return {**_FIXED, **_CHECKED, **json.loads(json.dumps(asdict(self)))}

    @property
    def identity(self) -> dict[str, object]:
        """Give what a fingerprint counts: what the first ones did, and a later field where it is not at its default."""
        default = "cross_modal_sigma", "gate"
        return {k: v for k, v in self.to_metadata().items() if k not in _CHECKED and (k, v) != default}

    def with_sinks(self, count: int) -> ModelConfig:
        """Give the same model with `count` audio sink tokens."""
        return replace(self, num_audio_sink_tokens=count)


def _normal(name: str, value: Any) -> Any:
    """Bring other spellings of a value, as some files have them, to ours."""
    if name == "frequencies_precision" and isinstance(value, str):
        return value.removeprefix("torch.")
    if name.endswith("_multiplier") and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


MINIATURE = ModelConfig(
    num_layers=6,
    num_attention_heads=4,
    attention_head_dim=40,
    in_channels=32,
    out_channels=32,
    cross_attention_dim=160,
    audio_num_attention_heads=4,
    audio_attention_head_dim=20,
    audio_in_channels=32,
    audio_out_channels=32,
    audio_cross_attention_dim=80,
    caption_channels=64,
)
"""The miniature LTX-2 of this repository: the 19B's shape, trained on the Bounce world."""
