"""What cannot be used: each case has its own word, comes before any work, and leaves nothing behind."""

from __future__ import annotations

import json
import pickle
import re
import struct
from dataclasses import replace

import pytest
import synthetic
import torch
from safetensors.torch import load_file, save_file
from synthetic import PREFIX

from omniforcing_lib import __main__ as cli
from omniforcing_lib import files, options
from omniforcing_lib.bounce import world
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.ltx2.formats import KEYFRAMES
from omniforcing_lib.training import data_recipes, dataset, recipes
from studies import benchmark_export

BIAS, INDEX = PREFIX + "proj_out.bias", "model.safetensors.index.json"
CONFIG = replace(synthetic.CONFIGS["2.0"], num_layers=1)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Bytes of a checkpoint with nothing wrong."""
    path = synthetic.ltx2_file(tmp_path_factory.mktemp("good") / "x.safetensors", config=CONFIG, dtype=torch.float32)
    return path.read_bytes()


def header(edit):
    """Store the file again with its header edited."""

    def damage(path):
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        text = edit(data[8 : 8 + length].decode()).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def field(name, **changes):
    """Edit what the header says of one tensor."""

    def edit(text):
        table = json.loads(text)
        table[name] |= changes
        return json.dumps(table)

    return header(edit)


def tensors(change):
    """Store the file again with its tensors changed."""

    def damage(path):
        metadata, found = checkpoints.read(path).metadata, load_file(path)
        change(found)
        save_file(found, path, {"config": json.dumps(metadata["config"])})

    return damage


def config(change):
    """Store the file again with its config changed."""

    def damage(path):
        parts = checkpoints.read(path).metadata["config"]
        save_file(load_file(path), path, {"config": json.dumps(change(parts) or parts)})

    return damage


def keyframes(width):
    """Store the file again with a keyframe embedding of a width, as LTX-2.5 has one."""

    def damage(path):
        transformer(use_keyframes_abs_pos_embedding=True)(path)
        tensors(lambda t: t.update({PREFIX + KEYFRAMES: torch.zeros(1, width)}))(path)

    return damage


def pickled(name):
    """Leave a pickle where the checkpoint was."""

    def damage(path):
        path.unlink()
        torch.save({"proj_out.bias": torch.zeros(3)}, path.with_name(name))
        return path.with_name(name)

    return damage


def one(name):
    return {name: torch.zeros(2)}


def indexed(weight_map, second="b", *, text=None):
    """Leave an index over shards `1.safetensors`, which holds a, and `2.safetensors`, which holds `second`."""

    def damage(path):
        path.unlink()
        save_file(one("a"), path.with_name("1.safetensors"))
        save_file(one(second), path.with_name("2.safetensors"))
        path.with_name(INDEX).write_text(text or json.dumps({"weight_map": weight_map}))
        return path.parent

    return damage


def diffusers(change):
    """Turn the checkpoint into a diffusers folder with its config changed; None removes the config."""

    def damage(path):
        folder = checkpoints.export(path, path.parent / "folder", to="diffusers")
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").unlink()
        if change is not None:
            (folder / "config.json").write_text(json.dumps(settings | change))
        return folder

    return damage


def transformer(**changes):
    return config(lambda parts: parts["transformer"].update(changes))


CASES = {
    "text": (lambda p: p.write_text("<html>not found</html>"), "22 bytes and claims a header of"),
    "empty": (lambda p: p.write_bytes(b""), "it is empty"),
    "absurd header": (lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()[8:]), "claims a header of 18,446,744"),
    "header cut off": (lambda p: p.write_bytes(p.read_bytes()[:100]), "100 bytes and claims a header"),
    "tensors cut off": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "is cut off or damaged: its tensors end"),
    "header no JSON": (header(lambda t: t[:-1] + "!"), "its JSON is damaged"),
    "a list for a header": (header(lambda t: "[]"), "its JSON is no table"),
    "a name twice": (header(lambda t: t.rstrip()[:-1] + "," + t[1:]), "is there twice"),
    "overlapping": (field(BIAS, data_offsets=[0, 128]), "starts at byte .* expected"),
    "size against shape": (field(BIAS, shape=[31]), "what the header says of .*proj_out.bias cannot be"),
    "negative shape": (field(BIAS, shape=[-32]), "what the header says of .*proj_out.bias cannot be"),
    "no shape": (field(BIAS, shape=None), "what the header says of .*proj_out.bias cannot be"),
    "unknown dtype": (field(BIAS, dtype="F3"), "has dtype 'F3'; known are F64, F32"),
    "pickle .pt": (pickled("model.pt"), "is not a .safetensors file; pickles"),
    "pickle .ckpt": (pickled("model.ckpt"), "is not a .safetensors file; pickles"),
    "pickle .bin": (pickled("model.bin"), "is not a .safetensors file; pickles"),
    "pickle renamed": (pickled("x.safetensors"), "is a pickle whatever its name says"),
    "old pickle renamed": (lambda p: p.write_bytes(pickle.dumps([0] * 99, 2)), "is a pickle whatever its name says"),
    "missing": (tensors(lambda t: t.pop(BIAS)), r"missing: proj_out\.bias"),
    "unexpected": (tensors(lambda t: t.update({PREFIX + "extra": torch.zeros(1)})), "unexpected: extra"),
    "renamed": (tensors(lambda t: t.update({BIAS[:-4] + "bios": t.pop(BIAS)})), r"missing: .*; unexpected: .*bios"),
    "wrong shape": (tensors(lambda t: t.update({BIAS: torch.zeros(7)})), r"proj_out\.bias is \[7\], expected \[32\]"),
    "integers": (tensors(lambda t: t.update({BIAS: t[BIAS].long()})), r"proj_out\.bias is I64, expected one of F64"),
    "one NaN": (tensors(lambda t: t[BIAS][3:4].fill_(torch.nan)), r"proj_out\.bias holds values .* not finite"),
    "one infinity": (tensors(lambda t: t[BIAS][3:4].fill_(torch.inf)), r"proj_out\.bias holds values .* not finite"),
    "NaN throughout": (tensors(lambda t: [x.fill_(torch.nan) for x in t.values()]), "holds values .* not finite"),
    "no config": (lambda p: save_file(load_file(p), p), "no `config` in its metadata"),
    "config no JSON": (lambda p: save_file(load_file(p), p, {"config": "{"}), "is no JSON table"),
    "config of something else": (config(lambda c: {"vae": {}}), "with a `transformer` part"),
    "rope": (transformer(rope_type="spiral"), "rope_type is one of split, interleaved; found 'spiral'"),
    "precision": (transformer(frequencies_precision="int8"), "is one of float64, float32; found 'int8'"),
    "multiplier": (transformer(av_ca_timestep_scale_multiplier="1k"), "is of type int, found '1k'"),
    "layers": (transformer(num_layers=-1), "num_layers is above 0, found -1"),
    "qk norm": (transformer(qk_norm="layer"), "qk_norm is 'layer'; only 'rms_norm'"),
    "keyframes": (tensors(lambda t: t.update({PREFIX + KEYFRAMES: torch.zeros(1, 80)})), "unexpected: " + KEYFRAMES),
    "keyframes of another width": (keyframes(7), rf"{KEYFRAMES} is \[1, 7\], expected \[1, 80\]"),
    "student damaged": (config(lambda c: c.update(omniforcing={"layout": 1})), "its `omniforcing` part is damaged"),
    "unknown names": (lambda p: save_file(one("unet.weight"), p), "no transformer of a known format; .* unet.weight"),
    "no such file": (lambda p: p.with_name("y.safetensors"), "no checkpoint at"),
    "folder with nothing": (lambda p: p.unlink() or p.parent, "one index .* found neither"),
    "folder with two": (lambda p: save_file(one("a"), p.with_name("b.safetensors")) or p.parent, "found b.*, x"),
    "index upwards": (indexed({"a": "../x.safetensors"}), "of its own folder"),
    "index absolute": (indexed({"a": "/etc/x.safetensors"}), "of its own folder"),
    "index to a pickle": (indexed({"a": "1.bin"}), "may only name .safetensors files"),
    "index no JSON": (indexed({}, text="weight_map"), "its JSON is damaged"),
    "index without map": (indexed({}, text='{"weight_map": ["a"]}'), "has no `weight_map`"),
    "missing shard": (indexed({"a": "1.safetensors", "b": "3.safetensors"}), "2 files, missing: 3.safetensors"),
    "key in two shards": (
        indexed({"a": "1.safetensors", "b": "2.safetensors"}, "a"),
        "a is both in 1.safetensors and in 2.safetensors",
    ),
    "key in the other shard": (
        indexed({"a": "2.safetensors", "b": "1.safetensors"}),
        "says that a is in 2.safetensors, but it is not",
    ),
    "diffusers without config": (diffusers(None), "there is no config.json beside them"),
    "diffusers, other class": (
        diffusers({"_class_name": "WanTransformer3DModel"}),
        "describes 'WanTransformer3DModel'",
    ),
    "diffusers, other setting": (diffusers({"causal_offset": 2}), "causal_offset is 2; only 1 is supported"),
    "diffusers, half gated": (diffusers({"audio_gated_attn": True}), "gated_attn and audio_gated_attn differ"),
    "diffusers, unknown rope": (diffusers({"rope_type": "spiral"}), "split, interleaved; found 'spiral'"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_file_has_its_own_word_and_leaves_nothing_behind(case, good, tmp_path):
    damage, message = CASES[case]
    path = tmp_path / "files" / "x.safetensors"
    path.parent.mkdir()
    path.write_bytes(good)
    given = damage(path)
    given = given if hasattr(given, "exists") else path
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for use in (checkpoints.load, lambda given: checkpoints.export(given, tmp_path / "out" / "y.safetensors")):
        with pytest.raises(ValueError, match=message):
            use(given)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "out").exists()


def test_arguments_without_a_meaning_are_refused(good, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(good)
    with pytest.raises(ValueError, match=r"weights is None .* or 'fp8', found 'int4'"):
        checkpoints.load(path, weights="int4")
    with pytest.raises(ValueError, match=r"dtype is one of torch.float32, .* found torch.int8"):
        checkpoints.load(path, dtype=torch.int8)
    with pytest.raises(ValueError, match="one of ltx2, diffusers, found 'gguf'"):
        checkpoints.export(path, tmp_path / "y.safetensors", to="gguf")
    with pytest.raises(ValueError, match=r"ends in .safetensors"):
        checkpoints.export(path, tmp_path / "y.pt")
    with pytest.raises(ValueError, match="is there already"):
        checkpoints.export(path, tmp_path, to="diffusers")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_what_is_not_finite_is_found_on_the_way_to_fp8(value, good, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(good)
    name = PREFIX + "transformer_blocks.0.ff.net.2.weight"
    tensors(lambda t: t[name][3, 7:8].fill_(value))(path)
    with pytest.raises(ValueError, match=r"ff\.net\.2\.weight holds values .* not finite"):
        checkpoints.load(path, weights="fp8")


def test_nan_in_fp8_weights_is_found(good, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(good)
    model = checkpoints.load(path, weights="fp8")
    model.transformer_blocks[0].attn1.to_q.weight.view(torch.uint8)[0, 0] = 0x7F
    broken = checkpoints.save(model, path)
    for weights in (None, "fp8"):
        with pytest.raises(ValueError, match=r"attn1\.to_q\.weight holds values .* not finite"):
            checkpoints.load(broken, weights=weights)


def test_a_checkpoint_is_known_by_what_it_holds(good, tmp_path):
    """By another name, through a link and in another format it is the same; with one number changed it is another."""
    path, other, link = (tmp_path / name for name in ("x.safetensors", "y.safetensors", "blobs-a3f.safetensors"))
    path.write_bytes(good)
    other.write_bytes(good)
    link.symlink_to(path)
    folder = checkpoints.export(path, tmp_path / "folder", to="diffusers")
    first = checkpoints.read(path).fingerprint
    assert all(checkpoints.read(same).fingerprint == first for same in (other, link, folder))
    tensors(lambda t: t[BIAS][3:4].add_(1))(other)
    transformer(av_ca_timestep_scale_multiplier=7)(path)
    assert len({first, checkpoints.read(other).fingerprint, checkpoints.read(path).fingerprint}) == 3


@pytest.fixture
def idle(monkeypatch, tmp_path):
    """Be in an empty folder, where nothing may be loaded or rendered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "load", lambda *a, **k: pytest.fail("a model is loaded"))
    monkeypatch.setattr(data_recipes, "world_clips", lambda *a, **k: pytest.fail("clips are rendered"))
    return tmp_path


