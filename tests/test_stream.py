"""Invariants 4, 5, 7 and 8: streamed = offline, one clock, constant cost, same seed same bits."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
import torch
from test_transformer import TINY, tiny

from omniforcing_lib import attention, rope
from omniforcing_lib import stream as live
from omniforcing_lib.bounce.codec_parts import CodecConfig
from omniforcing_lib.bounce.codecs import TinyCodec
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.layout import AV, PAPER, RELEASED, Clock
from omniforcing_lib.rollout import RolloutConfig, join, rollout, seeded_noise
from omniforcing_lib.stream import Chunk, Streamer, threads, to_arrays
from studies import bench, switching

CLOCK = Clock()
HOUR = 3600
PROMPT, OTHER = "a red ball, bell", "a blue ball, wood"
SMALL = {"hidden": 8, "oscillators": 5, "windows": (160,), "per_frame": 4, "mixed": 8}


@pytest.fixture(scope="module")
def codec() -> TinyCodec:
    """A codec of 8 x 8 pixels and the widths of the tiny model, with random weights."""
    generator = torch.Generator().manual_seed(3)
    made = TinyCodec(CodecConfig(size=8, patch=4, channels=AV(3, 5), encoder=(4,), decoder=(4, 4), **SMALL))
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return made.requires_grad_(False).eval()


@pytest.fixture
def stream(codec):
    """Make a streamer of a tiny random student; every argument of `RolloutConfig` and `Streamer` can be changed."""

    def make(layout=PAPER, *, seed: int = 5, prompt: str = PROMPT, ahead: bool = False, **changes) -> Streamer:
        causal = RolloutConfig(layout, **{"steps": (1000, 500, 0), "window": 2} | changes)
        text = TinyText(channels=8)
        model = tiny(replace(TINY, caption_channels=8).with_sinks(layout.sinks), dtype=torch.float32)
        return Streamer(model, causal, codec, text, prompt, seed, ahead)

    return make


def take(stream: Streamer, blocks: int) -> list[Chunk]:
    return list(islice(stream, blocks))


def joined(chunks: list[Chunk]) -> AV[np.ndarray]:
    return AV(np.concatenate([c.frames for c in chunks]), np.concatenate([c.samples for c in chunks]))


def same(a: list[Chunk], b: list[Chunk]) -> bool:
    """Tell whether two stretches of stream are equal to the bit."""
    return all(np.array_equal(x, y) for x, y in zip(joined(a), joined(b), strict=True))


@pytest.mark.parametrize("layout", [PAPER, RELEASED], ids=["paper", "released"])
@pytest.mark.parametrize("level", [0.0, 0.1], ids=["clean context", "noisy context"])
def test_streamed_equals_offline(stream, codec, layout, level):
    """What comes out block by block is the offline decode of the offline roll-out, past the window too."""
    streamer = stream(layout, context_noise=level)
    clip = joined(take(streamer, 6))
    # on one thread, as a stream of so small blocks: on two, sums are cut elsewhere and a pixel may round otherwise
    with torch.inference_mode(), threads(1):
        text = streamer.text.encode([PROMPT])
        noise = seeded_noise([streamer.seed], text.video)
        latents = layout.block(5).video.stop
        blocks = rollout(streamer.model, streamer.causal, text, noise, codec.grid, latents)
        offline = to_arrays(codec.decode(join(list(blocks))))
    assert clip.video.shape == offline.video.shape and clip.audio.shape == offline.audio.shape
    assert np.array_equal(clip.video, offline.video)
    assert np.abs(clip.audio - offline.audio).max() <= 1e-6
    assert clip.video.std() > 1 and clip.audio.std() > 1e-4


@pytest.mark.parametrize("layout", [PAPER, RELEASED], ids=["paper", "released"])
def test_an_hour_of_blocks_keeps_one_clock(layout):
    """Block k lasts the same second on both clocks, for every block of an hour: exact fractions, no drift."""
    starts = [CLOCK.seconds(layout.block(k)) for k in range(1, HOUR + 1)]
    for k, (video, audio) in enumerate(starts):
        assert video[1] - video[0] == audio[1] - audio[0] == 1
        assert video[0] - starts[0].video[0] == audio[0] - starts[0].audio[0] == k
    assert abs(starts[-1].video[0] - starts[-1].audio[0]) == Fraction(1, CLOCK.fps) - Fraction(1, CLOCK.mel_rate)


def test_a_stream_an_hour_in_is_on_both_clocks(stream):
    """A real stream whose clocks stand at an hour: every chunk is 24 frames and 16000 samples, at its second."""
    streamer = stream()
    chunks = take(streamer, 4)
    assert [c.start_s for c in chunks[1:]] == [k - 1 + 1 / 24 for k in (1, 2, 3)]
    frames, samples = joined(chunks).map(len)
    assert (frames, samples) == (24 * 3 + 1, 16_000 * 3 + 160)
    streamer.block = HOUR
    streamer._decoder.latents = PAPER.block(HOUR - 1).map(lambda latents: latents.stop)
    late = take(streamer, 3)
    assert [c.start_s for c in late] == [HOUR - 1 + k + 1 / 24 for k in range(3)]
    assert [(len(c.frames), len(c.samples)) for c in late] == [(24, 16_000)] * 3
    assert all(np.isfinite(c.samples).all() for c in late)


@pytest.mark.parametrize("window", [0, 2], ids=["no past", "window 2"])
def test_work_and_memory_stop_growing_when_the_window_is_full(stream, monkeypatch, window):
    """From block window + 2 on, every block attends to as many keys, in the same storage, with as many bytes held."""
    keys: list[tuple[int, int]] = []
    attend = attention.scaled_dot_product_attention

    def counted(q, k, v, **rest):
        keys.append((q.shape[2], k.shape[2]))
        return attend(q, k, v, **rest)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", counted)
    streamer, work, held, places = stream(window=window), [], [], []
    full, kept = window + 2, rope.tables.cache_parameters()["maxsize"]
    for _ in range(kept + 5):
        keys.clear()
        streamer.step()
        work.append(tuple(keys))
        held.append(sum(t.nbytes for t in gc.get_objects() if type(t) is torch.Tensor))
        places.append({name: t.data_ptr() for name, t in streamer._cache.tensors().items()})
    assert len(set(work[full:])) == 1 and len(set(work)) == full + 1
    assert len({sum(k for _, k in seen) for seen in work}) == full + 1
    assert len(set(held[kept + 1 :])) == 1
    assert places[full] == places[-1]
    assert streamer._cache.nbytes == stream(window=window)._cache.nbytes


def test_same_seed_same_bits(stream):
    assert same(take(stream(seed=1), 4), take(stream(seed=1), 4))
    assert not same(take(stream(seed=1), 4), take(stream(seed=2), 4))


@pytest.mark.parametrize("ahead", [(False, False), (True, False), (False, True)], ids=["", "from ahead", "to ahead"])
@pytest.mark.parametrize("cut", [1, 3, 6], ids=lambda k: f"after {k} blocks")
def test_a_stream_cut_and_resumed_is_the_uncut_stream(stream, tmp_path, cut, ahead):
    """Stored to a file, taken up by a new object: the same bits as never cut, before and after the window fills."""
    whole = take(stream(context_noise=0.1), cut + 3)
    with stream(context_noise=0.1, ahead=ahead[0]) as first:
        take(first, cut)
        path = first.save(tmp_path / "stream.safetensors")
    with stream(context_noise=0.1, seed=99, prompt=OTHER, ahead=ahead[1]) as second:
        second.resume(path)
        assert same(take(second, 3), whole[cut:]) and second.prompt == PROMPT
    assert [entry.name for entry in tmp_path.iterdir()] == ["stream.safetensors"]


def test_a_stream_of_another_window_cannot_be_resumed(stream, tmp_path):
    take(first := stream(), 2)
    path = first.save(tmp_path / "stream.safetensors")
    with pytest.raises(ValueError, match="window"):
        stream(window=3).resume(path)
    with pytest.raises(ValueError, match="first block"):
        stream().save(path)


def test_a_prompt_takes_effect_at_the_next_block(stream):
    """Blocks before the change are untouched, to the bit; the same prompt again changes nothing."""
    unchanged, switched, told_again = stream(), stream(), stream()
    reference = take(unchanged, 6)
    before = take(switched, 3)
    switched.set_prompt(OTHER)
    after = take(switched, 3)
    assert same(before, reference[:3])
    assert not any(same([a], [b]) for a, b in zip(after, reference[3:], strict=True))
    assert [c.prompt for c in before + after] == [PROMPT] * 3 + [OTHER] * 3
    first = take(told_again, 3)
    told_again.set_prompt(PROMPT)
    assert same(first + take(told_again, 3), reference)


def test_a_prompt_that_is_not_understood_changes_nothing(stream):
    streamer = stream()
    first = take(streamer, 2)
    with pytest.raises(ValueError, match="red"):
        streamer.set_prompt("a purple cube, drum")
    assert streamer.prompt == PROMPT
    assert same(first + take(streamer, 2), take(stream(), 4))


@pytest.mark.parametrize("at", [1, 3, 6], ids=lambda k: f"after {k} blocks")
def test_a_recached_window_was_always_under_the_new_prompt(stream, codec, at, tmp_path):
    """The next block is that of a roll-out whose past was the same latents, read under the new prompt from the start.

    Past the window that is a clip of the kept blocks alone; tests/test_rollout.py holds the two against each other.
    """
    told, plain = stream(), stream()
    latents = [told._make().latents for _ in range(at)]
    told.set_prompt(OTHER, recache=True)
    if at <= told.causal.window + 1:
        text, noise = told.text.encode([OTHER]), seeded_noise([told.seed], latents[0].video)
        length = PAPER.block(at).video.stop
        padded = join([*latents, latents[-1]])
        blocks = list(rollout(told.model, told.causal, text, noise, codec.grid, length, history=padded))
        again = told._make().latents
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(again, blocks[at], strict=True))
    take(plain, at)
    plain.set_prompt(OTHER, recache=True)
    stored = plain.save(tmp_path / "recached.safetensors")
    cut = stream()
    cut.resume(stored)
    assert same(take(cut, 2), take(plain, 2))
    with pytest.raises(ValueError, match="skip"):
        take(never := stream(context_pass="skip"), 1)
        never.set_prompt(OTHER, recache=True)


def test_a_stream_made_ahead_is_the_same_stream(stream):
    """The same bits, one block ahead at most however slow the consumer; a new prompt shows one block later."""
    reference = take(stream(), 5)
    with stream(ahead=True) as early:
        assert same(take(early, 3), reference[:3])
        early._settle()
        assert early._made == 4 and early.block == 3
        early.set_prompt(OTHER)
        after = take(early, 2)
    assert same(after[:1], reference[3:4]) and not same(after[1:], reference[4:])
    assert [chunk.prompt for chunk in after] == [PROMPT, OTHER]


def test_on_a_gpu_a_block_is_decoded_beside_the_next_one(stream, monkeypatch):
    """Decoding has a CUDA stream of its own, which waits for this block's latents and not for the next block."""
    told, current = [], []

    class Side:
        device = "cuda:0"

        def wait_stream(self, other):
            told.append(f"wait for {other}")

    @contextmanager
    def on(side):
        current.append(side)
        yield
        current.pop()

    monkeypatch.setattr(live.backends, "side_stream", lambda device: Side())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the maker's")
    monkeypatch.setattr(torch.cuda, "stream", on)
    with stream(ahead=True) as early:
        make, decode = early._maker.submit, early.codec.decode
        monkeypatch.setattr(early._maker, "submit", lambda work: told.append("make") or make(work))
        decoded = lambda *args: told.append(f"decode beside: {bool(current)}") or decode(*args)  # noqa: E731
        monkeypatch.setattr(early.codec, "decode", decoded)
        chunks = take(early, 2)
    assert told == ["wait for the maker's", "make", "decode beside: True"] * 2
    monkeypatch.undo()
    assert same(chunks, take(stream(), 2))


