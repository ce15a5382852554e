"""A stored number says what it was measured on, and the report says where that is no longer what is here."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from omniforcing_lib import files
from omniforcing_lib.ltx2 import checkpoints
from series import claims, origins, report

HERE = dict(line.split()[::-1] for line in (origins.ROOT / "data" / "SHA256SUMS").read_text().splitlines())


@pytest.fixture
def clone(tmp_path):
    """A repository of one notebook, one file, and records that fit them."""
    files.write_text(tmp_path / "data" / "SHA256SUMS", "aaa  student.safetensors\n")
    write_notebook(tmp_path, "x = 1")
    code = origins.source_sha256(tmp_path / "notebooks" / "04.ipynb")
    record = {"git": {"commit": "c0ffee123", "dirty": False}, "files": {"student.safetensors": "aaa"}}
    stored = tmp_path / "reports"
    files.write_json(stored / "run" / "cpu" / "04.json", record | {"notebook": "04", "notebook_sha256": code})
    for path in ("scores/scores.json", "ablations/Stage_3-0.json", "ablations/Stage_3-1.json"):
        files.write_json(stored / path, record)
    return tmp_path


def write_notebook(root: Path, code: str, words: str = "# Words"):
    cells = [{"cell_type": "markdown", "source": [words]}, {"cell_type": "code", "source": [code]}]
    files.write_json(root / "notebooks" / "04.ipynb", {"cells": cells})


def change(path: Path, **entries):
    files.write_json(path, json.loads(path.read_text()) | entries)


def test_renewed_files_have_the_same_weights_and_are_found_by_their_new_hash(tmp_path):
    """Metadata that lacks a key is written anew once; every record of the old hash has the new one, others stay."""
    names = [f"{name}.safetensors" for name in ("teacher", "stage2", "student")]
    for name in names:
        with safe_open(origins.ROOT / "data" / name, "pt") as file:
            metadata, config = file.metadata(), json.loads(file.metadata()["config"])
        config["transformer"].pop("num_embeds_ada_norm", None)
        save_file(load_file(origins.ROOT / "data" / name), tmp_path / name, metadata | {"config": json.dumps(config)})
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / "data" / name)
    old = {name: files.sha256(tmp_path / "data" / name) for name in names}
    files.write_text(tmp_path / "data" / "SHA256SUMS", "".join(f"{digest}  {name}\n" for name, digest in old.items()))
    files.write_json(tmp_path / "reports" / "deep" / "a.json", {"files": old | {"codec.safetensors": "aaa"}})
    before = {name: checkpoints.read(tmp_path / "data" / name) for name in names}
    prints = {name: found.fingerprint for name, found in before.items()}
    weights = {name: load_file(tmp_path / "data" / name) for name in names}
    assert origins.renew(tmp_path) == names
    files.write_json(tmp_path / "reports" / "later.json", {"files": old})
    assert origins.renew(tmp_path) == []
    sums = dict(line.split()[::-1] for line in (tmp_path / "data" / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: files.sha256(tmp_path / "data" / name) for name in names} and sums != old
    assert json.loads((tmp_path / "reports" / "deep" / "a.json").read_text())["files"] == sums | {
        "codec.safetensors": "aaa"
    }
    assert json.loads((tmp_path / "reports" / "later.json").read_text())["files"] == sums
    for name in names:
        found, after = checkpoints.read(tmp_path / "data" / name), load_file(tmp_path / "data" / name)
        assert after.keys() == weights[name].keys() and all(torch.equal(after[k], t) for k, t in weights[name].items())
        assert found.metadata["notes"] == before[name].metadata["notes"] and found.causal == before[name].causal
        assert found.metadata["config"]["transformer"]["num_embeds_ada_norm"] == 1000
        assert found.fingerprint == prints[name]


def test_what_fits_the_repository_is_told_by_its_commit_alone(clone):
    rows = origins.rows(["04"], "cpu", clone)
    names = ["04", "scores/scores", "ablations"]
    assert rows == [{"numbers": name, "commit": "c0ffee1", "not as here": "—"} for name in names]
    assert claims.out_of_date(rows) == ""


def test_results_depend_on_a_notebooks_code_and_not_on_its_words(clone):
    write_notebook(clone, "x = 1", words="# Fewer")
    assert origins.rows(["04"], "cpu", clone)[0]["not as here"] == "—"
    write_notebook(clone, "x = 2", words="# Fewer")
    assert origins.rows(["04"], "cpu", clone)[0]["not as here"] == "older code of the notebook"


def test_what_does_not_fit_is_said_in_the_report_and_in_the_readme(clone):
    stored = clone / "reports"
    change(stored / "scores" / "scores.json", files={"student.safetensors": "bbb", "x/y.safetensors": "aaa"})
    change(stored / "ablations" / "Stage_3-1.json", git={"commit": None, "dirty": None})
    write_notebook(clone, "x = 2")
    files.write_json(stored / "scores" / "long.json", {})
    rows = origins.rows(["04", "05"], "cpu", clone)
    results = claims.Results({}, "profile cpu", origins=rows)
    text = claims.markdown(results) + claims.fill_results("\n".join(claims.RESULT_MARKS), results)
    for says in (
        "| 04 | c0ffee1 | older code of the notebook |",
        "| scores/scores | c0ffee1 | another student.safetensors than data/ has; x/y.safetensors is not in data/ |",
        "| ablations | c0ffee1 | — |",
        "| ablations | — | commit not recorded |",
        "commit not recorded: 05, scores/long, ablations; files not recorded: 05, scores/long;",
        "older code of the notebook: 04",
    ):
        assert says in text, says
    change(stored / "run" / "cpu" / "04.json", git={"commit": "c0ffee123", "dirty": True})
    assert origins.rows(["04"], "cpu", clone)[0]["not as here"].startswith("code that no commit holds; ")


def test_shipped_files_and_others_are_named_apart(tmp_path):
    copy = tmp_path / "runs" / "student.safetensors"
    files.write_bytes(copy, (origins.ROOT / "data" / "student.safetensors").read_bytes())
    found = origins.of("student", "codec", copy)
    shipped = {name: HERE[name] for name in ("student.safetensors", "codec.safetensors")}
    assert found["files"] == shipped | {"runs/student.safetensors": HERE["student.safetensors"]}
    assert origins.differences(found) == [
        *(["code that no commit holds"] if found["git"]["dirty"] else []),
        "runs/student.safetensors is not in data/",
    ]
    with pytest.raises(ValueError, match="nowhere"):
        origins.of("nowhere.safetensors")


def test_outside_a_clone_the_commit_is_unknown_and_files_are_not(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = origins.of("student")
    assert found["git"] == {"commit": None, "dirty": None} and list(found["files"]) == ["student.safetensors"]
    assert origins.differences(found) == ["commit not recorded"]


@pytest.mark.parametrize(
    ("teacher", "judged"), [("", {name for name in HERE if "_hum" not in name}), ("teacher", {"teacher.safetensors"})]
)
def test_a_notebooks_record_names_all_that_it_judged(monkeypatch, tmp_path, teacher, judged):
    monkeypatch.setattr(report, "_set_up", lambda seed, device: device)
    how = {"teacher": teacher, "out_dir": str(tmp_path)}
    report.begin("02", models=["student"], **how).finish()
    with pytest.raises(ValueError, match="nowhere"):
        report.begin("02", models=["nowhere.safetensors"], **how)
    record = json.loads((tmp_path / "run" / "02.json").read_text())
    assert record["files"] == {name: HERE[name] for name in judged | {"student.safetensors"}}
    assert record["git"].keys() == {"commit", "dirty"}


def test_every_shard_of_a_checkpoint_is_named(tmp_path):
    tensors, listing = load_file(files.DATA / "teacher.safetensors"), {}
    with safe_open(files.DATA / "teacher.safetensors", "pt") as file:
        metadata = file.metadata()
    for name, part in (("a.safetensors", sorted(tensors)[::2]), ("b.safetensors", sorted(tensors)[1::2])):
        files.write_tensors(tmp_path / name, {key: tensors[key] for key in part}, metadata)
        listing |= dict.fromkeys(part, name)
    index = tmp_path / "teacher.safetensors.index.json"
    files.write_json(index, {"weight_map": listing})
    assert [*origins.of(index)["files"]] == [f"{tmp_path.name}/{name}" for name in ("a.safetensors", "b.safetensors")]
