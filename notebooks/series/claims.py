"""What a run answers to the paper's claims (`claims.toml`): tables and REPORT.md, from stored numbers only."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from series.origins import SCORES

Metrics = dict[str, dict[str, dict]]
"""Notebook -> name -> entry, as `report.Run.metric` and `report.Run.claim` record them."""
RESULT_MARKS = ("<!-- results: written by make report -->", "<!-- end of results -->")
_DATA = tomllib.loads(Path(__file__).with_name("claims.toml").read_text(encoding="utf-8"))
CLAIMS: dict[int, dict[str, str]] = dict(enumerate(_DATA["claims"], start=1))
SYSTEMS: dict[str, str] = _DATA["systems"]
MEASURES: dict[str, str] = _DATA["measures"]
REMEDIED: dict[str, str] = _DATA["remedied"]


def show(value: object) -> str:
    """Write a table entry as text: floats with four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def quote(entry: Mapping) -> str:
    """Write one entry of a metrics file as text: value, interval, unit."""
    interval, unit = entry.get("interval"), entry.get("unit")
    edges = f" [{show(interval[0])}, {show(interval[1])}]" if interval else ""
    return show(entry["value"]) + edges + (f" {unit}" if unit and unit != "check" else "")


def plain_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Align rows as text under the keys of the first one."""
    cells = _cells(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ([text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in cells)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Write rows as a Markdown table under the keys of the first one."""
    head, *body = _cells(rows)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _cells(rows: Sequence[Mapping[str, object]]) -> list[list[str]]:
    columns = list(rows[0])
    return [columns, *([show(row.get(column, "")) for column in columns] for row in rows)]


