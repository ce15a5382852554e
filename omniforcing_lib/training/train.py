"""One training loop (paper Sec. 4).

A stage (see `stages`) is a function `step(i, generator) -> metrics`; a `Learner` is a model with its optimiser and its
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
from omniforcing_lib.training.distributed import ALONE, LONG_TIMEOUT_S, STEP_TIMEOUT_S, DistributedContext, MicroBatch
from omniforcing_lib.training.distributed import local as local_tensor
from omniforcing_lib.training.run_folder import SIGTERM_CODE, RunFolder
from omniforcing_lib.transformer import Transformer

Metrics = dict[str, float | Tensor]
Step = Callable[[int, torch.Generator], Metrics]
READ_EVERY = 20
"""Steps between two readings of the metrics of a GPU, which has to finish all its work for each."""


@dataclass(frozen=True)
class OptimConfig:
    """Say how one model learns.

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
        accumulate: micro-batches that a process cuts its rows of a batch into, one after another.
        recompute: keep only the inputs of each block, and run it again for its gradients.
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
    """A model that learns: float32 weights, AdamW, gradient clipping, and an exponential moving average.

    Args:
        model: what learns; it is sharded over the processes.
        config: how it learns.
        group: the processes that train it together.
    """

    def __init__(self, model: Transformer, config: OptimConfig, group: DistributedContext = ALONE) -> None:
        self.model = group.shard(model, amp=config.amp).train().requires_grad_(True)
        self.config, self.group = config, group
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=self.device)
        self.average = None
        if config.ema:
            copied = group.clone_sharded(model) if group.mesh else copy.deepcopy(model)
            self.average = copied.eval().requires_grad_(False)
        self._blend = get_ema_multi_avg_fn(config.ema)
        self.model.recompute = config.recompute
        self.optimiser = self._adamw()

    def _adamw(self) -> torch.optim.AdamW:
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        decayed = {"params": matrices, "weight_decay": self.config.weight_decay}
        # On a GPU the rate is a tensor, so that a recorded step follows the schedule.
        rate = torch.tensor(self.config.lr, device=self.device) if self.recordable else self.config.lr
        optimiser = torch.optim.AdamW(
            [decayed, {"params": others, "weight_decay": 0.0}],
            lr=rate,
            betas=self.config.betas,
            fused=self.device.type == "cuda",
            capturable=self.recordable,
        )
        # AdamW would make its state in its first step; made here, every checkpoint holds the same tensors.
        for weight in (*matrices, *others):
            moments = {name: torch.zeros_like(weight.detach()) for name in ("exp_avg", "exp_avg_sq")}
            optimiser.state[weight] = {"step": torch.zeros((), device=self.device), **moments}
        return optimiser

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.proj_out.weight.device

    @property
    def skipped(self) -> int:
        """Count the steps that changed nothing."""
        return int(self.skipped_steps)

    @property
    def recordable(self) -> bool:
        """Tell whether a step can be a CUDA graph: one process on a GPU that takes its batch whole."""
        config = self.config
        return self.device.type == "cuda" and not (self.group.mesh or config.accumulate > 1 or config.recompute)

    @property
    def best(self) -> Transformer:
        """The average where there is one, the model otherwise."""
        return self.average or self.model

    def autocast(self) -> torch.autocast:
        """Compute in bfloat16 if the config says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp)

    def set_rate(self, step: int) -> None:
        """Set the learning rate of a step."""
        for group in self.optimiser.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(self.config.rate(step))
            else:
                group["lr"] = self.config.rate(step)

    def update(self, loss: Tensor) -> Tensor:
        """Take one step down the loss; return the gradient norm. One that is not finite or too large is skipped."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        return self._descend()

    def learn(
        self, batch: int, generator: torch.Generator, terms: Callable[[MicroBatch], Metrics], weights: AV[float] = ONES
    ) -> Metrics:
        """Take one step down a batch, micro-batch by micro-batch; return its sums and the gradient `norm`.

        `terms` gives what a micro-batch adds to the metrics of the batch; `video` and `audio` are its losses. Every
        micro-batch draws from the generator as it is now. Gradients are summed over the processes after each
        micro-batch, so no process holds them whole.
        """
        # 1. Cut the batch; every micro-batch begins with the same state of the generator.
        self.optimiser.zero_grad(set_to_none=True)
        micro_batches, sums = self.group.micro_batches(batch, self.config.accumulate), []
        start = generator.get_state() if len(micro_batches) > 1 else None
        # 2. Forward and backward, micro-batch by micro-batch.
        for micro_batch in micro_batches:
            if start is not None:
                generator.set_state(start)
            metrics = terms(micro_batch)
            # FSDP averages over the processes, and these losses are shares of a sum.
            (self.group.size * losses.total(AV(metrics["video"], metrics["audio"]), weights)).backward()
            sums.append(torch.stack([value.detach().float() for value in metrics.values()]))
        # 3. Sums over all processes, and one step of the optimiser.
        totals = self.group.all_reduce(sum(sums))
        return dict(zip(metrics, totals, strict=True)) | {"norm": self._descend()}

    def _descend(self) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip, foreach=True)
        norm = norm.full_tensor() if self.group.mesh else norm
        bad = ~(norm <= self.config.limit)
        self.skipped_steps += bad
        if self.recordable:
            # The fused kernel leaves out a bad step by itself, so nothing waits for the GPU.
            self.optimiser.found_inf = bad.float()
        elif bad:
            return norm
        self.optimiser.step()
        if self.average:
            weights = [*map(local_tensor, self.model.parameters())]
            self._blend([*map(local_tensor, self.average.parameters())], weights, None)
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """Give weights, average and optimiser state by name: the learner's own tensors, of a group its own shards.

        `torch.distributed.checkpoint` stores them, and reads a checkpoint into them in place.
        """
        # Imported where it is needed: it takes a second, and most who import this do not store.
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

        options = StateDictOptions(flatten_optimizer_state_dict=True)
        weights, optimiser = get_state_dict(self.model, self.optimiser, options=options)
        parts = {"model": weights, "average": get_model_state_dict(self.average) if self.average else {}}
        # Rates and other settings of the optimiser come from the config.
        parts["optimiser"] = {name: value for name, value in optimiser.items() if name.startswith("state.")}
        return {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}


