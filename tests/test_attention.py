"""Which kernel attends, and that each of them gives what PyTorch's own attention gives."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from omniforcing_lib import attention, backends, masks
from omniforcing_lib.backends import Choice, Kind
from omniforcing_lib.layout import AV, BlockLayout
from omniforcing_lib.masks import AttentionMask

HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def fresh():
    backends._answer.cache_clear()
    backends.flash_function.cache_clear()
    yield
    backends.flash_function.cache_clear()
    backends.use("auto")


@pytest.fixture
def installed(monkeypatch):
    """Both flash-attn packages are there."""
    monkeypatch.setattr(backends, "find_spec", lambda name: name in ("flash_attn", "flash_attn_interface"))
    monkeypatch.setattr(backends, "import_module", lambda name: SimpleNamespace(flash_attn_func=fake_flash_attn_func))


def fake_flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """Take what flash-attn takes and nothing else: half precision, [B, T, H, D], one head dim, contiguous in it."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in backends.HALF
    assert q.ndim == 4 and k.shape == v.shape and q.shape[2:] == k.shape[2:] and not causal
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=softmax_scale).transpose(1, 2)


def draw(*shapes, dtype=BF16, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_(requires_grad) for s in shapes]


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("auto", Kind("cpu", None, FP32, 40), Choice("sdpa", "sliced")),
        ("auto", Kind("cuda", HOPPER, BF16, 128), Choice("flash", "flex")),
        ("auto", Kind("cuda", AMPERE, BF16, 64), Choice("flash", "flex")),
        ("auto", Kind("cuda", TURING, torch.float16, 64), Choice("sdpa", "flex")),
        ("auto", Kind("cuda", HOPPER, FP32, 128), Choice("sdpa", "flex")),
        ("auto", Kind("cuda", HOPPER, FP64, 128), Choice("sdpa", "sliced")),
        ("auto", Kind("cuda", HOPPER, BF16, 40), Choice("flash", "sliced")),
        ("auto", Kind("cuda", HOPPER, BF16, 20), Choice("sdpa", "sliced")),
        ("flash", Kind("cuda", HOPPER, BF16, 128), Choice("flash", "sliced")),
        ("flex", Kind("cuda", HOPPER, BF16, 128), Choice("sdpa", "flex")),
        ("sdpa", Kind("cuda", HOPPER, BF16, 128), Choice("sdpa", "sliced")),
    ],
    ids=str,
)
def test_a_choice_follows_what_the_device_can_do(installed, name, kind, expected):
    assert backends.choose(name, kind) == expected


def test_without_the_package_pytorch_attends(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert backends.choose("auto", Kind("cuda", HOPPER, BF16, 128)).plain == "sdpa"


@pytest.mark.parametrize(
    ("found", "error"),
    [(SimpleNamespace(), None), (None, ImportError("undefined symbol")), (None, OSError("libcudart"))],
)
def test_a_flash_attn_that_does_not_work_is_passed_over(installed, monkeypatch, caplog, found, error):
    """An empty folder of that name, or one built for another PyTorch: `auto` attends by PyTorch, and says why."""

    def load(name):
        if error:
            raise error
        return found

    monkeypatch.setattr(backends, "import_module", load)
    assert backends.choose("auto", Kind("cuda", AMPERE, BF16, 128)).plain == "sdpa"
    assert "flash_attn is installed and cannot be used" in caplog.text
    with pytest.raises(ValueError, match="none that works"):
        backends.choose("flash", Kind("cuda", AMPERE, BF16, 128))


def test_hopper_takes_flash_attn_3_and_others_2(installed):
    assert backends.flash_module(HOPPER) == "flash_attn_interface"
    assert backends.flash_module(AMPERE) == backends.flash_module((10, 0)) == "flash_attn"


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("flash", Kind("cpu", None, BF16, 64), "needs a CUDA device"),
        ("flex", Kind("cpu", None, FP32, 64), "needs a CUDA device"),
        ("flash", Kind("cuda", HOPPER, FP32, 128), r"float32, head dim 128: it takes float16 and bfloat16 only"),
        ("flash", Kind("cuda", HOPPER, BF16, 20), "multiples of 8"),
        ("flash", Kind("cuda", TURING, BF16, 64), "compute capability 8.0"),
        ("flash", Kind("cuda", HOPPER, BF16, 64), "no flash-attn is installed"),
        ("flex", Kind("cuda", HOPPER, BF16, 40), "head dims 16, 32, 64"),
    ],
)
def test_an_impossible_choice_is_refused_with_the_reason(monkeypatch, name, kind, reason):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"backend '{name}' can't serve .*{reason}.*sdpa or auto"):
        backends.choose(name, kind)


