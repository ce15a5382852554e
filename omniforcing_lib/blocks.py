"""The parts of LTX-2's transformer: sigma embedded, text projected, and the dual-stream block (specification 1.4, 1.5).

Names of modules are those of the checkpoint; `Stream` groups them by stream, so that every step is written once.

Shapes: B batch, T tokens of a stream, L text tokens, D stream width, G groups of tokens that share one sigma.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from omniforcing_lib.attention import Attention
from omniforcing_lib.cache import LayerCache, OpenBlock, Prompt
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.fused import Elementwise, Pair, modulate
from omniforcing_lib.layout import AV
from omniforcing_lib.masks import AttentionMask
from omniforcing_lib.rope import Rotation


class TimestepEmbedder(nn.Module):
    """Embed sigma (times the scale multiplier) by a sinusoid of 256 and two linear layers (specification 1.4)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(256, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed.

        Shapes: timestep [B, G] to [B, G, dim].
        """
        half = 128
        wide = torch.promote_types(timestep.dtype, torch.float32)
        exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        phase = timestep.to(wide)[..., None] * exponent.exp()
        wave = torch.cat([phase.cos(), phase.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(silu(self.linear_1(wave)))


class AdaLN(nn.Module):
    """Turn sigma into a number of modulation vectors, and give the embedding itself (specification 1.4)."""

    def __init__(self, dim: int, vectors: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(dim)})
        self.linear = nn.Linear(dim, vectors * dim)
        self.vectors = vectors

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Modulate.

        Shapes: timestep [B, G] to modulation [B, G, vectors, dim] and embedding [B, G, dim].
        """
        embedded = self.emb["timestep_embedder"](timestep)
        return self.linear(silu(embedded)).unflatten(-1, (self.vectors, -1)), embedded


class CaptionProjection(nn.Module):
    """Bring text features to the width of a stream (specification 1.3)."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        """Project [B, L, channels] to [B, L, dim]."""
        return self.linear_2(gelu(self.linear_1(text), approximate="tanh"))


class FeedForward(nn.Module):
    """Four times wide, tanh-GELU; `net.0.proj` and `net.2` as in the checkpoint."""

    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        widen = nn.ModuleDict({"proj": nn.Linear(dim, 4 * dim, bias=bias)})
        self.net = nn.ModuleList([widen, nn.Identity(), nn.Linear(4 * dim, dim, bias=bias)])

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, dim] to the same."""
        widen, _, narrow = self.net
        return narrow(gelu(cast(nn.ModuleDict, widen)["proj"](x), approximate="tanh"))


class TimestepEmbedding(NamedTuple):
    """What one stream gets from sigma, the same for every layer; batch 1 where one number is given for sigma."""

    own: Tensor  # [B, G, 6 or 9, D]: shift, scale, gate of self-attention, of the MLP (LTX-2.3: of text attention)
    cross: Tensor  # [B, G, 4, D]: scale, shift of A2V, then of V2A
    gate: Tensor  # [B, G, 1, D]: gate into this stream
    embedded: Tensor  # [B, G, D]
    prompt: Tensor | None  # [B, K, 2, D]: shift, scale of the text for each of K blocks, or for all (LTX-2.3)


class Condition(NamedTuple):
    """What one stream gets from sigma, text, time and causality, the same for every layer.

    Attributes:
        timestep: sigma, embedded.
        text: [B, L, D]; None where the cache already holds its keys.
        rope: rotations of self-attention.
        cross_rope: rotations of cross-modal attention.
        sees_own: mask of self-attention.
        sees_other: mask of cross-modal attention.
        blocks: the open blocks of a cached pass, () without a cache.
        sigma_key: key under which the cache holds the modulation of these noise levels; None holds nothing.
        prompt_key: the same for the keys and values of the text.
        elementwise: functions that do the elementwise work.
    """

    timestep: TimestepEmbedding
    text: Tensor | None
    rope: Rotation
    cross_rope: Rotation
    sees_own: AttentionMask | None
    sees_other: AttentionMask | None
    blocks: tuple[OpenBlock, ...]
    sigma_key: Hashable | None
    prompt_key: Hashable | None
    elementwise: Elementwise


class LayerModulation(NamedTuple):
    """Modulation of one stream in one layer, vectors [B, G, D]; every scale has its 1 added."""

    own: tuple[Tensor, ...]
    cross: tuple[Tensor, ...]
    gate: Tensor


class Pending(NamedTuple):
    """A stream and what its last step gave, not added yet; without a gate it is added whole."""

    x: Tensor
    update: Tensor | None = None
    gate: Tensor | None = None


class Stream(NamedTuple):
    """The modules and tables of one stream in one block, whatever their names in the checkpoint."""

    attention: Attention
    text_attention: Attention
    from_other: Attention
    feed_forward: FeedForward
    table: Tensor
    cross_table: Tensor
    prompt_table: Tensor | None


_STREAMS = AV(
    "attn1 attn2 audio_to_video_attn ff scale_shift_table scale_shift_table_a2v_ca_video prompt_scale_shift_table",
    "audio_attn1 audio_attn2 video_to_audio_attn audio_ff audio_scale_shift_table scale_shift_table_a2v_ca_audio "
    "audio_prompt_scale_shift_table",
)
"""Names in the checkpoint of what `Stream` groups, in its order."""


def _modulated(text: Tensor | None, prompt: Tensor) -> Tensor | None:
    """Shift and scale text. Shapes: text [B, L, D], prompt [B, 1, 2, D] (shift, scale)."""
    shift, scale = prompt.unbind(2)
    return None if text is None else modulate(text, 1 + scale, shift)


class Block(nn.Module):
    """One dual-stream block (specification 1.5)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        video, audio, heads = config.video_dim, config.audio_dim, config.num_attention_heads
        wide, narrow = (heads, config.attention_head_dim), (heads, config.audio_attention_head_dim)
        shared = {"eps": config.norm_eps, "rope_type": config.rope_type, "gated": config.apply_gated_attention}
        vectors = 9 if config.cross_attention_adaln else 6
        self.eps = config.norm_eps
        self.attn1 = Attention(video, video, *wide, **shared)
        self.audio_attn1 = Attention(audio, audio, *narrow, **shared)
        self.attn2 = Attention(video, config.cross_attention_dim, *wide, **shared)
        self.audio_attn2 = Attention(audio, config.audio_cross_attention_dim, *narrow, **shared)
        self.audio_to_video_attn = Attention(video, audio, *narrow, **shared)
        self.video_to_audio_attn = Attention(audio, video, *narrow, **shared)
        self.ff = FeedForward(video, config.ff_bias)
        self.audio_ff = FeedForward(audio, config.audio_ff_bias)
        self.scale_shift_table = nn.Parameter(torch.zeros(vectors, video))
        self.audio_scale_shift_table = nn.Parameter(torch.zeros(vectors, audio))
        self.scale_shift_table_a2v_ca_video = nn.Parameter(torch.zeros(5, video))
        self.scale_shift_table_a2v_ca_audio = nn.Parameter(torch.zeros(5, audio))
        self.prompt_scale_shift_table = self.audio_prompt_scale_shift_table = None
        if config.cross_attention_adaln:
            self.prompt_scale_shift_table = nn.Parameter(torch.zeros(2, video))
            self.audio_prompt_scale_shift_table = nn.Parameter(torch.zeros(2, audio))

    @property
    def streams(self) -> AV[Stream]:
        """Group modules and tables by stream."""
        return _STREAMS.map(lambda names: Stream(*(getattr(self, name) for name in names.split())))

    def forward(
        self,
        x: AV[Tensor],
        condition: AV[Condition],
        *,
        cached: AV[LayerCache] | None = None,
        skip_self: str = "",
        skip_cross: bool = False,
    ) -> AV[Tensor]:
        """Run self-attention, text attention, cross-modal attention and the MLP.

        `skip_self` is what STG does to self-attention (`flow.Skip`): "values" lets values through, "branch" drops it.

        Shapes: video [B, F h w, Dv], audio [B, (S +) T, Da] to the same.
        """
        streams = self.streams
        caches: AV[LayerCache | None] = cached or AV(None, None)
        modulation = streams.map(self._modulation, condition, caches)
        # Each step is done for both streams before the next; steps 1 to 4 and 6 to 7 keep to one stream. What a step
        # gives is added by the next one, together with the norm that it begins with.
        at = x.map(partial(self._attend, skip=skip_self), streams, condition, modulation, caches)
        at = at.map(self._read_text, streams, condition, modulation, caches)
        if not skip_cross:
            at = self._exchange(at, streams, condition, modulation, caches)
        at = at.map(self._feed_forward, streams, condition, modulation)
        return at.map(lambda pending, c: self._added(pending, c)[0], condition)

    def _modulation(self, s: Stream, c: Condition, cached: LayerCache | None) -> LayerModulation:
        """Add this layer's tables to what sigma gives, or take what the cache holds for that sigma."""

        def make() -> LayerModulation:
            own, cross = (s.table + c.timestep.own).unbind(2), (s.cross_table[:4] + c.timestep.cross).unbind(2)
            return LayerModulation(
                tuple(1 + vector if i % 3 == 1 else vector for i, vector in enumerate(own)),
                tuple(1 + vector if i % 2 == 0 else vector for i, vector in enumerate(cross)),
                (s.cross_table[4:] + c.timestep.gate).squeeze(2),
            )

        return cached.modulation.get(c.sigma_key, make) if cached else make()

    def _added(self, at: Pending, c: Condition, *pairs: Pair | None) -> tuple[Tensor, list[Tensor]]:
        """Add what the step before gave; give the stream, and its norm as each pair modulates it."""
        return c.elementwise.residual(at.x, at.update, at.gate, pairs, self.eps)

    def _attend(
        self, x: Tensor, s: Stream, c: Condition, m: LayerModulation, cached: LayerCache | None, *, skip: str
    ) -> Pending:
        """Attend within the stream (steps 1 and 3).

        What `skip` names is left out: "values" lets them through, "branch" drops it (specification 1.11).
        """
        if skip == "branch":
            return Pending(x)
        shift, gain, gate, *_ = m.own
        x, (query,) = self._added(Pending(x), c, (gain, shift))
        if skip:
            return Pending(x, s.attention.pass_values(query, c.elementwise), gate)
        update = s.attention(
            query,
            rotations=(c.rope, c.rope),
            visibility=c.sees_own,
            cached=cached and cached.own,
            blocks=c.blocks,
            elementwise=c.elementwise,
        )
        return Pending(x, update, gate)

    def _read_text(
        self, at: Pending, s: Stream, c: Condition, m: LayerModulation, cached: LayerCache | None
    ) -> Pending:
        """Attend to the text (steps 2 and 4); modulated and gated in LTX-2.3 only."""
        shared = {
            "cached": cached and Prompt(cached.text, c.prompt_key),
            "blocks": c.blocks,
            "elementwise": c.elementwise,
        }
        if s.prompt_table is None:
            x, (query,) = self._added(at, c, None)
            return Pending(x, s.text_attention(query, c.text, **shared))
        shift, gain, gate = m.own[6:]
        x, (query,) = self._added(at, c, (gain, shift))
        prompt = s.prompt_table[None, None] if c.timestep.prompt is None else s.prompt_table + c.timestep.prompt
        if prompt.shape[1] == 1 or c.sees_other is None:
            return Pending(x, s.text_attention(query, _modulated(c.text, prompt), **shared), gate)
        # Under masks each block of queries reads the text as its own sigma modulates it.
        queries = query.split([len(rows) for rows, _ in c.sees_other.by_block], dim=1)
        by_block = zip(queries, prompt.split(1, 1), strict=True)
        parts = [s.text_attention(q, _modulated(c.text, p), elementwise=c.elementwise) for q, p in by_block]
        return Pending(x, torch.cat(parts, dim=1), gate)

    def _exchange(
        self,
        at: AV[Pending],
        streams: AV[Stream],
        condition: AV[Condition],
        modulation: AV[LayerModulation],
        cached: AV[LayerCache | None],
    ) -> AV[Pending]:
        """Let each stream attend to the other, both from one snapshot (step 5); vectors 0-1 are A2V, 2-3 V2A."""
        snapshot = at.map(lambda at, c, m: self._added(at, c, m.cross[:2], m.cross[2:]), condition, modulation)

        def receive(to: int) -> Pending:
            own, other = condition[to], 1 - to
            store = cached[other]
            update = streams[to].from_other(
                snapshot[to][1][to],
                snapshot[other][1][to],
                rotations=(own.cross_rope, condition[other].cross_rope),
                visibility=own.sees_other,
                cached=store and store.cross,
                blocks=own.blocks,
                elementwise=own.elementwise,
            )
            return Pending(snapshot[to][0], update, modulation[to].gate)

        return AV(0, 1).map(receive)

    def _feed_forward(self, at: Pending, s: Stream, c: Condition, m: LayerModulation) -> Pending:
        """Run the MLP (steps 6 and 7)."""
        _, _, _, shift, gain, gate, *_ = m.own
        x, (wide,) = self._added(at, c, (gain, shift))
        return Pending(x, s.feed_forward(wide), gate)
