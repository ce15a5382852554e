"""The paper's claims and what a run answers to each: text from metrics files only, for REPORT.md."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

STATUS = {True: "reproduced in miniature", False: "contradicted", None: "not seen in miniature"}
README_MARKS = ("<!-- results: written by make report -->", "<!-- end of results -->")
Metrics = dict[str, dict[str, dict]]


class Claim(NamedTuple):
    """State a claim of the paper and where it is put to the test."""

    claim: str
    notebook: str
    measure: str
    paper: str


CLAIMS = {
    1: Claim(
        "the student matches the teacher's video quality",
        "04",
        "Fréchet distance on hand-made video features, student against teacher",
        "FVD 125.4 → 137.2 (×1.09)",
    ),
    2: Claim(
        "… and its audio quality",
        "04",
        "Fréchet distance on hand-made audio features, student against teacher",
        "FAD 4.6 → 5.7 (×1.24)",
    ),
    3: Claim("… follows the prompt as well", "04", "colour and timbre accuracy", "CLIP .318 → .322"),
    4: Claim(
        "… and stays in sync",
        "04",
        "sync F1, offset, wall-pitch agreement",
        "DeSync .384 → .392; AV-IB .318 → .269",
    ),
    5: Claim(
        "throughput against the teacher",
        "05",
        "time of a 5-second clip; frames a second",
        "197 s → 5.7 s for 5 s (34.6×); ~25 FPS on one GPU (authors later: ~20 with 4 steps)",
    ),
    6: Claim("first chunk", "05", "time to the first decoded chunk", "197 s → 0.7 s"),
    7: Claim(
        "the block layout truncates nothing and keeps the clocks together",
        "02",
        "latents of whole seconds, drift of the two clocks",
        "126 = 1 + 5·25, 16 = 1 + 5·3",
    ),
    8: Claim(
        "naive causal distillation explodes because of audio token sparsity",
        "03",
        "gradient norm and loss without sinks",
        "no sinks, or ≤ 2: NaN",
    ),
    9: Claim(
        "sinks cure it; 16 is best",
        "03",
        "gradient norm and loss by number of sinks",
        "max gradient norm 9.15 (S = 24), 9.23 (16), 21.95 (8), 49.71 (4); loss .110, .081, .129, .141",
    ),
    10: Claim(
        "identity RoPE on sinks matters",
        "03",
        "loss, identity against counted positions",
        "loss .081 identity, .402 counted positions",
    ),
    11: Claim(
        "sinks beat extra QK-norm and tanh gates",
        "03",
        "loss of each variant",
        "loss .081 sinks, .232, 1.258",
    ),
    12: Claim(
        "joint self-forcing corrects accumulated cross-modal error",
        "04",
        "free-running error and sync by block, before and after; beside it the same training on a true past",
        "qualitative",
    ),
    13: Claim(
        "rolling KV caches make the context cost constant",
        "05",
        "block time and memory by block",
        "O(L) a step",
    ),
    14: Claim(
        "the two streams can run concurrently between cross-modal layers",
        "05",
        "time of a block, streams in turn against side by side",
        "qualitative",
    ),
}


def show(value: object) -> str:
    """Return a table entry as text: floats at four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def quote(entry: Mapping) -> str:
    """Return one entry of a metrics file as text: value, interval, unit."""
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
    """Read `<notebook>.json` files of a folder: notebook -> name -> entry; empty where there is none."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def claim_rows(metrics: Metrics) -> list[dict[str, str]]:
    """Answer every claim in order; a claim that no metrics file answers says that there is no run."""
    answers = {
        entry["claim"]: (entries, entry)
        for entries in metrics.values()
        for name, entry in entries.items()
        if name.startswith("claim ")
    }
    return [_claim_row(number, claim, answers.get(number)) for number, claim in CLAIMS.items()]


def _claim_row(number: int, claim: Claim, answer: tuple[dict, dict] | None) -> dict[str, str]:
    ours, status = "no run", "no run"
    if answer is not None:
        entries, entry = answer
        numbers = [f"{name}: {quote(entries[name])}" for name in entry["metrics"]]
        ours, status = "; ".join([*numbers, *filter(None, [entry["note"]])]) or "—", entry["status"]
    return {"#": str(number), **claim._asdict(), "ours": ours, "status": status}


def markdown(metrics: Metrics, title: str) -> str:
    """Write the text of REPORT.md: the claims, then every measure by notebook."""
    parts = [
        f"# Report: {title}",
        "Generated from the metrics files of one run; no number here was typed. Intervals are 95 %. The "
        "paper's numbers are of the 19B model, ours of the checkpoint named in the run: compare directions and "
        "ratios.",
        "## Claims",
        markdown_table(claim_rows(metrics)),
    ]
    for notebook, entries in metrics.items():
        parts += [f"## {notebook}", _measures(entries)]
    return "\n\n".join(parts) + "\n"


def fill_readme(text: str, metrics: Metrics, title: str) -> str:
    """Replace what stands between the README's two result markers by the short claims table."""
    head, opening, rest = text.partition(README_MARKS[0])
    _, closing, tail = rest.partition(README_MARKS[1])
    if not (opening and closing):
        raise ValueError(f"the README needs the lines {README_MARKS[0]} and {README_MARKS[1]}, in this order")
    rows = [{key: row[key] for key in ("claim", "paper", "ours", "status")} for row in claim_rows(metrics)]
    return f"{head}{opening}\nSource: {title}.\n\n{markdown_table(rows)}\n{closing}{tail}"


def _measures(entries: Mapping[str, dict]) -> str:
    held = [name for name, entry in entries.items() if entry.get("unit") == "check"]
    rows = [
        {"measure": name, "value": quote(entry), "better": entry["better"] or ""}
        for name, entry in entries.items()
        if "value" in entry and entry["unit"] != "check"
    ]
    checks = f"Checks that held: {', '.join(held)}." if held else "No checks."
    return f"{checks}\n\n{markdown_table(rows)}" if rows else checks


def differences(committed: Metrics, fresh: Metrics) -> list[str]:
    """List where fresh metrics leave the committed ones: a missing name, or a change beyond its `tol`."""
    found = []
    for notebook, entries in committed.items():
        for name, entry in entries.items():
            other = fresh.get(notebook, {}).get(name)
            if other is None:
                found.append(f"{notebook}: {name} is committed but the run has none")
            elif not _within(entry, other):
                found.append(f"{notebook}: {name} {quote(entry)} ± {entry['tol']} committed, {quote(other)} found")
    return found


def _within(entry: Mapping, other: Mapping) -> bool:
    if entry.get("tol") is None:
        return True
    a, b = float(entry["value"]), float(other["value"])
    return abs(a - b) <= entry["tol"] or (math.isnan(a) and math.isnan(b)) or a == b
