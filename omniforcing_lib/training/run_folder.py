"""The folder of a run: a lock, a line per step, a checkpoint, and an end when asked.

A folder holds `lock`, `history.jsonl`, and the state in `state-<step>/`, written by torch.distributed.checkpoint as
safetensors (its other format keeps an index that is a pickle), for one process as for many; `notes.json` beside the
tensors says the settings. A state folder is complete or not there. A run that ended in any way goes on from the last
state by the same command, with any number of processes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from omniforcing_lib.files import alive, last_written, write_json, write_text
from omniforcing_lib.training.distributed import LONG_TIMEOUT_S, STEP_TIMEOUT_S, DistributedContext
from omniforcing_lib.training.records import differences, unknown

SILENT_S = 1800.0
"""A run on another host that has written nothing for so long is over: a step, or a checkpoint, is much sooner."""
SIGTERM_CODE = 128 + signal.SIGTERM
"""Exit code of a run that a scheduler ended and that can go on: 143."""


class Diverged(ArithmeticError):
    """Too many steps in a row had a gradient that is not finite or too large."""


class HasState(Protocol):
    """Whatever learns: its tensors are stored, and read in place."""

    def state_dict(self) -> dict[str, Tensor]:
        """Give the tensors by name."""


class RunFolder:
    """What a run writes to its folder, which it has for itself within `with`; without a folder it writes nothing.

    Within `with`, SIGTERM sets `told_to_end` and nothing else.

    Args:
        folder: of the run; None or an empty name keeps nothing.
        learners: what learns, by name.
        seed: of the run.
        group: the processes.
        settings: what else the outcome depends on, by name; JSON. A run goes on under the settings that it began with.
        plan: what may change on the way, by name: how long the run is, and how often it is stored.

    Raises:
        ValueError: on entering, another run has the folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        learners: Mapping[str, HasState],
        seed: int,
        group: DistributedContext,
        settings: Mapping[str, object] | None = None,
        plan: Mapping[str, int] | None = None,
    ) -> None:
        self.folder, self.learners, self.seed, self.group = Path(folder) if folder else None, learners, seed, group
        self.settings, self.plan, self.changes = {**(settings or {}), "seed": seed}, dict(plan or {}), []
        self.told_to_end = False
        self._history: IO | None = None
        self._held = ExitStack()

    def __enter__(self) -> RunFolder:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(_locked(self.folder / "lock", self.group.is_main))
            self._held.enter_context(_heeding(lambda: setattr(self, "told_to_end", True)))
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: learner.state_dict() for name, learner in self.learners.items()}
        return {f"{name}/{key}": tensor for name, state in tensors.items() for key, tensor in state.items()}

    def resume(self) -> int:
        """Read the newest state into the learners; give the step to go on with.

        Raises:
            ValueError: it was trained with another seed or other settings, or is damaged.
        """
        if self.folder is None:
            return 0
        start, newest = 0, newest_state(self.folder, self.settings)
        if newest is not None:
            start, path, notes = newest
            self._compare(start, path, notes)
            _load(path, self._tensors())
        if self.group.is_main:
            self._open_history(start)
        return start

    def _compare(self, start: int, path: Path, notes: Mapping[str, object]) -> None:
        """Print and keep what has changed or is not known: a learning rate, for instance, follows the length."""
        earlier, self.changes = notes["settings"], list(notes["changes"])
        messages = differences(earlier, self.plan)
        if (steps := earlier.get("steps")) not in (None, self.plan.get("steps")):
            self.changes.append(f"of {steps} steps up to step {start}")
        if names := ", ".join(unknown(earlier, self.settings)):
            self.changes.append(f"{names} not known up to step {start}")
            messages.append(f"it does not say its {names}: taken on trust")
        if messages and self.group.is_main:
            print(f"{path} goes on from step {start}: {'; '.join(messages)}", flush=True)

    def store(self, step: int) -> None:
        """Write the state after `step` steps; the one before is removed when this one is there."""
        if self.folder is None:
            return
        import torch.distributed.checkpoint as dcp

        path = self.folder / f"state-{step:08d}"
        partial = path.with_name(f".{path.name}.part")
        self.group.set_timeout(LONG_TIMEOUT_S)
        if self.group.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        self.group.barrier()
        with _single_process_is_fine():
            writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
            dcp.save(self._tensors(), storage_writer=writer)
        self.group.barrier()
        if self.group.is_main:
            notes = {"step": step, "settings": self.settings | self.plan, "changes": self.changes}
            write_json(partial / "notes.json", notes)
            os.replace(partial, path)
            for old in {*self.folder.glob("state-*")} - {path}:
                shutil.rmtree(old)
        self.group.barrier()
        self.group.set_timeout(STEP_TIMEOUT_S)

    def _open_history(self, start: int) -> None:
        """Drop the lines of steps that will run again."""
        path = self.folder / "history.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        write_text(path, "".join(f"{line}\n" for line in lines if _step_of(line) < start))
        self._history = self._held.enter_context(path.open("a", buffering=1, encoding="utf-8"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a step to `history.jsonl`; what is not finite is null."""
        if self._history:
            values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self._history.write(json.dumps({"step": step, **values}) + "\n")

    def diverged(self, steps: list[dict[str, float]]) -> Diverged:
        """Write the seed, steps, norms and losses of the bad steps; give the error to raise."""
        first, last = int(steps[0]["step"]), int(steps[-1]["step"])
        message = f"the gradients of steps {first} to {last} were not finite or too large: {len(steps)} updates skipped"
        if self.folder is None or not self.group.is_main:
            return Diverged(message)
        rows = [{name: value if math.isfinite(value) else repr(value) for name, value in row.items()} for row in steps]
        path = self.folder / "diverged.json"
        write_json(path, {"seed": self.seed, "steps": rows})
        return Diverged(f"{message}; their seeds, norms and losses are in {path}")


def newest_state(folder: Path, asked: Mapping[str, object]) -> tuple[int, Path, Mapping[str, object]] | None:
    """Find the newest state of a run, its step and its notes, if there is one.

    Raises:
        ValueError: the run began under other settings than are asked for; or its state is damaged, or of a version
            before torch.distributed.checkpoint stored all of them.
    """
    states = sorted(folder.glob("state-*"))
    if (path := folder / "state.safetensors").exists():
        raise ValueError(_outdated(path))
    if not states:
        return None
    path = states[-1]
    try:
        notes = json.loads((path / "notes.json").read_text(encoding="utf-8"))
        settings, step = notes["settings"], int(notes["step"])
        for file in path.glob("*.safetensors"):
            safe_open(file, "pt").__exit__(None, None, None)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}; remove it to start from nothing") from error
    if not isinstance(settings, dict):
        raise ValueError(_outdated(path))
    if changed := "; ".join(differences(settings, asked)):
        raise ValueError(f"{path} was trained with other settings: {changed}; go on with those, or use another folder")
    return step, path, notes


def _outdated(path: Path) -> str:
    return f"{path} was stored by an earlier version, whose runs do not go on; remove it, or use another folder"


def _load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Read a state into tensors, in place.

    Raises:
        ValueError: a name or a shape differs, or a file is damaged.
    """
    import torch.distributed.checkpoint as dcp

    try:
        reader = dcp.HuggingFaceStorageReader(str(path))
        entries = reader.read_metadata().state_dict_metadata
        stored = {name: tuple(entry.size) for name, entry in entries.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in {**stored, **wanted}:
            if stored.get(name) != wanted.get(name):
                raise ValueError(
                    f"{path}: {name} is {stored.get(name)}, here it is {wanted.get(name)}; use the settings of that run"
                )
        with _single_process_is_fine():
            dcp.load(tensors, storage_reader=reader)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}; remove it to start from nothing") from error


@contextmanager
def _single_process_is_fine() -> Iterator[None]:
    """Hide torch's warning that there is one process alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _step_of(line: str) -> float:
    """Number of a line's step; infinite where the line was cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


@contextmanager
def _locked(path: Path, is_main: bool) -> Iterator[None]:
    """Hold a folder's lock: a file with host and process id, locked by the kernel, which lets go of it at any death."""
    if not is_main:
        yield
        return
    with path.open("a+", encoding="utf-8") as file:
        file.seek(0)
        owner = file.read().strip()
        host = owner.partition(" ")[0]
        if _busy(file, path, owner):
            raise ValueError(
                f"{path.parent} is in use by {owner or 'a run that has just begun'}; "
                "wait for it, or give this run another folder"
            )
        if owner and host != socket.gethostname() and (left := SILENT_S - _silence_s(path.parent)) > 0:
            raise ValueError(
                f"{path.parent} was last used by {owner}, which cannot be seen from {socket.gethostname()}; if that "
                f"run is over, remove {path}; if it writes nothing, it counts as over in {math.ceil(left / 60)} minutes"
            )
        if owner:
            print(f"{path.parent}: taken over from {owner}, which ended without letting go of it", flush=True)
        file.truncate(0)
        file.write(f"{socket.gethostname()} process {os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _busy(file: IO, path: Path, owner: str) -> bool:
    """Take the lock, or tell that another run has it; only "would block" says that, any other error is the disk's."""
    try:
        _take(file)
    except BlockingIOError:
        return True
    except OSError as error:
        print(f"{path}: no locks here ({error.strerror}); who is named in it has the folder while alive", flush=True)
        host, _, process = owner.partition(" process ")
        another = host == socket.gethostname() and process.isdigit() and int(process) != os.getpid()
        return another and alive(int(process))
    return False


def _take(file: IO) -> None:
    """Lock a file until it is closed, or raise BlockingIOError; Windows locks a byte, far behind what others read."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        os.lseek(file.fileno(), 2**30, os.SEEK_SET)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _silence_s(folder: Path) -> float:
    """Give the seconds since anything in a folder was written, by the clock of whoever keeps the files."""
    clock = folder / f".{os.getpid()}.clock"
    clock.touch()
    now = clock.stat().st_mtime
    clock.unlink()
    return now - last_written(folder)


@contextmanager
def _heeding(told: Callable[[], None]) -> Iterator[None]:
    """Call `told` on SIGTERM instead of dying; only the main thread of a process may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
