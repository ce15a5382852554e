"""Safetensors on disk: every header is checked before memory is taken, tensors are mapped one at a time.

Pickles are refused, and only the named files are read: an index may only name files of its own folder.
"""

from __future__ import annotations

import json
import math
import mmap
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""What a weight may be stored as, by safetensors' name."""

_BYTES = {name: dtype.itemsize for name, dtype in FLOATS.items()} | {"F8_E5M2": 1, "BOOL": 1}
_BYTES |= {f"{sign}{bits}": bits // 8 for sign in "IU" for bits in (8, 16, 32, 64)}
_HEADER_LIMIT = 100_000_000
# Without this flag Linux refuses a private map that is larger than its memory, although pages that are only read need
# none. 0x4000 is its value in every Linux that PyTorch runs on; Python names it from 3.13 on.
_NORESERVE = 0x4000


class Entry(NamedTuple):
    """Where a tensor lies, bytes `start` to `stop` of a file, and its dtype and shape."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Shards:
    """The tensors and the metadata of one file or of several; no tensor is loaded."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def one_file(path: Path) -> Shards:
    """Read and check the header of a safetensors file.

    Raises:
        ValueError: it is empty, cut off, a pickle, or its header contradicts itself.
    """
    # 1. The file begins with the length of the header: it is checked before the header is read.
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(_HEADER_LIMIT, size - 8):
            raise ValueError(f"{path} cannot be read as safetensors: {_what_it_is(first, length, size)}")
        header = table(path, file.read(length))
    # 2. The header is a JSON table of names; each entry has to fit its own shape.
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"{path}: the metadata is no table of texts; the file is damaged")
    entries = {name: _entry(path, name, spec, 8 + length) for name, spec in header.items()}
    # 3. The tensors follow one another without gap or overlap, up to the end of the file.
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1][-2:]):
        if entry.start != end:
            raise ValueError(f"{path}: {name} starts at byte {entry.start:,}, expected {end:,}; the file is damaged")
        end = entry.stop
    if end != size:
        raise ValueError(f"{path} is cut off or damaged: its tensors end at byte {end:,}, the file at {size:,}")
    return Shards(entries, metadata)


def many_files(index: Path) -> Shards:
    """Read an index (`*.safetensors.index.json`) and the headers of all the files that it names.

    Raises:
        ValueError: the index names something outside its folder or a file that is missing, or disagrees with a file.
    """
    listing = read_json(index).get("weight_map")
    if not isinstance(listing, dict) or not all(isinstance(name, str) for name in listing.values()):
        raise ValueError(f"{index} has no `weight_map` from tensors to files")
    names = sorted(set(listing.values()))
    if outside := [n for n in names if Path(n).name != n or "\\" in n or not n.endswith(".safetensors")]:
        raise ValueError(f"{index} names {outside[0]!r}; an index may only name .safetensors files of its own folder")
    if missing := [n for n in names if not (index.parent / n).is_file()]:
        raise ValueError(f"{index} names {len(names)} files, missing: {', '.join(missing)}; fetch them again")
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for name in names:
        shard = one_file(index.parent / name)
        if twice := entries.keys() & shard.entries.keys():
            raise ValueError(f"{min(twice)} is both in {entries[min(twice)].path.name} and in {name} of {index.parent}")
        entries |= shard.entries
        metadata |= shard.metadata
    if elsewhere := [t for t, name in listing.items() if t not in entries or entries[t].path.name != name]:
        raise ValueError(f"{index} says that {elsewhere[0]} is in {listing[elsewhere[0]]}, but it is not")
    return Shards(entries, metadata)


class Reader:
    """Read tensors straight into their dtype and device; a file stays mapped as long as a tensor needs it."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries, self._maps = entries, {}

    def get(self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Tensor:
        """Read one tensor without a second copy of it in memory.

        A tensor that needs no conversion stays mapped: the system reads its pages from the file when they are used and
        drops them when memory is short, and what is written to it does not reach the file. The pages of a tensor that
        is converted or moved are dropped at once.
        """
        view = self._view(self._entries[name])
        tensor = view.to(device, dtype or view.dtype)
        if tensor.data_ptr() != view.data_ptr():
            self.drop(name)
        return tensor

    def _view(self, entry: Entry) -> Tensor:
        if entry.path not in self._maps:
            self._maps[entry.path] = _private_map(entry.path)
        raw = torch.frombuffer(
            self._maps[entry.path], dtype=torch.uint8, count=entry.stop - entry.start, offset=entry.start
        )
        dtype = FLOATS[entry.dtype]
        return (raw.clone() if entry.start % dtype.itemsize else raw).view(dtype).reshape(entry.shape)

    def drop(self, name: str) -> None:
        """Drop the pages of a tensor from memory; they are read again if it is asked for again."""
        entry = self._entries[name]
        start = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = entry.stop // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[entry.path].madvise(mmap.MADV_DONTNEED, start, length)


def _private_map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        if sys.platform != "linux":
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def finite(tensor: Tensor) -> bool:
    """Tell whether all values are finite; those of a tensor on the meta device are nothing yet."""
    if tensor.is_meta or not tensor.numel():
        return True
    if tensor.dtype == torch.float8_e4m3fn:
        return not any((part & 0x7F == 0x7F).any() for part in tensor.view(torch.uint8).flatten().split(1 << 20))
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def raw(entry: Entry) -> bytes:
    """Read the bytes of a tensor, whatever its dtype."""
    with entry.path.open("rb") as file:
        file.seek(entry.start)
        return file.read(entry.stop - entry.start)


def read_json(path: Path) -> dict:
    """Read a JSON table from a file, see `table`."""
    return table(path, path.read_bytes())


def _what_it_is(first: bytes, length: int, size: int) -> str:
    """Say what a file is whose first bytes are not the length of a header."""
    if not size:
        return "it is empty"
    if first.startswith((b"PK", b"\x80")):
        return "it is a pickle whatever its name says, and pickles are refused"
    return f"it has {size:,} bytes and claims a header of {length:,}; it is cut off or something else"


def table(path: Path, text: bytes | str) -> dict:
    """Read a JSON table of `path`; ValueError where it is damaged, above 100 MB, or names something twice."""
    try:
        if len(text) > _HEADER_LIMIT:
            raise ValueError(f"{len(text):,} bytes of JSON")
        table = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read, its JSON is damaged: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} cannot be read, its JSON is no table of names")
    return table


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return table


def _entry(path: Path, name: str, spec: object, begin: int) -> Entry:
    match spec:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            if dtype not in _BYTES:
                raise ValueError(f"{path}: {name} has dtype {dtype!r}; known are {', '.join(_BYTES)}")
            if all(isinstance(n, int) and n >= 0 for n in shape) and math.prod(shape) * _BYTES[dtype] == stop - start:
                return Entry(path, dtype, tuple(shape), begin + start, begin + stop)
    raise ValueError(f"{path}: what the header says of {name[:200]} cannot be: {str(spec)[:200]}")
