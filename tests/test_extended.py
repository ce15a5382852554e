"""Laws of the ablations in the extended world: every arm does what its name says, and no verdict leans."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from test_transformer import TINY, tiny

from omniforcing_lib import files, masks
from omniforcing_lib.cache import KVCache
from omniforcing_lib.layout import AV
from omniforcing_lib.rollout import join, rollout, seeded_noise
from series import claims
from studies import extended
from studies.extended import ARMS, BASE, Arm, Budget, WithoutPrefix

GRID, SEEDS = (2, 2), (3, 4)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student(sinks: int = 16):
    return tiny(TINY.with_sinks(sinks), dtype=torch.float32)


def text() -> AV:
    return AV(draw(2, 4, 6, seed=1), draw(2, 4, 6, seed=2))


def clip(blocks: int) -> AV:
    """Latents of the first blocks of a clip."""
    last = ARMS[BASE].causal.layout.block(blocks - 1).map(lambda span: span.stop)
    return AV(draw(2, last.video, *GRID, 3, seed=5), draw(2, last.audio, 5, seed=6))


def test_every_arm_differs_from_the_recipe_in_one_thing_and_has_a_prediction():
    plain = vars(Arm())
    changed = {name: {k: v for k, v in vars(arm).items() if v != plain[k]} for name, arm in ARMS.items()}
    assert changed.pop(BASE) == {} and all(len(change) == 1 for change in changed.values())
    assert len({json.dumps(change) for change in changed.values()}) == len(changed)
    assert changed.keys() == extended.PREDICTIONS.keys() and all(extended.PREDICTIONS.values())


def test_what_goes_on_from_a_true_past_is_what_a_history_gives():
    given, last = clip(6), 7
    blocks = [*extended.continued(student(), Arm(), text(), SEEDS, given, 1 + 3 * last)]
    layout = Arm().causal.layout
    for k, block in enumerate(blocks[:6]):
        assert all(map(torch.equal, block, given.map(lambda x, span: x[:, span.start : span.stop], layout.block(k))))
    with torch.no_grad():
        noise = seeded_noise(SEEDS, student().proj_out.weight)
        history = join([given, *blocks[6:]])
        told = [*rollout(student(), Arm().causal, text(), noise, GRID, 1 + 3 * last, history=history)]
    for ours, theirs in zip(blocks[6:], told[6:], strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("window", [1, 4])
def test_without_the_prefix_a_block_sees_the_window_alone(window):
    plain, without = (
        kind(TINY.with_sinks(3), Arm().causal.layout, GRID, 1, window, True) for kind in (KVCache, WithoutPrefix)
    )
    for k in range(12):
        for stream, pinned in enumerate(plain.pinned):
            sees = {place for span in plain.open(k).places[stream].history for place in span}
            left = {place for span in without.open(k).places[stream].history for place in span}
            assert left == (sees if k <= window else {place for place in sees if place >= pinned})
            assert k <= window or (0 in sees and len(sees) - len(left) == pinned)
        if k > window:
            assert without.open(k).offset is None and (plain.open(k).offset is not None) == (k > window + 1)


@torch.no_grad()
def test_block_0_is_lost_without_the_prefix_once_it_has_left_the_window(monkeypatch):
    """Keys of sinks and block 0 that are not numbers spoil every later block, or none."""
    spoilt, opened = {}, KVCache.open

    def open_and_spoil(self, k, latents=None, *, writes=True):
        if k == 6:
            for ring in self._rings().values():
                ring.keys[:, :, : ring._pinned] = ring.values[:, :, : ring._pinned] = float("nan")
        return opened(self, k, latents, writes=writes)

    monkeypatch.setattr(KVCache, "open", open_and_spoil)
    for name in (BASE, "no global prefix in use"):
        *_, last = extended.continued(student(), ARMS[name], text(), SEEDS, clip(2), 1 + 3 * 6)
        spoilt[name] = bool(last.video.isnan().any() or last.audio.isnan().any())
    assert spoilt == {BASE: True, "no global prefix in use": False}


@torch.no_grad()
def test_a_deafened_video_does_not_depend_on_the_sound():
    x, sigma = clip(3), AV(torch.full((2,), 0.5), torch.full((2,), 0.5))
    other = AV(x.video, -x.audio)
    copied = copy.deepcopy(extended.deafened(student(0)))
    for model, same in ((student(0), False), (extended.deafened(student(0)), True), (copied, True)):
        a, b = (model(clips, sigma, text()) for clips in (x, other))
        assert torch.equal(a.video, b.video) == same and not torch.equal(a.audio, b.audio)


def test_arms_that_change_roll_outs_alone_train_as_the_recipe_does():
    alike = {name for name, arm in ARMS.items() if arm.in_training(16) == ARMS[BASE]}
    assert alike == {BASE, "no global prefix in use", "window 8"}
    noise, seen, made = seeded_noise(SEEDS, student().proj_out.weight), {}, {}
    for window in (2, 4, 8):
        causal = Arm(window=window).causal
        seen[window] = masks.build(causal.layout, 16, 4, window=window)
        with torch.no_grad():
            made[window] = join([*rollout(student(), causal, text(), noise, GRID, 16)]).audio
    assert seen[8] == seen[4] != seen[2]
    assert torch.equal(made[8], made[4]) and not torch.equal(made[2], made[4])


def test_runs_rest_on_named_files_and_hear_what_they_made(tmp_path):
    budget = Budget(start=1, steps=1, batch=1, clips=1, given=1, seconds=12)
    there = extended.shipped()
    arms = (BASE, "video hears nothing", "true past")
    extended.run(tmp_path, there, arms=arms, seeds=1, budget=budget)
    numbers = extended.TRIALS.numbers(tmp_path)
    assert {*numbers} == {*arms} and all(numbers[BASE][0] != numbers[arm][0] for arm in arms[1:])
    measures = {"hum_kept", "reentry_right", "reentry_px" + extended.FLOOR, "sync_f1", extended.FIRST_LATENT}
    assert measures <= numbers[BASE][0].keys()
    assert {row["says"] for row in extended.told(tmp_path)} == {"not shown"}
    seconds, kept = extended.by_second(tmp_path, "hum_kept")[BASE]
    # The first second is the true past's.
    assert seconds == [*range(12)] and kept[0] == 1 and all(0 <= share <= 1 for share in kept)
    for other in (
        {"budget": replace(budget, clips=2)},
        {"budget": budget, "sources": replace(there, pairs=str(files.DATA / "ode_pairs.safetensors"))},
    ):
        with pytest.raises(ValueError, match="use another folder"):
            extended.run(tmp_path, **{"sources": there} | other, arms=arms, seeds=1)
    with pytest.raises(ValueError, match="judged from second 11 on"):
        Budget(given=1, seconds=11)
    with pytest.raises(ValueError, match="holds no trajectories"):
        extended.run(tmp_path / "new", replace(there, pairs=there.codec), arms=arms, seeds=1, budget=budget)
    with pytest.raises(ValueError, match=r"makes latents of codec\.safetensors .* found the codec .*codec_hum"):
        extended.run(tmp_path / "new", replace(there, teacher="stage2"), arms=arms, seeds=1, budget=budget)
    with pytest.raises(ValueError, match=r"made under other settings: cfg \[1\.0, 1\.0\], found \[3\.0, 3\.0\]"):
        extended.run(tmp_path / "new", there, arms=arms, seeds=1, budget=replace(budget, cfg=3.0))


def test_a_prediction_is_shown_only_by_a_whole_interval_on_its_side(tmp_path):
    gains = {"0 sinks": (-0.3, 0.3), "window 8": (-0.3, -0.3), "window 2": (0.0, 0.0)}
    for arm, shifts in ({BASE: (0.0, 0.0)} | gains).items():
        for seed in range(5):
            hum = 0.5 + shifts[0] + 0.01 * seed * (1 + shifts[0])
            record = {"arm": arm, "seed": seed, "budget": {}, "files": {}}
            record["measures"] = {"hum_kept": hum, "loss of audio latent 0": 1 + shifts[1], "reentry_px": None}
            (tmp_path / f"{arm}-{seed}.json").write_text(json.dumps(record))
    _, how, table = claims.foretold(tmp_path)
    assert "5 training seeds" in how and "| 0 sinks | hum_kept | lower | -0.306 [-0.3" in table
    assert claims.foretold(tmp_path / "none") == []
    says = {(row["arm"], row["measure"]): row["says"] for row in extended.told(tmp_path)}
    assert says == {
        ("0 sinks", "hum_kept"): "shown",
        ("0 sinks", "loss of audio latent 0"): "shown",
        ("window 8", "hum_kept"): "against",
        ("window 2", "hum_kept"): "not shown",
    }
