"""The run context of a notebook: set-up that repeats, one-line checks, measures, figures, their files.

A notebook says `run = report.begin(...)` first and `run.finish()` last. What it prints is the same in every
run of the same seed; what changes (times, versions, commits) goes to `run/<notebook>.json`, every number to
`metrics/<notebook>.json`.
"""

from __future__ import annotations

import dataclasses
import html
import inspect
import io
import json
import math
import os
import platform
import random
import textwrap
import time
from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from omniforcing_lib import backends
from omniforcing_lib.files import check_folder, given, write_bytes, write_json
from series import origins, profiles, verdicts
from series.claims import CLAIMS, foretold_rows, markdown_table, plain_table, quote

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from omniforcing_lib.layout import AV, Clock
    from omniforcing_lib.model_bundle import ModelBundle

ROOT = origins.ROOT
FIGURE_BYTES = 60_000
CLIP_BYTES = 100_000
VERSIONS_OF = ("torch", "numpy", "scipy", "matplotlib", "av", "einops", "diffusers", "transformers")
LEFT_OUT = {
    "has_ground_truth": "nobody knows the truth about this teacher's clips, nor what to expect of it",
    "decodes_at_once": "the decoders look ahead, so chunks come later than their latents",
    "fits_training": "the device's memory cannot hold the training of this model",
}
"""A property of `ModelBundle` -> why the cells that ask for it are left out where it is False."""


class CheckFailed(AssertionError):
    """Say which check of a notebook does not hold."""


def begin(
    name: str,
    *,
    profile: str = "smoke",
    seed: int = 0,
    device: str = "cpu",
    teacher: str = "",
    out_dir: str = "",
    override: Mapping[str, object] | None = None,
    models: Sequence[str] = (),
) -> Run:
    """Set a notebook up: deterministic torch on two threads, the resolved profile, the folder of its files.

    `override` replaces profile fields (None keeps the profile's value); `models` are judged besides the teacher, or
    the shipped files. Raises ValueError for an unknown profile, field or device, a checkpoint that is not there, or a
    folder that cannot be written.
    """
    resolved = profiles.from_name(profile).override(override or {})
    folder = given(out_dir).absolute() if out_dir else ROOT / "reports" / "runs" / "interactive"
    check_folder(folder)
    run = Run(
        name=name,
        profile=resolved,
        seed=int(seed),
        device=_set_up(int(seed), device),
        teacher=teacher,
        folder=folder,
        origin=origins.of(*([teacher] if teacher else origins.SHIPPED), *models),
    )
    torch_version = metadata.version("torch")
    print(f"{name}: profile {resolved.name}, seed {run.seed}, device {run.device}, torch {torch_version}")
    return run


def _set_up(seed: int, device: str) -> str:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    place = backends.device(device)
    torch.set_num_threads(2)
    # Some CUDA kernels have no deterministic form: there a warning is all that can be had.
    torch.use_deterministic_algorithms(True, warn_only=place.type != "cpu")
    torch.manual_seed(seed)
    random.seed(seed)
    return str(place)


