"""Runs stored one JSON file each, by name and training seed: a long comparison goes on where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from omniforcing_lib import files


def slug(name: str) -> str:
    """Make a name of an arm or a system the name of a file."""
    return name.replace(" ", "_").replace(",", "")


def path_of(folder: Path, name: str, seed: int) -> Path:
    """Give the file of a run."""
    return folder / f"{slug(name)}-{seed}.json"


def write(path: Path, record: Mapping[str, object], told: str = "") -> None:
    """Store a run on one line, for it holds hundreds of small numbers that nobody reads one by one; say when."""
    files.write_text(path, json.dumps(record, allow_nan=False) + "\n")
    print(f"{time.strftime('%H:%M:%S')} {path.name}{told}", flush=True)


def read(folder: str | Path) -> dict[Path, dict]:
    """Read all runs of a folder, in the order of their files."""
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))}
