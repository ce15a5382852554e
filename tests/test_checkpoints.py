"""LTX-2 files: strict, bit-identical after a round trip, a clear word for everything that does not fit."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic
import torch
from safetensors.torch import load_file, save_file
from synthetic import PREFIX, STUBS
from test_transformer import TINY, tiny

from omniforcing_lib import files
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.files import write_tensors
from omniforcing_lib.layout import AV, PAPER, BlockLayout
from omniforcing_lib.ltx2 import checkpoints, formats, parts
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.training import train_config
from series import runner


@pytest.fixture
def path(tmp_path):
    """A tiny LTX-2 file."""
    return checkpoints.save(tiny(dtype=torch.float32), tmp_path / "tiny.safetensors", dtype=torch.float32)


def rewrite(path, change, metadata=None):
    """Store the file again with its tensors or its config changed."""
    checkpoint = checkpoints.read(path)
    tensors, config = load_file(path), json.loads(json.dumps(checkpoint.metadata["config"]))
    change(tensors, config)
    save_file(tensors, path, metadata if metadata is not None else {"config": json.dumps(config)})


def test_a_round_trip_is_bit_identical(path, tmp_path):
    again = checkpoints.save(checkpoints.load(path), tmp_path / "again.safetensors", dtype=torch.float32)
    first, second = load_file(path), load_file(again)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert checkpoints.read(path).config == checkpoints.read(again).config == TINY


ASKED = {
    "dropout": 0.0,
    "attention_bias": True,
    "num_vector_embeds": None,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "upcast_attention": False,
    "standardization_norm": "rms_norm",
    "norm_elementwise_affine": False,
    "qk_norm": "rms_norm",
    "positional_embedding_type": "rope",
    "use_audio_video_cross_attention": True,
    "share_ff": False,
    "av_cross_ada_norm": True,
    "use_middle_indices_grid": True,
}
"""What ltx-core 1.0.0 asks of the `transformer` part of a config (LTXModelConfigurator)."""


@pytest.mark.parametrize("name", ASKED)
def test_what_lightricks_loader_asks_is_written_and_checked(name, path):
    """A file of ours has the value that it wants; a file with another is refused by the setting's name."""
    assert checkpoints.read(path).metadata["config"]["transformer"].get(name) == ASKED[name]
    other = not ASKED[name] if isinstance(ASKED[name], bool) else "other"
    rewrite(path, lambda tensors, config: config["transformer"].update({name: other}))
    with pytest.raises(ValueError, match=name):
        checkpoints.read(path)


def test_a_student_keeps_its_layout_and_steps(tmp_path):
    causal = RolloutConfig(BlockLayout(AV(2, 9), AV(3, 25), 5), (1000, 500, 0), 3, False, 0.1)
    model = tiny(TINY.with_sinks(5), dtype=torch.float32)
    checkpoint = checkpoints.read(checkpoints.save(model, tmp_path / "s.safetensors", causal=causal))
    assert checkpoint.causal == causal and checkpoint.config.num_audio_sink_tokens == 5


@pytest.mark.parametrize("version", synthetic.CONFIGS)
def test_a_whole_ltx2_file_loads_strictly_and_its_other_parts_are_counted(version, tmp_path):
    path = synthetic.ltx2_file(tmp_path / "ltx-2.safetensors", version)
    checkpoint, text = checkpoints.read(path), checkpoints.inspect(path)
    assert checkpoint.format is formats.LTX2 and checkpoint.config == synthetic.CONFIGS[version]
    assert checkpoint.report().ok and len(checkpoint.transformer) == len(checkpoint.entries) - len(STUBS[version])
    for part in ("text connectors", "text projection", "video VAE (4)", "audio VAE (4)", "vocoder"):
        assert part in text
    assert ("gated attention" in text) == (version != "2.0") and "unknown" not in text
    stored, loaded = load_file(path), checkpoints.load(path, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, stored[PREFIX + name]) for name, tensor in loaded.items())


