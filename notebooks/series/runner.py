"""Execute the notebooks through papermill, one fresh kernel each, and gather what they leave into a report."""

from __future__ import annotations

import ast
import html
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from omniforcing_lib import backends, files
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.ltx2 import checkpoints
from series import claims, origins, profiles, report

if TYPE_CHECKING:
    from nbformat import NotebookNode
    from papermill.exceptions import PapermillExecutionError

NOTEBOOKS = report.ROOT / "notebooks"
STORED = report.ROOT / "reports"
SCRUBBED_KEYS = (
    "metadata.papermill",
    "metadata.widgets",
    "metadata.language_info",
    "cell.metadata.papermill",
    "cell.metadata.execution",
)
WIDGET = "application/vnd.jupyter.widget-view+json"
SEEDS = 2**32  # what every generator that the notebooks use can take; none counts further either
ANSI = re.compile(r"\x1b\[[0-9;]*m")
LITERALS = {"true": True, "false": False, "none": None}


class NotebookFailed(RuntimeError):
    """Say which notebook failed, in which cell, and with what."""


def select(folder: Path = NOTEBOOKS, only: str = "") -> list[Path]:
    """List the notebooks of the series in order; `only` keeps names that start with one of its words ("03,05").

    Raises ValueError that lists the names when a word fits none.
    """
    found = sorted(folder.glob("[0-9]*.ipynb"))
    if not found:
        raise ValueError(f"no notebooks in {folder}")
    words = [word.strip().removesuffix(".ipynb") for word in only.split(",") if word.strip()]
    for word in words:
        if not any(path.stem.startswith(word) for path in found):
            names = ", ".join(path.stem for path in found)
            raise ValueError(f"--only {word} fits no notebook; there are {names}")
    return [path for path in found if not words or path.stem.startswith(tuple(words))]


def parse(assignments: Sequence[str]) -> dict[str, object]:
    """Read `name=value` words; a value that is no Python literal is text."""
    values: dict[str, object] = {}
    for word in assignments:
        name, equals, text = word.partition("=")
        if not (equals and name.isidentifier()):
            raise ValueError(f"a parameter is written name=value, found {word[:80]!r}")
        values[name] = _literal(text)
    return values


def _literal(text: str) -> object:
    if text.lower() in LITERALS:
        return LITERALS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the last two for brackets without end
        return text


def assign(notebooks: Sequence[Path], values: Mapping[str, object]) -> dict[Path, dict[str, object]]:
    """Give each notebook the values whose names are in its parameters cell.

    papermill itself only warns about a name that no cell declares, and exits 0. Raises ValueError for a name
    that no selected notebook declares, or a value of another type than the declared one.
    """
    import papermill

    declared = {path: papermill.inspect_notebook(str(path)) for path in notebooks}
    known = sorted({name for parameters in declared.values() for name in parameters})
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"unknown parameter {', '.join(unknown)}; the notebooks take {', '.join(known)}")
    for parameters in declared.values():
        for name in parameters.keys() & values.keys():
            _check_type(name, values[name], parameters[name]["inferred_type_name"])
    return {
        path: {name: value for name, value in values.items() if name in parameters}
        for path, parameters in declared.items()
    }


def _check_type(name: str, value: object, declared: str) -> None:
    allowed = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}.get(declared)
    if allowed and (not isinstance(value, allowed) or (bool not in allowed and isinstance(value, bool))):
        raise ValueError(f"parameter {name} is of type {declared}, found {repr(value)[:80]}")
    if declared == "int" and not 0 <= value < SEEDS:
        raise ValueError(f"parameter {name} is from 0 to {SEEDS - 1}, found {repr(value)[:80]}")


def execute(notebook: Path, output: Path, values: Mapping[str, object]) -> float:
    """Run one notebook in a fresh kernel, in its own folder, and return the seconds it took.

    Raises NotebookFailed with the notebook, the cell and the error; `output` then holds the run up to there.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    output.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        papermill.execute_notebook(
            str(notebook),
            str(output),
            parameters=dict(values),
            kernel_name="python3",
            kernel_manager_class=_kernel_of_this_interpreter(),
            cwd=str(notebook.parent),
            # Each kernel would report that its local sockets are not encrypted, and its own shutdown.
            extra_arguments=["--IPKernelApp.log_level=50"],
            progress_bar={"desc": notebook.stem, "leave": False} if sys.stderr.isatty() else False,
        )
    except PapermillExecutionError as error:
        cause = " ".join(f"{error.ename}: {error.evalue}".split())
        where = f"cell [{error.exec_count}] `{_failing_line(error)}`"
        raise NotebookFailed(f"{notebook.stem} failed in {where}: {cause}") from error
    except DeadKernelError as error:
        raise NotebookFailed(f"{notebook.stem} failed: its kernel died (out of memory?)") from error
    return time.perf_counter() - started


def _kernel_of_this_interpreter() -> type:
    """Give a kernel manager that runs this interpreter, whatever a `python3` kernelspec of the machine says."""
    from ipykernel.kernelspec import RESOURCES, get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class Own(AsyncKernelManager):
        kernel_spec = KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())

    return Own


def _failing_line(error: PapermillExecutionError) -> str:
    """Find the line of a cell that its traceback names first; the cell's own first line where it names none."""
    lines = error.source.splitlines()
    where = rf"Cell In ?\[{error.exec_count}\], line (\d+)"  # a cause may begin in a function of another cell
    found = re.search(where, ANSI.sub("", "\n".join(error.traceback)))
    if found and int(found[1]) <= len(lines):
        return lines[int(found[1]) - 1].strip()
    return error.source.strip().partition("\n")[0]


