"""One training loop (paper Sec. 4; spec 5).

A stage (see `stages`) is a function `step(i, generator) -> numbers`; a `Learner` is a model with its optimiser and its
average. All randomness of step i comes from (seed, i), so a killed run that resumes ends where an unbroken one does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm.auto import tqdm

from omniforcing_lib import losses
from omniforcing_lib.flow import ONES
from omniforcing_lib.layout import AV
from omniforcing_lib.training import run_folder
from omniforcing_lib.training.distributed import ALONE, PATIENCE_S, UNHURRIED_S, DistributedContext, MicroBatch, local
from omniforcing_lib.transformer import Transformer

Metrics = dict[str, float | Tensor]
Step = Callable[[int, torch.Generator], Metrics]


@dataclass(frozen=True)
class OptimConfig:
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


class Learner:
    """A model that learns: fp32 weights, AdamW, gradient clipping, and an exponential average.

    Args:
        model: what learns; a team shards it.
        recipe: how.
        team: the processes that train it together.
    """

    def __init__(self, model: Transformer, recipe: OptimConfig, team: DistributedContext = ALONE) -> None:
        self.model = team.shard(model, amp=recipe.amp).train().requires_grad_(True)
        self.recipe, self.team = recipe, team
        self._skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.average = None
        if recipe.ema:
            copied = team.clone_sharded(model) if team.mesh else copy.deepcopy(model)
            self.average = copied.eval().requires_grad_(False)
        self._blend = get_ema_multi_avg_fn(recipe.ema)
        self.model.recompute = recipe.recompute
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
        terms: Callable[[MicroBatch], Metrics],
        weights: AV[float] = ONES,
    ) -> Metrics:
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


@dataclass
class History:
    """Metrics of every step that ran now, by name.

    Attributes:
        numbers: by name.
        done: steps of the whole run so far.
        changes: what was not the same in all of them, in words.
    """

    numbers: dict[str, list[float]] = field(default_factory=dict)
    done: int = 0
    changes: list[str] = field(default_factory=list)

    def add(self, numbers: Metrics) -> None:
        """Append one step."""
        for name, value in numbers.items():
            self.numbers.setdefault(name, []).append(value)

    def mean(self, name: str, last: int = 50) -> float:
        """Average the last values of a number."""
        values = [float(v) for v in self.numbers[name][-last:]]
        return sum(values) / len(values)


def fit(
    step: Step,
    players: Mapping[str, Learner],
    steps: int,
    *,
    seed: int = 0,
    folder: str | Path | None = None,
    every: int = 500,
    label: str = "training",
    progress: bool = True,
    leave: bool = True,
    stop: Callable[[], bool] = lambda: False,
    give_up: int = 20,
    settings: Mapping[str, object] | None = None,
) -> History:
    """Run a stage with a progress bar, which stays to the end or beyond it (`leave`).

    With a folder it checkpoints every `every` steps and resumes from there, under the same `settings`: `steps` and
    `every` may change, and are printed.

    A folder belongs to one run at a time. SIGTERM ends a run that has one after the step, with a checkpoint and exit
    code 143. Returns the history of the steps that ran now.

    Raises:
        ValueError: another run has the folder, or its state is damaged, or of another seed or other settings.
        Diverged: `give_up` steps in a row changed nothing, see `OptimConfig.limit`; their numbers are in the folder.
    """
    first, history, bad = next(iter(players.values())), History(), []
    team, generator = first.team, torch.Generator(first.device)
    plan = {"steps": steps, "every": every}
    with run_folder.opened(folder, players, seed, team, settings=settings, plan=plan) as book:
        start, shown = book.resume(), progress and team.is_main
        history.done, history.changes = start, book.changes
        look = {"initial": start, "total": steps, "disable": not shown, "leave": leave, "mininterval": 1.0}
        bar = tqdm(range(start, steps), desc=label, **look)
        for i in bar:
            before = [player.skipped for player in players.values()]
            for player in players.values():
                player.tune(i)
            found = step(i, generator.manual_seed(mixed(seed, i)))
            numbers = {name: float(value) for name, value in found.items()}
            history.add(numbers)
            history.done = i + 1
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
                raise SystemExit(run_folder.SIGTERM_CODE)
            if ended:
                break
            if i == start:
                team.set_timeout(PATIENCE_S)
        team.set_timeout(UNHURRIED_S)
    return history


def mixed(seed: int, step: int) -> int:
    """Mix seed and step number into the seed of one step."""
    return (seed * 1_000_003 + step) * 2_654_435_761 % 2**63
