"""The dual-stream transformer of LTX-2 with one set of weights and three modes (spec 1).

*Bidirectional* is the teacher. *Masked* is block-causal training: all blocks at once under four masks. *Cached* is
streaming: one block at a time against a rolling KV cache. Module names are those of the LTX-2 checkpoint.

Shapes: B batch, F video latents, h w token grid, T audio latents, C latent channels, L text tokens, D stream width,
G groups that share one sigma (1, F or T), S sinks.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, rms_norm, silu

from omniforcing_lib.attention import Attention
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.flow import Skip
from omniforcing_lib.layout import AV, Clock
from omniforcing_lib.masks import Masks, Visibility
from omniforcing_lib.rope import Ropes, Rotation, tables

if TYPE_CHECKING:
    from omniforcing_lib.cache import KVCache, Slots


class TimestepEmbedding(nn.Module):
    """Embed sigma (times the scale multiplier) by a sinusoid of 256 and two linear layers (spec 1.4)."""

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
    """Turn sigma into `rows` modulation vectors, and give the embedding itself (spec 1.4)."""

    def __init__(self, dim: int, rows: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedding(dim)})
        self.linear = nn.Linear(dim, rows * dim)
        self.rows = rows

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Modulate.

        Shapes: timestep [B, G] to modulation [B, G, rows, dim] and embedding [B, G, dim].
        """
        embedded = self.emb["timestep_embedder"](timestep)
        return self.linear(silu(embedded)).unflatten(-1, (self.rows, -1)), embedded


class CaptionProjection(nn.Module):
    """Bring text features to the width of a stream (spec 1.3)."""

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
        return self.net[2](gelu(self.net[0]["proj"](x), approximate="tanh"))


class Level(NamedTuple):
    """What one stream gets from sigma, the same for every layer; batch 1 where one number is given for sigma."""

    own: Tensor  # [B, G, 6 or 9, D]: shift, scale, gate of self-attention, of the MLP (LTX-2.3: of text attention)
    cross: Tensor  # [B, G, 4, D]: scale, shift of A2V, then of V2A
    gate: Tensor  # [B, G, 1, D]: gate into this stream
    embedded: Tensor  # [B, G, D]
    prompt: Tensor | None  # [B, 1, 2, D]: shift, scale of the text (LTX-2.3)


class Condition(NamedTuple):
    """What one stream gets from sigma, text, time and causality, the same for every layer."""

    level: Level
    sigma: float | None  # the key of what is held for a level
    text: Tensor | None  # [B, L, D]; None where the cache already holds its keys
    rope: Rotation
    cross_rope: Rotation
    sees_own: Visibility | None
    sees_other: Visibility | None


class Rows(NamedTuple):
    """Modulation of one stream in one layer, each row [B, G, D]; every scale has its 1 added."""

    own: tuple[Tensor, ...]
    cross: tuple[Tensor, ...]
    gate: Tensor


class Stream(NamedTuple):
    """The modules and tables of one stream in one block, whatever their names in the checkpoint."""

    attention: Attention
    text_attention: Attention
    from_other: Attention
    feed_forward: FeedForward
    table: Tensor
    cross_table: Tensor
    prompt_table: Tensor | None


