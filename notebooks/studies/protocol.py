"""The protocol of what is reported: held-out seeds, through an mp4, judged from pixels and samples.

Teacher and students get the same prompts and the same seeds; the prompts are those of training. Ceiling (real clips),
codec round trip and floor (sound of another clip) stand beside them; every measure has a bootstrap interval over
clips, and sync F1 is given by seed too. Sets are compared with as many real clips of other seeds, and with codec round
trips of these, which no model of latents can surpass: variety (see `bounce.variety`) and distances.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from omniforcing_lib import files, media, rollout, stream
from omniforcing_lib.bounce import codecs, distributions, evaluate, variety, world
from omniforcing_lib.bounce.codec_parts import CodecConfig
from omniforcing_lib.bounce.codecs import TinyCodec
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.layout import AV, PAPER, BlockLayout
from omniforcing_lib.ltx2 import checkpoints
from series import claims, origins, plots
from studies import distill, exposure_bias, stored_runs

Clip = AV[np.ndarray]
OTHER_SEEDS = 5_000
STORED = files.DATA.parent / "reports" / "scores"


@dataclass(frozen=True)
class Trial:
    """Say which clips are made: the same for every system.

    Attributes:
        clips: clips a seed; prompts take turns.
        seeds: number of disjoint sets of seeds.
        seconds: length of a clip.
        prompt: the prompt of all clips; without one the world's take turns.
        first: the first noise seed less `world.HELD_OUT`; sets begin 10,000 apart. Reports use 10,000 and up, what is
            chosen by scores (`SELECTION`) has seeds of its own.
    """

    clips: int = 64
    seeds: int = 3
    seconds: int = 5
    prompt: str = ""
    first: int = 10_000

    def __post_init__(self) -> None:
        if self.clips > OTHER_SEEDS:
            raise ValueError(
                f"a seed has up to {OTHER_SEEDS} clips, then they are those of the reference; found {self.clips}"
            )

    @property
    def prompts(self) -> list[str]:
        """Prompt of every clip."""
        names = [self.prompt] if self.prompt else world.prompts()
        return [names[i % len(names)] for i in range(self.clips * self.seeds)]

    def asked(self, system: System) -> list[str]:
        """Prompt of every clip, empty for a system that gets none."""
        return self.prompts if system.prompted else [""] * len(self.prompts)

    @property
    def numbers(self) -> list[int]:
        """Noise seed of every clip, and the world's seed of the real clip beside it; training never draws them."""
        starts = range(self.first, self.first + 10_000 * self.seeds, 10_000)
        return [world.HELD_OUT + start + i for start in starts for i in range(self.clips)]

    def real(self, offset: int = 0) -> list[Clip]:
        """Render true clips of the same prompts."""
        pairs = zip(self.numbers, self.prompts, strict=True)
        return [world.render(world.scene(n + offset, p), seconds=self.seconds) for n, p in pairs]


SELECTION = 500_000
"""First seed, less `world.HELD_OUT`, of clips by which checkpoints and settings are chosen: no report uses them."""
ONE_PROMPT = Trial(clips=54, seeds=1, prompt="a red ball, bell", first=90_000)
"""Clips of one prompt, to see how far apart they are."""


class System(NamedTuple):
    """What is measured: a checkpoint, the steps of a teacher (a student has its own), and whether it is prompted."""

    model: str
    steps: int = 40
    prompted: bool = True

    def named(self) -> dict[str, object]:
        """Say what is measured in a record: the file by its name, wherever it lies."""
        return self._asdict() | {"model": Path(self.model).name}


