"""Write files so that a reader sees the old one or the new one, never half: the one home of write-then-rename.

A path that a user gave is kept as it was given: `~` is their home, and no link is followed to another name.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor


def _shipped_folder() -> Path:
    """Find the folder of the shipped miniature: `data/` of the clone, else the package that pip installed it as."""
    clone = Path(__file__).resolve().parents[1] / "data"
    installed = None if (clone / "SHA256SUMS").is_file() else importlib.util.find_spec("omniforcing_data")
    return Path(next(iter(installed.submodule_search_locations or []))) if installed else clone


DATA = _shipped_folder()
"""Folder of the shipped miniature."""
STALE_S = 3600.0  # a half-written file older than this whose writer is gone is rubbish


def given(path: str | os.PathLike[str]) -> Path:
    """Give the path that a user means: `~` is expanded, links keep their names."""
    return Path(os.path.expanduser(path))


def check_file(path: Path) -> None:
    """Refuse a file that could not be written in the end, before any work; nothing is left behind.

    Raises:
        ValueError: it is a folder, or its place cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected the name of a file; name one in it")
    _check_place(path, path)


def check_folder(path: Path) -> None:
    """Refuse a folder that could not be made or filled in the end, before any work; nothing is left behind.

    Raises:
        ValueError: it is a file, or its place cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, expected a folder; name another")
    _check_place(path / "file", path)


def check_new(path: Path) -> None:
    """Refuse, by a ValueError, a folder that is there already."""
    if path.exists():
        raise ValueError(f"{path} is there already; name a folder that is not")


def _check_place(path: Path, wanted: Path) -> None:
    """Make the scratch folder that writing begins with: rights alone don't tell of a disk that is read-only or full."""
    try:
        while not path.parent.exists():
            path = path.parent
        with _scratch(path):
            pass
    except OSError as error:
        problem = f"{path.parent} does not let us write ({error.strerror})"
        raise ValueError(f"{wanted} cannot be written: {problem}; name another place") from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a file near `path` that takes its place if the block ends well and is gone if not.

    What was written is on the disk before it gets its name, so a cut in power leaves no empty file either. It has a
    folder to itself, so that what a writer puts beside its file goes with it; what a killed writer of `path` left half
    done is removed an hour later, by the next one.

    Raises:
        OSError: the disk is full, or may not be written; `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    try:
        with _scratch(path) as folder:
            partial = folder / path.name
            yield partial
            with suppress(PermissionError):  # some disks know no rights; else safetensors' file is its owner's alone
                partial.chmod(folder.stat().st_mode & 0o666)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written and is as it was: {error}") from error


@contextmanager
def filling(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty folder near `path` that becomes `path` if the block ends well and is gone if not.

    Raises:
        ValueError: something is at `path` already.
    """
    path = Path(path)
    check_new(path)
    with _scratch(path) as folder:
        yield folder
        os.replace(folder, path)


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """Give a folder beside `path`, this process's own, that is gone afterwards with all that is in it."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.part")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(path: Path) -> None:
    for left in path.parent.glob("." + glob.escape(path.name) + ".*.part"):
        writer = left.name.split(".")[-2]
        with suppress(FileNotFoundError):  # its writer has just finished
            silence = time.time() - (last_written(left) or left.stat().st_mtime)
            if writer.isdigit() and silence > STALE_S and not alive(int(writer)):
                shutil.rmtree(left, ignore_errors=True)


def last_written(folder: Path) -> float:
    """Give when the newest file below a folder was written, 0 where there is none; files may go in the meantime."""
    newest = 0.0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                newest = max(newest, os.stat(os.path.join(parent, name)).st_mtime)
    return newest


def sha256(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def alive(process: int) -> bool:
    """Tell whether a process of this machine runs."""
    try:
        return psutil.pid_exists(process)
    except OverflowError:  # no system counts so far: it is another's name for something
        return True


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write one safetensors file, atomically."""
    from safetensors.torch import save_file  # not above: what checks paths needs no torch

    with replacing(path) as partial:
        save_file(_apart(tensors), partial, dict(metadata or {}))
    return Path(path)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give each tensor memory of its own: safetensors refuses names that share it."""
    apart, taken = {}, set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.contiguous().clone() if place in taken else tensor.contiguous()
        taken.add(place)
    return apart


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Read a text file, a line at each newline and nowhere else: form feeds and U+2028 are part of a line.

    Lines come without spaces around them; empty ones, and a byte-order mark, are left out.

    Raises:
        ValueError: it is no UTF-8 text, or has no lines.
    """
    try:
        lines = [line.strip() for line in given(path).read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}); store it as UTF-8") from error
    if not any(lines):
        raise ValueError(f"{path}: expected a prompt a line, found none")
    return [line for line in lines if line]


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write bytes, atomically."""
    with replacing(path) as partial:
        partial.write_bytes(data)
    return Path(path)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write text, atomically."""
    return write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], data: Mapping) -> Path:
    """Write JSON with sorted keys, atomically; ValueError for what JSON cannot hold."""
    text = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return write_text(path, text + "\n")