def read_metrics(folder: Path) -> Metrics:
    """Read the `<notebook>.json` files of a folder; empty where there is none."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def read_scores(folder: Path) -> dict[str, dict]:
    """Read what the protocol stored, `scores.json` and `long.json`; empty where there is none."""
    paths = (folder / f"{name}.json" for name in SCORES)
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()}


def claim_rows(
    metrics: Metrics, *, short: bool = False, gpu: Mapping[int, str] = MappingProxyType({})
) -> list[dict[str, str]]:
    """Answer every claim in order, `short` by its first two numbers; one that no metrics file answers says so.

    `gpu` says for some claims, by number, what `bench` found (see `gpu_results.answers`).
    """
    entries = {name: (recorded, recorded[name]) for recorded in metrics.values() for name in recorded}
    rows = []
    for number, claim in CLAIMS.items():
        ours, status = "no run", "no run"
        if answer := entries.get(f"claim {number:02d}"):
            recorded, entry = answer
            limits = {name: f" (limit {limit})" for name, limit in entry.get("limits", {}).items()}
            numbers = [f"{name}: {quote(recorded[name])}{limits.get(name, '')}" for name in entry["metrics"]]
            numbers = numbers[:2] if short else [*numbers, *filter(None, [entry["note"]])]
            numbers += filter(None, [gpu.get(number)])
            ours, status = "; ".join(numbers) or "—", entry["status"]
        rows.append({"#": str(number), **claim, "ours": ours, "status": status})
    return rows


def quality(stored: Mapping[str, dict]) -> str:
    """Write what the protocol measured, and how."""
    scores, long = stored["scores"], stored.get("long")
    size = f"{scores['seeds']} seeds × {scores['clips']} clips of {scores['seconds']} s"
    if long:
        size += f"; last column {long['seeds'] * long['clips']} roll-outs of {long['seconds']} s"
    protocol = "held-out seeds (every prompt is trained on), through an mp4 (those of one prompt as they are made)"
    protocol += ", judged from pixels and samples"
    return f"{size}; {protocol}.\n\n{markdown_table(quality_rows(stored))}"


def quality_rows(stored: Mapping[str, dict]) -> list[dict[str, str]]:
    """Table what the protocol measured: systems side by side, then the student late in its long roll-outs."""
    measures, more = stored["scores"]["measures"], stored["scores"]["more"]
    late = stored["long"]["spans"]["student"]["measures"] if "long" in stored else {}
    rows = []
    for key, title in MEASURES.items():
        row = {"measure": title}
        row |= {
            SYSTEMS[name]: _mean(measures[name].get(key, more[name].get(key))) for name in SYSTEMS if name in measures
        }
        if late:
            span = list(late)[-2]
            row[f"student, {span}"] = _mean(late[span].get(key))
        rows.append(row)
    return rows


def remedies(folder: Path) -> list[str]:
    """Write what the stored remedies against collapse gave (`studies.cures`), best recall first, and less DMD.

    Differences are of those that have the most training seeds. Empty without runs.
    """
    if not folder.exists():
        return []
    from studies import cures, store

    runs = cures.TRIALS.numbers(folder)
    table = store.averaged(runs)
    rows = [
        {"remedy": name, "seeds": len(runs[name])}
        | {title: _mean([row[key][0], *(row[key][1] or (row[key][0],) * 2)]) for key, title in REMEDIED.items()}
        for name, row in sorted(table.items(), key=lambda item: -item[1]["recall"][0])
    ]
    how = "Short runs from the shipped Stage 2, each about as long as the DMD run: means over training seeds, with "
    how += "Student's intervals where there are several. Clips are of selection seeds. Rows are "
    order = (
        "one seed ranks nothing" if min(map(len, runs.values())) == 1 else "where intervals overlap, that ranks nothing"
    )
    how += f"sorted by recall; {order}"
    parts = ["## Remedies against collapse", f"{how} (`python -m omniforcing_lib cures`).", markdown_table(rows)]
    most = max(map(len, runs.values()))
    longest = {name: seeds for name, seeds in runs.items() if len(seeds) == most}
    gains = store.over_base(longest, "DMD")
    if most > 2 and gains:
        rows = [
            {"remedy": name} | {title: _mean([gain[key][0], *gain[key][1]]) for key, title in REMEDIED.items()}
            for name, gain in gains.items()
        ]
        how = (
            f"Less DMD, seed by seed, where there are {most} training seeds. Intervals of all remedies of a column hold"
        )
        parts += [f"{how} together: a difference is shown where its own leaves zero out.", markdown_table(rows)]
    return parts


def foretold(folder: Path) -> list[str]:
    """Write what was foretold of the arms of the extended world, and what the stored runs say (`studies.extended`).

    Empty without runs.
    """
    if not folder.exists():
        return []
    from studies import extended

    seeds = len(extended.TRIALS.runs(folder)[extended.BASE])
    how = f"Each arm is the recipe with one thing changed; differences seed by seed, {seeds} training seeds. "
    how += "Predictions were written down before any run. *Shown* needs the whole interval on the foretold side, "
    how += "corrected for the number of arms, *against* on the other one (`python -m omniforcing_lib extended`); nan: "
    how += "none was seen."
    rows = foretold_rows(extended.told(folder))
    return ["## Foretold of the world with a hum and a hidden wall", how, markdown_table(rows)]


def foretold_rows(told: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Write rows of `studies.extended.told` for a table: the gain with its interval as text."""
    return [
        {key: value for key, value in row.items() if key != "interval"}
        | {"gain": quote({"value": row["gain"], "interval": row["interval"]})}
        for row in told
    ]


def _mean(entry: Sequence[float] | float | None) -> str:
    """Write a mean with its interval, a number, or counts; a dash for what was not measured."""
    if entry is None:
        return "—"
    if not isinstance(entry, list):
        return show(entry)
    if all(isinstance(count, int) for count in entry):
        return "/".join(map(str, entry))
    mean, low, high = (f"{round(x, 3):g}" for x in entry)
    return mean if low == high else f"{mean} [{low}, {high}]"


class Results(NamedTuple):
    """What a report is made of.

    Attributes:
        metrics: of one run.
        title: says which.
        scores: what the protocol stored, see `read_scores`.
        remedies: text of the remedies against collapse, see `remedies`.
        foretold: text of what was foretold of the extended world, see `foretold`.
        origins: where the numbers come from.
        gpu: what `bench` found for some claims, see `gpu_results.answers`.
    """

    metrics: Metrics
    title: str
    scores: Mapping[str, dict] = MappingProxyType({})
    remedies: Sequence[str] = ()
    foretold: Sequence[str] = ()
    origins: Sequence[Mapping[str, str]] = ()
    gpu: Mapping[int, str] = MappingProxyType({})


