"""`bench` and its results: every phase runs small, a crash costs one phase, what was measured stands on the pages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omniforcing_lib import graphs, rope, stream
from omniforcing_lib.__main__ import main
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.layout import AV
from omniforcing_lib.masks import block_mask
from omniforcing_lib.stream import Chunk
from series import claims, gpu_results
from studies import bench, dry_run, gpu_bench, gpu_phases

ROOT = Path(__file__).parents[1]
SMALL = gpu_phases.SIZES["miniature"]
SMALL = SMALL._replace(config=replace(SMALL.config, num_layers=1, in_channels=16, out_channels=16))
BARE = """
import sys

class Without:
    names = set("av diffusers transformers accelerate nbformat nbconvert nbclient papermill ipywidgets IPython".split())
    names |= set("anywidget ipykernel matplotlib PIL hypothesis yaml triton".split())

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.names else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


@pytest.fixture
def bare(tmp_path):
    """Run Python where PyTorch, safetensors, numpy, einops, scipy, tqdm and pytest are all, also in its children."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BARE)
    paths = [str(tmp_path / "site"), str(ROOT), str(ROOT / "notebooks")]
    more = {"PYTHONPATH": os.pathsep.join(paths), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def run(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | more, timeout=900)

    return run


@pytest.mark.parametrize("phase", gpu_phases.PHASES)
def test_every_phase_runs_on_a_small_model(phase):
    """On a CPU, without a failure; numbers are finite, and what cannot be tried says what it needs."""
    told = {}
    assert gpu_phases.run(phase, SMALL, lambda name, value, unit="": told.update({name: value})) == 0, told
    assert told and not [name for name in told if "FAILED" in name]
    numbers = [value for value in told.values() if isinstance(value, float)]
    assert all(0 <= value < float("inf") for value in numbers)
    assert numbers or phase == "decoders"


def test_a_phase_that_dies_costs_itself_alone(tmp_path, monkeypatch):
    """Figures told before the end are kept, the next phase runs, and one that finds no time says so."""
    monkeypatch.setattr(gpu_phases.Size, "__reduce__", lambda self: (_Dying, ()), raising=False)
    died = gpu_bench.in_process("environment", SMALL, 100)
    assert [figure["name"] for figure in died] == ["exit", "took"] and died[0]["value"] == 7
    monkeypatch.undo()
    ended = gpu_bench.in_process("stream", gpu_phases.SIZES["bench"], 0.5)
    assert ended[-2]["value"] == "ended after 0 s"
    path = gpu_bench.run("miniature", "cpu", ["environment"], budget=1, out=tmp_path)
    assert [f["value"] for f in json.loads(path.read_text())["figures"]] == ["skipped: no time left"]


class _Dying:
    """End the process that unpickles it."""

    def __init__(self) -> None:
        os._exit(7)


def test_one_run_adds_to_another_of_the_same_commit(tmp_path):
    record = {"card": "a", "device": "cuda", "size": "19b", "commit": "1", "dirty": False}
    path, figures = tmp_path / "a.json", [{"phase": "stream", "name": "x", "value": 1, "unit": ""}]
    path.write_text(json.dumps(record | {"figures": figures}))
    assert gpu_bench.kept(path, record) == figures
    assert gpu_bench.kept(path, record | {"commit": "2"}) == gpu_bench.kept(tmp_path / "b.json", record) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [("--size 19b --device cpu", "--size bench"), ("--size bench --device cpu --phases speed", "speed")],
)
def test_what_cannot_be_measured_is_refused_in_one_line(words, says, capsys):
    assert main(["bench", *words.split()]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_runs_all_phases_on_a_cpu(tmp_path, capsys):
    """The whole dry run, as docs/gpu.md has it for a GPU."""
    assert main(["bench", "--size", "bench", "--device", "cpu", "--budget", "3000", "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "cpu.json").read_text())["figures"]
    assert {f["phase"]: f["value"] for f in figures if f["name"] == "exit"} == dict.fromkeys(gpu_phases.PHASES, 0)
    assert capsys.readouterr().out.count("took: ") == len(gpu_phases.PHASES)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_stream_is_the_same_on_every_device_and_from_graphs(device):
    """Against fp64 on the CPU; a recorded stream gives the bits of the plain one, and its graphs are replayed."""
    errors, made = gpu_phases.stream_errors(device, 9 if device == "cuda" else 7)
    limits = {"float32, against fp64": 1e-4, "bfloat16, against fp64": 0.05, "captured against eager": 1e-6}
    for part, limit in limits.items():
        assert all(value <= limit for name, value in errors.items() if part in name), errors
    assert len(errors) == 4 and len(made) == 4
    for name, count in made.items():
        assert (count > 3 if "replay" in name else count) if device == "cuda" else count == 0, made


@pytest.mark.parametrize("device", DEVICES)
def test_masks_give_one_output_and_one_gradient_however_they_are_rendered(device):
    errors = gpu_phases.masked_errors(device)
    assert len(errors) == (4 if device == "cuda" else 2)
    assert all(value < (1e-4 if "float32" in name else 0.05) for name, value in errors.items()), errors


def test_sound_and_sinks_fill_one_tile_up_to_two_sinks():
    """The paper's NaNs begin at two sinks and fewer; 126 latents and four sinks are the first that take two tiles."""
    counts = {sinks: gpu_phases.tiles(sinks) for sinks in gpu_phases.SINKS}
    assert counts == {0: 1, 1: 1, 2: 1, 4: 2, 8: 2, 16: 2, 24: 2}
    for sinks, count in counts.items():
        masks = {rows: gpu_phases.sound_mask(sinks, rows) for rows in gpu_phases.ROWS}
        exact = masks.pop("exact")
        assert (exact.rows, exact.columns) == (126 + sinks, 126 + sinks)
        for rows, mask in masks.items():
            assert mask.rows == mask.columns == gpu_phases.TILE * count
            assert torch.equal(mask.dense[: exact.rows, : exact.rows], exact.dense)
            assert not mask.dense[:, exact.columns :].any()
            assert mask.dense[exact.rows :, : exact.columns].all() == (rows == "padding sees all" or sinks == 2)
            blocks = block_mask(mask)
            assert blocks.kv_num_blocks.shape[-1] == count and blocks.to_dense().shape[-1] == count


