"""Where a stored number comes from: commit, files judged, notebook; and what of these is no longer what is here.

`record | origins.of("student", "codec")`, asked before the work begins, is all that a result has to store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from omniforcing_lib import files
from omniforcing_lib.ltx2 import checkpoints
from studies.store import ROOT, SHIPPED, git_state
from studies.store import origin as of

__all__ = ["ROOT", "SCORES", "SHIPPED", "differences", "git_state", "of", "renew", "rows", "source_sha256"]
SCORES = ("scores", "long")
"""Records of the protocol in `reports/scores`; what lies beside them was written by the same runs."""


def source_sha256(notebook: Path) -> str:
    """Hash the sources of a notebook's cells, without outputs; empty when there is no such file."""
    if not notebook.exists():
        return ""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return hashlib.sha256("\0".join("".join(cell["source"]) for cell in cells).encode()).hexdigest()


def differences(record: Mapping, root: Path = ROOT) -> list[str]:
    """List in what the repository has moved on since a result was stored, and what was not recorded with it."""
    lines = (root / "data" / "SHA256SUMS").read_text(encoding="utf-8").split()
    here, found = dict(zip(lines[1::2], lines[::2], strict=True)), record.get("files")
    told = [] if record.get("git", {}).get("commit") else ["commit not recorded"]
    told += ["code that no commit holds"] if record.get("git", {}).get("dirty") else []
    told += ["files not recorded"] if found is None else []
    for name, digest in (found or {}).items():
        if digest != here.get(name):
            told.append(f"another {name} than data/ has" if name in here else f"{name} is not in data/")
    text = record.get("notebook_sha256")
    if text and text != source_sha256(root / "notebooks" / f"{record['notebook']}.ipynb"):
        told.append("an older text of the notebook")
    return told


def renew(root: Path = ROOT) -> list[str]:
    """Write the shipped transformers again with the metadata that is written today, weights unchanged to the bit.

    `data/SHA256SUMS` and the records below `reports/` get the new hash where they have the old one: they were measured
    on these weights. A file whose metadata is what is written today stays as it is. Gives the names of those changed.
    """
    changed = []
    for path in (root / "data" / f"{name}.safetensors" for name in checkpoints.SHIPPED):
        said, old = checkpoints.read(path), files.sha256(path)
        if said.metadata["config"]["transformer"] != said.config.to_metadata():
            new = files.sha256(checkpoints.export(path, path))
            for record in (root / "data" / "SHA256SUMS", *(root / "reports").rglob("*.json")):
                if old in (text := record.read_text(encoding="utf-8")):
                    files.write_text(record, text.replace(old, new))
            changed.append(path.name)
    return changed


def rows(names: Iterable[str], profile: str, root: Path = ROOT) -> list[dict[str, str]]:
    """Table the origin of all that a report quotes: a profile's notebooks `names`, scores, and ablations by commit."""
    stored = root / "reports"
    records = {name: _read(stored / "run" / profile / f"{name}.json") for name in names}
    scores = {name: stored / "scores" / f"{name}.json" for name in SCORES}
    records |= {f"scores/{name}": _read(path) for name, path in scores.items() if path.exists()}
    ablations = [_read(path) for path in sorted((stored / "ablations").glob("*.json"))]
    told = [{"numbers": name, **_row(record, root)} for name, record in records.items()]
    seen = {tuple({"numbers": "ablations", **_row(record, root)}.items()) for record in ablations}
    return told + [dict(items) for items in sorted(seen)]


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _row(record: Mapping, root: Path) -> dict[str, str]:
    commit = record.get("git", {}).get("commit") or "—"
    return {"commit": commit[:7], "not as here": "; ".join(differences(record, root)) or "—"}
