"""Train Stage 3 for a long time in one run: memory and handles stay flat, numbers stay finite, the file loads.

python tests/reliability/soak_train.py --minutes 60 [--threads 1] [--batch 2] [--out FILE]
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from watch import Watch, write

from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.training import recipes, train


def soak(minutes: float, batch: int, seconds: int, seed: int, every: float, checkpoint: int) -> dict[str, object]:
    """Run `recipes.Stage3` with a folder until the time is up, then read what it left."""
    history: list[train.History] = []

    def fit(*args: object, **kwargs: object) -> train.History:
        history.append(train_fit(*args, **{**kwargs, "every": checkpoint}))
        return history[-1]

    train_fit = train.fit
    with tempfile.TemporaryDirectory() as scratch, Watch(every) as watch, patch.object(train, "fit", fit):
        folder, out = Path(scratch) / "run", Path(scratch) / "student.safetensors"
        where = {"out": str(out), "folder": str(folder), "score": 0}
        recipes.Stage3(steps=10**7, batch=batch, seconds=seconds, seed=seed, minutes=minutes, **where).run()
        left = sorted(path.name for path in folder.rglob("*") if path.is_file())
        parameters = sum(p.numel() for p in checkpoints.load(out).parameters())
    numbers = {name: [float(v) for v in values] for name, values in history[0].numbers.items()}
    broken = {name: sum(not math.isfinite(v) for v in values) for name, values in numbers.items()}
    found = watch.summary()
    return {
        "ok": not any(broken.values()) and found["rss_flat"] and found["open_files"][1] <= found["open_files"][0],
        "steps": max(map(len, numbers.values())),
        "checkpoint_every": checkpoint,
        "batch": batch,
        "clip_s": seconds,
        "seed": seed,
        "not_finite": broken,
        "first_and_last_means": {name: [mean(values[:50]), mean(values[-50:])] for name, values in numbers.items()},
        "left_in_folder": left,
        "parameters_loaded": parameters,
        **found,
    }


def mean(values: list[float]) -> float:
    """Average, to five digits."""
    return round(sum(values) / len(values), 5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=3, help="length of a clip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two samples of memory")
    parser.add_argument("--checkpoint", type=int, default=100, help="steps between two checkpoints")
    parser.add_argument("--out", default="", help="default reports/reliability/soak_train.json")
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    found = soak(o.minutes, o.batch, o.seconds, o.seed, o.every, o.checkpoint)
    sys.exit(not write("soak_train", o.out, found))