@dataclass
class History:
    """Metrics of every step that ran now.

    Attributes:
        numbers: values by name, a value per step.
        done: steps of the whole run so far.
        changes: what was not the same in all of them, in words.
    """

    numbers: dict[str, list[float]] = field(default_factory=dict)
    done: int = 0
    changes: list[str] = field(default_factory=list)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Append one step."""
        for name, value in metrics.items():
            self.numbers.setdefault(name, []).append(value)

    def mean(self, name: str, last: int = 50) -> float:
        """Average the last values of a metric."""
        values = [float(v) for v in self.numbers[name][-last:]]
        return sum(values) / len(values)


def fit(
    step: Step,
    learners: Mapping[str, Learner],
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
    """Run a stage with a progress bar, which stays when the run has ended if `leave` is set.

    With a folder it stores a checkpoint every `every` steps and resumes from there, under the same `settings`; `steps`
    and `every` may change, and are printed. A folder belongs to one run at a time. SIGTERM ends a run that has one
    after the step, with a checkpoint and exit code 143. Returns the history of the steps that ran now.

    Metrics are read from a CPU after every step, from a GPU every `READ_EVERY` steps and before a checkpoint. A bad
    step changes nothing, so a run that diverges on a GPU only loses the time of up to `READ_EVERY` steps more.

    Raises:
        ValueError: another run has the folder, or its state is damaged, or of another seed or other settings.
        Diverged: `give_up` steps in a row changed nothing, see `OptimConfig.limit`; their metrics are in the folder.
    """
    first, history = next(iter(learners.values())), History()
    group, device, generator = first.group, first.device, torch.Generator(first.device)
    skipped, unread, bad, fatal = sum(learner.skipped for learner in learners.values()), [], [], []
    with RunFolder(folder, learners, seed, group, settings, {"steps": steps, "every": every}) as run:
        start = run.resume()
        history.done, history.changes = start, run.changes
        hidden = not (progress and group.is_main)
        bar = tqdm(range(start, steps), label, steps, leave, initial=start, disable=hidden, mininterval=1.0)
        for i in bar:
            # 1. One step of every learner.
            for learner in learners.values():
                learner.set_rate(i)
            metrics = step(i, generator.manual_seed(mixed(seed, i)))
            unread.append((i, metrics, sum(learner.skipped_steps for learner in learners.values())))
            history.done = i + 1
            if i == start:
                group.set_timeout(STEP_TIMEOUT_S)
            # 2. Read the metrics, unless a GPU would have to be waited for.
            stopped, told_to_end = group.any(stop(), run.told_to_end)
            due = (i + 1) % every == 0 or i + 1 == steps or stopped or told_to_end
            if device.type == "cuda" and not due and i % READ_EVERY:
                continue
            for number, values, skipped_now in _read(unread, device):
                history.add(values)
                run.log(number, values)
                bad = [*bad, {"step": number, **values}] if skipped_now > skipped else []
                fatal, skipped = bad if len(bad) == give_up else fatal, skipped_now
            unread = []
            if due or i % READ_EVERY == 0:
                bar.set_postfix({name: f"{history.mean(name, 20):.3f}" for name in history.numbers})
            # 3. Store a checkpoint, and end where the run has diverged or was told to.
            if due or fatal:
                run.store(i + 1)
            if fatal:
                raise run.diverged(fatal)
            if told_to_end:
                print(f"{label}: told to end after step {i + 1}; the same command goes on from there", flush=True)
                raise SystemExit(SIGTERM_CODE)
            if stopped:
                break
        group.set_timeout(LONG_TIMEOUT_S)
    return history


def _read(unread: list[tuple[int, Metrics, Tensor]], device: torch.device) -> list[tuple[int, dict[str, float], int]]:
    """Read the metrics of some steps, and how many steps had been skipped by then, in one transfer."""
    values = [value for _, metrics, skipped in unread for value in (*metrics.values(), skipped)]
    stacked = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    numbers = iter(stacked.tolist())
    return [(i, {name: next(numbers) for name in metrics}, int(next(numbers))) for i, metrics, _ in unread]


def mixed(seed: int, step: int) -> int:
    """Mix seed and step number into the seed of one step."""
    return (seed * 1_000_003 + step) * 2_654_435_761 % 2**63
