"""Stream the shipped student for a long time: memory and handles stay flat, both clocks stay exact, prompts change.

python tests/reliability/soak_stream.py --minutes 30 [--threads 1] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
import time
from fractions import Fraction

import numpy as np
import torch
from tqdm import tqdm
from watch import Watch, write

from omniforcing_lib import stream
from omniforcing_lib.bounce import codecs, world
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.layout import Clock
from omniforcing_lib.ltx2 import checkpoints

PROMPT_EVERY = 60  # blocks


def soak(minutes: float, seed: int, every: float) -> dict[str, object]:
    """Run the stream as fast as it goes and compare every chunk with what integer arithmetic says."""
    clock, prompts = Clock(), world.prompts()
    causal = checkpoints.read("student").causal
    live = stream.Streamer(checkpoints.load("student"), causal, codecs.shipped_codec(), TinyText(), prompts[0], seed)
    blocks, frames, samples, wrong, times = 0, 0, 0, [], []
    deadline = time.monotonic() + 60 * minutes
    with Watch(every) as watch, live, tqdm(total=round(minutes * 60), unit="s", desc="stream", mininterval=10) as bar:
        while time.monotonic() < deadline:
            if blocks % PROMPT_EVERY == PROMPT_EVERY - 1:
                live.set_prompt(prompts[blocks // PROMPT_EVERY % len(prompts)])
            began = time.perf_counter()
            chunk = live.step()
            times.append(time.perf_counter() - began)
            frames, samples = frames + len(chunk.frames), samples + len(chunk.samples)
            wrong += [blocks] * (not fits(chunk, clock, causal.layout.block(blocks), frames, samples))
            blocks += 1
            bar.update(round(time.monotonic() - watch.began) - bar.n)
    fifth = max(1, len(times) // 5)
    found = watch.summary()
    return {
        "ok": not wrong and found["rss_flat"] and found["open_files"][1] <= found["open_files"][0],
        "blocks": blocks,
        "stream_s": float(Fraction(frames, clock.fps)),
        "frames": frames,
        "samples": samples,
        "blocks_off_the_clock": wrong[:20],
        "frames_a_second": round(frames / sum(times), 1),
        "block_ms_first_fifth": round(1e3 * float(np.median(times[:fifth])), 1),
        "block_ms_last_fifth": round(1e3 * float(np.median(times[-fifth:])), 1),
        "prompts": blocks // PROMPT_EVERY + 1,
        "seed": seed,
        **found,
    }


def fits(chunk: stream.Chunk, clock: Clock, block, frames: int, samples: int) -> bool:
    """Tell whether a chunk starts and ends where its block does, counts included, and holds finite sound."""
    return (
        chunk.start_s == float(clock.seconds(block).video[0])
        and (frames, samples) == (clock.frames(block.video).stop, clock.samples(block.audio).stop)
        and (frames - 1) * clock.sample_rate == (samples - clock.hop) * clock.fps
        and bool(np.isfinite(chunk.samples).all())
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two samples of memory")
    parser.add_argument("--out", default="", help="default reports/reliability/soak_stream.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sys.exit(not write("soak_stream", options.out, soak(options.minutes, options.seed, options.every)))
