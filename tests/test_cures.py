"""Laws of the remedies: every one does what its name says, runs are kept by seed, and budgets do not mix."""

from __future__ import annotations

import json

import pytest

from series import claims
from studies import cures, store
from studies.cures import Budget, Remedy

TINY = Budget(steps=1, batch=1, seconds=1, clips=4)


def test_every_remedy_differs_from_dmd_in_what_its_name_says():
    plain = vars(Remedy())
    changed = {
        name: {field: value for field, value in vars(remedy).items() if value != plain[field] and field != "work"}
        for name, remedy in cures.REMEDIES.items()
    }
    assert changed.pop("DMD") == {} and all(changed.values())
    assert len({json.dumps(change, sort_keys=True) for change in changed.values()}) == len(changed)


def test_runs_are_kept_and_say_what_they_judged(tmp_path):
    names = ("Stage 2", "on policy", "DMD and regression")
    cures.run(tmp_path, names=names, seeds=1, budget=TINY)
    made = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    cures.run(tmp_path, names=names, seeds=1, budget=TINY)
    assert made == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} and len(made) == 3
    table = cures.TRIALS.table(tmp_path)
    assert list(table) == [name for name in cures.REMEDIES if name in names]
    assert all(0 <= row["recall"][0] <= 1 and row["sync_f1"][1] is None for row in table.values())
    assert table["Stage 2"]["angle_sd"] != table["on policy"]["angle_sd"]
    _, how, rows = claims.remedies(tmp_path)
    assert "one seed ranks nothing" in how and rows.count("\n") == 1 + len(names)
    assert f"| DMD and regression | 1 | {table['DMD and regression']['recall'][0]:.4g} |" in rows
    record, *_ = store.read(tmp_path)
    assert record["files"] == store.origin("teacher", "stage2", "codec", "ode_pairs")["files"]
    with pytest.raises(ValueError, match="another folder"):
        cures.run(tmp_path, names=names, seeds=2, budget=Budget(steps=2))


def test_stored_remedies_with_the_most_seeds_are_compared_with_dmd():
    runs = cures.TRIALS.runs(cures.STORED)
    *_, how, rows = claims.remedies(cures.STORED)
    most = max(map(len, runs.values()))
    assert f"{most} training seeds" in how
    told = [line.split(" | ")[0].strip("| ") for line in rows.splitlines()[2:]]
    assert told == [name for name, seeds in runs.items() if len(seeds) == most and name != "DMD"]


def test_unknown_remedies_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown arms prayer; choose from 'Stage 2'"):
        cures.run(tmp_path, names=("prayer",))
    with pytest.raises(ValueError, match="holds no runs"):
        cures.TRIALS.table(tmp_path)
    assert claims.remedies(tmp_path / "none") == []
