"""The stored notebooks: fit to be compared, readable without a kernel, without logic of their own."""

import ast
import re
import shutil
import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path

import nbformat
import pytest

from series import origins, report, runner

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
SANITIZE = FOLDER / "sanitize.cfg"
SERIES = (
    "01_teacher_loading",
    "02_mask_construction",
    "03_sink_token_stability",
    "04_self_forcing_distillation",
    "05_realtime_benchmark",
)
FIRST_PAGE = "00_start_here"
QUICKEST = "02_mask_construction"
COMMON = {"profile": "smoke", "seed": 0, "device": "cpu", "teacher": "", "out_dir": ""}
CHECKED = "nbval-check-output"

each_notebook = pytest.mark.parametrize("name", (FIRST_PAGE, *SERIES))
each_lesson = pytest.mark.parametrize("name", SERIES)


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(name):
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def stored_text(cell):
    """Everything a reader sees of a cell's outputs, pictures and players left out."""
    words = []
    for output in cell.outputs:
        data = output.get("data", {})
        words += [output.get("text", ""), *(data[kind] for kind in ("text/plain", "text/markdown") if kind in data)]
    return "".join("".join(word) for word in words)


def test_the_series_is_these_five():
    """And a first page, which runs with them."""
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == [path.stem for path in runner.select()]
    assert [path.stem for path in runner.select()] == [FIRST_PAGE, *SERIES]


@each_notebook
def test_parameters_come_first_and_are_literals(name):
    first, *rest = code_cells(name)
    assert tags(first).count("parameters") == 1 and not any("parameters" in tags(cell) for cell in rest)
    values = {}
    for statement in ast.parse(first.source).body:
        assert isinstance(statement, ast.AnnAssign), f"{name}: `{ast.unparse(statement)}` has no type"
        values[statement.target.id] = ast.literal_eval(statement.value)
    assert COMMON.items() <= values.items() and len(values) <= len(COMMON) + 3
    assert all("#" in line for line in first.source.splitlines() if "=" in line)


@each_notebook
def test_set_up_and_finish_are_the_same_two_calls_everywhere(name):
    cells = code_cells(name)
    arguments = ", ".join(f"{word}={word}" for word in COMMON)
    begin = f'report.begin("{name}", {arguments}'
    assert begin in re.sub(r"\(\s+", "(", re.sub(r",\s+", ", ", cells[1].source))
    later = [node for cell in cells[2:] for node in ast.walk(ast.parse(cell.source))]
    assert not [node for node in later if isinstance(node, ast.Import | ast.ImportFrom)]
    assert cells[-1].source.splitlines()[-1] == "run.finish()"


@each_notebook
def test_counts_run_from_one_and_ids_are_unique(name):
    node = read(name)
    cells = code_cells(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len({cell.id for cell in node.cells}) == len(node.cells)
    assert node.metadata.kernelspec.name == "python3"


@each_notebook
def test_at_least_three_cells_are_compared_and_hold_outputs(name):
    checked = [cell for cell in code_cells(name) if CHECKED in tags(cell)]
    assert len(checked) >= 3
    assert all(re.search(r": True\b", stored_text(cell)) for cell in checked)
    assert not [cell.source for cell in code_cells(name) if "nbval-skip" in tags(cell)]


@each_notebook
def test_outputs_hold_no_error_no_bar_and_no_path(name):
    for cell in code_cells(name):
        assert not [o for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
        assert not re.search(r"it/s|\|█|<\S+ object at 0x|/home/|/tmp/", stored_text(cell)), cell.source
        assert str(ROOT) not in stored_text(cell) and str(Path.home()) + "/" not in stored_text(cell)


@each_notebook
def test_stored_form_is_what_refresh_writes(name):
    stored = (FOLDER / f"{name}.ipynb").read_text()
    assert nbformat.writes(runner.scrub(read(name))).rstrip("\n") + "\n" == stored


@each_notebook
def test_code_argues_and_the_library_computes(name):
    tree = ast.parse("\n".join(cell.source for cell in code_cells(name)))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.Try | ast.While)]
    assert len(functions) <= 1 and all(node.end_lineno - node.lineno < 8 for node in functions)
    assert not re.search(r"sys\.path|subprocess|\bopen\(|^\s*[!%]", ast.unparse(tree), re.MULTILINE)
    assert len(tree.body) >= 10


@each_notebook
def test_cells_that_not_every_checkpoint_can_run_say_so_in_plain_python(name):
    """What they ask of the components is what `Run.introduce` explains."""
    for cell in code_cells(name)[2:]:
        tests = [node.test for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.If)]
        asked = {test.attr for test in tests if isinstance(test, ast.Attribute) and test.value.id == "components"}
        assert asked <= set(report.LEFT_OUT)


@each_notebook
def test_prose_goes_before_code(name):
    """Formulas, exercises and references are not prose that is read from one end to the other."""
    cells = read(name).cells
    aside = {"exercise", "references"}
    prose = [cell.source for cell in cells if cell.cell_type == "markdown" and not aside & {*tags(cell)}]
    words = sum(len(re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL).split()) for text in prose)
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    assert 300 <= words <= 1500


