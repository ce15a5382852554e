"""The sink experiment at length: runs that are stored one JSON file each, compared over training seeds.

Two plans. `study` trains every arm long enough to rank it, with several training seeds; the training run is the unit,
and seeds are paired: all arms see the same batches of one seed. `phase` looks for the explosion where it is likeliest,
with short runs of which nothing is clipped. `run` goes on where it stopped; `stored`, `table` and `differences` read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

from omniforcing_lib import files, model_bundle
from omniforcing_lib.layout import AV
from series import origins, verdicts
from studies import sinks, stored_runs
from studies.sinks import Trace
from studies.variants import Variant

STORED = files.DATA.parent / "reports" / "sinks"
BASE = "16 sinks"
ARMS = {
    "0 sinks": Variant(sinks=0),
    "2 sinks": Variant(sinks=2),
    BASE: Variant(),
    "24 sinks": Variant(sinks=24),
    "16 counted": Variant(positions="counted"),
    "16 before": Variant(positions="before"),
    "QK-norm": Variant(sinks=0, stabiliser="qk_norm"),
    "tanh gate": Variant(sinks=0, stabiliser="tanh_gate"),
}
"""The paper's recipe and what it is compared with; the last two have no sinks."""
KINDS = {
    "0 sinks": Variant(sinks=0, clip=math.inf),
    BASE: Variant(clip=math.inf),
    "learned bias": Variant(sinks=0, stabiliser="bias", clip=math.inf),
}
NORMS = {"": "rms", ", no QK-norm": "plain"}
SCALES, RATES = (1.0, 8.0, 32.0, 128.0), (5e-4, 5e-3)
ROWS = {f"{kind}{norms}": replace(KINDS[kind], norms=NORMS[norms]) for norms, kind in product(NORMS, KINDS)}
COLUMNS = {f"x {s:g}, rate {r:g}": {"sharpen": s, "lr": r} for r, s in product(RATES, SCALES)}
PHASE = {f"{row}, {column}": replace(ROWS[row], **COLUMNS[column]) for row, column in product(ROWS, COLUMNS)}


@dataclass(frozen=True)
class Budget:
    """Say how much work every run of a plan does.

    Attributes:
        steps: of Stage 2.
        batch: trajectories a step.
        pairs: trajectories that are trained on.
        held: trajectories that judge.
        seconds: of each that are kept.
    """

    steps: int = 300
    batch: int = 4
    pairs: int = 64
    held: int = 26
    seconds: int = 2


class Plan(NamedTuple):
    """Arms, training seeds of each, and the budget of every run."""

    arms: Mapping[str, Variant]
    seeds: int
    budget: Budget


PLANS = {"study": Plan(ARMS, 5, Budget()), "phase": Plan(PHASE, 1, Budget(steps=40))}


def run(name: str, folder: str | Path = STORED, *, arms: Sequence[str] = (), seeds: int = 0, steps: int = 0) -> Path:
    """Train what a plan asks for and is not in its folder yet, seed by seed; return that folder.

    `arms`, `seeds` and `steps` replace the plan's own. Raises ValueError, before any training, for an unknown arm, a
    negative number, or a folder with runs of another budget, arm or teacher.
    """
    plan, folder = PLANS[name], Path(folder) / name
    if unknown := sorted(set(arms) - set(plan.arms)):
        raise ValueError(f"{name} has no arms {', '.join(unknown)}; choose from {', '.join(map(repr, plan.arms))}")
    if min(seeds, steps) < 0:
        raise ValueError(f"seeds and steps are 1 or more, or 0 for the plan's own; found {seeds} and {steps}")
    budget = replace(plan.budget, steps=steps or plan.budget.steps)
    jobs = [(seed, arm) for seed in range(seeds or plan.seeds) for arm in arms or plan.arms]
    paths = {(seed, arm): stored_runs.path_of(folder, arm, seed) for seed, arm in jobs}
    origin = origins.of("teacher", "ode_pairs")
    for record in _records(folder, plan, budget):
        if record["files"] != origin["files"]:
            raise ValueError(f"{folder} holds runs with {record['files']}, found {origin['files']}: use another folder")
    study = sinks.prepare(model_bundle.of("teacher"), pairs=budget.pairs, held=budget.held, seconds=budget.seconds)
    missing = {job: path for job, path in paths.items() if not path.exists()}
    for done, ((seed, arm), path) in enumerate(missing.items(), 1):
        started = time.process_time()
        trace = sinks.train(plan.arms[arm], study, steps=budget.steps, batch=budget.batch, seed=seed, every=100)
        record = {"arm": arm, "seed": seed, **_settings(plan.arms[arm], budget), **origin}
        record |= {"cpu_s": round(time.process_time() - started, 1), "trace": packed(trace)}
        stored_runs.write(path, record, f", {done} of {len(missing)}")
    return folder


