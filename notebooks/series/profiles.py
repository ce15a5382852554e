"""How much work a run does: one frozen record for each profile of `profiles.toml`, which explains the fields."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path


@dataclass(frozen=True)
class Profile:
    """Say how long, how many and how often for every notebook; `profiles.toml` says what each field means."""

    name: str
    seconds: int
    clips: int
    forced_clips: int
    long_clips: int
    teacher_steps: int
    fresh_ablations: bool
    ode_pairs: int
    stage2_steps: int
    stage2_batch: int
    stage3_steps: int
    stage3_batch: int
    stage3_lr: tuple[float, float]
    policy_steps: int
    policy_batch: int
    sink_counts: tuple[int, ...]
    sink_steps: int
    sink_clips: int
    long_seconds: int
    bench_seconds: int
    bench_grid: tuple[int, int]
    bench_blocks: int
    bench_turns: int
    switches: int
    seeds: int
    teacher_clips: int
    mask_seconds: tuple[int, ...]
    grid: tuple[int, int]
    dtype: str
    precisions: tuple[str, ...]

    def override(self, changes: Mapping[str, object]) -> Profile:
        """Replace fields by name; None keeps the profile's own value.

        Raises ValueError for an unknown field, and for a count below 1.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        names = [field.name for field in fields(self)]
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(f"profile {self.name!r} has no field {', '.join(unknown)}; it has {', '.join(names)}")
        if low := [f"{name}={value}" for name, value in given.items() if type(value) is int and value < 1]:
            raise ValueError(f"profile {self.name!r} counts from 1, found {', '.join(low)}; 0 takes its own value")
        return replace(self, **given)


def _read() -> dict[str, Profile]:
    tables = tomllib.loads(Path(__file__).with_name("profiles.toml").read_text(encoding="utf-8"))
    for name, table in tables.items():
        lists = {field: tuple(value) for field, value in table.items() if isinstance(value, list)}
        tables[name] = tables.get(table.pop("like", ""), {}) | table | lists
    return {name: Profile(name=name, **table) for name, table in tables.items()}


PROFILES = _read()


def from_name(name: str) -> Profile:
    """Return the profile of that name; raise ValueError that lists the names otherwise."""
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; choose one of {', '.join(PROFILES)}")
    return PROFILES[name]
