"""LTX-2 files: strict, bit-identical after a round trip, a clear word for everything that does not fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_transformer import TINY, inputs, tiny

from omniforcing_lib import checkpoints
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.layout import AV, BlockLayout
from omniforcing_lib.rollout import Causal

from omniforcing_lib.formats import PREFIX


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


def test_a_student_keeps_its_layout_and_steps(tmp_path):
    causal = Causal(BlockLayout(AV(2, 9), AV(3, 25), 5), (1000, 500, 0), 3, False, 0.1)
    model = tiny(TINY.with_sinks(5), dtype=torch.float32)
    checkpoint = checkpoints.read(checkpoints.save(model, tmp_path / "s.safetensors", causal=causal))
    assert checkpoint.causal == causal and checkpoint.config.num_audio_sink_tokens == 5


def test_text_connectors_of_the_19b_file_are_left_out(path):
    rewrite(path, lambda t, c: t.update({PREFIX + "video_embeddings_connector.x": torch.zeros(2)}))
    assert checkpoints.read(path).report().ok
    checkpoints.load(path)


def test_fresh_sinks_leave_the_weights_alone(path):
    teacher, student = checkpoints.load(path), checkpoints.load(path, sinks=4)
    assert student.audio_sink_tokens.shape == (1, 4, TINY.audio_dim)
    x, _, text = inputs(BlockLayout(AV(1, 1), AV(3, 25)), 4, dtype=torch.float32)
    sigma = AV(torch.tensor([0.5]), torch.tensor([0.5]))
    with torch.no_grad():
        assert all(map(torch.equal, teacher(x, sigma, text), student(x, sigma, text)))


CASES = {
    "missing": (lambda t, c: t.pop(PREFIX + "proj_out.bias"), r"missing: proj_out\.bias"),
    "unexpected": (lambda t, c: t.update({PREFIX + "extra": torch.zeros(1)}), "unexpected: extra"),
    "renamed": (
        lambda t, c: t.update({PREFIX + "proj_out.wait": t.pop(PREFIX + "proj_out.weight")}),
        r"proj_out\.wait",
    ),
    "shape": (
        lambda t, c: t.update({PREFIX + "proj_out.bias": torch.zeros(7)}),
        r"mismatched: proj_out\.bias is \[7\], expected \[3\]",
    ),
    "not finite": (
        lambda t, c: t[PREFIX + "proj_out.bias"].fill_(torch.nan),
        r"proj_out\.bias holds values .* not finite",
    ),
    "rope": (lambda t, c: c["transformer"].update(rope_type="spiral"), "split, interleaved; found 'spiral'"),
    "fixed": (lambda t, c: c["transformer"].update(qk_norm="layer"), "qk_norm is 'layer'; only 'rms_norm'"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_named(path, case):
    change, message = CASES[case]
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(path)


def test_files_that_are_no_checkpoint_are_refused(path, tmp_path):
    rewrite(path, lambda t, c: None, metadata={})
    with pytest.raises(ValueError, match="no `config` in its metadata"):
        checkpoints.read(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        checkpoints.read(path)
    pickled = tmp_path / "model.pt"
    pickled.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pickles .* are refused"):
        checkpoints.read(pickled)
    with pytest.raises(ValueError, match="no checkpoint at"):
        checkpoints.read(tmp_path / "none.safetensors")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints.os, "replace", fail)
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
    import hashlib

    lines = (checkpoints.DATA / "SHA256SUMS").read_text().split()
    expected = dict(zip(lines[1::2], lines[::2], strict=True))
    files = sorted(checkpoints.DATA.glob("*.safetensors"))
    assert {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files} == expected


@torch.no_grad()
def test_the_shipped_teacher_is_the_same_through_diffusers():
    """bf16-rounded weights in fp32 arithmetic, both implementations: equal to 1e-4."""
    from diffusers import LTX2VideoTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_ltx2_transformer_to_diffusers

    checkpoint, ours = checkpoints.read("teacher"), checkpoints.load("teacher")
    config = checkpoint.config
    reference = LTX2VideoTransformer3DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        cross_attention_dim=config.cross_attention_dim,
        audio_in_channels=config.audio_in_channels,
        audio_out_channels=config.audio_out_channels,
        audio_num_attention_heads=config.audio_num_attention_heads,
        audio_attention_head_dim=config.audio_attention_head_dim,
        audio_cross_attention_dim=config.audio_cross_attention_dim,
        num_layers=config.num_layers,
        caption_channels=config.caption_channels,
        rope_type=config.rope_type,
    ).eval()
    reference.load_state_dict(convert_ltx2_transformer_to_diffusers(load_file(checkpoint.path)))
    generator = torch.Generator().manual_seed(0)
    video, audio, text = (
        torch.randn(*shape, generator=generator) for shape in ((1, 256, 32), (1, 126, 32), (1, 6, 64))
    )
    level = torch.tensor([0.6])
    mine = ours(AV(video.reshape(1, 16, 4, 4, 32), audio), AV(level, level), AV(text, text))
    steps = level[:, None] * 1000
    theirs = reference(
        hidden_states=video,
        audio_hidden_states=audio,
        encoder_hidden_states=text,
        audio_encoder_hidden_states=text,
        timestep=steps.expand(1, 256),
        audio_timestep=steps.expand(1, 126),
        num_frames=16,
        height=4,
        width=4,
        audio_num_frames=126,
    )
    assert (mine.video.reshape(1, 256, 32) - theirs.sample).abs().max() <= 1e-4
    assert (mine.audio - theirs.audio_sample).abs().max() <= 1e-4
