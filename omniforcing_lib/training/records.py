"""What is made under settings keeps them, and is compared before it is used; rows of tensors in safetensors shards.

Settings are JSON by name. Where the content of a file or folder counts, and not its name, both are kept: `{"name": ...,
"sha256": ...}`. A setting that only one side names cannot be compared.

A folder of shards holds `rows-00000.safetensors`, ... and `index.json`, which is written last: rows, sha256 of every
shard, and notes. Tensor `x` of a shard holds one row of `x` for each row of the shard, so that any number of processes
can read any rows.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from omniforcing_lib.files import sha256, write_json, write_tensors
from omniforcing_lib.training.distributed import ALONE, DistributedContext

INDEX = "index.json"
LONGEST = 60
"""Characters of a list in a message; longer ones are shortened."""


def by_content(name: str | Path, sha256: str) -> dict[str, str]:
    """Give the setting of a thing that is known by its content."""
    return {"name": Path(name).name, "sha256": sha256[:16]}


def digest(*things: object) -> str:
    """Hash things that JSON can hold."""
    return hashlib.sha256(json.dumps(things, sort_keys=True).encode()).hexdigest()


def differences(kept: Mapping[str, object], asked: Mapping[str, object]) -> list[str]:
    """Describe each setting that both sides name and that is not the same: what it was, and what is asked for."""
    asked = json.loads(json.dumps(asked))
    return [
        f"{name} {_described(kept[name], asked[name])}, found {_described(asked[name], kept[name])}"
        for name in asked
        if name in kept and not _same(kept[name], asked[name])
    ]


def unknown(kept: Mapping[str, object], asked: Mapping[str, object]) -> list[str]:
    """List the settings that are asked for and that were not kept."""
    return [name for name in asked if name not in kept]


def _same(a: object, b: object) -> bool:
    hashed = [isinstance(x, dict) and "sha256" in x for x in (a, b)]
    if all(hashed):
        return a["sha256"] == b["sha256"]
    if any(hashed):  # a thing that is not there yet has only a name
        return Path(_name(a)).stem == Path(_name(b)).stem
    return a == b


def _name(value: object) -> str:
    return str(value["name"] if isinstance(value, dict) else value)


def _described(value: object, other: object) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return f"{value['name']} ({value['sha256']})"
    if isinstance(value, list) and isinstance(other, list) and len(repr(value)) > LONGEST:
        at = next((i for i, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), len(other))
        text = f"{len(value)} of them" if at >= len(value) else f"{len(value)} of them, number {at} {value[at]!r}"
        return text[: 2 * LONGEST]
    return repr(value)[: 2 * LONGEST]


def write(
    folder: str | Path,
    rows: int,
    rows_per_shard: int,
    make: Callable[[range], Mapping[str, Tensor]],
    notes: Mapping[str, object],
    group: DistributedContext = ALONE,
) -> Path:
    """Make rows shard by shard, the shards shared out among the processes; the index comes last.

    Shards that an earlier call left are kept, if they were made under the same notes and `rows`.

    Args:
        folder: where.
        rows: number of rows.
        rows_per_shard: rows of a file.
        make: gives the tensors of some rows, [len(range), ...] each.
        notes: what else readers need, and what the rows depend on; JSON.
        group: the processes.

    Raises:
        ValueError: a shard is there that was made under other notes, or that cannot be read; nothing has been made.
    """
    folder, notes = Path(folder), {**notes, "count": rows}
    spans = [range(start, min(start + rows_per_shard, rows)) for start in range(0, rows, rows_per_shard)]
    paths = {n: folder / f"rows-{n:05d}.safetensors" for n in range(group.rank, len(spans), group.size)}
    group.raise_everywhere([fault for path in paths.values() if path.exists() and (fault := _foreign(path, notes))])
    written = {}
    for number, path in tqdm(paths.items(), desc=f"shards of {folder.name}", disable=not group.is_main):
        if not path.exists():
            write_tensors(path, make(spans[number]), {"notes": json.dumps(notes, sort_keys=True)})
        written[number] = {"file": path.name, "rows": len(spans[number]), "sha256": sha256(path)}
    shards = {number: entry for part in group.all_gather(written) for number, entry in part.items()}
    if group.is_main:
        write_json(folder / INDEX, {"shards": [shards[n] for n in sorted(shards)], "notes": notes})
    group.barrier()
    return folder


def _foreign(path: Path, notes: Mapping[str, object]) -> str:
    """Say why a shard is none of those that are to be made; an empty text where it is one."""
    try:
        with safe_open(path, "pt") as file:
            notes_there = json.loads((file.metadata() or {})["notes"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} is damaged: {error!r}; remove it, and it is made again"
    changed = "; ".join(differences(notes_there, notes))
    return changed and f"{path} was made under other settings: {changed}; use those, or another folder"


class Records:
    """Read rows of a folder; no file stays open and nothing is held.

    Args:
        folder: with an index.
        group: the processes; each checks its share of the shards before any is read.

    Raises:
        ValueError: no index, or one that names files elsewhere; a shard is missing or is not what the index says.
    """

    def __init__(self, folder: str | Path, group: DistributedContext = ALONE) -> None:
        self.folder = Path(folder)
        try:
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            self.notes, shards = index["notes"], index["shards"]
            self._files = [str(shard["file"]) for shard in shards]
            self._ends = list(accumulate(int(shard["rows"]) for shard in shards))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / INDEX} cannot be read: {error!r}; write the folder again") from error
        for name in self._files:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{self.folder / INDEX} names {name!r}; only .safetensors files beside it are read")
        group.raise_everywhere([fault for shard in shards[group.rank :: group.size] if (fault := self._fault(shard))])

    def _fault(self, shard: Mapping[str, object]) -> str:
        path = self.folder / str(shard["file"])
        again = f"remove it and {INDEX} and start again: the other shards are kept"
        if not path.is_file():
            return f"{path} is missing, though the index names it; {again}"
        if (digest := sha256(path)) != shard["sha256"]:
            return f"{path} is damaged: its sha256 is {digest[:12]}…, the index says {shard['sha256'][:12]}…; {again}"
        with safe_open(path, "pt") as file:
            lengths = {name: file.get_slice(name).get_shape()[:1] for name in file.keys()}
        wrong = {name: length for name, length in lengths.items() if length != [shard["rows"]]}
        return f"{path} has {wrong} rows, the index says {shard['rows']}; {again}" if wrong else ""

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def rows(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Read some rows, in any order. Shapes: [len(numbers), ...] each.

        Raises:
            ValueError: a number that is no row.
        """
        parts: dict[str, list[Tensor]] = {}
        for number in numbers:
            if not 0 <= number < len(self):
                raise ValueError(f"{self.folder} has rows 0 to {len(self) - 1}, asked for {number}")
            shard = bisect_right(self._ends, number)
            at = number - (self._ends[shard - 1] if shard else 0)
            with safe_open(self.folder / self._files[shard], "pt") as file:
                for name in file.keys():
                    parts.setdefault(name, []).append(file.get_slice(name)[at : at + 1])
        return {name: torch.cat(rows) for name, rows in parts.items()}


def complete(path: str | Path) -> Path | None:
    """Give a file, or the index of a folder of shards (which is written last), if it is there."""
    file = Path(path) / INDEX if Path(path).is_dir() else Path(path)
    return file if file.is_file() else None


def content(path: str | Path) -> dict[str, str]:
    """Give the setting of a file, or of a folder of shards, whose index has the hash of each.

    Raises:
        ValueError: neither is there.
    """
    if not (file := complete(path)):
        raise ValueError(f"{path} is neither a file nor a folder of shards with its {INDEX}: make it first, or again")
    return by_content(path, sha256(file))
