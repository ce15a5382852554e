"""One training loop and the stages over it (paper Sec. 3.3 and 4; spec 5).

A stage is a function `step(i, generator) -> numbers`; a `Player` is a model with its optimiser and average. All
randomness of step i comes from (seed, i), so a killed run that resumes ends where an unbroken one does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from omniforcing_lib import losses, masks
from omniforcing_lib.blocks import Block
from omniforcing_lib.flow import DMD_GUIDANCE, ONES, Guidance, guided_denoiser, noised, x0_of
from omniforcing_lib.layout import AV
from omniforcing_lib.rollout import Causal, fresh_noise, join, rollout
from omniforcing_lib.training import journal
from omniforcing_lib.training.dataset import Clips, Pairs, Prompts
from omniforcing_lib.training.distributed import ALONE, PATIENCE_S, UNHURRIED_S, Part, Team, local
from omniforcing_lib.transformer import Transformer

Numbers = dict[str, float | Tensor]
Step = Callable[[int, torch.Generator], Numbers]
Sampler = Callable[[Transformer, torch.Generator, int], tuple[AV[Tensor], AV[Tensor]]]
"""sampler(student, generator, exit step) -> text AV [B, L, C] and clips AV([B, F, h, w, C], [B, T, C]) made for it."""


@dataclass(frozen=True)
class Recipe:
    """Say how one player learns.

    Attributes:
        lr: peak learning rate.
        betas: of AdamW.
        weight_decay: of AdamW, on matrices.
        warmup: steps of linear warm-up.
        steps: length of the cosine decay to `final`; 0 keeps the rate constant.
        final: share of `lr` at the end.
        clip: largest gradient norm.
        ema: decay of the average; 0 keeps none.
        amp: compute in bfloat16 autocast; the weights stay float32.
        limit: gradient norm above which a step changes nothing.
        accumulate: parts that a process cuts its rows of a batch into, one after another.
        recompute: keep of every block its inputs alone, and run it again for its gradients.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warmup: int = 100
    steps: int = 0
    final: float = 0.05
    clip: float = 1.0
    ema: float = 0.999
    amp: bool = False
    limit: float = 1e4
    accumulate: int = 1
    recompute: bool = False

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if not self.steps:
            return self.lr * warm
        done = min(1.0, max(0, step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * warm * (self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2)


class Player:
    """A model that learns: fp32 weights, AdamW, gradient clipping, and an exponential average.

    Args:
        model: what learns; a team shards it.
        recipe: how.
        team: the processes that train it together.
    """

    def __init__(self, model: Transformer, recipe: Recipe, team: Team = ALONE) -> None:
        self.model = team.shard(model, amp=recipe.amp).train().requires_grad_(True)
        self.recipe, self.team = recipe, team
        self._skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.average = None
        if recipe.ema:
            copied = team.twin(model) if team.mesh else copy.deepcopy(model)
            self.average = copied.eval().requires_grad_(False)
        self._blend = get_ema_multi_avg_fn(recipe.ema)
        if recipe.recompute:
            for block in model.transformer_blocks:
                _recompute(block)
        self.optimiser = self._adamw()

    def _adamw(self) -> torch.optim.AdamW:
        recipe, on_gpu = self.recipe, self.device.type == "cuda"
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        # a tensor on the GPU, so that a recorded step follows the schedule
        rate = torch.tensor(recipe.lr, device=self.device) if self.recordable else recipe.lr
        return torch.optim.AdamW(groups, lr=rate, betas=recipe.betas, fused=on_gpu, capturable=self.recordable)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.proj_out.weight.device

    @property
    def skipped(self) -> int:
        """Count the steps that changed nothing."""
        return int(self._skipped)

    @property
    def recordable(self) -> bool:
        """Tell whether a step can be a CUDA graph: one process on a GPU that takes its batch whole."""
        recipe = self.recipe
        return self.device.type == "cuda" and not (self.team.mesh or recipe.accumulate > 1 or recipe.recompute)

    @property
    def best(self) -> Transformer:
        """The average where there is one, the model otherwise."""
        return self.average or self.model

    def autocast(self) -> torch.autocast:
        """Compute in bfloat16 if the recipe says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.amp)

    def tune(self, step: int) -> None:
        """Set the learning rate of a step."""
        for group in self.optimiser.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(self.recipe.rate(step))
            else:
                group["lr"] = self.recipe.rate(step)

    def update(self, loss: Tensor) -> Tensor:
        """Take one step down the loss; return the gradient norm. One that is not finite or too large is skipped."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        return self._descend()

    def learn(
        self,
        batch: int,
        generator: torch.Generator,
        terms: Callable[[Part], Numbers],
        weights: AV[float] = ONES,
    ) -> Numbers:
        """Take one step down a batch, part by part; return its sums and the gradient `norm`.

        `terms` gives what a part adds to the numbers of the batch; `video` and `audio` are its losses. Every part
        draws from the generator as it is now. Gradients are summed over the processes part by part: they are never
        held whole.
        """
        self.optimiser.zero_grad(set_to_none=True)
        parts, sums = self.team.parts(batch, self.recipe.accumulate), []
        start = generator.get_state() if len(parts) > 1 else None
        for part in parts:
            if start is not None:
                generator.set_state(start)
            found = terms(part)
            # FSDP averages over the processes, and these are shares
            (self.team.size * losses.total(AV(found["video"], found["audio"]), weights)).backward()
            sums.append(torch.stack([value.detach().float() for value in found.values()]))
        numbers = self.team.total(sum(sums))
        return dict(zip(found, numbers, strict=True)) | {"norm": self._descend()}

    def _descend(self) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip, foreach=True)
        norm = norm.full_tensor() if self.team.mesh else norm
        bad = ~(norm <= self.recipe.limit)
        self._skipped += bad
        if self.recordable:
            # the fused kernel leaves out a bad step by itself: nothing waits for the GPU
            self.optimiser.found_inf = bad.float()
        elif bad:
            return norm
        self.optimiser.step()
        if self.average:
            self._blend([*map(local, self.average.parameters())], [*map(local, self.model.parameters())], None)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Give weights, average and optimiser state as flat tensors: copies on the CPU, or a team's own shards."""
        out = self._weights()
        for i, entries in self.optimiser.state_dict()["state"].items():
            out |= {f"optimiser.{i}.{k}": v for k, v in entries.items()}
        if self.team.mesh:
            return {k: v.detach() for k, v in out.items()}
        return {k: v.detach().cpu().contiguous().clone() for k, v in out.items()}

    def blank(self) -> dict[str, Tensor]:
        """Give tensors like those of `state`, also where no step has been taken yet."""
        out = self._weights()
        for i, weight in enumerate(self._learning()):
            entries = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight)}
            entries["exp_avg_sq"] = torch.zeros_like(weight)
            out |= {f"optimiser.{i}.{k}": v for k, v in entries.items()}
        return {k: v.detach() for k, v in out.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave, to one process or to a team."""
        own = dict(self.blank())
        state = {k: v if local(v) is not v or not v.dim() else self.team.cut(v, own[k]) for k, v in state.items()}

        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}

        self.model.load_state_dict(part("model."))
        if self.average:
            self.average.load_state_dict(part("average."))
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in part("optimiser.").items():
            index, key = name.split(".")
            entries.setdefault(int(index), {})[key] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": entries, "param_groups": groups})

    def _weights(self) -> dict[str, Tensor]:
        out = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        return out | {f"average.{k}": v for k, v in (self.average.state_dict() if self.average else {}).items()}

    def _learning(self) -> list[nn.Parameter]:
        return [p for group in self.optimiser.param_groups for p in group["params"]]


def _recompute(block: Block) -> None:
    """Let a block keep its inputs alone where gradients flow, and run again when they are asked for."""
    plain = block.forward

    def forward(x: AV[Tensor], condition: AV[object], *, slots: AV | None = None, **skip: bool) -> AV[Tensor]:
        if not torch.is_grad_enabled():
            return plain(x, condition, slots=slots, **skip)
        cache = slots.video.own._cache if slots else None
        then = dict(vars(cache)) if cache else {}

        def run(x: AV[Tensor]) -> AV[Tensor]:
            """Run as then: by now the cache may have another block open."""
            if cache is None:
                return plain(x, condition, **skip)
            now = dict(vars(cache))
            vars(cache).update(then)
            try:
                return plain(x, condition, slots=slots, **skip)
            finally:
                vars(cache).update(now)

        return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)

    block.forward = forward


@dataclass
class History:
    """Numbers of every step, by name."""

    numbers: dict[str, list[float]] = field(default_factory=dict)

    def add(self, numbers: Numbers) -> None:
        """Append one step."""
        for name, value in numbers.items():
            self.numbers.setdefault(name, []).append(value)

    def mean(self, name: str, last: int = 50) -> float:
        """Average the last values of a number."""
        values = [float(v) for v in self.numbers[name][-last:]]
        return sum(values) / len(values)


def fit(
    step: Step,
    players: Mapping[str, Player],
    steps: int,
    *,
    seed: int = 0,
    folder: str | Path | None = None,
    every: int = 500,
    label: str = "training",
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
    give_up: int = 20,
) -> History:
    """Run a stage with a progress bar; with a folder, checkpoint every `every` steps and resume from there.

    A folder belongs to one run at a time. SIGTERM ends a run that has one after the step, with a checkpoint and exit
    code 143. Returns the history of the steps that ran now.

    Raises:
        ValueError: another run has the folder, or its state is of another seed, damaged or of other settings.
        Diverged: `give_up` steps in a row changed nothing, see `Recipe.limit`; their numbers are in the folder.
    """
    first, history, bad = next(iter(players.values())), History(), []
    team, generator = first.team, torch.Generator(first.device)
    with journal.opened(folder, players, seed, team) as book:
        start, shown = book.resume(), progress and team.leads
        bar = tqdm(range(start, steps), desc=label, initial=start, total=steps, disable=not shown, mininterval=1.0)
        for i in bar:
            before = [player.skipped for player in players.values()]
            for player in players.values():
                player.tune(i)
            found = step(i, generator.manual_seed(mixed(seed, i)))
            numbers = {name: float(value) for name, value in found.items()}
            history.add(numbers)
            book.note(i, numbers)
            if i % 20 == 0:
                bar.set_postfix({k: f"{history.mean(k, 20):.3f}" for k in history.numbers})
            skipped = before != [player.skipped for player in players.values()]
            bad = [*bad, {"step": i, **numbers}] if skipped else []
            ended, told = team.any(stop(), book.asked_to_end)
            if (i + 1) % every == 0 or i + 1 == steps or ended or told or len(bad) == give_up:
                book.store(i + 1)
            if len(bad) == give_up:
                raise book.diverged(bad)
            if told:
                print(f"{label}: told to end after step {i + 1}; the same command goes on from there", flush=True)
                raise SystemExit(journal.SIGTERM_CODE)
            if ended:
                break
            if i == start:
                team.hurry(PATIENCE_S)
        team.hurry(UNHURRIED_S)
    return history


def mixed(seed: int, step: int) -> int:
    """Mix seed and step number into the seed of one step."""
    return (seed * 1_000_003 + step) * 2_654_435_761 % 2**63


def recorded(piece: Callable[..., Numbers], *players: Player, live: bool = False) -> Callable[..., Numbers]:
    """Record a piece of a step where that can be done; `live` pieces ask the host for data."""
    return piece if live or not all(player.recordable for player in players) else Recorded(piece)


class Recorded:
    """Record a piece of a step as CUDA graphs, one a key, and replay them; on the CPU just call it.

    A small model keeps a GPU waiting for launches: replayed, the miniature trains several times faster. The piece may
    use no random numbers but the generator's, and may not ask the GPU for a value.
    """

    def __init__(self, piece: Callable[..., Numbers], warm: int = 3) -> None:
        self._piece, self._warm = piece, warm
        self._calls: dict[object, int] = {}
        self._graphs: dict[object, tuple[torch.cuda.CUDAGraph, Numbers]] = {}
        self._own: torch.Generator | None = None

    def __call__(self, generator: torch.Generator, *key: int) -> Numbers:
        """Run with the generator as it was last seeded."""
        if generator.device.type != "cuda":
            return self._piece(generator, *key)
        # a graph stays bound to the generator that it was recorded with
        self._own = self._own or torch.Generator(generator.device)
        generator = self._own.manual_seed(generator.initial_seed())
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] <= self._warm:
            return self._warm_up(generator, key)
        if key not in self._graphs:
            self._graphs[key] = self._record(generator, key)
        graph, numbers = self._graphs[key]
        graph.replay()
        return {name: value.clone() for name, value in numbers.items()}

    def _warm_up(self, generator: torch.Generator, key: tuple[int, ...]) -> Numbers:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            numbers = self._piece(generator, *key)
        torch.cuda.current_stream().wait_stream(side)
        return numbers

    def _record(self, generator: torch.Generator, key: tuple[int, ...]) -> tuple[torch.cuda.CUDAGraph, Numbers]:
        graph, seed = torch.cuda.CUDAGraph(), generator.initial_seed()
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            numbers = self._piece(generator, *key)
        generator.manual_seed(seed)
        return graph, numbers


def pick(count: int, batch: int, generator: torch.Generator) -> Tensor:
    """Draw `batch` numbers below `count`."""
    return torch.randint(count, (batch,), generator=generator, device=generator.device)


def training_sigma(batch: int, generator: torch.Generator, shifts: tuple[float, float] = (2.0, 7.8)) -> Tensor:
    """Draw noise levels: uniform, then shifted towards noise as LTX-2's schedule is (spec 1.10).

    Half of a batch takes a mild shift (details), half LTX-2's own e^2.05 (the course of a whole clip).

    Shapes: float32 [batch].
    """
    even = torch.rand(batch, generator=generator, device=generator.device).clamp_min(1e-3)
    shift = torch.where(torch.arange(batch, device=even.device) % 2 == 0, *shifts)
    return shift * even / (1 + (shift - 1) * even)


def flow_stage(
    player: Player, clips: Clips, prompts: Prompts, batch: int, *, drop: float = 0.1, weights: AV[float] = ONES
) -> Step:
    """Train the bidirectional teacher by flow matching; prompts are dropped for CFG."""

    def terms(generator: torch.Generator, part: Part) -> Numbers:
        index = pick(len(clips), batch, generator)
        x0 = clips.latents.map(lambda x: x[part.of(index)].float())
        dropped = torch.rand(batch, generator=generator, device=generator.device) < drop
        text = prompts.take(part.of(torch.where(dropped, -1, clips.prompt[index])))
        level, eps = part.of(training_sigma(batch, generator)), part.noise(x0, generator)
        sigma = AV(level, level)
        with player.autocast():
            velocity = player.model(x0.map(noised, eps, sigma), sigma, text)
        return losses.flow_matching(velocity, x0, eps).map(lambda loss: loss * part.share)._asdict()

    piece = recorded(lambda g: player.learn(batch, g, partial(terms, g), weights), player, live=prompts.live)
    return lambda i, generator: piece(generator)


def ode_stage(
    player: Player,
    pairs: Pairs,
    prompts: Prompts,
    causal: Causal,
    batch: int,
    *,
    weights: AV[float] = ONES,
) -> Step:
    """Stage 2: regress the end of the teacher's trajectories under the causal masks (spec 5.4).

    Each block of a clip has its own noise level, clean included; audio takes its block's, by the block table.
    """
    (frames, height, width), audio = pairs.shapes.video[1:4], pairs.shapes.audio[1]
    causal.layout.check(AV(frames, audio))
    kind = masks.build(causal.layout, frames, height * width, window=causal.window)
    device, count = prompts.device, causal.layout.count(frames)
    table = causal.layout.block_index(frames).map(lambda index: torch.tensor(index, device=device))
    sigmas = pairs.sigmas.to(device)

    def terms(generator: torch.Generator, part: Part) -> Numbers:
        index = pick(len(pairs), batch, generator)
        level = torch.randint(len(sigmas), (batch, count), generator=generator, device=generator.device)
        drawn = table.map(lambda blocks: level[:, blocks])
        chosen = drawn.map(part.of)
        states, prompt = pairs.take(part.of(index))
        x = states.map(take_level, chosen)
        sigma = chosen.map(lambda c: sigmas[c])
        with player.autocast():
            velocity = player.model(x, sigma, prompts.take(prompt), masks=kind)
        loss = losses.ode_regression(x.map(x0_of, velocity, sigma), states.map(lambda s: s[:, -1]), sigma)
        # only noisy latents count, so parts of a batch count by how many they have
        noisy = drawn.map(lambda c: sigmas[c] > 1e-6)
        share = noisy.map(lambda n: part.of(n).sum() / n.sum().clamp_min(1))
        return loss.map(torch.mul, share)._asdict()

    live = pairs.live or prompts.live
    piece = recorded(lambda g: player.learn(batch, g, partial(terms, g), weights), player, live=live)
    return lambda i, generator: piece(generator)


def take_level(states: Tensor, level: Tensor) -> Tensor:
    """Pick a state of the trajectory for each latent. Shapes: states [B, K, F, ...], level [B, F] to [B, F, ...]."""
    index = level[:, None].reshape(len(level), 1, -1, *[1] * (states.dim() - 3))
    return states.gather(1, index.expand(-1, 1, *states.shape[2:])).squeeze(1)


def own_clips(prompts: Prompts, causal: Causal, grid: tuple[int, int], video_latents: int, batch: int) -> Sampler:
    """Let a student roll out clips on its own past: what Stage 3 learns from."""

    def sample(
        student: Transformer, generator: torch.Generator, exit_step: int, part: Part | None = None
    ) -> tuple[AV[Tensor], AV[Tensor]]:
        part = part or Part(batch, slice(0, batch))
        text = prompts.take(part.of(pick(len(prompts), batch, generator)))
        whole = fresh_noise(generator, batch)
        blocks = rollout(
            student, causal, text, lambda *of: whole(*of).map(part.of), grid, video_latents, exit_step=exit_step
        )
        return text, join(list(blocks))

    return sample


def self_forcing_stage(
    student: Player,
    critic: Player,
    teacher: Transformer,
    prompts: Prompts,
    causal: Causal,
    grid: tuple[int, int],
    video_latents: int,
    batch: int,
    *,
    guidance: Guidance = DMD_GUIDANCE,
    ratio: int = 5,
    weights: AV[float] = ONES,
    sampler: Sampler | None = None,
) -> Step:
    """Stage 3: joint self-forcing DMD through the rolling cache (paper Sec. 3.3; spec 5.7).

    Every step trains the critic on the student's own clips; every `ratio`-th trains the student first. All blocks of
    a clip leave at one step, drawn from the non-zero noise levels. A `sampler` may make the clips in another way
    than `own_clips`; it makes whole batches.

    Besides losses and gradient norms a step tells the health of the student's clips: `gap`, how far critic and
    teacher are apart on them, as a share of how far the clips are from the teacher's; `motion`, the mean absolute
    difference of successive video latents; `loudness`, the mean square of the audio latents.

    Raises:
        ValueError: the batch cannot be cut as asked, or blocks leave the window, so that they can't be recomputed.
    """
    levels, blocks = len(causal.steps) - 1, causal.layout.count(video_latents)
    whole = all(len(p.team.parts(batch, p.recipe.accumulate)) == 1 and p.team.size == 1 for p in (student, critic))
    if sampler and not whole:
        raise ValueError("a sampler makes whole batches: use it with one process, and accumulate 1")
    if student.recipe.recompute and blocks > causal.window + 2:
        raise ValueError(
            f"recomputing needs a window that keeps the whole clip: {blocks} blocks, a window of {causal.window}; "
            f"train clips of {causal.window + 2} blocks, or without recomputing"
        )
    clips = own_clips(prompts, causal, grid, video_latents, batch)

    def sample(generator: torch.Generator, exit_step: int, part: Part) -> tuple[AV[Tensor], AV[Tensor]]:
        with student.autocast():
            if sampler:
                return sampler(student.model, generator, exit_step)
            return clips(student.model, generator, exit_step, part)

    def dmd_terms(generator: torch.Generator, exit_step: int, part: Part) -> Numbers:
        text, x_hat = sample(generator, exit_step, part)
        sigma, eps = part.of(losses.sample_dmd_sigma(batch, generator)), part.noise(x_hat, generator)
        fake = guided_denoiser(critic.model, text)
        real = guided_denoiser(teacher, text, prompts.negative, guidance)
        with student.autocast():
            loss = losses.dmd(x_hat, fake, real, sigma, eps)
        numbers = loss._asdict() | health(x_hat) | {"gap": sum(loss).detach()}
        return {name: value * part.share for name, value in numbers.items()}

    def critic_terms(generator: torch.Generator, exit_step: int, part: Part) -> Numbers:
        with torch.no_grad():
            text, x_hat = sample(generator, exit_step, part)
        sigma, eps = part.of(losses.sample_dmd_sigma(batch, generator)), part.noise(x_hat, generator)
        with critic.autocast():
            loss = losses.critic(x_hat, guided_denoiser(critic.model, text), sigma, eps)
        return loss.map(lambda value: value * part.share)._asdict()

    def generate(generator: torch.Generator, exit_step: int) -> Numbers:
        numbers = student.learn(batch, generator, partial(dmd_terms, generator, exit_step), weights)
        named = {"dmd_video": numbers.pop("video"), "dmd_audio": numbers.pop("audio"), "norm": numbers.pop("norm")}
        return named | numbers | {"gap": numbers["gap"].sqrt()}

    def judge(generator: torch.Generator, exit_step: int) -> Numbers:
        numbers = critic.learn(batch, generator, partial(critic_terms, generator, exit_step), weights)
        return {f"critic_{name}": value for name, value in numbers.items()}

    live = prompts.live
    parts = (recorded(generate, student, critic, live=live), recorded(judge, student, critic, live=live))

    def step(i: int, generator: torch.Generator) -> Numbers:
        dice = torch.Generator().manual_seed(generator.initial_seed())
        exits = torch.randint(levels, (2,), generator=dice).tolist()
        made = parts[0](generator, exits[0]) if i % ratio == 0 else {}
        return made | parts[1](generator, exits[1])

    return step


@torch.no_grad()
def health(clips: AV[Tensor]) -> dict[str, Tensor]:
    """Tell at a glance whether clips move and sound: see `self_forcing_stage`. Shapes: AV([B, F, ...], [B, T, C])."""
    return {"motion": clips.video.diff(dim=1).abs().mean(), "loudness": clips.audio.square().mean()}