@pytest.mark.parametrize("version", synthetic.CONFIGS)
def test_with_sinks_off_the_student_is_the_teacher_to_the_bit(version, tmp_path):
    """Fresh sinks of the paper's layout leave the bidirectional mode alone, and masks see the same weights."""
    path = synthetic.ltx2_file(tmp_path / "ltx-2.safetensors", version)
    teacher, student = checkpoints.load(path), checkpoints.load(path, sinks=PAPER.sinks)
    assert student.audio_sink_tokens.shape == (1, PAPER.sinks, synthetic.CONFIGS[version].audio_dim)
    x, text = synthetic.inputs()
    sigma = AV(torch.tensor([0.5]), torch.tensor([0.5]))
    with torch.no_grad():
        assert all(map(torch.equal, teacher(x, sigma, text), student(x, sigma, text)))


def test_weights_of_the_files_own_dtype_stay_mapped_and_private(path):
    """Nothing is copied, what is written to the weights does not reach the file, and the file may be replaced."""
    before, model = path.read_bytes(), checkpoints.load(path)
    bias = model.proj_out.bias.clone()
    model.proj_out.bias.add_(1)
    checkpoints.save(tiny(seed=9), path, dtype=torch.float32)
    assert torch.equal(model.proj_out.bias, bias + 1)
    assert path.read_bytes() != before and torch.equal(model.proj_out.weight, tiny(dtype=torch.float32).proj_out.weight)


def cached(path, name):
    """Put a file into a content-addressed cache: the blob is named by its hash, a link to it as everybody calls it."""
    blob = path.parent / "blobs" / "5f3ab2"
    blob.parent.mkdir()
    path.rename(blob)
    link = path.parent / "snapshots" / "main" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    return link


def test_a_link_is_read_by_its_own_name_and_what_is_beside_it_is_beside_the_link(path, monkeypatch):
    link = cached(path, "ltx-2-19b-dev.safetensors")
    gemma = link.parent / "gemma-3" / "config.json"
    gemma.parent.mkdir()
    gemma.write_text("{}")
    assert checkpoints.read(link).path == link and "ltx-2-19b-dev" in checkpoints.inspect(link)
    assert runner._given([f"teacher={link}"], "smoke") == {"teacher": str(link)}
    assert parts.beside(link, "gemma*/config.json") == [gemma]
    for folder, given in ((link.parent, link.name), (gemma.parent, f"../{link.name}")):
        monkeypatch.chdir(folder)
        assert parts.beside(checkpoints.read(given).path, "gemma*/config.json") == [gemma]
        assert runner._given([f"teacher={given}"], "smoke") == {"teacher": str(Path(folder, given))}


def test_a_linked_folder_is_called_as_the_link(path, tmp_path):
    link = tmp_path / "omniforcing"
    link.symlink_to(cached(path, "x.safetensors").parent)
    assert checkpoints.read(link).path == link / "x.safetensors" and checkpoints.inspect(link).startswith(
        "omniforcing/"
    )


def test_shards_behind_links_are_found_by_their_names(path, tmp_path):
    """An index and its files may each be a link to another blob."""
    whole = load_file(path)
    for i, name in enumerate(sorted(whole)):
        blob = tmp_path / f"{i:x}"
        save_file({name: whole[name]}, blob, {"config": json.dumps(checkpoints.read(path).metadata["config"])})
        (tmp_path / "release").mkdir(exist_ok=True)
        (tmp_path / "release" / f"{i}.safetensors").symlink_to(blob)
    listing = {name: f"{i}.safetensors" for i, name in enumerate(sorted(whole))}
    files.write_json(tmp_path / "index", {"weight_map": listing})
    (tmp_path / "release" / "model.safetensors.index.json").symlink_to(tmp_path / "index")
    assert checkpoints.load(tmp_path / "release").state_dict().keys() == checkpoints.load(path).state_dict().keys()


def test_metadata_that_is_absent_is_said_to_be_assumed(path, caplog):
    """By `inspect` and by `load`: Lightricks' own loader would assume other values."""
    checkpoints.load(path)
    assert "settings" not in checkpoints.inspect(path) + caplog.text
    rewrite(path, lambda t, c: c["transformer"].pop("rope_type"))
    checkpoints.load(path)
    for text in (checkpoints.inspect(path), caplog.text):
        assert "the file does not say rope_type; taken from LTX-2.0: split" in text


