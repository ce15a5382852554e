"""The runner and the run context, on notebooks of three cells."""

import inspect
import json
import sys
from typing import NamedTuple

import matplotlib
import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure

from omniforcing_lib import files, model_bundle
from omniforcing_lib.__main__ import main
from omniforcing_lib.bounce import world
from series import claims, profiles, report, runner, verdicts
from studies import protocol

matplotlib.use("agg")

PARAMETERS = 'profile: str = "smoke"  # smoke | cpu\nseed: int = 0  # any\nout_dir: str = ""  # run folder'
IMPORTS = "from series import report, verdicts"
BEGIN = IMPORTS + '\n\nrun = report.begin("{}", profile=profile, seed=seed, out_dir=out_dir)'


def write_notebook(folder, name, *cells):
    node = nbformat.v4.new_notebook()
    node.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    sources = (PARAMETERS, BEGIN.format(name), *cells)
    node.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    node.cells[0].metadata.tags = ["parameters"]
    nbformat.write(node, folder / f"{name}.ipynb")


@pytest.fixture
def series(tmp_path):
    folder = tmp_path / "series"
    folder.mkdir()
    answer = 'run.metric("drift", seed / 3, "ms", interval=(0, 3)); run.claim(7, {"drift": verdicts.at_most(2.5)})'
    write_notebook(folder, "01_holds", answer, 'run.check("seed arrived", seed == 7)', "run.finish()")
    write_notebook(folder, "02_fails", 'run.check("clocks agree", False, "3 against 25")')
    return folder


@pytest.fixture
def run(tmp_path):
    return report.Run("02_masks", profiles.from_name("smoke"), seed=0, device="cpu", teacher="", folder=tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-p", "profle=full"], "unknown parameter profle; the notebooks take out_dir, profile, seed"),
        (["-p", "seed=many"], "parameter seed is of type int, found 'many'"),
        (["-p", "seed"], "name=value"),
        (["-p", "profile=full"], "--profile"),
        (["-p", "teacher=nowhere.safetensors"], "parameter teacher: no checkpoint at nowhere.safetensors"),
        (["--only", "07"], "01_holds, 02_fails"),
        (["--profile", "fast"], "smoke, cpu, full, gpu, tiny"),
    ],
)
def test_bad_parameters_stop_the_run_before_it_starts(series, tmp_path, capsys, words, says):
    out = tmp_path / "out"
    arguments = ["reproduce", "--profile", "smoke", "--notebooks", str(series), "--out", str(out), *words]
    assert main(arguments) == 2
    assert says in capsys.readouterr().err and not out.exists()


def plain_notebook(folder, *cells):
    node = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    node.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(node, folder / "plain.ipynb")
    return folder / "plain.ipynb"