def modulate(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Scale and shift groups of tokens: x gain + shift, where gain is 1 + scale.

    Shapes: x [B, T, D], gain and shift [B, G, D] with G a divisor of T.
    """
    if gain.shape[1] == 1:
        return torch.addcmul(shift, x, gain)
    grouped = x.unflatten(1, (gain.shape[1], -1))
    return torch.addcmul(shift[:, :, None], grouped, gain[:, :, None]).flatten(1, 2)


def gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """Add a gated update: x + gate * update, groups as in `modulate`."""
    if gate.shape[1] == 1:
        return torch.addcmul(x, gate, update)
    groups = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, groups), gate[:, :, None], update.unflatten(1, groups)).flatten(1, 2)


class Block(nn.Module):
    """One dual-stream block (spec 1.5)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        video, audio, heads = config.video_dim, config.audio_dim, config.num_attention_heads
        wide, narrow = (heads, config.attention_head_dim), (heads, config.audio_attention_head_dim)
        shared = {"eps": config.norm_eps, "rope_type": config.rope_type, "gated": config.apply_gated_attention}
        rows = 9 if config.cross_attention_adaln else 6
        self.eps = config.norm_eps
        self.attn1 = Attention(video, video, *wide, **shared)
        self.audio_attn1 = Attention(audio, audio, *narrow, **shared)
        self.attn2 = Attention(video, config.cross_attention_dim, *wide, **shared)
        self.audio_attn2 = Attention(audio, config.audio_cross_attention_dim, *narrow, **shared)
        self.audio_to_video_attn = Attention(video, audio, *narrow, **shared)
        self.video_to_audio_attn = Attention(audio, video, *narrow, **shared)
        self.ff = FeedForward(video, config.ff_bias)
        self.audio_ff = FeedForward(audio, config.audio_ff_bias)
        self.scale_shift_table = nn.Parameter(torch.zeros(rows, video))
        self.audio_scale_shift_table = nn.Parameter(torch.zeros(rows, audio))
        self.scale_shift_table_a2v_ca_video = nn.Parameter(torch.zeros(5, video))
        self.scale_shift_table_a2v_ca_audio = nn.Parameter(torch.zeros(5, audio))
        self.prompt_scale_shift_table = self.audio_prompt_scale_shift_table = None
        if config.cross_attention_adaln:
            self.prompt_scale_shift_table = nn.Parameter(torch.zeros(2, video))
            self.audio_prompt_scale_shift_table = nn.Parameter(torch.zeros(2, audio))

    @property
    def streams(self) -> AV[Stream]:
        """Group modules and tables by stream."""
        return AV(
            Stream(
                self.attn1,
                self.attn2,
                self.audio_to_video_attn,
                self.ff,
                self.scale_shift_table,
                self.scale_shift_table_a2v_ca_video,
                self.prompt_scale_shift_table,
            ),
            Stream(
                self.audio_attn1,
                self.audio_attn2,
                self.video_to_audio_attn,
                self.audio_ff,
                self.audio_scale_shift_table,
                self.scale_shift_table_a2v_ca_audio,
                self.audio_prompt_scale_shift_table,
            ),
        )

    def forward(
        self,
        x: AV[Tensor],
        condition: AV[Condition],
        *,
        slots: AV[Slots] | None = None,
        skip_self: bool = False,
        skip_cross: bool = False,
    ) -> AV[Tensor]:
        """Run self-attention, text attention, cross-modal attention and the MLP.

        Shapes: video [B, F h w, Dv], audio [B, (S +) T, Da] to the same.
        """
        streams, slots = self.streams, slots or AV(None, None)
        rows = streams.map(self._rows, condition, slots)
        attend = self._perturbed if skip_self else self._attend
        x = x.map(attend, streams, condition, rows, slots)
        x = x.map(self._read, streams, condition, rows, slots)
        if not skip_cross:
            x = self._exchange(x, streams, condition, rows, slots)
        return x.map(self._widen, streams, rows)

    def _rows(self, s: Stream, c: Condition, slots: Slots | None) -> Rows:
        """Add this layer's tables to what sigma says, or take what the cache holds for that sigma."""

        def make() -> Rows:
            own, cross = (s.table + c.level.own).unbind(2), (s.cross_table[:4] + c.level.cross).unbind(2)
            return Rows(
                tuple(1 + row if i % 3 == 1 else row for i, row in enumerate(own)),
                tuple(1 + row if i % 2 == 0 else row for i, row in enumerate(cross)),
                (s.cross_table[4:] + c.level.gate).squeeze(2),
            )

        return slots.rows.get(c.sigma, make) if slots else make()

    def _norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], eps=self.eps)

    def _widen(self, x: Tensor, s: Stream, rows: Rows) -> Tensor:
        """Run the MLP (steps 6 and 7)."""
        _, _, _, shift, gain, gate, *_ = rows.own
        return gated(x, gate, s.feed_forward(modulate(self._norm(x), gain, shift)))

    def _attend(self, x: Tensor, s: Stream, c: Condition, rows: Rows, slots: Slots | None) -> Tensor:
        """Attend within the stream (steps 1 and 3)."""
        shift, gain, gate, *_ = rows.own
        update = s.attention(
            modulate(self._norm(x), gain, shift),
            rotations=(c.rope, c.rope),
            visibility=c.sees_own,
            slot=slots and slots.own,
        )
        return gated(x, gate, update)

    def _perturbed(self, x: Tensor, s: Stream, c: Condition, rows: Rows, slots: Slots | None) -> Tensor:
        """Drop the self-attention branch (LTX-2.0) or pass its values through (2.3): STG (spec 1.11)."""
        if s.attention.to_gate_logits is None:
            return x
        shift, gain, gate, *_ = rows.own
        return gated(x, gate, s.attention.pass_values(modulate(self._norm(x), gain, shift)))

    def _read(self, x: Tensor, s: Stream, c: Condition, rows: Rows, slots: Slots | None) -> Tensor:
        """Attend to the text (steps 2 and 4); modulated and gated in LTX-2.3 only."""
        slot = slots and slots.text
        if s.prompt_table is None:
            return x + s.text_attention(self._norm(x), c.text, slot=slot)
        prompt = s.prompt_table if c.level.prompt is None else s.prompt_table + c.level.prompt
        text_shift, text_scale = prompt.unbind(-2)
        shift, gain, gate = rows.own[6:]
        text = None if c.text is None else c.text * (1 + text_scale) + text_shift
        return gated(x, gate, s.text_attention(modulate(self._norm(x), gain, shift), text, slot=slot))

    def _exchange(
        self,
        x: AV[Tensor],
        streams: AV[Stream],
        condition: AV[Condition],
        rows: AV[Rows],
        slots: AV[Slots | None],
    ) -> AV[Tensor]:
        """Let each stream attend to the other, both from one snapshot (step 5); cross rows 0-1 are A2V, 2-3 V2A."""
        normed = x.map(self._norm)

        def receive(x: Tensor, to: int, first: int) -> Tensor:
            own, other = condition[to], 1 - to
            query, context = (modulate(normed[i], *rows[i].cross[first : first + 2]) for i in (to, other))
            update = streams[to].from_other(
                query,
                context,
                rotations=(own.cross_rope, condition[other].cross_rope),
                visibility=own.sees_other,
                slot=slots[other] and slots[other].cross,
            )
            return gated(x, rows[to].gate, update)

        return x.map(receive, AV(0, 1), AV(0, 2))


