"""Ways to make a teacher causal that differ in one thing: sinks, their positions, settings, precision, norms.

The differences that are no config field are a subclass or a swapped part of the model; none of them is ever saved.

Shapes: B batch, T audio tokens, S sinks, D width of the audio stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from omniforcing_lib import masks, rope
from omniforcing_lib.attention import Attention
from omniforcing_lib.fused import PLAIN, Elementwise
from omniforcing_lib.layout import AV
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.ltx2.formats import RELEASED_CODE
from omniforcing_lib.masks import AttentionMask, BlockRows, Masks
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.rope import Rotation
from omniforcing_lib.training import train as training
from omniforcing_lib.transformer import Transformer
from studies import rows

SETTINGS: dict[str, Mapping[str, object]] = {"right": {}, "released": RELEASED_CODE}
"""Config fields that a student is built with; `released` is what the official causal model hard-wires."""


class CountedSinks(Transformer):
    """Number sinks and audio through: sinks take the first S latents' times, the audio moves S latents later."""

    def rotations(self, latents: AV[range], grid: tuple[int, int], sinks: int) -> rope.Ropes:
        """Give the rotations of a stretch of latents, `sinks` in front counted with the audio."""
        shift, audio = self.config.num_audio_sink_tokens, latents.audio
        moved = AV(latents.video, range(audio.start + shift - sinks, audio.stop + shift))
        return super().rotations(moved, grid, 0)


class EarlierSinks(Transformer):
    """Give sinks the times before 0 and leave the audio where it is."""

    def rotations(self, latents: AV[range], grid: tuple[int, int], sinks: int) -> rope.Ropes:
        """Give the rotations of a stretch of latents, `sinks` in front one latent apart and ending before 0."""
        plain, config = super().rotations(latents, grid, sinks), self.config
        seconds = -torch.arange(sinks, 0, -1, dtype=torch.float32)[None] / self.clock.latent_rate.audio
        lengths, theta = config.audio_positional_embedding_max_pos, config.positional_embedding_theta
        angle = rope.angles(seconds, lengths, config.audio_dim, theta, config.frequencies_precision)
        front = rope.rotation(angle, config.num_attention_heads)

        def earlier(turn: rope.Rotation) -> rope.Rotation:
            parts = zip(front, turn, strict=True)
            return rope.Rotation(*(torch.cat([new.to(old), old[:, sinks:]], dim=1) for new, old in parts))

        return rope.Ropes(*(AV(turns.video, earlier(turns.audio)) for turns in plain))


POSITIONS = {"identity": Transformer, "counted": CountedSinks, "before": EarlierSinks}
PRECISIONS = {"fp32": torch.float32, "autocast": torch.float32, "bf16": torch.bfloat16}


class HeadNorm(nn.Module):
    """Bring every head to unit RMS, without a weight."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, T, D] in groups of D / heads."""
        split = x.unflatten(-1, (self.heads, -1))
        return nn.functional.rms_norm(split, split.shape[-1:], eps=1e-6).flatten(-2)


