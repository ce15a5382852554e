"""Where a stored number comes from: commit, files judged, notebook; and what of these is no longer what is here.

`record | origins.of("student", "codec")`, asked before the work begins, is all that a result has to store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import load_file

from omniforcing_lib import files, safetensors_io
from omniforcing_lib.ltx2 import checkpoints
from studies.store import ROOT, SHIPPED, git_state
from studies.store import origin as of

__all__ = ["ROOT", "SCORES", "SHIPPED", "differences", "git_state", "of", "renew", "rows", "source_sha256"]
SCORES = ("scores", "long")
"""Records of the protocol in `reports/scores`; what lies beside them was written by the same runs."""


def source_sha256(notebook: Path) -> str:
    """Hash the sources of a notebook's code cells, which its results depend on; empty when there is no such file."""
    if not notebook.exists():
        return ""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


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
    code = record.get("notebook_sha256")
    if code and code != source_sha256(root / "notebooks" / f"{record['notebook']}.ipynb"):
        told.append("older code of the notebook")
    return told


def renew(root: Path = ROOT) -> list[str]:
    """Write the shipped transformers again with the metadata that is written today, weights unchanged to the bit.

    A file says in `same_weights_as` which hash it had. `data/SHA256SUMS` and the records below `reports/` get the new
    one where they have that: they were measured on these weights. A file whose metadata is what is written today stays
    as it is, so that this can be run again, for records that came later. Gives the names of the files that changed.
    """
    changed, records = [], [root / "data" / "SHA256SUMS", *(root / "reports").rglob("*.json")]
    for path in (root / "data" / f"{name}.safetensors" for name in checkpoints.SHIPPED):
        metadata, described = safetensors_io.one_file(path).metadata, checkpoints.read(path).config.to_metadata()
        config = json.loads(metadata["config"])
        if config["transformer"] != described:
            metadata |= {
                "config": json.dumps(config | {"transformer": described}),
                "same_weights_as": files.sha256(path),
            }
            files.write_tensors(path, load_file(path), metadata)
            changed.append(path.name)
        for record in records if (old := metadata.get("same_weights_as")) else []:
            if old in (text := record.read_text(encoding="utf-8")):
                files.write_text(record, text.replace(old, files.sha256(path)))
    return changed


def rows(names: Iterable[str], profile: str, root: Path = ROOT) -> list[dict[str, str]]:
    """Table the origin of all that a report quotes: notebooks `names` of a profile, scores, training runs."""
    stored = root / "reports"
    records = {name: _read(stored / "run" / profile / f"{name}.json") for name in names}
    scores = {name: stored / "scores" / f"{name}.json" for name in SCORES}
    records |= {f"scores/{name}": _read(path) for name, path in scores.items() if path.exists()}
    told = [{"numbers": name, **_row(record, root)} for name, record in records.items()]
    paths = {name: sorted((stored / name).glob("*.json")) for name in ("ablations", "cures", "extended")}
    runs = [(name, _read(path)) for name, found in paths.items() for path in found]
    seen = {tuple({"numbers": name, **_row(record, root)}.items()) for name, record in runs}
    return told + [dict(items) for items in sorted(seen)]


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _row(record: Mapping, root: Path) -> dict[str, str]:
    commit = record.get("git", {}).get("commit") or "—"
    return {"commit": commit[:7], "not as here": "; ".join(differences(record, root)) or "—"}
