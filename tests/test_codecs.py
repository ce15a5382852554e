"""Laws of the codec: one clock, streamed equals whole, the world survives the round trip."""

from __future__ import annotations

from decimal import Decimal, getcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from omniforcing_lib.bounce import train_codec as codec_training
from omniforcing_lib.bounce import world
from omniforcing_lib.bounce.codecs import EncodeState, TinyCodec, load_codec, save_codec
from omniforcing_lib.bounce.train_codec import measure, train_codec, true_knots
from omniforcing_lib.interfaces import DecodeState
from omniforcing_lib.layout import AV, Clock

FILE = Path(__file__).parents[1] / "data" / "codec.safetensors"
CLOCK = Clock()


@pytest.fixture(scope="module")
def codec() -> TinyCodec:
    return load_codec(FILE)


@pytest.fixture(scope="module")
def clip() -> AV[torch.Tensor]:
    return world.render_batch([world.scene(1_000_000), world.scene(1_000_001)], 3)


@pytest.fixture(scope="module")
def latents(codec: TinyCodec, clip: AV[torch.Tensor]) -> AV[torch.Tensor]:
    return codec.encode(clip)


def pieces(total: int, rng: np.random.Generator) -> list[range]:
    """Cut 0..total at random places; some pieces are empty."""
    cuts = [0, *sorted(rng.integers(0, total + 1, 4).tolist()), total]
    return [range(a, b) for a, b in pairwise(cuts)]


@pytest.mark.parametrize("seconds", [0, 1, 2])
def test_a_whole_second_is_three_and_twenty_five_latents(codec: TinyCodec, seconds: int) -> None:
    clip = AV(torch.zeros(1, 24 * seconds + 1, 64, 64, 3), torch.zeros(1, 16_000 * seconds + 160))
    latents = codec.encode(clip)
    assert latents.map(lambda z: z.shape[1]) == CLOCK.latents(seconds)
    assert codec.decode(latents).map(lambda x: x.shape) == clip.map(lambda x: x.shape)


@pytest.mark.parametrize("seed", range(4))
def test_streamed_decode_equals_whole_decode(codec: TinyCodec, latents: AV[torch.Tensor], seed: int) -> None:
    rng, state = np.random.default_rng(seed), DecodeState()
    parts = [
        codec.decode(AV(latents.video[:, v.start : v.stop], latents.audio[:, a.start : a.stop]), state)
        for v, a in zip(pieces(10, rng), pieces(76, rng), strict=True)
    ]
    for whole, made in zip(codec.decode(latents), zip(*parts, strict=True), strict=True):
        assert torch.allclose(torch.cat(made, 1), whole, atol=1e-6, rtol=0)
    assert state.latents == AV(10, 76)


