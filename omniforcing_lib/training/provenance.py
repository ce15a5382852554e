"""What something was made under is kept with it, and compared before it is used: one rule for shards, pairs and runs.

Settings are JSON by name. Where the content of a file or folder counts, and not its name, both are kept: `{"name": ...,
"sha256": ...}`. A setting that only one side names cannot be compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

LONGEST = 60
"""Characters of a value in a message."""


def by_content(name: str | Path, sha256: str) -> dict[str, str]:
    """Give the setting of what is known by its content."""
    return {"name": Path(name).name, "sha256": sha256[:16]}


def digest(*things: object) -> str:
    """Hash what JSON can hold."""
    return hashlib.sha256(json.dumps(things, sort_keys=True).encode()).hexdigest()


def differences(kept: Mapping[str, object], asked: Mapping[str, object]) -> list[str]:
    """Say of each setting that both name, and not alike, what it was and what is asked for."""
    asked = json.loads(json.dumps(asked))
    return [
        f"{name} {_said(kept[name], asked[name])}, found {_said(asked[name], kept[name])}"
        for name in asked
        if name in kept and not _same(kept[name], asked[name])
    ]


def unsaid(kept: Mapping[str, object], asked: Mapping[str, object]) -> list[str]:
    """List the settings that are asked for, and of which what was kept says nothing."""
    return [name for name in asked if name not in kept]


def _same(a: object, b: object) -> bool:
    known = [isinstance(x, dict) and "sha256" in x for x in (a, b)]
    if all(known):
        return a["sha256"] == b["sha256"]
    if any(known):  # of what is not there yet, or was kept by an earlier version, there is only a name
        return Path(_name(a)).stem == Path(_name(b)).stem
    return a == b


def _name(value: object) -> str:
    return str(value["name"] if isinstance(value, dict) else value)


def _said(value: object, other: object) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return f"{value['name']} ({value['sha256']})"
    if isinstance(value, list) and isinstance(other, list) and len(repr(value)) > LONGEST:
        at = next((i for i, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), len(other))
        value = f"{len(value)} of them" if at >= len(value) else f"{len(value)} of them, number {at} {value[at]!r}"
        return value[: 2 * LONGEST]
    return repr(value)[: 2 * LONGEST]
