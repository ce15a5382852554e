"""Invariants 1 to 3: no leak, cached = masked, bidirectional = diffusers' LTX-2."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniforcing_lib import masks, rope
from omniforcing_lib.cache import KVCache
from omniforcing_lib.config import CROSS_MODAL_SIGMAS, MINIATURE, ModelConfig
from omniforcing_lib.flow import Skip
from omniforcing_lib.layout import AV, PAPER, RELEASED, BlockLayout, Clock
from omniforcing_lib.transformer import Transformer

GRID, CLOCK = (2, 2), Clock()
TINY = replace(
    MINIATURE,
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=12,
    audio_num_attention_heads=2,
    audio_attention_head_dim=8,
    cross_attention_dim=24,
    audio_cross_attention_dim=16,
    in_channels=3,
    out_channels=3,
    audio_in_channels=5,
    audio_out_channels=5,
    caption_channels=6,
)
NEWER = replace(TINY, apply_gated_attention=True, cross_attention_adaln=True)  # LTX-2.3: sigma enters the text too
NEWEST = replace(NEWER, ff_bias=False, use_keyframes_abs_pos_embedding=True)  # LTX-2.5: the first latent is marked

# in float32 its random gates blow rounding up: `test_companions` holds it to 1e-5 at weights of a usual size
KINDS = [
    (TINY, torch.float32, 1e-5),
    (TINY, torch.float64, 1e-10),
    (NEWER, torch.float64, 1e-10),
    (NEWEST, torch.float64, 1e-10),
]


def tiny(config: ModelConfig = TINY, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Transformer:
    """Build a tiny model whose every weight matters (nothing starts at zero)."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config).to(dtype)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.3
    return model.eval()


def inputs(
    layout: BlockLayout, video_latents: int, *, batch: int = 1, dtype: torch.dtype = torch.float64, seed: int = 1
):
    """Draw latents, one sigma a block, and text for a clip."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    audio_latents = layout.audio_latents(video_latents)
    x = AV(draw(batch, video_latents, *GRID, 3), draw(batch, audio_latents, 5))
    level = torch.rand(batch, layout.count(video_latents), generator=generator, dtype=dtype)
    sigma = layout.block_index(video_latents).map(lambda index: level[:, index])
    return x, sigma, AV(draw(batch, 3, 6), draw(batch, 3, 6))


def layouts() -> st.SearchStrategy[BlockLayout]:
    """Draw small layouts, with and without sinks."""
    size = st.integers(1, 3)
    return st.builds(
        BlockLayout, st.builds(AV, size, st.integers(1, 5)), st.builds(AV, size, st.integers(3, 6)), st.integers(0, 3)
    )


def run_cached(
    model: Transformer, layout: BlockLayout, x: AV, sigma: AV, text: AV, window: int, reanchor: bool = False, skip=None
) -> AV:
    """Run a clip block by block through the cache, each block's own pass filling it."""
    cache = KVCache(model.config, layout, GRID, len(x.video), window, reanchor, dtype=x.video.dtype)
    out = []
    for k, block in enumerate(layout.blocks(x.video.shape[1])):
        own, level = (pair.map(lambda t, span: t[:, span.start : span.stop], block) for pair in (x, sigma))
        out.append(model(own, level, text, cache=cache, blocks=(cache.open(k, block),), skip=skip))
    return AV(*zip(*out, strict=True)).map(lambda parts: torch.cat(parts, dim=1))


def distance(a: AV, b: AV) -> float:
    """Largest difference, relative to the largest value where that is above 1."""
    return max(((x - y).abs().max() / y.abs().max().clamp_min(1)).item() for x, y in zip(a, b, strict=True))