def markdown(results: Results) -> str:
    """Write the text of REPORT.md: claims, the protocol, remedies, what was foretold, origins, measures by notebook."""
    metrics = results.metrics
    parts = [
        f"# Report: {results.title}",
        "Generated from the metrics files of one run; no number here was typed. Intervals are 95 %. The "
        "paper's numbers are of the 19B model, ours of the checkpoint named in the run: compare directions and "
        "ratios.",
        "## Claims",
        markdown_table(claim_rows(metrics, gpu=results.gpu)),
    ]
    if results.scores:
        pictures = "Contact sheets of the first clips, impacts and onsets marked: `reports/scores/*.png`."
        parts += ["## Quality by the protocol", quality(results.scores), pictures]
    parts += [*results.remedies, *results.foretold]
    if results.origins:
        parts += ["## Where the numbers come from", markdown_table(results.origins)]
    for notebook, entries in metrics.items():
        checks = [name for name, entry in entries.items() if entry.get("unit") == "check"]
        parts += [f"## {notebook}", f"Checks that held: {', '.join(checks)}." if checks else "No checks."]
        measures = {name: e for name, e in entries.items() if "value" in e and name not in checks}
        if measures:
            rows = [{"measure": n, "value": quote(e), "better": e["better"] or ""} for n, e in measures.items()]
            parts.append(markdown_table(rows))
    return "\n\n".join(parts) + "\n"


def fill_results(text: str, results: Results) -> str:
    """Replace what is between the markers of docs/results.md: quality, the short claims, what is out of date."""
    head, opening, rest = text.partition(RESULT_MARKS[0])
    _, closing, tail = rest.partition(RESULT_MARKS[1])
    if not (opening and closing):
        raise ValueError(f"docs/results.md needs the lines {RESULT_MARKS[0]} and {RESULT_MARKS[1]}, in this order")
    answered = claim_rows(results.metrics, short=True, gpu=results.gpu)
    rows = [{key: row[key] for key in ("claim", "paper", "ours", "status")} for row in answered]
    first = f"{quality(results.scores)}\n\n" if results.scores else ""
    claims = f"Claim by claim, {results.title}; all numbers in `reports/REPORT.md`.\n\n{markdown_table(rows)}"
    claims = "\n\n".join([claims, *results.foretold])
    return f"{head}{opening}\n{first}{claims}{out_of_date(results.origins)}\n{closing}{tail}"


def out_of_date(origins: Sequence[Mapping[str, str]]) -> str:
    """Write which numbers are of another state than the repository is in, by reason; empty where none is."""
    reasons: dict[str, list[str]] = {}
    for row in origins:
        for reason in row["not as here"].split("; "):
            reasons.setdefault(reason, []).append(row["numbers"])
    reasons.pop("—", None)
    if not reasons:
        return ""
    listed = "; ".join(f"{reason}: {', '.join(names)}" for reason, names in reasons.items())
    return f"\n\nNumbers of another state than the repository is in (commits in `reports/REPORT.md`): {listed}."


def differences(committed: Metrics, fresh: Metrics) -> list[str]:
    """List where fresh metrics leave the committed ones: a missing name, or a change beyond its `tol`."""
    lines = []
    for notebook, entries in committed.items():
        for name, entry in entries.items():
            other = fresh.get(notebook, {}).get(name)
            if other is None:
                lines.append(f"{notebook}: {name} is committed but the run has none")
            elif entry.get("tol") is not None:
                a, b = float(entry["value"]), float(other["value"])
                if not (abs(a - b) <= entry["tol"] or (math.isnan(a) and math.isnan(b)) or a == b):
                    lines.append(f"{notebook}: {name} {quote(entry)} ± {entry['tol']} committed, {quote(other)} found")
    return lines
