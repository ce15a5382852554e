"""Compiled blocks and recorded passes give what the plain model gives; what can't be recorded is just called."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from test_transformer import TINY, inputs, tiny

from omniforcing_lib import backends, fused, graphs, masks, model_bundle
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.graphs import Captured, Recorded
from omniforcing_lib.layout import AV, BlockLayout
from omniforcing_lib.ltx2 import low_memory
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.stream import Streamer, captured

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
        buffers = self.piece.__self__._recording
        cache = buffers.cache()
        prompts = [t for layer in cache.layers for stream in layer for pair in stream.text.held.values() for t in pair]
        tensors = [
            *buffers.x,
            *buffers.write,
            *graphs._tables(buffers.ropes),
            *prompts,
            *(t for n, t in cache.tensors().items() if not n.endswith("anchor")),
        ]
        where = [tensor.data_ptr() for tensor in tensors]
        assert self.places.setdefault("all", where) == where
        self.runs.append(key)
        return self.piece(generator, *key)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(backends, "GPU", "cpu")
    monkeypatch.setattr(fused, "compiled", lambda plain: plain)
    monkeypatch.setattr(graphs, "Recorded", Replayer)
    monkeypatch.setattr(Replayer, "made", [])


def build(dtype=torch.float32):
    config = {"in_channels": 6, "out_channels": 6, "caption_channels": 8}
    return tiny(replace(TINY.with_sinks(3), **config), dtype=dtype).requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return build()


def streamer(model, **changes):
    codec = model_bundle.StandInCodec(model.config, (2, 2))
    return Streamer(model, replace(CAUSAL, **changes), codec, TinyText(**WORDS), PROMPTS[0], seed=3, capture=False)


def stream(model, blocks, switch=None, text=None, **changes):
    live, chunks = streamer(model, **changes), []
    for k in range(blocks):
        if k == switch:
            live.text = text or live.text
            live.set_prompt(PROMPTS[1])
        chunks.append(live.step())
    return chunks


def same(a, b):
    return all(
        (x.frames == y.frames).all() and abs(x.samples - y.samples).max() < 1e-5 for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("switch", [None, 7], ids=["one prompt", "another prompt"])
def test_a_recorded_stream_is_the_stream(gpu, model, switch):
    """Rotations, places in the ring, latents and prompt reach the recorded pass; pinned keys rotate outside of it."""
    assert same(stream(Captured(model), 10, switch), stream(model, 10, switch))
    assert len(Replayer.made) == 1
    assert len(set(Replayer.made[0].runs)) == len(CAUSAL.steps)


def test_a_longer_prompt_is_recorded_anew(gpu, model):
    longer = TinyText(channels=8, length=5)
    assert same(stream(Captured(model), 10, 7, longer), stream(model, 10, 7, longer))
    assert len(Replayer.made) == 2


def test_a_half_precision_stream_is_recorded_once(gpu):
    """The first step's latents are bfloat16 and the later ones float32; the recorded pass reads one of them."""
    half = build(torch.bfloat16)
    assert same(stream(Captured(half), 8), stream(half, 8))
    # every pass from block 3 on: three steps of five blocks, and the storing of four
    assert len(Replayer.made) == 1 and len(Replayer.made[0].runs) == 3 * 5 + 4


def test_buffers_go_with_the_cache_of_a_closed_stream(gpu, model):
    captured = Captured(model)
    with streamer(captured) as live:
        for _ in range(CAUSAL.window + 3):
            live.step()
        cache = weakref.ref(live._cache)
        assert captured._recording.cache() is cache() is not None
    assert cache() is None and captured._recording is None


def test_a_stream_on_a_gpu_is_recorded_unless_it_is_told_not_to(gpu, model):
    """By default; blocks that are elsewhere than the GPU are copied while a pass runs, which no graph can hold."""
    live = streamer(model)
    assert live.model is model and isinstance(replace(live, capture=True).model, Captured)
    parts = low_memory.offload(build(), "meta", pinned=False)
    backends.GPU = "meta"
    assert captured(parts) is parts and isinstance(captured(build().to("meta")), Captured)


