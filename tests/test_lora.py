"""Laws of LoRA: every spelling gives W + scale · alpha / rank · B A, as diffusers fuses it; the rest is refused."""

from __future__ import annotations

import json

import pytest
import synthetic
import torch
from safetensors.torch import load_file, save_file

from omniforcing_lib.__main__ import main
from omniforcing_lib.ltx2 import checkpoints, formats, low_memory

LAYERS = {
    "patchify_proj": "proj_in",
    "adaln_single.linear": "time_embed.linear",
    "transformer_blocks.0.attn1.to_q": "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.1.audio_attn1.to_out.0": "transformer_blocks.1.audio_attn1.to_out.0",
    "transformer_blocks.2.ff.net.0.proj": "transformer_blocks.2.ff.net.0.proj",
}
"""Some layers, and what diffusers calls them."""
RANK = 3


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def base(request, tmp_path_factory):
    return synthetic.ltx2_file(tmp_path_factory.mktemp("lora") / "x.safetensors", request.param, dtype=torch.float32)


def halves(base, seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Draw A and B of every layer."""
    generator, shapes = torch.Generator().manual_seed(seed), checkpoints.read(base).bare_shapes
    drawn = {}
    for name in LAYERS:
        out, width = shapes[f"{name}.weight"]
        drawn[name] = [torch.randn(shape, generator=generator) * 0.1 for shape in ((RANK, width), (out, RANK))]
    return drawn


def spelled(pairs, prefix="diffusion_model.", names=("lora_A.weight", "lora_B.weight"), rename=str, alpha=None):
    down, up = names
    tensors = {}
    for name, (a, b) in pairs.items():
        layer = prefix + rename(name)
        tensors |= {f"{layer}.{down}": a, f"{layer}.{up}": b}
        tensors |= {f"{layer}.alpha": torch.tensor(float(alpha))} if alpha else {}
    return tensors


def underscored(name: str) -> str:
    return name.replace(".", "_")


KOHYA = ("lora_down.weight", "lora_up.weight")
STYLES = {
    "ltx-trainer and ComfyUI": ({}, {}, 1.0),
    "the whole prefix": ({"prefix": "model.diffusion_model."}, {}, 1.0),
    "raw peft": ({"prefix": "base_model.model."}, {}, 1.0),
    "diffusers": ({"prefix": "transformer.", "rename": LAYERS.get}, {}, 1.0),
    "diffusers with an alpha": (
        {"prefix": "transformer.", "rename": LAYERS.get},
        {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6, "transformer.r": RANK})},
        2.0,
    ),
    "kohya with dots": ({"names": KOHYA, "alpha": 1.5}, {}, 0.5),
    "kohya without": (
        {"prefix": "lora_unet_", "names": KOHYA, "rename": lambda n: n.replace(".", "_"), "alpha": 6},
        {},
        2.0,
    ),
}


@pytest.mark.parametrize("style", STYLES)
def test_every_spelling_adds_the_same_product(style, base, tmp_path):
    how, metadata, ratio = STYLES[style]
    pairs = halves(base)
    save_file(spelled(pairs, **how), tmp_path / "a:b.safetensors", metadata)
    plain = checkpoints.load(base).state_dict()
    for factor in (1.0, -0.5):
        named = f"{tmp_path / 'a:b.safetensors'}" + ("" if factor == 1 else f":{factor}")
        merged = checkpoints.load(base, loras=[named]).state_dict()
        for name, tensor in plain.items():
            a, b = pairs.get(name.removesuffix(".weight"), (torch.zeros(1, 1),) * 2)
            change = factor * ratio * b @ a if name.removesuffix(".weight") in pairs and ".weight" in name else 0
            assert torch.allclose(merged[name], tensor + change, rtol=0, atol=1e-6), name


def test_several_are_added_in_float32_and_rounded_once(base, tmp_path, caplog):
    """Twice as much of one and some of another; in bf16 and in fp8 what is rounded is the sum."""
    pairs = [halves(base, seed) for seed in (0, 1)]
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for file, some in zip(files, pairs, strict=True):
        save_file(spelled(some), file)
    loras = [f"{files[0]}:2", str(files[1])]
    name = "transformer_blocks.0.attn1.to_q"
    plain = load_file(base)[f"{formats.PREFIX}{name}.weight"]
    (a, b), (c, d) = (some[name] for some in pairs)
    expected = plain + 2 * b @ a + d @ c
    bf16 = checkpoints.load(base, dtype=torch.bfloat16, loras=loras).get_submodule(name).weight
    assert torch.equal(bf16, expected.bfloat16())
    fp8 = checkpoints.load(base, weights="fp8", loras=loras).get_submodule(name)
    for found, wanted in zip((fp8.weight, fp8.weight_scale), low_memory.quantise(expected), strict=True):
        assert torch.equal(found.float(), wanted.float())
    assert f"{', '.join(loras)} added to {len(LAYERS)} weights" in caplog.text


def test_the_sum_is_that_of_diffusers(base, tmp_path):
    """peft's adapters in diffusers' transformer, fused by diffusers: the same weights, to rounding."""
    pytest.importorskip("peft")
    from diffusers import LTX2VideoTransformer3DModel

    tensors = spelled(halves(base), prefix="transformer.", rename=LAYERS.get)
    save_file(tensors, tmp_path / "x.safetensors")
    theirs = LTX2VideoTransformer3DModel.from_pretrained(checkpoints.export(base, tmp_path / "folder", to="diffusers"))
    theirs.load_lora_adapter(tensors, prefix="transformer")
    theirs.fuse_lora(lora_scale=0.7)
    theirs.unload_lora()
    ours = checkpoints.load(base, loras=[f"{tmp_path / 'x.safetensors'}:0.7"]).state_dict()
    found = theirs.state_dict()
    assert len(found) == len(ours)
    for name, tensor in ours.items():
        assert torch.allclose(found[formats.DIFFUSERS.stored(name)], tensor, rtol=0, atol=1e-6), name


Q = "diffusion_model.transformer_blocks.0.attn1.to_q."
REFUSED = {
    "DoRA": ({Q + "dora_scale": torch.ones(1)}, {}, rf"is a DoRA \({Q}dora_scale\)"),
    "LoHa": ({Q + "hada_w1_a": torch.ones(1)}, {}, r"is a LoHa \(.*hada_w1_a\)"),
    "LoKr": ({Q + "lokr_w1": torch.ones(1)}, {}, r"is a LoKr \(.*lokr_w1\)"),
    "no such layer": ({Q.replace("0", "7") + "lora_A.weight": torch.ones(1)}, {}, r"blocks\.7\.attn1.* fits no layer"),
    "a text connector": (
        {"connectors.video_text_proj_in.lora_A.weight": torch.ones(1)},
        {},
        "connectors.* fits no layer",
    ),
    "no such part": ({Q + "lora_C.weight": torch.ones(1)}, {}, "lora_C.weight fits no layer"),
    "half of a pair": (
        {"diffusion_model.proj_out.lora_A.weight": torch.ones(3, 2)},
        {},
        "proj_out has down; a LoRA has",
    ),
    "twice": ({Q + "lora_down.weight": torch.ones(1)}, {}, r"lora_(A|down)\.weight are the same"),
    "another shape": ({Q + "lora_A.weight": torch.ones(3, 7)}, {}, r"its LoRA \[\d+, 3\] times \[3, 7\]"),
    "a pattern": ({}, {"lora_adapter_metadata": '{"transformer.alpha_pattern": {"a": 1}}'}, "alpha_pattern"),
    "not finite": ({Q + "lora_B.weight": torch.full((64, 3), torch.nan)}, {}, "not finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_lora_of_this_model_is_refused_by_name(case, tmp_path):
    added, metadata, message = REFUSED[case]
    base = synthetic.ltx2_file(tmp_path / "x.safetensors", "2.3", dtype=torch.float32)
    save_file(spelled(halves(base)) | added, tmp_path / "lora.safetensors", metadata)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(base, loras=[str(tmp_path / "lora.safetensors")])


def test_a_file_without_a_tensor_is_refused(tmp_path):
    base = synthetic.ltx2_file(tmp_path / "x.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match="holds no tensor"):
        checkpoints.load(base, loras=[str(tmp_path / "empty.safetensors")])


def test_a_bad_lora_ends_the_command_before_any_work(tmp_path, capfd):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pt")
    given = ["generate", "--prompt", "a red ball, bell", "--out", str(tmp_path / "x.mp4"), "--lora"]
    for named, message in (("nowhere:0.5", "no LoRA at nowhere: give PATH or PATH:SCALE"), ("x.pt", "is a pickle")):
        assert main([*given, str(tmp_path / named) if named == "x.pt" else named]) == 2
        said = capfd.readouterr()
        assert message in said.err and said.out == ""
