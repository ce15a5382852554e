"""How a finished block is stored: a fused pass equals a separate one; a restarted cache equals a short clip."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_transformer import GRID, TINY, distance, inputs, tiny

from omniforcing_lib import backends
from omniforcing_lib.cache import KVCache, OpenBlock
from omniforcing_lib.layout import AV, PAPER, RELEASED, BlockLayout
from omniforcing_lib.rollout import (
    CONTEXT_PASSES,
    RolloutConfig,
    denoise_block,
    join,
    new_cache,
    next_block,
    recache_window,
    rollout,
    seeded_noise,
    update_cache,
)

SHORT = BlockLayout(AV(2, 5), AV(2, 5), sinks=3)
LAYOUTS = {"paper": PAPER, "released": RELEASED, "block 0 as long as the others": SHORT}


def rolled(causal: RolloutConfig, blocks: int, dtype: torch.dtype = torch.float64, **rest) -> AV:
    """Roll the tiny model out."""
    model = tiny(TINY.with_sinks(causal.layout.sinks), dtype=dtype)
    text = inputs(causal.layout, causal.layout.first.video, dtype=dtype)[2]
    latents = causal.layout.block(blocks - 1).video.stop - 1
    return join(list(rollout(model, causal, text, seeded_noise([0], text.video), GRID, latents, **rest)))


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kind", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("window", [0, 2, 9])
def test_merged_equals_a_pass_of_its_own(layout, kind, window):
    """Two blocks in one call, each at its own sigma: the same latents, past the window, the last block partial."""
    causal = RolloutConfig(layout, steps=(1000, 500, 0), window=window, context_noise=0.1 if window else 0.0)
    own = rolled(causal, 6, kind[0])
    assert distance(rolled(replace(causal, context_pass="fused"), 6, kind[0]), own) <= kind[1]


@torch.no_grad()
def test_merged_equals_a_pass_of_its_own_on_a_true_past():
    causal = RolloutConfig(PAPER, steps=(1000, 500, 0), window=2)
    history = inputs(PAPER, 16)[0]
    own = rolled(causal, 6, history=history)
    assert distance(rolled(replace(causal, context_pass="fused"), 6, history=history), own) <= 1e-12


def test_each_step_sees_the_last_prediction_under_fresh_noise_at_its_own_level():
    """A model that halves what it sees, so that every state can be computed by hand."""
    sigmas, seen, shape = (1.0, 0.75, 0.5, 0.0), [], (1, 2, 3)
    noises = [
        AV(*(torch.randn(shape, generator=torch.Generator().manual_seed(2 * i + j)) for j in (0, 1))) for i in range(3)
    ]

    def model(x: AV, sigma: AV, text: None, **_: object) -> AV:
        seen.append((x, sigma))
        return x.map(lambda part: part / 2)

    block = OpenBlock(0, None, None, None, None)
    made, x = denoise_block(model, None, block, None, sigmas, noises.__getitem__), noises[0]
    for i, (given, level) in enumerate(seen):
        assert level == AV(sigmas[i], sigmas[i]) and distance(given, x) <= 1e-6
        x0 = x.map(lambda part, s=sigmas[i]: part - s * part / 2)
        if i < 2:
            x = x0.map(lambda data, eps, s=sigmas[i + 1]: (1 - s) * data + s * eps, noises[i + 1])
    assert len(seen) == 3 and distance(made, x0) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("way", ["separate", "fused"])
def test_no_noise_serves_twice(way):
    """Start, steps and context of every block draw noise of their own."""
    model, text, drawn = tiny(TINY.with_sinks(16)), inputs(PAPER, 1)[2], []
    causal = RolloutConfig(PAPER, steps=(1000, 500, 0), window=1, context_noise=0.1, context_pass=way)

    def noise(block: int, shapes: AV, draw: int) -> AV:
        drawn.append((block, draw))
        return seeded_noise([0], text.video)(block, shapes, draw)

    assert len(list(rollout(model, causal, text, noise, GRID, 7))) == 3
    assert len(drawn) == len({*drawn}) == 3 * 2 + 2


@torch.no_grad()
def test_what_is_not_remembered_clean_is_another_stream():
    """Block 1 is the first that sees the difference; with fewer steps later on, block 2 is."""
    causal = RolloutConfig(PAPER, steps=(1000, 500, 0), window=2)
    own = rolled(causal, 4)
    for other, same in ((replace(causal, context_pass="skip"), 1), (replace(causal, later_steps=(1000, 0)), 4)):
        made = rolled(other, 4)
        assert torch.equal(made.video[:, :same], own.video[:, :same])
        assert distance(made.map(lambda x, n=same: x[:, n:]), own.map(lambda x, n=same: x[:, n:])) > 1e-3


def test_gradients_do_not_know_how_a_stream_remembers():
    """Where a step has gradients every block is remembered in a pass of its own; what cannot be trained says so."""
    text, found = inputs(PAPER, 4)[2], []
    for way in ("separate", "fused"):
        model = tiny(TINY.with_sinks(16))
        causal = RolloutConfig(PAPER, steps=(1000, 500, 0), context_pass=way)
        made = join(list(rollout(model, causal, text, seeded_noise([0], text.video), GRID, 7, exit_step=0)))
        (made.video.square().sum() + made.audio.square().sum()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0]) and found[0]
    for causal in (RolloutConfig(context_pass="skip"), RolloutConfig(later_steps=(1000, 0))):
        with pytest.raises(ValueError, match="self-forcing"):
            rolled(causal, 2, exit_step=0)
    with pytest.raises(ValueError, match="history"):
        rolled(RolloutConfig(context_pass="skip"), 2, history=inputs(PAPER, 4)[0])


@pytest.mark.parametrize("way", ["separate", "fused"])
def test_recomputed_blocks_have_the_same_gradients(way):
    """Every layer of the exit step runs twice, on the history that it saw; gradients are the same to the bit."""
    text, grads, runs = inputs(PAPER, 4)[2], [], []
    for recompute in (False, True):
        model, calls = tiny(TINY.with_sinks(16)), []
        model.recompute = recompute
        for layer in model.transformer_blocks:
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        causal = RolloutConfig(PAPER, steps=(1000, 500, 0), context_pass=way)
        made = join(list(rollout(model, causal, text, seeded_noise([0], text.video), GRID, 7, exit_step=1)))
        (made.video.square().sum() + made.audio.square().sum()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        runs.append(sum(calls))
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0]) and grads[0]
    assert runs == [3 * len(model.transformer_blocks), 2 * 3 * len(model.transformer_blocks)]


def test_a_checkpoint_says_how_it_remembers():
    causal = RolloutConfig(PAPER, context_pass="fused", later_steps=(1000, 500, 0))
    assert RolloutConfig.from_metadata(causal.to_metadata()) == causal
    old = {
        name: value
        for name, value in RolloutConfig().to_metadata().items()
        if not name.startswith(("context_p", "later"))
    }
    assert RolloutConfig.from_metadata(old) == RolloutConfig()
    assert RolloutConfig.from_metadata(causal.to_metadata() | {"context_pass": "merged"}) == causal
    with pytest.raises(ValueError, match=", ".join(CONTEXT_PASSES)):
        RolloutConfig(context_pass="free")


@torch.no_grad()
@pytest.mark.parametrize("way", ["separate", "fused"])
def test_a_restarted_cache_sees_a_clip_of_the_blocks_that_it_kept(way):
    """Blocks 0 and 5 to 7 remembered anew: block 8 is what block 4 of a clip of these four blocks would be.

    Positions are float32, so that a shift in time is exact to some 1e-6.
    """
    window, k = 3, 8
    causal = RolloutConfig(PAPER, steps=(1000, 500, 0), window=window, context_pass=way)
    model, (clip, _, old) = tiny(TINY.with_sinks(16)), inputs(PAPER, 22)
    text, noise = inputs(PAPER, 1, seed=7)[2], seeded_noise([0], old.video)
    kept = {i: clip.map(lambda x, span: x[:, span.start : span.stop], PAPER.block(i)) for i in range(k)}
    short = {0: kept[0], **{i + 1: kept[k - window + i] for i in range(window)}}

    def block(at: int, text: AV, cache: KVCache) -> AV:
        return next_block(model, causal, cache, text, lambda _, shapes, i: noise(0, shapes, i), at, kept[k - 1])

    def filled(blocks: dict[int, AV], text: AV) -> KVCache:
        cache = new_cache(model, causal, GRID, 1)
        for i in blocks:
            update_cache(model, cache, i, text, blocks[i], 0.0)
        return cache

    plain, stale = block(window + 1, text, filled(short, text)), block(k, old, filled(kept, old))
    worn = filled(kept, old)
    recache_window(model, causal, worn, text, noise, k, kept)
    assert distance(block(k, text, worn), plain) <= 5e-5
    assert distance(stale, plain) > 1e-3


def test_noise_ahead_is_the_noise(monkeypatch):
    """The same bits in any order of questions; a block's noise is begun while the block before it is made."""
    like, shapes, other = torch.zeros(1, dtype=torch.bfloat16), AV((3, 2), (5, 4)), AV((1, 2), (5, 4))
    plain = seeded_noise([3], like)
    monkeypatch.setattr(backends, "GPU", "cpu")
    ahead = seeded_noise([3], like)
    for question in [(0, other, 0), (1, shapes, 0), (1, shapes, 1), (2, shapes, 0), (2, other, 1), (7, shapes, 0)]:
        assert all(map(torch.equal, ahead(*question), plain(*question)))
        assert (question[0] + 1, *question[1:]) in ahead._coming and len(ahead._coming) <= 4
    drawn = []
    monkeypatch.setattr(ahead, "_pinned", lambda *question: drawn.append(question))
    ahead(8, shapes, 0)
    ahead._maker.shutdown()
    assert drawn == [(9, shapes, 0)]  # block 8's was there already
