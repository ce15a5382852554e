"""The dual-stream transformer of LTX-2 with one set of weights and three modes (specification 1).

*Bidirectional* is the teacher. *Masked* is block-causal training: all blocks at once under four masks. *Cached* is
streaming: one block at a time against a rolling KV cache. Module names are those of the LTX-2 checkpoint.

Shapes: B batch, F video latents, h w token grid, T audio latents, C latent channels, L text tokens, D stream width,
G groups that share one sigma (1, F or T), S sinks.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.utils.checkpoint import checkpoint

from omniforcing_lib.blocks import AdaLN, Block, CaptionProjection, Condition, TimestepEmbedding
from omniforcing_lib.cache import KVCache, OpenBlock
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.flow import Skip
from omniforcing_lib.fused import functions, modulate
from omniforcing_lib.layout import AV, Clock
from omniforcing_lib.masks import Masks
from omniforcing_lib.rope import Ropes, tables

Sigma = AV[Tensor] | AV[float] | AV[tuple[float, ...]]
_USES = ("own", "cross", "gate", "caption", "prompt")
_MODULATORS = AV(
    "adaln_single av_ca_video_scale_shift_adaln_single av_ca_a2v_gate_adaln_single caption_projection "
    "prompt_adaln_single",
    "audio_adaln_single av_ca_audio_scale_shift_adaln_single av_ca_v2a_gate_adaln_single audio_caption_projection "
    "audio_prompt_adaln_single",
)
"""Names in the checkpoint of what embeds sigma and the text, in the order of `_USES`."""


class Transformer(nn.Module):
    """LTX-2's audio-video transformer: velocity from noisy latents, sigma and text.

    Args:
        config: dimensions and RoPE, as read from a checkpoint.
        clock: the two clocks; positions are physical time.

    Attributes:
        recompute: keep of every block its inputs alone where gradients flow, and run it again for its gradients. A
            cached pass reads its history again then, so the window must still hold it.
    """

    recompute: bool = False

    def __init__(self, config: ModelConfig, clock: Clock | None = None) -> None:
        super().__init__()
        video, audio = config.video_dim, config.audio_dim
        vectors = 9 if config.cross_attention_adaln else 6
        self.config, self.clock = config, clock or Clock()
        self.patchify_proj = nn.Linear(config.in_channels, video)
        self.audio_patchify_proj = nn.Linear(config.audio_in_channels, audio)
        self.adaln_single = AdaLN(video, vectors)
        self.audio_adaln_single = AdaLN(audio, vectors)
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
        if config.use_keyframes_abs_pos_embedding:
            self.keyframes_abs_pos_embedding = nn.Parameter(torch.zeros(1, video))
        self.scale_shift_table = nn.Parameter(torch.zeros(2, video))
        self.audio_scale_shift_table = nn.Parameter(torch.zeros(2, audio))
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.proj_out = nn.Linear(video, config.out_channels)
        self.audio_proj_out = nn.Linear(audio, config.audio_out_channels)
        if config.num_audio_sink_tokens:
            self.audio_sink_tokens = nn.Parameter(torch.empty(1, config.num_audio_sink_tokens, audio))
            if not self.audio_sink_tokens.is_meta:
                nn.init.normal_(self.audio_sink_tokens, std=0.02)

    def forward(
        self,
        x: AV[Tensor],
        sigma: Sigma,
        text: AV[Tensor],
        *,
        skip: Skip | None = None,
        masks: Masks | None = None,
        cache: KVCache | None = None,
        blocks: tuple[OpenBlock, ...] = (),
        sigma_key: Hashable | None = None,
    ) -> AV[Tensor]:
        """Predict the velocity eps - x0.

        Without `masks` and `cache` every token sees every token (the teacher; sinks are not used). With `masks` the
        clip is block-causal. With `cache` the latents are those of the `blocks`, which the cache has opened.

        Args:
            x: noisy latents.
            sigma: noise levels.
            text: context of the prompt.
            skip: what a guidance pass leaves out.
            masks: of a whole clip.
            cache: what came before.
            blocks: the open blocks that the latents are of, one after another.
            sigma_key: name of these noise levels, if the cache is to hold what follows from them and from the prompt
                alone; None computes it anew, and so does a pass over blocks that store nothing.

        Shapes: x video [B, F, h, w, C], audio [B, T, C]; sigma [B], or video [B, F] and audio [B, T], or one number
        for all latents or a tuple of one for each latent; text [B, L, caption channels] for each stream; to the
        shapes of x.

        Raises:
            ValueError: a cache without blocks or blocks without a cache, or another number of sinks than the model's.
        """
        if (cache is None) == bool(blocks):
            raise ValueError("a cached pass takes a cache and the blocks that it opened; give both or none")
        skip, grid = skip or Skip(), (x.video.shape[2], x.video.shape[3])
        # 1. Which latents these are, and how many sinks stand in front of the audio.
        sinks = self._sinks(masks, cache, blocks)
        if cache:
            latents = blocks[0].latents.map(lambda a, b: range(a.start, b.stop), blocks[-1].latents)
        else:
            latents = x.map(lambda part: range(part.shape[1]))
        # 2. What every layer needs of sigma, text, time and causality.
        condition = self._conditions(sigma, text, latents, grid, sinks, masks, cache, blocks, sigma_key)
        # 3. Latents become tokens.
        hidden = self._tokens(x, latents, sinks)
        # 4. The layers.
        for index, layer in enumerate(self.transformer_blocks):
            run = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False) if self.recompute else layer
            how = "branch" if skip.branch else "values"
            skipped: dict[str, Any] = {
                "skip_self": how * (index in skip.self_attention),
                "skip_cross": skip.cross_modal,
            }
            hidden = run(hidden, condition, cached=cache and cache.layers[index], **skipped)
        # 5. Tokens become velocities; the sinks are dropped.
        video, audio = hidden.video, hidden.audio[:, sinks:]
        at_video, at_audio = condition.map(lambda c: c.timestep.embedded)
        at_audio = at_audio[:, sinks:] if at_audio.shape[1] > 1 else at_audio
        video = self._project(video, at_video, self.scale_shift_table, self.proj_out)
        audio = self._project(audio, at_audio, self.audio_scale_shift_table, self.audio_proj_out)
        return AV(rearrange(video, "b (f h w) c -> b f h w c", h=grid[0], w=grid[1]), audio)

    def _conditions(
        self,
        sigma: Sigma,
        text: AV[Tensor],
        latents: AV[range],
        grid: tuple[int, int],
        sinks: int,
        masks: Masks | None,
        cache: KVCache | None,
        blocks: tuple[OpenBlock, ...],
        sigma_key: Hashable | None,
    ) -> AV[Condition]:
        """Gather what each stream needs in every layer, from the cache where it holds that; see `forward`."""
        # A pass that stores nothing holds nothing of sigma and of the text either.
        key = sigma_key if all(block.writes for block in blocks) else None
        embed = partial(self._timesteps, sigma, sinks, masks, blocks)
        timestep = cache.timesteps.get(key, embed) if cache else embed()
        cached_text = cache and cache.knows_text(key)
        contexts: AV[Tensor | None] = AV(None, None) if cached_text else text.map(self._project_text, self._modulators)
        ropes = self.rotations(latents, grid, sinks)
        sees = ((masks.video_self, masks.a2v), (masks.audio_self, masks.v2a)) if masks else ((None, None), (None, None))
        shared = {
            "blocks": blocks,
            "sigma_key": key,
            "prompt_key": cache and cache.prompt_key(key),
            "elementwise": functions(self.proj_out.weight.device),
        }
        parts = zip(timestep, contexts, ropes.own, ropes.cross, sees, strict=True)
        return AV(*(Condition(t, context, own, cross, *seen, **shared) for t, context, own, cross, seen in parts))

    def _tokens(self, x: AV[Tensor], latents: AV[range], sinks: int) -> AV[Tensor]:
        """Turn latents into tokens, sinks in front of the audio. Shapes: to AV([B, F h w, D], [B, S + T, D])."""
        x = x.map(lambda part: part.to(self.proj_out.weight.dtype))
        video = self.patchify_proj(rearrange(x.video, "b f h w c -> b (f h w) c"))
        audio = self.audio_patchify_proj(x.audio)
        if self.config.use_keyframes_abs_pos_embedding and latents.video.start == 0:
            # LTX-2.5 marks the one latent that holds a single frame, the first of the clip, wherever it is computed.
            size = x.video.shape[2] * x.video.shape[3]
            marked = video[:, :size] + self.keyframes_abs_pos_embedding.to(video.dtype)
            video = torch.cat([marked, video[:, size:]], dim=1)
        if sinks:
            audio = torch.cat([self.audio_sink_tokens.expand(len(audio), -1, -1), audio], dim=1)
        return AV(video, audio)

    def rotations(self, latents: AV[range], grid: tuple[int, int], sinks: int) -> Ropes:
        """Give the rotations of a stretch of latents; the `sinks` in front of the audio are not rotated."""
        return tables(self.config, self.clock, latents, grid, sinks, self.proj_out.weight.device)

    def _sinks(self, masks: Masks | None, cache: KVCache | None, blocks: tuple[OpenBlock, ...]) -> int:
        """Count the sinks in front of this call's audio, and check that masks and cache agree with the model."""
        layout = masks or (cache and cache.layout)
        if layout is None:
            return 0
        expected, given = self.config.num_audio_sink_tokens, layout.sinks
        if expected != given:
            raise ValueError(f"the model has {expected} audio sink tokens, the layout {given}; use the same number")
        return given if masks or blocks[0].k == 0 else 0

    def _timesteps(
        self, sigma: Sigma, sinks: int, masks: Masks | None, blocks: tuple[OpenBlock, ...]
    ) -> AV[TimestepEmbedding]:
        """Embed sigma for every use that layers make of it."""
        # One noise level for each sample or latent; the sinks take that of the first audio latent.
        sigma = sigma.map(partial(_per_sample, device=self.proj_out.weight.device))
        steps = sigma.map(lambda s: s * self.config.timestep_scale_multiplier)
        if sinks and steps.audio.shape[1] > 1:
            first = steps.audio[:, :1].expand(-1, sinks)
            steps = AV(steps.video, torch.cat([first, steps.audio], dim=1))
        # The text, and one stream for the other, go by one sigma for each sample; by blocks, for each block.
        if masks:
            spans = AV(masks.a2v, masks.v2a).map(lambda sees: [len(rows) for rows, _ in sees.by_block])
        else:
            spans = AV(*([len(block.latents[i]) for block in blocks] or [1] for i in (0, 1)))
            spans.audio[0] += sinks if blocks else 0
        sizes = steps.map(_block_sizes, spans)
        by_block = steps.map(_of_blocks, sizes)
        others: AV[Tensor] = AV(by_block.audio, by_block.video).map(_spread, sizes)
        whose = self.config.cross_modal_sigma
        across: AV[Any] = AV(others if whose == "all" else steps, steps if whose == "none" else others)
        ratio = self.config.av_ca_timestep_scale_multiplier / self.config.timestep_scale_multiplier

        def embed(
            modules: dict[str, Any], steps: Tensor, by_block: Tensor, cross: Tensor, gate: Tensor
        ) -> TimestepEmbedding:
            own, embedded = modules["own"](steps)
            cross, gate = modules["cross"](cross)[0], modules["gate"](gate * ratio)[0]
            levels = by_block if masks else by_block.amax(1, keepdim=True)
            prompt = modules["prompt"](levels)[0] if modules["prompt"] else None
            return TimestepEmbedding(own, cross, gate, embedded, prompt)

        return self._modulators.map(embed, steps, by_block, across.video, across.audio)

    @property
    def _modulators(self) -> AV[dict[str, Any]]:
        """Group the modules that embed sigma and text by stream, whatever their names in the checkpoint."""
        return _MODULATORS.map(
            lambda names: dict(zip(_USES, (getattr(self, name, None) for name in names.split()), strict=True))
        )

    def _project_text(self, text: Tensor, modules: dict[str, Any]) -> Tensor:
        text = text.to(self.proj_out.weight.dtype)
        return modules["caption"](text) if modules["caption"] else text

    def _project(self, x: Tensor, embedded: Tensor, table: Tensor, out: nn.Linear) -> Tensor:
        shift, scale = (table + embedded[:, :, None]).unbind(2)
        return out(modulate(layer_norm(x, x.shape[-1:], eps=self.config.norm_eps), 1 + scale, shift))


