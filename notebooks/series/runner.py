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
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from omniforcing_lib import backends, files
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.ltx2 import checkpoints
from series import claims, gpu_results, origins, profiles, report

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
PAGE = """{% extends 'lab/index.html.j2' %}
{% block codecell %}
{% if 'solution' in cell.metadata.get('tags', []) %}<details><summary>Solution</summary>{{ super() }}</details>
{% else %}{{ super() }}{% endif %}
{% endblock codecell %}"""
"""Template of an executed notebook's page: nbconvert's own, with solutions folded."""
LITERALS = {"true": True, "false": False, "none": None}


class NotebookFailed(RuntimeError):
    """Say which notebook failed, in which cell, and with what."""


def select(folder: Path = NOTEBOOKS, only: str = "") -> list[Path]:
    """List the notebooks of the series in order; `only` keeps names that start with one of its words ("03,05").

    Raises ValueError that lists the names when a word fits none.
    """
    notebooks = sorted(folder.glob("[0-9]*.ipynb"))
    if not notebooks:
        raise ValueError(f"no notebooks in {folder}")
    words = [word.strip().removesuffix(".ipynb") for word in only.split(",") if word.strip()]
    for word in words:
        if not any(path.stem.startswith(word) for path in notebooks):
            names = ", ".join(path.stem for path in notebooks)
            raise ValueError(f"--only {word} fits no notebook; there are {names}")
    return [path for path in notebooks if not words or path.stem.startswith(tuple(words))]


def parse(assignments: Sequence[str]) -> dict[str, object]:
    """Read `name=value` words; a value that is no Python literal is text."""
    values: dict[str, object] = {}
    for word in assignments:
        name, equals, text = word.partition("=")
        if not (equals and name.isidentifier()):
            raise ValueError(f"a parameter is written name=value, found {word[:80]!r}")
        try:
            values[name] = LITERALS[text.lower()] if text.lower() in LITERALS else ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the last two: brackets without end
            values[name] = text
    return values


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
    plan = {}
    for path, parameters in declared.items():
        plan[path] = {name: value for name, value in values.items() if name in parameters}
        for name, value in plan[path].items():
            declared_type = parameters[name]["inferred_type_name"]
            types = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}.get(declared_type, (object,))
            if not isinstance(value, types) or (isinstance(value, bool) and not {bool, object} & {*types}):
                raise ValueError(f"parameter {name} is of type {declared_type}, found {repr(value)[:80]}")
            if declared_type == "int" and not 0 <= value < SEEDS:
                raise ValueError(f"parameter {name} is from 0 to {SEEDS - 1}, found {repr(value)[:80]}")
    return plan


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

    class ThisInterpreter(AsyncKernelManager):
        kernel_spec = KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())

    return ThisInterpreter


def _failing_line(error: PapermillExecutionError) -> str:
    """Find the line of a cell that its traceback names first; the cell's own first line where it names none."""
    lines = error.source.splitlines()
    where = rf"Cell In ?\[{error.exec_count}\], line (\d+)"  # a cause may begin in a function of another cell
    named = re.search(where, ANSI.sub("", "\n".join(error.traceback)))
    if named and int(named[1]) <= len(lines):
        return lines[int(named[1]) - 1].strip()
    return error.source.strip().partition("\n")[0]


def reproduce(
    profile: str = "cpu", *, only: str = "", parameters: Sequence[str] = (), out: str = "", folder: Path = NOTEBOOKS
) -> Path:
    """Run the series in a profile and write executed notebooks, HTML, metrics, REPORT.md and index.html.

    Returns the run folder. Raises ValueError for a bad name or value before anything runs, NotebookFailed at the
    first notebook that fails; what ran until then is reported.
    """
    from tqdm import tqdm

    values = {"profile": profiles.from_name(profile).name, **_given(parameters, profile)}
    notebooks = select(folder, only)
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{profile}"
    target = files.given(out).absolute() if out else STORED / "runs" / stamp
    files.check_folder(target)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"--out {out} is not empty; a report holds the numbers of one run")
    plan = assign(notebooks, {**values, "out_dir": str(target)})
    target.mkdir(parents=True, exist_ok=True)
    wall: dict[str, float] = {}
    known = _stored_seconds(profile)
    try:
        with tqdm(plan.items(), unit="notebook", desc="series", disable=None) as bar:
            for notebook, given in bar:
                executed = target / "notebooks" / notebook.name
                wall[notebook.stem] = round(execute(notebook, executed, given), 1)
                _write_html(executed, target / "html" / f"{notebook.stem}.html")
                left = time_left(wall, known, [path.stem for path in notebooks])
                tqdm.write(f"{notebook.stem:<32} {wall[notebook.stem]:7.1f} s{left}", file=sys.stdout)
                sys.stdout.flush()
    finally:
        _write_report(target, profile, parameters, wall)
    print(f"report: {target / 'index.html'}")
    return target


