"""The folder of a run, and its bad days: a lock, a line a step, a checkpoint at any moment, an end when asked.

A folder holds `lock`, `history.jsonl`, and the state: `state.safetensors` of one process, or `state-<step>/` of
several, each whole or not there. Whoever dies, whenever: the same command goes on from the last state.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from torch import Tensor

from omniforcing_lib.files import alive, last_written, write_json, write_tensors, write_text
from omniforcing_lib.training import distributed
from omniforcing_lib.training.distributed import DistributedContext
from omniforcing_lib.training.provenance import differences, unsaid

if TYPE_CHECKING:
    from omniforcing_lib.training.train import Learner

SILENT_S = 1800.0
"""A run on another host that has written nothing for so long is over: a step, or a checkpoint, is much sooner."""
SIGTERM_CODE = 128 + signal.SIGTERM
"""Exit code of a run that a scheduler ended and that can go on: 143."""


class Diverged(ArithmeticError):
    """Too many steps in a row had a gradient that is not finite or too large."""


class RunFolder:
    """What a run writes to its folder; without a folder it writes nothing.

    Args:
        folder: of the run; None keeps nothing.
        players: who learns, by name.
        seed: of the run.
        team: the processes.
        settings: what else the outcome depends on, by name; JSON. A run goes on under the settings that it began with.
        plan: what may change on the way, by name: how long the run is, and how often it is stored.
    """

    def __init__(
        self,
        folder: Path | None,
        players: Mapping[str, Learner],
        seed: int,
        team: DistributedContext,
        settings: Mapping[str, object] | None = None,
        plan: Mapping[str, int] | None = None,
    ) -> None:
        self.folder, self.players, self.seed, self.team = folder, players, seed, team
        self.settings, self.plan, self.changes = {**(settings or {}), "seed": seed}, dict(plan or {}), []
        self.asked_to_end = False
        self._lines = None

    def resume(self) -> int:
        """Load the newest state; give the step to go on with.

        Raises:
            ValueError: it was trained with another seed or other settings, or is damaged.
        """
        if self.folder is None:
            return 0
        start, state, notes = agreeing(self.folder, self.settings) or (0, None, {})
        if state is not None:
            self._replan(start, state, notes)
            read = self._read_one if state.is_file() else self._read_many
            try:
                tensors = read(state)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{state} is damaged: {error}; remove it to start from nothing") from error
            for name, player in self.players.items():
                player.load(_part(tensors, f"{name}/"))
        if self.team.is_main:
            self._open_history(start)
        return start

    def _replan(self, start: int, state: Path, notes: Mapping[str, object]) -> None:
        """Say what has changed or is not known; keep what the outcome depends on: a schedule follows the length."""
        kept, self.changes = notes["settings"], list(notes["changes"])
        said = differences(kept, self.plan)
        if (steps := kept.get("steps")) not in (None, self.plan.get("steps")):
            self.changes.append(f"of {steps} steps up to step {start}")
        if silent := unsaid(kept, self.settings):
            self.changes.append(f"{', '.join(silent)} not known up to step {start}")
            said.append(f"it does not say its {', '.join(silent)}: taken on trust")
        if said and self.team.is_main:
            print(f"{state} goes on from step {start}: {'; '.join(said)}", flush=True)

    def _read_one(self, path: Path) -> dict[str, Tensor]:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}

    def _read_many(self, path: Path) -> dict[str, Tensor]:
        blank = {f"{name}/{k}": v for name, player in self.players.items() for k, v in player.blank().items()}
        return distributed.restore(path, blank)

    def store(self, step: int) -> None:
        """Write the state after `step` steps; the one before goes when this one is there."""
        if self.folder is None:
            return
        tensors = {f"{name}/{k}": v for name, player in self.players.items() for k, v in player.state().items()}
        notes = {"step": str(step), "seed": str(self.seed), "changes": json.dumps(self.changes)}
        notes["settings"] = json.dumps(self.settings | self.plan)
        if self.team.mesh is None:
            made = write_tensors(self.folder / "state.safetensors", tensors, notes)
        else:
            made = self.folder / f"state-{step:08d}"
            self.team.set_timeout(distributed.UNHURRIED_S)
            distributed.store(made, tensors, notes, self.team)
            self.team.set_timeout(distributed.PATIENCE_S)
        if self.team.is_main:
            for old in {*self.folder.glob("state-*"), self.folder / "state.safetensors"} - {made}:
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)

    def _open_history(self, start: int) -> None:
        """Drop the lines of steps that will run again."""
        path = self.folder / "history.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) < start]
        write_text(path, "".join(f"{line}\n" for line in kept))
        self._lines = path.open("a", buffering=1, encoding="utf-8")

    def note(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append a step to `history.jsonl`; what is not finite is null."""
        if self._lines:
            values = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
            self._lines.write(json.dumps({"step": step, **values}) + "\n")

    def diverged(self, steps: list[dict[str, float]]) -> Diverged:
        """Write the seeds, steps, norms and losses of the bad steps; give the error to raise."""
        first, last = int(steps[0]["step"]), int(steps[-1]["step"])
        message = f"the gradients of steps {first} to {last} were not finite or too large: {len(steps)} updates skipped"
        if self.folder is None or not self.team.is_main:
            return Diverged(message)
        rows = [{k: v if math.isfinite(v) else repr(v) for k, v in row.items()} for row in steps]
        path = self.folder / "diverged.json"
        write_json(path, {"seed": self.seed, "steps": rows})
        return Diverged(f"{message}; their seeds, norms and losses are in {path}")

    def close(self) -> None:
        """Close the history."""
        if self._lines:
            self._lines.close()


