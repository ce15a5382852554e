"""What the paper's ideas do in a world where they have something to do, one thing changed at a time.

In the extended world (`world.scene(..., hum=True, hidden=True)`) only what was heard tells the pitch of the hum, and
only the sound of the wall that nobody sees tells when the ball returns. Every arm trains Stages 2 and 3 from one
teacher of that world, Stage 3 as the shipped student had it (`stage3.OnPolicy`), goes on from a true past, and is
judged by what becomes of the hum and of the ball. A seed is that of both stages and of the roll-outs; it is the unit
of every interval, and arms are compared seed by seed.

Shapes: B batch, F video and T audio latents, n clips.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from omniforcing_lib import files, masks
from omniforcing_lib.bounce import codecs, evaluate, heard, sampling, world
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.cache import KVCache, OpenBlock, Places
from omniforcing_lib.flow import MINIATURE_GUIDANCE, ONES
from omniforcing_lib.layout import AV
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.rollout import RolloutConfig, join, new_cache, next_block, seeded_noise, update_cache
from omniforcing_lib.training.dataset import Prompts
from omniforcing_lib.training.train_config import known
from omniforcing_lib.transformer import Transformer
from studies import ablations, distill, sinks, store, variants

STORED = store.ROOT / "reports" / "extended"
CLIP_SECONDS = 5
FLOOR = ", another sound"
FIRST_LATENT = "loss of audio latent 0"
SAYS = ("shown", "against", "not shown")


@dataclass(frozen=True)
class Arm:
    """Say what is changed against the paper's recipe.

    Attributes:
        sinks: audio sink tokens.
        prefix: whether roll-outs see block 0, sinks included, after it has left the window. Training does in any case.
        window: past blocks that are seen besides block 0. Training clips have no more than five.
        audio_loss: weight of the audio's loss in Stage 3.
        hears: whether video attends to audio.
        past: whose past Stage 3 learns from: the student's `own`, or a `true` one.
    """

    sinks: int = 16
    prefix: bool = True
    window: int = 4
    audio_loss: float = 1.0
    hears: bool = True
    past: str = "own"

    @property
    def causal(self) -> RolloutConfig:
        """Blocks, steps and window of the student."""
        return RolloutConfig.from_layout("paper", self.sinks, window=self.window)

    def in_training(self, frames: int) -> Arm:
        """Give what of the arm clips of `frames` video latents show: no window is longer than they, and none leaves."""
        longest = self.causal.layout.count(frames) - 2
        return replace(self, prefix=Arm.prefix, window=min(self.window, longest))


ARMS: dict[str, Arm] = {
    "as in the paper": Arm(),
    "0 sinks": Arm(sinks=0),
    "2 sinks": Arm(sinks=2),
    "no global prefix in use": Arm(prefix=False),
    "window 2": Arm(window=2),
    "window 8": Arm(window=8),
    "no audio loss": Arm(audio_loss=0.0),
    "video hears nothing": Arm(hears=False),
    "true past": Arm(past="true"),
}
BASE = "as in the paper"
MEMORY = (BASE, "0 sinks", "2 sinks", "no global prefix in use", "window 2", "window 8")
TOGETHER = (BASE, "no audio loss", "video hears nothing", "true past")
"""Arms that ask what is remembered, and what sight and sound have of one another."""
PREDICTIONS: dict[str, dict[str, int]] = {
    "0 sinks": {"hum_kept": -1, FIRST_LATENT: 1},
    "2 sinks": {"hum_kept": -1, FIRST_LATENT: 1},
    "no global prefix in use": {"hum_kept": -1, "hum_drift_cents": 1},
    "window 2": {"hum_kept": -1},
    "window 8": {"hum_kept": 1},
    "no audio loss": {"hum_kept": -1, "reentry_right": -1, "reentry_frames": 1},
    "video hears nothing": {"reentry_right": -1, "reentry_frames": 1},
    "true past": {"hum_kept": -1, "reentry_right": -1, "reentry_frames": 1},
}
"""What each arm was expected to do to a measure, less the paper's recipe, before any run: lower or higher."""


