"""The frame: one environment said in three files, light imports, a command line that answers in one line."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement

from omniforcing_lib.__main__ import main
from omniforcing_lib.bounce import codecs
from series import profiles

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
INSTALLED = [*PROJECT["dependencies"], *EXTRAS["ltx2"], *EXTRAS["dev"], *EXTRAS["book"]]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)
LIBRARY = ROOT / "omniforcing_lib"
ROOMS = sorted(".".join(path.relative_to(LIBRARY).with_suffix("").parts) for path in LIBRARY.rglob("[a-z]*.py"))
NOTEBOOKS = ROOT / "notebooks"
SOURCES = {".".join(("omniforcing_lib", *room.split("."))): LIBRARY / f"{room.replace('.', '/')}.py" for room in ROOMS}
SOURCES |= {f"{path.parent.name}.{path.stem}": path for path in NOTEBOOKS.glob("s*/[a-z]*.py")}
# What puts the parts together: these alone know the method, both adapters and the world.
RECIPES = tuple(f"omniforcing_lib.training.{name}" for name in ("train_config", "data_recipes", "recipes"))
COMPOSED = ("omniforcing_lib.__main__", "omniforcing_lib.model_bundle", *RECIPES)
METHOD = ("omniforcing_lib", "omniforcing_lib.training")
ALLOWED = {
    **dict.fromkeys(METHOD, METHOD),
    "omniforcing_lib.ltx2": METHOD,
    "omniforcing_lib.bounce": METHOD,
    "studies": (*METHOD, "omniforcing_lib.ltx2", "omniforcing_lib.bounce"),
    "series": (*METHOD, "omniforcing_lib.ltx2", "omniforcing_lib.bounce", "studies"),
}


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_conda_environment_repeats_pyproject():
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    from_pip = next(entry["pip"] for entry in entries if isinstance(entry, dict))
    assert f"python{PROJECT['requires-python']}" in entries
    assert from_pip == ["-c constraints.txt", *INSTALLED, "-e ."]


def test_every_direct_dependency_is_pinned_within_its_range():
    pins = {canonical(name): version for name, version in PINS.items()}
    assert pins["torch"] == "2.13.0"
    for requirement in map(Requirement, INSTALLED):
        assert requirement.specifier.contains(pins[canonical(requirement.name)]), requirement


def test_flash_attention_is_never_selected_by_default():
    (flash,) = map(Requirement, EXTRAS["flash"])
    assert flash.name == "flash-attn" and "linux" in str(flash.marker)
    assert not any("flash" in word for word in [*INSTALLED, *PINS])
    assert "flash" not in re.search(r"\.\[(.*?)\]", (ROOT / "Makefile").read_text())[1]


def test_no_file_names_this_machine_or_a_package_host():
    homes = {str(ROOT), str(Path.home()) + "/", "file:" + "//", "://pypi" + ".", "extra-" + "index-url"}
    folders = [ROOT, *(ROOT / name for name in ("tests", "notebooks", ".ci", "reports"))]
    files = [path for folder in folders for path in folder.glob("*") if path.is_file()] + [*LIBRARY.rglob("*.*")]
    for path in [*files, *(ROOT / "reports" / "metrics").rglob("*.json")]:
        text = path.read_bytes().decode("utf-8", "ignore")
        assert not [word for word in homes if word in text], path


def test_import_is_quick_and_loads_no_torch():
    seconds, loaded = python(
        "import sys, time; start = time.perf_counter(); import omniforcing_lib;"
        "print(time.perf_counter() - start, 'torch' in sys.modules)"
    ).split()
    assert float(seconds) < 0.2 and loaded == "False"


@pytest.fixture(scope="module")
def imported() -> list[str]:
    """Import every room without the optional packages, then once more without what Windows lacks; give what is said."""
    blocked = ("triton", "flash_attn", "diffusers", "transformers", "accelerate")
    lacks = {
        "os": "chown fork getuid geteuid killpg mkfifo sched_getaffinity setsid statvfs sysconf uname",
        "signal": "SIGALRM SIGCHLD SIGHUP SIGKILL SIGUSR1 alarm pause setitimer",
    }
    modules = "fcntl grp posix pty pwd resource syslog termios tty".split()
    code = f"""
