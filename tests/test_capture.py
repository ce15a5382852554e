"""Compiled blocks and recorded passes give what the plain model gives; what can't be recorded is just called."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from test_transformer import TINY, inputs, tiny

from omniforcing_lib import capture, masks, model_bundle
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.capture import Captured
from omniforcing_lib.layout import AV, BlockLayout
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.stream import Streamer

LAYOUT = BlockLayout(AV(1, 1), AV(3, 25), sinks=3)
CAUSAL = RolloutConfig(LAYOUT, window=2)
PROMPTS = ("a red ball, bell", "a blue ball, wood")
WORDS = {"channels": 8, "length": 4}


class Replayer:
    """Stand in for CUDA graphs on a CPU: run the piece, and insist that what it reads lies where it lay before."""

    made: ClassVar[list] = []

    def __init__(self, piece, warm):
        self.piece, self.runs, self.places = piece, [], {}
        Replayer.made.append(self)

    def __call__(self, generator, *key):
        held = self.piece.func.__self__._held
        tensors = [
            *held.x,
            *held.at,
            *capture._tables(held.ropes),
            *(t for n, t in held.cache.tensors().items() if not n.endswith("anchor")),
        ]
        where = [tensor.data_ptr() for tensor in tensors]
        assert self.places.setdefault("all", where) == where
        self.runs.append(key)
        return self.piece(generator, *key)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(capture, "on_gpu", lambda x: True)
    monkeypatch.setattr(capture, "Recorded", Replayer)
    monkeypatch.setattr(Replayer, "made", [])


@pytest.fixture(scope="module")
def model():
    config = {"in_channels": 6, "out_channels": 6, "caption_channels": 8}
    return tiny(replace(TINY.with_sinks(3), **config), dtype=torch.float32).requires_grad_(False)


def stream(model, blocks, switch=None):
    codec = model_bundle.StandInCodec(model.config, (2, 2))
    live, chunks = Streamer(model, CAUSAL, codec, TinyText(**WORDS), PROMPTS[0], seed=3), []
    for k in range(blocks):
        if k == switch:
            live.set_prompt(PROMPTS[1])
        chunks.append(live.step())
    return chunks


def same(a, b):
    return all(
        (x.frames == y.frames).all() and abs(x.samples - y.samples).max() < 1e-5 for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("switch", [None, 7], ids=["one prompt", "another prompt"])
def test_a_recorded_stream_is_the_stream(gpu, model, switch):
    """Rotations, places in the ring and latents reach the recorded pass; anchors turn outside of it."""
    assert same(stream(Captured(model), 10, switch), stream(model, 10, switch))
    assert len(Replayer.made) == (1 if switch is None else 2)
    assert all(len(set(recorder.runs)) == len(CAUSAL.steps) for recorder in Replayer.made)


def test_the_first_blocks_are_not_recorded(gpu, model):
    stream(Captured(model), CAUSAL.window + 1)
    assert not Replayer.made


def test_a_stale_buffer_would_be_seen(gpu, model, monkeypatch):
    monkeypatch.setattr(capture.Buffers, "fill", lambda self, x, ropes, cache: None)
    assert not same(stream(Captured(model), 6), stream(model, 6))


def test_on_a_cpu_the_model_is_called(model, monkeypatch):
    monkeypatch.setattr(capture, "Recorded", lambda *a, **k: pytest.fail("recorded on a CPU"))
    captured = Captured(model)
    assert same(stream(captured, 5), stream(model, 5))
    assert captured.proj_out.weight is model.proj_out.weight


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_are_the_blocks(backend):
    torch._dynamo.reset()
    layout = BlockLayout(AV(1, 1), AV(2, 5), sinks=3)
    plain, compiled = tiny(TINY.with_sinks(3)), tiny(TINY.with_sinks(3))
    x, sigma, text = inputs(layout, 5)
    kind = masks.build(layout, 5, 4)
    capture.compile_blocks(compiled, backend=backend)
    for how in ({}, {"masks": kind})[: 1 if backend == "eager" else 2]:
        for ours, expected in zip(compiled(x, sigma, text, **how), plain(x, sigma, text, **how), strict=True):
            assert (ours - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
