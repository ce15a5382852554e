"""Weights in fp8 and blocks in main memory: the same bits, or an error within its bound; a load holds one copy."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import synthetic
import torch
from safetensors.torch import load_file
from torch import nn

from omniforcing_lib.bounce import codecs, sampling
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.files import write_tensors
from omniforcing_lib.flow import noise_like, noised
from omniforcing_lib.layout import AV, PAPER
from omniforcing_lib.ltx2 import checkpoints, low_memory
from omniforcing_lib.rollout import RolloutConfig, join, rollout, seeded_noise
from studies import anatomy

LEVEL = torch.tensor([0.6])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A tiny LTX-2 file."""
    return synthetic.ltx2_file(tmp_path_factory.mktemp("tiny") / "ltx-2.safetensors", dtype=torch.float32)


def velocity(model):
    x, text = (pair.map(lambda part: part.to(model.proj_out.weight.device)) for pair in synthetic.inputs())
    return model(x, AV(LEVEL, LEVEL), text)


def clip(model):
    """Roll three blocks out through the cache."""
    _, text = synthetic.inputs()
    noise = seeded_noise([3], model.proj_out.weight)
    return join(list(rollout(model, RolloutConfig(PAPER, (1000, 757, 0)), text, noise, (4, 4), 7)))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("weights", [None, "fp8"])
def test_an_offloaded_model_gives_the_same_bits(path, weights, guard):
    """Bidirectional and through the cache, twice, so that buffers are used again."""
    kind = {"sinks": PAPER.sinks, "weights": weights}
    whole, parts = checkpoints.load(path, **kind), checkpoints.load(path, offload=True, **kind)
    with guard():
        for use in (velocity, clip, velocity):
            assert all(map(torch.equal, use(whole), use(parts)))


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [None, "fp8"])
@torch.inference_mode()
def test_an_offloaded_model_gives_the_same_bits_on_cuda(path, weights):
    """From pinned memory, the next block's copy beside the computation of this one."""
    whole = checkpoints.load(path, device="cuda", weights=weights)
    parts = checkpoints.load(path, device="cuda", weights=weights, offload=True)
    assert all(map(torch.equal, velocity(whole), velocity(parts)))


def test_an_offloaded_model_keeps_its_blocks_in_main_memory(path):
    """On the device: everything else, and two buffers of a block each that are no part of the model's state."""
    model = checkpoints.load(path, device="meta", offload=True)
    places = {name: tensor.device.type for name, tensor in model.state_dict().items()}
    assert {name for name, place in places.items() if place == "cpu"} == {n for n in places if "blocks." in n}
    assert places.keys() == checkpoints.load(path).state_dict().keys()
    assert [block.attn1.to_q.weight.device.type for block in model.transformer_blocks._buffer_blocks] == [
        "meta",
        "meta",
    ]
    with torch.no_grad():
        assert velocity(model).video.shape == (1, 4, 4, 4, 32)


def test_seats_take_turns(path):
    """While one block runs the next is copied; no block is copied over another that still runs."""
    model = checkpoints.load(path, offload=True)
    with torch.no_grad():
        for block, buffer in zip(model.transformer_blocks._modules.values(), model.transformer_blocks, strict=True):
            assert buffer is not block and torch.equal(buffer.ff.net[2].weight, block.ff.net[2].weight)


def test_gradients_through_offloaded_blocks_are_refused(path):
    with pytest.raises(ValueError, match="offloaded blocks are for inference"):
        velocity(checkpoints.load(path, offload=True))


def test_an_offloaded_student_is_saved_whole(path, tmp_path):
    model = checkpoints.load(path, offload=True)
    again = checkpoints.load(checkpoints.save(model, tmp_path / "again.safetensors", dtype=torch.float32))
    assert same(again, model)


