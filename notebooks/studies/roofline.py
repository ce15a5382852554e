"""What this machine could do at best, and where time and memory of a call go: kinds of kernels under their roofs.

Shapes: rates in GFLOP/s and GB/s; a share is of the whole time of a call.
"""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.transformer import Transformer
from studies import bench
from studies.bench import alternate, seconds_of
from studies.cost import Work

KINDS = {"attention": ("scaled_dot_product",), "linear layers": ("addmm", "aten::mm"), "convolutions": ("conv",)}
OTHER_KERNELS = "norms, rotation, modulation, copies"
ROWS = 1152
"""Queries of the measured attention: a block of frames of 384 tokens."""


class Machine(NamedTuple):
    """What this machine does at best: GFLOP/s of matrix products by dtype, and of attention."""

    gemm: dict[str, float]
    attention: float


@torch.inference_mode()
def machine(device: str = "cpu", turns: int = 5, size: int = 1024) -> Machine:
    """Measure the roofs: square products in fp32 and bf16, attention of 1152 on 6144 tokens; best of turns."""
    return _machine({name: min(times) for name, times in alternate(_probes(device, size), turns).items()}, size)


def _probes(device: str, size: int) -> dict[str, Callable[[], object]]:
    square = {d: torch.randn(size, size, device=device, dtype=getattr(torch, d)) for d in ("float32", "bfloat16")}
    query, key = (torch.randn(1, 4, n, 64, device=device) for n in (ROWS, 6 * size))
    calls = {dtype: (lambda x=x: x @ x) for dtype, x in square.items()}
    return calls | {"attention": lambda: torch.nn.functional.scaled_dot_product_attention(query, key, key)}


def _machine(seconds: Mapping[str, float], size: int) -> Machine:
    """Turn seconds of the probes into rates."""
    products = {name: 2 * size**3 / seconds[name] / 1e9 for name in ("float32", "bfloat16")}
    return Machine(products, 4 * ROWS * 6 * size * 256 / seconds["attention"] / 1e9)


@torch.inference_mode()
def over_floor(
    call: Callable[[], object], work: Work, turns: int, device: str = "cpu", size: int = 1024
) -> tuple[float, float, float]:
    """Give the time of a pass over its floor: median, least and most of `turns`.

    Each turn sets the pass against the rates measured just before and just after it, so that a slow moment of the
    machine falls on both.
    """
    probes, ratios = _probes(device, size), []
    for _ in tqdm(range(turns + 1), desc="timing", unit="turn", delay=2, leave=False):  # the first warms up
        before = {name: seconds_of(probe) for name, probe in probes.items()}
        took = seconds_of(call)
        around = {name: (before[name] + seconds_of(probe)) / 2 for name, probe in probes.items()}
        ratios.append(took / floor_s(work, _machine(around, size)))
    return statistics.median(ratios[1:]), min(ratios[1:]), max(ratios[1:])


@contextmanager
def silent() -> Iterator[None]:
    """Keep what is written past Python to standard error off the screen: the profiler's library says when it starts."""
    standard_error, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(standard_error, 2)
        os.close(standard_error)
        os.close(nowhere)


def where_time_goes(call: Callable[[], object], turns: int) -> list[dict[str, float]]:
    """Split the seconds of each of `turns` calls on the CPU: kinds of kernels, and Python, dispatch, the profiler."""
    call()
    return [_split(call) for _ in range(turns)]


def _split(call: Callable[[], object]) -> dict[str, float]:
    with silent(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        whole = seconds_of(call)
    spent = dict.fromkeys((*KINDS, OTHER_KERNELS), 0.0)
    for event in profiler.key_averages():
        kind = next((name for name, marks in KINDS.items() if any(m in event.key for m in marks)), OTHER_KERNELS)
        spent[kind] += event.self_cpu_time_total / 1e6
    return spent | {"Python and dispatch": max(0.0, whole - sum(spent.values()))}


def peak_bytes(call: Callable[[], object]) -> int:
    """Run a call and give the most bytes of tensors that it held at a time, over what was held before."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), default=0)


def training_rows(
    model: Transformer, causal: RolloutConfig, grid: tuple[int, int], seconds: int, turns: int
) -> tuple[list[dict[str, object]], float, float]:
    """Hold block-sliced attention against one dense mask in the whole training step: rows, and sliced / dense.

    The two ratios are of median seconds and of peak memory over what was held before.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    steps = {
        rendering: bench.training_step(model, causal, grid, seconds, rendering) for rendering in ("sliced", "dense")
    }
    took = {rendering: statistics.median(times) for rendering, times in alternate(steps, turns).items()}
    peaks = {rendering: peak_bytes(step) for rendering, step in steps.items()}
    rows = [
        {
            "attention": rendering,
            "forward + backward, s": f"{took[rendering]:.2f}",
            "peak memory, MB": f"{peaks[rendering] / 1e6:.0f}",
        }
        for rendering in steps
    ]
    return rows, took["sliced"] / took["dense"], peaks["sliced"] / peaks["dense"]


def shares(splits: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float, float]]:
    """Give each kind's share in per cent: mean over the calls, least and most."""
    percent = {kind: [100 * split[kind] / sum(split.values()) for split in splits] for kind in splits[0]}
    return {kind: (float(np.mean(parts)), min(parts), max(parts)) for kind, parts in percent.items()}


def floor_s(work: Work, roofs: Machine) -> float:
    """Give the seconds that a pass takes if its matrix products run at this machine's peaks and nothing else costs."""
    return work.linear / roofs.gemm["float32"] / 1e9 + work.attention / roofs.attention / 1e9


def reached(
    work: Work, splits: Sequence[Mapping[str, float]], seconds: float, roofs: Machine
) -> dict[str, tuple[float, float]]:
    """Give the GFLOP/s of each kind of product, by the profiler's splits, and of the whole; and shares of peak."""
    linear, attention = (float(np.median([s[kind] for s in splits])) for kind in ("linear layers", "attention"))
    done = {
        "linear layers": (work.linear, linear, roofs.gemm["float32"]),
        "attention": (work.attention, attention, roofs.attention),
        "the whole pass": (work.flops, seconds, work.flops / floor_s(work, roofs) / 1e9),
    }
    return {kind: (flops / s / 1e9, flops / s / 1e9 / roof) for kind, (flops, s, roof) in done.items()}


def reached_rows(rates: Mapping[str, tuple[float, float]]) -> list[dict[str, object]]:
    """Table what `reached` gives."""
    return [
        {"of one pass": kind, "GFLOP/s": f"{rate:.0f}", "of the measured peak": f"{share:.0%}"}
        for kind, (rate, share) in rates.items()
    ]
