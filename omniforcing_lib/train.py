"""One training loop and the stages over it (paper Sec. 3.3 and 4; spec 5).

A stage is a function `step(i, generator) -> numbers`; a `Player` is a model with its optimiser and average. All
randomness of step i comes from (seed, i), so a killed run that resumes ends where an unbroken one does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from omniforcing_lib import losses, masks
from omniforcing_lib.dataset import Clips, Pairs, Prompts
from omniforcing_lib.files import write_tensors
from omniforcing_lib.flow import DMD_GUIDANCE, ONES, Guidance, guided_denoiser, noise_like, noised, x0_of
from omniforcing_lib.layout import AV
from omniforcing_lib.rollout import Causal, fresh_noise, join, rollout
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

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if not self.steps:
            return self.lr * warm
        done = min(1.0, max(0, step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * warm * (self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2)


class Player:
    """A model that learns: fp32 weights, AdamW, gradient clipping, and an exponential average."""

    def __init__(self, model: Transformer, recipe: Recipe) -> None:
        self.model, self.recipe = model.train().requires_grad_(True), recipe
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        on_gpu = model.proj_out.weight.is_cuda
        # a tensor on the GPU, so that a recorded step follows the schedule
        rate = torch.tensor(recipe.lr, device=model.proj_out.weight.device) if on_gpu else recipe.lr
        self.optimiser = torch.optim.AdamW(groups, lr=rate, betas=recipe.betas, fused=on_gpu, capturable=on_gpu)
        self.average = copy.deepcopy(model).eval().requires_grad_(False) if recipe.ema else None
        self._blend = get_ema_multi_avg_fn(recipe.ema)
        self.skipped = 0

    @property
    def best(self) -> Transformer:
        """The average where there is one, the model otherwise."""
        return self.average or self.model

    def autocast(self) -> torch.autocast:
        """Compute in bfloat16 if the recipe says so."""
        return torch.autocast(self.model.proj_out.weight.device.type, torch.bfloat16, enabled=self.recipe.amp)

    def tune(self, step: int) -> None:
        """Set the learning rate of a step."""
        for group in self.optimiser.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(self.recipe.rate(step))
            else:
                group["lr"] = self.recipe.rate(step)

    def update(self, loss: Tensor) -> Tensor:
        """Take one step down the loss; return the gradient norm. On the CPU, one that is not finite is skipped."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip, foreach=True)
        if not norm.is_cuda and not torch.isfinite(norm):
            self.skipped += 1
            return norm
        self.optimiser.step()
        if self.average:
            self._blend([*self.average.parameters()], [*self.model.parameters()], None)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Give weights, average and optimiser state as flat tensors."""
        out = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.average:
            out |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for i, entries in self.optimiser.state_dict()["state"].items():
            out |= {f"optimiser.{i}.{k}": v for k, v in entries.items()}
        return {k: v.detach().cpu().contiguous().clone() for k, v in out.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave."""

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


@dataclass
class History:
    """Numbers of every step, by name."""

    numbers: dict[str, list[float]] = field(default_factory=dict)

    def add(self, numbers: Numbers) -> None:
        """Append one step; tensors stay on their device until they are read."""
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
) -> History:
    """Run a stage with a progress bar; with a folder, checkpoint every `every` steps and resume from there.

    Returns the history of the steps that ran now.
    """
    generator = torch.Generator(next(iter(players.values())).model.proj_out.weight.device)
    saved = Path(folder) / "state.safetensors" if folder else None
    start = _resume(saved, players, seed) if saved and saved.exists() else 0
    history = History()
    bar = tqdm(range(start, steps), desc=label, initial=start, total=steps, disable=not progress, mininterval=1.0)
    for i in bar:
        for player in players.values():
            player.tune(i)
        history.add(step(i, generator.manual_seed(mixed(seed, i))))
        if i % 20 == 0:
            bar.set_postfix({k: f"{history.mean(k, 20):.3f}" for k in history.numbers})
        ended = stop()
        if saved and ((i + 1) % every == 0 or i + 1 == steps or ended):
            _store(saved, players, seed, i + 1)
        if ended:
            break
    return history


def mixed(seed: int, step: int) -> int:
    """Mix seed and step number into the seed of one step."""
    return (seed * 1_000_003 + step) * 2_654_435_761 % 2**63


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


def _store(path: Path, players: Mapping[str, Player], seed: int, step: int) -> None:
    tensors = {f"{name}/{k}": v for name, player in players.items() for k, v in player.state().items()}
    write_tensors(path, tensors, {"step": str(step), "seed": str(seed)})


