"""The paper's claims and what a run answers to each: text from metrics files only, for REPORT.md."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from series.origins import SCORES

RESULT_MARKS = ("<!-- results: written by make report -->", "<!-- end of results -->")
Metrics = dict[str, dict[str, dict]]
MEASURES = {
    "one_ball": "frames with exactly one ball",
    "colour": "frames in the colour of the prompt",
    "timbre": "onsets in the timbre of the prompt",
    "sync_f1": "impacts seen ↔ onsets heard, F1 at ±1.5 frames",
    "offset_ms": "sound after picture, ms",
    "wall_pitch": "pitch tells the wall",
    "speed_cv": "speed between impacts, std / mean",
    "precision": "motions near a real one (k-NN precision)",
    "recall": "real motions near one of these (k-NN recall)",
    "sound_recall": "real patterns of onsets near one of these (k-NN recall)",
    "direction_entropy": "evenness of the four directions (entropy, 1 is even)",
    "angle_sd": "angle of the start, SD in degrees",
    "speed_sd": "speed of the start, SD over clips in px/s",
    "start_x_sd": "start x, SD in px",
    "start_y_sd": "start y, SD in px",
    "one_prompt_nearest_px": "54 clips of one prompt: distance to the nearest other, px",
    "energy_motion": "energy distance of the motions to real ones",
    "quadrants": "starts to the lower right, lower left, upper left, upper right",
    "frechet_video": "Fréchet distance, 15 features of the picture, to real clips",
    "frechet_audio": "Fréchet distance, 24 features of the sound, to real clips",
    "frechet_video_to_codec": "… of the picture, to codec round trips",
    "frechet_audio_to_codec": "… of the sound, to codec round trips",
    "frechet_video_to_codec_by_teacher": "… of the picture, by the teacher's (limit 1.09)",
    "frechet_audio_to_codec_by_teacher": "… of the sound, by the teacher's (limit 1.24)",
}
SYSTEMS = {
    "real clips": "real",
    "codec round trip": "codec",
    "shuffled sound": "shuffled",
    "teacher, 40 steps": "teacher",
    "stage2": "Stage 2",
    "collapsed": "collapsed student",
    "student": "student",
}


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
        "operations for 5 s at the 19B's widths, decoders included; times of smaller models; frames a second",
        "197 s → 5.7 s for 5 s (34.6×); ~25 FPS on one GPU (authors later: ~20 with 4 steps)",
    ),
    6: Claim(
        "first chunk",
        "05",
        "operations up to the first decoded chunk at the 19B's widths; times of smaller models",
        "197 s → 0.7 s",
    ),
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
        "loss, sinks with times before zero less unrotated sinks; counted positions beside it",
        "loss .081 identity, .402 counted positions",
    ),
    11: Claim(
        "sinks beat extra QK-norm and tanh gates",
        "03",
        "loss of each variant less that of sinks, seed by seed",
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
        "operations and bytes by block; block time beside them",
        "O(L) a step",
    ),
    14: Claim(
        "the two streams can run concurrently between cross-modal layers",
        "05",
        "share of the work that running side by side could hide",
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


def claim_rows(metrics: Metrics, *, short: bool = False) -> list[dict[str, str]]:
    """Answer every claim in order, `short` by its first two numbers; one that no metrics file answers says so."""
    answers = {
        entry["claim"]: (entries, entry)
        for entries in metrics.values()
        for name, entry in entries.items()
        if name.startswith("claim ")
    }
    return [_claim_row(number, claim, answers.get(number), short) for number, claim in CLAIMS.items()]


def _claim_row(number: int, claim: Claim, answer: tuple[dict, dict] | None, short: bool) -> dict[str, str]:
    ours, status = "no run", "no run"
    if answer is not None:
        entries, entry = answer
        limits = {name: f" (limit {limit})" for name, limit in entry.get("limits", {}).items()}
        numbers = [f"{name}: {quote(entries[name])}{limits.get(name, '')}" for name in entry["metrics"]]
        numbers = numbers[:2] if short else [*numbers, *filter(None, [entry["note"]])]
        ours, status = "; ".join(numbers) or "—", entry["status"]
    return {"#": str(number), **claim._asdict(), "ours": ours, "status": status}


def read_scores(folder: Path) -> dict[str, dict]:
    """Read what the protocol stored, `scores.json` and `long.json`; empty where there is none."""
    found = (folder / f"{name}.json" for name in SCORES)
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in found if path.exists()}


def quality(stored: Mapping[str, dict]) -> str:
    """Write what the protocol measured, and how."""
    scores, long = stored["scores"], stored.get("long")
    size = f"{scores['seeds']} seeds × {scores['clips']} clips of {scores['seconds']} s"
    if long:
        size += f"; last column {long['seeds'] * long['clips']} roll-outs of {long['seconds']} s"
    how = "held-out seeds (every prompt is trained on), through an mp4 (those of one prompt as they are made)"
    how += ", judged from pixels and samples"
    return f"{size}; {how}.\n\n{markdown_table(quality_rows(stored))}"


def quality_rows(stored: Mapping[str, dict]) -> list[dict[str, str]]:
    """Table what the protocol measured: systems side by side, then the student late in its long roll-outs."""
    measures, more = stored["scores"]["measures"], stored["scores"]["more"]
    late = stored["long"]["spans"]["student"]["measures"] if "long" in stored else {}
    span = list(late)[-2] if late else ""
    rows = []
    for key, title in MEASURES.items():
        row = {"measure": title}
        for name, column in SYSTEMS.items():
            if name in measures:
                row[column] = _cell(measures[name].get(key, more[name].get(key)))
        if late:
            row[f"student, {span}"] = _cell(late[span].get(key))
        rows.append(row)
    return rows


def _cell(entry: Sequence[float] | float | None) -> str:
    """Write a mean with its interval, a number, or counts; a dash for what was not measured."""
    if entry is None:
        return "—"
    if not isinstance(entry, list):
        return show(entry)
    if all(isinstance(count, int) for count in entry):
        return "/".join(map(str, entry))
    mean, low, high = (f"{round(x, 3):g}" for x in entry)
    return mean if low == high else f"{mean} [{low}, {high}]"


def markdown(
    metrics: Metrics,
    title: str,
    scores: Mapping[str, dict] | None = None,
    origins: Sequence[Mapping[str, str]] = (),
) -> str:
    """Write the text of REPORT.md: the claims, what the protocol measured, its `origins`, every measure by notebook."""
    parts = [
        f"# Report: {title}",
        "Generated from the metrics files of one run; no number here was typed. Intervals are 95 %. The "
        "paper's numbers are of the 19B model, ours of the checkpoint named in the run: compare directions and "
        "ratios.",
        "## Claims",
        markdown_table(claim_rows(metrics)),
    ]
    if scores:
        pictures = "Contact sheets of the first clips, impacts and onsets marked: `reports/scores/*.png`."
        parts += ["## Quality by the protocol", quality(scores), pictures]
    if origins:
        parts += ["## Where the numbers come from", markdown_table(origins)]
    for notebook, entries in metrics.items():
        parts += [f"## {notebook}", _measures(entries)]
    return "\n\n".join(parts) + "\n"


def fill_results(
    text: str,
    metrics: Metrics,
    title: str,
    scores: Mapping[str, dict] | None = None,
    origins: Sequence[Mapping[str, str]] = (),
) -> str:
    """Replace what is between the markers of docs/results.md: quality, the short claims, what is out of date."""
    head, opening, rest = text.partition(RESULT_MARKS[0])
    _, closing, tail = rest.partition(RESULT_MARKS[1])
    if not (opening and closing):
        raise ValueError(f"docs/results.md needs the lines {RESULT_MARKS[0]} and {RESULT_MARKS[1]}, in this order")
    rows = [{key: row[key] for key in ("claim", "paper", "ours", "status")} for row in claim_rows(metrics, short=True)]
    first = f"{quality(scores)}\n\n" if scores else ""
    claims = f"Claim by claim, {title}; all numbers in `reports/REPORT.md`.\n\n{markdown_table(rows)}"
    return f"{head}{opening}\n{first}{claims}{_aged(origins)}\n{closing}{tail}"


def _aged(origins: Sequence[Mapping[str, str]]) -> str:
    reasons: dict[str, list[str]] = {}
    for row in origins:
        for reason in row["not as here"].split("; "):
            reasons.setdefault(reason, []).append(row["numbers"])
    reasons.pop("—", None)
    told = "; ".join(f"{reason}: {', '.join(names)}" for reason, names in reasons.items())
    return (
        f"\n\nNumbers of another state than the repository is in (commits in `reports/REPORT.md`): {told}."
        if told
        else ""
    )


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
