"""The series as papermill runs it: every notebook, with another seed than the stored outputs have."""

import pytest

from series import runner


@pytest.mark.parametrize("notebook", [path.stem for path in runner.select()])
def test_series_runs_with_another_seed(notebook, tmp_path):
    folder = runner.reproduce("tiny", only=notebook, parameters=["seed=7"], out=str(tmp_path / "run"))
    assert (folder / "notebooks" / f"{notebook}.ipynb").exists() and (folder / "index.html").exists()
    assert list((folder / "metrics").glob("*.json"))