@dataclass(frozen=True)
class Budget(ablations.Budget):
    """Say how much work every run does.

    Attributes:
        given: seconds of a true clip that its roll-outs go on from.
        cfg: guidance of the teacher's ends, both streams.
    """

    start: int = 200
    steps: int = 50
    clips: int = 18
    seconds: int = 60
    given: int = 5
    cfg: float = 1.0

    @property
    def late(self) -> int:
        """First second of a roll-out that no arm's window shows the true past."""
        return self.given + max(arm.window for arm in ARMS.values()) + 2

    def __post_init__(self) -> None:
        if self.seconds <= self.late:
            raise ValueError(f"the hum is judged from second {self.late} on, found roll-outs of {self.seconds} s")


@dataclass(frozen=True)
class Sources:
    """Name the files that all runs rest on: a teacher of the extended world, its codec, its trajectories."""

    teacher: str
    codec: str
    pairs: str


class WithoutPrefix(KVCache):
    """A cache whose blocks no longer see block 0, sinks included, once it has left the window of `window` blocks."""

    def open(self, k: int, latents: AV[range] | None = None, *, writes: bool = True) -> OpenBlock:
        """Describe block `k`, see `KVCache.open`."""
        block = super().open(k, latents, writes=writes)
        if k <= self.window:
            return block
        places = AV(*map(self._recent, block.places, self.pinned))
        return block._replace(places=places, offset=None)

    @staticmethod
    def _recent(places: Places, pinned: int) -> Places:
        spans = (range(max(span.start, pinned), span.stop) for span in places.history)
        history = tuple(span for span in spans if len(span))
        whole = masks.merged((range(places.write.start, places.write.stop), *history))
        return places._replace(history=history, whole=whole[0] if len(whole) == 1 else None)


def deafened(model: Transformer) -> Transformer:
    """Let video hear nothing: its attention to audio gives zeros from now on, in training too."""
    for block in model.transformer_blocks:
        block.audio_to_video_attn.register_forward_hook(_silence)
    return model


def _silence(module: torch.nn.Module, args: tuple, out: Tensor) -> Tensor:
    return torch.zeros_like(out)


@torch.no_grad()
def continued(
    model: Transformer, arm: Arm, text: AV[Tensor], seeds: Sequence[int], given: AV[Tensor], frames: int
) -> Iterator[AV[Tensor]]:
    """Yield the blocks of clips that go on from a true past: its blocks first, then the student's own.

    Shapes: text AV [B, L, C], given AV([B, F, h, w, C], [B, T, C]) of whole blocks; to AV of each block.
    """
    causal, grid = arm.causal, given.video.shape[2:4]
    blocks, past = causal.layout.blocks(frames), causal.layout.count(given.video.shape[1])
    cache = new_cache(model, causal, tuple(grid), len(seeds))
    if not arm.prefix:
        cache = WithoutPrefix(**{part.name: getattr(cache, part.name) for part in fields(cache) if part.init})
    noise, before = seeded_noise(seeds, model.proj_out.weight), None
    for k, block in enumerate(blocks):
        if k < past:
            if before is not None:
                update_cache(model, cache, k - 1, text, before, 0.0)
            before = given.map(lambda clip, span: clip[:, span.start : span.stop], block)
        else:
            before = next_block(model, causal, cache, text, noise, k, before, block=block)
        yield before


def run(
    folder: str | Path, sources: Sources, *, arms: Sequence[str] = (), seeds: int = 5, budget: Budget | None = None
) -> Path:
    """Train and measure arms seed by seed; finished runs in the folder are kept.

    Raises ValueError for an unknown arm, a file that is not what it should be, trajectories of another teacher or other
    guidance, or a folder with runs of another budget, other files, or an arm that meant something else.
    """
    budget = budget or Budget()
    bench = _Bench(sources, budget)
    judged = store.origin(sources.teacher, beside=[sources.codec, sources.pairs])
    common = {"budget": json.loads(json.dumps(asdict(budget))), "files": judged["files"]}

    def settings(record: Mapping) -> dict[str, object]:
        return common | {"changed": asdict(ARMS[record["arm"]])}

    def prepare():
        return lambda name, seed: {"git": judged["git"]} | bench.trial(ARMS[name], seed)

    return TRIALS.run(folder, arms, seeds, settings, prepare)