def _block_sizes(steps: Tensor, spans: list[int]) -> tuple[int, ...]:
    """Count the groups of sigma in each block, from any measure of the blocks' lengths. Shapes: steps [B, G]."""
    groups = steps.shape[1]
    return (1,) if groups == 1 else tuple(n * groups // sum(spans) for n in spans)


def _of_blocks(steps: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Give each block's level. Shapes: steps [B, G] to [B, K]."""
    return torch.cat([part.amax(1, keepdim=True) for part in steps.split(sizes, 1)], dim=1)


def _spread(by_block: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Give each latent its block's level. Shapes: [B, K] to [B, G], or as it is where it is one for all."""
    if by_block.shape[1] == 1:
        return by_block
    return torch.cat([part.expand(-1, n) for part, n in zip(by_block.split(1, 1), sizes, strict=True)], dim=1)


def _per_sample(sigma: Tensor | float | tuple[float, ...], device: torch.device) -> Tensor:
    """Give every sample its noise levels. Shapes: to [B, G], B and G 1 where one number is for all."""
    if isinstance(sigma, Tensor):
        return sigma.to(device).reshape(len(sigma), -1)
    if isinstance(sigma, tuple):
        return torch.tensor([sigma], device=device)
    # filled on the device: a copy from the host could not be recorded in a CUDA graph
    return torch.full((1, 1), sigma, device=device)


def empty(config: ModelConfig, clock: Clock | None = None) -> Transformer:
    """Build a model on the meta device, which has names and shapes but no memory."""
    with torch.device("meta"):
        return Transformer(config, clock)


def fresh_sinks(config: ModelConfig) -> Tensor:
    """Draw sink tokens for a model that has none yet, the same ones every time. Shapes: float32 [1, sinks, width]."""
    shape = (1, config.num_audio_sink_tokens, config.audio_dim)
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def initialise(model: Transformer, generator: torch.Generator) -> Transformer:
    """Draw weights for training from nothing: residual branches and output start at zero (adaLN-zero)."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        elif parameter.dim() < 2 or name.endswith(("table", "abs_pos_embedding")) or _starts_at_zero(name):
            nn.init.zeros_(parameter)
        elif name == "audio_sink_tokens":
            nn.init.normal_(parameter, std=0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(parameter, generator=generator)
    return model


def _starts_at_zero(name: str) -> bool:
    output = name in ("proj_out.weight", "audio_proj_out.weight")
    return output or name.endswith("adaln_single.linear.weight") or "attn2.to_out" in name
