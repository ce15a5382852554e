"""A command is a frozen dataclass: each of its fields is an option, with its words, bounds and default in one place.

argparse reads the words: tyro answers bad input with a box of several lines, and takes no abbreviated options.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from omniforcing_lib import files

LONGEST_LINE = 600
REPEATED = {"-p": "NAME=VALUE", "--lora": "PATH[:SCALE]"}
"""Options that are given once for each value, and how a value looks."""
C = TypeVar("C", bound="Command")


def option(
    words: str,
    default: object = MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
    flag: str = "",
    setting: bool = True,
    content: str = "",
    writes: str = "",
) -> Any:
    """Describe a field of a command; without a default it is required.

    Args:
        words: what it is, with its unit.
        default: its default; the help tells it.
        low: smallest number; without one, whole numbers are 1 or more and others above 0.
        high: largest number.
        choices: the only words taken.
        flag: the option, where it is not `--name`; "name" takes a word by its position, "..." all words that are left.
        setting: what the command makes depends on it.
        content: what counts is not the name but what is there: "checkpoint", or "data", a file or a folder of shards.
        writes: what the command writes there: "folder", "file", or the suffixes that a file may have.
    """
    about = {"words": words, "low": low, "high": high, "choices": choices, "flag": flag}
    return field(default=default, metadata=about | {"setting": setting, "content": content, "writes": writes})


@dataclass(frozen=True, kw_only=True)
class Command:
    """Base of all commands: refuses numbers out of bounds and devices that are not there; `~` is the user's home.

    Raises:
        ValueError: names the option, what it takes and what was found.
    """

    def __post_init__(self) -> None:
        for entry, kind, _ in options_of(type(self)):
            value = getattr(self, entry.name)
            for number in value if isinstance(value, tuple) else (value,):
                if kind in (int, float) and number is not None and not _within(number, kind, entry):
                    raise ValueError(f"--{_dashed(entry.name)}: expected {bounds(kind, entry)}, found {number}")
            if isinstance(value, str) and value.startswith("~"):
                object.__setattr__(self, entry.name, str(files.given(value)))
            if entry.name == "device":
                from omniforcing_lib import backends  # not above: most commands answer without torch

                object.__setattr__(self, entry.name, str(backends.device(str(value))))

    @classmethod
    def of(cls: type[C], given: Mapping[str, object]) -> C:
        """Take what argparse read: its lists are tuples here."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})

    def check(self) -> None:
        """Refuse, before any work, a file or folder that could not be written in the end.

        Raises:
            ValueError: names it and says why.
        """
        for entry, _, _ in options_of(type(self)):
            writes, value = entry.metadata["writes"], getattr(self, entry.name)
            if not writes or value in ("", None):
                if writes and value != entry.default:
                    raise ValueError(f"--{_dashed(entry.name)} is empty; name what is to be written")
                continue
            path = Path(value)
            if writes.startswith(".") and path.suffix not in writes.split():
                raise ValueError(f"--{entry.name} is a {writes.replace(' ', ' or ')} file, found {path}")
            if writes.startswith(".mp4") and not path.parent.is_dir():
                raise ValueError(f"{path}: there is no such folder as {path.parent}")
            check_output(path, folder=writes == "folder" or (writes == "either" and path.suffix != ".safetensors"))

    def run(self) -> Any:
        """Check, then do the work; give what was made, or an exit code."""
        self.check()
        return self._run()

    def _run(self) -> Any:
        raise NotImplementedError


def check_output(path: Path, *, folder: bool) -> None:
    """Refuse a folder or a file that could not be written in the end, by a ValueError."""
    (files.check_folder if folder else files.check_file)(path)


def options_of(command: type[Command]) -> list[tuple[Field, type, str | int | None]]:
    """Give the fields of a command that are options, the type of each word, and the number of words."""
    hints, entries = get_type_hints(command), []
    for entry in fields(command):
        if "words" in entry.metadata:
            kind, inner = hints[entry.name], get_args(hints[entry.name])
            many = None
            if get_origin(kind) is tuple:
                many = "+" if inner[-1] is Ellipsis else len(inner)
            entries.append((entry, inner[0] if inner else kind, many))
    return entries


def bounds(kind: type, entry: Field) -> str:
    """Say which words an option takes."""
    low, high = entry.metadata["low"], entry.metadata["high"]
    if kind is float and low is None:
        return "a number above 0"
    low = 1 if low is None else low
    return f"{'a whole number' if kind is int else 'a number'}, {low} " + (f"to {high}" if high else "or more")


def _within(number: float, kind: type, entry: Field) -> bool:
    low, high = entry.metadata["low"], entry.metadata["high"]
    least = low if low is not None else 1 if kind is int else 0
    above = number > 0 if kind is float and low is None else number >= least
    return math.isfinite(number) and above and (high is None or number <= high)


class Parser(argparse.ArgumentParser):
    """Answer bad input with one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2, without the usage text that hides the message."""
        self.exit(2, f"error: {one_line(message)} (see {self.prog} --help)\n")

    def add_options(self, command: type[Command]) -> None:
        """Add every option of a command, with its help."""
        for entry, kind, many in options_of(command):
            flag, choices = entry.metadata["flag"], entry.metadata["choices"]
            settings: dict[str, Any] = {"help": _help(entry, kind)}
            if flag not in ("name", "..."):
                settings |= {"dest": entry.name}
                settings |= {"required": True} if entry.default is MISSING else {"default": entry.default}
            if flag == "...":
                settings |= {"nargs": argparse.REMAINDER}
            elif flag in REPEATED:
                settings |= {"action": "append", "default": [], "metavar": REPEATED[flag]}
            elif kind is bool:
                settings |= {"action": argparse.BooleanOptionalAction}
            else:
                settings |= {"type": _reader(kind, entry), "nargs": many, "choices": choices or None}
            name = entry.name if flag in ("name", "...") else flag or f"--{_dashed(entry.name)}"
            self.add_argument(name, **settings)


def _help(entry: Field, kind: type) -> str:
    words, default = entry.metadata["words"], entry.default
    words += f", {bounds(kind, entry)}" if kind in (int, float) else ""
    if default is not MISSING and "(default" not in words:
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        shown = ("yes" if default else "no") if kind is bool else "none" if shown in ("", None) else shown
        words += f" (default {shown})"
    return words.replace("%", "%%")


def _reader(kind: type, entry: Field) -> Callable[[str], object]:
    def read(word: str) -> object:
        try:
            return kind(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected {bounds(kind, entry)}, found {word[:40]!r}") from error

    return read


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def one_line(text: str) -> str:
    """Give a message that quotes what somebody typed, or a file says, as one line of bounded length."""
    line = "".join(sign if sign.isprintable() else " " for sign in " ".join(text.split()))
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 3 :]}"
