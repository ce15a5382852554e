"""The four masks against the paper's token formulas, and every rendering against the dense one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniforcing_lib import masks
from omniforcing_lib.attention import attend
from omniforcing_lib.layout import AV, PAPER, BlockLayout

NAMES = ("video_self", "audio_self", "a2v", "v2a")
sizes = st.integers(1, 4)
layouts = st.builds(
    BlockLayout, st.builds(AV, sizes, sizes), st.builds(AV, sizes, st.integers(3, 6)), st.integers(0, 3)
)
windows = st.none() | st.integers(0, 3)


def oracle(layout: BlockLayout, video_latents: int, tokens: int) -> dict[str, torch.Tensor]:
    """Compute the masks token by token from the formulas of specification 3.2 and 3.4, apart from the library."""
    audio_latents = layout.audio_latents(video_latents)

    def block(i: int, first: int, step: int) -> int:
        return 0 if i < first else 1 + (i - first) // step

    video = [block(i // tokens, layout.first.video, layout.step.video) for i in range(video_latents * tokens)]
    audio = [0] * layout.sinks + [block(i, layout.first.audio, layout.step.audio) for i in range(audio_latents)]
    pairs = ((video, video), (audio, audio), (video, audio), (audio, video))
    grids = [torch.tensor(rows)[:, None] >= torch.tensor(columns)[None] for rows, columns in pairs]
    return dict(zip(NAMES, grids, strict=True))


@settings(deadline=None)
@given(layouts, st.integers(0, 9), st.integers(1, 4))
def test_masks_are_the_papers(layout, more, tokens):
    video_latents = layout.first.video + more
    found, expected = masks.dense(layout, video_latents, tokens), oracle(layout, video_latents, tokens)
    for name in NAMES:
        assert torch.equal(found[name], expected[name]), name


def test_rows_of_the_paper_layout():
    """Sinks see sinks and A_0, and V_0 across; every later audio row sees the sinks; video sees them always."""
    found = masks.dense(PAPER, 16, 4)
    assert found["audio_self"][:16].sum(1).unique().tolist() == [17]
    assert found["v2a"][:16].sum(1).unique().tolist() == [4]
    assert found["a2v"][:, :17].all() and found["audio_self"][:, :17].all()
    assert found["audio_self"].sum(1)[16:][[0, 1, 26]].tolist() == [17, 42, 67]


@settings(deadline=None, max_examples=40)
@given(layouts, st.integers(0, 7), windows, st.integers(1, 3))
def test_every_rendering_is_the_same_mask(layout, more, window, tokens):
    video_latents = layout.first.video + more
    built = masks.build(layout, video_latents, tokens, window=window)
    for name in NAMES:
        mask = getattr(built, name)
        rows, columns = torch.meshgrid(torch.arange(mask.rows), torch.arange(mask.columns), indexing="ij")
        flex = mask.mask_mod()(torch.tensor(0), torch.tensor(0), rows, columns)
        assert torch.equal(flex, mask.dense), name
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 2, n, 4, generator=generator).double() for n in (mask.rows, *(mask.columns,) * 2))
        sliced = attend(q, k, v, mask)
        weights = (q @ k.transpose(-1, -2) / 2).masked_fill(~mask.dense, -torch.inf).softmax(-1)
        assert torch.allclose(sliced, weights @ v, atol=1e-12), name


@given(st.integers(0, 20), st.integers(0, 20), windows)
def test_the_predicate_never_looks_ahead_and_keeps_the_prefix(query, key, window):
    seen = masks.visible(query, key, window)
    assert seen <= (key <= query)
    assert masks.visible(query, 0, window) and masks.visible(query, query, window)
    if window is not None and key <= query:
        assert seen == (key == 0 or query - key <= window)


@given(st.integers(0, 20), windows)
def test_the_blocks_that_are_seen_are_those_of_the_predicate(query, window):
    assert masks.seen(query, window) == tuple(k for k in range(30) if masks.visible(query, k, window))


def test_a_mask_of_another_size_is_refused():
    mask = masks.build(PAPER, 4, 4).audio_self
    q = torch.zeros(1, 1, 5, 4)
    with pytest.raises(ValueError, match=r"42 x 42 .* found 5 queries and 5 keys"):
        attend(q, q, q, mask)
    with pytest.raises(ValueError, match="sliced, dense, flex; found 'sparse'"):
        masks.build(PAPER, 4, 4, rendering="sparse")
