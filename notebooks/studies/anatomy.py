"""Take a checkpoint and its codec apart: what the tensors are for, what a latent holds, what the settings are worth.

Notebook 01 asks; nothing in the method needs these answers.

Shapes: N clips, F video and T audio latents.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from omniforcing_lib.attention import Attention
from omniforcing_lib.bounce import detect, evaluate
from omniforcing_lib.bounce.codecs import TinyCodec
from omniforcing_lib.bounce.sampling import encoded as encoded
from omniforcing_lib.bounce.sampling import held_out as held_out
from omniforcing_lib.bounce.sampling import round_trip as round_trip
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.flow import Model, noise_like, noised
from omniforcing_lib.layout import AV, Clock
from omniforcing_lib.ltx2.formats import RELEASED_CODE
from omniforcing_lib.rope import Rotation, rotate
from omniforcing_lib.transformer import Transformer, empty
from studies import rows
from studies.probes import steps

CLOCK = Clock()
PARTS = {
    "cross-modal": ("to_video_attn", "to_audio_attn", "av_ca", "a2v_ca"),
    "sinks": ("sink_tokens",),
    "text": ("attn2", "caption_projection", "prompt"),
    "self-attention": ("attn1",),
    "feed-forward": ("ff.",),
    "modulation by sigma": ("adaln", "scale_shift_table"),
    "in and out": ("patchify_proj", "proj_out", "keyframes"),
}
"""What a tensor is for, by words in its name; the first part that fits takes it."""

SETTINGS = {
    "as the file says": {},
    **{f"{name} = {value}": {name: value} for name, value in RELEASED_CODE.items()},
    "all three, the released code": RELEASED_CODE,
}
SIGMAS = (0.2, 0.4, 0.6, 0.8)


def purpose(name: str) -> tuple[str, str]:
    """Say which stream a transformer tensor serves and what it is for."""
    part = next((part for part, words in PARTS.items() if any(word in name for word in words)), None)
    if part is None:
        raise ValueError(f"{name} belongs to no part; add it to PARTS")
    return ("both" if part == "cross-modal" else "audio" if "audio" in name else "video"), part


def parameters(shapes: Mapping[str, Sequence[int]]) -> Counter[tuple[str, str]]:
    """Count parameters by (stream, part); `both` is cross-modal attention and its modulation."""
    counts: Counter[tuple[str, str]] = Counter()
    for name, shape in shapes.items():
        counts[purpose(name)] += math.prod(shape)
    return counts


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Give the names and shapes of a model's tensors; on the meta device, nothing is allocated."""
    return {name: tuple(tensor.shape) for name, tensor in empty(config).state_dict().items()}


def giant(config: ModelConfig) -> ModelConfig:
    """Give the 19B with the features of a file's generation: gates, text modulation, where captions are projected."""
    features = ("apply_gated_attention", "cross_attention_adaln", "use_prompt_adaln_single")
    features += ("caption_proj_before_connector", "ff_bias", "audio_ff_bias", "use_keyframes_abs_pos_embedding")
    return replace(ModelConfig(), **{name: getattr(config, name) for name in features})


def patterns(names: Iterable[str]) -> set[str]:
    """Replace the numbers of layers in tensor names, to compare models of different depths."""
    return {re.sub(r"transformer_blocks\.\d+", "transformer_blocks.N", name) for name in names}


def stream_shares(counts: Mapping[tuple[str, str], int]) -> dict[str, float]:
    """Give the share of all parameters that serves each stream, and both."""
    total = sum(counts.values())
    return {
        stream: sum(n for (owner, _), n in counts.items() if owner == stream) / total
        for stream in ("video", "audio", "both")
    }


def parameter_rows(
    counts: Mapping[tuple[str, str], int], reference: Mapping[tuple[str, str], int]
) -> list[dict[str, object]]:
    """Table parameters by stream and part, beside the same parts' shares of a reference model."""
    totals = sum(counts.values()), sum(reference.values())
    order = sorted(counts, key=lambda key: (("video", "audio", "both").index(key[0]), -counts[key]))
    return [
        {
            "stream": stream,
            "part": part,
            "parameters": f"{counts[stream, part]:,}",
            "share here": f"{counts[stream, part] / totals[0]:.1%}",
            "share of the 19B": f"{reference[stream, part] / totals[1]:.1%}",
        }
        for stream, part in order
    ]


def settings_rows(config: ModelConfig, names: Sequence[str]) -> list[dict[str, object]]:
    """Table fields of a config beside those of the 19B model (specification 1.2)."""
    reference = ModelConfig()
    return [{"field": n, "this file": getattr(config, n), "the 19B": getattr(reference, n)} for n in names]


@torch.no_grad()
def decoded_by(codec: TinyCodec, latents: AV[Tensor], stream: int, index: int) -> range:
    """Find which frames (stream 0) or samples (1) one latent decides: change it, decode, see what moves.

    Shapes: latents AV([1, F, h, w, C], [1, T, C]).
    """
    changed = latents.map(Tensor.clone)
    changed[stream][:, index] += 1
    before, after = codec.decode(latents)[stream], codec.decode(changed)[stream]
    moved = (before != after)[0].flatten(1).any(1) if stream == 0 else (before != after)[0]
    places = moved.nonzero().flatten().tolist()
    return range(places[0], places[-1] + 1)