def reproduce(
    profile: str = "cpu",
    *,
    only: str = "",
    parameters: Sequence[str] = (),
    out: str = "",
    folder: Path = NOTEBOOKS,
) -> Path:
    """Run the series in a profile and write executed notebooks, HTML, metrics, REPORT.md and index.html.

    Returns the run folder. Raises ValueError for a bad name or value before anything runs, NotebookFailed at the
    first notebook that fails; what ran until then is reported.
    """
    values = {"profile": profiles.from_name(profile).name, **_given(parameters, profile)}
    notebooks = select(folder, only)
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{profile}"
    target = files.given(out).absolute() if out else STORED / "runs" / stamp
    files.check_folder(target)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"--out {out} is not empty; a report holds the numbers of one run")
    plan = assign(notebooks, {**values, "out_dir": str(target)})
    target.mkdir(parents=True, exist_ok=True)
    times: dict[str, float] = {}
    try:
        _run_all(plan, target, times)
    finally:
        _gather(target, profile, parameters, times)
    print(f"report: {target / 'index.html'}")
    return target


def _given(parameters: Sequence[str], profile: str) -> dict[str, object]:
    values = parse(parameters)
    for name, flag in (("profile", "--profile"), ("out_dir", "--out")):
        if name in values:
            raise ValueError(f"give {name} with {flag}, not as a parameter")
    if profile == "gpu":
        values.setdefault("device", "cuda")
    if device := values.get("device"):
        backends.device(str(device))
    if (prompt := values.get("prompt")) and not values.get("teacher"):
        TinyText().encode([str(prompt)])  # outside the miniature's grammar is refused
    for name, described in (("teacher", checkpoints.fitting), ("student", checkpoints.student)):
        if values.get(name):
            values[name] = _checkpoint(name, str(values[name]), described)
    return values


def _checkpoint(name: str, model: str, described: Callable[[str], object]) -> str:
    """Refuse a checkpoint that the notebooks could not take; give its path from anywhere, by the user's own name."""
    try:
        described(model)
    except ValueError as error:
        raise ValueError(f"parameter {name}: {error}") from error
    return model if model in checkpoints.SHIPPED else str(files.given(model).absolute())


def _run_all(plan: Mapping[Path, dict[str, object]], target: Path, times: dict[str, float]) -> None:
    from tqdm import tqdm

    with tqdm(plan.items(), unit="notebook", desc="series", disable=None) as bar:
        for notebook, values in bar:
            output = target / "notebooks" / notebook.name
            times[notebook.stem] = execute(notebook, output, values)
            _write_html(output, target / "html" / f"{notebook.stem}.html")
            tqdm.write(f"{notebook.stem:<32} {times[notebook.stem]:7.1f} s", file=sys.stdout)
            sys.stdout.flush()


def _write_html(notebook: Path, path: Path) -> None:
    import nbformat
    from nbconvert import HTMLExporter

    node = nbformat.read(notebook, as_version=4)
    widgets = node.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
    for cell in node.cells:
        if cell.cell_type == "code":
            cell.outputs = [kept for o in cell.outputs if (kept := _without_bars(o, widgets.get("state", {})))]
    body, _ = HTMLExporter().from_notebook_node(node)
    files.write_text(path, body)


def _without_bars(output: NotebookNode, widgets: Mapping[str, Mapping]) -> NotebookNode | None:
    """Keep what a reader sees at the end: bars of a terminal overwrite themselves, those of Jupyter close."""
    if view := output.get("data", {}).get(WIDGET):
        parts = widgets.get(view["model_id"], {}).get("state", {}).get("children", [])
        kinds = {widgets.get(part.removeprefix("IPY_MODEL_"), {}).get("model_name") for part in parts}
        return None if "FloatProgressModel" in kinds else output
    if output.get("name") != "stderr":
        return output
    shown = (line.rsplit("\r", 1)[-1].rstrip() for line in output.text.split("\n"))
    output.text = "\n".join(filter(None, shown))
    return output if output.text else None


