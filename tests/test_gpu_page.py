"""The page for the real weights, docs/gpu.md: every command parses, its numbers are counted, and it can be followed."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import synthetic
import torch
from tiny_ltx2 import MODEL, NEWER, gemma_folder, split_files, tiny_decoder_file, whole_file

from omniforcing_lib import __main__ as cli
from omniforcing_lib import media
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.files import write_json, write_tensors
from omniforcing_lib.layout import Clock
from omniforcing_lib.options import Parser, options_of
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.training import recipes
from series import claims
from studies import cost

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
DATA = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(?:\|.*\| `)?(\.venv/bin/\S+ [^`\n]*-m [^`\n]+?)(?:` \|)?$", PAGE, re.MULTILINE)
COMMANDS = [command for command in COMMANDS if "omniforcing_lib" in command]
CODE = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
SMALLER = {"cuda": "cpu", "30": "1", "180": "1", "5": "1", "4096": "2", "8": "1", "3000": "1", "gpu": "smoke"}
SMALLER |= {"16": "2", "24": "3"}
"""Words of a command, and what stands for them on tiny files."""


def words(command: str) -> list[str]:
    """Give what `main` of the command line gets."""
    python, *rest = shlex.split(command)
    launcher = python.removeprefix(".venv/bin/")
    assert (launcher, rest[0]) in {("python", "-m"), ("torchrun", "--nproc-per-node")}
    at = rest.index("-m")
    assert rest[at + 1] == "omniforcing_lib"
    return rest[at + 2 :]


def options(command: str) -> dict[str, object]:
    """Parse a command of training; give what its stage is asked for."""
    train = cli.parse(words(command))
    parser = Parser()
    parser.add_options(recipes.STAGES[train.stage])
    return vars(parser.parse_args(train.rest))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(words(c)[:2]))
def test_every_command_parses(command):
    if words(command)[0] == "train":
        assert options(command)
    else:
        assert cli.parser().parse_args(words(command)).command == words(command)[0]


@pytest.mark.parametrize("text", [PAGE, DATA], ids=["page", "data"])
def test_stage_2_asks_for_the_pairs_that_the_command_before_it_makes(text):
    lines = [line for line in text.splitlines() if " -m omniforcing_lib train " in line]
    at = next(i for i, line in enumerate(lines) if "train stage2 " in line)
    made, used = options(next(line for line in reversed(lines[:at]) if "train pairs " in line)), options(lines[at])
    assert used["pairs"] == made["out"] and used["prompts"] == made["prompts"]
    own = {"out"} | {entry.name for entry, _, _ in options_of(recipes.TrainConfig)}
    assert all(used[name] == value for name, value in made.items() if name not in own)


def test_there_are_commands_for_every_step():
    said = " ".join(COMMANDS)
    assert len(COMMANDS) >= 10 and all(word in said for word in ("inspect", "pairs", "stage2", "stage3", "--only 05"))
    assert "models/omniforcing" in said and "*not run here*" in PAGE


def test_each_model_has_a_row_with_its_command():
    rows = [line for line in PAGE.split("| model | command |")[1].split("\n\n")[0].splitlines() if ".venv/bin" in line]
    held = (
        "LTX-2.0",
        "LTX-2.3",
        "LTX-2.5",
        "OmniForcing's release",
        "TaoMate",
        "a LoRA",
        "a tiny decoder",
        "StreamAVBench",
    )
    assert all(any(f"| {name}" in row for row in rows) for name in held)
    assert len(rows) == len([command for command in COMMANDS if any(f"`{command}`" in row for row in rows)]) == 9


@pytest.mark.filterwarnings("ignore")
def test_a_clip_keeps_both_channels_and_a_tiny_decoder_makes_it_too(tmp_path, monkeypatch):
    """A tiny whole file from the command line: stereo at the vocoder's rate, and other frames by the other decoder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    whole_file("ltx-2.safetensors")
    gemma_folder("gemma-3")
    tiny_decoder_file("taeltx_2.safetensors")
    made = "generate --model ltx-2.safetensors --seconds 1 --steps 1 --grid 2 2 --prompt ball".split()
    assert cli.main([*made, "--out", "full.mp4"]) == 0
    assert cli.main([*made, "--decoder", "tiny", "taeltx_2.safetensors", "--out", "tiny.mp4"]) == 0
    means = []
    for name in ("full.mp4", "tiny.mp4"):
        with av.open(name) as container:
            sound = next(container.decode(audio=0))
            assert (sound.layout.name, sound.sample_rate) == ("stereo", 24_000)
            planes = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], 1)
            assert np.abs(planes[0] - planes[1]).max() > 0.01
        means.append(media.read_clip(name, clock=Clock(sample_rate=24_000), size=(64, 64)).video.astype(int))
    assert np.abs(means[0] - means[1]).mean() > 1