TRAIN = {
    "stage3 --steps 0 --batch 0": "--steps: expected a whole number, 1 or more, found 0",
    "stage3 --batch -3": "--batch: expected a whole number, 1 or more, found -3",
    "stage2 --batch 3 --accumulate 2": "a batch of 3 cannot be cut into 1 processes x 2 parts; use a multiple of 2",
    "stage2 --lr nan": "--lr: expected a number above 0, found nan",
    "stage2 --sinks -2": "--sinks: expected a whole number, -1 or more, found -2",
    "stage3 --critic-lr 0": "--critic-lr: expected a number above 0, found 0.0",
    "stage3 --final 1.5": "--final: expected a number, 0 to 1, found 1.5",
    "stage3 --ratio 0": "--ratio: expected a whole number, 1 or more, found 0",
    "stage3 --every 0": "--every: expected a whole number, 1 or more, found 0",
    "stage3 --minutes -1": "--minutes: expected a number, 0 or more, found -1.0",
    "pairs --count 0": "--count: expected a whole number, 1 or more, found 0",
    "pairs --grid 4 0": "--grid is two numbers above 0, found 4 0",
    "pairs --cfg inf 3": "--cfg: expected a number above 0, found inf",
    "pairs --seconds 0": "--seconds: expected a whole number, 1 or more, found 0",
    "pairs --layout papr": "unknown layout 'papr'",
    "teacher --seed 1220": "draws clips that are held out",
    "codec --steps 0": "--steps: expected a whole number, 1 or more, found 0",
    "plan --gpus 0": "--gpus: expected a whole number, 1 or more, found 0",
    "stage3 --step three": "argument --steps: expected a whole number, 1 or more, found 'three'",
    "stage3 --device gpu": "a device is cpu, cuda (one of several: cuda:1) or auto, found 'gpu'",
    "codec --device mps": "a device is cpu, cuda (one of several: cuda:1) or auto, found 'mps'",
    "prompts --device cuda:99": "device 'cuda:99' asked for, but torch",
    "stage3 --replicas 2": "1 processes cannot hold 2 replicas",
    "stage3 --out file/x.safetensors": "file/x.safetensors cannot be written",
    "stage3 --out x.pt": "--out is a .safetensors file, found x.pt",
    "codec --out folder.safetensors": "folder.safetensors is a folder",
    "pairs --out file": "file is a file, expected a folder",
    "stage2 --pairs file/pairs": "file/pairs cannot be written",
    "stage2 --folder file": "file is a file, expected a folder",
    "stage2 --teacher nowhere.safetensors": "no checkpoint at nowhere.safetensors",
    "stage2 --codec nowhere.safetensors": "nowhere.safetensors is neither a file nor a folder of shards",
    "stage3 --prompts nowhere": "nowhere is neither a file nor a folder of shards",
    "stage3 --student teacher": "teacher is no causal student",
    "prompts --lines nowhere": "No such file or directory: 'nowhere'",
    "prompts --lines latin": "latin is no UTF-8 text",
    "prompts --lines empty": "empty: expected a prompt a line, found none",
    "prompts --lines purple": "red, green, blue",
}


