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

from omniforcing_lib import model_bundle
from omniforcing_lib.layout import AV
from studies import sinks, store
from studies.sinks import Trace
from studies.store import OverSeeds, Trials
from studies.variants import Variant

STORED = store.ROOT / "reports" / "sinks"
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
UNCLIPPED = {
    "0 sinks": Variant(sinks=0, clip=math.inf),
    BASE: Variant(clip=math.inf),
    "learned bias": Variant(sinks=0, stabiliser="bias", clip=math.inf),
}
NORMS = {"": "rms", ", no QK-norm": "plain"}
SCALES, RATES = (1.0, 8.0, 32.0, 128.0), (5e-4, 5e-3)
ROWS = {f"{arm}{norms}": replace(UNCLIPPED[arm], norms=NORMS[norms]) for norms, arm in product(NORMS, UNCLIPPED)}
COLUMNS = {f"x {s:g}, rate {r:g}": {"sharpen": s, "lr": r} for r, s in product(RATES, SCALES)}
PHASE = {f"{row}, {column}": replace(ROWS[row], **COLUMNS[column]) for row, column in product(ROWS, COLUMNS)}


@dataclass(frozen=True)
class Budget:
    """Say how much work every run of a plan does.

    Attributes:
        steps: of Stage 2.
        batch: trajectories per step.
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
    """The runs of a plan, training seeds of each arm, and the budget of every run."""

    trials: Trials
    seeds: int
    budget: Budget


def measured(record: Mapping) -> dict[str, float]:
    """Give the final loss of a stored run."""
    return {"loss": unpacked(record["trace"]).final}


PLANS = {
    name: Plan(Trials(arms, f"sinks --plans {name}", measured), seeds, budget)
    for name, arms, seeds, budget in (("study", ARMS, 5, Budget()), ("phase", PHASE, 1, Budget(steps=40)))
}


def run(name: str, folder: str | Path = STORED, *, arms: Sequence[str] = (), seeds: int = 0, steps: int = 0) -> Path:
    """Train what a plan asks for and is not in its folder yet, seed by seed; return that folder.

    `arms`, `seeds` and `steps` replace the plan's own. Raises ValueError, before any training, for an unknown arm, a
    negative number, or a folder with runs of another budget, arm or teacher.
    """
    plan = PLANS[name]
    if min(seeds, steps) < 0:
        raise ValueError(f"seeds and steps are 1 or more, or 0 for the plan's own; found {seeds} and {steps}")
    budget = replace(plan.budget, steps=steps or plan.budget.steps)
    origin = store.origin("teacher", "ode_pairs")

    def prepare():
        amount = {"pairs": budget.pairs, "held": budget.held, "seconds": budget.seconds}
        study = sinks.prepare(model_bundle.of("teacher"), **amount)

        def trial(arm: str, seed: int) -> dict[str, object]:
            began = time.process_time()
            work = {"steps": budget.steps, "batch": budget.batch}
            trace = sinks.train(plan.trials.arms[arm], study, seed=seed, every=100, **work)
            seconds = round(time.process_time() - began, 1)
            return {"git": origin["git"], "cpu_s": seconds, "trace": packed(trace)}

        return trial

    def settings(record: Mapping) -> dict[str, object]:
        return _settings(plan, record, budget) | {"files": origin["files"]}

    return plan.trials.run(Path(folder) / name, arms, seeds or plan.seeds, settings, prepare)


def _settings(plan: Plan, record: Mapping, budget: Budget) -> dict[str, object]:
    """Say what a run of an arm is, as JSON reads it back; an arm that is no more has no variant."""
    variant = plan.trials.arms.get(record["arm"])
    return {"variant": variant and store.plain(asdict(variant)), "budget": asdict(budget)}


def packed(trace: Trace) -> dict[str, object]:
    """Give a trace as JSON holds it: four digits, and null for what is not finite."""
    return store.plain(asdict(trace))


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
    budget = next((Budget(**record["budget"]) for record in store.read(folder)), plan.budget)
    runs = plan.trials.runs(folder, lambda record: _settings(plan, record, budget))
    traces = {arm: {seed: unpacked(record["trace"]) for seed, record in seeds.items()} for arm, seeds in runs.items()}
    here = store.origin("teacher", "ode_pairs")["files"]
    return Stored(traces, budget, sum(record["files"] != here for seeds in runs.values() for record in seeds.values()))


def differences(traces: Mapping[str, Mapping[int, Trace]], base: str = BASE) -> dict[str, OverSeeds]:
    """Subtract the base's final loss from every other arm's, seed by seed; intervals hold for all arms together.

    Seeds that only one of the two has do not count; ValueError where they share none.
    """
    losses = {arm: {seed: {"loss": trace.final} for seed, trace in runs.items()} for arm, runs in traces.items()}
    apart = {arm: row["loss"] for arm, row in store.over_base(losses, base).items()}
    if alone := [arm for arm in traces if arm != base and arm not in apart]:
        raise ValueError(f"{alone[0]!r} and {base!r} share no training seed: run both with the same --seeds")
    return apart


def table(traces: Mapping[str, Mapping[int, Trace]], base: str = BASE) -> list[dict[str, object]]:
    """Give arms as rows: final loss, its difference from the base's, the first latent's, gradients, broken runs."""
    apart, rows = differences(traces, base) if base in traces else {}, []
    for arm, runs in traces.items():
        summary = sinks.summarise([*runs.values()])
        ends = [trace.latents[max(trace.latents)][0] for trace in runs.values()]
        rows.append(
            {
                "arm": arm,
                "loss after": _shown(store.over_seeds([trace.final for trace in runs.values()])),
                f"minus {base}": _shown(apart[arm]) if arm in apart else "—",
                "audio latent 0": _shown(store.over_seeds(ends)),
                "largest gradient norm": summary.norm,
                "without the sinks' own": summary.rest_norm,
                "broke": f"{summary.broken} of {len(runs)}",
            }
        )
    return rows


def _shown(estimate: OverSeeds) -> str:
    mean, interval = estimate
    edges = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
    return f"{mean:.4f}{edges}" if math.isfinite(mean) else "—"


def phase_grid(traces: Mapping[str, Mapping[int, Trace]]) -> dict[str, dict[str, sinks.Summary]]:
    """Give the runs of `phase` by row and column: what `plots.phase` draws; a run that is not there yet is left out."""
    places = {row: {column: traces.get(f"{row}, {column}") for column in COLUMNS} for row in ROWS}
    return {
        row: {column: sinks.summarise([*runs.values()]) for column, runs in line.items() if runs}
        for row, line in places.items()
    }
