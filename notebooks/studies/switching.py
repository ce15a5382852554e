"""What a change of prompt does to a stream: when it shows, and whether its edge shows too.

Shapes: K chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from tqdm.auto import tqdm

from omniforcing_lib.bounce import detect
from omniforcing_lib.layout import AV, Clock
from omniforcing_lib.stream import Chunk, Streamer
from studies import bench, exposure_bias


def switched(streamer: Streamer, prompt: str, at: int, blocks: int, *, recache: bool = False) -> list[Chunk]:
    """Run a new stream for `blocks` blocks and ask for another prompt before block `at`."""
    chunks = [streamer.step() for _ in range(at)]
    streamer.set_prompt(prompt, recache=recache)
    return chunks + [streamer.step() for _ in range(blocks - at)]


def all_switched(
    streams: Sequence[tuple[Streamer, str]], at: int, blocks: int, *, recache: bool = False
) -> list[list[Chunk]]:
    """Switch every stream to its other prompt, see `switched`."""
    bar = tqdm(streams, desc="switching", unit="stream", delay=2, leave=False)
    return [switched(streamer, prompt, at, blocks, recache=recache) for streamer, prompt in bar]


def prompt_pairs(names: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Pair prompts to switch from one to the other; those of the world share neither colour nor timbre."""
    return [(names[i % len(names)], names[(i + 7) % len(names)]) for i in range(count)]


def seams(chunks: Sequence[Chunk], clock: Clock | None = None) -> AV[np.ndarray]:
    """Measure every block edge that has a second of stream behind it, from block 2 on.

    * video: pixels between the ball's first place after the edge and where its last second would have taken it.
    * audio: the bend of the waveform across the edge, its largest second difference; full scale is 1.

    Shapes: K chunks to AV([K - 2], [K - 2]).
    """
    clock, clip = clock or Clock(), bench.joined(chunks)
    edges = AV(
        *(np.cumsum([len(part) for part in parts])[1:-1] for parts in zip(*(c[:2] for c in chunks), strict=True))
    )
    centre, bend = detect.track(clip.video).centre, np.abs(np.diff(clip.audio, n=2))
    off = [np.linalg.norm(exposure_bias.ahead(centre[e - clock.fps : e], 1)[0] - centre[e]) for e in edges.video]
    return AV(np.array(off), np.array([bend[e - 2 : e].max() for e in edges.audio]))


def seam_rows(trials: Mapping[str, Sequence[Sequence[Chunk]]], at: int) -> list[dict[str, object]]:
    """Table the edges at which the prompt changed, before block `at`, beside all other edges: median and 95 %."""
    rows = []
    for name, runs in trials.items():
        numbers = AV(*zip(*map(seams, runs), strict=True)).map(np.stack)
        for edge, of in (
            ("prompt changes", lambda x: x[:, at - 2]),
            ("other edges", lambda x: np.delete(x, at - 2, 1)),
        ):
            pixels, bends = (np.nanpercentile(of(x), (50, 95)) for x in numbers)
            row = {"stream": name, "edge": edge, "ball off its way, px": f"{pixels[0]:.2f} (95 %: {pixels[1]:.2f})"}
            rows.append(row | {"bend of the sound": f"{bends[0]:.4f} (95 %: {bends[1]:.4f})"})
    return rows
