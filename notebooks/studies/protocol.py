"""The protocol of what is reported: held-out seeds, through an mp4, judged from pixels and samples.

Teacher and students get the same prompts and the same seeds; the prompts are those of training. Ceiling (real clips),
codec round trip and floor (sound of another clip) stand beside them; every measure has a 95 % interval over clips, and
sync F1 is given by seed too. Sets are compared with as many real clips of other seeds, and with codec round trips of
these, which no model of latents can surpass: variety (see `bounce.variety`) and distances.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from omniforcing_lib import files
from omniforcing_lib.bounce import codecs, distributions, evaluate, heard, sampling, variety, world
from omniforcing_lib.bounce.codec_parts import CodecConfig
from omniforcing_lib.bounce.evaluate import Estimate, Reading, Table, Tally
from omniforcing_lib.bounce.sampling import Clip
from omniforcing_lib.layout import AV, PAPER, BlockLayout
from omniforcing_lib.ltx2 import checkpoints
from studies import distill, exposure_bias, store

OTHER_SEEDS = 5_000
STORED = store.ROOT / "reports" / "scores"


@dataclass(frozen=True)
class Trial:
    """Say which clips are made: the same for every system.

    Attributes:
        clips: clips per seed; prompts take turns.
        seeds: number of disjoint sets of seeds.
        seconds: length of a clip.
        prompt: the prompt of all clips; without one the world's take turns.
        first: the first noise seed less `world.HELD_OUT`; sets begin 10,000 apart. Reports use 10,000 and up, what is
            chosen by scores (`SELECTION`) has seeds of its own.
        hum: whether clips are of the world with a hum, see `world.scene`; what is heard of it is measured too.
        hidden: whether the right third of the box is out of sight; where the ball comes back is measured too.
        codec: file of the codec of the models' latents.
    """

    clips: int = 64
    seeds: int = 3
    seconds: int = 5
    prompt: str = ""
    first: int = 10_000
    hum: bool = False
    hidden: bool = False
    codec: str = str(codecs.SHIPPED)

    def __post_init__(self) -> None:
        if self.clips > OTHER_SEEDS:
            raise ValueError(
                f"a seed has up to {OTHER_SEEDS} clips, then they are those of the reference; found {self.clips}"
            )

    @property
    def prompts(self) -> list[str]:
        """Prompt of every clip."""
        count = self.clips * self.seeds
        return [self.prompt] * count if self.prompt else world.prompts_in_turn(count)

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
        draw = partial(world.scene, hum=self.hum, hidden=self.hidden)
        return sampling.true_clips(self.prompts, [n + offset for n in self.numbers], self.seconds, draw)

    def tallies(self, readings: Sequence[Reading], prompts: Sequence[str], *span: int) -> list[Tally]:
        """Count what `evaluate.tally` counts of clips, and what only the ear can tell of this trial's world."""
        counts = evaluate.tallies(readings, prompts, *span)
        if not (self.hum or self.hidden):
            return counts
        hearings = [*map(heard.hear, readings)]
        if self.hum:
            counts = [c | heard.hum_tally(h, None, *span) for c, h in zip(counts, hearings, strict=True)]
        if self.hidden and not span:
            counts = [c | heard.reentry_tally(h) for c, h in zip(counts, hearings, strict=True)]
        return counts

    def named(self, systems: Mapping[str, System]) -> dict[str, object]:
        """Say in a record which clips were made, and by what."""
        record = {"clips": self.clips, "seeds": self.seeds, "seconds": self.seconds}
        if self.hum or self.hidden:
            record |= {"hum": self.hum, "hidden": self.hidden}
        return record | {"systems": {name: system.named() for name, system in systems.items()}}


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
        ValueError: two have one name, a model makes other latents than the world's, or no teacher is there to be
            unprompted.
    """
    systems: list[tuple[str, System]] = []
    for model in models:
        checkpoint, name = checkpoints.fitting(model), Path(model).stem
        wanted, there = CodecConfig().channels.video, checkpoint.config.in_channels
        if there != wanted:
            raise ValueError(
                f"{model} makes latents of {there} channels, the world's have {wanted}: nothing judges them"
            )
        if checkpoint.causal is not None:
            systems.append((name, System(model)))
            continue
        systems += [(f"{name}, {n} steps", System(model, n)) for n in steps]
        if unprompted:
            systems.append((f"{name}, no prompt", System(model, min(steps), prompted=False)))
    names = [name for name, _ in systems]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two columns would be called {', '.join(twice)}: give each model once, and files other names")
    if unprompted and all(system.prompted for _, system in systems):
        raise ValueError("a column without a prompt is a teacher's, and only students are named: name a teacher too")
    return dict(systems)


def sample(system: System, trial: Trial, *, batch: int = 16) -> list[Clip]:
    """Make the clips of a trial."""
    model, causal = checkpoints.load(system.model), checkpoints.read(system.model).causal
    asked = (trial.asked(system), trial.numbers, trial.seconds)
    return sampling.sample(model, causal, codecs.load_codec(trial.codec), *asked, steps=system.steps, batch=batch)


class Reference(NamedTuple):
    """Real clips of other seeds, which sets are compared with, and codec round trips of these."""

    described: variety.Described
    real: AV[np.ndarray]
    codec: AV[np.ndarray]

    @classmethod
    def of(cls, trial: Trial, *, mp4: bool = True) -> Reference:
        """Render as many clips as the trial has, `OTHER_SEEDS` further on."""
        sets = [trial.real(OTHER_SEEDS)]
        sets.append(sampling.round_trip(codecs.load_codec(trial.codec), sets[0]))
        sets = [sampling.through_file(clips) if mp4 else clips for clips in sets]
        described = variety.described(evaluate.read_all(sets[0], "real clips"))
        return cls(described, *map(distributions.feature_sets, sets))


def run(
    systems: dict[str, System],
    trial: Trial,
    out: str | Path,
    draw: Callable[[list[Clip], Sequence[str], list[AV]], object] | None = None,
    *,
    floor: bool = True,
    one_prompt: Trial = ONE_PROMPT,
) -> Table:
    """Measure systems by name; write `scores.json`, `scores.md`, `motions.json` and a contact sheet of each.

    Distances and neighbours are to real clips of other seeds, equal in number. The first system without blocks is the
    teacher that the others' distances are divided by; without one there are no such ratios. Clips of one prompt are
    judged as they are made, through no file. `draw` makes the figure of some clips, their prompts and their events;
    without it there are no contact sheets.

    Returns the table. Raises ValueError for too few clips, or a model that makes latents of another codec.
    """
    out, models = Path(out), dict.fromkeys(system.model for system in systems.values())
    codec = codecs.load_codec(trial.codec)
    judged = store.origin(*models, beside=[trial.codec])
    _check(systems, trial)
    one_prompt = replace(one_prompt, hum=trial.hum, hidden=trial.hidden, codec=trial.codec)
    reference = Reference.of(trial)
    makers = {"real clips": trial.real, "codec round trip": lambda: sampling.round_trip(codec, trial.real())}
    makers |= {"shuffled sound": lambda: evaluate.shuffled(trial.real())} if floor else {}
    makers |= {name: partial(sample, system, trial) for name, system in systems.items()}
    rows, more, motions, features = {}, {}, {}, {}
    for name, make in makers.items():
        clips = sampling.through_file(make())
        wanted = trial.asked(systems[name]) if name in systems else trial.prompts
        readings = evaluate.read_all(clips, name)
        tallies = trial.tallies(readings, wanted)
        if draw and name in systems:
            _sheet(draw, out / f"{store.slug(name)}.png", readings[:8], wanted[:8])
        described = variety.described(readings)
        rows[name] = evaluate.estimates(tallies) | variety.compared(reference.described, described)
        rows[name] |= _one_prompt(name, systems.get(name), one_prompt)
        features[name], motions[name] = distributions.feature_sets(clips), described.moves
        more[name] = distances(reference, features[name]) | {"sync_f1_by_seed": by_seed(tallies, trial)}
        more[name]["quadrants"] = variety.quadrants(motions[name]).tolist()
        if all(wanted):
            more[name]["lowest_of_prompts"] = worst(tallies, trial.prompts)
    teacher = next((name for name, system in systems.items() if checkpoints.read(system.model).causal is None), "")
    if teacher:
        for name in systems:
            ratios = distill.frechet_ratio(reference.codec, features[name], features[teacher])
            rows[name] |= {f"frechet_{s}_to_codec_by_teacher": ratio for s, ratio in ratios._asdict().items()}
    table = Table(rows)
    record = judged | trial.named(systems) | {"measures": _plain(table), "more": more}
    files.write_json(out / "scores.json", record)
    size = f"{trial.seeds} seeds × {trial.clips} clips of {trial.seconds} s"
    notes = (
        f"{size}, held-out seeds, through an mp4; mean and 95 % interval.",
        "Distances are on named, hand-made features, to as many real clips of other seeds, or to codec round trips of "
        "these. Quadrants: clips that start to the lower right, lower left, upper left, upper right.",
    )
    files.write_text(out / "scores.md", "\n\n".join([notes[0], str(table), notes[1], _columns(more)]) + "\n")
    shown = {name: np.round(moves, 2).tolist() for name, moves in motions.items()}
    files.write_text(out / "motions.json", json.dumps(shown) + "\n")
    return table


def stored_motions(columns: Mapping[str, str], folder: str | Path = STORED) -> dict[str, np.ndarray]:
    """Read the motions that `run` stored, under other names: `columns` gives that of each system.

    Shapes: each [n, 4], see `variety.motions`. Raises ValueError where none are stored.
    """
    path = Path(folder) / "motions.json"
    if not path.exists():
        raise ValueError(f"{path} is not there; `python -m omniforcing_lib score` writes it beside scores.json")
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {column: np.array(stored[name]) for name, column in columns.items() if name in stored}


def _check(systems: Mapping[str, System], trial: Trial) -> None:
    for model in {system.model for system in systems.values()}:
        codecs.check_codec(model, checkpoints.read(model).notes, trial.codec)
    if len(trial.numbers) <= variety.NEIGHBOURS:
        raise ValueError(f"neighbours need {variety.NEIGHBOURS + 1} clips or more, found {len(trial.numbers)}")


def _one_prompt(name: str, system: System | None, trial: Trial) -> dict[str, Estimate]:
    """Measure how far apart clips of one prompt are, and how evenly their directions are spread."""
    if not (system.prompted if system else name == "real clips"):
        return {}
    readings = evaluate.read_all(sample(system, trial) if system else trial.real(), name)
    spread = variety.spread(variety.motions(readings))
    return {
        "one_prompt_nearest_px": variety.nearest(readings),
        "one_prompt_direction_entropy": spread["direction_entropy"],
    }


def _sheet(draw: Callable, path: Path, readings: Sequence[Reading], titles: Sequence[str]) -> None:
    events = [AV([*(p.seen for p in r.pairs), *r.seen], [*(p.heard for p in r.pairs), *r.heard]) for r in readings]
    picture = draw([r.clip for r in readings], titles, events)
    with files.replacing(path) as unfinished:
        picture.savefig(unfinished, format="png")


def distances(reference: Reference, features: AV[np.ndarray]) -> dict[str, float]:
    """Fréchet and energy distance of hand-made features to real clips and to codec round trips, for each stream."""
    sides = {"": reference.real, "_to_codec": reference.codec}
    return {
        f"{name}_{stream}{to}": round(value, 4)
        for to, side in sides.items()
        for name, pair in distill.distance(side, features)._asdict().items()
        for stream, value in pair._asdict().items()
    }


def by_seed(tallies: Sequence[Tally], trial: Trial) -> list[float | None]:
    """Sync F1 of each set of seeds on its own; None where there is no event."""
    parts = [tallies[start : start + trial.clips] for start in range(0, len(tallies), trial.clips)]
    scores = [evaluate.estimates(part, draws=1)["sync_f1"].mean for part in parts]
    return [round(score, 4) if np.isfinite(score) else None for score in scores]


def worst(tallies: Sequence[Tally], prompts: Sequence[str]) -> dict[str, float]:
    """Give each measure of prompt and sync for the prompt that does worst at it; prompts without one do not count."""
    lowest: dict[str, float] = {}
    for prompt in dict.fromkeys(prompts):
        row = evaluate.estimates([t for t, p in zip(tallies, prompts, strict=True) if p == prompt], draws=1)
        for name in ("one_ball", "colour", "timbre", "sync_f1", "wall_pitch"):
            if np.isfinite(row[name].mean):
                lowest[name] = min(lowest.get(name, 1.0), round(row[name].mean, 4))
    return lowest


def _plain(table: Table) -> dict[str, dict[str, list[float] | None]]:
    """Give a table as JSON can hold it: mean, low, high of each measure, None where nothing was to be measured."""
    rows = {name: {k: [round(float(v), 5) for v in e] for k, e in row.items()} for name, row in table.rows.items()}
    return {n: {k: v if np.isfinite(v).all() else None for k, v in row.items()} for n, row in rows.items()}


def run_long(systems: dict[str, System], trial: Trial, out: str | Path, *, width: int = 10) -> str:
    """Measure what long roll-outs lose, span by span of `width` seconds, and write `long.json` and `long.md`.

    Real clips stand beside the students. `last / first` is `exposure_bias.kept`; seams: `exposure_bias.seam`.
    Returns the text.

    Raises ValueError for a teacher, which has no blocks, a length that is not two spans or more, or as `run` does.
    """
    if trial.seconds % width or trial.seconds < 2 * width:
        raise ValueError(f"long roll-outs last two or more whole spans of {width} s, found {trial.seconds} s")
    layouts = {"real clips": PAPER} | {n: checkpoints.student(s.model).layout for n, s in systems.items()}
    _check(systems, trial)
    size = f"{trial.clips * trial.seeds} roll-outs of {trial.seconds} s"
    parts, record = [f"{size}, held-out seeds, through an mp4; mean and 95 % interval."], {}
    judged = store.origin(*dict.fromkeys(system.model for system in systems.values()), beside=[trial.codec])
    other = evaluate.read_all(trial.real(OTHER_SEEDS), "real clips")
    for name, layout in layouts.items():
        clips = sample(systems[name], trial, batch=8) if name in systems else trial.real()
        readings = evaluate.read_all(sampling.through_file(clips), name)
        wanted = trial.asked(systems[name]) if name in systems else trial.prompts
        table, seams = _spans(trial, other, readings, wanted, layout, range(0, trial.seconds, width))
        parts += [f"## {name}", str(table), _columns(seams)]
        record[name] = {"measures": _plain(table), "seams": seams}
    files.write_json(Path(out) / "long.json", judged | trial.named(systems) | {"width": width, "spans": record})
    text = "\n\n".join(parts)
    files.write_text(Path(out) / "long.md", text + "\n")
    return text


def _spans(
    trial: Trial,
    other: Sequence[Reading],
    readings: Sequence[Reading],
    prompts: Sequence[str],
    layout: BlockLayout,
    starts: range,
) -> tuple[Table, dict[str, dict[str, float]]]:
    spans = {f"{start} to {start + starts.step} s": (start, start + starts.step) for start in starts}
    counts = {name: trial.tallies(readings, prompts, *span) for name, span in spans.items()}
    rows = {
        name: evaluate.estimates(counts[name]) | variety.in_span(other, readings, start, starts.step)
        for name, (start, _) in spans.items()
    }
    first, *_, last = counts.values()
    seams = {
        name: {f"seam, {of}": round(exposure_bias.seam(readings, layout, of, *span), 4) for of in exposure_bias.STEPS}
        for name, span in (spans | {"all": ()}).items()
    }
    return Table(rows | {"last / first": exposure_bias.kept(first, last)}), seams


def _columns(more: dict[str, dict]) -> str:
    """Write what is known of each system beside its measures, a column each."""
    flat = {name: {k: v for k, v in row.items() if not isinstance(v, dict)} for name, row in more.items()}
    for name, row in more.items():
        flat[name] |= {f"{k}: {m}": v for k, d in row.items() if isinstance(d, dict) for m, v in d.items()}
    keys = dict.fromkeys(k for row in flat.values() for k in row)
    return evaluate.markdown([{"": k} | {n: str(row.get(k, "–")) for n, row in flat.items()} for k in keys])