@each_lesson
def test_a_lesson_has_formulas_the_librarys_own_lines_and_references(name):
    *_, last = cells = read(name).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert len(re.findall(r"\$\$.*?\$\$", text, re.DOTALL)) >= 2
    assert sum("run.source(" in cell.source for cell in cells) >= 2
    assert "references" in tags(last) and len(re.findall(r"\]\(https://(arxiv|doi)\.org/", last.source)) >= 3
    assert "2603.11647" in last.source and re.search(r"\bpaper\b.{0,40}Sec\. 3\.\d", text)


@each_lesson
def test_three_exercises_ask_first_and_fold_their_answers(name):
    cells = read(name).cells
    asked = [i for i, cell in enumerate(cells) if cell.source.startswith("**Exercise ")]
    assert len(asked) == 3
    for question, solution in ((cells[i], cells[i + 1]) for i in asked):
        assert "?" in question.source and "exercise" in tags(question)
        assert {"solution", "hide-cell", CHECKED} <= {*tags(solution)}
        assert solution.metadata.jupyter == {"outputs_hidden": True, "source_hidden": True}
        assert "run.check(" in solution.source


@each_notebook
def test_links_between_notebooks_lead_somewhere(name):
    text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?!https:)([^)#]+)\)", text)
    assert links and not [link for link in links if not (FOLDER / link).exists()]


@each_notebook
def test_every_picture_is_told_in_words(name):
    outputs = [output.get("data", {}) for cell in code_cells(name) for output in cell.outputs]
    assert not [data for data in outputs if {"image/png", "image/jpeg", "image/svg+xml"} & data.keys()]
    pictures = re.findall(r"<img [^>]*>", "".join("".join(data.get("text/html", "")) for data in outputs))
    assert pictures and all(len(re.search(r'alt="([^"]*)"', picture)[1].split()) >= 4 for picture in pictures)


def test_no_four_lines_are_the_same_in_two_notebooks():
    runs = {}
    for name in SERIES:
        lines = "\n".join(cell.source for cell in code_cells(name)[2:]).splitlines()
        lines = [line.strip() for line in lines if len(line.strip()) > 3]
        runs[name] = {tuple(lines[i : i + 4]) for i in range(len(lines) - 3)}
    assert not [(a, b, runs[a] & runs[b]) for a, b in combinations(SERIES, 2) if runs[a] & runs[b]]


def test_notebooks_stay_small_enough_to_review():
    sizes = {path.stem: path.stat().st_size for path in runner.select()}
    assert max(sizes.values()) <= 400_000 and sum(sizes.values()) <= 1_500_000, sizes


def test_every_sanitize_rule_is_whole_and_alive():
    lines = [line for line in SANITIZE.read_text().splitlines() if not line.startswith("#")]
    rules = [line.removeprefix("regex: ") for line in lines if line.startswith("regex:")]
    # nbval ignores a rule in silence when its two lines are not adjacent.
    assert all(after.startswith("replace:") for line, after in pairwise(lines) if "regex:" in line)
    text = "".join(stored_text(cell) for name in SERIES for cell in code_cells(name))
    assert rules and not [rule for rule in rules if not re.search(rule, text)]


@pytest.mark.slow
def test_an_edited_stored_output_fails_the_comparison(tmp_path):
    """The head of a notebook of the series, as stored and with one word of a checked output changed."""
    node = read(QUICKEST)
    end = next(i for i, cell in enumerate(node.cells) if CHECKED in tags(cell))
    node.cells = node.cells[: end + 1]
    nbformat.write(node, tmp_path / "as_stored.ipynb")
    output = next(output for output in node.cells[end].outputs if output.get("name") == "stdout")
    output.text = output.text.replace(": True", ": Maybe", 1)
    nbformat.write(node, tmp_path / "edited.ipynb")
    shutil.copy(ROOT / "conftest.py", tmp_path)
    words = ["--nbval-lax", "--nbval-current-env", "--nbval-sanitize-with", str(SANITIZE)]
    words += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-rf"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *words, "as_stored.ipynb", "edited.ipynb"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    failed = re.findall(r"^FAILED (\S+?)::", run.stdout, re.MULTILINE)
    assert run.returncode == 1 and failed == ["edited.ipynb"], run.stdout[-2000:]


def test_the_hash_of_a_notebook_is_of_its_sources(tmp_path):
    node = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x = 1")])
    nbformat.write(node, tmp_path / "a.ipynb")
    before = origins.source_sha256(tmp_path / "a.ipynb")
    node.cells[0].execution_count = 3
    nbformat.write(node, tmp_path / "a.ipynb")
    assert origins.source_sha256(tmp_path / "a.ipynb") == before
    node.cells[0].source = "x = 2"
    nbformat.write(node, tmp_path / "a.ipynb")
    assert origins.source_sha256(tmp_path / "a.ipynb") != before
