"""Run `bench`: its phases in processes of their own, every figure kept at once; and predict what a GPU would show.

A run writes `<card>.json`: card, commit, size, and a list of figures, each of a phase, a name, a value and a unit. The
file is rewritten after every phase, and phases that another run of the same commit and size has measured are kept.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import accumulate, product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from omniforcing_lib import files
from omniforcing_lib.layout import AV, PAPER
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.transformer import Transformer
from studies import bench, cost, gpu_phases
from studies.gpu_phases import PASSES, PHASES, SIZES, Size
from studies.store import git_state, plain, slug

LEAST_S = 15
"""Seconds below which no further phase is begun."""


def run(size: str, device: str, phases: Sequence[str] = (), budget: float = 570.0, out: Path | str = "") -> Path:
    """Measure phase by phase within a budget in seconds; print each figure as a line of JSON, and a summary at the end.

    Args:
        size: of `SIZES`.
        device: a CPU or a GPU.
        phases: of `PHASES`; all by default.
        budget: seconds; a phase of the 19B is ended at its own limit, any when the budget is spent.
        out: folder of the file; by default reports/gpu for a GPU, and reports/runs/gpu for a dry run on a CPU.

    Where there is no clone, the environment variable COMMIT says which commit is measured.

    Returns the file. Raises ValueError for an unknown phase, or a size that the device cannot hold.
    """
    if unknown := sorted({*phases} - {*PHASES}):
        raise ValueError(f"unknown phases {', '.join(unknown)}; choose from {', '.join(PHASES)}")
    at = SIZES[size]._replace(device=device)
    if at.whole and not at.cuda:
        raise ValueError("--size 19b draws 38 GB of weights on a GPU, found --device cpu; use --size bench")
    card = torch.cuda.get_device_name(device) if at.cuda else "cpu"
    folder = Path(out or ("reports/gpu" if at.cuda else "reports/runs/gpu"))
    path, began = folder / f"{slug(card.lower())}.json", time.monotonic()
    state = git_state()
    record = {"card": card, "device": device, "size": size}
    record |= {"commit": state["commit"] or os.environ.get("COMMIT"), "dirty": state["dirty"]}
    chosen = [phase for phase in PHASES if phase in (phases or PHASES)]
    figures = [f for f in kept(path, record) if f["phase"] not in chosen]
    for phase in chosen:
        left = budget - (time.monotonic() - began)
        limit = min(PHASES[phase][0], left) if at.whole else left
        new = in_process(phase, at, limit) if left > LEAST_S else [_unbegun(phase)]
        figures += new
        files.write_json(path, record | {"figures": figures})
    print(summary(figures))
    return path


def kept(path: Path, record: Mapping[str, object]) -> list[dict]:
    """Give the figures that a file of the same card, size and commit holds already."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return stored["figures"] if all(stored.get(name) == value for name, value in record.items()) else []


def in_process(phase: str, at: Size, limit: float) -> list[dict]:
    """Run a phase in a process of its own; give what it told, also where it crashed or was ended at its limit."""
    with tempfile.TemporaryDirectory() as folder:
        lines, began = Path(folder) / "figures.jsonl", time.monotonic()
        child = multiprocessing.get_context("spawn").Process(target=_child, args=(phase, at, lines))
        child.start()
        child.join(limit)
        ended = f"ended after {limit:.0f} s" if child.is_alive() else child.exitcode
        child.kill()
        child.join()
        tell(lines, phase, "exit", ended)
        tell(lines, phase, "took", time.monotonic() - began, "s")
        return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]


def _child(phase: str, at: Size, lines: Path) -> None:
    raise SystemExit(gpu_phases.run(phase, at, partial(tell, lines, phase)))


def tell(lines: Path, phase: str, name: str, value: object, unit: str = "") -> None:
    """Print a figure as a line of JSON, and keep the line."""
    line = json.dumps({"phase": phase, "name": name, "value": plain(value), "unit": unit})
    with lines.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def _unbegun(phase: str) -> dict:
    return {"phase": phase, "name": "exit", "value": "skipped: no time left", "unit": ""}


def summary(figures: Sequence[Mapping[str, object]]) -> str:
    """Write all figures as text, a heading for each phase."""
    lines: list[str] = []
    for phase in dict.fromkeys(figure["phase"] for figure in figures):
        lines += ["", phase]
        lines += [f"  {f['name']}: {f['value']} {f['unit']}".rstrip() for f in figures if f["phase"] == phase]
    return "\n".join(lines)