def test_fp8_rounds_within_its_bound():
    """At most max(|w| / 16, m / 458752) for an entry w of a row whose largest is m; rows of zeros stay zero."""
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) ** 5
    weight[3] = 0
    rounded = low_memory.dequantise(*low_memory.quantise(weight), torch.float32)
    bound = torch.maximum(weight.abs() / 16, weight.abs().amax(1, keepdim=True) / 458_752)
    assert ((rounded - weight).abs() <= bound * (1 + 1e-5)).all() and not rounded[3].any()
    assert ((rounded - weight).abs() > bound / 2).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_fp8_layer_is_the_linear_layer_of_its_rounded_weight(dtype):
    generator = torch.Generator().manual_seed(0)
    layer = low_memory.Fp8Linear(24, 40, True, dtype)
    weight, scale = low_memory.quantise(torch.randn(24, 40, generator=generator))
    bias, x = (torch.randn(n, generator=generator).to(dtype) for n in ((24,), (3, 40)))
    layer.load_state_dict({"weight": weight, "weight_scale": scale, "bias": bias}, assign=True)
    exact = nn.functional.linear(x.double(), low_memory.dequantise(weight, scale, torch.float64), bias.double())
    size = x.double().abs() @ low_memory.dequantise(weight, scale, torch.float64).abs().T + bias.double().abs()
    assert ((layer(x).double() - exact).abs() <= 4 * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_scaled_product_is_that_of_rounded_rows(monkeypatch, bias):
    """Against float64 on the same rounded numbers, and within both roundings of the product that was asked for."""
    monkeypatch.setattr(low_memory, "multiplies", lambda *question: True)
    monkeypatch.setattr(low_memory, "linear", lambda *args: pytest.fail("a copy of the weight"))
    generator = torch.Generator().manual_seed(0)
    weight, scale = low_memory.quantise(torch.randn(48, 64, generator=generator))
    layer = low_memory.Fp8Linear(48, 64, bias, torch.bfloat16)
    more = {"bias": torch.randn(48, generator=generator).bfloat16()} if bias else {}
    layer.load_state_dict({"weight": weight, "weight_scale": scale, **more}, assign=True)
    x = (torch.randn(2, 9, 64, generator=generator) ** 3).bfloat16()
    x[0, 3] = 0
    rows, scales = low_memory.rounded_rows(x.flatten(0, 1))
    wide = low_memory.dequantise(weight, scale, torch.float64)
    exact = (rows.double() * scales.double()) @ wide.T + (more["bias"].double() if bias else 0)
    got = layer(x)
    assert got.dtype == torch.bfloat16 and got.shape == (2, 9, 48) and got.isfinite().all()
    assert (got.flatten(0, 1).double() - exact).abs().max() <= 0.01 * exact.abs().max()
    asked = x.flatten(0, 1).double() @ wide.T + (more["bias"].double() if bias else 0)
    bound = x.flatten(0, 1).double().abs() @ wide.abs().T / 16 + 0.01 * asked.abs().max()
    assert ((got.flatten(0, 1).double() - asked).abs() <= bound).all()


@pytest.mark.parametrize(
    ("capability", "dtype", "shape", "expected"),
    [
        ((8, 9), torch.bfloat16, (48, 64), True),
        ((9, 0), torch.bfloat16, (48, 64), True),
        ((8, 6), torch.bfloat16, (48, 64), False),
        ((9, 0), torch.float32, (48, 64), False),
        ((9, 0), torch.bfloat16, (40, 64), False),
        ((9, 0), torch.bfloat16, (48, 72), False),
        (None, torch.bfloat16, (48, 64), False),
    ],
)
def test_fp8_products_are_chosen_by_capability_and_shape(monkeypatch, caplog, capability, dtype, shape, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    low_memory.multiplies.cache_clear()
    with caplog.at_level("INFO", "omniforcing_lib.ltx2.low_memory"):
        assert low_memory.multiplies(torch.device("cuda" if capability else "cpu"), dtype, *shape) == expected
    assert low_memory.PRODUCTS[expected] in caplog.text
    low_memory.multiplies.cache_clear()


def test_fp8_changes_the_blocks_linear_layers_and_nothing_else(path):
    model = checkpoints.load(path, weights="fp8")
    narrow = {name for name, layer in model.named_modules() if isinstance(layer, low_memory.Fp8Linear)}
    wide = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert len(narrow) == 3 * (6 * 4 + 2 * 2) and not any(name.startswith("transformer_blocks.") for name in wide)
    stored = {name: tensor for name, tensor in model.state_dict().items() if tensor.dtype == low_memory.FP8}
    assert stored.keys() == {f"{name}.weight" for name in narrow}
    gated = checkpoints.load(synthetic.ltx2_file(path.with_name("2.3.safetensors"), "2.3"), weights="fp8")
    kept = {name for name, layer in gated.named_modules() if isinstance(layer, nn.Linear) and "blocks." in name}
    assert len(kept) == 3 * 6 and all(name.endswith("to_gate_logits") for name in kept)


@torch.no_grad()
def test_the_shipped_teacher_in_fp8_stays_near_itself():
    """On clips of the world its velocity moves by at most 12 % (rms), and its distance to the truth by a fifth."""
    wide, narrow = checkpoints.load("teacher"), checkpoints.load("teacher", weights="fp8")
    real = sampling.held_out(2, 0, 3)
    latents, text = sampling.encoded(codecs.shipped_codec(), real.clips), TinyText().encode(real.prompts)
    for level in (0.2, 0.5, 0.8):
        sigma = AV(torch.full((2,), level), torch.full((2,), level))
        noise = noise_like(latents, torch.Generator().manual_seed(1))
        x = latents.map(noised, noise, sigma)
        true, exact, rounded = noise.map(torch.sub, latents), wide(x, sigma, text), narrow(x, sigma, text)
        for v, w, r in zip(true, exact, rounded, strict=True):
            assert (r - w).norm() <= 0.12 * w.norm() and (r - v).square().mean() <= 1.2 * (w - v).square().mean()


@torch.no_grad()
def test_fp8_weights_are_stored_as_they_are(path, tmp_path):
    """Reloaded to the bit; read by whoever wants another dtype; refused where the format has no place for scales."""
    narrow = checkpoints.load(path, weights="fp8")
    stored = checkpoints.save(narrow, tmp_path / "fp8.safetensors", dtype=torch.float32)
    again, wide = checkpoints.load(stored, weights="fp8"), checkpoints.load(stored)
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), narrow.state_dict().values(), strict=True)
    )
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(velocity(wide), velocity(narrow), strict=True))
    assert stored.stat().st_size < 0.6 * path.stat().st_size and "F8_E4M3 (84)" in checkpoints.inspect(stored)
    with pytest.raises(ValueError, match="diffusers has no fp8 weights with scales"):
        checkpoints.export(stored, tmp_path / "folder", to="diffusers")