@dataclasses.dataclass
class Run:
    """Collect what one notebook shows and writes."""

    name: str
    profile: profiles.Profile
    seed: int
    device: str
    teacher: str
    folder: Path
    origin: dict[str, dict] = dataclasses.field(default_factory=dict)
    metrics: dict[str, dict] = dataclasses.field(default_factory=dict)
    judged: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    illustrated: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def introduce(self, components: ModelBundle) -> None:
        """Print what runs, and for each thing that this checkpoint does not have, which cells are left out and why."""
        print(components)
        for name, why in LEFT_OUT.items():
            if not getattr(components, name):
                print(f"left out: cells under `if components.{name}:`; {why}")

    def out(self, *parts: str) -> Path:
        """Return a path inside the run's folder; its parent folder exists."""
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def check(self, name: str, condition: object, detail: str = "") -> None:
        """Print `name: True` and record it; raise CheckFailed when the condition is false."""
        detail = f" ({detail})" if detail else ""
        if not bool(condition):
            raise CheckFailed(f"{name}: False{detail}")
        self.metrics[name] = {"value": True, "unit": "check", "tol": None, "better": None}
        print(f"{name}: True{detail}")

    def metric(
        self,
        name: str,
        value: float,
        unit: str = "",
        *,
        tol: float | None = None,
        better: str | None = None,
        interval: tuple[float, float] | None = None,
    ) -> None:
        """Record a number; `tol` is the absolute change allowed between machines.

        `better` is "higher" or "lower"; `interval` is a 95 % confidence interval in the same unit.
        """
        if better not in (None, "higher", "lower"):
            raise ValueError(f"metric {name!r}: better is 'higher', 'lower' or None, found {better!r}")
        self.metrics[name] = {"value": _rounded(value), "unit": unit, "tol": tol, "better": better}
        if interval is not None:
            self.metrics[name]["interval"] = [_rounded(edge) for edge in interval]

    def claim(
        self, number: int, limits: Mapping[str, verdicts.Limit] | str, *, also: Sequence[str] = (), note: str = ""
    ) -> None:
        """Answer claim `number` of the paper (`claims.toml` lists them) with recorded metrics.

        `limits` says what each of some metrics would have to be, and `verdicts.verdict` decides; or it is
        `verdicts.NOT_TRIED` or `NOT_RUN`. The metrics `also` are quoted beside them and decide nothing.
        """
        tried = not isinstance(limits, str)
        names = [*(limits if tried else ()), *also]
        if number not in CLAIMS:
            raise ValueError(f"the claims are numbered {min(CLAIMS)} to {max(CLAIMS)}, found {number}")
        if missing := [name for name in names if name not in self.metrics]:
            raise ValueError(f"claim {number} quotes unrecorded metrics: {', '.join(missing)}")
        if not tried and limits not in (verdicts.NOT_TRIED, verdicts.NOT_RUN):
            raise ValueError(f"claim {number} is judged by limits, or is 'not tried', found {limits!r}")
        status, answers = limits, {}
        if tried:
            for name, limit in limits.items():
                entry = self.metrics[name]
                interval = [float(edge) for edge in entry.get("interval", ())]
                answers[name] = verdicts.verdict(float(entry["value"]), interval or None, limit)
                self.judged[name] = {"limit": str(limit), "says": answers[name]}
            status = verdicts.whole(answers)
        self.metrics[f"claim {number:02d}"] = {
            "claim": number,
            "metrics": names,
            "status": status,
            "note": note,
            "limits": {name: str(limits[name]) for name in answers},
        }

    def foretold(self, rows: Sequence[Mapping[str, object]], base: str) -> None:
        """Record and show what was foretold of arms less a base: rows of `studies.extended.told`."""
        for row in rows:
            name = f"extended: {row['measure']}, {row['arm']} less {base}"
            self.metric(name, row["gain"], interval=row["interval"])
        self.table(foretold_rows(rows))

    def quote(self, name: str) -> str:
        """Return a recorded metric as text, with its unit and interval."""
        return quote(self.metrics[name])

    def figure(self, name: str, fig: Figure, *, alt: str, metric: str | Sequence[str]) -> None:
        """Save a figure, show it at no more than 60 kB, and name the metrics that say the same in numbers.

        `alt` says in a sentence what is drawn, for readers who do not see it. An `img` element carries it: neither
        JupyterLab nor nbconvert gives alternative text to an `image/png`.
        """
        from IPython.display import display

        from series import plots

        self.illustrated[name] = (metric,) if isinstance(metric, str) else tuple(metric)
        write_bytes(self.out("figures", f"{self.name}_{name}.png"), plots.png(fig))
        picture = b64encode(_small_png(fig)).decode()
        image = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{picture}">'
        display({"text/html": image, "text/plain": f"figure {name}: {alt}"}, raw=True)

    def source(self, *parts: object) -> None:
        """Show functions and classes as the library has them, so that a reader sees the method and not a call."""
        from IPython.display import display

        code = "\n\n".join(textwrap.dedent(inspect.getsource(part)).rstrip() for part in parts)
        display({"text/plain": code, "text/markdown": f"```python\n{code}\n```"}, raw=True)

    def table(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Show rows as a table: the keys of the first row are the columns."""
        from IPython.display import display

        if not rows:
            raise ValueError("a table needs at least one row")
        display({"text/plain": plain_table(rows), "text/markdown": markdown_table(rows)}, raw=True)

    def compare(self, head: str, names: Sequence[str], to: float = 0.0) -> None:
        """Show recorded differences, or ratios `to` 1, and on which side of that their whole interval lies."""
        sides = {name: verdicts.side(self.metrics[name].get("interval"), to) for name in names}
        self.table([{head: name, "value": self.quote(name), "its interval": told} for name, told in sides.items()])

    def summary(self, names: Sequence[str] = ()) -> None:
        """Show what claims rest on, with limit and answer, then the recorded numbers `names`; or all of them.

        In profile smoke what `reports` has of profile cpu stands beside them. The head of that column says so where
        it was run on other files or with older code.
        """
        numbers = [name for name, entry in self.metrics.items() if "value" in entry and entry.get("unit") != "check"]
        shown = dict.fromkeys([*self.judged, *names] or numbers)
        print(f"{self.name}: some of its numbers; REPORT.md has all")
        path, beside = ROOT / "reports" / "metrics" / "cpu" / f"{self.name}.json", ""
        if self.profile.name == "smoke" and not self.teacher and path.exists():
            stored, record = (
                json.loads(p.read_text(encoding="utf-8")) if p.exists() else {}
                for p in (path, ROOT / "reports" / "run" / "cpu" / path.name)
            )
            beside = "; ".join(["profile cpu", *origins.differences(record, ROOT)])
            print("profile cpu: the same in the longer run that reports/ holds, with more clips and training")
        rows = []
        for name in shown:
            row = {"measure": name, "value": self.quote(name)}
            row |= self.judged.get(name, {"limit": "", "says": ""}) if self.judged else {}
            if beside:
                row[beside] = quote(stored[name]) if name in stored else "—"
            rows.append(row)
        if rows:
            self.table(rows)

    def clip(self, name: str, clip: AV[np.ndarray], clock: Clock | None = None) -> None:
        """Write a clip as mp4 beside the run's files and show a player when it is small enough to store.

        Shapes: frames uint8 [F, H, W, 3], samples float32 [N] in [-1, 1].
        """
        from IPython.display import display

        from omniforcing_lib import media
        from omniforcing_lib.layout import Clock

        path = self.out("clips", f"{self.name}_{name}.mp4")
        media.write_clip(path, clip, clock or Clock())
        shown = {"text/plain": f"clip {name}: clips/{path.name}"}
        if path.stat().st_size <= CLIP_BYTES:
            shown["text/html"] = (
                f'<video controls loop width="256" style="image-rendering: pixelated" title="{path.name}" '
                f'aria-label="clip with sound: {name}" '
                f'src="data:video/mp4;base64,{b64encode(path.read_bytes()).decode()}"></video>'
            )
        display(shown, raw=True)

    def finish(self) -> None:
        """Write the measures and the record of the run; print how many checks held."""
        for figure, names in self.illustrated.items():
            if missing := [name for name in names if name not in self.metrics]:
                raise ValueError(f"figure {figure!r} names metrics that were not recorded: {', '.join(missing)}")
        write_json(self.out("metrics", f"{self.name}.json"), self.metrics)
        record = {
            "notebook": self.name,
            "notebook_sha256": origins.source_sha256(ROOT / "notebooks" / f"{self.name}.ipynb"),
            "profile": dataclasses.asdict(self.profile),
            "seed": self.seed,
            "device": _device_name(self.device),
            "waiting_threads": os.environ.get("OMP_WAIT_POLICY", "as OpenMP likes"),
            "teacher": Path(self.teacher).name or "shipped miniature",
            "wall_s": round(time.perf_counter() - self.started, 2),
            "versions": versions(),
            **self.origin,
        }
        write_json(self.out("run", f"{self.name}.json"), record)
        checks = sum(entry.get("unit") == "check" for entry in self.metrics.values())
        print(f"{self.name}: {checks} checks hold, {len(self.metrics) - checks} measures written")


def versions() -> dict[str, str]:
    """Return the versions that a number may depend on."""
    installed = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for name in VERSIONS_OF:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def _device_name(device: str) -> str:
    import torch

    cuda = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if cuda else f"{device}, {os.cpu_count()} logical cores"


def _rounded(value: object) -> float | int | str:
    """Six significant digits; JSON has no NaN, so what is not finite becomes a word."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, int | str):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def _small_png(fig: Figure) -> bytes:
    from PIL import Image

    from series import plots

    for dpi in (100, 80, 64, 50):
        buffer = io.BytesIO()
        image = Image.open(io.BytesIO(plots.png(fig, dpi))).convert("RGB")
        image.quantize(128, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
        if buffer.tell() <= FIGURE_BYTES:
            return buffer.getvalue()
    raise ValueError(f"a stored figure takes at most {FIGURE_BYTES} bytes, found {buffer.tell()} at 50 dpi")
