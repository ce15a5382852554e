"""What keeps a student from collapsing: short runs of Stage 3 from the shipped Stage 2, one remedy each.

A `Remedy` says what is changed; `run` trains and measures every remedy and training seed, one JSON file each, so that
it goes on where it stopped; `TRIALS` reads them. All runs take about the time of the DMD run. Clips are of selection
seeds (`protocol.SELECTION`): a choice may be made by these numbers, and no report of a shipped file uses them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from omniforcing_lib import losses
from omniforcing_lib.bounce import codecs, distributions, evaluate, sampling, variety, world
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.flow import Guidance
from omniforcing_lib.layout import AV
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.training.dataset import Clips, Prompts
from omniforcing_lib.training.stage3 import DMDConfig
from omniforcing_lib.training.train import OptimConfig
from omniforcing_lib.transformer import Transformer
from studies import adversarial, distill, protocol, store

STORED = store.ROOT / "reports" / "cures"
START = "stage2"


@dataclass(frozen=True)
class Remedy:
    """Say how Stage 3 is done.

    Attributes:
        objective: `dmd`, `on policy`, `regression` (Stage 2 for longer), or `none`.
        cfg: guidance of the teacher, both streams.
        most: largest timestep at which scores are compared; DMD alone.
        regression: weight of the regression beside DMD; 0 is none.
        gan: weight of a GAN loss beside DMD, see `adversarial`; 0 is none.
        divergence: what DMD is weighed for, see `adversarial.importance`; `reverse KL` is DMD.
        ratio: critic steps for each step of the student; DMD alone.
        work: steps, by those of the DMD run, that take as long.
        batch: clips, by those of the DMD run.
    """

    objective: str = "dmd"
    cfg: float = 3.0
    most: int = losses.MAX_TIMESTEP
    regression: float = 0.0
    gan: float = 0.0
    divergence: str = "reverse KL"
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
    "DMD and discriminator": Remedy(gan=1.0, work=0.75),
    "DMD, forward KL": Remedy(divergence="forward KL", work=0.75),
    "DMD, forward KL, and discriminator": Remedy(gan=1.0, divergence="forward KL", work=0.75),
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
        batch: clips per step.
        seconds: length of the clips that are trained on.
        lr: learning rates of student and critic.
        clips: clips of 5 seconds that are measured, prompts in turn.
    """

    steps: int = 45
    batch: int = 4
    seconds: int = 3
    lr: tuple[float, float] = (1.5e-4, 3e-4)
    clips: int = 72


def run(folder: str | Path, *, names: Sequence[str] = (), seeds: int = 3, budget: Budget = Budget()) -> Path:
    """Train and measure remedies seed by seed; finished runs in the folder are kept.

    Raises ValueError for an unknown remedy, or a folder with runs of another budget.
    """
    settings = {"budget": json.loads(json.dumps(asdict(budget)))}

    def prepare():
        judged, reference = store.origin("teacher", START, "codec", "ode_pairs"), _reference(budget)

        def trial(name: str, seed: int) -> dict[str, object]:
            began = time.monotonic()
            student = _treated(REMEDIES[name], budget, seed)
            return judged | {"minutes": (time.monotonic() - began) / 60} | _measures(student, budget, seed, reference)

        return trial

    return TRIALS.run(folder, names, seeds, lambda record: settings, prepare)


def _treated(remedy: Remedy, budget: Budget, seed: int) -> Transformer:
    start, causal, codec = checkpoints.load(START), checkpoints.read(START).causal, codecs.shipped_codec()
    if remedy.objective == "none":
        return start
    prompts, steps = Prompts.of(TinyText(), world.prompts()), max(1, round(budget.steps * remedy.work))
    pairs = distill.teacher_pairs("", codec, prompts, causal, 90)
    batch, guidance = budget.batch * remedy.batch, Guidance(cfg=AV(remedy.cfg, remedy.cfg))
    course = distill.Course("teacher", prompts, causal, codec, batch, seconds=budget.seconds, seed=seed)
    if remedy.objective == "regression":
        optim = OptimConfig(lr=budget.lr[0], warmup=3, ema=distill.last_part(steps, 4))
        return course.stage2(start, pairs, steps=steps, optim=optim).student
    if remedy.objective == "on policy":
        return course.on_policy(start, pairs, steps=steps, guidance=guidance).student
    config = DMDConfig(guidance, remedy.ratio, most=remedy.most, regression=remedy.regression)
    how = {"steps": steps, "lr": budget.lr, "config": config, "pairs": pairs if remedy.regression else None}
    if remedy.gan or remedy.divergence != "reverse KL":
        real = Clips(distill.ends(distill.cut(pairs, slice(None), codec.clock.latents(budget.seconds))), pairs.prompt)
        parts = {"real": real, "gan": remedy.gan, "divergence": remedy.divergence, "seed": seed}
        how["method"] = partial(adversarial.AdversarialForcing, **parts)
    return course.stage3(start, **how).student


def _reference(budget: Budget) -> protocol.Reference:
    return protocol.Reference.of(protocol.Trial(budget.clips, seeds=1, first=protocol.SELECTION), mp4=False)


@torch.inference_mode()
def _measures(student: Transformer, budget: Budget, seed: int, reference: protocol.Reference) -> dict[str, object]:
    """Measure a student's clips, of noise that this seed alone has; the motions are kept too."""
    trial = protocol.Trial(budget.clips, seeds=1, first=protocol.SELECTION + 1000 * seed)
    codec, causal = codecs.shipped_codec(), checkpoints.read(START).causal
    clips = sampling.sample(student, causal, codec, trial.prompts, trial.numbers, trial.seconds, batch=18)
    readings = evaluate.read_all(clips)
    described = variety.described(readings)
    row = evaluate.estimates(evaluate.tallies(readings, trial.prompts), draws=1)
    row |= variety.compared(reference.described, described)
    distances = protocol.distances(reference, distributions.feature_sets(clips))
    return {
        "measures": {name: round(estimate.mean, 4) for name, estimate in row.items()} | distances,
        "quadrants": variety.quadrants(described.moves).tolist(),
        "motions": described.moves.round(1).tolist(),
    }


TRIALS = store.Trials(REMEDIES, "cures", lambda record: record["measures"], same=("budget",))