@pytest.mark.parametrize("line", TRAIN)
def test_what_training_cannot_do_is_refused_in_one_line_before_any_work(line, idle, capfd):
    (idle / "file").write_text("a file")
    (idle / "folder.safetensors").mkdir()
    (idle / "latin").write_bytes("a red ball, b\xe9ll".encode("latin-1"))
    (idle / "empty").write_text("\ufeff\n \f\n", encoding="utf-8")
    (idle / "purple").write_text("a red ball, bell\n" * 70 + "a purple ball, bell\n")
    before = sorted(idle.rglob("*"))
    try:
        code = cli.main(["train", *line.split()])
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and TRAIN[line] in err
    assert sorted(idle.rglob("*")) == before


def test_prompts_are_the_lines_of_their_file_and_no_other_sign_ends_one(idle, monkeypatch, capsys):
    """A byte-order mark, form feeds and U+2028, from a home that `~` names; both streams share the world's contexts."""
    monkeypatch.setenv("HOME", str(idle))
    text = "\ufeffa red ball, bell\r\n\f a blue\u2028ball, wood\x85\n\na cyan ball,\x0cpluck\n"
    (idle / "lines.txt").write_text(text, encoding="utf-8")
    assert files.read_lines("lines.txt") == ["a red ball, bell", "a blue\u2028ball, wood", "a cyan ball,\x0cpluck"]
    assert cli.main(["train", "prompts", "--lines=~/lines.txt", "--out=~/prompts", "--model", "teacher"]) == 0
    told = dataset.StoredPrompts(idle / "prompts")
    assert told.names == tuple(files.read_lines("lines.txt"))
    plain = TinyText().encode(["a red ball, bell", "a blue ball, wood", "a cyan ball, pluck"], dtype=torch.bfloat16)
    assert all(map(torch.equal, told.take(torch.arange(3)), plain.map(torch.Tensor.float)))
    assert capsys.readouterr().out.strip() == str(idle / "prompts")
    (idle / "lines.txt").write_text("a red ball, bell\ta longer one\n\fa blue ball, wood\n", encoding="utf-8-sig")
    assert benchmark_export.read_prompts("~/lines.txt") == {
        "a red ball, bell": "a longer one",
        "a blue ball, wood": "a blue ball, wood",
    }