def agreeing(folder: Path, asked: Mapping[str, object]) -> tuple[int, Path, Mapping[str, object]] | None:
    """Find the newest state of a run, its step and its notes, if there is one.

    Raises:
        ValueError: the run began under other settings than are asked for, or its state is damaged.
    """
    states = [path for path in (folder / "state.safetensors", *folder.glob("state-*")) if path.exists()]
    if not states:
        return None
    step, path, notes = max((_notes(path) for path in states), key=lambda found: found[0])
    if found := differences(notes["settings"], asked):
        raise ValueError(
            f"{path} was trained with other settings: {'; '.join(found)}; go on with those, or use another folder"
        )
    return step, path, notes


def _notes(path: Path) -> tuple[int, Path, dict[str, object]]:
    try:
        if path.is_dir():
            kept = distributed.stored_notes(path)
        else:
            with safe_open(path, "pt") as file:
                kept = file.metadata()
        notes = {name: json.loads(kept.get(name, blank)) for name, blank in (("settings", "{}"), ("changes", "[]"))}
        notes["settings"].setdefault("seed", int(kept["seed"]))
        return int(kept["step"]), path, notes
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}; remove it to start from nothing") from error


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _step_of(line: str) -> float:
    """Number of a line's step; infinite where the line was cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


@contextmanager
def opened(
    folder: str | os.PathLike[str] | None,
    players: Mapping[str, Learner],
    seed: int,
    team: DistributedContext,
    **said: object,
) -> Iterator[RunFolder]:
    """Open the folder of a run for this run alone, and heed SIGTERM until it is closed; see `RunFolder`.

    Raises:
        ValueError: another run has the folder.
    """
    journal = RunFolder(Path(folder) if folder else None, players, seed, team, **said)
    if journal.folder is None:
        yield journal
        return
    journal.folder.mkdir(parents=True, exist_ok=True)
    with _locked(journal.folder / "lock", team.is_main), _heeding(lambda: setattr(journal, "asked_to_end", True)):
        try:
            yield journal
        finally:
            journal.close()


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
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        print(f"{path}: no locks here ({error.strerror}); who is named in it has the folder while alive", flush=True)
        host, _, process = owner.partition(" process ")
        another = host == socket.gethostname() and process.isdigit() and int(process) != os.getpid()
        return another and alive(int(process))
    return False


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
