"""The protocol of what is reported: held-out prompts and seeds, through an mp4, judged from pixels and samples.

Teacher and students get the same prompts and the same seeds. Ceiling (real clips), codec round trip and floor (sound of
another clip) stand beside them; every measure has a bootstrap interval over clips, and sync F1 is given by seed too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from omniforcing_lib import checkpoints, distributions, evaluate, files, media, plots, rollout, stream, world
from omniforcing_lib.codecs import TinyCodec
from omniforcing_lib.layout import AV
from omniforcing_lib.text import TinyText

Clip = AV[np.ndarray]


@dataclass(frozen=True)
class Trial:
    """Say which clips are made: the same for every system.

    Attributes:
        clips: clips a seed; prompts take turns.
        seeds: number of disjoint sets of seeds.
        seconds: length of a clip.
    """

    clips: int = 64
    seeds: int = 3
    seconds: int = 5

    @property
    def prompts(self) -> list[str]:
        """Prompt of every clip."""
        names = world.prompts()
        return [names[i % len(names)] for i in range(self.clips * self.seeds)]

    @property
    def numbers(self) -> list[int]:
        """Noise seed of every clip, and the world's seed of the real clip beside it; training never draws them."""
        return [world.HELD_OUT + 10_000 * s + i for s in range(1, self.seeds + 1) for i in range(self.clips)]

    def real(self, offset: int = 0) -> list[Clip]:
        """Render true clips of the same prompts."""
        pairs = zip(self.numbers, self.prompts, strict=True)
        return [world.render(world.scene(n + offset, p), seconds=self.seconds) for n, p in pairs]


@torch.inference_mode()
def sample(model: str, trial: Trial, *, steps: int = 40, batch: int = 16) -> list[Clip]:
    """Make the clips of a trial with a teacher (`steps` of guided sampling) or a student (its own steps)."""
    codec, loaded, causal = stream.shipped_codec(), checkpoints.load(model), checkpoints.read(model).causal
    made: list[Clip] = []
    for start in tqdm(range(0, len(trial.numbers), batch), desc=f"sampling {Path(model).stem}", leave=False):
        prompts, numbers = (x[start : start + batch] for x in (trial.prompts, trial.numbers))
        if causal is None:
            made += stream.teacher_clips(loaded, codec, prompts, numbers, trial.seconds, steps=steps)
            continue
        text = TinyText().encode(prompts)
        noise = rollout.seeded_noise(numbers, text.video)
        length = codec.clock.latents(trial.seconds).video
        blocks = rollout.rollout(loaded, causal, text, noise, codec.grid, length)
        made += stream.to_clips(codec.decode(rollout.join(list(blocks))))
    return made


@torch.inference_mode()
def through_codec(clips: Sequence[Clip], codec: TinyCodec, batch: int = 16) -> list[Clip]:
    """Encode and decode clips."""
    made: list[Clip] = []
    for start in range(0, len(clips), batch):
        video, audio = zip(*clips[start : start + batch], strict=True)
        frames = torch.from_numpy(np.stack(video)).float() / 127.5 - 1
        made += stream.to_clips(codec.decode(codec.encode(AV(frames, torch.from_numpy(np.stack(audio))))))
    return made


def through_file(clips: Sequence[Clip]) -> list[Clip]:
    """Write every clip to an mp4 and read it back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        return [media.read_clip(media.write_clip(path, clip)) for clip in tqdm(clips, desc="mp4", leave=False)]


def run(systems: dict[str, tuple[str, int]], trial: Trial, out: str | Path, *, floor: bool = True) -> evaluate.Table:
    """Measure systems, name -> (model, steps), and write `scores.json`, `scores.md` and a contact sheet of each.

    Returns the table; distances are to real clips of other seeds, equal in number.
    """
    out = Path(out)
    real, prompts = through_file(trial.real()), trial.prompts
    reference = distributions.feature_sets(through_file(trial.real(offset=5_000)))
    sets = {"real clips": real, "codec round trip": through_file(through_codec(trial.real(), stream.shipped_codec()))}
    if floor:
        sets["shuffled sound"] = evaluate.shuffled(real)
    for name, (model, steps) in systems.items():
        sets[name] = through_file(sample(model, trial, steps=steps))
        picture = plots.contact_sheet(sets[name][:8], prompts[:8])
        out.mkdir(parents=True, exist_ok=True)
        picture.savefig(out / f"{name.replace(' ', '_')}.png")
    table, extra = evaluate.Table({}), {}
    for name, clips in sets.items():
        table += evaluate.table(clips, prompts, name=name)
        extra[name] = distances(reference, clips) | {"sync_f1_by_seed": by_seed(clips, trial)}
    _store(out, trial, systems, table, extra)
    return table


def distances(reference: AV[np.ndarray], clips: Sequence[Clip]) -> dict[str, float]:
    """Fréchet and energy distance of hand-made features to the reference set, for each stream."""
    found = distributions.feature_sets(clips)
    measures = {"frechet": distributions.frechet, "energy": distributions.energy_distance}
    pairs = reference._asdict().items()
    return {f"{name}_{s}": round(fn(a, getattr(found, s)), 4) for name, fn in measures.items() for s, a in pairs}


def by_seed(clips: Sequence[Clip], trial: Trial) -> list[float]:
    """Sync F1 of each set of seeds on its own."""
    found = []
    for start in range(0, len(clips), trial.clips):
        part = slice(start, start + trial.clips)
        row = evaluate.table(clips[part], trial.prompts[part], name="x", draws=1).rows["x"]
        found.append(round(row["sync_f1"].mean, 4))
    return found


def _store(out: Path, trial: Trial, systems: dict, table: evaluate.Table, extra: dict[str, dict]) -> None:
    rows = {name: {k: [round(v, 5) for v in e] for k, e in row.items()} for name, row in table.rows.items()}
    clean = {n: {k: v if np.isfinite(v).all() else None for k, v in row.items()} for n, row in rows.items()}
    record = {"clips": trial.clips, "seeds": trial.seeds, "seconds": trial.seconds, "systems": systems}
    files.write_json(out / "scores.json", record | {"measures": clean, "more": extra})
    names = list(extra)
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for key in next(iter(extra.values())):
        lines.append(f"| {key} | " + " | ".join(str(extra[n][key]) for n in names) + " |")
    size = f"{trial.seeds} seeds × {trial.clips} clips of {trial.seconds} s"
    title = f"{size}, held-out, through an mp4; mean and 95 % interval."
    more = "Distances are on named, hand-made features, to as many real clips of other seeds."
    files.write_text(out / "scores.md", "\n\n".join([title, str(table), more, "\n".join(lines)]) + "\n")
