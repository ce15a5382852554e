"""Write files so that a reader sees the old one or the new one, never half: the one home of write-then-rename."""

from __future__ import annotations

import glob
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

STALE_S = 3600.0  # a half-written file older than this whose writer is gone is rubbish


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a file beside `path` that takes its place if the block ends well and is gone if not.

    What was written is on the disk before it gets its name, so a cut in power leaves no empty file either. What a
    killed writer of `path` left half done is removed an hour later, by the next one.

    Raises:
        OSError: the disk is full, or may not be written; `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written and is as it was: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def filling(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty folder beside `path` that becomes `path` if the block ends well and is gone if not.

    Raises:
        ValueError: something is at `path` already.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} is there already; name a folder that is not")
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(path: Path) -> None:
    for left in path.parent.glob("." + glob.escape(path.name) + ".*.part"):
        writer = left.name.split(".")[-2]
        if left.is_file() and writer.isdigit() and time.time() - left.stat().st_mtime > STALE_S:
            if not _alive(int(writer)):
                left.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is no question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write one safetensors file, atomically."""
    with replacing(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, dict(metadata or {}))
    return Path(path)


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
