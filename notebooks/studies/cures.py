"""What keeps a student from collapsing: short runs of Stage 3 from the shipped Stage 2, one remedy each.

A `Remedy` says what is changed; `run` trains and measures every remedy and training seed, one JSON file each, so that
it goes on where it stopped; `table` reads them. All runs take about the time of the DMD run. Clips are of selection
seeds (`protocol.SELECTION`): a choice may be made by these numbers, and no report of a shipped file uses them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from omniforcing_lib import files, losses
from omniforcing_lib.bounce import codecs, distributions, evaluate, variety, world
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.flow import Guidance
from omniforcing_lib.layout import AV
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.training import stages, train
from omniforcing_lib.training.dataset import Prompts
from omniforcing_lib.training.train import Learner, OptimConfig
from omniforcing_lib.transformer import Transformer
from series import origins, verdicts
from studies import distill, exposure_bias, protocol, stored_runs

STORED = files.DATA.parent / "reports" / "cures"
START = "stage2"


@dataclass(frozen=True)
class Remedy:
    """Say how Stage 3 is done.

    Attributes:
        objective: `dmd`, `on policy`, `regression` (Stage 2 for longer), or `none`.
        cfg: guidance of the teacher, both streams.
        most: largest timestep at which scores are compared; DMD alone.
        regression: weight of the regression beside DMD; 0 is none.
        ratio: critic steps for each step of the student; DMD alone.
        work: steps, by those of the DMD run, that take as long.
        batch: clips, by those of the DMD run.
    """

    objective: str = "dmd"
    cfg: float = 3.0
    most: int = losses.MAX_TIMESTEP
    regression: float = 0.0
    ratio: int = 5
    work: float = 1.0
    batch: int = 1


REMEDIES: dict[str, Remedy] = {
    "Stage 2": Remedy("none"),
    "Stage 2 for longer": Remedy("regression", work=6),
    "DMD": Remedy(),
    "DMD, CFG 1": Remedy(cfg=1.0),
    "DMD, CFG 2": Remedy(cfg=2.0),
    "DMD and regression": Remedy(regression=2.0, work=0.9),
    "DMD, CFG 1, and regression": Remedy(cfg=1.0, regression=2.0, work=0.9),
    "DMD at low noise": Remedy(most=400),
    "DMD, ten critic steps": Remedy(ratio=10, work=0.55),
    "DMD, twice the clips": Remedy(batch=2, work=0.55),
    "on policy": Remedy("on policy", work=2),
}


@dataclass(frozen=True)
class Budget:
    """Say how much work every run does.

    Attributes:
        steps: student steps of the DMD run.
        batch: clips a step.
        seconds: length of the clips that are trained on.
        lr: learning rates of student and critic.
        clips: clips of 5 seconds that are measured, prompts in turn.
    """

    steps: int = 45
    batch: int = 4
    seconds: int = 3
    lr: tuple[float, float] = (1.5e-4, 3e-4)
    clips: int = 72


def run(
    folder: str | Path, *, names: Sequence[str] = tuple(REMEDIES), seeds: int = 3, budget: Budget = Budget()
) -> Path:
    """Train and measure remedies seed by seed; finished runs in the folder are kept.

    Raises ValueError for an unknown remedy, or a folder with runs of another budget.
    """
    if unknown := sorted({*names} - {*REMEDIES}):
        raise ValueError(f"unknown remedies {', '.join(unknown)}; choose from {', '.join(REMEDIES)}")
    folder, limits = Path(folder), json.loads(json.dumps(asdict(budget)))
    for record in stored_runs.read(folder).values():
        if record["budget"] != limits:
            raise ValueError(f"{folder} holds runs of {record['budget']}, asked for {limits}: use another folder")
    judged = origins.of("teacher", START, "codec", "ode_pairs")
    judge = _Judge(budget)
    for seed in range(seeds):
        for name in names:
            path = stored_runs.path_of(folder, name, seed)
            if not path.exists():
                begun = time.monotonic()
                student = _treated(REMEDIES[name], budget, seed)
                record = {"remedy": name, "seed": seed, "budget": limits, "minutes": (time.monotonic() - begun) / 60}
                stored_runs.write(path, judged | record | judge.measures(student, seed))
    return folder


def _treated(remedy: Remedy, budget: Budget, seed: int) -> Transformer:
    start, causal, codec = checkpoints.load(START), checkpoints.read(START).causal, codecs.shipped_codec()
    prompts, batch, steps = Prompts.of(TinyText(), world.prompts()), budget.batch * remedy.batch, budget.steps
    steps, guidance = max(1, round(steps * remedy.work)), Guidance(cfg=AV(remedy.cfg, remedy.cfg))
    if remedy.objective == "none":
        return start
    how = {"steps": steps, "batch": batch, "seconds": budget.seconds, "guidance": guidance, "seed": seed}
    pairs = distill.teacher_pairs("", codec, prompts, causal, 90)
    if remedy.objective == "on policy":
        return distill.on_policy(start, "teacher", pairs, prompts, causal, codec, lr=1e-4, **how).student
    if remedy.objective == "regression":
        player = Learner(start, OptimConfig(lr=budget.lr[0], warmup=3, ema=max(0.0, 1 - 4 / steps)))
        step = stages.ode_stage(player, pairs, prompts, causal, batch)
        train.fit(step, {"student": player}, steps, seed=seed, label="stage 2", leave=False)
        return player.best.eval()
    how |= {"ratio": remedy.ratio, "lr": budget.lr, "most": remedy.most, "regression": remedy.regression}
    return distill.stage3(start, "teacher", prompts, causal, codec, **how, pairs=pairs).student


class _Judge:
    """Hold the real clips that all students are compared with."""

    def __init__(self, budget: Budget) -> None:
        self.trial = protocol.Trial(budget.clips, seeds=1, first=protocol.SELECTION)
        self.reference = protocol.Reference.of(self.trial, mp4=False)
        self.codec, self.causal = codecs.shipped_codec(), checkpoints.read(START).causal

    @torch.inference_mode()
    def measures(self, student: Transformer, seed: int) -> dict[str, object]:
        """Measure a student's clips, of noise that this seed alone has; the motions are kept too."""
        trial = protocol.Trial(self.trial.clips, seeds=1, first=protocol.SELECTION + 1000 * seed)
        latents = exposure_bias.roll(student, self.causal, self.codec, trial.prompts, trial.numbers, trial.seconds)
        clips = exposure_bias.decoded(self.codec, latents)
        readings = evaluate.read_all(clips)
        tallies = [evaluate.tally(r, p) for r, p in zip(readings, trial.prompts, strict=True)]
        found = variety.described(readings)
        row = evaluate.estimates(tallies, draws=1) | variety.compared(self.reference.described, found)
        return {
            "measures": {name: round(estimate.mean, 4) for name, estimate in row.items()}
            | protocol.distances(self.reference, distributions.feature_sets(clips)),
            "quadrants": variety.quadrants(found.moves).tolist(),
            "motions": found.moves.round(1).tolist(),
        }


def table(folder: str | Path = STORED) -> dict[str, dict[str, verdicts.OverSeeds]]:
    """Average over training seeds: remedy -> measure -> mean and 95 % interval over seeds, none for one seed.

    Raises ValueError where there is no run.
    """
    found = stored_runs.read(folder).values()
    if not found:
        raise ValueError(f"{folder} holds no runs; `python -m omniforcing_lib cures` makes them")
    by_name = {name: [r["measures"] for r in found if r["remedy"] == name] for name in REMEDIES}
    return {
        name: {measure: verdicts.over_seeds([run[measure] for run in runs]) for measure in runs[0]}
        for name, runs in by_name.items()
        if runs
    }