class _Bench:
    """Hold what all runs share: codec, prompts and trajectories."""

    def __init__(self, sources: Sources, budget: Budget) -> None:
        self.sources, self.budget, self.codec = sources, budget, codecs.load_codec(sources.codec)
        codecs.check_codec(sources.teacher, checkpoints.read(sources.teacher).notes, sources.codec)
        self.prompts = Prompts.of(TinyText(), world.prompts())
        made = {"teacher": known(sources.teacher, "checkpoint"), "cfg": [budget.cfg] * 2}
        pairs = distill.stored_pairs(sources.pairs, self.prompts, RolloutConfig(), **made)
        held = max(1, len(pairs) // 8)
        self.pairs, self.held = (distill.cut(pairs, rows) for rows in (slice(-held), slice(-held, None)))
        self.models: dict[tuple[Arm, str], Transformer] = {}
        self.seed = -1

    def trial(self, arm: Arm, seed: int) -> dict[str, object]:
        """Train and measure one arm with one seed."""
        student = self._student(arm, seed)
        measures, by_second = self._measures(student, arm, seed)
        measures |= self._first_latents(student, arm)
        return {"measures": store.plain(measures), "by_second": store.plain(by_second)}

    def _student(self, arm: Arm, seed: int) -> Transformer:
        """Train an arm's student, or take that of an arm that trains alike: some change roll-outs alone."""
        arm, budget = arm.in_training(self.codec.clock.latents(CLIP_SECONDS).video), self.budget
        common = self.sources.teacher, self.prompts, arm.causal, self.codec, budget.batch
        course = distill.Course(*common, seconds=CLIP_SECONDS, seed=seed)

        def start() -> Transformer:
            model = course.load(arm.sinks)
            return course.stage2(model if arm.hears else deafened(model), self.pairs, steps=budget.start).student

        def end() -> Transformer:
            begun = self._once((replace(arm, audio_loss=Arm.audio_loss, past=Arm.past), "started"), seed, start)
            clips, guidance = course.clips, replace(MINIATURE_GUIDANCE, cfg=AV(budget.cfg, budget.cfg))
            if arm.past == "true":
                clips = ablations.ClipsOnTruePast(**vars(clips), pairs=self.pairs)
            how = {"guidance": guidance, "weights": AV(ONES.video, arm.audio_loss), "clips": clips}
            return course.on_policy(begun, self.pairs, steps=budget.steps, **how).student

        return self._once((arm, "ended"), seed, end)

    def _once(self, what: tuple[Arm, str], seed: int, make: Callable[[], Transformer]) -> Transformer:
        """Make a model once; those of one seed are kept, since its runs follow one another."""
        if seed != self.seed:
            self.models, self.seed = {}, seed
        if what not in self.models:
            self.models[what] = make()
        return self.models[what]

    def _measures(self, student: Transformer, arm: Arm, seed: int) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Measure clips that go on from a true past: all in all, and their hum second by second."""
        budget, first = self.budget, world.HELD_OUT + 800_000 + 1000 * seed
        names, seeds = world.prompts_in_turn(budget.clips), range(first, first + budget.clips)
        scenes = [world.scene(s, name, hum=True, hidden=True) for s, name in zip(seeds, names, strict=True)]
        true = [world.render(scene, seconds=budget.given) for scene in scenes]
        frames = self.codec.clock.latents(budget.seconds).video
        text = TinyText().encode(names)
        blocks = continued(student, arm, text, seeds, sampling.encoded(self.codec, true), frames)
        total = arm.causal.layout.count(frames)
        clips = sampling.decoded(self.codec, join([*tqdm(blocks, "going on", total, leave=False, delay=2)]))
        readings = evaluate.read_all(clips)
        hearings, cents = [*map(heard.hear, readings)], [scene.hum_cents for scene in scenes]
        counts = evaluate.tallies(readings, names, budget.given)
        others = [*hearings[1:], hearings[0]]
        counts = [c | self._heard(*heard_of) for c, *heard_of in zip(counts, hearings, cents, others, strict=True)]
        seconds = heard.hum_by_second(hearings, cents, draws=1).values()
        by_second = {name: [second[name].mean for second in seconds] for name in ("hum_kept", "hum_drift_cents")}
        return {name: estimate.mean for name, estimate in evaluate.estimates(counts, draws=1).items()}, by_second

    def _heard(self, hearing: heard.Hearing, cents: float, other: heard.Hearing) -> evaluate.Tally:
        """Count what is heard after the true past has left every arm's window, and returns after it has ended.

        Returns are also judged by another clip's sound: the floor.
        """
        own = hearing._replace(passages=[p for p in hearing.passages if p.out.time_s >= self.budget.given])
        floor = heard.reentry_tally(own._replace(right=other.right))
        hum = heard.hum_tally(hearing, cents, self.budget.late)
        # The first latent is the true past's own.
        hum = {name: count for name, count in hum.items() if not name.startswith("hum_first")}
        return hum | heard.reentry_tally(own) | {name + FLOOR: count for name, count in floor.items()}

    def _first_latents(self, student: Transformer, arm: Arm) -> dict[str, float]:
        study = sinks.Study(self.sources.teacher, self.prompts, self.pairs, self.held)
        built = variants.masks_of(arm.causal, self.held.states.video[:, 0])
        with torch.no_grad():
            audio = sinks.one_step(student, built, study).audio
        return {FIRST_LATENT: float(audio[:, 0].mean()), "of all others": float(audio[:, 1:].mean())}


def _measured(record: Mapping) -> dict[str, float]:
    """Give the numbers of a run; what was not to be measured is NaN."""
    return {name: math.nan if value is None else value for name, value in record["measures"].items()}


TRIALS = store.Trials(ARMS, "extended", _measured, same=("budget", "files"))
"""The runs; they have to agree on budget and files."""


def shipped() -> Sources:
    """Name the files of the extended world in data/."""
    return Sources(*(str(files.DATA / f"{name}_hum.safetensors") for name in ("teacher", "codec", "ode_pairs")))


def outdated(folder: str | Path = STORED) -> int:
    """Count runs that rest on other files than `data` has."""
    there = shipped()
    here = store.origin(there.teacher, beside=[there.codec, there.pairs])["files"]
    return sum(record["files"] != here for record in store.read(folder))


def by_second(folder: str | Path, measure: str) -> dict[str, tuple[list[int], list[float]]]:
    """Follow a measure of the hum along the roll-outs: arm -> seconds and means over training seeds.

    `hum_kept` is the share of clips within 20 cents of the true hum, `hum_drift_cents` the mean distance of those that
    hum at all; a second in which no clip of any seed hums is NaN.
    """
    curves = {}
    for arm, runs in TRIALS.runs(folder).items():
        rows = np.array([run["by_second"][measure] for run in runs.values()], dtype=float)
        heard, total = np.isfinite(rows).sum(0), np.nansum(rows, 0)
        means = np.divide(total, heard, where=heard > 0, out=np.full(len(total), math.nan)).tolist()
        curves[arm] = ([*range(len(means))], means)
    return curves


def verdicts(rows: Sequence[Mapping[str, object]]) -> str:
    """List which predictions of some rows of `told` were shown, which went the other way, and which neither."""
    named = {says: [f"{row['arm']}: {row['measure']}" for row in rows if row["says"] == says] for says in SAYS}
    return "\n".join(f"{says}: {'; '.join(found) or 'none'}" for says, found in named.items())


def told(folder: str | Path) -> list[dict[str, object]]:
    """Say of every prediction, over training seeds: its whole interval is on its side (`shown`), or on the other one.

    Differences are from the paper's recipe, corrected for the number of arms. Raises ValueError where no runs are.
    """
    rows = []
    for arm, gains in TRIALS.gains(folder, BASE).items():
        for name, sign in PREDICTIONS[arm].items():
            mean, interval = gains[name]
            low, high = sorted(sign * edge for edge in interval or (-math.inf, math.inf))
            says = "shown" if low > 0 else "against" if high < 0 else "not shown"
            wanted = "higher" if sign > 0 else "lower"
            rows.append(
                {"arm": arm, "measure": name, "predicted": wanted, "gain": mean, "interval": interval, "says": says}
            )
    return rows
