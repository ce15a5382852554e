"""Make exposure bias visible: the same student judged on a true past and on its own (paper Sec. 3.3).

A causal student is trained on pasts that somebody else made and used on pasts that it made itself. In the world a ball
has no choice: its last second says where it goes next. So every block can be judged by the world's law, carried on
from the block before, whoever made that one.

Shapes: n clips, K blocks, F frames.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from omniforcing_lib.bounce import evaluate, variety
from omniforcing_lib.bounce.codecs import TinyCodec
from omniforcing_lib.bounce.evaluate import Estimate, Reading, Tally
from omniforcing_lib.bounce.evaluate import drift as drift
from omniforcing_lib.bounce.sampling import decoded as decoded
from omniforcing_lib.bounce.sampling import roll as roll
from omniforcing_lib.bounce.sampling import true_clips as true_clips
from omniforcing_lib.interfaces import DecodeState
from omniforcing_lib.layout import AV, BlockLayout, Clock
from omniforcing_lib.stream import to_clips

FIRST = 2
"""The first block whose past is a whole second, long enough to tell where the ball goes."""

QUIET = 1e-6
"""Power below which a change of level is not heard."""


def ahead(seen: np.ndarray, frames: int) -> np.ndarray:
    """Carry the ball on by the world's law: constant speed, reflected at the walls.

    Each axis is the triangle wave that fits `seen` best, see `variety.fit`.
    Shapes: [F, 2] pixels, NaN where no ball was found -> [frames, 2].
    """
    fits = [variety.fit(axis) for axis in seen.T]
    steps = len(seen) + np.arange(frames)
    return np.stack([variety.folded(phase + speed * steps) for phase, speed in fits], axis=1)


def windows(
    codec: TinyCodec, layout: BlockLayout, out: AV[Tensor], history: AV[Tensor] | None = None
) -> Iterator[list[AV[np.ndarray]]]:
    """Yield, for every block from `FIRST` on, clips of that block behind the block before it, from `history`.

    Both streams start together, at the first frame of the block before.
    Shapes: AV([n, F, h, w, C], [n, T, C]) -> n clips of two blocks.
    """
    state, before = DecodeState(), []
    for k, block in enumerate(layout.blocks(out.video.shape[1])):
        new = _cut(codec, out, block, copy.deepcopy(state) if history else state)
        if k >= FIRST:
            yield [_behind(a, b, codec.clock, layout.block(k - 1)) for a, b in zip(before, new, strict=True)]
        before = _cut(codec, history, block, state) if history else new


@torch.no_grad()
def _cut(codec: TinyCodec, latents: AV[Tensor], block: AV[range], state: DecodeState) -> list[AV[np.ndarray]]:
    piece = latents.map(lambda x, span: x[:, span.start : span.stop], block)
    return to_clips(codec.decode(piece, state))


def _behind(before: AV[np.ndarray], new: AV[np.ndarray], clock: Clock, block: AV[range]) -> AV[np.ndarray]:
    starts = clock.seconds(block).map(lambda span: span[0])
    lead = round((starts.video - starts.audio) * clock.sample_rate)
    joined = before.map(lambda a, b: np.concatenate([a, b]), new)
    return AV(joined.video, joined.audio[lead:])


def by_block(
    codec: TinyCodec, layout: BlockLayout, out: AV[Tensor], history: AV[Tensor] | None = None
) -> AV[np.ndarray]:
    """Judge every block by the block before it: how far the ball leaves its way, how late sound meets sight.

    * video: mean distance, in pixels, between the ball and where its last second would have taken it.
    * audio: mean delay, in ms, between an impact seen and its onset; one without the other counts as the tolerance.

    NaN where there was no ball, or no event.
    Shapes: AV([n, F, h, w, C], [n, T, C]) -> AV([n, K - FIRST], [n, K - FIRST]).
    """
    count = layout.count(out.video.shape[1]) - FIRST
    bar = tqdm(windows(codec, layout, out, history), desc="judging", total=count, unit="block", delay=2, leave=False)
    errors = [[judged(clip, codec.clock) for clip in clips] for clips in bar]
    return AV(*np.moveaxis(np.array(errors, dtype=float), (0, 1, 2), (2, 1, 0)))


def judged(clip: AV[np.ndarray], clock: Clock) -> AV[float]:
    """Judge what comes after the first second of a clip by that second, see `by_block`."""
    reading = evaluate.read(clip, clock)
    centre = reading.track.centre
    off = np.linalg.norm(centre[clock.fps :] - ahead(centre[: clock.fps], len(centre) - clock.fps), axis=1)
    return AV(float(np.nanmean(off)) if np.isfinite(off).any() else math.nan, delay_ms(reading, 1.0))


def delay_ms(reading: Reading, start_s: float) -> float:
    """Average the delay between impacts seen and onsets heard from a time on; a lonely one counts as the tolerance."""
    pairs = [abs(p.heard.time_s - p.seen.time_s) for p in reading.pairs if p.seen.time_s >= start_s]
    lonely = sum(e.time_s >= start_s for e in (*reading.seen, *reading.heard))
    delays = [*pairs, *[evaluate.TOLERANCE_S] * lonely]
    return 1000 * float(np.mean(delays)) if delays else math.nan


def sums(errors: np.ndarray) -> np.ndarray:
    """Add errors up clip by clip, NaN left out: sum and count. Shapes: [n, K] to [n, 2]."""
    return np.stack([np.nansum(errors, axis=1), np.isfinite(errors).sum(axis=1)], axis=1)


def pooled(errors: np.ndarray) -> Estimate:
    """Average errors over clips and blocks, with a 95 % bootstrap interval over clips. Shapes: [n, K]."""
    tallies = [{"error": (part, whole)} for part, whole in sums(errors).tolist()]
    return evaluate.estimates(tallies)["error"]


def gap(a: np.ndarray, b: np.ndarray, *, paired: bool = False, draws: int = 2000, seed: int = 0) -> Estimate:
    """Subtract the pooled ratio of b from that of a, with a 95 % bootstrap interval over the clips of both.

    Clips that are `paired`, of one prompt and noise, are drawn together.

    Shapes: [n, 2] and [m, 2], part and whole of each clip, as `sums` or one measure of `evaluate.tally` gives them.
    """
    rng = np.random.default_rng(seed)
    picks = [rng.integers(len(x), size=(draws, len(x))) for x in (a, b)]
    drawn = [_ratio(x[pick]) for x, pick in zip((a, b), [picks[0]] * 2 if paired else picks, strict=True)]
    return Estimate.of(_ratio(a) - _ratio(b), drawn[0] - drawn[1])


def _ratio(counts: np.ndarray) -> np.ndarray:
    """Pool parts and wholes of clips; NaN where nothing counts. Shapes: [..., n, 2] to [...]."""
    part, whole = counts.sum(-2)[..., 0], counts.sum(-2)[..., 1]
    return part / np.where(whole > 0, whole, np.nan)


def kept(first: Sequence[Tally], last: Sequence[Tally], *, draws: int = 1000, seed: int = 0) -> dict[str, Estimate]:
    """Divide the pooled measures of one span by another's, clip by clip: 1 where nothing is lost; 95 % intervals.

    Loudness in dB and signed delays are subtracted instead: 0. A clip is drawn with both of its spans.
    """
    picks = np.random.default_rng(seed).integers(len(first), size=(draws, len(first)))
    result = {}
    for name in first[0]:
        counts = (np.array([tally[name] for tally in span], dtype=float) for span in (first, last))
        (a, drawn_a), (b, drawn_b) = ((_ratio(x), _ratio(x[picks])) for x in counts)
        with np.errstate(invalid="ignore", divide="ignore"):
            apart = name in ("loudness_db", "offset_ms")
            change, drawn = (b - a, drawn_b - drawn_a) if apart else (b / a, drawn_b / drawn_a)
        result[name] = Estimate.of(change, drawn)
    return result


def seam(
    readings: Sequence[Reading], layout: BlockLayout, of: str = "ball", start_s: float = 0.0, end_s: float = math.inf
) -> float:
    """Compare steps across block edges with steps inside blocks, within a span: medians, 1 is no seam.

    A step is, from frame to frame, the way of the ball (`ball`, turns left out) or the change of a pixel (`picture`);
    or, from mel frame to mel frame, the change of level in dB (`sound`).
    """
    across, inside = [], []
    for reading in readings:
        clock, steps = reading.clock, STEPS[of](reading)
        blocks = layout.blocks(clock.video_latents_of(len(reading.clip.video)))[1:]
        starts = [(clock.mels(b.audio) if of == "sound" else clock.frames(b.video)).start for b in blocks]
        seconds = (np.arange(len(steps)) + 1) / (clock.mel_rate if of == "sound" else clock.fps)
        edges, within = np.zeros(len(steps), bool), (start_s <= seconds) & (seconds < end_s)
        edges[[start - 1 for start in starts]] = True
        across.append(steps[edges & within])
        inside.append(steps[~edges & within])
    return float(np.nanmedian(np.concatenate(across)) / np.nanmedian(np.concatenate(inside)))


def _picture_steps(reading: Reading) -> np.ndarray:
    return np.array([np.abs(b.astype(np.int16) - a).mean() for a, b in pairwise(reading.clip.video)])


def _sound_steps(reading: Reading) -> np.ndarray:
    hop, samples = reading.clock.hop, reading.clip.audio
    power = np.square(samples[: len(samples) // hop * hop].reshape(-1, hop), dtype=np.float64).mean(1)
    return np.abs(np.diff(10 * np.log10(power + QUIET)))


STEPS = {"ball": evaluate.speeds, "picture": _picture_steps, "sound": _sound_steps}
