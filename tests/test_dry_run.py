"""The 19B at full size without a GPU: nothing waits for the host; launches, bytes and memory are counted."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from test_graphs import CAUSAL, TINY, build, same, stream
from test_transformer import inputs, tiny
from torch.nn.functional import linear, rms_norm

from omniforcing_lib import backends, blocks, fused, masks, rope
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.flow import LTX2_GUIDANCE
from omniforcing_lib.layout import AV
from omniforcing_lib.rollout import RolloutConfig
from studies import cost, dry_run, gpu_bench

PAPER, FULL = RolloutConfig(), ModelConfig().with_sinks(16)
ONE = replace(FULL, num_layers=1)
TOKENS = dry_run.GRID[0] * dry_run.GRID[1]


@pytest.fixture(scope="module")
def full():
    """A stream of all 48 layers at 512 x 768 in bf16."""
    return dry_run.stream_pass(dry_run.model_of(FULL), PAPER)


def test_a_pass_launches_fewer_than_2500_kernels(full):
    assert full.steady.kernels.total() < 2500 and full.first.kernels.total() < 2800


def test_the_prediction_counts_the_elementwise_work_of_all_layers(full):
    assert gpu_bench.elementwise() == full.steady.elementwise()


def test_a_fused_pass_moves_a_third_of_the_elementwise_bytes():
    """Against the same pass with a kernel for each operation; layers are alike, so two of them tell."""
    two = dry_run.model_of(replace(FULL, num_layers=2))
    plain, fused_ = (dry_run.stream_pass(two, PAPER, fuse=fuse).steady for fuse in (False, True))
    assert fused_.elementwise()[1] < plain.elementwise()[1] * 0.35
    assert plain.kernels.total() > 2 * fused_.kernels.total() and plain.flops == fused_.flops


def test_gates_of_heads_are_one_kernel_of_each_attention():
    """In LTX-2.3: six attentions a layer."""
    kernels = [
        dry_run.stream_pass(dry_run.model_of(replace(ONE, apply_gated_attention=gated)), PAPER).steady.elementwise()[0]
        for gated in (False, True)
    ]
    assert kernels[1] == kernels[0] + 6


def test_products_are_those_that_cost_counts(full):
    step = PAPER.layout.step
    queries = AV(TOKENS * step.video, step.audio)
    work = cost.pass_work(FULL, queries, cost.seen(PAPER, TOKENS, PAPER.window + 2), dry_run.TEXT)
    attention = full.steady.flops["_scaled_dot_product_flash_attention"]
    assert attention == work.attention and full.steady.flops.total() - attention == work.linear


def test_memory_is_what_cost_tables(full):
    assert full.rings == cost.cache_bytes(FULL, PAPER, TOKENS) and full.weights == 2 * cost.parameters(FULL)
    assert cost.stream_memory(FULL, PAPER) == pytest.approx(
        {
            "weights": full.weights,
            "cache": full.rings,
            "text keys": full.text,
            "anchors and tables": full.anchors + full.tables,
            "working": full.first.peak,
        },
        rel=1e-3,
    )


def test_the_masked_pass_and_the_teacher_mix_no_devices():
    """All layers; products in bf16, and four passes of guidance."""
    masked = dry_run.masked_pass(dry_run.model_of(FULL), PAPER, 5)
    teacher = dry_run.teacher_step(dry_run.model_of(ModelConfig()), LTX2_GUIDANCE, 5)
    assert teacher.flops.total() > 3.5 * masked.flops.total() > 0


def test_decoders_run_without_the_host():
    ledger, _ = dry_run.decoding(dry_run.decoders(), PAPER, 3)[-1]
    assert ledger.kernels["convolution"] > 100
    # 37 TFLOP where the overlap is decoded again, 11 for the three new latents alone
    assert 11e12 < ledger.flops.total() < 20e12


def on_host(model, latents, grid, sinks):
    return rope.tables(model.config, model.clock, latents, grid, sinks, torch.device("cpu"))


@pytest.mark.parametrize(
    ("gelu", "says"),
    [
        (lambda x, **how: x + torch.ones(1), "add touches|ones touches"),
        (lambda x, **how: x * x.amax().item(), "asks the GPU for a value"),
        (lambda x, **how: x + x.nonzero().shape[0], "asks the GPU for a value"),
        (lambda x, **how: x + x.cpu().to(x.device), "touches a tensor of the host"),
        (lambda x, **how: linear(x.float(), x.new_ones(8, x.shape[-1]).float()), "multiplies in torch.float32"),
    ],
    ids=["a tensor of the host", "item", "nonzero", "a copy to the host", "a product in fp32"],
)
def test_a_planted_fault_is_seen(monkeypatch, gelu, says):
    model = dry_run.model_of(ONE)
    dry_run.stream_pass(model, PAPER, grid=(2, 3), text=8)
    monkeypatch.setattr(blocks, "gelu", gelu)
    with pytest.raises(dry_run.HostWork, match=says):
        dry_run.masked_pass(model, PAPER, 1, grid=(2, 3))


def test_tables_from_the_host_and_a_kept_tensor_are_seen(monkeypatch):
    model = dry_run.model_of(replace(FULL, num_layers=2))
    good = dry_run.stream_pass(model, PAPER)
    kept, gelu = [], blocks.gelu
    monkeypatch.setattr(blocks, "gelu", lambda x, **how: kept.append(gelu(x, **how)) or kept[-1])
    assert dry_run.stream_pass(model, PAPER).steady.peak > good.steady.peak
    monkeypatch.setattr(type(model), "rotations", on_host)
    with pytest.raises(RuntimeError, match=r"touches a tensor of the host|not on the expected device"):
        dry_run.stream_pass(model, PAPER)


def draw(*shape):
    return torch.randn(shape, dtype=torch.bfloat16)


def fused_calls(kind):
    """Give each fused function with inputs of a kind: one or more groups of sigma, either RoPE."""
    x, vectors = draw(1, 12, 64), [draw(1, 3 if kind == "groups" else 1, 64) for _ in range(5)]
    rotation, ring = (
        rope.Rotation(torch.randn(2, 12, 16), torch.randn(2, 12, 16)),
        [draw(1, 2, 40, 32), draw(1, 2, 40, 32)],
    )
    weights, rope_type = (draw(64), draw(64)), "interleaved" if kind == "interleaved" else "split"
    pairs = [tuple(vectors[:2]), tuple(vectors[2:4])]
    store = (weights, 1e-6, rotation, rope_type, ring, torch.arange(12))
    yield fused.residual, (x, None, None, pairs[:1], 1e-6)
    yield fused.residual, (x, draw(1, 12, 64), None, [None], 1e-6)
    yield fused.residual, (x, draw(1, 12, 64), vectors[4], pairs, 1e-6)
    yield fused.residual, (x, draw(1, 12, 64), vectors[4], [], 1e-6)
    yield fused.normed_heads, (x, weights[0], 2, 1e-6, rotation, rope_type)
    yield fused.normed_heads, (x, weights[0], 2, 1e-6, None, rope_type)
    yield fused.stored, (x, draw(1, 12, 64), draw(1, 12, 64), *store)
    yield fused.stored, (x, draw(1, 12, 64), None, *store)
    yield fused.gated_heads, (draw(1, 12, 2, 32).transpose(1, 2), draw(1, 12, 2))
    yield fused.rotated_to, (draw(1, 2, 12, 32), rotation, rope_type, ring[0][:, :, :12])


class Scheduled(Exception):
    """Carries the number of kernels."""


@pytest.mark.parametrize("kind", ["one level", "groups", "interleaved"])
@torch.no_grad()
def test_the_compiler_makes_one_kernel_of_each_fused_function(monkeypatch, kind):
    """Asked of the scheduler that it has for GPUs; nothing is generated, and no GPU and no Triton is needed."""
    import torch._inductor.config
    import torch._inductor.ir as ir
    import torch._inductor.scheduler as scheduler

    def count(self):
        raise Scheduled(sum("Nop" not in type(node).__name__ for node in self.nodes))

    monkeypatch.setattr(scheduler.Scheduler, "codegen", count)
    monkeypatch.setattr(scheduler, "has_triton", lambda *device: True)
    monkeypatch.setattr(ir, "is_cpu", lambda data: False)  # its limits for a GPU
    torch._dynamo.reset()
    with torch._inductor.config.patch(cpu_backend="triton", fx_graph_cache=False):
        for function, args in fused_calls(kind):
            with pytest.raises(Exception, match=r"Scheduled: 1\b"):
                fused.compiled.__wrapped__(function)(*args)
        unfused = lambda x, y: x @ y + rms_norm(x, x.shape[-1:])  # noqa: E731
        with pytest.raises(Exception, match=r"Scheduled: [23]\b"):
            torch.compile(unfused, dynamic=False)(draw(64, 64), draw(64, 64))
    torch._dynamo.reset()


@pytest.fixture
def fusing(monkeypatch):
    """Fuse on a CPU as a GPU would, but for the code that the compiler generates; give the names of what ran fused."""
    ran = set()

    @functools.cache
    def compiled(function):
        fast = backends.many_kinds(torch.compile(function, backend="eager", dynamic=False))

        def call(*args):
            ran.add(function.__name__)
            return fast(*args)

        return call

    monkeypatch.setattr(backends, "GPU", "cpu")
    monkeypatch.setattr(fused, "compiled", compiled)
    torch._dynamo.reset()
    yield ran
    torch._dynamo.reset()


def test_a_fused_stream_is_the_stream(fusing, monkeypatch):
    """Block 0 with its sinks, a window that fills and moves, keys that follow it."""
    from omniforcing_lib import graphs

    monkeypatch.setattr(graphs, "steady", lambda *args: False)
    made = stream(build(), 6)
    assert fusing == {"residual", "normed_heads", "stored", "rotated_to"}
    monkeypatch.undo()
    assert same(made, stream(build(), 6))


def test_a_fused_masked_pass_is_the_masked_pass(fusing, monkeypatch):
    layout = CAUSAL.layout
    model, (x, sigma, text) = tiny(TINY.with_sinks(3)), inputs(layout, 5)
    built = masks.build(layout, 5, 4)
    with torch.no_grad():
        ours = model(x, sigma, text, masks=built)
    assert fusing
    plain = model(x, sigma, text, masks=built)  # with gradients nothing is fused
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()
