"""One transformer in four formats: the same names, the same settings, the same bits, the same velocity."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import synthetic
import torch
from safetensors.torch import load_file, save_file
from test_transformer import distance

from omniforcing_lib import stream
from omniforcing_lib.__main__ import main
from omniforcing_lib.bounce import codecs
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.files import write_json
from omniforcing_lib.flow import PAPER_STEPS, RELEASED_STEPS
from omniforcing_lib.layout import AV, PAPER, RELEASED
from omniforcing_lib.ltx2 import checkpoints, exports, formats
from omniforcing_lib.rollout import RolloutConfig
from studies import anatomy

LEVEL = torch.tensor([0.6])
RELEASED_WIDTHS = replace(
    synthetic.CONFIGS["2.0"],
    num_layers=2,
    num_attention_heads=32,
    attention_head_dim=4,
    cross_attention_dim=128,
    audio_num_attention_heads=32,
    audio_attention_head_dim=2,
)
"""The released code's 32 heads, as thin as can be."""


@pytest.fixture(params=synthetic.CONFIGS)
def version(request):
    return request.param


@pytest.fixture
def path(version, tmp_path):
    """An LTX-2 file with everything in it."""
    return synthetic.ltx2_file(tmp_path / "ltx-2.safetensors", version)


def velocity(model):
    """Compute a velocity from weights of its own: mapped ones lie as their file has them, and kernels round by that."""
    x, text = synthetic.inputs()
    with torch.no_grad():
        return copy.deepcopy(model)(x, AV(LEVEL, LEVEL), text)


def released(path, prefix, sinks=0):
    """Write a release as OmniForcing does: two shards, an index, a prefix, no word about the model."""
    generator = torch.Generator().manual_seed(0)
    state = synthetic.weights(RELEASED_WIDTHS.with_sinks(sinks), generator)
    state = {prefix + name: tensor.bfloat16() for name, tensor in state.items()}
    names, where = sorted(state), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, path / file)
        where |= dict.fromkeys(part, file)
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    return path


def test_names_and_settings_are_those_of_the_installed_diffusers(version):
    from diffusers import LTX2VideoTransformer3DModel

    config = synthetic.CONFIGS[version]
    settings = formats.to_diffusers(config)
    known = inspect.signature(LTX2VideoTransformer3DModel.__init__).parameters
    assert settings.keys() - {"_class_name"} == known.keys() - {"self"}
    with torch.device("meta"):
        reference = LTX2VideoTransformer3DModel(**{k: v for k, v in settings.items() if k in known})
    theirs = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    ours = anatomy.shapes_of(config)
    assert {formats.DIFFUSERS.stored(name): shape for name, shape in ours.items()} == theirs
    assert {formats.DIFFUSERS.bare(name) for name in theirs} == ours.keys()
    assert formats.from_diffusers(settings) == config


def test_absent_settings_are_those_of_the_installed_diffusers():
    """A config.json may leave out what is diffusers' default, which is not always LTX-2's."""
    from diffusers import LTX2VideoTransformer3DModel

    known = inspect.signature(LTX2VideoTransformer3DModel.__init__).parameters
    defaults = {name: p.default for name, p in known.items() if name != "self"}
    defaults = {name: list(v) if isinstance(v, tuple) else v for name, v in defaults.items()}
    said = formats.to_diffusers(formats.from_diffusers({"_class_name": formats.DIFFUSERS_CLASS}))
    assert said == {"_class_name": formats.DIFFUSERS_CLASS} | defaults