import os, signal, sys
sys.modules.update(dict.fromkeys({blocked}))
from importlib import import_module
for room in {sorted(SOURCES)}: import_module(room)
import torch
print(torch.cuda.is_initialized())
for name in list(sys.modules):
    if name.partition(".")[0] in ("omniforcing_lib", "series", "studies"): del sys.modules[name]
sys.modules.update(dict.fromkeys({modules}))
for place, names in {lacks}.items():
    for name in names.split(): delattr(sys.modules[place], name)
try:
    for room in {sorted(SOURCES)}: import_module(room)
    print("all")
except Exception as error:
    print(room, repr(error))"""
    return python(code).splitlines()


def test_every_room_imports_without_the_optional_packages(imported):
    assert len(ROOMS) >= 10 and imported[0] == "False"


def test_no_room_needs_a_posix_system_to_be_imported(imported):
    assert imported[1:] == ["all"]


def test_global_seeds_are_set_in_one_place():
    seeding = re.compile(r"(torch\.manual_seed|torch\.cuda\.manual_seed|np\.random\.seed)\(")
    assert [room for room, path in SOURCES.items() if seeding.search(path.read_text())] == ["series.report"]


def test_folders_import_only_what_they_are_built_on():
    """The method needs no adapter and no world; the library needs no notebook. Nested imports count too."""
    for room, path in SOURCES.items():
        own = room.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] not in (
                "omniforcing_lib",
                "studies",
                "series",
            ):
                continue
            for asked in (f"{node.module}.{alias.name}" for alias in node.names):
                module = asked if asked in SOURCES else node.module
                if room not in COMPOSED and module != "omniforcing_lib":
                    assert module.rpartition(".")[0] in (own, *ALLOWED[own]), f"{room} imports {module}"
                    assert module not in COMPOSED or own in ("studies", "series"), f"{room} imports {module}"
                if room.startswith("omniforcing_lib") and room != "omniforcing_lib.__main__":
                    assert module.startswith("omniforcing_lib"), f"{room} imports {module}"


def test_profile_errors_list_what_there_is():
    with pytest.raises(ValueError, match="unknown profile 'profle'; choose one of smoke, cpu, full, gpu, tiny"):
        profiles.from_name("profle")
    with pytest.raises(ValueError, match="profile 'smoke' has no field clip; it has name, "):
        profiles.from_name("smoke").override({"clip": 3})
    assert profiles.from_name("smoke").override({"clips": 3, "seconds": None}).clips == 3


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("render --seed 1 --seconds 0 --out x.mp4", "--seconds"),
        ("render --seed 1 --seconds 1.5 --out x.mp4", "--seconds"),
        ("render --seed -1 --out x.mp4", "--seed"),
        ("render --seed 1 --out x.gif", ".mp4"),
        ("render --seed 1 --out nowhere/x.mp4", "no such folder"),
        ("render --seed 1 --out x.mp4 --prompt purple", "red, green, blue"),
        ("generate --out x.mp4 --prompt purple", "red, green, blue"),
        ("generate --out x.mp4 --model nowhere.safetensors --prompt a_red_ball,_bell", "nowhere.safetensors"),
        ("inspect nowhere.safetensors", "nowhere.safetensors"),
        ("generate --out x.mp4 --model= --prompt a_red_ball,_bell", "empty name"),
        ("generate --out x.mp4 --gemma nowhere --prompt a_red_ball,_bell", "leave out gemma"),
        ("generate --out= --prompt a_red_ball,_bell", "--out is empty"),
        ("score --models student --out=", "--out is empty"),
        ("score --models student --unprompted --out scores", "name a teacher"),
        ("reproduce --profile profle", "smoke, cpu, full, gpu, tiny"),
        ("compare nowhere nowhere", "nowhere"),
        ("train stage9", "stage3"),
        ("", "command"),
    ],
)
def test_bad_input_ends_in_one_line_and_code_2(line, says, capfd):
    words = [word.replace("_", " ") if word.startswith("a_") else word for word in line.split()]
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_generate_writes_each_block_before_the_one_after_the_next_is_made(tmp_path, monkeypatch):
    """The file is that of the whole clip; where a block fails, nothing is left of it."""
    from omniforcing_lib import media, stream
    from omniforcing_lib.bounce import text
    from omniforcing_lib.ltx2 import checkpoints

    make, write, seen = stream.Streamer._make, media.ClipWriter.write, []
    monkeypatch.setattr(stream.Streamer, "_make", lambda self: (make(self), seen.append("made"))[0])
    monkeypatch.setattr(media.ClipWriter, "write", lambda self, piece: (seen.append("written"), write(self, piece))[0])
    given = ["generate", "--prompt", "a red ball, bell", "--seconds", "2", "--seed", "5", "--out"]
    assert main([*given, str(tmp_path / "clip.mp4")]) == 0
    assert all(seen[:k].count("made") - seen[:k].count("written") <= 2 for k in range(len(seen)))
    assert seen.count("made") == seen.count("written") == 3
    parts = checkpoints.load("student"), checkpoints.read("student").causal, codecs.shipped_codec(), text.TinyText()
    whole = stream.make_clip(*parts, "a red ball, bell", 2, 5)
    expected = media.read_clip(media.write_clip(tmp_path / "whole.mp4", whole))
    for a, b in zip(media.read_clip(tmp_path / "clip.mp4"), expected, strict=True):
        assert np.array_equal(a, b)

    def fails(self):
        return 1 / 0 if self._made == 2 else make(self)

    monkeypatch.setattr(stream.Streamer, "_make", fails)
    (tmp_path / "other").mkdir()
    with pytest.raises(ZeroDivisionError):
        main([*given, str(tmp_path / "other" / "clip.mp4")])
    assert not list((tmp_path / "other").iterdir())


def test_the_installed_package_generates_from_any_folder(tmp_path):
    """A wheel is built, installed beside the other packages and used elsewhere; nothing comes from the clone."""
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("omniforcing_lib", "data", "notebooks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = "-m pip install -q --disable-pip-version-check --no-deps --no-build-isolation --no-index --target".split()
    subprocess.run([sys.executable, *pip, site, source], check=True, timeout=300)
    shutil.rmtree(source)
    code = """
from importlib.metadata import entry_points
from omniforcing_lib import files
from series import profiles
(command,) = entry_points(group="console_scripts", name="omniforcing")
print(files.DATA, profiles.__file__)
command.load()(["generate", "--prompt", "a red ball, bell", "--seconds", "1", "--out", "clip.mp4"])"""
    (elsewhere := tmp_path / "elsewhere").mkdir()
    env = {**os.environ, "PYTHONPATH": str(site)}
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=env, text=True, stdout=subprocess.PIPE, check=True, timeout=300
    ).stdout
    assert told.split()[:2] == [str(site / "omniforcing_data"), str(site / "series" / "profiles.py")]
    assert [path.name for path in elsewhere.iterdir()] == ["clip.mp4"]


def test_render_writes_a_clip_of_the_world(tmp_path, capsys):
    from omniforcing_lib import media

    assert main(["render", "--seed", "3", "--seconds", "1", "--out", str(tmp_path / "real.mp4")]) == 0
    clip = media.read_clip(tmp_path / "real.mp4")
    assert clip.video.shape == (25, 64, 64, 3) and clip.audio.shape == (16_160,)
    assert capsys.readouterr().out.strip() == str(tmp_path / "real.mp4")