def systems_of(models: Sequence[str], steps: Sequence[int], *, unprompted: bool = False) -> dict[str, System]:
    """Name what is measured: students by their files, teachers by their steps too, and without a prompt if asked.

    Raises:
        ValueError: two have one name, or a model makes other latents than the world's.
    """
    found: list[tuple[str, System]] = []
    for model in models:
        checkpoint, name = checkpoints.fitting(model), Path(model).stem
        wanted, there = CodecConfig().channels.video, checkpoint.config.in_channels
        if there != wanted:
            raise ValueError(
                f"{model} makes latents of {there} channels, the world's have {wanted}: nothing judges them"
            )
        if checkpoint.causal is not None:
            found.append((name, System(model)))
            continue
        found += [(f"{name}, {n} steps", System(model, n)) for n in steps]
        if unprompted:
            found.append((f"{name}, no prompt", System(model, min(steps), prompted=False)))
    names = [name for name, _ in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two columns would be called {', '.join(twice)}: give each model once, and files other names")
    return dict(found)


@torch.inference_mode()
def sample(system: System, trial: Trial, *, batch: int = 16) -> list[Clip]:
    """Make the clips of a trial."""
    codec, loaded, causal = (
        codecs.shipped_codec(),
        checkpoints.load(system.model),
        checkpoints.read(system.model).causal,
    )
    made: list[Clip] = []
    for start in tqdm(range(0, len(trial.numbers), batch), desc=f"sampling {Path(system.model).stem}", leave=False):
        prompts, numbers = (x[start : start + batch] for x in (trial.asked(system), trial.numbers))
        if causal is None:
            made += stream.teacher_clips(loaded, codec, TinyText(), prompts, numbers, trial.seconds, steps=system.steps)
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


class Reference(NamedTuple):
    """Real clips of other seeds, which sets are compared with, and codec round trips of these."""

    described: variety.Described
    real: AV[np.ndarray]
    codec: AV[np.ndarray]

    @classmethod
    def of(cls, trial: Trial, *, mp4: bool = True) -> Reference:
        """Render as many clips as the trial has, `OTHER_SEEDS` further on."""
        clips = trial.real(OTHER_SEEDS)
        passed = through_codec(clips, codecs.shipped_codec())
        clips, passed = (through_file(found) if mp4 else found for found in (clips, passed))
        sets = (distributions.feature_sets(found) for found in (clips, passed))
        return cls(variety.described(evaluate.read_all(clips, "real clips")), *sets)


def run(
    systems: dict[str, System], trial: Trial, out: str | Path, *, floor: bool = True, one_prompt: Trial = ONE_PROMPT
) -> evaluate.Table:
    """Measure systems by name; write `scores.json`, `scores.md`, `motions.json` and a contact sheet of each.

    Distances and neighbours are to real clips of other seeds, equal in number. The first system without blocks is the
    teacher that the others' distances are divided by; without one there are no such ratios. Clips of one prompt are
    judged as they are made, through no file.

    Returns the table.
    """
    out, judged = Path(out), origins.of(*dict.fromkeys(system.model for system in systems.values()), "codec")
    _check_size(trial)
    reference = Reference.of(trial)
    made = {"real clips": trial.real, "codec round trip": lambda: through_codec(trial.real(), codecs.shipped_codec())}
    made |= {"shuffled sound": lambda: evaluate.shuffled(trial.real())} if floor else {}
    made |= {name: partial(sample, system, trial) for name, system in systems.items()}
    rows, extra, motions, features = {}, {}, {}, {}
    for name, make in made.items():
        clips = through_file(make())
        wanted = trial.asked(systems[name]) if name in systems else trial.prompts
        readings = evaluate.read_all(clips, name)
        tallies = [evaluate.tally(reading, prompt) for reading, prompt in zip(readings, wanted, strict=True)]
        if name in systems:
            _sheet(out / f"{stored_runs.slug(name)}.png", readings[:8], wanted[:8])
        found = variety.described(readings)
        rows[name] = evaluate.estimates(tallies) | variety.compared(reference.described, found)
        rows[name] |= _one_prompt(name, systems.get(name), one_prompt)
        features[name], motions[name] = distributions.feature_sets(clips), found.moves
        extra[name] = distances(reference, features[name]) | {"sync_f1_by_seed": by_seed(tallies, trial)}
        extra[name]["quadrants"] = variety.quadrants(motions[name]).tolist()
        if all(wanted):
            extra[name]["lowest_of_prompts"] = worst(tallies, trial.prompts)
    if teacher := _teacher(systems):
        for name in systems:
            rows[name] |= _ratios(reference, features[name], features[teacher])
    table = evaluate.Table(rows)
    _store(out, trial, systems, table, extra, judged)
    shown = {name: np.round(moves, 2).tolist() for name, moves in motions.items()}
    files.write_text(out / "motions.json", json.dumps(shown) + "\n")
    return table


def stored_motions(folder: str | Path = STORED) -> dict[str, np.ndarray]:
    """Read the motions that `run` stored, by the names that the report's columns have (`claims.SYSTEMS`).

    Shapes: each [n, 4], see `variety.motions`. Raises ValueError where none are stored.
    """
    path = Path(folder) / "motions.json"
    if not path.exists():
        raise ValueError(f"{path} is not there; `python -m omniforcing_lib score` writes it beside scores.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    return {column: np.array(found[name]) for name, column in claims.SYSTEMS.items() if name in found}


def _check_size(trial: Trial) -> None:
    if len(trial.numbers) <= variety.NEIGHBOURS:
        raise ValueError(f"neighbours need {variety.NEIGHBOURS + 1} clips or more, found {len(trial.numbers)}")


def _teacher(systems: dict[str, System]) -> str:
    """Name the first system without blocks; nothing where there is none."""
    return next((name for name, system in systems.items() if checkpoints.read(system.model).causal is None), "")


def _one_prompt(name: str, system: System | None, trial: Trial) -> dict[str, evaluate.Estimate]:
    """Measure how far apart clips of one prompt are, and how evenly their directions are spread."""
    if not (system.prompted if system else name == "real clips"):
        return {}
    readings = evaluate.read_all(sample(system, trial) if system else trial.real(), name)
    spread = variety.spread(variety.motions(readings))
    return {
        "one_prompt_nearest_px": variety.nearest(readings),
        "one_prompt_direction_entropy": spread["direction_entropy"],
    }


def _ratios(reference: Reference, found: AV[np.ndarray], teacher: AV[np.ndarray]) -> dict[str, evaluate.Estimate]:
    """Divide the distances to codec round trips by the teacher's, with intervals over clips."""
    ratios = distill.frechet_ratio(reference.codec, found, teacher)._asdict()
    return {f"frechet_{s}_to_codec_by_teacher": ratio for s, ratio in ratios.items()}


def _sheet(path: Path, readings: Sequence[evaluate.Reading], titles: Sequence[str]) -> None:
    events = [AV([*(p.seen for p in r.pairs), *r.seen], [*(p.heard for p in r.pairs), *r.heard]) for r in readings]
    picture = plots.contact_sheet([r.clip for r in readings], titles, events)
    with files.replacing(path) as partial:
        picture.savefig(partial, format="png")


def brief(model: str, clips: int) -> dict[str, float]:
    """Measure a miniature in little, for its file's own metadata: the mean of every measure over a few clips."""
    trial = Trial(clips, seeds=1)
    made = through_file(sample(System(model, steps=20), trial))
    row = evaluate.table(made, trial.prompts, name=model, draws=1).rows[model]
    return {"clips": clips} | {name: round(e.mean, 4) for name, e in row.items() if np.isfinite(e.mean)}


def distances(reference: Reference, found: AV[np.ndarray]) -> dict[str, float]:
    """Fréchet and energy distance of hand-made features to real clips and to codec round trips, for each stream."""
    measures = {"frechet": distributions.frechet, "energy": distributions.energy_distance}
    sides = {"": reference.real, "_to_codec": reference.codec}
    return {
        f"{name}_{s}{to}": round(measure(a, b), 4)
        for to, side in sides.items()
        for name, measure in measures.items()
        for s, a, b in zip(AV._fields, side, found, strict=True)
    }


def by_seed(tallies: Sequence[evaluate.Tally], trial: Trial) -> list[float]:
    """Sync F1 of each set of seeds on its own."""
    parts = [tallies[start : start + trial.clips] for start in range(0, len(tallies), trial.clips)]
    return [round(evaluate.estimates(part, draws=1)["sync_f1"].mean, 4) for part in parts]


def worst(tallies: Sequence[evaluate.Tally], prompts: Sequence[str]) -> dict[str, float]:
    """Give each measure of prompt and sync for the prompt that does worst at it."""
    found: dict[str, float] = {}
    for prompt in dict.fromkeys(prompts):
        row = evaluate.estimates([t for t, p in zip(tallies, prompts, strict=True) if p == prompt], draws=1)
        for name in ("one_ball", "colour", "timbre", "sync_f1", "wall_pitch"):
            found[name] = min(found.get(name, 1.0), round(row[name].mean, 4))
    return found


def _store(
    out: Path,
    trial: Trial,
    systems: dict[str, System],
    table: evaluate.Table,
    extra: dict[str, dict],
    judged: dict[str, dict],
) -> None:
    record = judged | {"clips": trial.clips, "seeds": trial.seeds, "seconds": trial.seconds}
    record["systems"] = {name: system.named() for name, system in systems.items()}
    files.write_json(out / "scores.json", record | {"measures": _plain(table), "more": extra})
    size = f"{trial.seeds} seeds × {trial.clips} clips of {trial.seconds} s"
    title = f"{size}, held-out seeds, through an mp4; mean and 95 % interval."
    more = (
        "Distances are on named, hand-made features, to as many real clips of other seeds, or to codec round trips of "
        "these. Quadrants: clips that start to the lower right, lower left, upper left, upper right."
    )
    files.write_text(out / "scores.md", "\n\n".join([title, str(table), more, _columns(extra)]) + "\n")


def _plain(table: evaluate.Table) -> dict[str, dict[str, list[float] | None]]:
    """Give a table as JSON can hold it: mean, low, high of each measure, None where nothing was to be measured."""
    rows = {name: {k: [round(float(v), 5) for v in e] for k, e in row.items()} for name, row in table.rows.items()}
    return {n: {k: v if np.isfinite(v).all() else None for k, v in row.items()} for n, row in rows.items()}


def run_long(systems: dict[str, System], trial: Trial, out: str | Path, *, width: int = 10) -> str:
    """Measure what long roll-outs lose, span by span of `width` seconds, and write `long.json` and `long.md`.

    Real clips stand beside the students. `last / first` is `exposure_bias.kept`; seams: `exposure_bias.seam`.
    Returns the text.

    Raises ValueError for a teacher, which has no blocks, or a length that is not two spans or more.
    """
    if trial.seconds % width or trial.seconds < 2 * width:
        raise ValueError(f"long roll-outs last two or more whole spans of {width} s, found {trial.seconds} s")
    layouts = {"real clips": PAPER}
    for name, system in systems.items():
        layouts[name] = checkpoints.student(system.model).layout
    _check_size(trial)
    size = f"{trial.clips * trial.seeds} roll-outs of {trial.seconds} s"
    parts, record = [f"{size}, held-out seeds, through an mp4; mean and 95 % interval."], {}
    judged = origins.of(*dict.fromkeys(system.model for system in systems.values()), "codec")
    other = evaluate.read_all(trial.real(OTHER_SEEDS), "real clips")
    for name, layout in layouts.items():
        made = sample(systems[name], trial, batch=8) if name in systems else trial.real()
        readings = evaluate.read_all(through_file(made), name)
        wanted = trial.asked(systems[name]) if name in systems else trial.prompts
        table, seams = _spans(other, readings, wanted, layout, range(0, trial.seconds, width), width)
        parts += [f"## {name}", str(table), _columns(seams)]
        record[name] = {"measures": _plain(table), "seams": seams}
    settings = judged | {"clips": trial.clips, "seeds": trial.seeds, "seconds": trial.seconds, "width": width}
    settings["systems"] = {name: system.named() for name, system in systems.items()}
    files.write_json(Path(out) / "long.json", settings | {"spans": record})
    files.write_text(Path(out) / "long.md", "\n\n".join(parts) + "\n")
    return "\n\n".join(parts)


def _spans(
    other: Sequence[evaluate.Reading],
    readings: Sequence[evaluate.Reading],
    prompts: Sequence[str],
    layout: BlockLayout,
    starts: range,
    width: int,
) -> tuple[evaluate.Table, dict[str, dict[str, float]]]:
    counts = [
        [evaluate.tally(r, p, start, start + width) for r, p in zip(readings, prompts, strict=True)] for start in starts
    ]
    names = [f"{start} to {start + width} s" for start in starts]
    rows = {
        name: evaluate.estimates(found) | variety.in_span(other, readings, start, width)
        for name, found, start in zip(names, counts, starts, strict=True)
    }
    seams = {
        name: {f"seam, {of}": round(exposure_bias.seam(readings, layout, of, *span), 4) for of in exposure_bias.STEPS}
        for name, span in zip([*names, "all"], [*((s, s + width) for s in starts), (0,)], strict=True)
    }
    return evaluate.Table(rows | {"last / first": exposure_bias.kept(counts[0], counts[-1])}), seams


def _columns(extra: dict[str, dict]) -> str:
    """Write what is known of each system beside its measures, a column each."""
    flat = {name: {k: v for k, v in row.items() if not isinstance(v, dict)} for name, row in extra.items()}
    for name, row in extra.items():
        flat[name] |= {f"{k}: {m}": v for k, d in row.items() if isinstance(d, dict) for m, v in d.items()}
    keys = dict.fromkeys(k for row in flat.values() for k in row)
    return claims.markdown_table([{"": k} | {n: str(row.get(k, "–")) for n, row in flat.items()} for k in keys])