def _stored_seconds(profile: str) -> dict[str, float]:
    """Read how long each notebook took in the committed run of a profile."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (STORED / "run" / profile).glob("*.json")]
    return {record["notebook"]: record["wall_s"] for record in records}


def time_left(wall: Mapping[str, float], known: Mapping[str, float], names: Sequence[str]) -> str:
    """Tell how long is left: the known seconds of what is to come, at the speed that this run has had so far.

    Returns text to append; empty where nothing that is known is to come.
    """
    to_come = sum(known.get(name, 0.0) for name in names if name not in wall)
    compared = {name: seconds for name, seconds in wall.items() if name in known}
    speed = sum(compared.values()) / sum(map(known.get, compared)) if compared else 1.0
    return f", some {max(1, round(speed * to_come / 60))} min to go" if to_come else ""


def _given(parameters: Sequence[str], profile: str) -> dict[str, object]:
    """Read the parameters of a command, and refuse what no notebook could take; checkpoints become whole paths."""
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
    for name, describe in (("teacher", checkpoints.fitting), ("student", checkpoints.student)):
        if model := str(values.get(name) or ""):
            try:
                describe(model)
            except ValueError as error:
                raise ValueError(f"parameter {name}: {error}") from error
            values[name] = model if model in checkpoints.SHIPPED else str(files.given(model).absolute())
    return values


def _write_html(notebook: Path, path: Path) -> None:
    """Write an executed notebook as a page: no bars, solutions folded, links to the other pages."""
    import nbformat
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter

    node = nbformat.read(notebook, as_version=4)
    widgets = node.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    for cell in node.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _shown_at_the_end(output, widgets)]
    exporter = HTMLExporter(extra_loaders=[DictLoader({"page.html.j2": PAGE})], template_file="page.html.j2")
    body, _ = exporter.from_notebook_node(node)
    files.write_text(path, re.sub(r'href="(\d\d_\w+)\.ipynb"', r'href="\1.html"', body))


def _shown_at_the_end(output: NotebookNode, widgets: Mapping[str, Mapping]) -> bool:
    """Tell whether an output is no progress bar; bars of a terminal are taken out of the text around them."""
    if view := output.get("data", {}).get(WIDGET):
        parts = widgets.get(view["model_id"], {}).get("state", {}).get("children", [])
        models = {widgets.get(part.removeprefix("IPY_MODEL_"), {}).get("model_name") for part in parts}
        return "FloatProgressModel" not in models
    if output.get("name") == "stderr":
        lines = (line.rsplit("\r", 1)[-1].rstrip() for line in output.text.split("\n"))
        output.text = "\n".join(filter(None, lines))
        return bool(output.text)
    return True


def _write_report(target: Path, profile: str, parameters: Sequence[str], wall: Mapping[str, float]) -> None:
    """Write run.json, REPORT.md and index.html of a run folder."""
    from nbconvert.filters import markdown2html

    record = {
        "profile": profile,
        "parameters": list(parameters),
        "wall_s": wall,
        "total_s": round(sum(wall.values()), 1),
    }
    files.write_json(target / "run.json", record | {"git": origins.git_state(), "versions": report.versions()})
    title = ", ".join([f"profile {profile}", *parameters])
    text = claims.markdown(claims.Results(claims.read_metrics(target / "metrics"), title))
    files.write_text(target / "REPORT.md", text)
    notebooks = "".join(f'<li><a href="html/{name}.html">{name}</a> {seconds} s</li>' for name, seconds in wall.items())
    listed = "".join(
        f'<li><a href="{path}">{html.escape(path)}</a></li>'
        for folder in ("clips", "figures", "metrics", "run")
        for path in sorted(str(p.relative_to(target)) for p in (target / folder).glob("*"))
    )
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2rem .5rem;text-align:left}"
    )
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(target.name)}</title>'
        f"<style>{style}</style><h1>Notebooks</h1><ul>{notebooks}</ul>{markdown2html(text)}"
        f"<h1>Files</h1><ul>{listed}</ul></html>\n"
    )
    files.write_text(target / "index.html", page)


def refresh(folder: Path = NOTEBOOKS, *, only: str = "") -> list[str]:
    """Run the notebooks as stored in fresh kernels and store their outputs, if no cell of any of them failed.

    The metrics of that run become the committed smoke metrics. Returns the names.
    """
    import nbformat

    notebooks = select(folder, only)
    with tempfile.TemporaryDirectory() as scratch:
        for notebook in notebooks:
            seconds = execute(notebook, Path(scratch) / notebook.name, {})
            print(f"{notebook.stem:<32} {seconds:7.1f} s", flush=True)
        for notebook in notebooks:
            node = scrub(nbformat.read(Path(scratch) / notebook.name, as_version=4))
            files.write_text(notebook, nbformat.writes(node).rstrip("\n") + "\n")
    publish(STORED / "runs" / "interactive", "smoke", [path.stem for path in notebooks])
    return [path.stem for path in notebooks]


def scrub(node: NotebookNode) -> NotebookNode:
    """Drop from an executed notebook what changes without meaning: timestamps, bars, widget views."""
    from nbstripout import strip_output

    keys = list(SCRUBBED_KEYS)
    node = strip_output(node, keep_output=True, keep_count=True, keep_id=True, extra_keys=keys)
    for cell in node.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and WIDGET not in o.get("data", {})]
    return node


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
    """Rebuild reports/REPORT.md and the tables of docs/results.md and docs/gpu.md from what is committed."""
    results, page, gpu = stored(), report.ROOT / "docs" / "results.md", report.ROOT / "docs" / "gpu.md"
    files.write_text(STORED / "REPORT.md", claims.markdown(results))
    files.write_text(page, claims.fill_results(page.read_text(encoding="utf-8"), results))
    files.write_text(gpu, gpu_results.fill(gpu.read_text(encoding="utf-8")))


def stored() -> claims.Results:
    """Return what the report is made of: the most serious profile that has metrics, and all else that is committed."""
    scores, remedies = claims.read_scores(STORED / "scores"), claims.remedies(STORED / "cures")
    foretold = claims.foretold(STORED / "extended")
    for profile in ("gpu", "full", "cpu", "smoke"):
        if metrics := claims.read_metrics(STORED / "metrics" / profile):
            whence, gpu = origins.rows(metrics, profile), gpu_results.answers()
            return claims.Results(metrics, f"profile {profile}", scores, remedies, foretold, whence, gpu)
    return claims.Results({}, "no run yet")