def test_what_fails_ahead_fails_in_the_consumer(stream, monkeypatch):
    with stream(ahead=True) as early:
        take(early, 2)
        early._settle()
        monkeypatch.setattr(early, "_make", lambda: 1 / 0)
        take(early, 1)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                early.step()


def test_a_dead_consumer_leaves_no_thread(stream):
    early = stream(ahead=True)
    take(early, 1)
    thread = next(iter(early._maker._threads))
    early._settle()
    del early
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
def test_a_small_block_is_made_on_one_thread_and_a_large_one_on_all(stream, monkeypatch, ahead):
    used, attend = set(), attention.scaled_dot_product_attention

    def counted(*tensors, **rest):
        used.add(torch.get_num_threads())
        return attend(*tensors, **rest)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", counted)
    with threads(2):
        for grain, expected in ((live.GRAIN, {1}), (1, {2})):
            monkeypatch.setattr(live, "GRAIN", grain)
            used.clear()
            with stream(ahead=ahead) as streamer:
                take(streamer, 3)
            assert used == expected and torch.get_num_threads() == 2


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
def test_a_clip_is_the_stream_cut_to_its_seconds_and_nothing_more_is_made(stream, ahead):
    reference = joined(take(stream(layout=RELEASED), 3))
    with stream(layout=RELEASED, ahead=ahead) as streamer:
        pieces = list(streamer.clip(2))
        assert streamer._made == len(pieces) == RELEASED.count(CLOCK.latents(2).video)
    clip = AV(*(np.concatenate(parts) for parts in zip(*pieces, strict=True)))
    assert clip.map(len) == (49, 32_160) and len(reference.video) > 49
    assert all(np.array_equal(a, b[: len(a)]) for a, b in zip(clip, reference, strict=True))


