"""How much work a run does: one frozen record for each profile of `profiles.toml`, which explains the fields."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Named:
    """What every profile has besides the fields of `profiles.toml`."""

    name: str

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


def _read() -> dict[str, dict[str, object]]:
    tables = tomllib.loads(Path(__file__).with_name("profiles.toml").read_text(encoding="utf-8"))
    for name, table in tables.items():
        lists = {field: tuple(value) for field, value in table.items() if isinstance(value, list)}
        tables[name] = tables.get(table.pop("like", ""), {}) | table | lists
    return tables


_TABLES = _read()
Profile = make_dataclass("Profile", [(n, type(v)) for n, v in _TABLES["smoke"].items()], bases=(Named,), frozen=True)
"""Say how long, how many and how often for every notebook; `profiles.toml` says what each field means."""
PROFILES = {name: Profile(name=name, **table) for name, table in _TABLES.items()}


def from_name(name: str) -> Profile:
    """Return the profile of that name; raise ValueError that lists the names otherwise."""
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; choose one of {', '.join(PROFILES)}")
    return PROFILES[name]