@torch.no_grad()
@settings(max_examples=12, deadline=None)
@given(layouts(), st.integers(0, 5), st.sampled_from(masks.RENDERINGS), st.sampled_from([0, 1]), st.data())
def test_no_future_reaches_the_past(layout, more, rendering, stream, data):
    """Change one block of one stream: nothing before it moves, to the bit; the block itself does."""
    video_latents = layout.first.video + more
    changed = data.draw(st.integers(0, layout.count(video_latents) - 1))
    config, dtype = (
        data.draw(st.sampled_from([TINY, NEWER, NEWEST])),
        data.draw(st.sampled_from([torch.float32, torch.float64])),
    )
    model = tiny(config.with_sinks(layout.sinks), dtype=dtype)
    x, sigma, text = inputs(layout, video_latents, dtype=model.proj_out.weight.dtype)
    kind = masks.build(layout, video_latents, 4, rendering=rendering)
    before = model(x, sigma, text, masks=kind)
    span = layout.blocks(video_latents)[changed][stream]
    touched = AV(*(t.clone() for t in x))
    touched[stream][:, span.start : span.stop] += 1.0
    after = model(touched, sigma, text, masks=kind)
    block = layout.blocks(video_latents)[changed]
    for a, b, own in zip(before, after, block, strict=True):
        assert torch.equal(a[:, : own.start], b[:, : own.start])
    assert not torch.equal(before[stream][:, span.start :], after[stream][:, span.start :])


@torch.no_grad()
@pytest.mark.parametrize("stream", [0, 1], ids=["video", "audio"])
def test_no_future_reaches_the_past_through_the_cache(stream):
    layout = BlockLayout(AV(1, 1), AV(2, 5), sinks=2)
    model = tiny(TINY.with_sinks(2))
    x, sigma, text = inputs(layout, 7)
    before = run_cached(model, layout, x, sigma, text, window=1)
    span = layout.block(2)[stream]
    x[stream][:, span.start : span.stop] += 1.0
    after = run_cached(model, layout, x, sigma, text, window=1)
    for a, b, own in zip(before, after, layout.block(2), strict=True):
        assert torch.equal(a[:, : own.start], b[:, : own.start])
        assert not torch.equal(a[:, own.start : own.stop], b[:, own.start : own.stop])


@torch.no_grad()
@settings(max_examples=12, deadline=None)
@given(layouts(), st.integers(0, 6), st.sampled_from(KINDS))
def test_cached_equals_masked(layout, more, kind):
    """Block by block through the cache equals one masked pass, whatever the layout, with and without sinks."""
    config, dtype, tolerance = kind
    video_latents = layout.first.video + more
    model = tiny(config.with_sinks(layout.sinks), dtype=dtype)
    x, sigma, text = inputs(layout, video_latents, batch=2, dtype=dtype)
    whole = model(x, sigma, text, masks=masks.build(layout, video_latents, 4))
    for window in (layout.count(video_latents), 20):
        assert distance(run_cached(model, layout, x, sigma, text, window), whole) <= tolerance


@torch.no_grad()
@pytest.mark.parametrize("layout", [PAPER, RELEASED], ids=["paper", "released"])
def test_cached_equals_masked_in_the_two_layouts(layout):
    model = tiny(TINY.with_sinks(layout.sinks))
    x, sigma, text = inputs(layout, 16)
    whole = model(x, sigma, text, masks=masks.build(layout, 16, 4))
    assert distance(run_cached(model, layout, x, sigma, text, 20), whole) <= 1e-10


@torch.no_grad()
def test_cached_equals_masked_past_the_longest_clip_of_the_reference():
    """Float32 places what the teacher has seen, float64 what comes later, in a block as in a whole clip."""
    model = tiny(TINY.with_sinks(16))
    x, sigma, text = inputs(PAPER, CLOCK.latents(23).video)
    whole = model(x, sigma, text, masks=masks.build(PAPER, x.video.shape[1], 4))
    assert distance(run_cached(model, PAPER, x, sigma, text, 23), whole) <= 1e-10


def test_a_latent_turns_alike_whatever_stretch_it_is_asked_with():
    """At any second the rotation of a latent belongs to its time: no stretch of latents around it moves it."""
    longest = CLOCK.latents(26)

    def turned(latents: AV) -> AV:
        own, cross = rope.tables(TINY, CLOCK, latents, (1, 1), 0, torch.device("cpu"))
        return own.map(lambda a, b: torch.cat([*a, *b], dim=-1), cross)

    whole = turned(longest.map(range))
    for k in range(27):
        parts = PAPER.block(k), longest.map(lambda end, span: range(span.start, end), PAPER.block(k))
        for part in parts:
            expected = whole.map(lambda t, span: t[:, span.start : span.stop], part)
            assert distance(turned(part), expected) <= 1e-6, k