@pytest.mark.parametrize("rope_type", ["split", "interleaved"])
def test_an_exported_folder_gives_the_same_velocity_in_diffusers(version, rope_type, tmp_path, monkeypatch):
    """Shards, index and config as `from_pretrained` wants them; equal to 1e-5 in fp32."""
    monkeypatch.setattr(exports, "_SHARD_BYTES", 500_000)
    config = replace(synthetic.CONFIGS[version], rope_type=rope_type)
    path = synthetic.ltx2_file(tmp_path / "ltx-2.safetensors", version, config=config)
    folder = checkpoints.export(path, tmp_path / "folder", to="diffusers")
    assert len(list(folder.glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 1
    mine, theirs = velocity(checkpoints.load(path)), in_diffusers(folder)
    assert distance(mine, theirs) <= 1e-5
    assert all(map(torch.equal, mine, velocity(checkpoints.load(folder))))


@torch.no_grad()
def in_diffusers(folder):
    from diffusers import LTX2VideoTransformer3DModel

    reference = LTX2VideoTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    (video, audio), text = synthetic.inputs()
    step = LEVEL * 1000
    out = reference(
        hidden_states=video.flatten(1, 3),
        audio_hidden_states=audio,
        encoder_hidden_states=text.video,
        audio_encoder_hidden_states=text.audio,
        timestep=step[:, None].expand(1, video[0, ..., 0].numel()),
        audio_timestep=step[:, None].expand(1, audio.shape[1]),
        sigma=step,
        num_frames=video.shape[1],
        height=video.shape[2],
        width=video.shape[3],
        audio_num_frames=audio.shape[1],
        use_cross_timestep=reference.config.cross_attn_mod,
        video_keyframes_mask=(torch.arange(video[0, ..., 0].numel()) < video[0, 0, ..., 0].numel())[None, :, None],
    )
    return AV(out.sample.reshape(video.shape), out.audio_sample)


NEWEST = {
    "as published": {},
    "without keyframes": {"use_keyframes_abs_pos_embedding": False},
    "every switch": {"audio_ff_bias": False, "use_prompt_adaln_single": False},
}


@pytest.mark.parametrize("changes", NEWEST.values(), ids=NEWEST)
def test_the_layers_of_2_5_are_those_of_diffusers(changes, tmp_path):
    """Keyframes, feed-forward layers without bias, text modulated by the table alone: equal to 1e-5 in fp32."""
    config = replace(synthetic.CONFIGS["2.5"], **changes)
    path = synthetic.ltx2_file(tmp_path / "ltx-2.5.safetensors", "2.5", config=config, dtype=torch.float32)
    folder = checkpoints.export(path, tmp_path / "folder", to="diffusers")
    assert distance(velocity(checkpoints.load(path)), in_diffusers(folder)) <= 1e-5
    assert checkpoints.read(path).config == checkpoints.read(folder).config == config
    assert "version: LTX-2.5 by its tensors" in checkpoints.inspect(path)


@pytest.mark.parametrize("to", exports.FORMATS)
def test_a_keyframe_embedding_that_is_not_there_counts_as_zeros(to, tmp_path, caplog):
    """The same velocity as without the setting, said by `inspect` and by `load`; an export holds the zeros."""
    config = synthetic.CONFIGS["2.5"]
    path = synthetic.ltx2_file(tmp_path / "ltx-2.5.safetensors", "2.5", dtype=torch.float32)
    tensors, described = load_file(path), synthetic.metadata_of(config)
    held = velocity(checkpoints.load(path))
    del tensors[formats.PREFIX + formats.KEYFRAMES]
    save_file(tensors, path, {"config": json.dumps(described)})
    model = checkpoints.load(path)
    assert torch.equal(model.keyframes_abs_pos_embedding, torch.zeros(1, config.video_dim))
    described["transformer"]["use_keyframes_abs_pos_embedding"] = False
    save_file(tensors, tmp_path / "without.safetensors", {"config": json.dumps(described)})
    found = velocity(model)
    assert all(map(torch.equal, found, velocity(checkpoints.load(tmp_path / "without.safetensors"))))
    assert distance(found, held) > 1e-3
    exported = checkpoints.read(checkpoints.export(path, tmp_path / "out" / "x.safetensors", to=to))
    assert exported.config == config and formats.KEYFRAMES in exported.transformer
    assert all(map(torch.equal, found, velocity(checkpoints.load(exported.path))))
    for text in (checkpoints.inspect(path), caplog.text):
        assert "keyframes_abs_pos_embedding: the config asks for it and the file does not hold it" in text


def test_the_published_2_5_has_these_tensors():
    """Its file holds 4,349, of which the two connectors have 258: registers and eight gated layers of 16 each."""
    newest = ("apply_gated_attention", "cross_attention_adaln", "caption_proj_before_connector")
    config = replace(ModelConfig(), **dict.fromkeys(newest, True), ff_bias=False, use_keyframes_abs_pos_embedding=True)
    shapes = anatomy.shapes_of(config)
    assert len(shapes) == 4349 - 258
    assert shapes[formats.KEYFRAMES] == (1, 4096) and shapes["transformer_blocks.47.ff.net.2.weight"] == (4096, 16384)
    assert formats.from_shapes(shapes) == config and formats.version_of(shapes) == "2.5"


def test_the_shipped_teacher_is_the_same_through_diffusers(tmp_path):
    """bf16-rounded weights in fp32 arithmetic, both implementations: equal to 1e-4."""
    folder = checkpoints.export("teacher", tmp_path / "teacher", to="diffusers")
    assert distance(velocity(checkpoints.load("teacher")), in_diffusers(folder)) <= 1e-4


def test_exports_and_their_way_back_are_bit_identical(path, tmp_path):
    """LTX-2 to LTX-2, to diffusers, and back: the same tensors, config and dtype; only other parts stay behind."""
    again = checkpoints.export(path, tmp_path / "again.safetensors")
    folder = checkpoints.export(path, tmp_path / "folder", to="diffusers")
    back = checkpoints.export(folder, tmp_path / "back.safetensors")
    first, config = load_file(path), checkpoints.read(path).config
    for other in (again, back):
        second, checkpoint = load_file(other), checkpoints.read(other)
        assert checkpoint.config == config and checkpoint.metadata["model_version"] in synthetic.CONFIGS
        assert second.keys() == {n for n in first if n.startswith(formats.PREFIX) and not formats.group(n)}
        assert all(torch.equal(tensor, first[name]) for name, tensor in second.items())
    assert "vocoder" in checkpoints.left_out(checkpoints.read(path), "ltx2")[0]


def test_a_student_survives_every_export(tmp_path):
    """Sinks, layout and steps lie beside what diffusers reads, and come back; it is said that they do."""
    student = checkpoints.read("student")
    folder = checkpoints.export("student", tmp_path / "folder", to="diffusers")
    back = checkpoints.export(folder, tmp_path / "back.safetensors")
    for other in (folder, back):
        found = checkpoints.read(other)
        assert (found.causal, found.config) == (student.causal, student.config)
        assert found.metadata["notes"] == student.metadata["notes"]
    first, second = load_file(student.path), load_file(back)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert "omniforcing.safetensors" in checkpoints.left_out(student, "diffusers")[-1]
    assert checkpoints.read(back).format is student.format is formats.STUDENT


RELEASES = {
    "model.": (RolloutConfig(RELEASED, RELEASED_STEPS), ("interleaved", "float32", 1)),
    "": (RolloutConfig(RELEASED, RELEASED_STEPS), ("interleaved", "float32", 1)),
    "model.velocity_model.": (None, ("split", "float64", 1000)),
}


@pytest.mark.parametrize("prefix", RELEASES, ids=["causal", "bare", "bidirectional"])
def test_a_release_is_run_as_it_was_trained(prefix, tmp_path, caplog):
    """No metadata: the settings follow from the format's name, the config from the shapes (specification 1.9)."""
    causal, settings = RELEASES[prefix]
    for given in (released(tmp_path, prefix), tmp_path / "model.safetensors.index.json"):
        checkpoint = checkpoints.read(given)
        config = checkpoint.config
        assert checkpoint.format in formats.RELEASES and checkpoint.report().ok and checkpoint.causal == causal
        assert (config.rope_type, config.frequencies_precision, config.av_ca_timestep_scale_multiplier) == settings
        assert "settings: the file carries none" in checkpoints.inspect(given)
    named = dict(zip(formats.RELEASED_CODE, settings, strict=True))
    assert config == replace(RELEASED_WIDTHS, **named)
    exported = checkpoints.export(tmp_path, tmp_path / "student" / "own.safetensors")
    assert checkpoints.read(exported).causal == causal and checkpoints.read(exported).config == config
    assert all(map(torch.equal, velocity(checkpoints.load(tmp_path)), velocity(checkpoints.load(exported))))
    assert "settings: the file carries none" in caplog.text


@pytest.mark.parametrize("version", ["2.3", "2.5"])
def test_a_bare_transformer_is_not_taken_for_a_release(version, tmp_path, caplog):
    """Bare names, no word about the model, but gates: LTX-2's settings, and it is said that they were assumed."""
    path, prefix = synthetic.ltx2_file(tmp_path / "ltx-2.safetensors", version), formats.PREFIX
    tensors = {n.removeprefix(prefix): t for n, t in load_file(path).items() if n.startswith(prefix)}
    save_file({n: t for n, t in tensors.items() if "_connector." not in n}, tmp_path / "bare.safetensors")
    found = checkpoints.read(tmp_path / "bare.safetensors")
    assert found.format is formats.BARE and found.causal is None
    expected, unseen = checkpoints.read(path).config, ModelConfig().caption_channels
    assert found.config == replace(expected, caption_channels=unseen)
    assert all(map(torch.equal, velocity(checkpoints.load(path)), velocity(checkpoints.load(found.path))))
    assert "settings: the file carries none" in caplog.text


def test_a_release_streams(tmp_path):
    """Straight from the file: a second and a frame in the first chunk of the released layout, then a second each."""
    student, causal = checkpoints.load(released(tmp_path, "model.")), checkpoints.read(tmp_path).causal
    with stream.Streamer(student, causal, codecs.shipped_codec(), TinyText(), "a red ball, bell") as live:
        chunks = list(islice(live, 3))
    assert [len(chunk.frames) for chunk in chunks] == [25, 24, 24]
    assert all(np.isfinite(chunk.samples).all() for chunk in chunks)


def test_a_release_with_sinks_has_the_papers_layout(tmp_path):
    checkpoint = checkpoints.read(released(tmp_path, "model.", sinks=16))
    assert checkpoint.causal == RolloutConfig(PAPER) and checkpoint.config.num_audio_sink_tokens == 16
    assert checkpoint.report().ok


def taomate(path):
    """Write a pickle as TaoMate publishes it: LTX-2.3 behind `model.`, a learned memory, masks, no settings."""
    generator = torch.Generator().manual_seed(0)
    state = synthetic.weights(synthetic.CONFIGS["2.3"], generator)
    layers = [*(f"to_{x}.weight" for x in "qkv"), "to_out.weight", "to_out.bias"]
    branch = [f"{stream}_memory_attn.{name}" for stream in ("video", "audio") for name in layers]
    branch += [f"video_color_film.net.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    memory = [f"learned_memory_{stream}_encoder.{k}" for stream in ("video", "audio") for k in ("weight", "bias")]
    memory += [f"transformer_blocks.1.{name}" for name in branch]
    state |= dict.fromkeys(memory, torch.ones(2)) | {"mask_builder.block": torch.zeros(2, dtype=torch.bool)}
    torch.save({"generator_ema": {f"model.{name}": t for name, t in state.items()}, "step": 7}, path)
    return path, 4 + 12 * len(branch)


def test_a_taomate_release_is_known_by_what_it_holds(tmp_path, capsys, caplog):
    """Its prefix is OmniForcing's, its settings are not: converted by a command, it is plain LTX-2.3 without memory."""
    pickled, published = taomate(tmp_path / "model.pt")
    path = tmp_path / "model.safetensors"
    assert main(["convert", str(pickled), "--out", str(path)]) == 0 and published == 172
    assert "warning: compare sha256" in capsys.readouterr().out
    checkpoint, config = checkpoints.read(path), replace(synthetic.CONFIGS["2.3"], caption_channels=3840)
    assert checkpoint.format is formats.TAOMATE and checkpoint.report().ok
    assert checkpoint.causal == RolloutConfig(RELEASED, PAPER_STEPS, window=2, reanchor=False)
    assert checkpoint.config == replace(config, frequencies_precision="float32", av_ca_timestep_scale_multiplier=1)
    plain = synthetic.ltx2_file(tmp_path / "plain.safetensors", "2.3", config=checkpoint.config, dtype=torch.float32)
    tensors = load_file(path)
    same = {formats.PREFIX + name: tensors["model." + name] for name in checkpoint.transformer}
    save_file(same, plain, {"config": json.dumps(synthetic.metadata_of(checkpoint.config))})
    assert all(map(torch.equal, velocity(checkpoints.load(path)), velocity(checkpoints.load(plain))))
    for said in (checkpoints.inspect(path), caplog.text):
        assert "left out: 18 tensors of a learned memory (learned_memory_*, *_memory_attn, video_color_film)" in said
    for name in ("transformer_blocks.1.video_memory_gate.weight", "learned_memory_text_encoder.weight"):
        save_file(tensors | {f"model.{name}": torch.zeros(2)}, path)
        with pytest.raises(ValueError, match=f"unexpected: {name}"):
            checkpoints.load(path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path, capsys):
    """By the one command that opens pickles; the same file makes its mark when Python opens it."""
    mark, out = tmp_path / "mark", tmp_path / "x.safetensors"
    tensor = torch.zeros(2)
    cases = {
        "nothing of it was executed": {"generator_ema": {"model.a": tensor, "b": Malicious(mark)}},
        "is to hold names and tensors": {"generator": {"a": tensor, "step": 3}},
        "found .'a'.": {"a": [tensor]},
    }
    for message, held in cases.items():
        torch.save(held, tmp_path / "x.pt")
        assert main(["convert", str(tmp_path / "x.pt"), "--out", str(out)]) == 2
        assert re.search(message, capsys.readouterr().err) and not mark.exists() and not out.exists()
    torch.save(cases["nothing of it was executed"], tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert mark.exists()
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"a": 1}, 2))
    assert main(["convert", str(tmp_path / "x.pt"), "--out", str(out)]) == 2 and not out.exists()


@pytest.mark.parametrize("config", [ModelConfig(), *synthetic.CONFIGS.values()], ids=["19B", *synthetic.CONFIGS])
def test_shapes_tell_the_config(config):
    """All but the settings, and heads where no gates show them."""
    default = ModelConfig().caption_channels
    known = replace(config, caption_channels=default) if config.caption_proj_before_connector else config
    assert formats.from_shapes(anatomy.shapes_of(config), config.num_attention_heads) == known


def test_the_command_line_exports_and_says_what_stays_behind(path, tmp_path, capsys):
    assert main(["export", str(path), "--to", "diffusers", "--out", str(tmp_path / "folder")]) == 0
    assert "vocoder" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "folder")]) == 0
    assert "folder/: diffusers folder" in capsys.readouterr().out
    assert main(["export", str(path), "--to", "diffusers", "--out", str(tmp_path / "folder")]) == 2
    assert "is there already" in capsys.readouterr().err