def test_the_first_blocks_are_not_recorded(gpu, model):
    stream(Captured(model), CAUSAL.window + 1)
    assert not Replayer.made


def test_a_pass_over_two_blocks_is_called_and_those_over_one_are_recorded(gpu, model):
    """From block 3 on each block is remembered in the next one's first step; two steps of each are left to record."""
    assert same(stream(Captured(model), 8, context_pass="fused"), stream(model, 8, context_pass="fused"))
    assert len(Replayer.made) == 1 and len(Replayer.made[0].runs) == 2 * 5


def test_a_stale_buffer_would_be_seen(gpu, model, monkeypatch):
    fill = graphs.Buffers.fill

    def once(self, x, ropes, block):
        if not hasattr(self, "block"):
            fill(self, x, ropes, block)

    monkeypatch.setattr(graphs.Buffers, "fill", once)
    assert not same(stream(Captured(model), 6), stream(model, 6))


def test_on_a_cpu_the_model_is_called(model, monkeypatch):
    monkeypatch.setattr(graphs, "Recorded", lambda *a, **k: pytest.fail("recorded on a CPU"))
    captured = Captured(model)
    assert same(stream(captured, 5), stream(model, 5))
    assert captured.proj_out.weight is model.proj_out.weight


class FakeCuda:
    """Stand in for `torch.cuda` with two devices: note where work is put, and under which mode it is captured."""

    def __init__(self):
        self.current, self.captures, self.replays, self.pools = "cuda:0", [], 0, []

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, str(device)
        yield
        self.current = before

    def stream_on(self, device=None):
        return SimpleNamespace(device=str(device or self.current), wait_stream=lambda other: None)

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        self.pools.append(pool)
        self.captures.append((stream and stream.device, self.current, capture_error_mode))
        yield

    def make_graph(self):
        return SimpleNamespace(register_generator_state=lambda generator: None, replay=self.replay)

    def replay(self):
        assert self.current == "cuda:1"
        self.replays += 1


class FakeGenerator:
    def __init__(self, device):
        self.device, self.seed = torch.device(device), 0

    def manual_seed(self, seed):
        self.seed = seed
        return self

    def initial_seed(self):
        return self.seed


def test_a_piece_is_captured_on_its_own_device_and_other_threads_may_go_on(monkeypatch):
    """Stream, graph and replay are those of the generator's device, whichever is current."""
    cuda, seen = FakeCuda(), []
    monkeypatch.setattr(torch.cuda, "device", cuda.device)
    monkeypatch.setattr(torch.cuda, "Stream", cuda.stream_on)
    monkeypatch.setattr(torch.cuda, "current_stream", cuda.stream_on)
    monkeypatch.setattr(torch.cuda, "graph", cuda.graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", cuda.make_graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: seen.append(stream.device) or contextlib.nullcontext())
    monkeypatch.setattr(torch, "Generator", FakeGenerator)
    piece = Recorded(lambda generator, key: {"out": torch.tensor(key)}, warm=2)
    for _ in range(4):
        for key in (7, 8):
            assert piece(FakeGenerator("cuda:1"), key)["out"] == key
    assert seen == ["cuda:1"] * 4
    assert cuda.captures == [("cuda:1", "cuda:1", "thread_local")] * 2
    assert cuda.replays == 4 and cuda.current == "cuda:0"
    first, second = cuda.pools
    assert first is second is not None


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_are_the_blocks(backend):
    torch._dynamo.reset()
    layout = BlockLayout(AV(1, 1), AV(2, 5), sinks=3)
    plain, compiled = tiny(TINY.with_sinks(3)), tiny(TINY.with_sinks(3))
    x, sigma, text = inputs(layout, 5)
    kind = masks.build(layout, 5, 4)
    graphs.compile_blocks(compiled, backend=backend)
    for how in ({}, {"masks": kind})[: 1 if backend == "eager" else 2]:
        for ours, expected in zip(compiled(x, sigma, text, **how), plain(x, sigma, text, **how), strict=True):
            assert (ours - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
