"""Laws of schedules, conversions, guidance and the sampler."""

from dataclasses import replace

import pytest
import torch

from omniforcing_lib import flow
from omniforcing_lib.flow import Guidance, Skip
from omniforcing_lib.layout import AV

TABLE_40 = """1 .99645 .99274 .98885 .98478 .98051 .97603 .97131 .96635 .96112 .95559 .94975 .94357 .93701 .93004
.92261 .91470 .90623 .89716 .88741 .87691 .86556 .85327 .83991 .82532 .80934 .79176 .77231 .75070 .72652 .69931
.66845 .63315 .59238 .54477 .48843 .42072 .33781 .23394 .1 0"""
SHAPES = AV((3, 4, 4, 8), (5, 8))


def pair(seed: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> AV:
    g = torch.Generator().manual_seed(seed)
    return SHAPES.map(lambda shape: torch.randn(batch, *shape, generator=g, dtype=dtype))


def context(seed: int, batch: int = 2) -> AV:
    g = torch.Generator().manual_seed(seed)
    return AV(*(torch.randn(batch, 6, 8, generator=g, dtype=torch.float64) for _ in range(2)))


class ToyModel:
    """A velocity that depends on everything a real one does, and remembers how it was called."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, sigma, text, skip=None):
        skip = skip or Skip()
        self.calls.append((len(x.video), skip))
        other = AV(x.audio.flatten(1).mean(1), x.video.flatten(1).mean(1)).map(lambda m: m * (not skip.cross_modal))
        prompt = text.map(lambda t: t.flatten(1).square().mean(1))

        def stream(x, sigma, other, prompt):
            own = torch.tanh(x) * (0.5 if skip.self_attention else 1.0)
            return own + flow.spread(sigma + other + prompt, x)

        return x.map(stream, sigma, other, prompt)


def scheduler(steps):
    """The scheduler of diffusers as its LTX-2 pipeline sets it up."""
    module = pytest.importorskip(
        "diffusers.schedulers.scheduling_flow_match_euler_discrete", reason="needs the extra ltx2"
    )
    theirs = module.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        shift_terminal=0.1 if steps > 1 else None,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
    )
    theirs.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=2.05)
    return theirs


@pytest.mark.parametrize("steps", [1, 2, 30, 40])
def test_schedule_is_the_one_of_diffusers(steps):
    torch.testing.assert_close(flow.ltx2_sigmas(steps).float(), scheduler(steps).sigmas, rtol=0, atol=1e-6)


def test_schedule_of_40_steps_is_the_printed_table():
    torch.testing.assert_close(
        flow.ltx2_sigmas(40), torch.tensor([float(x) for x in TABLE_40.split()]).double(), rtol=0, atol=6e-6
    )


def test_fewer_tokens_shift_the_schedule_less():
    assert (flow.ltx2_sigmas(40, tokens=1024) < flow.ltx2_sigmas(40))[1:-2].all()


@pytest.mark.parametrize(
    "steps, indices, sigmas",
    [
        (flow.PAPER_STEPS, (0, 28, 34, 40), (1, 0.750697, 0.544771, 0)),
        (flow.RELEASED_STEPS, (0, 17, 29, 36, 40), (1, 0.906229, 0.726524, 0.420719, 0)),
        ((1000, 750, 500, 0), (0, 28, 35, 40), (1, 0.750697, 0.48843, 0)),
        (
            (1000, 993, 987, 981, 975, 909, 725, 421, 0),
            (0, 2, 3, 5, 6, 17, 29, 36, 40),
            (1, 0.99274, 0.98885, 0.98051, 0.97603, 0.90623, 0.72652, 0.42072, 0),
        ),
    ],
    ids=["paper", "released", "fast", "distilled"],
)
def test_step_lists_snap_to_the_schedule(steps, indices, sigmas):
    assert flow.snap_indices(steps) == indices
    torch.testing.assert_close(flow.snap(steps), torch.tensor(sigmas, dtype=torch.float64), rtol=0, atol=6e-6)


@pytest.mark.parametrize("steps", [(), (0, 1000), (1001, 0), (1000, 999, 0)])
def test_a_step_list_that_cannot_be_a_schedule_is_refused(steps):
    with pytest.raises(ValueError, match=r"step list|one entry"):
        flow.snap(steps)


def test_dmd_timesteps_map_to_the_printed_noise_levels():
    lut = flow.dmd_lut()
    expected = {0: 0, 1: 0.1, 20: 0.217, 100: 0.513, 250: 0.747, 500: 0.897, 750: 0.963, 900: 0.987, 1000: 1}
    assert {t: round(lut[t].item(), 3) for t in expected} == expected
    assert len(lut) == 1001 and round(lut[980].item(), 4) == 0.9976


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (1, 3), (2, 1)], ids=str)
def test_conversions_agree_for_every_shape_of_sigma(shape):
    sigma = 0.1 + 0.9 * torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0, eps = pair(1).video, pair(2).video
    x = flow.noised(x0, eps, sigma)
    torch.testing.assert_close(flow.x0_of(x, eps - x0, sigma), x0)
    torch.testing.assert_close(flow.velocity_of(x0, x, sigma), eps - x0)
    for b, f in ((0, 0), (1, 2)):
        level = sigma[tuple(min(i, n - 1) for i, n in zip((b, f), shape, strict=False))]
        torch.testing.assert_close(x[b, f], (1 - level) * x0[b, f] + level * eps[b, f])


def test_noise_levels_are_not_rounded_with_the_latents():
    x0, eps = (pair(s, dtype=torch.bfloat16).video for s in (1, 2))
    x = flow.noised(x0, eps, torch.tensor(0.906229, dtype=torch.float64))
    torch.testing.assert_close(x, (1 - 0.906229) * x0.float() + 0.906229 * eps.float())


def test_noise_levels_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 4, 8\].*found \[2, 5\]"):
        flow.noised(pair(1).video, pair(2).video, torch.ones(2, 5))


def test_guidance_is_the_formula_of_the_teacher():
    c, u, s, m = (pair(i) for i in range(4))
    out = flow.guide(flow.LTX2_GUIDANCE, c, u, s, m)
    for i, w in enumerate((3.0, 7.0)):
        plain = c[i] + (w - 1) * (c[i] - u[i]) + 1.0 * (c[i] - s[i]) + (3.0 - 1) * (c[i] - m[i])
        for b in range(2):
            expected = plain[b] * (0.7 * c[i][b].std() / plain[b].std() + 0.3)
            torch.testing.assert_close(out[i][b], expected)


def test_guidance_that_is_off_changes_nothing_and_needs_no_pass():
    assert all(torch.equal(a, b) for a, b in zip(flow.guide(Guidance(), pair(0)), pair(0), strict=True))


@pytest.mark.parametrize("field, name", [("cfg", "uncond"), ("stg", "perturbed"), ("modality", "unimodal")])
def test_a_missing_pass_is_named(field, name):
    guidance = Guidance(**{field: (1.0, 2.0)}, stg_blocks={0})
    with pytest.raises(ValueError, match=f"`{name}`"):
        flow.guide(guidance, pair(0))


@pytest.mark.parametrize(
    "sigmas", [flow.DISTILLED_SIGMAS, tuple(flow.ltx2_sigmas(6).tolist())], ids=["distilled", "dev"]
)
@pytest.mark.parametrize("i, seed", [(0, 5), (1, 9)])
def test_ancestral_steps_are_those_of_diffusers_scheduler(sigmas, i, seed):
    """Levels, arithmetic and noise: generator of seed + 10000, at each step video first; one sample as in a batch."""
    from diffusers import LTXEulerAncestralRFScheduler

    def denoise(x, sigma=None):
        return x.map(lambda part: 0.3 * part.sin() + 0.5)

    noise, levels = pair(3, dtype=torch.float32), torch.tensor(sigmas)
    ours = flow.euler(denoise, noise, levels, fresh=flow.ancestral_noise([5, 9], noise)).map(lambda t: t[i : i + 1])
    schedulers = AV(LTXEulerAncestralRFScheduler(), LTXEulerAncestralRFScheduler())
    schedulers.map(lambda scheduler: scheduler.set_timesteps(sigmas=list(sigmas)))
    generator, x = torch.Generator().manual_seed(seed + 10_000), noise.map(lambda t: t[i : i + 1])
    for step, level in enumerate(sigmas[:-1]):
        velocity = x.map(lambda part, end, level=level: (part - end) / level, denoise(x))
        x = x.map(
            lambda part, s, v, t=step: s.step(v, s.timesteps[t], part, generator).prev_sample, schedulers, velocity
        )
    for a, b in zip(ours, x, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert not torch.allclose(flow.euler(denoise, noise, levels).video[i], ours.video[0], atol=1e-2)


def test_stg_without_blocks_and_cfg_without_a_negative_prompt_are_refused():
    with pytest.raises(ValueError, match="stg_blocks"):
        Guidance(stg=AV(1.0, 1.0))
    with pytest.raises(ValueError, match="negative"):
        flow.guided_denoiser(ToyModel(), context(0), guidance=flow.DMD_GUIDANCE)


@pytest.mark.parametrize("sigma", [torch.tensor(0.5), torch.tensor([0.5, 0.9])], ids=["one", "per_sample"])
def test_guided_denoiser_equals_its_passes_one_by_one(sigma):
    x, text, negative, levels = pair(0), context(1), context(2, batch=1), flow.both(sigma.expand(2))
    guidance = replace(flow.LTX2_GUIDANCE, stg_blocks={2})

    def one(text, skip):
        text = text.map(lambda t: t.expand(2, -1, -1))
        return x.map(flow.x0_of, ToyModel()(x, levels, text, skip), levels)

    model = ToyModel()
    out = flow.guided_denoiser(model, text, negative, guidance)(x, sigma)
    passes = (
        one(text, Skip()),
        one(negative, Skip()),
        one(text, Skip(frozenset({2}))),
        one(text, Skip(cross_modal=True)),
    )
    torch.testing.assert_close(out, flow.guide(guidance, *passes))
    assert model.calls == [(4, Skip()), (2, Skip(frozenset({2}))), (2, Skip(cross_modal=True))]


def test_only_the_passes_that_count_are_run():
    plain, cfg = ToyModel(), ToyModel()
    flow.guided_denoiser(plain, context(1))(pair(0), torch.tensor(0.5))
    flow.guided_denoiser(cfg, context(1), context(2), flow.DMD_GUIDANCE)(pair(0), torch.tensor(0.5))
    assert (plain.calls, cfg.calls) == ([(2, Skip())], [(4, Skip())])


def test_a_sample_does_not_depend_on_its_batch():
    noise, text = pair(0), context(1)
    denoise = flow.guided_denoiser(ToyModel(), text, context(2, 1), replace(flow.LTX2_GUIDANCE, stg_blocks={2}))
    alone = flow.guided_denoiser(
        ToyModel(), text.map(lambda t: t[:1]), context(2, 1), replace(flow.LTX2_GUIDANCE, stg_blocks={2})
    )
    joint = flow.euler(denoise, noise, flow.ltx2_sigmas(4)).map(lambda x: x[:1])
    torch.testing.assert_close(joint, flow.euler(alone, noise.map(lambda x: x[:1]), flow.ltx2_sigmas(4)))


def test_euler_finds_known_data_in_any_number_of_steps():
    clean, noise = pair(1), pair(2)
    for steps in (1, 3, 40):
        out = flow.euler(lambda x, sigma: clean, noise, flow.ltx2_sigmas(steps))
        assert all(torch.equal(a, b) for a, b in zip(out, clean, strict=True))


def test_euler_follows_the_straight_line_and_stops_where_the_schedule_does():
    clean, noise = pair(1), pair(2)
    out = flow.euler(lambda x, sigma: clean, noise, torch.tensor([1.0, 0.7, 0.4], dtype=torch.float64))
    torch.testing.assert_close(out, clean.map(flow.noised, noise, flow.both(torch.tensor(0.4).double())))


def test_euler_steps_are_those_of_the_scheduler_of_diffusers():
    denoise, states, sigmas = flow.guided_denoiser(ToyModel(), context(1)), [], flow.ltx2_sigmas(5)
    flow.euler(denoise, pair(2), sigmas, lambda i, x: states.append(x))
    theirs = scheduler(5)
    for i, t in enumerate(theirs.timesteps):
        x0 = denoise(states[i], sigmas[i])
        for now, end, after in zip(states[i], x0, states[i + 1], strict=True):
            theirs._step_index = i
            step = theirs.step(flow.velocity_of(end, now, sigmas[i]), t, now).prev_sample
            torch.testing.assert_close(step, after, rtol=0, atol=1e-5)


def test_a_trajectory_keeps_the_states_that_euler_passes():
    denoise, noise, seen = flow.guided_denoiser(ToyModel(), context(1)), pair(2), []
    keep = flow.snap_indices(flow.RELEASED_STEPS)
    end = flow.euler(denoise, noise, flow.ltx2_sigmas(40), lambda i, x: seen.append(x))
    kept = flow.trajectory(denoise, noise, flow.ltx2_sigmas(40), keep)
    assert len(seen) == 41 and kept.video.shape == (2, 5, 3, 4, 4, 8) and kept.audio.shape == (2, 5, 5, 8)
    for stream in range(2):
        assert all(torch.equal(kept[stream][:, n], seen[i][stream]) for n, i in enumerate(keep))
        assert torch.equal(kept[stream][:, 0], noise[stream]) and torch.equal(kept[stream][:, -1], end[stream])


@pytest.mark.parametrize("sigmas", [[1.0], [0.5, 0.9, 0.0], [1.0, 1.0, 0.0], [1.0, -0.1]], ids=str)
def test_a_schedule_that_does_not_fall_is_refused(sigmas):
    with pytest.raises(ValueError, match="schedule falls"):
        flow.euler(lambda x, sigma: x, pair(0), torch.tensor(sigmas))


def test_noise_of_a_block_depends_on_its_name_only():
    base = flow.block_noise([7, 8], 3, SHAPES)
    assert all(torch.equal(a, b) for a, b in zip(base, flow.block_noise([7, 8], 3, SHAPES), strict=True))
    assert torch.equal(base.video[1:], flow.block_noise([8], 3, SHAPES).video)
    shorter = flow.block_noise([7, 8], 3, AV((2, 4, 4, 8), (1, 8)))
    assert torch.equal(shorter.video, base.video[:, :2]) and torch.equal(shorter.audio, base.audio[:, :1])


def test_noises_of_different_names_are_independent():
    draws = [
        flow.block_noise([seed], block, AV((4000,), (4000,)), draw)[stream][0]
        for seed in (0, 1)
        for block in (0, 1)
        for draw in (0, 1)
        for stream in (0, 1)
    ]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(16)
    assert correlation.abs().max() < 0.08
    assert abs(torch.stack(draws).std() - 1) < 0.02 and draws[0].dtype == torch.float32