@pytest.mark.parametrize("rows", gpu_phases.ROWS)
@pytest.mark.parametrize("sinks", [2, 4])
def test_flex_attention_is_sdpa_in_fp64_on_a_cpu(rows, sinks):
    found = gpu_phases.compare_flex(SMALL, sinks, rows, torch.float32, 2)
    assert found["forward"].error < 1e-6 and found["forward"].finite and set(found) == {"forward"}


def test_a_fault_in_the_mask_would_be_seen(monkeypatch):
    plain = gpu_phases.scaled_dot_product_attention
    monkeypatch.setattr(gpu_phases, "attend", lambda q, k, v, visibility: plain(q, k, v))
    assert gpu_phases.compare_flex(SMALL, 4, "exact", torch.float32, 2)["forward"].error > 0.01


def test_first_frame_and_first_second_are_told_apart():
    """A decoder that looks three latents ahead shows one frame after block 1, and a second after block 2."""
    chunks = [Chunk(bench.np.zeros((n, 1, 1, 3), bench.np.uint8), bench.np.zeros(0), 0.0, "") for n in (0, 1, 24, 24)]
    seen = bench.Watched(chunks, [1.0, 2.0, 4.0, 8.0], [], [])
    assert seen.seconds_to(1) == 3 and seen.seconds_to(24) == 7 and seen.seconds_to(26) == 15


def test_a_model_on_a_gpu_is_captured_unless_its_blocks_are_in_main_memory():
    class Elsewhere(torch.nn.Module):
        def __init__(self, *devices: str) -> None:
            super().__init__()
            self.devices = devices

        def parameters(self):
            return [torch.empty(0, device="meta") if d == "meta" else _On(d) for d in self.devices]

    whole, offloaded, plain = Elsewhere("cuda", "cuda"), Elsewhere("cuda", "cpu"), Elsewhere("cpu")
    assert isinstance(stream.captured(whole), graphs.Captured)
    assert stream.captured(offloaded) is offloaded and stream.captured(plain) is plain
    again = graphs.Captured(whole)
    again.devices = ("cuda",)
    assert stream.captured(again) is again


class _On:
    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


def test_weights_are_drawn_where_they_stay():
    """On the meta device nothing is allocated, so nothing was drawn on the host; in fp8 the blocks take a byte each."""
    model = bench.random_model(SMALL.config, 16, 0, dtype=torch.bfloat16, fp8=True)
    blocks = model.transformer_blocks
    assert blocks[0].ff.net[0].proj.weight.dtype == torch.float8_e4m3fn and blocks[0].attn1.q_norm.weight.eq(1).all()
    wide = blocks[0].ff.net[0].proj
    assert (wide.weight.float() * wide.weight_scale).std() == pytest.approx(wide.weight.shape[1] ** -0.5, rel=0.1)
    text = bench.random_text(model, 1024)
    assert text.map(lambda t: t.shape[1]) == AV(1024, 1024)


MADE_UP = {
    "card": "Imaginary 1000",
    "device": "cuda",
    "size": "19b",
    "commit": "0123456789",
    "dirty": False,
    "figures": [
        {"phase": "whole", "name": "4 passes, horizon 3: frames a second", "value": 55.5, "unit": ""},
        {"phase": "whole", "name": "4 passes, horizon 3: first frame", "value": 0.31, "unit": "s"},
        {"phase": "whole", "name": "4 passes, horizon 3: first second", "value": 0.72, "unit": "s"},
        {"phase": "flex", "name": "2 sinks, exact, bfloat16: gradients, error", "value": None, "unit": "relative"},
        {"phase": "flex", "name": "2 sinks, exact, bfloat16: gradients, finite", "value": False, "unit": ""},
        {"phase": "flex", "name": "4 sinks, exact, float32: forward, error", "value": 1e-6, "unit": "relative"},
        {"phase": "flex", "name": "4 sinks, exact, float32: forward, finite", "value": True, "unit": ""},
    ],
}


