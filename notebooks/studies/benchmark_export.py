"""Write generated clips where evaluation tools look for them, with the protocol they were made under.

VBench reads `{prompt}-{index}.mp4`, five clips per prompt, the prompt being its own short one also where a longer one
was generated from. JavisBench's table goes by row: one clip per row, here `sample_0000.mp4` with its sound beside it as
`sample_0000.wav`; neither tool could be run here, and JavisBench's names could not be checked, so that a `pattern` can
be given instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from omniforcing_lib import files, media
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.interfaces import Codec
from omniforcing_lib.layout import AV, Clock

LONGEST = 255  # bytes of a file's name
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Tool:
    """Say what an evaluation tool wants.

    Attributes:
        name: of the tool.
        pattern: of a file without its ending; may use {prompt}, {sample} (of a prompt) and {number} (of all clips).
        samples: clips per prompt.
        sound: whether a wav file stands beside each clip.
    """

    name: str
    pattern: str
    samples: int
    sound: bool


TOOLS = {
    "vbench": Tool("vbench", "{prompt}-{sample}", 5, sound=False),
    "javisbench": Tool("javisbench", "sample_{number:04d}", 1, sound=True),
}


class Wanted(NamedTuple):
    """One clip: its file's name without ending, the tool's prompt, what it is generated from, and its seed."""

    name: str
    tool_prompt: str
    prompt: str
    seed: int


def tool_of(name: str, pattern: str = "", samples: int = 0) -> Tool:
    """Find a tool by name, with another pattern or number of clips per prompt where they are given."""
    if name not in TOOLS:
        raise ValueError(f"unknown tool {name!r}; choose one of {', '.join(TOOLS)}")
    tool = TOOLS[name]
    return replace(tool, pattern=pattern or tool.pattern, samples=samples or tool.samples)


def read_prompts(path: str | Path) -> dict[str, str]:
    """Read a text file, one prompt per line, or two with a tab between: the tool's own, and what to generate from."""
    pairs = [line.partition("\t") for line in files.read_lines(path)]
    prompts = {short.strip(): (longer or short).strip() for short, _, longer in pairs}
    if len(prompts) < len(pairs):
        lines = f"{len(pairs)} lines with {len(prompts)} different ones"
        raise ValueError(f"{path}: expected one prompt per line, each once, found {lines}")
    return prompts


def clips_of(tool: Tool, prompts: Mapping[str, str], seed: int = 0) -> list[Wanted]:
    """List the clips that a tool wants, each with a seed of its own from `seed` on.

    Raises:
        ValueError: a name that is no file's name, or two clips of one name.
    """
    clips = []
    for short, prompt in prompts.items():
        for sample in range(tool.samples):
            name = tool.pattern.format(prompt=short, sample=sample, number=len(clips))
            if Path(name).name != name or len(f".{name}.mp4.0000000.part".encode()) > LONGEST:
                raise ValueError(f"{name!r} cannot name a file: it has a '/' or too many bytes; shorten the prompt")
            clips.append(Wanted(name, short, prompt, seed + len(clips)))
    if len({clip.name for clip in clips}) < len(clips):
        raise ValueError(
            f"pattern {tool.pattern!r} gives two clips one name; use {{number}}, or {{prompt}} and {{sample}}"
        )
    return clips


def resolution(codec: Codec, config: ModelConfig) -> list[int]:
    """Height and width of a codec's frames, by decoding one latent."""
    shapes = AV((1, 1, *codec.grid, config.in_channels), (1, 1, config.audio_in_channels))
    return list(codec.decode(shapes.map(torch.zeros)).video.shape[2:4])


def write(
    make: Callable[[str, int], AV[np.ndarray]],
    prompts: Mapping[str, str],
    tool: Tool,
    out: str | Path,
    *,
    clock: Clock,
    seed: int = 0,
    protocol: Mapping[str, object],
) -> Path:
    """Make and write all clips; one that is there already, under the same protocol, is not made again.

    Args:
        make: gives a clip for a prompt and a seed.
        prompts: the tool's own prompt to what is generated from (see `read_prompts`).
        tool: whose names are used.
        out: folder of clips and manifest.
        clock: of the clips.
        seed: of the first clip; each has its own.
        protocol: what else made the clips: checkpoint, seconds, frame size, steps, guidance.

    Returns the manifest, written before the first clip.

    Raises:
        ValueError: clips of another protocol are there.
    """
    out, wanted = Path(out), clips_of(tool, prompts, seed)
    record = {
        "tool": tool.name,
        "protocol": dict(protocol) | {"fps": clock.fps, "sample_rate": clock.sample_rate, "seed": seed},
        "clips": [
            {"file": f"{c.name}.mp4", "tool_prompt": c.tool_prompt, "prompt": c.prompt, "seed": c.seed} for c in wanted
        ],
    }
    manifest = out / MANIFEST
    if manifest.exists() and json.loads(manifest.read_text(encoding="utf-8")) != json.loads(json.dumps(record)):
        raise ValueError(f"{manifest} describes clips of another protocol; name another folder")
    files.write_json(manifest, record)
    for clip in wanted:
        path = out / f"{clip.name}.mp4"
        if not path.exists():
            streams = make(clip.prompt, clip.seed)
            if tool.sound:
                media.write_wav(path.with_suffix(".wav"), streams.audio, clock.sample_rate)
            media.write_clip(path, streams, clock, scale=1)
    return manifest