@pytest.mark.slow
def test_an_hour_of_stream_is_an_hour_on_both_clocks(codec):
    """3601 chunks of a cheap random student, one after the other: 24 frames and 16000 samples in every second."""
    causal = RolloutConfig(PAPER, steps=(1000, 0), window=0, context_pass="skip")
    model = tiny(replace(TINY, num_layers=1, caption_channels=8).with_sinks(16), dtype=torch.float32)
    frames = samples = 0
    for k, chunk in enumerate(islice(Streamer(model, causal, codec, TinyText(channels=8), PROMPT), HOUR + 1)):
        assert chunk.start_s == pytest.approx(frames / CLOCK.fps, abs=1e-9) and np.isfinite(chunk.samples).all()
        frames, samples = frames + len(chunk.frames), samples + len(chunk.samples)
        assert (frames, samples) == (24 * k + 1, 16_000 * k + 160)


def test_a_closed_stream_holds_no_cache_and_says_so(stream):
    with stream() as streamer:
        assert len(take(streamer, 2)) == 2
    assert streamer._cache is None and not take(streamer, 1)
    with pytest.raises(RuntimeError, match="closed"):
        streamer.step()
    with pytest.raises(RuntimeError, match="closed"):
        streamer.set_prompt(OTHER)
    with pytest.raises(RuntimeError, match="closed"), streamer:
        pass