def test_the_first_latent_is_the_last_of_its_frames_and_of_its_hops(codec, latents) -> None:
    """What stands before the clip is left out: seven frames of eight, three hops of four."""
    made = codec.decode(latents)
    pictures = torch.cat([codec.frames(latents.video[:, i : i + 1]) for i in range(2)], 1).clamp(-1, 1)
    assert torch.equal(made.video[:, :9], pictures[:, 7:]) and not torch.equal(pictures[:, 0], pictures[:, 7])
    knots = codec.knots(latents.audio[:, :2])[:, 3:]
    sound = codec.bank(torch.cat([knots[:, :1], knots], 1), 0)
    assert torch.allclose(made.audio[:, :800], sound.clamp(-1, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_streamed_encode_equals_whole_encode(
    codec: TinyCodec, clip: AV[torch.Tensor], latents: AV[torch.Tensor], seed: int
) -> None:
    rng, state = np.random.default_rng(seed), EncodeState()
    parts = []
    for v, a in zip(pieces(10, rng), pieces(76, rng), strict=True):
        frames, samples = CLOCK.frames(v), CLOCK.samples(a)
        piece = AV(clip.video[:, frames.start : frames.stop], clip.audio[:, samples.start : samples.stop])
        parts.append(codec.encode(piece, state))
    for whole, made in zip(latents, zip(*parts, strict=True), strict=True):
        assert torch.allclose(torch.cat(made, 1), whole, atol=1e-5, rtol=0)


def test_phases_are_exact_after_an_hour(codec: TinyCodec) -> None:
    getcontext().prec = 50
    first = 25 * 3600 + 1
    start = CLOCK.samples(range(first, first + 1)).start
    for k in (0, 31, 61):
        knots = torch.zeros(1, 5, 62)
        knots[..., k] = 1
        made = codec.bank(knots, start // 160)[0].double().numpy()
        hertz = Decimal(220) * Decimal(2) ** (Decimal(k) / 12)
        turns = [float(hertz * n / 16_000 % 1) for n in range(start, start + 640)]
        assert np.abs(made - np.sin(2 * np.pi * np.array(turns))).max() < 1e-5


def test_a_stream_sounds_the_same_sample_index_an_hour_in(codec: TinyCodec, latents: AV[torch.Tensor]) -> None:
    first = 25 * 3600 + 1
    state = DecodeState(AV(10_801, first), torch.zeros(2, 1, 62))
    piece = codec.decode(AV(latents.video[:, :1], latents.audio[:, 40:44]), state)
    knots = torch.cat([torch.zeros(2, 1, 62), codec.knots(latents.audio[:, 40:44])], 1)
    assert torch.equal(piece.audio, codec.bank(knots, 4 * 25 * 3600 + 1).clamp(-1, 1))
    assert piece.video.shape[1] == 8 and state.latents == AV(10_802, first + 4)


def test_latents_have_unit_variance(latents: AV[torch.Tensor]) -> None:
    for stream in latents:
        assert stream.mean().abs() < 0.15 and 0.8 < stream.std() < 1.2
        assert stream.abs().max() < 12


def test_pictures_survive_the_round_trip(codec: TinyCodec) -> None:
    found = measure(codec, range(1_000_050, 1_000_054), "cpu")
    assert found["psnr_db"] > 30
    assert found["psnr_noise_0.1_db"] > 29
    assert found["knot_snr_db"] > 12


def test_true_knots_keep_the_moment_of_an_impact() -> None:
    scene = world.scene(5, "a red ball, wood")
    knots = true_knots([scene], 201, CLOCK)[0].sum(-1)
    curve = np.interp(np.arange(0, 2, 1e-3), np.arange(1, 202) / 100, knots)
    for hit in world.impacts(scene, 0.3, 1.8):
        near = curve[round(hit.time_s * 1000) - 40 : round(hit.time_s * 1000) + 15]
        half = np.argmax(near > (near.min() + near.max()) / 2) - 40
        assert abs(half) <= 5


def test_true_knots_hold_the_hum_at_its_level_throughout() -> None:
    scene = world.scene(5, hum=True)
    knots = true_knots([scene], 101, CLOCK)[0]
    # The fit of lines ends with the clip, which costs its last knots up to a twelfth.
    assert np.allclose(knots[4:-4, scene.hum], world.HUM_LEVEL, rtol=0.01)
    assert np.allclose(knots[:, scene.hum], world.HUM_LEVEL, rtol=0.1)


@pytest.mark.parametrize("level", [1.0, 50.0])
def test_any_footage_and_any_latents_stay_bounded(codec: TinyCodec, level: float) -> None:
    dice = torch.Generator().manual_seed(0)
    footage = AV(torch.rand(1, 9, 64, 64, 3, generator=dice) * 2 - 1, torch.rand(1, 5_920, generator=dice) * 2 - 1)
    for signal in codec.decode(codec.encode(footage).map(lambda z: z * level)):
        assert signal.isfinite().all() and signal.abs().max() <= 1


def test_odd_lengths_and_shapes_are_named(codec: TinyCodec) -> None:
    frames, samples = torch.zeros(1, 9, 64, 64, 3), torch.zeros(1, 800)
    with pytest.raises(ValueError, match=r"8k \+ 1, found 8"):
        codec.encode(AV(frames[:, 1:], samples))
    with pytest.raises(ValueError, match=r"640k \+ 160, found 640"):
        codec.encode(AV(frames, samples[:, 160:]))
    with pytest.raises(ValueError, match=r"64 x 64 x 3, found \(32, 64, 3\)"):
        codec.encode(AV(frames[:, :, 32:], samples))
    with pytest.raises(ValueError, match=r"video latents are \(4, 4, 32\)"):
        codec.decode(AV(torch.zeros(1, 1, 4, 4, 16), torch.zeros(1, 1, 32)))


def test_a_file_gives_back_the_codec(codec: TinyCodec, clip: AV[torch.Tensor], tmp_path: Path) -> None:
    again = load_codec(save_codec(codec, tmp_path / "codec.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["codec.safetensors"]
    assert again.metrics == codec.metrics and again.config == codec.config and again.clock == codec.clock
    assert all(torch.equal(a, b) for a, b in zip(codec.encode(clip), again.encode(clip), strict=True))
    assert FILE.stat().st_size < 3_000_000


def test_a_wrong_file_is_refused_by_name(codec: TinyCodec, tmp_path: Path) -> None:
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(b"not a codec")
    with pytest.raises(ValueError, match=r"wrong.safetensors cannot be read"):
        load_codec(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="format None, expected"):
        load_codec(path)
    del codec.decoders[1].layers[4]
    save_codec(codec, path)
    with pytest.raises(ValueError, match=r"layers\.4\.weight"):
        load_codec(path)


def test_training_is_the_same_twice_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_few(whole):
        return lambda codec, seeds, *how, **more: whole(codec, seeds[:4], *how, **more)

    for name in ("settle", "measure"):
        monkeypatch.setattr(codec_training, name, on_few(getattr(codec_training, name)))
    one, two = (train_codec(steps=3, batch=2, seconds=1, pooled=2, seed=4, progress=False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    three = train_codec(steps=12, batch=2, seconds=1, pooled=2, seed=4, progress=False)
    assert three.metrics["psnr_db"] > one.metrics["psnr_db"]


def test_only_the_stream_that_learns_changes_and_in_the_world_that_is_drawn() -> None:
    drawn: list[int] = []

    def hums(seed: int) -> world.Scene:
        drawn.append(seed)
        return world.scene(seed, hum=True, hidden=True)

    how = {"steps": 2, "batch": 2, "seconds": 1, "pooled": 2, "progress": False, "draw": hums}
    before, after = load_codec(FILE).state_dict(), train_codec(load_codec(FILE), learns=AV(False, True), **how)
    changed = {name.split(".")[1] for name, x in after.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {"1"}  # encoders.1, decoders.1, scales.1
    assert {*drawn} >= {*range(world.HELD_OUT - 96, world.HELD_OUT + 16)}  # scales and measures, too
