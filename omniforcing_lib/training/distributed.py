"""Several processes as one: models sharded over all of them, batches cut among them, checkpoints for any number.

FSDP2 shards weights, gradients, optimiser and average block by block; DCP stores them, each process its own part, as
safetensors (its other format keeps an index that is a pickle). All randomness is drawn for the whole batch and then
cut, so that any number of processes sees what one would.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from omniforcing_lib import backends
from omniforcing_lib.files import write_json
from omniforcing_lib.flow import noise_like
from omniforcing_lib.layout import AV
from omniforcing_lib.transformer import Transformer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
UNHURRIED_S, PATIENCE_S = 1800, 50
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

    def parts(self, batch: int, accumulate: int = 1) -> list[MicroBatch]:
        """Cut a batch into `accumulate` equal parts a process; give this process's.

        Raises:
            ValueError: the batch is no multiple of processes x parts.
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
        # inputs keep their dtype: sigma stays float32 (spec 8.1.7); autocast casts what is multiplied
        policy = MixedPrecisionPolicy(torch.bfloat16 if amp else None, torch.float32, cast_forward_inputs=False)
        for module in (*model.transformer_blocks, model):
            # always resharded: a root left whole after a pass without gradients would miss the next update
            fully_shard(module, mesh=self.mesh, reshard_after_forward=True, mp_policy=policy)
        return model

    def clone_sharded(self, model: Transformer) -> Transformer:
        """Copy a sharded model; no process ever holds a whole one."""
        with torch.device("meta"):
            made = Transformer(model.config, model.clock)
        made = self.shard(made).to_empty(device=self.device)
        with torch.no_grad():
            for a, b in zip(made.parameters(), model.parameters(), strict=True):
                local(a).copy_(local(b))
        return made

    def cut(self, whole: Tensor, like: Tensor) -> Tensor:
        """Take this process's part of a tensor that every process has, sharded as `like` is."""
        if self.mesh is None:
            return whole
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole.to(self.device), like.device_mesh, like.placements, src_data_rank=None)

    def gathered(self, model: Transformer, dtype: torch.dtype) -> Transformer | None:
        """Collect a sharded model on the CPU of the first process, a tensor at a time; None on the others."""
        if self.mesh is None:
            return model
        state = {}
        for name, part in model.state_dict().items():
            whole = part.full_tensor()
            if self.is_main:
                state[name] = whole.to("cpu", dtype)
        if not self.is_main:
            return None
        with torch.device("meta"):
            made = Transformer(model.config, model.clock)
        made.load_state_dict(state, assign=True)
        return made

    def total(self, x: Tensor) -> Tensor:
        """Add up what each process has."""
        if self.mesh is not None:
            dist.all_reduce(x)
        return x

    def any(self, *flags: bool) -> list[bool]:
        """Tell of each flag whether any process raises it; all get the same answer."""
        return [bool(n) for n in self.total(torch.tensor(flags, dtype=torch.int32))]

    def all_of(self, thing: T) -> list[T]:
        """Give everyone's thing to everyone, by rank."""
        if self.mesh is None:
            return [thing]
        things: list[T] = [thing] * self.size
        dist.all_gather_object(things, thing)
        return things

    def refuse(self, faults: list[str]) -> None:
        """Raise a ValueError on every process where any of them found a fault."""
        if found := [fault for faults in self.all_of(faults) for fault in faults]:
            raise ValueError(found[0])

    def wait(self) -> None:
        """Wait for the others."""
        self.any(False)

    def set_timeout(self, seconds: float) -> None:
        """Set how long this process waits for the others from now on."""
        if self.mesh is not None:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), dist.group.WORLD)


ALONE = DistributedContext()


def local(x: Tensor) -> Tensor:
    """Give this process's part of a sharded tensor, and any other as it is."""
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
    # nothing here writes into what a sharded module returns
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=UNHURRIED_S))
    shape, names = ((size,), ("shard",)) if replicas == 1 else ((replicas, size // replicas), ("replicate", "shard"))
    try:
        yield DistributedContext(rank, size, place, init_device_mesh(place.type, shape, mesh_dim_names=names))
    except SystemExit:
        # all were told to end, and end together
        dist.destroy_process_group()
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        print(
            f"rank {rank} of {size} ends: {reason}\nIf another rank is gone or was silent for {PATIENCE_S} s, its own "
            "message says why; the same command goes on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        raise
    # only where all went well: with a process gone, this would wait for it
    dist.destroy_process_group()


def store(folder: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, object], team: DistributedContext) -> None:
    """Write tensors of a team to a folder that appears when it is complete: a safetensors file a process, and notes."""
    import torch.distributed.checkpoint as dcp

    partial = folder.with_name(f".{folder.name}.part")
    if team.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    team.wait()
    dcp.save(dict(tensors), storage_writer=dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True))
    team.wait()
    if team.is_main:
        write_json(partial / "notes.json", notes)
        os.replace(partial, folder)
    team.wait()


def stored_notes(folder: Path) -> dict[str, object]:
    """Read the notes of a stored state."""
    return json.loads((folder / "notes.json").read_text(encoding="utf-8"))


def restore(folder: Path, blank: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read what `store` wrote into tensors like it, for any number of processes; `blank` may name more than is there.

    Raises:
        ValueError: a tensor is stored that `blank` has not, a file is damaged, or shapes differ.
    """
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    wanted = {name: tensor for name, tensor in blank.items() if name in stored}
    for name, kept in stored.items():
        if name not in blank or tuple(kept.size) != tuple(blank[name].shape):
            found = tuple(blank[name].shape) if name in blank else "nothing of that name"
            raise ValueError(f"{folder}: {name} is {tuple(kept.size)}, here is {found}; use the settings of that run")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(wanted, storage_reader=reader)
    return wanted