def _settings(variant: Variant | None, budget: Budget) -> dict[str, object]:
    """Say what a run is, as JSON reads it back; an arm that is no more has no variant."""
    return {"variant": variant and _json(asdict(variant)), "budget": asdict(budget)}


def _records(folder: Path, plan: Plan, budget: Budget | None = None) -> list[dict]:
    """Read a folder's runs; ValueError unless all are arms of the plan as they are now, of one budget."""
    runs = stored_runs.read(folder)
    for path, record in runs.items():
        budget = budget or Budget(**record["budget"])
        for name, wanted in _settings(plan.arms.get(record["arm"]), budget).items():
            if record[name] != wanted:
                found = f"{path} was run with {name} {record[name]}, wanted {wanted}"
                raise ValueError(f"{found}: use another folder, or remove the file")
    return [*runs.values()]


def packed(trace: Trace) -> dict[str, object]:
    """Give a trace as JSON holds it: four digits, and null for what is not finite."""
    return _json(asdict(trace))


def _json(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_json(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def unpacked(record: Mapping) -> Trace:
    """Read a trace back; null is NaN."""

    def numbers(values: Sequence[float | None]) -> list[float]:
        return [math.nan if value is None else value for value in values]

    judged = {int(done): AV(*numbers(pair)) for done, pair in record["one_step"].items()}
    latents = {int(done): numbers(values) for done, values in record["latents"].items()}
    return Trace(*(numbers(record[name]) for name in ("norm", "sink_norm", "loss")), judged, latents)


class Stored(NamedTuple):
    """Traces by arm and training seed, the budget of all of them, and how many rest on other files than `data` has."""

    traces: dict[str, dict[int, Trace]]
    budget: Budget
    outdated: int


def stored(name: str, folder: str | Path = STORED) -> Stored:
    """Read the runs of a plan, in its order; ValueError where there is none, or where they do not belong together."""
    folder, plan = Path(folder) / name, PLANS[name]
    records = _records(folder, plan)
    if not records:
        raise ValueError(f"{folder} holds no runs; `python -m omniforcing_lib sinks --plans {name}` makes them")
    found: dict[str, dict[int, Trace]] = {arm: {} for arm in plan.arms}
    for record in sorted(records, key=lambda record: record["seed"]):
        found[record["arm"]][record["seed"]] = unpacked(record["trace"])
    files_here = origins.of("teacher", "ode_pairs")["files"]
    outdated = sum(record["files"] != files_here for record in records)
    return Stored({arm: runs for arm, runs in found.items() if runs}, Budget(**records[0]["budget"]), outdated)


def differences(traces: Mapping[str, Mapping[int, Trace]], base: str = BASE) -> dict[str, verdicts.OverSeeds]:
    """Subtract the base's final loss from every other arm's, seed by seed; intervals hold for all arms together.

    Seeds that only one of the two has do not count; ValueError where they share none.
    """
    others, result = [arm for arm in traces if arm != base], {}
    for arm in others:
        shared = sorted(traces[arm].keys() & traces[base].keys())
        if not shared:
            raise ValueError(f"{arm!r} and {base!r} share no training seed: run both with the same --seeds")
        result[arm] = verdicts.over_seeds(
            [traces[arm][seed].final - traces[base][seed].final for seed in shared], comparisons=len(others)
        )
    return result


def table(traces: Mapping[str, Mapping[int, Trace]], base: str = BASE) -> list[dict[str, object]]:
    """Give arms as rows: final loss, its difference from the base's, the first latent's, gradients, broken runs."""
    apart, lines = differences(traces, base) if base in traces else {}, []
    for arm, runs in traces.items():
        summary = sinks.summarise([*runs.values()])
        ends = [trace.latents[max(trace.latents)][0] for trace in runs.values()]
        lines.append(
            {
                "arm": arm,
                "loss after": _shown(verdicts.over_seeds([trace.final for trace in runs.values()])),
                f"minus {base}": _shown(apart[arm]) if arm in apart else "—",
                "audio latent 0": _shown(verdicts.over_seeds(ends)),
                "largest gradient norm": summary.norm,
                "without the sinks' own": summary.rest_norm,
                "broke": f"{summary.broken} of {len(runs)}",
            }
        )
    return lines


def _shown(found: verdicts.OverSeeds) -> str:
    mean, interval = found
    edges = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
    return f"{mean:.4f}{edges}" if math.isfinite(mean) else "—"


def phase_grid(traces: Mapping[str, Mapping[int, Trace]]) -> dict[str, dict[str, sinks.Summary]]:
    """Give the runs of `phase` by row and column: what `plots.phase` draws; a run that is not there yet is left out."""
    return {
        row: {
            column: sinks.summarise([*traces[f"{row}, {column}"].values()])
            for column in COLUMNS
            if f"{row}, {column}" in traces
        }
        for row in ROWS
    }