@torch.no_grad()
@settings(max_examples=12, deadline=None)
@given(layouts(), st.integers(0, 3), st.integers(0, 9))
def test_a_rolling_cache_equals_a_windowed_mask(layout, window, more):
    """Places of the ring are reused, a partial last block included, and only what the window allows is seen."""
    video_latents = layout.first.video + more
    model = tiny(TINY.with_sinks(layout.sinks))
    x, sigma, text = inputs(layout, video_latents)
    whole = model(x, sigma, text, masks=masks.build(layout, video_latents, 4, window=window))
    assert distance(run_cached(model, layout, x, sigma, text, window), whole) <= 1e-10


@torch.no_grad()
@pytest.mark.parametrize("rope_type", ["split", "interleaved"])
@pytest.mark.parametrize("skip", [Skip(cross_modal=True), Skip(frozenset({0}))], ids=["own keys", "cross keys"])
@pytest.mark.parametrize("k", [4, 9], ids=["first past the window", "later"])
def test_a_reanchored_stream_is_a_short_clip_for_ever(rope_type, skip, k):
    """Past the window, block k is what the last block of a clip [block 0, last window, k] would be.

    One layer and one attention at a time, so that a block's keys depend on nothing but the block.
    """
    layout, window = BlockLayout(AV(1, 1), AV(3, 25), sinks=4), 2
    model = tiny(replace(TINY, num_layers=1, rope_type=rope_type).with_sinks(4))
    x, sigma, text = inputs(layout, 1 + 3 * k)
    kept = AV(*zip(*(layout.block(i) for i in (0, *range(k - window, k + 1))), strict=True))
    short, level = (
        pair.map(lambda t, spans: torch.cat([t[:, s.start : s.stop] for s in spans], 1), kept) for pair in (x, sigma)
    )
    whole = model(short, level, text, masks=masks.build(layout, short.video.shape[1], 4), skip=skip)
    expected = whole.map(lambda t, s: t[:, s.start : s.stop], layout.block(window + 1))
    streamed, absolute = (
        run_cached(model, layout, x, sigma, text, window, reanchor, skip).map(
            lambda t, s: t[:, s.start : s.stop], layout.block(k)
        )
        for reanchor in (True, False)
    )
    assert distance(streamed, expected) <= 1e-4 < 1e-3 < distance(absolute, expected)


@torch.no_grad()
def test_all_renderings_of_a_mask_are_one():
    layout = BlockLayout(AV(1, 1), AV(2, 5), sinks=3)
    model = tiny(TINY.with_sinks(3))
    x, sigma, text = inputs(layout, 8)
    for window in (None, 1):
        outs = [
            model(x, sigma, text, masks=masks.build(layout, 8, 4, window=window, rendering=r)) for r in masks.RENDERINGS
        ]
        assert all(distance(outs[0], other) <= 1e-10 for other in outs[1:])


@torch.no_grad()
def test_without_sinks_the_student_is_the_teacher():
    """Sink tokens do nothing in the bidirectional mode."""
    teacher, student = tiny(), tiny(TINY.with_sinks(16), seed=5)
    student.load_state_dict(teacher.state_dict(), strict=False)
    x, _, text = inputs(PAPER, 4)
    sigma = AV(torch.tensor([0.7]), torch.tensor([0.7]))
    assert distance(teacher(x, sigma, text), student(x, sigma, text)) == 0


