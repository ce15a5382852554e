"""Laws of the command line: every option is explained, and every word is checked before any work begins."""

from __future__ import annotations

import ast
import errno
import io
import os
import re
import subprocess
import sys
from dataclasses import MISSING, replace
from pathlib import Path

import nbformat
import pytest
import synthetic
import torch

from omniforcing_lib import __main__ as cli
from omniforcing_lib import backends, files, options, safetensors_io
from omniforcing_lib.bounce import evaluate, world
from series import report, runner
from studies import ablations, protocol

GENERATE = ["generate", "--prompt", "a red ball, bell", "--out", "x.mp4"]
EXPORT_CLIPS = ["export-clips", "--prompts", "prompts.txt", "--out", "clips"]


def described():
    return [(name, *entry) for name, command in cli.COMMANDS.items() for entry in options.options_of(command)]


@pytest.mark.parametrize(
    ("name", "entry", "kind", "many"), described(), ids=lambda x: x if isinstance(x, str) else getattr(x, "name", "")
)
def test_every_option_has_a_line_with_its_unit_and_default(name, entry, kind, many):
    said, optional = options._help(entry, kind), entry.default is not MISSING
    assert said and len(said.split()) >= 1, f"{name} {entry.name} is not explained"
    if optional and entry.name != "parameters":
        assert "default" in said, f"{name} {entry.name} does not tell its default, {entry.default!r}"
    if optional and kind is int and entry.default is not None:
        plain = " ".join(map(str, entry.default if isinstance(entry.default, tuple) else (entry.default,)))
        assert f"(default {plain})" in said and re.search(r"\d to \d|\d or more", said)
    assert entry.name != "seconds" or "in seconds" in said


@pytest.fixture
def idle(monkeypatch, tmp_path):
    """An empty working folder, in a library that may not work: nothing is rendered, read as tensors or trained."""
    (tmp_path / "prompts.txt").write_text("a red ball, bell\n")
    monkeypatch.chdir(tmp_path)

    def work(*_: object, **__: object) -> None:
        pytest.fail("work began")

    for home, name in ((world, "render"), (safetensors_io.Reader, "get"), (ablations, "_Bench"), (runner, "execute")):
        monkeypatch.setattr(home, name, work)