def test_the_memory_on_the_page_is_counted():
    rows = cost.memory_rows(ModelConfig().with_sinks(16), RolloutConfig())
    block = PAGE.split("<!-- memory: from cost.memory_rows -->\n")[1].split("\n<!-- end of memory -->")[0]
    assert block == claims.markdown_table(rows)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_can_be_followed_on_tiny_files(tmp_path, monkeypatch):
    """Command by command in an empty folder: a whole tiny LTX-2 file, a tiny Gemma, a release of one shard.

    The notebooks among them are followed in test_companions.py, without decoders, which take minutes even when tiny.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    whole_file("models/ltx-2-19b-dev.safetensors")
    whole_file("models/ltx-2.3-22b-dev.safetensors", "2.3")
    newer = synthetic.weights(NEWER, torch.Generator().manual_seed(0))
    torch.save({"generator_ema": {f"model.{name}": tensor for name, tensor in newer.items()}}, "models/model.pt")
    tiny_decoder_file("models/taeltx_2.safetensors")
    Path("cases.txt").write_text("P-0001\ta red ball\n")
    lora = {"lora_A.weight": torch.ones(2, 128), "lora_B.weight": torch.ones(128, 2)}
    lora = {f"diffusion_model.transformer_blocks.0.attn1.to_q.{name}": tensor for name, tensor in lora.items()}
    write_tensors("models/lora.safetensors", lora)
    gemma_folder("models/gemma-3-12b-it-qat-q4_0-unquantized")
    release(Path("models/omniforcing"))
    transformer = next(iter(split_files("models").values()))
    transformer.rename(transformer.with_name("ltx-2.5-22b-distilled-transformer-bf16.safetensors"))
    Path("prompts.txt").write_text("a red ball\na blue ball\n")
    for command in COMMANDS:
        given = [SMALLER.get(word, word) for word in words(command)]
        if given[:2] == ["train", "plan"]:
            given += ["--model", "models/ltx-2-19b-dev.safetensors"]
        if given[0] in ("generate", "export-clips"):
            given += ["--steps", "2", "--grid", "2", "2"]
        if given[0] == "reproduce":
            continue
        assert cli.main(given) == 0, " ".join(given)
    names = ("stream", "teacher", "student", "ltx2", "ltx23", "omniforcing", "taomate", "lora", "live", "clips/P-0001")
    assert all(Path(f"{name}.mp4").stat().st_size for name in (*names, "newest"))
    made = {}
    exec(CODE.replace("cuda", "cpu").replace("(16, 24)", "(2, 3)"), made)
    assert made["chunk"].prompt == "rain falls on a tin roof"


def release(folder: Path) -> None:
    """Write a student as OmniForcing releases it: bare names behind `model.`, an index, no word about the model."""
    thin = {"num_attention_heads": 32, "attention_head_dim": 4, "cross_attention_dim": 128}
    thin |= {"audio_num_attention_heads": 32, "audio_attention_head_dim": 2, "audio_cross_attention_dim": 64}
    state = synthetic.weights(replace(MODEL, **thin), torch.Generator().manual_seed(0))
    state = {f"model.{name}": tensor.bfloat16() for name, tensor in state.items()}
    write_tensors(folder / "model-00001-of-00001.safetensors", state, {})
    where = dict.fromkeys(state, "model-00001-of-00001.safetensors")
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