def _gather(target: Path, profile: str, parameters: Sequence[str], times: Mapping[str, float]) -> None:
    """Write run.json, REPORT.md and index.html of a run folder."""
    total = round(sum(times.values()), 1)
    wall = {name: round(seconds, 1) for name, seconds in times.items()}
    files.write_json(
        target / "run.json",
        {
            "profile": profile,
            "parameters": list(parameters),
            "wall_s": wall,
            "total_s": total,
            "git": origins.git_state(),
            "versions": report.versions(),
        },
    )
    title = ", ".join([f"profile {profile}", *parameters])
    text = claims.markdown(claims.read_metrics(target / "metrics"), title)
    files.write_text(target / "REPORT.md", text)
    files.write_text(target / "index.html", _index(target, text, wall))


def _index(target: Path, text: str, wall: Mapping[str, float]) -> str:
    from nbconvert.filters import markdown2html

    notebooks = "".join(f'<li><a href="html/{name}.html">{name}</a> {seconds} s</li>' for name, seconds in wall.items())
    files = "".join(
        f'<li><a href="{path}">{html.escape(path)}</a></li>'
        for kind in ("clips", "figures", "metrics", "run")
        for path in sorted(str(p.relative_to(target)) for p in (target / kind).glob("*"))
    )
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2rem .5rem;text-align:left}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(target.name)}</title>'
        f"<style>{style}</style><h1>Notebooks</h1><ul>{notebooks}</ul>{markdown2html(text)}"
        f"<h1>Files</h1><ul>{files}</ul></html>\n"
    )


def refresh(folder: Path = NOTEBOOKS, *, only: str = "") -> list[str]:
    """Run the notebooks as stored in fresh kernels and store their outputs, if no cell of any of them failed.

    The metrics of that run become the committed smoke metrics. Returns the names.
    """
    notebooks = select(folder, only)
    with tempfile.TemporaryDirectory() as scratch:
        for notebook in notebooks:
            seconds = execute(notebook, Path(scratch) / notebook.name, {})
            print(f"{notebook.stem:<32} {seconds:7.1f} s", flush=True)
        for notebook in notebooks:
            _store(Path(scratch) / notebook.name, notebook)
    publish(STORED / "runs" / "interactive", "smoke", [path.stem for path in notebooks])
    return [path.stem for path in notebooks]


def _store(executed: Path, notebook: Path) -> None:
    import nbformat

    node = scrub(nbformat.read(executed, as_version=4))
    files.write_text(notebook, nbformat.writes(node).rstrip("\n") + "\n")


def scrub(node: NotebookNode) -> NotebookNode:
    """Drop from an executed notebook what changes without meaning: timestamps, bars, widget views."""
    from nbstripout import strip_output

    keys = list(SCRUBBED_KEYS)
    node = strip_output(node, keep_output=True, keep_count=True, keep_id=True, extra_keys=keys)
    for cell in node.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _passing(output)]
    return node


def _passing(output: NotebookNode) -> bool:
    return output.get("name") == "stderr" or WIDGET in output.get("data", {})


def publish(folder: Path, profile: str, names: Sequence[str]) -> None:
    """Copy the metrics of a run under `reports/metrics/<profile>` and rebuild reports/REPORT.md from there.

    The record of the run (commit, versions, wall time) goes along, except for smoke, where it would change at
    every refresh and say little.
    """
    for name in names:
        source = folder / "metrics" / f"{name}.json"
        files.write_text(STORED / "metrics" / profile / source.name, source.read_text(encoding="utf-8"))
        if profile != "smoke":
            record = folder / "run" / source.name
            files.write_text(STORED / "run" / profile / source.name, record.read_text(encoding="utf-8"))
    for figure in sorted((folder / "figures").glob("*.png")) if profile != "smoke" else ():
        (STORED / "figures").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(figure, STORED / "figures" / figure.name)
    rebuild()


def publish_run(folder: Path) -> list[str]:
    """Publish a whole run folder under the profile that its run.json names; return the notebooks.

    Raises ValueError when the folder holds no finished notebook.
    """
    names = [path.stem for path in sorted((folder / "metrics").glob("*.json"))]
    if not names or not (folder / "run.json").exists():
        raise ValueError(f"{folder} holds no finished run (metrics/*.json and run.json)")
    publish(folder, json.loads((folder / "run.json").read_text(encoding="utf-8"))["profile"], names)
    return names


def rebuild() -> None:
    """Rebuild reports/REPORT.md and the tables of docs/results.md from the committed metrics."""
    found, page = stored(), report.ROOT / "docs" / "results.md"
    files.write_text(STORED / "REPORT.md", claims.markdown(*found))
    files.write_text(page, claims.fill_results(page.read_text(encoding="utf-8"), *found))


def stored() -> tuple[claims.Metrics, str, dict[str, dict], list[dict[str, str]]]:
    """Return what the report is made of: metrics of the most serious profile, title, scores, and where all is from."""
    for profile in ("gpu", "full", "cpu", "smoke"):
        if metrics := claims.read_metrics(STORED / "metrics" / profile):
            return metrics, f"profile {profile}", claims.read_scores(STORED / "scores"), origins.rows(metrics, profile)
    return {}, "no run yet", {}, []