@pytest.mark.parametrize("version", synthetic.CONFIGS)
def test_what_a_file_is_and_lacks_is_said(version, path, tmp_path):
    """Its version by tensors and by metadata, and for each use what it needs that is not in the file."""
    whole = checkpoints.inspect(synthetic.ltx2_file(tmp_path / "whole.safetensors", version))
    assert f"version: LTX-{version} by its tensors, {version} by its metadata" in whole
    assert (
        not re.search("to (decode|encode prompts), missing", whole) and "to stream, missing: an `omniforcing`" in whole
    )
    alone = checkpoints.inspect(path)
    assert "to decode, missing: video VAE, audio VAE, vocoder" in alone
    assert "to encode prompts, missing: text connectors, text projection" in alone
    assert "to stream" not in checkpoints.inspect("student")


def test_the_generation_is_told_by_names():
    gates, bias = ("transformer_blocks.0." + name for name in ("attn1.to_gate_logits.weight", "ff.net.2.bias"))
    assert [formats.version_of(names) for names in ({bias}, {gates, bias}, {gates})] == ["2.0", "2.3", "2.5"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(tiny(seed=3), path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_metadata_speaks_the_dialects_found_in_the_wild():
    """`torch.float64` for float64; unknown keys are ignored, defaults fill what is absent."""
    config = ModelConfig.from_metadata({"frequencies_precision": "torch.float32", "num_layers": 2, "new_thing": 1})
    assert config == replace(ModelConfig(), frequencies_precision="float32", num_layers=2)


@pytest.mark.parametrize("name", ["teacher", "stage2", "student"])
def test_shipped_files_fit_their_own_config(name):
    checkpoint = checkpoints.read(name)
    assert checkpoint.report().ok and checkpoint.path.stat().st_size <= 15_000_000
    assert (checkpoint.causal is None) == (name == "teacher")


def test_shipped_files_are_the_ones_that_are_described():
    lines = (files.DATA / "SHA256SUMS").read_text().split()
    expected = dict(zip(lines[1::2], lines[::2], strict=True))
    shipped = sorted(files.DATA.glob("*.safetensors"))
    assert {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in shipped} == expected


def test_an_installed_library_finds_the_shipped_files(tmp_path):
    """pip puts `data/` beside the library as `omniforcing_data`; what SHA256SUMS names goes with it."""
    root = Path(__file__).parents[1]
    setup = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "omniforcing_data" in setup["packages"] and setup["package-dir"]["omniforcing_data"] == "data"
    library, data = tmp_path / "omniforcing_lib", tmp_path / "omniforcing_data"
    library.mkdir()
    data.mkdir()
    for name in ("__init__.py", "files.py"):
        shutil.copy(root / "omniforcing_lib" / name, library)
    for pattern in setup["package-data"]["omniforcing_data"]:
        for file in (root / "data").glob(pattern):
            (data / file.name).symlink_to(file)
    named = set((data / "SHA256SUMS").read_text().split()[1::2])
    assert named == {file.name for file in data.glob("*.safetensors")}
    code = "from omniforcing_lib import files; print(files.__file__, files.DATA)"
    run = [sys.executable, "-c", code]
    out = subprocess.run(
        run, capture_output=True, text=True, check=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}
    )
    assert out.stdout.split() == [str(library / "files.py"), str(data)]


def test_one_wide_tensor_does_not_widen_the_file(tmp_path):
    """Many processes map a bfloat16 file: what is float32 in it keeps its bits, and nothing else is converted."""
    path = synthetic.ltx2_file(tmp_path / "ltx-2.safetensors", dtype=torch.bfloat16)
    tensors, name = load_file(path), "transformer_blocks.0.attn1.to_q.weight"
    tensors[synthetic.PREFIX + name] = tensors[synthetic.PREFIX + name].float() + 1e-5
    metadata = {"config": json.dumps(checkpoints.read(path).metadata["config"])}
    mixed = write_tensors(tmp_path / "mixed.safetensors", tensors, metadata)
    model, sources = train_config.as_stored(mixed)
    assert torch.equal(sources[name], tensors[synthetic.PREFIX + name])
    assert {x.dtype for other, x in sources.items() if other != name} == {torch.bfloat16}
    assert sources.keys() == dict(model.named_parameters()).keys()