def refused(words: list[str], capfd) -> str:
    """Run a command that must end with code 2 and one line; give the line."""
    before = sorted(Path.cwd().rglob("*"))
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: "), (code, out, err)
    assert sorted(Path.cwd().rglob("*")) == before
    return err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*GENERATE, "--steps", "0"], r"--steps: expected a whole number, 1 to 1000, found 0"),
        ([*GENERATE, "--grid", "0", "4"], r"--grid: expected a whole number, 1 to 1000, found 0"),
        ([*GENERATE, "--horizon", "-1"], r"--horizon: expected a whole number, 0 or more, found -1"),
        ([*GENERATE, "--seconds", "9" * 5000], r"--seconds: expected a whole number, 1 to 86400, found '9999"),
        ([*GENERATE, "--seconds", "601", "--model", "teacher"], r"makes a clip at once, at most 600 s, found 601"),
        ([*GENERATE, "--decoder", "tiny", "x"], r"leave out decoder"),
        ([*GENERATE, "--decoder", "full", "x"], r"a decoder is the word tiny and a TAEHV file, found 'full'"),
        (["convert", "x.pt", "--out", "x.pth"], r"--out is a \.safetensors file, found x\.pth"),
        ([*GENERATE, "--device", "gpu"], r"a device is cpu, cuda \(one of several: cuda:1\) or auto, found 'gpu'"),
        ([*GENERATE, "--device", "mps"], r"a device is cpu, cuda .* found 'mps'"),
        ([*GENERATE, "--device", "cuda:99"], r"device 'cuda:99' asked for, but torch .* sees .*; use 'cpu'"),
        ([*GENERATE, "--attention", "flash"], r"'flash' can't serve cpu, float32, head dim 40: it needs a CUDA device"),
        ([*EXPORT_CLIPS, "--samples", "-1"], r"--samples: expected a whole number, 0 or more, found -1"),
        ([*EXPORT_CLIPS, "--seconds", "many"], r"--seconds: expected a whole number, 1 to 86400, found 'many'"),
        (["score", "--clips", "0"], r"--clips: expected a whole number, 1 or more, found 0"),
        (["score", "--seeds", "0"], r"--seeds: expected a whole number, 1 or more, found 0"),
        (["score", "--steps", "40", "0"], r"--steps: expected a whole number, 1 to 1000, found 0"),
        (["score", "--clips", "1", "--seeds", "1"], r"need 4 clips or more, found 1"),
        (["score", "--clips", "5001"], r"up to 5000 clips, then they are those of the reference; found 5001"),
        (["score", "--models", "student", "student"], r"two columns would be called student"),
        (["score", "--models", "teacher", "--long", "--seconds", "20"], r"teacher is no causal student"),
        (["ablate", "--seeds", "0"], r"--seeds: expected a whole number, 1 or more, found 0"),
        (["export", "student", "--to", "ltx2", "--out", "x.pt"], r"ends in \.safetensors, found x\.pt"),
        (["export", "student", "--to", "diffusers", "--out", "."], r"is there already"),
        (["reproduce", "-p", "device=gpu"], r"a device is cpu, cuda .* found 'gpu'"),
        (["reproduce", "-p", "student=nowhere"], r"parameter student: no checkpoint at nowhere"),
        (["reproduce", "-p", "student=teacher"], r"parameter student: teacher is no causal student"),
        (["reproduce", "-p", "teacher=prompts.txt"], r"parameter teacher: prompts.txt is not a \.safetensors file"),
        (["reproduce", "-p", "prompt=purple"], r"red, green, blue"),
        (["reproduce", "-p", "seconds=-1"], r"parameter seconds is from 0 to"),
        (["compare", str(runner.STORED / "metrics" / "smoke"), "nowhere"], r"nowhere holds no metrics"),
    ],
    ids=lambda words: " ".join(words[-2:])[-40:] if isinstance(words, list) else "",
)
def test_a_bad_word_ends_the_command_before_any_work(idle, capfd, words, says):
    assert re.search(says, refused(words, capfd))


def test_clips_of_another_protocol_are_found_before_the_model_is_loaded(idle, capfd):
    Path("clips").mkdir()
    Path("clips/manifest.json").write_text("{}")
    assert cli.main(EXPORT_CLIPS) == 2 and "another protocol" in capfd.readouterr().err
    assert [path.name for path in Path("clips").iterdir()] == ["manifest.json"]


def test_a_model_of_another_world_is_not_scored(idle, capfd):
    config = replace(synthetic.CONFIGS["2.0"], num_layers=1, in_channels=24, out_channels=24)
    synthetic.ltx2_file(Path("x.safetensors"), config=config)
    said = refused(["score", "--models", "student", "x.safetensors"], capfd)
    assert re.search(r"x\.safetensors makes latents of 24 channels, the world's have \d+", said)