def test_a_notebook_runs_in_this_interpreter_whatever_kernel_is_called_python3(tmp_path, monkeypatch):
    foreign = tmp_path / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {"argv": ["no-such-python", "{connection_file}"], "display_name": "Python 3", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    runner.execute(plain_notebook(tmp_path, "import sys\nprint(sys.prefix)"), tmp_path / "out.ipynb", {})
    (output,) = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[0].outputs
    assert output.text.strip() == sys.prefix


CAUSED = (
    "def first():\n    try:\n        1 / 0\n    except ArithmeticError as error:\n        raise ValueError from error"
)


@pytest.mark.parametrize(
    ("cells", "line"),
    [
        ([CAUSED, "first()  # here\n\n\nx = 1"], "first()  # here"),
        (["x = dict(\n    a=1,\n    b=1 / 0,\n)"], "b=1 / 0,"),
        (["x = 1\ny = = 2"], "y = = 2"),
    ],
    ids=["a call with a cause", "many lines", "no Python"],
)
def test_the_line_that_failed_is_named_not_the_first(tmp_path, cells, line):
    with pytest.raises(runner.NotebookFailed) as failed:
        runner.execute(plain_notebook(tmp_path, *cells), tmp_path / "out.ipynb", {})
    assert f"plain failed in cell [{len(cells)}] `{line}`: " in str(failed.value)


@pytest.mark.slow
def test_the_time_left_is_the_known_time_at_this_run_s_speed():
    known, names = {"01": 60.0, "02": 120.0, "03": 600.0}, ["00", "01", "02", "03"]
    assert runner.time_left({}, known, names) == runner.time_left({"00": 9.0}, known, names) == ", some 13 min to go"
    assert runner.time_left({"00": 9.0, "01": 120.0}, known, names) == ", some 24 min to go"
    assert runner.time_left({"00": 9.0, "01": 60.0, "02": 30.0}, known, names) == ", some 5 min to go"
    assert runner.time_left(dict.fromkeys(names, 1.0), known, names) == runner.time_left({}, {}, names) == ""


def test_a_failing_notebook_ends_the_run_and_what_ran_is_reported(series, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["reproduce", "--profile", "smoke", "--notebooks", str(series), "--out", str(out)]
    assert main([*arguments, "-p", "seed=7"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: 02_fails failed in cell [4] `run.check(")
    assert error.endswith("CheckFailed: clocks agree: False (3 against 25)")
    rows = claims.claim_rows(claims.read_metrics(out / "metrics"))
    assert [row["status"] for row in rows].count("no run") == len(claims.CLAIMS) - 1
    assert rows[6]["ours"] == "drift: 2.333 [0, 3] ms (limit ≤ 2.5)" and rows[6]["status"] == verdicts.NOT_SEPARATED
    assert rows[6]["ours"] in (out / "REPORT.md").read_text() and "01_holds" in (out / "index.html").read_text()
    assert (out / "html" / "01_holds.html").exists() and not (out / "html" / "02_fails.html").exists()
    record = json.loads((out / "run" / "01_holds.json").read_text())
    assert record["seed"] == 7 and record["profile"]["name"] == "smoke" and record["versions"]["torch"]
    assert main(arguments) == 2


def test_a_check_prints_one_line_or_raises(run, capsys):
    run.check("no leak before block 2", np.bool_(True))
    run.check("latents", 16 == 1 + 5 * 3, "16")
    assert capsys.readouterr().out == "no leak before block 2: True\nlatents: True (16)\n"
    with pytest.raises(report.CheckFailed, match="leak: False"):
        run.check("leak", np.bool_(False))
    assert set(run.metrics) == {"no leak before block 2", "latents"}


class Bundle(NamedTuple):
    has_ground_truth: bool
    decodes_at_once: bool
    fits_training: bool

    def __str__(self):
        return "a checkpoint"


@pytest.mark.parametrize("missing", report.LEFT_OUT)
def test_what_a_checkpoint_does_not_have_is_left_out_in_so_many_words(run, capsys, missing):
    run.introduce(Bundle(**{name: name != missing for name in report.LEFT_OUT}))
    told = f"left out: cells under `if components.{missing}:`; {report.LEFT_OUT[missing]}"
    assert capsys.readouterr().out == f"a checkpoint\n{told}\n"


def test_the_miniature_leaves_nothing_out(run, capsys):
    run.introduce(model_bundle.of())
    assert "left out" not in capsys.readouterr().out


def test_metrics_files_are_sorted_rounded_and_plain_json(run, monkeypatch):
    monkeypatch.setattr(report, "_device_name", str)
    run.metric("loss", np.float32(1 / 3), tol=0.01, better="lower", interval=(0.1, 0.5))
    run.metric("exploded", float("nan"))
    run.finish()
    text = (run.folder / "metrics" / "02_masks.json").read_text()
    entries = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert entries["loss"]["value"] == 0.333333 and entries["exploded"]["value"] == "nan"
    assert list(entries) == sorted(entries) and not list(run.folder.rglob(".*"))
    assert run.quote("loss") == "0.3333 [0.1, 0.5]" and run.quote("exploded") == "nan"


def test_figures_and_claims_need_their_numbers(run):
    figure = Figure(figsize=(9, 5))
    noise = np.random.default_rng(0).normal(size=(300, 500))
    figure.subplots().imshow(noise, cmap="magma")
    run.figure("leak", figure, alt="Noise, as a map of colours", metric="leak")
    assert len(report._small_png(figure)) <= report.FIGURE_BYTES
    assert (run.folder / "figures" / "02_masks_leak.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="claim 7 quotes unrecorded metrics: leak"):
        run.claim(7, {"leak": verdicts.at_most(0, exact=True)})
    with pytest.raises(ValueError, match="figure 'leak' names metrics that were not recorded: leak"):
        run.finish()


@pytest.fixture
def shown(monkeypatch):
    """What a notebook would show."""
    outputs = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: outputs.append(data))
    return outputs


def test_a_figure_is_told_in_words_where_a_page_looks_for_them(run, shown):
    run.figure("noise", Figure(), alt='A "map" of <noise>', metric="noise")
    (data,) = shown
    assert 'alt="A &quot;map&quot; of &lt;noise&gt;"' in data["text/html"] and "image/png" not in data
    assert data["text/plain"] == 'figure noise: A "map" of <noise>'


def test_a_source_is_the_one_that_runs(run, shown):
    run.source(verdicts.at_least, verdicts.at_most)
    (data,) = shown
    assert data["text/plain"] == "\n\n".join(
        inspect.getsource(f).rstrip() for f in (verdicts.at_least, verdicts.at_most)
    )
    assert data["text/markdown"] == f"```python\n{data['text/plain']}\n```"


def test_tables_align_and_escape():
    rows = [{"name": "a|b", "loss": 0.123456}, {"name": "longer", "loss": 2.0}]
    assert claims.plain_table(rows) == "name    loss\na|b     0.1235\nlonger  2"
    assert "| a\\|b | 0.1235 |" in claims.markdown_table(rows)


def test_metrics_leave_their_tolerance_only_when_said():
    committed = {"03": {"norm": {"value": 1.0, "tol": 0.1}, "time": {"value": 1.0, "tol": None}}}
    agrees = {"03": {"norm": {"value": 1.05}, "time": {"value": 9.0}}}
    assert claims.differences(committed, agrees) == []
    assert "norm" in claims.differences(committed, {"03": {**agrees["03"], "norm": {"value": 1.2}}})[0]
    assert "norm" in claims.differences(committed, {"03": {**agrees["03"], "norm": {"value": "nan"}}})[0]
    assert len(claims.differences(committed, {})) == 2


def test_a_failed_write_leaves_the_old_file(tmp_path):
    files.write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_scrub_keeps_counts_and_drops_what_changes():
    node = nbformat.v4.new_notebook(metadata={"papermill": {"duration": 3.0}, "widgets": {}})
    outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="leak: True\n"),
        nbformat.v4.new_output("stream", name="stderr", text="50%|####"),
        nbformat.v4.new_output("display_data", data={runner.WIDGET: {}, "text/plain": "Widget()"}),
    ]
    node.cells = [nbformat.v4.new_code_cell("x", execution_count=1, outputs=outputs)]
    cell_id = node.cells[0].id
    node.cells[0].metadata.papermill = {"start_time": "now"}
    kept = runner.scrub(node)
    assert kept.metadata == {} and kept.cells[0].metadata == {} and kept.cells[0].id == cell_id
    assert kept.cells[0].execution_count == 1 and [o.name for o in kept.cells[0].outputs] == ["stdout"]


def test_a_page_shows_warnings_and_players_and_no_bars(tmp_path):
    bar = "stage 2:   0%|   | 0/9\rstage 2: 100%|###| 9/9\r            \r"
    widgets = {
        "closed bar": "HBoxModel",
        "amount": "FloatProgressModel",
        "player": "HBoxModel",
        "slider": "IntSliderModel",
    }
    parts = {"closed bar": ["IPY_MODEL_amount"], "player": ["IPY_MODEL_slider"]}
    state = {
        name: {
            "model_name": kind,
            "model_module": "@jupyter-widgets/controls",
            "state": {"children": parts.get(name, [])},
        }
        for name, kind in widgets.items()
    }
    outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="9 steps"),
        nbformat.v4.new_output("stream", name="stderr", text=bar),
        nbformat.v4.new_output("stream", name="stderr", text=bar + "UserWarning: heed me\n" + bar),
    ]
    for name in parts:
        outputs.append(nbformat.v4.new_output("display_data", data={runner.WIDGET: {"model_id": name}}))
    node = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=outputs)])
    node.metadata.widgets = {"application/vnd.jupyter.widget-state+json": {"state": state}}
    nbformat.write(node, tmp_path / "run.ipynb")
    runner._write_html(tmp_path / "run.ipynb", tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text()
    assert page.count("9 steps") == page.count("UserWarning: heed me") == 1
    assert "stage 2" not in page and '"model_id": "closed bar"' not in page and '"model_id": "player"' in page


def test_a_page_folds_solutions_and_links_pages(tmp_path):
    cells = [nbformat.v4.new_markdown_cell("[next](02_mask_construction.ipynb)")]
    cells += [nbformat.v4.new_code_cell(text) for text in ("question = 1", "answer = 2")]
    cells[2].metadata.tags = ["solution"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "run.ipynb")
    runner._write_html(tmp_path / "run.ipynb", tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text()
    assert 'href="02_mask_construction.html"' in page
    before, folded = page.split("<details><summary>Solution</summary>")
    assert "question" in before and "answer" in folded.split("</details>")[0] and "answer" not in before


def test_only_seeds_are_called_held_out():
    """Every prompt of the grammar is both trained on and scored."""
    assert {*protocol.Trial().prompts} == {*world.prompts()}
    text = claims.quality(claims.read_scores(runner.STORED / "scores"))
    assert "held-out seeds (every prompt is trained on)" in text and "held-out prompts" not in text


def test_stored_report_and_readme_follow_from_the_stored_metrics():
    found = runner.stored()
    assert (runner.STORED / "REPORT.md").read_text() == claims.markdown(found)
    page = (report.ROOT / "docs" / "results.md").read_text()
    assert page == claims.fill_results(page, found)