def _resume(path: Path, players: Mapping[str, Player], seed: int) -> int:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        if metadata["seed"] != str(seed):
            raise ValueError(
                f"{path} was trained with seed {metadata['seed']}, found {seed}: use that seed, or another folder"
            )
        state = {name: file.get_tensor(name) for name in file.keys()}
    for name, player in players.items():
        player.load({k.removeprefix(f"{name}/"): v for k, v in state.items() if k.startswith(f"{name}/")})
    return int(metadata["step"])


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

    def piece(generator: torch.Generator) -> Numbers:
        index = pick(len(clips), batch, generator)
        x0 = clips.latents.map(lambda x: x[index].float())
        dropped = torch.rand(batch, generator=generator, device=generator.device) < drop
        text = prompts.take(torch.where(dropped, -1, clips.prompt[index]))
        level, eps = training_sigma(batch, generator), noise_like(x0, generator)
        sigma = AV(level, level)
        with player.autocast():
            velocity = player.model(x0.map(noised, eps, sigma), sigma, text)
        loss = losses.flow_matching(velocity, x0, eps)
        norm = player.update(losses.total(loss, weights))
        return {"video": loss.video.detach(), "audio": loss.audio.detach(), "norm": norm}

    recorded = Recorded(piece)
    return lambda i, generator: recorded(generator)


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
    frames, height, width = pairs.states.video.shape[2:5]
    causal.layout.check(AV(frames, pairs.states.audio.shape[2]))
    kind = masks.build(causal.layout, frames, height * width, window=causal.window)
    device, count = pairs.prompt.device, causal.layout.count(frames)
    table = causal.layout.block_index(frames).map(lambda index: torch.tensor(index, device=device))
    sigmas = pairs.sigmas.to(device)

    def piece(generator: torch.Generator) -> Numbers:
        index = pick(len(pairs), batch, generator)
        level = torch.randint(len(pairs.sigmas), (batch, count), generator=generator, device=generator.device)
        chosen = table.map(lambda blocks: level[:, blocks])
        states = pairs.states.map(lambda s: s[index])
        x = states.map(take_level, chosen)
        sigma = chosen.map(lambda c: sigmas[c])
        with player.autocast():
            velocity = player.model(x, sigma, prompts.take(pairs.prompt[index]), masks=kind)
        loss = losses.ode_regression(x.map(x0_of, velocity, sigma), states.map(lambda s: s[:, -1]), sigma)
        norm = player.update(losses.total(loss, weights))
        return {"video": loss.video.detach(), "audio": loss.audio.detach(), "norm": norm}

    recorded = Recorded(piece)
    return lambda i, generator: recorded(generator)


def take_level(states: Tensor, level: Tensor) -> Tensor:
    """Pick a state of the trajectory for each latent. Shapes: states [B, K, F, ...], level [B, F] to [B, F, ...]."""
    index = level[:, None].reshape(len(level), 1, -1, *[1] * (states.dim() - 3))
    return states.gather(1, index.expand(-1, 1, *states.shape[2:])).squeeze(1)


def own_clips(prompts: Prompts, causal: Causal, grid: tuple[int, int], video_latents: int, batch: int) -> Sampler:
    """Let a student roll out clips on its own past: what Stage 3 learns from."""

    def sample(student: Transformer, generator: torch.Generator, exit_step: int) -> tuple[AV[Tensor], AV[Tensor]]:
        text = prompts.take(pick(len(prompts.names), batch, generator))
        noise = fresh_noise(generator, batch)
        return text, join(list(rollout(student, causal, text, noise, grid, video_latents, exit_step=exit_step)))

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
    than `own_clips`.
    """
    levels = len(causal.steps) - 1
    clips = sampler or own_clips(prompts, causal, grid, video_latents, batch)

    def sample(generator: torch.Generator, exit_step: int) -> tuple[AV[Tensor], AV[Tensor]]:
        with student.autocast():
            return clips(student.model, generator, exit_step)

    def generate(generator: torch.Generator, exit_step: int) -> Numbers:
        text, x_hat = sample(generator, exit_step)
        sigma, eps = losses.sample_dmd_sigma(batch, generator), noise_like(x_hat, generator)
        fake = guided_denoiser(critic.model, text)
        real = guided_denoiser(teacher, text, prompts.negative, guidance)
        with student.autocast():
            loss = losses.dmd(x_hat, fake, real, sigma, eps)
        norm = student.update(losses.total(loss, weights))
        return {"dmd_video": loss.video.detach(), "dmd_audio": loss.audio.detach(), "norm": norm}

    def judge(generator: torch.Generator, exit_step: int) -> Numbers:
        with torch.no_grad():
            text, x_hat = sample(generator, exit_step)
        sigma, eps = losses.sample_dmd_sigma(batch, generator), noise_like(x_hat, generator)
        with critic.autocast():
            loss = losses.critic(x_hat, guided_denoiser(critic.model, text), sigma, eps)
        norm = critic.update(losses.total(loss, weights))
        return {"critic_video": loss.video.detach(), "critic_audio": loss.audio.detach(), "critic_norm": norm}

    parts = Recorded(generate), Recorded(judge)

    def step(i: int, generator: torch.Generator) -> Numbers:
        dice = torch.Generator().manual_seed(generator.initial_seed())
        exits = torch.randint(levels, (2,), generator=dice).tolist()
        made = parts[0](generator, exits[0]) if i % ratio == 0 else {}
        return made | parts[1](generator, exits[1])

    return step
