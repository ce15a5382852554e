"""Results that others rest on: where they come from, runs stored one JSON file each, means over training seeds."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omniforcing_lib import files

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("teacher", "stage2", "student", "codec", "ode_pairs")


def git_state() -> dict:
    """Return the commit and whether the working tree differs from it; both None outside a clone."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def origin(*judged: str | Path, beside: Iterable[str | Path] = ()) -> dict:
    """Say on what a result rests, to be stored with it: `git`, and the SHA-256 of the `files` that are judged.

    `judged`: names of shipped files, or checkpoints as `checkpoints.read` takes them, all their shards; `beside`: paths
    of other files. Raises ValueError where there is no such checkpoint.
    """
    paths = [path for name in judged for path in _paths(name)] + [*map(Path, beside)]
    return {"git": git_state(), "files": {_name(path): files.sha256(path) for path in paths}}


def _paths(name: str | Path) -> Iterable[Path]:
    from omniforcing_lib.ltx2 import checkpoints

    if name in SHIPPED:
        return [files.DATA / f"{name}.safetensors"]
    return sorted({entry.path for entry in checkpoints.read(name).entries.values()})


def _name(path: Path) -> str:
    path = path.resolve()
    return path.name if path.parent == ROOT / "data" else "/".join(path.parts[-2:])


def slug(name: str) -> str:
    """Make a name of an arm or a system the name of a file."""
    return name.replace(" ", "_").replace(",", "")