class Scale(nn.Module):
    """Multiply by a learned vector in place of an RMS norm: what is large stays large.

    Args:
        norm: the norm that it replaces.
        x: what that norm was given; on it both have the same mean square.
    """

    def __init__(self, norm: nn.RMSNorm, x: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach() / x.square().mean().sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """Scale [B, T, D]."""
        return x * self.weight


class Biased(nn.Module):
    """Attend with a logit for each head that takes attention and gives no value, as gpt-oss does; it starts at 0.

    Sinks without tokens: a row with one key can turn away from it. Nothing is cached, so it trains and is not streamed.
    """

    def __init__(self, plain: Attention) -> None:
        super().__init__()
        self.plain = plain
        self.logit = nn.Parameter(torch.zeros(plain.heads, 1, 1, device=plain.to_q.weight.device))

    def forward(
        self,
        x: Tensor,
        *,
        rotations: tuple[Rotation, Rotation],
        visibility: AttentionMask,
        cached: None = None,
        blocks: tuple = (),
        elementwise: Elementwise = PLAIN,
    ) -> Tensor:
        """Attend from [B, T, D] to itself."""
        logits, values = rows.logits_values(rows.Seen(self.plain, x, rotations[0], None))
        logits = logits.masked_fill(~visibility.dense.to(x.device), -torch.inf)
        bias = self.logit.expand(len(x), -1, logits.shape[2], 1)
        return self.plain._out(x, torch.cat([logits, bias], -1).softmax(-1)[..., :-1].to(values) @ values, elementwise)


class TanhGate(nn.Module):
    """Multiply by tanh of a learned vector that starts at 0."""

    def __init__(self, dim: int, device: torch.device) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Gate [B, T, D]."""
        return x * torch.tanh(self.gate)


def _norm_heads(attention: Attention) -> Attention:
    attention.q_norm = nn.Sequential(attention.q_norm, HeadNorm(attention.heads))
    attention.k_norm = nn.Sequential(attention.k_norm, HeadNorm(attention.heads))
    return attention


def _gate_output(attention: Attention) -> Attention:
    out = attention.to_out[0]
    attention.to_out[0] = nn.Sequential(out, TanhGate(out.out_features, out.weight.device))
    return attention


STABILISERS = {"none": lambda attention: attention, "qk_norm": _norm_heads, "tanh_gate": _gate_output, "bias": Biased}
"""Changes to audio self-attention that are weighed against sinks. The paper's: LTX-2 norms q and k already, so
`qk_norm` is a second norm; the tanh gate starts shut. `bias` is gpt-oss's."""


@lru_cache
def row_causal(built: Masks) -> Masks:
    """Let audio row i see the sinks and the audio up to itself, in place of its whole block."""
    block, first = built.audio_self, built.sinks + 1
    rest = (BlockRows(range(row, row + 1), (range(row + 1),)) for row in range(first, block.rows))
    runs = (BlockRows(range(first), (range(first),)), *rest)
    return built._replace(audio_self=AttentionMask(runs, block.columns, "dense"))


def _row_by_row(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {**kwargs, "masks": row_causal(kwargs["masks"])}


@dataclass(frozen=True)
class Variant:
    """Say how a teacher is made causal; the defaults are the paper's recipe on our miniature.

    Attributes:
        sinks: audio sink tokens.
        layout: `paper` or `released`.
        positions: of the sinks: `identity`, `counted` or `before` (see CountedSinks, EarlierSinks).
        settings: RoPE and gate multiplier of the student: `right` or `released`.
        precision: `fp32`, `autocast` (bf16 arithmetic, fp32 weights) or `bf16` (weights too, as released).
        stabiliser: `none`, `qk_norm`, `tanh_gate` or `bias`.
        norms: of queries and keys of audio self-attention: LTX-2's `rms`, or a `plain` scale (see Scale).
        audio_rows: `block`, or `row`: audio row i sees the sinks and i + 1 latents, the paper's own count of keys.
        sharpen: factor on the logits of audio self-attention.
        sink_std: spread of fresh sinks.
        lr: learning rate.
        clip: largest gradient norm; the paper's 10 lets all but explosions pass.
    """

    sinks: int = 16
    layout: str = "paper"
    positions: str = "identity"
    settings: str = "right"
    precision: str = "fp32"
    stabiliser: str = "none"
    norms: str = "rms"
    audio_rows: str = "block"
    sharpen: float = 1.0
    sink_std: float = 0.02
    lr: float = 5e-4
    clip: float = 10.0

    def __post_init__(self) -> None:
        known = {
            "positions": POSITIONS,
            "settings": SETTINGS,
            "precision": PRECISIONS,
            "stabiliser": STABILISERS,
            "norms": ("rms", "plain"),
            "audio_rows": ("block", "row"),
        }
        for name, words in known.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} is one of {', '.join(words)}; found {getattr(self, name)!r}")

    @property
    def causal(self) -> RolloutConfig:
        """Blocks and sinks of the student."""
        return RolloutConfig.from_layout(self.layout, sinks=self.sinks)

    @property
    def recipe(self) -> training.OptimConfig:
        """Optimiser of the paper's Stage 2: betas (0.9, 0.999), no weight decay, no average (specification 7.2).

        No gradient is too large for a step: whether a run would survive that is the question.
        """
        plain = training.OptimConfig(
            lr=self.lr, betas=(0.9, 0.999), weight_decay=0.0, warmup=5, clip=self.clip, ema=0.0
        )
        return replace(plain, amp=self.precision != "fp32", limit=math.inf)


def masks_of(causal: RolloutConfig, video: Tensor) -> Masks:
    """Give the masks of clips with these video latents, [B, F, h, w, C], under the window of `causal`."""
    frames, height, width = video.shape[1:4]
    return masks.build(causal.layout, frames, height * width, window=causal.window)


def build(
    variant: Variant, teacher: str = "teacher", device: str = "cpu", seen: tuple[AV[Tensor], ...] | None = None
) -> Transformer:
    """Load the teacher as a variant's student: fresh sinks, positions, settings, norms, stabiliser.

    `seen` are states, noise levels and text, as `Transformer.forward` takes them: plain scales are measured on them.
    """
    changes, dtype = SETTINGS[variant.settings], PRECISIONS[variant.precision]
    loaded = checkpoints.load(teacher, device=device, dtype=dtype, sinks=variant.sinks, changes=changes)
    model = POSITIONS[variant.positions](loaded.config, loaded.clock)
    model.load_state_dict(loaded.state_dict(), assign=True)
    if variant.sinks:
        model.audio_sink_tokens.data.mul_(variant.sink_std / 0.02)
    for block in model.transformer_blocks:
        block.audio_attn1.q_norm.weight.data.mul_(variant.sharpen)
    if variant.norms == "plain":
        _without_norms(model, variant.causal, seen)
    for block in model.transformer_blocks:
        block.audio_attn1 = STABILISERS[variant.stabiliser](block.audio_attn1)
    if variant.audio_rows == "row":
        model.register_forward_pre_hook(_row_by_row, with_kwargs=True)
    return model


@torch.no_grad()
def _without_norms(model: Transformer, causal: RolloutConfig, seen: tuple[AV[Tensor], ...] | None) -> None:
    if seen is None:
        raise ValueError("plain scales in place of norms are measured on states: give `seen`, found None")
    with rows.watched(model) as calls:
        model(*seen, masks=masks_of(causal, seen[0].video))
    for attention, x, *_ in calls:
        attention.q_norm = Scale(attention.q_norm, attention.to_q(x))
        attention.k_norm = Scale(attention.k_norm, attention.to_k(x))