def test_contexts_that_only_stand_in_are_not_stored_to_train_on(good, idle):
    (idle / "x.safetensors").write_bytes(good)
    (idle / "lines.txt").write_text("rain falls\n")
    with pytest.raises(ValueError, match=r"no Gemma folder .* name a Gemma folder"):
        recipes.EncodePrompts(out="prompts", lines="lines.txt", model="x.safetensors").run()
    assert not (idle / "prompts").exists()


def test_clips_of_the_world_are_not_trained_under_prompts_in_another_order(idle):
    turned = dataset.store_prompts(idle / "turned", TinyText(), world.prompts()[::-1])
    with pytest.raises(ValueError, match="the world's own prompts, in its order"):
        recipes.TrainTeacher(prompts=str(turned)).run()


def test_the_command_line_offers_every_stage():
    """It lists them by itself, since it answers without torch."""
    (stage,) = (entry for entry, _, _ in options.options_of(cli.Train) if entry.name == "stage")
    assert stage.metadata["choices"] == tuple(recipes.STAGES)


@pytest.mark.parametrize("stage", recipes.STAGES)
def test_every_option_of_training_says_what_it_is_and_its_default(stage, capsys):
    with pytest.raises(SystemExit):
        recipes.main(stage, "--help")
    said = " ".join(capsys.readouterr().out.split("show this help message and exit\n")[1].split())
    parts = re.split(r" (?=--)", said.replace(", --no-", "/--no-"))
    names = {entry.name for entry, _, _ in options.options_of(recipes.STAGES[stage])}
    assert {re.match(r"--([a-z0-9-]+)", part)[1].replace("-", "_") for part in parts} == names
    assert all(re.search(r"[a-z]{2} .*\(default:? .+\)$", part) for part in parts), parts