def test_a_half_precision_student_streams(stream):
    streamer = stream()
    streamer.model.to(torch.bfloat16)
    half = Streamer(streamer.model, streamer.causal, streamer.codec, streamer.text, PROMPT)
    clip = joined(take(half, 3))
    assert clip.video.shape == (49, 8, 8, 3) and np.isfinite(clip.audio).all()
    assert half._cache.nbytes * 2 == streamer._cache.nbytes


def test_watching_a_stream_changes_nothing(stream):
    watched = bench.watch(stream(), 5, keep=2)
    assert same(watched.chunks, [take(stream(), 5)[k] for k in (0, 1, 4)])
    assert len(watched.seconds) == len(watched.resident) == 5 and len(set(watched.cache_bytes)) == 1
    assert watched.frames_a_second > 0


def test_an_old_stream_is_timed_beside_a_fresh_one(stream):
    old, fresh = stream(), stream()
    take(old, 5)
    assert bench.aged(old, fresh, turns=2) > 0 and (old.block, fresh.block) == (5 + 3, 4 + 3)


def test_the_offline_twin_is_the_stream(stream):
    whole = bench.offline(stream(context_noise=0.0), 4)
    assert bench.equal(bench.joined(take(stream(), 4)), whole, 1e-6)
    assert not bench.equal(bench.joined(take(stream(seed=6), 4)), whole, 1e-6)


def test_a_switched_stream_follows_from_that_block_on(stream):
    chunks = switching.switched(stream(), OTHER, 2, 4)
    assert [c.prompt for c in chunks] == [PROMPT] * 2 + [OTHER] * 2
    assert same(chunks[:2], take(stream(), 2))