@torch.no_grad()
@pytest.mark.parametrize("first", [1, 2], ids=["block 0 of one latent", "of two"])
def test_the_first_latent_is_marked_in_every_mode(first):
    """Whoever computes the tokens of latent 0 adds the embedding to them, and to no others."""
    layout = BlockLayout(AV(first, 1), AV(2, 5), sinks=2)
    model = tiny(NEWEST.with_sinks(2))
    x, sigma, text = inputs(layout, first + 4)
    hidden = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda _, given: hidden.append(given[0]))
    cache = KVCache(model.config, layout, GRID, dtype=torch.float64)

    def part(opened):
        latents = opened[0].latents.map(lambda a, b: slice(a.start, b.stop), opened[-1].latents)
        return [pair.map(lambda t, span: t[:, span], latents) for pair in (x, sigma)]

    def everywhere():
        hidden.clear()
        model(x, sigma.map(lambda s: s[:, 0]), text)
        model(x, sigma, text, masks=masks.build(layout, first + 4, 4))
        # block 0, its clean pass, block 1, the two in one pass, block 2
        for opened in ((cache.open(0),), (cache.open(0),), (cache.open(1),), cache.open_pair(1), (cache.open(2),)):
            model(*part(opened), text, cache=cache, blocks=opened)
        return hidden.copy()

    with_mark = everywhere()
    mark = model.keyframes_abs_pos_embedding.clone()
    model.keyframes_abs_pos_embedding.zero_()
    for i, (there, without) in enumerate(zip(with_mark, everywhere(), strict=True)):
        marked = 0 if i in (4, 6) else GRID[0] * GRID[1]
        assert torch.equal(there.audio, without.audio)
        assert torch.equal(there.video[:, :marked], without.video[:, :marked] + mark)
        assert torch.equal(there.video[:, marked:], without.video[:, marked:])


@torch.no_grad()
def test_the_mark_reaches_later_blocks_through_attention_alone():
    """With silent attention it moves latent 0 and nothing else, to the bit; with attention it moves the rest too."""
    layout = BlockLayout(AV(2, 1), AV(2, 5))
    model = tiny(NEWEST)
    x, sigma, text = inputs(layout, 6)

    def moved():
        outs = []
        for scale in (1, 0):
            model.keyframes_abs_pos_embedding.copy_(scale * mark)
            whole = model(x, sigma, text, masks=masks.build(layout, 6, 4))
            outs.append((*whole, *run_cached(model, layout, x, sigma, text, 20)))
        return [a != b for a, b in zip(*outs, strict=True)]

    mark = model.keyframes_abs_pos_embedding.clone()
    for video, audio in zip(*[iter(moved())] * 2, strict=True):
        assert video[:, 0].all() and video[:, 2:].any() and audio[:, 1:].any()
    for name, parameter in model.named_parameters():
        if ".to_out." in name:
            parameter.zero_()
    for video, audio in zip(*[iter(moved())] * 2, strict=True):
        assert video[:, 0].any() and not video[:, 1:].any() and not audio.any()


def test_gradients_reach_text_and_block_but_not_the_history():
    """In a cached pass with gradients, the block's inputs and the text path learn; cached keys do not.

    Source: specification 8.1.6.
    """
    layout = BlockLayout(AV(1, 1), AV(2, 5), sinks=2)
    model = tiny(TINY.with_sinks(2))
    x, sigma, text = inputs(layout, 3)
    cache = KVCache(model.config, layout, GRID, dtype=torch.float64)
    first = AV(x.video[:, :1].requires_grad_(), x.audio[:, :1].requires_grad_())
    for k in (0, 1):
        block = first if k == 0 else x.map(lambda t: t[:, 1:])
        with torch.set_grad_enabled(k == 1):
            opened = cache.open(k, writes=k == 0)
            out = model(block, sigma.map(lambda s: s[:, :1]), text, cache=cache, blocks=(opened,))
    (out.video.sum() + out.audio.sum()).backward()
    assert first.video.grad is None
    with pytest.raises(RuntimeError, match="writes=False"):
        model(block, sigma.map(lambda s: s[:, :1]), text, cache=cache, blocks=(cache.open(1),))
    with pytest.raises(ValueError, match="give both or none"):
        model(block, sigma, text, cache=cache)
    silent = [n for n, p in model.named_parameters() if p.grad is None]
    assert silent == ["audio_sink_tokens"]


