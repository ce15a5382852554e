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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import accumulate, product
from pathlib import Path
from typing import NamedTuple

import torch

from omniforcing_lib import files
from omniforcing_lib.layout import PAPER
from omniforcing_lib.rollout import RolloutConfig
from studies import bench, cost, dry_run, gpu_phases
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


@lru_cache
@torch.inference_mode(False)
def elementwise() -> tuple[int, int]:
    """Count kernels and bytes of a steady pass of the 19B that are no products, fused as they are on a GPU.

    A pass of one layer and one of two are counted in dry runs: layers are alike.
    """
    config, causal = SIZES["19b"].config.with_sinks(PAPER.sinks), RolloutConfig()
    models = [dry_run.model_of(replace(config, num_layers=layers)) for layers in (1, 2)]
    counts = [dry_run.stream_pass(model, causal).steady.elementwise() for model in models]
    kernels, nbytes = (one + (config.num_layers - 1) * (two - one) for one, two in zip(*counts, strict=True))
    return kernels, nbytes


@lru_cache
@torch.inference_mode(False)
def decoded(horizon: int) -> list[tuple[dry_run.Ledger, int]]:
    """Count how LTX-2's decoders decode the first blocks, and the frames of each; later ones are like the last."""
    return dry_run.decoding(dry_run.decoders(), RolloutConfig(), horizon)


def predicted(card: str = "H100") -> list[dict[str, str]]:
    """Predict the 19B's stream on a card from counted work and assumed rates, decoders and elementwise work included.

    Nothing overlaps, no time is lost between kernels, and the prompt is encoded before.
    """
    at, rates, rows = SIZES["19b"], ASSUMED[card], []
    tokens, moved = at.grid[0] * at.grid[1], elementwise()[1]
    for passes, horizon in product(("4 passes", "3 passes", "2 passes"), HORIZONS):
        causal, shown, seconds = PASSES[passes], [], []
        for k, (ledger, frames) in enumerate(decoded(horizon)):
            work = cost.block_work(at.config, causal, tokens, k, at.text)
            parts = {
                "linear": work.linear / rates.linear,
                "attention": work.attention / rates.attention,
                "elementwise": work.passes * moved / rates.memory,
                "decoding": ledger.flops.total() / rates.convolution + ledger.elementwise()[1] / rates.memory,
            }
            seconds, shown = [*seconds, sum(parts.values())], [*shown, frames]
        soon = {
            n: sum(seconds[: 1 + next(k for k, there in enumerate(accumulate(shown)) if there >= n)])
            for n in (1, bench.CLOCK.fps)
        }
        rows.append(
            {"stream": f"{passes}, horizon {horizon}"}
            | {f"{name}, ms": f"{1e3 * part:.0f}" for name, part in parts.items()}
            | {"frames a second": f"{frames / seconds[-1]:.0f}"}
            | {"first frame, s": f"{soon[1]:.2f}", "first second, s": f"{soon[bench.CLOCK.fps]:.2f}"}
        )
    return rows