class Rates(NamedTuple):
    """What a card is assumed to reach: FLOP/s of linear layers, attention and convolutions, bytes/s of memory."""

    linear: float
    attention: float
    convolution: float
    memory: float


ASSUMED = {"H100": Rates(620e12, 450e12, 235e12, 2.6e12)}
"""By card; none of them was measured here."""
HORIZONS = (3, 1)


class Traffic(TorchDispatchMode):
    """Count kernels and bytes of all that is no matrix product, on the meta device: every kernel reads and writes once.

    Attributes:
        kernels: calls of kernels that touch memory.
        nbytes: bytes of their inputs and outputs.
    """

    OTHERS = ("linear", "mm", "addmm", "scaled_dot_product_attention", "empty")

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.nbytes = 0, 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        """Run a kernel and count it, unless it is a product or gives a view."""
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        given, made = ([t for t in tree_leaves(part) if isinstance(t, Tensor)] for part in ((args, kwargs), out))
        here = {t.untyped_storage()._cdata for t in given}
        is_view = not name.endswith("_") and all(t.untyped_storage()._cdata in here for t in made)
        if made and not is_view and name not in self.OTHERS:
            self.kernels += 1
            self.nbytes += sum(t.nbytes for t in (*given, *made))
        return out


@lru_cache
def elementwise() -> tuple[int, int]:
    """Count kernels and bytes of a steady pass of the 19B that are no products: norms, modulation, rotation, gates.

    A pass of one layer and one of two are counted: layers are alike.
    """
    at, counts = SIZES["19b"], []
    for layers in (1, 2):
        config = replace(at.config.with_sinks(PAPER.sinks), num_layers=layers)
        with torch.device("meta"):
            model = Transformer(config).to(gpu_phases.HALF).requires_grad_(False)
            call = bench.open_block(model, RolloutConfig(), at.grid, 6, at.text)
        call()  # what is held from then on is computed once
        with Traffic() as traffic:
            call()
        counts.append((traffic.kernels, traffic.nbytes))
    kernels, nbytes = (one + (at.config.num_layers - 1) * (two - one) for one, two in zip(*counts, strict=True))
    return kernels, nbytes


@lru_cache
def decoded(horizon: int) -> tuple[list[float], list[int]]:
    """Count FLOPs of decoding blocks 0 to 3 by LTX-2's decoders, and the frames shown; later ones are like block 3."""
    at, flops, frames = SIZES["19b"]._replace(device="meta"), [], []
    codec = gpu_phases.codec_of(at, gpu_phases.codec_parts(at), horizon)
    state = codec.start()
    for k in range(4):
        video, audio = PAPER.block(k).map(len)
        shapes = AV((1, video, *at.grid, at.config.in_channels), (1, audio, at.config.audio_in_channels))
        with FlopCounterMode(display=False) as counter:
            frames.append(codec.decode(shapes.map(partial(torch.empty, device="meta")), state).video.shape[1])
        flops.append(counter.get_total_flops())
    return flops, frames


def predicted(card: str = "H100") -> list[dict[str, str]]:
    """Predict the 19B's stream on a card from counted work and assumed rates, decoders and elementwise work included.

    Nothing overlaps, no time is lost between kernels, and the prompt is encoded before.
    """
    at, rates, rows = SIZES["19b"], ASSUMED[card], []
    tokens, moved = at.grid[0] * at.grid[1], elementwise()[1]
    for passes, horizon in product(("4 passes", "3 passes", "2 passes"), HORIZONS):
        causal, (flops, frames) = PASSES[passes], decoded(horizon)
        steady = causal.window + 2
        works = [cost.block_work(at.config, causal, tokens, k, at.text) for k in (0, 1, 2, steady)]
        parts = [
            {
                "linear": work.linear / rates.linear,
                "attention": work.attention / rates.attention,
                "elementwise": work.passes * moved / rates.memory,
                "decoding": count / rates.convolution,
            }
            for work, count in zip(works, flops, strict=True)
        ]
        seconds, shown = (list(accumulate(each)) for each in ((sum(part.values()) for part in parts), frames))
        first = {n: seconds[next(k for k, there in enumerate(shown) if there >= n)] for n in (1, bench.CLOCK.fps)}
        rows.append(
            {"stream": f"{passes}, horizon {horizon}"}
            | {f"{name}, ms": f"{1e3 * part:.0f}" for name, part in parts[-1].items()}
            | {"frames a second": f"{frames[-1] / sum(parts[-1].values()):.0f}"}
            | {"first frame, s": f"{first[1]:.2f}", "first second, s": f"{first[bench.CLOCK.fps]:.2f}"}
        )
    return rows