FEATURES = {
    "2.0": {},
    "2.3": {"apply_gated_attention": True, "cross_attention_adaln": True, "caption_proj_before_connector": True},
}


CLIPS = {
    "split": ("split", 1000, 7),
    "interleaved": ("interleaved", 1000, 7),
    "gates of the released student": ("interleaved", 1, 7),
    "longest clip": ("split", 1000, 61),
}


@torch.no_grad()
@pytest.mark.parametrize("rope_type, multiplier, frames", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("version", FEATURES)
@pytest.mark.parametrize("per_token", [False, True], ids=["one sigma", "sigma a token"])
def test_bidirectional_equals_diffusers(rope_type, multiplier, frames, version, per_token):
    """The same weights through the reference implementation: equal to 1e-5 in fp32, padding of 3-D RoPE included."""
    from diffusers import LTX2VideoTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_ltx2_transformer_to_diffusers

    new = bool(FEATURES[version])
    sizes = {"attention_head_dim": 16, "cross_attention_dim": 32, "av_ca_timestep_scale_multiplier": multiplier}
    theirs = {"cross_modal_sigma": "all" if new else "none"}  # what `use_cross_timestep` means
    config = replace(TINY, rope_type=rope_type, **sizes, **FEATURES[version], **theirs)
    captions = (32, 16) if new else (6, 6)
    ours = tiny(config, dtype=torch.float32)
    reference = LTX2VideoTransformer3DModel(
        in_channels=3,
        out_channels=3,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=5,
        audio_out_channels=5,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=6,
        rope_type=rope_type,
        cross_attn_timestep_scale_multiplier=multiplier,
        gated_attn=new,
        audio_gated_attn=new,
        cross_attn_mod=new,
        audio_cross_attn_mod=new,
        use_prompt_embeddings=not new,
    ).eval()
    state = {f"model.diffusion_model.{k}": v for k, v in ours.state_dict().items()}
    state = convert_ltx2_transformer_to_diffusers(state)
    state = {k.replace("prompt_adaln_single", "prompt_adaln"): v for k, v in state.items()}
    reference.load_state_dict(state)

    x, sigma, _ = inputs(PAPER, frames, batch=2, dtype=torch.float32)
    level = torch.tensor([0.3, 0.9])
    text = AV(*(torch.randn(2, 3, c, generator=torch.Generator().manual_seed(i)) for i, c in enumerate(captions)))
    if not per_token or new:
        sigma = AV(level, level)
    steps, lengths = sigma.map(lambda s: s * 1000), x.map(lambda part: part.shape[1])
    tokens = steps.map(lambda s, n: s[:, None].expand(-1, n) if s.dim() == 1 else s, lengths)
    mine = ours(x, sigma, text)
    theirs = reference(
        hidden_states=x.video.flatten(1, 3),
        audio_hidden_states=x.audio,
        encoder_hidden_states=text.video,
        audio_encoder_hidden_states=text.audio,
        timestep=tokens.video.repeat_interleave(4, dim=1),
        audio_timestep=tokens.audio,
        sigma=level * 1000,
        audio_sigma=level * 1000,
        num_frames=lengths.video,
        height=2,
        width=2,
        audio_num_frames=lengths.audio,
        use_cross_timestep=new,
    )
    expected = AV(theirs.sample.reshape(x.video.shape), theirs.audio_sample)
    assert distance(mine, expected) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, NEWER, NEWEST], ids=FEATURES | {"2.5": {}})