def test_a_measured_card_stands_on_the_page_and_in_claims_5_and_6(tmp_path):
    """A made-up file, which is never committed; a dry run on a CPU is no measurement."""
    (tmp_path / "imaginary.json").write_text(json.dumps(MADE_UP))
    (tmp_path / "cpu.json").write_text(json.dumps(MADE_UP | {"device": "cpu"}))
    page = gpu_results.fill(f"a\n{gpu_results.MARKS[0]}\nold\n{gpu_results.MARKS[1]}\nb", tmp_path)
    assert page.count("Imaginary 1000") == 1 and "commit 0123456" in page and "old" not in page
    assert "| 4 passes, horizon 3 | 55.5 | 0.31 | 0.72 |" in page and page.startswith("a\n") and page.endswith("\nb")
    rows = {row["sinks"]: row for row in gpu_results.flex_rows(tmp_path)}
    assert rows["2"]["gradients, error, bfloat16"] == "not finite" and rows["2"]["gradients, finite"] == "no"
    assert rows["4"]["forward, finite"] == "yes" and rows["16"]["forward, finite"] == gpu_results.NEEDS
    metrics = {"05": {f"claim 0{n}": {"metrics": [], "note": "", "status": "partly"} for n in (5, 6)}}
    told = {row["#"]: row["ours"] for row in claims.claim_rows(metrics, gpu=gpu_results.answers(tmp_path))}
    assert "55.5 frames a second" in told["5"] and "first frame 0.31 s, first second 0.72 s" in told["6"]
    assert all("random weights, commit 0123456" in told[n] for n in "56")


def test_without_a_run_every_place_says_so(tmp_path):
    assert all("not measured" in text for text in gpu_results.answers(tmp_path).values())
    assert {value for row in gpu_results.flex_rows(tmp_path) for key, value in row.items() if key != "sinks"} == {
        gpu_results.NEEDS
    }
    assert ("No GPU has timed it here" in (ROOT / "README.md").read_text()) == (not gpu_results.read())


def test_the_page_says_what_was_measured_or_what_is_predicted():
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert page == gpu_results.fill(page)


def test_the_prediction_is_of_the_code_as_it_runs_whatever_ran_before():
    """A dry run that failed within a fused function, and the mode of the caller, change no count."""
    counts = gpu_bench.elementwise.__wrapped__()
    with pytest.raises(RuntimeError), dry_run.counting() as ledger:
        ledger.fused(lambda x: x + torch.ones(2, 3))(dry_run.empty(3, 4))
    assert not rope.is_compiling() and not ledger.fuses_now
    with torch.inference_mode():
        assert gpu_bench.elementwise.__wrapped__() == counts
    assert gpu_bench.SIZES["19b"].config == ModelConfig()


def test_gpu_tests_are_collected_and_skipped_where_only_the_library_can_be_imported(bare):
    run = bare(*"-m pytest -m gpu tests -rs -p no:cacheprovider".split())
    assert run.returncode == 0 and "error" not in run.stdout, run.stdout + run.stderr
    count = int(re.search(r"(\d+) (?:skipped|passed)", run.stdout)[1])
    assert count >= 4 and (torch.cuda.is_available() or "no CUDA device" in run.stdout)


def test_bench_train_and_generate_start_where_only_the_library_can_be_imported(bare, tmp_path):
    """A clip and a step of Stage 2 are made; an mp4 is refused at once, and the line says what to do."""
    say = ["generate", "--prompt", "a red ball, bell", "--seconds", "1", "--out"]
    commands = [[*say, str(tmp_path / "clip.mp4")], [*say, str(tmp_path / "clip.safetensors")]]
    commands += [[*"train stage2 --steps 1 --batch 1 --count 2 --out".split(), str(tmp_path / "stage2.safetensors")]]
    run = bare("-c", f"from omniforcing_lib.__main__ import main\nprint(*map(main, {commands}))")
    assert run.stdout.splitlines()[-1:] == ["2 0 0"], run.stdout + run.stderr
    assert "pip install av" in run.stderr and "not scored" in run.stderr
    clip = load_file(tmp_path / "clip.safetensors")
    assert clip["frames"].shape == (25, 64, 64, 3) and clip["samples"].shape == (16_160,)
    words = "-m omniforcing_lib bench --size miniature --device cpu --phases decoders --out".split()
    measured = bare(*words, str(tmp_path))
    assert '"name": "exit", "value": 0' in measured.stdout and "skipped: needs diffusers" in measured.stdout
