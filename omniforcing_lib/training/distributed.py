"""Several processes as one: models sharded over all of them, batches cut among them.

FSDP2 shards weights, gradients, optimiser and average block by block. All randomness is drawn for the whole batch and
then cut, so that any number of processes sees what one would.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from omniforcing_lib import backends
from omniforcing_lib.flow import noise_like
from omniforcing_lib.layout import AV
from omniforcing_lib.transformer import Transformer, empty

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
LONG_TIMEOUT_S, STEP_TIMEOUT_S = 1800, 50
"""Seconds that a process waits for the others: while models are read and checkpoints written, and within a step."""


class MicroBatch(NamedTuple):
    """Rows of a batch that one process takes at once; what is random is drawn for the whole batch and then cut."""

    batch: int
    rows: slice

    @property
    def share(self) -> float:
        """Share of the batch."""
        return (self.rows.stop - self.rows.start) / self.batch

    def of(self, x: Tensor) -> Tensor:
        """Cut what was drawn for the batch. Shapes: [batch, ...] to [rows, ...]."""
        return x[self.rows]

    def times(self, count: int) -> MicroBatch:
        """Give the same share of a batch that is `count` times as large."""
        return MicroBatch(self.batch * count, slice(self.rows.start * count, self.rows.stop * count))

    def noise(self, like: AV[Tensor], generator: torch.Generator) -> AV[Tensor]:
        """Draw normal noise for these rows. Shapes: those of `like`, [rows, ...]."""
        whole = like.map(lambda x: x[:1].expand(self.batch, *x.shape[1:]))
        return noise_like(whole, generator).map(self.of)


@dataclass(frozen=True)
class DistributedContext:
    """The processes that train together; `ALONE` is one process, for which every method does nothing.

    Attributes:
        rank: number of this process.
        size: how many there are.
        device: where this process computes.
        mesh: over which models are sharded; None for one process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        """Tell whether this process prints and writes what is written once."""
        return self.rank == 0

    def micro_batches(self, batch: int, accumulate: int = 1) -> list[MicroBatch]:
        """Cut a batch into `accumulate` equal micro-batches per process; give this process's.

        Raises:
            ValueError: the batch is no multiple of processes x micro-batches.
        """
        count = self.size * accumulate
        if batch % count:
            raise ValueError(
                f"a batch of {batch} cannot be cut into {self.size} processes x {accumulate} parts; "
                f"use a multiple of {count}"
            )
        rows, first = batch // count, self.rank * accumulate
        return [MicroBatch(batch, slice(i * rows, (i + 1) * rows)) for i in range(first, first + accumulate)]

    def shard(self, model: Transformer, *, amp: bool = False) -> Transformer:
        """Shard a model in place, block by block and the rest together; with `amp` its weights travel as bfloat16."""
        if self.mesh is None:
            return model
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        if isinstance(model, FSDPModule):
            return model
        # Inputs keep their dtype, since sigma stays float32; autocast casts what is multiplied.
        policy = MixedPrecisionPolicy(torch.bfloat16 if amp else None, torch.float32, cast_forward_inputs=False)
        for module in (*model.transformer_blocks, model):
            # Always resharded: a root left whole after a pass without gradients would miss the next update.
            fully_shard(module, mesh=self.mesh, reshard_after_forward=True, mp_policy=policy)
        return model

    def clone_sharded(self, model: Transformer) -> Transformer:
        """Copy a sharded model; no process ever holds a whole one."""
        clone = self.shard(empty(model.config, model.clock)).to_empty(device=self.device)
        with torch.no_grad():
            for a, b in zip(clone.parameters(), model.parameters(), strict=True):
                local(a).copy_(local(b))
        return clone

    def distribute(self, whole: Tensor, like: Tensor) -> Tensor:
        """Take this process's shard of a tensor that every process has, sharded as `like` is."""
        if self.mesh is None:
            return whole
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole.to(self.device), like.device_mesh, like.placements, src_data_rank=None)

    def gather_model(self, model: Transformer, dtype: torch.dtype) -> Transformer | None:
        """Collect a sharded model on the CPU of the first process, a tensor at a time; None on the others."""
        if self.mesh is None:
            return model
        state = {}
        for name, shard in model.state_dict().items():
            tensor = shard.full_tensor()
            if self.is_main:
                state[name] = tensor.to("cpu", dtype)
        if not self.is_main:
            return None
        gathered = empty(model.config, model.clock)
        gathered.load_state_dict(state, assign=True)
        return gathered

    def all_reduce(self, x: Tensor) -> Tensor:
        """Add up what each process has, in place."""
        if self.mesh is not None:
            dist.all_reduce(x)
        return x

    def any(self, *flags: bool) -> list[bool]:
        """Tell of each flag whether any process raises it; all get the same answer."""
        return [bool(n) for n in self.all_reduce(torch.tensor(flags, dtype=torch.int32))]

    def all_gather(self, thing: T) -> list[T]:
        """Give everyone's thing to everyone, by rank."""
        if self.mesh is None:
            return [thing]
        things: list[T] = [thing] * self.size
        dist.all_gather_object(things, thing)
        return things

    def raise_everywhere(self, faults: list[str]) -> None:
        """Raise a ValueError on every process where any of them found a fault."""
        if everywhere := [fault for faults in self.all_gather(faults) for fault in faults]:
            raise ValueError(everywhere[0])

    def barrier(self) -> None:
        """Wait for the others."""
        self.any(False)

    def set_timeout(self, seconds: float) -> None:
        """Set how long this process waits for the others from now on."""
        if self.mesh is not None:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), dist.group.WORLD)


ALONE = DistributedContext()


def local(x: Tensor) -> Tensor:
    """Give this process's shard of a sharded tensor, and any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


@contextmanager
def joined(device: str = "cpu", *, replicas: int = 1) -> Iterator[DistributedContext]:
    """Join the processes that torchrun started: NCCL on GPUs, gloo on CPUs; one process alone stays alone.

    Args:
        device: see `backends.device`; of several processes, each takes the GPU of its local rank.
        replicas: copies of every model; each is sharded over size / replicas processes (1: over all).

    Raises:
        ValueError: the device is not there, or the number of processes is no multiple of `replicas`.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if replicas < 1 or size % replicas:
        raise ValueError(f"{size} processes cannot hold {replicas} replicas; use a divisor of {size}")
    place = backends.device(device)
    if size == 1:
        yield DistributedContext(device=place)
        return
    from torch.distributed.device_mesh import init_device_mesh

    if place.type == "cuda":
        place = backends.device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(place)
    # Nothing here writes into what a sharded module returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=LONG_TIMEOUT_S))
    shape, names = ((size,), ("shard",)) if replicas == 1 else ((replicas, size // replicas), ("replicate", "shard"))
    try:
        yield DistributedContext(rank, size, place, init_device_mesh(place.type, shape, mesh_dim_names=names))
    except SystemExit:
        # All were told to end, and end together.
        dist.destroy_process_group()
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        print(
            f"rank {rank} of {size} ends: {reason}\nIf another rank is gone or was silent for {STEP_TIMEOUT_S} s, its "
            "own message says why; the same command goes on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        raise
    # Only where all went well: with a process gone, this would wait for it.
    dist.destroy_process_group()