def test_the_gate_alone_goes_by_the_other_stream(config):
    """Lightricks' rule since May 2026: scale and shift as where nothing does, the gate as where all does.

    Without masks the other stream's level is one for each sample, under masks one for each block. Where both streams
    have the same levels, all three rules are one.
    """
    x, sigma, text = inputs(PAPER, 7, batch=2)
    kind = masks.build(PAPER, 7, 4)
    model = tiny(config.with_sinks(16))

    def by(rule: str, sigma: AV, masks=None):
        model.config = replace(model.config, cross_modal_sigma=rule)
        return model._timesteps(sigma, 16 if masks else 0, masks, ()), model(x, sigma, text, masks=masks)

    apart = AV(sigma.video, sigma.audio.flip(0))
    for levels, seen in ((AV(torch.tensor([0.2, 0.7]), torch.tensor([0.9, 0.4])), None), (apart, kind)):
        found = {rule: by(rule, levels, seen) for rule in CROSS_MODAL_SIGMAS}
        for stream in (0, 1):
            gate, every, none = (found[rule][0][stream] for rule in ("gate", "all", "none"))
            assert torch.equal(gate.cross, none.cross) and torch.equal(gate.gate, every.gate)
        outs = [found[rule][1] for rule in CROSS_MODAL_SIGMAS]
        assert min(distance(outs[0], other) for other in outs[1:]) > 1e-3
    same = [by(rule, sigma, kind)[1] for rule in CROSS_MODAL_SIGMAS]
    assert max(distance(same[0], other) for other in same[1:]) <= 1e-12


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, NEWER], ids=FEATURES)
def test_stg_passes_values_and_by_a_setting_drops_the_branch(config):
    """Values: attention that sees its own token alone; a dropped branch: attention whose output is nothing."""
    model, (x, _, text), level = tiny(config), inputs(PAPER, 4), AV(*torch.tensor([[0.6], [0.6]]))
    values, dropped = (model(x, level, text, skip=Skip(frozenset({1}), branch=branch)) for branch in (False, True))
    assert min(distance(values, dropped), distance(model(x, level, text), values)) > 1e-3
    block = model.transformer_blocks[1]
    for attention in (block.attn1, block.audio_attn1):
        for layer in (attention.to_v, attention.to_out[0]):
            layer.weight.zero_(), layer.bias.zero_()
    assert torch.equal(
        torch.cat([x.flatten() for x in dropped]), torch.cat([x.flatten() for x in model(x, level, text)])
    )


def test_the_full_model_is_the_19b():
    """On the meta device: 18.88 B parameters with 16 sinks, shapes of specification 1.2 (nothing is allocated)."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(num_audio_sink_tokens=16))
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == 18.88
    last = "transformer_blocks.47."
    for name, shape in {
        "patchify_proj.weight": (4096, 128),
        "audio_patchify_proj.weight": (2048, 128),
        "adaln_single.emb.timestep_embedder.linear_1.weight": (4096, 256),
        "adaln_single.linear.weight": (24576, 4096),
        "audio_adaln_single.linear.weight": (12288, 2048),
        "caption_projection.linear_1.weight": (4096, 3840),
        "av_ca_video_scale_shift_adaln_single.linear.weight": (16384, 4096),
        "av_ca_audio_scale_shift_adaln_single.linear.weight": (8192, 2048),
        "av_ca_a2v_gate_adaln_single.linear.weight": (4096, 4096),
        "av_ca_v2a_gate_adaln_single.linear.weight": (2048, 2048),
        "scale_shift_table": (2, 4096),
        "audio_sink_tokens": (1, 16, 2048),
        last + "attn1.to_out.0.weight": (4096, 4096),
        last + "attn1.q_norm.weight": (4096,),
        last + "ff.net.0.proj.weight": (16384, 4096),
        last + "ff.net.2.weight": (4096, 16384),
        last + "audio_to_video_attn.to_q.weight": (2048, 4096),
        last + "audio_to_video_attn.to_out.0.weight": (4096, 2048),
        last + "video_to_audio_attn.to_k.weight": (2048, 4096),
        last + "scale_shift_table_a2v_ca_video": (5, 4096),
        last + "audio_scale_shift_table": (6, 2048),
    }.items():
        assert shapes[name] == shape, name
    # a block: 6 attentions of 10 tensors, 2 MLPs of 4, 4 tables; around them: 2 + 2 linears, 6 AdaLNs, 2 captions, ...
    assert len(shapes) == 48 * (6 * 10 + 2 * 4 + 4) + 4 * 2 + 6 * 6 + 2 * 4 + 2 + 1