WRITERS = {
    "render": (["render", "--seconds", "1"], "x.mp4"),
    "generate": (GENERATE[:3], "x.mp4"),
    "export-clips": (EXPORT_CLIPS[:3], "clips"),
    "score": (["score"], "scores"),
    "ablate": (["ablate"], "runs"),
    "export": (["export", "student", "--to", "ltx2"], "x.safetensors"),
    "export to diffusers": (["export", "student", "--to", "diffusers"], "student"),
    "reproduce": (["reproduce"], "run"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_cannot_be_written_is_noticed_before_any_work(idle, capfd, monkeypatch, name):
    words, out = WRITERS[name]

    def mkdir(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(files.Path, "mkdir", mkdir)
    said = refused([*words, "--out", out], capfd)
    assert re.search(rf"{out} cannot be written: .*\(Read-only file system\); name another place", said)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_in_place_of_a_folder_and_the_reverse_are_noticed_before_any_work(idle, capfd, name):
    words, out = WRITERS[name]
    if out.endswith((".mp4", ".safetensors")):
        Path(out).mkdir()
    else:
        Path(out).write_text("")
    assert re.search("is a folder|is a file|is there already", refused([*words, "--out", out], capfd))


def test_what_was_checked_is_as_it_was(tmp_path):
    files.check_file(tmp_path / "new" / "folder" / "x.mp4")
    files.check_folder(tmp_path / "new")
    files.check_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_home_is_expanded_wherever_a_path_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.safetensors").symlink_to(files.DATA / "student.safetensors")
    assert cli.main(["render", "--seconds", "1", "--out", "~/real.mp4"]) == 0 and (tmp_path / "real.mp4").is_file()
    assert cli.main(["inspect", "~/s.safetensors"]) == 0 and "causal student" in capsys.readouterr().out
    assert runner._given(["student=~/s.safetensors"], "smoke") == {"student": str(tmp_path / "s.safetensors")}
    assert report.begin("x", out_dir="~/run").folder == tmp_path / "run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real.mp4", "s.safetensors"]


def test_a_sign_that_the_terminal_lacks_does_not_fail_a_finished_run(monkeypatch, tmp_path):
    """A dash for what nothing was measured of is not in Latin-1; the table is printed with a `?` in its place."""
    table = evaluate.Table({"a": {"x": evaluate.Estimate(1, 1, 1)}, "b": {}})
    monkeypatch.setattr(protocol, "run", lambda *_: table)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1", errors="strict"))
    assert "–" in str(table) and cli.main(["score", "--out", str(tmp_path)]) == 0
    sys.stdout.flush()
    assert raw.getvalue().decode("latin-1") == f"{table}\n".replace("–", "?")


def test_text_files_are_utf8_whatever_a_machine_prefers():
    library = Path(cli.__file__).parent
    sources = {path.name: path.read_text(encoding="utf-8") for path in library.rglob("*.py")}
    assert not [name for name, source in sources.items() if ".read_text()" in source or '.open("a")' in source]


def test_auto_takes_what_is_there():
    there = torch.cuda.is_available()
    assert backends.device("auto") == torch.device("cuda" if there else "cpu")
    assert backends.device("cpu").type == "cpu" and report.begin("x", device="cpu").device == "cpu"
    with pytest.raises(ValueError, match="a device is cpu, cuda"):
        report.begin("x", device="gpu")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    run = subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run


def test_waiting_threads_sleep_wherever_the_package_is_imported_before_torch():
    found = python("import omniforcing_lib, torch", OMP_DISPLAY_ENV="VERBOSE").stderr
    if "GOMP_SPINCOUNT" not in found:
        pytest.skip("this OpenMP does not say how often it spins")
    assert "GOMP_SPINCOUNT = '0'" in found


@pytest.mark.parametrize(
    ("before", "says"), [("json", "waiting threads sleep"), ("torch", "too late for this process")]
)
def test_a_log_line_says_how_threads_wait(before, says):
    code = f"import logging, sys; logging.basicConfig(level=20); sys.modules[{before!r}] = sys; import omniforcing_lib"
    assert f"OMP_WAIT_POLICY=PASSIVE: {says}" in python(code).stderr


def test_a_policy_that_somebody_set_is_kept():
    code = "import os, omniforcing_lib; print(os.environ['OMP_WAIT_POLICY'])"
    assert python(code, OMP_WAIT_POLICY="ACTIVE").stdout == "ACTIVE\n" and python(code).stdout == "PASSIVE\n"


@pytest.mark.parametrize("path", sorted(runner.NOTEBOOKS.glob("[0-9]*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_import_the_package_before_torch(path):
    """Bare papermill and a plain JupyterLab then wait as `make` does."""
    code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or node.names[0].name for node in sorted(imports, key=lambda n: n.lineno)]
    before = names[: next(i for i, name in enumerate(names) if name.startswith("omniforcing_lib"))]
    assert not {name.partition(".")[0] for name in before} - {"numpy", *sys.stdlib_module_names}