def test_fp8_files_of_others_are_read(path, tmp_path):
    """One scale for a whole weight, none at all, and scales of activations, which nothing here needs."""
    tensors, name = load_file(path), synthetic.PREFIX + "transformer_blocks.0.attn1.to_q"
    weight = tensors[f"{name}.weight"]
    tensors |= {f"{name}.weight": (weight * 64).to(low_memory.FP8), f"{name}.weight_scale": torch.tensor(1 / 64)}
    tensors |= {f"{name}.input_scale": torch.tensor(2.0)}
    other = name.replace("to_q", "to_k")
    tensors[f"{other}.weight"] = tensors[f"{other}.weight"].to(low_memory.FP8)
    metadata = {"config": json.dumps(checkpoints.read(path).metadata["config"])}
    foreign = write_tensors(tmp_path / "fp8.safetensors", tensors, metadata)
    model, narrow = checkpoints.load(foreign), checkpoints.load(foreign, weights="fp8")
    own = model.transformer_blocks[0].attn1
    assert torch.equal(own.to_q.weight, (weight * 64).to(low_memory.FP8).float() / 64)
    assert torch.equal(own.to_k.weight, tensors[f"{other}.weight"].float())
    with torch.no_grad():
        assert velocity(narrow).video.isfinite().all()


PEAK = """
import sys
from pathlib import Path
import torch
from omniforcing_lib.ltx2 import checkpoints
def peak():
    # of this process alone; getrusage remembers its parent
    status = Path("/proc/self/status").read_text().split()
    return 1024 * int(status[status.index("VmHWM:") + 1])
checkpoints.load("teacher", weights="fp8")
before = peak()
model = checkpoints.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]), weights=sys.argv[3] or None)
print((peak() - before) / sum(t.nbytes for t in model.state_dict().values()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [("bfloat16", ""), ("float32", ""), ("bfloat16", "fp8")], ids=" ".join)
def test_a_load_holds_one_copy(kind, big):
    """Peak resident memory of loading 2 GB of bf16 is at most 1.1 x the model, mapped, converted or quantised."""
    out = subprocess.run([sys.executable, "-c", PEAK, big, *kind], capture_output=True, text=True, check=True)
    assert 0.9 <= float(out.stdout) <= 1.1


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """An LTX-2 file of 2 GB in bf16: 18 layers of 1536 and 768."""
    config = replace(
        synthetic.CONFIGS["2.0"],
        num_layers=18,
        num_attention_heads=16,
        attention_head_dim=96,
        cross_attention_dim=1536,
        audio_num_attention_heads=16,
        audio_attention_head_dim=48,
        audio_cross_attention_dim=768,
    )
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in anatomy.shapes_of(config).items()}
    metadata = {"config": json.dumps(synthetic.metadata_of(config))}
    path = tmp_path_factory.mktemp("big") / "big.safetensors"
    yield write_tensors(path, {synthetic.PREFIX + name: tensor for name, tensor in tensors.items()}, metadata)
    path.unlink()
