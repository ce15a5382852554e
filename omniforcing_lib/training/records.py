"""Rows of tensors in safetensors shards with a JSON index: written shard by shard, checked by hash, read row by row.

A folder holds `rows-00000.safetensors`, ... and `index.json`, which comes last: rows, sha256 of every shard, and notes.
Tensor `x` of a shard holds one row of `x` for each row of the shard, so any number of processes can read any rows.
"""

from __future__ import annotations

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
from omniforcing_lib.training.provenance import by_content, differences

INDEX = "index.json"


def write(
    folder: str | Path,
    rows: int,
    a_shard: int,
    make: Callable[[range], Mapping[str, Tensor]],
    notes: Mapping[str, object],
    team: DistributedContext = ALONE,
) -> Path:
    """Make `rows` rows, `a_shard` in each file, the shards shared out among the processes; the index comes last.

    What was cut off goes on: shards that are there are kept, if they were made under the same notes and `rows`.

    Args:
        folder: where.
        rows: how many.
        a_shard: rows a file.
        make: gives the tensors of some rows, [len(range), ...] each.
        notes: what else readers need, and what the rows depend on; JSON.
        team: the processes.

    Raises:
        ValueError: a shard is there that was made under other notes, or that cannot be read; nothing has been made.
    """
    folder, notes = Path(folder), {**notes, "count": rows}
    spans = [range(start, min(start + a_shard, rows)) for start in range(0, rows, a_shard)]
    paths = {n: folder / f"rows-{n:05d}.safetensors" for n in range(team.rank, len(spans), team.size)}
    team.refuse([text for path in paths.values() if path.exists() and (text := _unlike(path, notes))])
    mine = {}
    for number, path in tqdm(paths.items(), desc=f"shards of {folder.name}", disable=not team.is_main):
        if not path.exists():
            write_tensors(path, make(spans[number]), {"notes": json.dumps(notes, sort_keys=True)})
        mine[number] = {"file": path.name, "rows": len(spans[number]), "sha256": sha256(path)}
    listed = {number: entry for part in team.all_of(mine) for number, entry in part.items()}
    if team.is_main:
        write_json(folder / INDEX, {"shards": [listed[n] for n in sorted(listed)], "notes": notes})
    team.wait()
    return folder


def _unlike(path: Path, notes: Mapping[str, object]) -> str:
    """Say why a shard is none of those that are to be made; nothing where it is one."""
    try:
        with safe_open(path, "pt") as file:
            kept = json.loads((file.metadata() or {})["notes"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} is damaged: {error!r}; remove it, and it is made again"
    found = differences(kept, notes)
    return f"{path} was made under other settings: {'; '.join(found)}; use those, or another folder" if found else ""


class Records:
    """Read rows of a folder; no file stays open and nothing is held.

    Args:
        folder: with an index.
        team: the processes; each checks its share of the shards before any is read.

    Raises:
        ValueError: no index, or one that names files elsewhere; a shard is missing or is not what the index says.
    """

    def __init__(self, folder: str | Path, team: DistributedContext = ALONE) -> None:
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
        team.refuse([text for shard in shards[team.rank :: team.size] if (text := self._wrong(shard))])

    def _wrong(self, shard: Mapping[str, object]) -> str:
        path = self.folder / str(shard["file"])
        again = f"remove it and {INDEX} and start again: the other shards are kept"
        if not path.is_file():
            return f"{path} is missing, though the index names it; {again}"
        if (found := sha256(path)) != shard["sha256"]:
            return (
                f"{path} is damaged: its sha256 is {found[:12]}…, the index says {str(shard['sha256'])[:12]}…; {again}"
            )
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
        found: dict[str, list[Tensor]] = {}
        for number in numbers:
            if not 0 <= number < len(self):
                raise ValueError(f"{self.folder} has rows 0 to {len(self) - 1}, asked for {number}")
            shard = bisect_right(self._ends, number)
            at = number - (self._ends[shard - 1] if shard else 0)
            with safe_open(self.folder / self._files[shard], "pt") as file:
                for name in file.keys():
                    found.setdefault(name, []).append(file.get_slice(name)[at : at + 1])
        return {name: torch.cat(parts) for name, parts in found.items()}


def there(path: str | Path) -> Path | None:
    """Give a file, or the index of a folder of shards, if there is one: it is written last."""
    file = Path(path) / INDEX if Path(path).is_dir() else Path(path)
    return file if file.is_file() else None


def content(path: str | Path) -> dict[str, str]:
    """Give the setting of a file, or of a folder of shards, whose index has the hash of each.

    Raises:
        ValueError: neither is there.
    """
    if not (file := there(path)):
        raise ValueError(f"{path} is neither a file nor a folder of shards with its {INDEX}: make it first, or again")
    return by_content(path, sha256(file))
