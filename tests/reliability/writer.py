"""Replace one file again and again, and be killed for it: what a reader finds is the old version or the new one.

python tests/reliability/writer.py --each 200 [--out FILE]
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import load_file

from omniforcing_lib import files, media
from omniforcing_lib.layout import AV


def tensors(path: Path, version: int) -> None:
    """Write a checkpoint whose every number is its version."""
    files.write_tensors(path, {"a": torch.full((300_000,), float(version)), "b": torch.full((9,), float(version))})


def table(path: Path, version: int) -> None:
    """Write a report whose every number is its version."""
    files.write_json(path, {f"row {i}": version for i in range(50_000)})


def clip(path: Path, version: int) -> None:
    """Write a film of one grey level, its version."""
    frames = np.full((25, 32, 32, 3), 10 * version, np.uint8)
    media.write_clip(path, AV(frames, np.zeros(16_160, np.float32)), scale=1)


def version_of(path: Path) -> int:
    """Read the version back; fails if the file is not whole, or of two versions."""
    if path.suffix == ".safetensors":
        found = torch.cat(list(load_file(path).values())).unique().tolist()
    elif path.suffix == ".json":
        found = sorted(set(json.loads(path.read_text()).values()))
    else:
        levels = media.read_clip(path, size=(32, 32)).video.mean((1, 2, 3))
        found = sorted({round(float(level) / 10) for level in levels})
    if len(found) != 1:
        raise ValueError(f"{path} holds versions {found[:5]}")
    return int(found[0])


KINDS: dict[str, Callable[[Path, int], None]] = {"a.safetensors": tensors, "a.json": table, "a.mp4": clip}


def write_for_ever(path: Path, told: Connection) -> None:
    """Write versions 1 to 24 in a circle; before each say which one is there and which one comes."""
    torch.set_num_threads(1)
    there = 0
    for version in cycle(range(1, 25)):
        told.send((there, version))
        KINDS[path.name](path, version)
        there = version


def forks() -> multiprocessing.context.BaseContext:
    """Give processes that start quickly: torch is imported once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "safetensors.torch", "omniforcing_lib.media"])
    return context


def kill_writers(path: Path, times: int, dice: Random) -> dict[str, int]:
    """Kill a writer of `path` at random moments; count the kills, those within a write, and what was lost."""
    lost, start = 0, forks()
    for _ in range(times):
        KINDS[path.name](path, 0)
        told, telling = start.Pipe(duplex=False)
        process = start.Process(target=write_for_ever, args=(path, telling))
        process.start()
        old_and_new = told.recv()
        time.sleep(dice.random() * 0.2)
        process.kill()
        process.join()
        while told.poll():
            old_and_new = told.recv()
        try:
            lost += version_of(path) not in old_and_new
        except (ValueError, OSError):
            lost += 1
    within = sum(entry.suffix == ".part" for entry in path.parent.iterdir())
    return {"kills": times, "within_a_write": within, "lost": lost}


if __name__ == "__main__":
    from watch import write

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=200, help="kills of each kind of file")
    parser.add_argument("--out", default="", help="default reports/reliability/kills.json")
    options = parser.parse_args()
    found = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as scratch:
            found[kind] = kill_writers(Path(scratch) / kind, options.each, Random(kind))
    lost = sum(kind["lost"] for kind in found.values())
    sys.exit(not write("kills", options.out, {"ok": not lost, "lost": lost, "kinds": found}))