def latent_rows(moved: Mapping[int, AV[range]], clock: Clock = CLOCK) -> list[dict[str, object]]:
    """Table what single latents were seen to decide beside what the clock says of them."""
    return [
        {
            "latent": i,
            "frames moved": steps(spans.video),
            "its frames by the clock": steps(clock.frames(range(i, i + 1))),
        }
        | {"samples moved": steps(spans.audio), "its samples by the clock": steps(clock.samples(range(i, i + 1)))}
        for i, spans in moved.items()
    ]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Compare frames: peak signal-to-noise ratio in dB, infinite for equal ones.

    Shapes: two uint8 [F, H, W, 3].
    """
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else math.inf


class Shift(NamedTuple):
    """Compare the onsets of sounds before and after something: how many come back, how far they moved.

    Attributes:
        onsets: number before.
        moves_ms: of those that have a partner after.
    """

    onsets: int
    moves_ms: np.ndarray

    @property
    def kept(self) -> float:
        """Share of the onsets that are heard again."""
        return len(self.moves_ms) / self.onsets if self.onsets else math.nan


def onset_shift(before: Sequence[AV[np.ndarray]], after: Sequence[AV[np.ndarray]]) -> Shift:
    """Listen for the same onsets in two versions of some clips and measure how far apart they lie.

    Shapes: clips AV(_, float [N]).
    """
    count, moves = 0, []
    for one, other in zip(before, after, strict=True):
        first, second = (detect.heard_onsets(clip.audio) for clip in (one, other))
        count += len(first)
        moves += [1000 * abs(pair.seen.time_s - pair.heard.time_s) for pair in evaluate.match(first, second)]
    return Shift(count, np.array(moves))


def score_rows(table: evaluate.Table, measures: Sequence[str]) -> list[dict[str, object]]:
    """Turn a table of scores into rows, a measure each, mean and 95 % interval."""
    return [{"measure": m} | {system: str(row[m]) for system, row in table.rows.items()} for m in measures]


@torch.no_grad()
def velocity_loss(
    model: Model, latents: AV[Tensor], prompts: Sequence[str], *, seed: int = 0, sigmas: Sequence[float] = SIGMAS
) -> AV[Tensor]:
    """Measure how far a model's velocity is from eps - x0, clip by clip, on average over noise levels.

    Shapes: latents AV([N, F, h, w, C], [N, T, C]) to AV [N].
    """
    generator, device = torch.Generator().manual_seed(seed), latents.video.device
    text, losses = TinyText().encode(prompts, device), []
    for sigma in sigmas:
        level = torch.full((len(prompts),), sigma, device=device)
        eps = noise_like(latents, generator)
        velocity = model(latents.map(noised, eps, AV(level, level)), AV(level, level), text)
        losses.append(velocity.map(lambda v, x0, e: (v - (e - x0)).square().flatten(1).mean(1), latents, eps))
    return AV(*(torch.stack(stream).mean(0) for stream in zip(*losses, strict=True)))


class Astray(NamedTuple):
    """What other settings make of the same weights, by stream.

    Attributes:
        logits: correlation of self-attention's logits under both rotations of the same queries and keys.
        output: distance of the velocities, as a share of the right one's length.
    """

    logits: AV[float]
    output: AV[float]


@torch.no_grad()
def astray(
    right: Transformer, wrong: Transformer, latents: AV[Tensor], text: AV[Tensor], *, sigma: float = 0.5, seed: int = 0
) -> Astray:
    """Compare two models of the same weights on noised latents: what they attend to, and what comes out.

    Shapes: latents AV([N, F, h, w, C], [N, T, C]), text AV [N, L, C].
    """
    level = torch.full((len(latents.video),), sigma, device=latents.video.device)
    x = latents.map(noised, noise_like(latents, torch.Generator().manual_seed(seed)), AV(level, level))
    spans, grid = latents.map(lambda part: range(part.shape[1])), tuple(x.video.shape[2:4])
    ropes = [(model.rotations(spans, grid, 0).own, model.config.rope_type) for model in (right, wrong)]
    with rows.watched(right, "attn1") as video, rows.watched(right) as audio:
        true = right(x, AV(level, level), text)

    def correlation(calls: list[rows.Seen], stream: int) -> float:
        parts = [[_some_logits(c.attention, c.x[:1], tables[stream], kind) for tables, kind in ropes] for c in calls]
        return sum(torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in parts) / len(parts)

    apart = true.map(lambda a, b: ((a - b).norm() / a.norm()).item(), wrong(x, AV(level, level), text))
    return Astray(AV(video, audio).map(correlation, AV(0, 1)), apart)


def _some_logits(attention: Attention, x: Tensor, by: Rotation, rope_type: str, most: int = 128) -> Tensor:
    """Give logits of every head between at most so many tokens, spread evenly. Shapes: x [1, T, D] to [H n n]."""
    some = slice(None, None, -(-x.shape[1] // most))
    x, by = x[:, some], Rotation(*(table[:, some] for table in by))
    pair = (attention.q_norm(attention.to_q(x)), attention.k_norm(attention.to_k(x)))
    q, k = (rotate(t.unflatten(-1, (attention.heads, -1)).transpose(1, 2), by, rope_type) for t in pair)
    return (q @ k.transpose(-1, -2)).flatten().float()


def silent(x: AV[Tensor], sigma: AV[Tensor], text: AV[Tensor]) -> AV[Tensor]:
    """Predict no velocity at all: what a model that knows nothing may as well say."""
    return x.map(torch.zeros_like)


def mean_interval(values: Tensor) -> evaluate.Estimate:
    """Average over clips, with a normal 95 % interval.

    Shapes: [N].
    """
    half = 1.96 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return evaluate.Estimate(values.mean().item(), values.mean().item() - half, values.mean().item() + half)