class Transformer(nn.Module):
    """LTX-2's audio-video transformer: velocity from noisy latents, sigma and text.

    Args:
        config: dimensions and RoPE, as read from a checkpoint.
        clock: the two clocks; positions are physical time.
    """

    def __init__(self, config: ModelConfig, clock: Clock | None = None) -> None:
        super().__init__()
        video, audio = config.video_dim, config.audio_dim
        rows = 9 if config.cross_attention_adaln else 6
        self.config, self.clock = config, clock or Clock()
        self.patchify_proj = nn.Linear(config.in_channels, video)
        self.audio_patchify_proj = nn.Linear(config.audio_in_channels, audio)
        self.adaln_single = AdaLN(video, rows)
        self.audio_adaln_single = AdaLN(audio, rows)
        self.av_ca_video_scale_shift_adaln_single = AdaLN(video, 4)
        self.av_ca_audio_scale_shift_adaln_single = AdaLN(audio, 4)
        self.av_ca_a2v_gate_adaln_single = AdaLN(video, 1)
        self.av_ca_v2a_gate_adaln_single = AdaLN(audio, 1)
        if not config.caption_proj_before_connector:
            self.caption_projection = CaptionProjection(config.caption_channels, video)
            self.audio_caption_projection = CaptionProjection(config.caption_channels, audio)
        if config.modulates_prompt_by_sigma:
            self.prompt_adaln_single = AdaLN(video, 2)
            self.audio_prompt_adaln_single = AdaLN(audio, 2)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, video))
        self.audio_scale_shift_table = nn.Parameter(torch.zeros(2, audio))
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.proj_out = nn.Linear(video, config.out_channels)
        self.audio_proj_out = nn.Linear(audio, config.audio_out_channels)
        if config.num_audio_sink_tokens:
            self.audio_sink_tokens = nn.Parameter(torch.empty(1, config.num_audio_sink_tokens, audio))
            nn.init.normal_(self.audio_sink_tokens, std=0.02)

    def forward(
        self,
        x: AV[Tensor],
        sigma: AV[Tensor] | AV[float],
        text: AV[Tensor],
        *,
        skip: Skip | None = None,
        masks: Masks | None = None,
        cache: KVCache | None = None,
    ) -> AV[Tensor]:
        """Predict the velocity eps - x0.

        Without `masks` and `cache` every token sees every token (the teacher; sinks are not used). With `masks` the
        clip is block-causal. With `cache` the latents are those of the block that the cache has open.

        Shapes: x video [B, F, h, w, C], audio [B, T, C]; sigma [B], or video [B, F] and audio [B, T], or the same
        number for both, whose modulation the cache then holds; text [B, L, caption channels] for each stream; to the
        shapes of x.
        """
        skip = skip or Skip()
        sinks = self._sinks(masks, cache)
        grid = tuple(x.video.shape[2:4])
        latents = cache.latents if cache else AV(range(x.video.shape[1]), range(x.audio.shape[1]))
        condition = self._conditions(sigma, text, latents, grid, sinks, masks, cache)
        x = x.map(lambda part: part.to(self.proj_out.weight.dtype))
        hidden = AV(
            self.patchify_proj(rearrange(x.video, "b f h w c -> b (f h w) c")), self._with_sinks(x.audio, sinks)
        )
        for index, block in enumerate(self.transformer_blocks):
            hidden = block(
                hidden,
                condition,
                slots=cache and cache.layer(index),
                skip_self=index in skip.self_attention,
                skip_cross=skip.cross_modal,
            )
        embedded = condition.map(lambda c: c.level.embedded)
        video = self._project(hidden.video, embedded.video, self.scale_shift_table, self.proj_out)
        kept = embedded.audio[:, sinks:] if embedded.audio.shape[1] > 1 else embedded.audio
        audio = self._project(hidden.audio[:, sinks:], kept, self.audio_scale_shift_table, self.audio_proj_out)
        return AV(rearrange(video, "b (f h w) c -> b f h w c", h=grid[0], w=grid[1]), audio)

    def rotations(self, latents: AV[range], grid: tuple[int, int], sinks: int) -> Ropes:
        """Give the rotations of a stretch of latents; the `sinks` in front of the audio are not rotated."""
        return tables(self.config, self.clock, latents, grid, sinks, self.proj_out.weight.device)

    def _sinks(self, masks: Masks | None, cache: KVCache | None) -> int:
        """Count the sinks in front of this call's audio, and check that masks and cache agree with the model."""
        if masks is None and cache is None:
            return 0
        expected, found = self.config.num_audio_sink_tokens, (masks or cache).sinks
        if expected != found:
            raise ValueError(f"the model has {expected} audio sink tokens, the layout {found}; use the same number")
        return found if masks or cache.at_start else 0

    def _with_sinks(self, audio: Tensor, sinks: int) -> Tensor:
        hidden = self.audio_patchify_proj(audio)
        return torch.cat([self.audio_sink_tokens.expand(len(audio), -1, -1), hidden], dim=1) if sinks else hidden

    def _conditions(self, sigma, text, latents, grid, sinks, masks, cache) -> AV[Condition]:
        """Make what every layer needs of sigma, text, time and causality."""
        ropes = self.rotations(latents, grid, sinks)
        sees = AV((None, None), (None, None))
        if masks is not None:
            sees = AV((masks.video_self, masks.a2v), (masks.audio_self, masks.v2a))
        number = sigma.video if isinstance(sigma.video, float) else None
        make = partial(self._levels, sigma, sinks, masks)
        level = cache.levels.get(number, make) if cache else make()
        text = text.map(lambda t, m: self._text(t, m["caption"], cache), self._modulators)
        return level.map(
            lambda level, text, own, cross, sees: Condition(level, number, text, own, cross, *sees),
            text,
            ropes.own,
            ropes.cross,
            sees,
        )

    def _levels(self, sigma: AV[Tensor] | AV[float], sinks: int, masks: Masks | None) -> AV[Level]:
        """Make what every layer needs of sigma."""
        device = self.proj_out.weight.device
        # filled on the device: a copy from the host could not be recorded in a CUDA graph
        sigma = sigma.map(
            lambda s: (
                s.to(device).reshape(len(s), -1) if isinstance(s, Tensor) else torch.full((1, 1), s, device=device)
            )
        )
        if sigma.video.shape[1] > 1 and self.config.modulates_prompt_by_sigma and masks is not None:
            raise ValueError("LTX-2.3 modulates the text by one sigma a sample; found a sigma a latent under masks")
        steps = sigma.map(lambda s: s * self.config.timestep_scale_multiplier)
        if sinks and steps.audio.shape[1] > 1:
            first = steps.audio[:, :1].expand(-1, sinks)
            steps = AV(steps.video, torch.cat([first, steps.audio], dim=1))
        level = steps.map(lambda s: s.amax(1, keepdim=True))
        across = AV(level.audio, level.video) if self.config.cross_attention_adaln else steps
        ratio = self.config.av_ca_timestep_scale_multiplier / self.config.timestep_scale_multiplier

        def make(stream: dict[str, nn.Module | None], steps: Tensor, level: Tensor, across: Tensor) -> Level:
            own, embedded = stream["own"](steps)
            prompt = stream["prompt"](level)[0] if stream["prompt"] else None
            return Level(own, stream["cross"](across)[0], stream["gate"](across * ratio)[0], embedded, prompt)

        return self._modulators.map(make, steps, level, across)

    @property
    def _modulators(self) -> AV[dict[str, nn.Module | None]]:
        return AV(
            {
                "own": self.adaln_single,
                "cross": self.av_ca_video_scale_shift_adaln_single,
                "gate": self.av_ca_a2v_gate_adaln_single,
                "caption": getattr(self, "caption_projection", None),
                "prompt": getattr(self, "prompt_adaln_single", None),
            },
            {
                "own": self.audio_adaln_single,
                "cross": self.av_ca_audio_scale_shift_adaln_single,
                "gate": self.av_ca_v2a_gate_adaln_single,
                "caption": getattr(self, "audio_caption_projection", None),
                "prompt": getattr(self, "audio_prompt_adaln_single", None),
            },
        )

    def _text(self, text: Tensor, caption: nn.Module | None, cache: KVCache | None) -> Tensor | None:
        """Project the text once a prompt; where gradients flow, every time."""
        if cache is not None and cache.knows_text:
            return None
        return caption(text) if caption else text

    def _project(self, x: Tensor, embedded: Tensor, table: Tensor, out: nn.Linear) -> Tensor:
        shift, scale = (table + embedded[:, :, None]).unbind(2)
        return out(modulate(layer_norm(x, x.shape[-1:], eps=self.config.norm_eps), 1 + scale, shift))


def initialise(model: Transformer, generator: torch.Generator) -> Transformer:
    """Draw weights for training from nothing: residual branches and output start at zero (adaLN-zero)."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        elif parameter.dim() < 2 or name.endswith("table") or _starts_silent(name):
            nn.init.zeros_(parameter)
        elif name == "audio_sink_tokens":
            nn.init.normal_(parameter, std=0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(parameter, generator=generator)
    return model


def _starts_silent(name: str) -> bool:
    modulation = name.endswith("adaln_single.linear.weight")
    text_out = "attn2.to_out" in name
    return modulation or text_out or name in ("proj_out.weight", "audio_proj_out.weight")
