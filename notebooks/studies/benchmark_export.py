"""Write generated clips where evaluation tools look for them, with the protocol they were made under.

VBench reads `{prompt}-{index}.mp4`, five clips per prompt, the prompt being its own short one also where a longer one
was generated from. JavisBench's table goes by row: one clip per row, here `sample_0000.mp4` with its sound beside it as
`sample_0000.wav`. StreamAVBench reads a `manifest.jsonl` beside one clip a case (`P-0001.mp4`, of 180 s), with the time
that each took. No tool could be run here, and JavisBench's names could not be checked, so that a `pattern` can be given
instead.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from omniforcing_lib import files, media
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.interfaces import Codec
from omniforcing_lib.layout import AV, Clock

LONGEST = 255  # bytes of a file's name
MANIFEST, RUNTIMES = "manifest.json", "manifest.jsonl"


@dataclass(frozen=True)
class Tool:
    """Say what an evaluation tool wants.

    Attributes:
        name: of the tool.
        pattern: of a file without its ending; may use {prompt}, {sample} (of a prompt) and {number} (of all clips).
        samples: clips per prompt.
        sound: whether a wav file stands beside each clip.
        case: how it names a prompt, where that is not the prompt; it then wants to know what each clip took.
    """

    name: str
    pattern: str
    samples: int
    sound: bool
    case: str = ""


TOOLS = {
    "vbench": Tool("vbench", "{prompt}-{sample}", 5, sound=False),
    "javisbench": Tool("javisbench", "sample_{number:04d}", 1, sound=True),
    "streamavbench": Tool("streamavbench", "{prompt}", 1, sound=False, case=r"P-\d+"),
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
        ValueError: a name that is no file's name or no case of the tool, or two clips of one name.
    """
    clips = []
    for short, prompt in prompts.items():
        if tool.case and not re.fullmatch(tool.case, short):
            form = f"P-0001, a tab, its prompt (a case I-0001 changes its prompt on the way); found {short[:40]!r}"
            raise ValueError(f"{tool.name}: a line is a case of the progressive track, {form}")
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
    shapes = config.latent_shapes(AV(1, 1), codec.grid)
    return list(codec.decode(shapes.map(lambda shape: torch.zeros(1, *shape))).video.shape[2:4])


@dataclass
class Runtime:
    """What making one clip takes, from the request to the written file.

    Attributes:
        began: when it was asked for, by the clock of `time.perf_counter`.
        made: frames and samples so far.
        first_s: seconds until there was some of both.
    """

    began: float = field(default_factory=time.perf_counter)
    made: AV[int] = field(default_factory=lambda: AV(0, 0))
    first_s: float = 0.0

    def watch(self, pieces: Iterable[AV[np.ndarray]]) -> Iterator[AV[np.ndarray]]:
        """Pass pieces of a clip on as they come."""
        for piece in pieces:
            self.made = self.made.map(lambda n, part: n + len(part), piece)
            if min(self.made) and not self.first_s:
                self.first_s = time.perf_counter() - self.began
            yield piece

    def told(self) -> dict[str, float]:
        """Say it in StreamAVBench's words; the clip is done."""
        took = {"generation_time_seconds": time.perf_counter() - self.began}
        return {"generated_video_frames": self.made.video, "time_to_first_chunk_seconds": self.first_s} | took


def write(
    make: Callable[[str, int], Iterable[AV[np.ndarray]]],
    prompts: Mapping[str, str],
    tool: Tool,
    out: str | Path,
    *,
    clock: Clock,
    seed: int = 0,
    protocol: Mapping[str, object],
) -> Path:
    """Make and write all clips as they come; one that is there already, under the same protocol, is not made again.

    Args:
        make: gives the pieces of a clip for a prompt and a seed.
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
    manifest, runtimes = out / MANIFEST, out / RUNTIMES
    if manifest.exists() and json.loads(manifest.read_text(encoding="utf-8")) != json.loads(json.dumps(record)):
        raise ValueError(f"{manifest} describes clips of another protocol; name another folder")
    files.write_json(manifest, record)
    lines = files.read_lines(runtimes) if runtimes.exists() else []
    timed = {json.loads(line)["case_id"] for line in lines}
    for clip in wanted:
        path = out / f"{clip.name}.mp4"
        if path.exists() and (not tool.case or clip.tool_prompt in timed):
            continue
        pieces = make(clip.prompt, clip.seed)
        runtime = Runtime()
        pieces = runtime.watch(pieces)
        if tool.sound:
            pieces = _with_sound(pieces, path.with_suffix(".wav"), clock.sample_rate)
        media.write_pieces(path, pieces, clock, scale=1)
        if tool.case:
            case = {"model_id": Path(str(protocol["model"])).stem, "case_id": clip.tool_prompt, "video_path": path.name}
            lines.append(json.dumps(case | {"runtime": runtime.told()}))
            files.write_text(runtimes, "\n".join(lines) + "\n")
    return manifest


def _with_sound(pieces: Iterable[AV[np.ndarray]], path: Path, rate: int) -> Iterator[AV[np.ndarray]]:
    """Write the sound of a clip beside it, and pass the pieces on."""
    with files.replacing(path) as partial, ExitStack() as stack:
        sound = None
        for piece in pieces:
            channels = 1 if piece.audio.ndim == 1 else piece.audio.shape[1]
            sound = sound or stack.enter_context(media.open_wav(str(partial), channels, rate))
            sound.writeframes(media.pcm(piece.audio))
            yield piece
