"""What `bench` found on GPUs, as pages and reports quote it; nothing is measured here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from series.claims import markdown_table, show
from studies.store import ROOT

FOLDER = ROOT / "reports" / "gpu"
MARKS = ("<!-- gpu: written by make report -->", "<!-- end of gpu -->")
NEEDS = "needs a GPU"

Record = Mapping[str, object]
"""A file of `bench`: card, commit, size, figures."""


def read(folder: Path = FOLDER) -> list[Record]:
    """Read the runs of the 19B on GPUs, a file for each card; empty where there is none."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [record for record in found if record["size"] == "19b" and record["device"] != "cpu"]


def commit(record: Record) -> str:
    """Say of which code a run is."""
    if not record["commit"]:
        return "commit not recorded"
    return f"commit {record['commit'][:7]}" + " with changes" * bool(record["dirty"])


def stream_rows(record: Record) -> list[dict[str, str]]:
    """Table the whole stream of a run: a row for each way to stream it."""
    rows: dict[str, dict[str, str]] = {}
    for figure in record["figures"]:
        stream, colon, what = figure["name"].partition(": ")
        if figure["phase"] == "whole" and colon:
            unit = f", {figure['unit']}" * bool(figure["unit"])
            rows.setdefault(stream, {"stream": stream})[what + unit] = show(figure["value"])
    return list(rows.values())


def flex_rows(folder: Path = FOLDER) -> list[dict[str, str]]:
    """Table FlexAttention against SDPA in fp64 by the number of sinks: the worst of all ways to pad and all dtypes."""
    from studies.gpu_phases import SINKS

    figures = [f for record in read(folder) for f in record["figures"] if f["phase"] == "flex"]
    rows = []
    for sinks in SINKS:
        row = {"sinks": str(sinks)}
        for part in ("forward", "gradients"):
            told = [f for f in figures if f["name"].startswith(f"{sinks} sinks, ") and f": {part}, " in f["name"]]
            for dtype in ("bfloat16", "float32"):
                values = [f["value"] for f in told if f"{dtype}: {part}, error" in f["name"]]
                worst = "not finite" if None in values else show(max(values, default=NEEDS))
                row[f"{part}, error, {dtype}"] = worst
            finite = [f["value"] for f in told if f["name"].endswith("finite")]
            row[f"{part}, finite"] = ("yes" if all(finite) else "no") if finite else NEEDS
        rows.append(row)
    return rows


def answers(folder: Path = FOLDER) -> dict[int, str]:
    """Say for claims 5 and 6 what the 19B with random weights did on each card; that nothing was measured, if so."""
    found: dict[int, list[str]] = {5: [], 6: []}
    for record in read(folder):
        rows = stream_rows(record)
        where = f"on {record['card']}, random weights, {commit(record)}"
        if rows:
            best = max(rows, key=lambda row: float(row["frames a second"]))
            found[5].append(f"19B {where}, {best['stream']}: {best['frames a second']} frames a second")
            soon = f"first frame {best['first frame, s']} s, first second {best['first second, s']} s"
            found[6].append(f"19B {where}, {best['stream']}: {soon}")
    nothing = "19B on a GPU: predicted in docs/gpu.md, not measured"
    return {number: "; ".join(told) or nothing for number, told in found.items()}


def fill(text: str, folder: Path = FOLDER) -> str:
    """Replace what is between the markers of docs/gpu.md: the runs that were measured, or else the prediction."""
    head, opening, rest = text.partition(MARKS[0])
    _, closing, tail = rest.partition(MARKS[1])
    if not (opening and closing):
        raise ValueError(f"docs/gpu.md needs the lines {MARKS[0]} and {MARKS[1]}, in this order")
    return f"{head}{opening}\n{measured(read(folder), folder) or prediction()}\n{closing}{tail}"


def measured(records: Sequence[Record], folder: Path = FOLDER) -> str:
    """Write the tables of the runs; empty where there is none."""
    parts = []
    for record in records:
        parts.append(f"Measured on {record['card']}, 19B with random weights, {commit(record)}:")
        parts += [markdown_table(rows)] if (rows := stream_rows(record)) else ["The whole stream was not timed."]
    if parts:
        parts += ["FlexAttention on the sound's own attention against SDPA in fp64:", markdown_table(flex_rows(folder))]
    return "\n\n".join(parts)


def prediction() -> str:
    """Write the predicted table with its assumptions."""
    from studies import gpu_bench

    (card, rates), (kernels, nbytes) = next(iter(gpu_bench.ASSUMED.items())), gpu_bench.elementwise()
    how = (
        f"Predicted for an {card}, not measured. Counted in dry runs of the 19B at 512 x 768 pixels, with a prompt of "
        f"1024 tokens and a window of 4 s: matrix products, {kernels:,} other kernels a pass that move "
        f"{nbytes / 1e9:.0f} GB, and both kinds of work in LTX-2's decoders. Assumed: {rates.linear / 1e12:.0f} "
        f"TFLOP/s in linear layers, {rates.attention / 1e12:.0f} in attention, {rates.convolution / 1e12:.0f} in "
        f"convolutions, {rates.memory / 1e12:.1f} TB/s; nothing overlaps, and no time is lost between kernels."
    )
    return f"{how}\n\n{markdown_table(gpu_bench.predicted())}"