def plain(value: object) -> object:
    """Give a value as JSON reads it back: floats of four digits, and null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def read(folder: str | Path, settings: Callable[[Mapping], Mapping] = lambda record: {}) -> list[dict]:
    """Read all runs of a folder, seed by seed.

    Raises ValueError where a run was made under other `settings` than those that are given for it.
    """
    runs = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))}
    for path, record in runs.items():
        for name, wanted in settings(record).items():
            if (stored := record.get(name, wanted)) != wanted:
                raise ValueError(f"{path} holds runs of {name} {stored}, asked for {wanted}: use another folder")
    return sorted(runs.values(), key=lambda record: record["seed"])


OverSeeds = tuple[float, tuple[float, float] | None]
"""A mean over training seeds and its 95 % interval: none for one seed, nor where a run broke."""


def over_seeds(values: Sequence[float], *, comparisons: int = 1) -> OverSeeds:
    """Give the mean of a number that each seed has once, and its 95 % interval by Student's t; none for one seed.

    With several `comparisons` the intervals of all hold together in 95 % of cases (Bonferroni): each gets wider.
    """
    from scipy.special import stdtrit

    mean, count = math.fsum(values) / len(values), len(values)
    if count < 2 or not math.isfinite(mean):
        return mean, None
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    reach = float(stdtrit(count - 1, 1 - 0.025 / comparisons)) * spread
    return mean, (mean - reach, mean + reach)


@dataclass(frozen=True)
class Trials:
    """Compare arms over training seeds: every arm is trained once per seed, and each run is one JSON file.

    Attributes:
        arms: what is changed, by name.
        command: `python -m omniforcing_lib` with this makes the runs.
        measured: gives the numbers of one run from its record.
        same: what all records have to agree on.
    """

    arms: Mapping[str, object]
    command: str
    measured: Callable[[Mapping], Mapping[str, float]]
    same: tuple[str, ...] = ()

    def run(
        self,
        folder: str | Path,
        names: Sequence[str],
        seeds: int,
        settings: Callable[[Mapping], Mapping],
        prepare: Callable[[], Callable[[str, int], Mapping]],
    ) -> Path:
        """Run arms, all of them if none is named, with every training seed; what is in the folder is kept.

        Args:
            folder: of one file per run, which is written as soon as the run ends.
            names: of arms.
            seeds: training seeds, from 0 on; all arms run with one before any runs with the next.
            settings: gives what all runs of an arm must agree on, from its record; it is stored with each.
            prepare: gives the trial of an arm and a seed, which returns what else is stored; asked only if one is
                missing.

        Raises ValueError, before any work, for an unknown arm, or a folder with runs under other settings.
        """
        if unknown := sorted({*names} - {*self.arms}):
            raise ValueError(f"unknown arms {', '.join(unknown)}; choose from {', '.join(map(repr, self.arms))}")
        folder = Path(folder)
        read(folder, settings)
        jobs = [(arm, seed) for seed in range(seeds) for arm in names or self.arms]
        paths = {job: folder / f"{slug(job[0])}-{job[1]}.json" for job in jobs}
        missing = {job: path for job, path in paths.items() if not path.exists()}
        trial = prepare() if missing else None
        for done, ((arm, seed), path) in enumerate(missing.items(), 1):
            record = {"arm": arm, "seed": seed}
            record |= {**settings(record), **trial(arm, seed)}
            # One line, since it holds hundreds of small numbers that nobody reads one by one.
            files.write_text(path, json.dumps(record, allow_nan=False) + "\n")
            print(f"{time.strftime('%H:%M:%S')} {path.name}, {done} of {len(missing)}", flush=True)
        return folder

    def runs(self, folder: str | Path, settings: Callable[[Mapping], Mapping] | None = None) -> dict[str, dict]:
        """Read the runs of every arm: arm -> training seed -> record.

        Raises ValueError where there is none, or where they do not belong together.
        """
        common = {name: record[name] for record in read(folder)[:1] for name in self.same}
        records = read(folder, settings or (lambda record: common))
        if not records:
            raise ValueError(f"{folder} holds no runs; `python -m omniforcing_lib {self.command}` makes them")
        runs = {arm: {record["seed"]: record for record in records if record["arm"] == arm} for arm in self.arms}
        return {arm: by_seed for arm, by_seed in runs.items() if by_seed}

    def numbers(self, folder: str | Path) -> dict[str, dict[int, Mapping[str, float]]]:
        """Give the numbers of every run: arm -> training seed -> measure -> value."""
        runs = self.runs(folder).items()
        return {arm: {seed: self.measured(record) for seed, record in by_seed.items()} for arm, by_seed in runs}

    def table(self, folder: str | Path) -> dict[str, dict[str, OverSeeds]]:
        """Average the runs of every arm over training seeds: arm -> measure -> mean and 95 % interval."""
        return averaged(self.numbers(folder))

    def gains(self, folder: str | Path, base: str) -> dict[str, dict[str, OverSeeds]]:
        """Subtract the base from every other arm, seed by seed, see `over_base`."""
        return over_base(self.numbers(folder), base)


def averaged(runs: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[str, dict[str, OverSeeds]]:
    """Average runs, arm -> training seed -> measure -> value, over seeds: arm -> measure -> mean and 95 % interval."""
    return {
        arm: {measure: over_seeds([trial[measure] for trial in trials]) for measure in trials[0]}
        for arm, trials in ((arm, [*by_seed.values()]) for arm, by_seed in runs.items())
    }


def over_base(runs: Mapping[str, Mapping[int, Mapping[str, float]]], base: str) -> dict[str, dict[str, OverSeeds]]:
    """Subtract the base from every other arm, seed by seed: arm -> measure -> mean difference and interval.

    A seed is one pair. Seeds that only one of the two has do not count, and arms without a common seed are left out.
    Intervals are corrected for the number of arms by Bonferroni: of all differences of one measure together, 95 %
    hold.
    """
    of_base = runs.get(base, {})
    pairs = {
        arm: [(trials[seed], of_base[seed]) for seed in trials if seed in of_base]
        for arm, trials in runs.items()
        if arm != base and trials.keys() & of_base.keys()
    }
    return {
        arm: {
            measure: over_seeds([a[measure] - b[measure] for a, b in both], comparisons=len(pairs))
            for measure in both[0][0]
        }
        for arm, both in pairs.items()
    }
