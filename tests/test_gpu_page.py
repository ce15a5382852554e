"""The page for the real weights, docs/gpu.md: every command parses, its numbers are counted, and it can be followed."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic
import torch
from tiny_ltx2 import MODEL, gemma_folder, split_files, whole_file

from omniforcing_lib import __main__ as cli
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.files import write_json, write_tensors
from omniforcing_lib.options import Parser, options_of
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.training import recipes
from series import claims
from studies import cost

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
DATA = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for line in PAGE.splitlines() if line.startswith(".venv/bin/") and " -m " in line]
CODE = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
SMALLER = {"cuda": "cpu", "30": "1", "5": "1", "4096": "2", "8": "1", "3000": "1", "gpu": "smoke", "16": "2", "24": "3"}
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
    assert "models/omniforcing" in COMMANDS[0] and "*not run here*" in PAGE


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
    whole_file("models/ltx-2-19b-dev.safetensors")
    gemma_folder("models/gemma-3-12b-it-qat-q4_0-unquantized")
    release(Path("models/omniforcing"))
    transformer = next(iter(split_files("models").values()))
    transformer.rename(transformer.with_name("ltx-2.5-22b-distilled-transformer-bf16.safetensors"))
    Path("prompts.txt").write_text("a red ball\na blue ball\n")
    for command in COMMANDS:
        given = [SMALLER.get(word, word) for word in words(command)]
        if given[:2] == ["train", "plan"]:
            given += ["--model", "models/ltx-2-19b-dev.safetensors"]
        if given[0] == "generate":
            given += ["--steps", "2"]
        if given[0] == "reproduce":
            continue
        assert cli.main(given) == 0, " ".join(given)
    assert all(Path(name).stat().st_size for name in ("stream.mp4", "teacher.mp4", "newest.mp4", "student.mp4"))
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