def test_a_named_backend_is_met_where_attention_is(monkeypatch):
    with pytest.raises(ValueError, match="one of auto, sdpa, flash, flex; found 'xformers'"):
        backends.use("xformers")
    q, k, v = draw((1, 2, 3, 8), (1, 2, 5, 8), (1, 2, 5, 8), dtype=FP32)
    backends.use("flash")
    with pytest.raises(ValueError, match="needs a CUDA device"):
        attention.attend(q, k, v)
    backends.use("sdpa")
    assert torch.equal(attention.attend(q, k, v), scaled_dot_product_attention(q, k, v))


def test_a_choice_is_logged_once_a_kind(caplog):
    q, k, v = draw((1, 2, 3, 8), (1, 2, 5, 8), (1, 2, 5, 8), dtype=FP32)
    with caplog.at_level(logging.INFO, "omniforcing_lib.backends"):
        for _ in range(3):
            attention.attend(q, k, v)
    said = "attention on cpu, float32, head dim 8: sdpa without a mask, sliced with one (asked for: auto)"
    assert caplog.messages == [said]


@pytest.mark.parametrize("returns", [lambda out: out, lambda out: (out, None)], ids=["2", "early 3"])
def test_flash_attn_gets_its_layout_and_gives_ours(monkeypatch, returns):
    monkeypatch.setitem(backends._flash, None, lambda *x: returns(fake_flash_attn_func(*x)))
    q, k, v = draw((2, 3, 4, 16), (2, 3, 7, 16), (2, 3, 7, 16))
    expected = scaled_dot_product_attention(q, k, v)
    found = backends.flash(q, k, v)
    assert found.shape == expected.shape and found.dtype == BF16
    assert torch.allclose(found, expected, atol=1e-2)


def test_under_autocast_flash_attn_gets_half_precision(monkeypatch):
    monkeypatch.setitem(backends._flash, None, fake_flash_attn_func)
    q, k, v = draw((1, 2, 4, 16), (1, 2, 7, 16), (1, 2, 7, 16), dtype=FP32)
    with torch.autocast("cpu", BF16):
        assert backends.computed_in(q) == BF16 and backends.flash(q, k, v).dtype == BF16
    assert backends.computed_in(q) == FP32


@pytest.mark.parametrize("window", [None, 1])
def test_sliced_training_through_flash_attn_is_masked_training(monkeypatch, window):
    """Outputs and gradients of one unmasked call a block equal those under the dense mask."""
    monkeypatch.setitem(backends._flash, None, fake_flash_attn_func)
    monkeypatch.setattr(backends, "chosen", lambda q: Choice("flash", "sliced"))
    layout = BlockLayout(AV(1, 1), AV(2, 5), sinks=3)
    mask = masks.build(layout, 8, 4, window=window).a2v
    q, k, v = draw((1, 2, mask.rows, 16), *[(1, 2, mask.columns, 16)] * 2, requires_grad=True)
    grads = []
    for visibility in (mask, AttentionMask(mask.by_block, mask.columns, "dense")):
        out = attention.attend(q, k, v, visibility)
        grads.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    for ours, reference in zip(*grads, strict=True):
        assert (ours - reference).abs().max() <= 0.02 * reference.abs().max()


def test_a_flex_mask_is_made_once_a_device():
    mask = masks.build(BlockLayout(AV(1, 1), AV(2, 5), sinks=3), 8, 4).video_self
    assert masks.block_mask(mask, "cpu") is masks.block_mask(mask, torch.device("cpu"))


def test_the_choice_of_a_kernel_is_a_constant_to_the_compiler():
    mask = masks.build(BlockLayout(AV(1, 1), AV(2, 5), sinks=3), 8, 4).audio_self
    q, k, v = draw(*[(1, 2, mask.rows, 16)] * 3, dtype=FP32)
    compiled = torch.compile(attention.attend, fullgraph=True, backend="eager")
    for visibility in (None, mask):
        assert torch.allclose(compiled(q, k, v, visibility), attention.attend(q, k, v, visibility), atol=1e-6)


def test_a_function_is_compiled_for_more_kinds_of_input_than_eight():
    """Torch would run the ninth uncompiled; a third clip length would then hold whole score matrices."""
    compiles = []

    def backend(graph, inputs):
        compiles.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    function = backends.many_kinds(torch.compile(lambda x: x + 1, backend=backend, dynamic=False))
    for n in range(1, 14):
        function(torch.ones(n))
    torch._dynamo.reset()
    assert len(compiles) == 13
