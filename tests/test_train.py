"""Laws of training: reproducible to the bit, whatever interrupts it; every stage learns what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from test_transformer import TINY

from omniforcing_lib import losses, masks
from omniforcing_lib.flow import DMD_GUIDANCE, Guidance, both, guided_denoiser, ltx2_sigmas, noised, spread
from omniforcing_lib.layout import AV, BlockLayout
from omniforcing_lib.rollout import RolloutConfig, fresh_noise, rollout
from omniforcing_lib.training import dataset, stage3, stages, train
from omniforcing_lib.training.dataset import Clips, Pairs, Prompts
from omniforcing_lib.training.stage3 import DMDConfig, OnPolicyConfig, StudentClips
from omniforcing_lib.training.train import Learner, OptimConfig
from omniforcing_lib.transformer import Transformer
from studies import distill

GRID, FRAMES = (2, 2), 5
CAUSAL = RolloutConfig(BlockLayout(AV(1, 1), AV(2, 5), sinks=2), steps=(1000, 522, 0))
SIZES = AV((FRAMES, *GRID, 3), (11, 5))
QUICK = OptimConfig(lr=3e-3, warmup=2, ema=0.5)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def new_learner(recipe: OptimConfig = QUICK, *, sinks: int = 2, seed: int = 0) -> Learner:
    model, generator = Transformer(TINY.with_sinks(sinks)), torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.15
    return Learner(model, recipe)


def prompts() -> Prompts:
    return Prompts(("one", "two"), AV(draw(3, 4, 6, seed=1), draw(3, 4, 6, seed=2)))


def pairs(count: int = 3) -> Pairs:
    states = SIZES.map(lambda size: draw(count, 3, *size, seed=len(size)))
    return Pairs(states, CAUSAL.sigmas.float(), torch.arange(count) % 2)


def flow_stage(**how: object) -> tuple[dict[str, Learner], train.Step]:
    learner, known = new_learner(sinks=0), Clips(distill.ends(pairs()), pairs().prompt)
    return {"teacher": learner}, stages.flow_stage(learner, known, prompts(), batch=4, **how)


def ode_stage(**how: object) -> tuple[dict[str, Learner], train.Step]:
    learner = new_learner()
    return {"student": learner}, stages.ode_stage(learner, pairs(), prompts(), CAUSAL, batch=4, **how)


def clips(batch: int = 2, causal: RolloutConfig = CAUSAL, frames: int = FRAMES) -> StudentClips:
    return StudentClips(prompts(), causal, GRID, frames, batch)


def self_forcing_stage(batch: int = 2, ratio: int = 2, **config: object) -> tuple[dict[str, Learner], train.Step]:
    student, critic = new_learner(seed=1), new_learner(replace(QUICK, ema=0.0), sinks=0)
    teacher = new_learner(sinks=0).model.requires_grad_(False).eval()
    step = stage3.SelfForcing(student, critic, teacher, clips(batch), DMDConfig(ratio=ratio, **config))
    return {"student": student, "critic": critic}, step


def on_policy_stage(**config: object) -> tuple[dict[str, Learner], train.Step]:
    student, teacher = new_learner(seed=1), new_learner(sinks=0).model.requires_grad_(False).eval()
    step = stage3.OnPolicy(student, teacher, pairs(), clips(), OnPolicyConfig(**{"stride": 4} | config))
    return {"student": student}, step


STAGES = {
    "flow": flow_stage,
    "ode": ode_stage,
    "self-forcing": self_forcing_stage,
    "on-policy": on_policy_stage,
}
each_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)


def state(learner: Learner) -> dict[str, torch.Tensor]:
    """Copy all that a learner stores."""
    return {name: tensor.clone() for name, tensor in learner.state_dict().items()}


def ended(learners: dict[str, Learner]) -> dict[str, torch.Tensor]:
    return {f"{name}/{key}": tensor for name, learner in learners.items() for key, tensor in state(learner).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run(stage, steps: int, **how: object) -> dict[str, torch.Tensor]:
    learners, step = stage()
    train.fit(step, learners, steps, progress=False, **how)
    return ended(learners)


@each_stage
def test_killed_and_resumed_ends_as_unbroken(stage, tmp_path):
    """Weights, averages and optimiser states are the same to the bit, wherever the run was cut."""
    unbroken = run(stage, 3)
    for cut in (1, 2):
        checks = iter(range(cut))
        run(
            stage, 4, folder=tmp_path / str(cut), every=100, stop=lambda checks=checks, cut=cut: next(checks) == cut - 1
        )
        notes = json.loads((tmp_path / str(cut) / f"state-{cut:08d}" / "notes.json").read_text())
        assert notes["step"] == cut
        assert same(run(stage, 3, folder=tmp_path / str(cut)), unbroken)


def test_a_finished_run_does_not_train_again(tmp_path):
    learners, step = ode_stage()
    train.fit(step, learners, 3, folder=tmp_path, progress=False)
    assert train.fit(step, learners, 3, folder=tmp_path, progress=False).numbers == {}


@each_stage
def test_same_seed_same_bits_and_another_seed_others(stage):
    first = run(stage, 3, seed=4)
    assert same(first, run(stage, 3, seed=4)) and not same(first, run(stage, 3, seed=5))


def test_a_run_resumed_with_another_seed_is_refused(tmp_path):
    run(ode_stage, 2, seed=1, folder=tmp_path)
    with pytest.raises(ValueError, match="seed 1, found 2"):
        run(ode_stage, 3, seed=2, folder=tmp_path)


def test_seeds_of_steps_are_all_different():
    assert len({train.mixed(seed, step) for seed in range(30) for step in range(300)}) == 9000


@pytest.mark.parametrize("stage", [flow_stage, ode_stage], ids=["flow", "ode"])
def test_losses_fall_on_a_clip_or_two(stage):
    learners, step = stage()
    history = train.fit(step, learners, 80, progress=False)
    for name in ("video", "audio"):
        first = sum(map(float, history.numbers[name][:10])) / 10
        assert history.mean(name, 20) < 0.8 * first


def test_stage_2_regresses_states_whose_latents_all_have_the_level_of_their_block():
    """One level a block, the same in both streams, any of them, clean too; what is seen is the trajectory at it.

    The blocks are written out: neither the block table nor a ratio of lengths says what is right here.
    """
    blocks, known, learner, calls = AV([0, 1, 1, 2, 2], [0] + [1] * 5 + [2] * 5), pairs(1), new_learner(), []
    learner.model.register_forward_hook(lambda _, args, how, out: calls.append((*args[:2], how, out)), with_kwargs=True)
    step = stages.ode_stage(learner, known, prompts(), replace(CAUSAL, window=0), batch=6)
    for i in range(6):
        numbers = step(i, torch.Generator().manual_seed(i))
        x, sigma, how, velocity = calls[-1]
        assert how["masks"] == masks.build(CAUSAL.layout, FRAMES, 4, window=0)
        number = sigma.map(lambda s: (s[..., None] == known.sigmas).int().argmax(-1))
        drawn = torch.stack([number.video[:, blocks.video.index(k)] for k in range(3)], dim=1)
        for stream, name in enumerate(AV._fields):
            states = known.states[stream]
            assert torch.equal(number[stream], drawn[:, blocks[stream]])
            assert torch.equal(sigma[stream], known.sigmas[number[stream]])
            seen = torch.stack([torch.stack([states[0, n, f] for f, n in enumerate(row)]) for row in number[stream]])
            assert torch.equal(x[stream], seen)
            level = sigma[stream].reshape(*sigma[stream].shape, *[1] * (seen.dim() - 2))
            missed = (x[stream] - level * velocity[stream] - states[:, -1])[sigma[stream] > 0]
            torch.testing.assert_close(numbers[name], missed.square().mean().detach())
        assert set(drawn.flatten().tolist()) == {0, 1, 2} and len(drawn.unique(dim=0)) > 2


def test_every_exit_step_is_drawn_for_the_student_and_for_the_critic():
    """All steps of the student learn, the first and the last too, and the critic sees clips that left at any."""
    causal, left = replace(CAUSAL, steps=(1000, 757, 522, 0)), {True: [], False: []}

    class Made(StudentClips):
        def sample(self, student, generator, exit_step, micro_batch, watch=None):
            left[torch.is_grad_enabled()].append(exit_step)
            made = SIZES.map(lambda size: torch.randn(1, *size, generator=generator) * student.proj_out.weight.mean())
            return prompts().take(torch.tensor([0])), made

    student, critic = new_learner(seed=1), new_learner(sinks=0)
    teacher = new_learner(sinks=0).model.requires_grad_(False)
    step = stage3.SelfForcing(student, critic, teacher, Made(**vars(clips(1, causal))), DMDConfig(ratio=1))
    for i in range(30):
        step(i, torch.Generator().manual_seed(train.mixed(0, i)))
    for drawn in left.values():
        assert len(drawn) == 30 and all(drawn.count(exit_step) >= 4 for exit_step in range(3))
    assert left[True] != left[False]


def test_stage_3_pulls_from_what_the_critic_says_to_what_the_guided_teacher_says(monkeypatch):
    """Which of the two scores is which decides the direction, and nothing in the numbers of a run would show it."""
    calls, dmd = [], losses.dmd
    monkeypatch.setattr(losses, "dmd", lambda *args: calls.append(args) or dmd(*args))
    text, made = prompts().take(torch.tensor([1])), SIZES.map(lambda size: draw(1, *size, seed=9))

    class Made(StudentClips):
        def sample(self, student, generator, exit_step, micro_batch, watch=None):
            return text, made.map(lambda clip: clip * student.proj_out.weight.mean())

    students, critic, teacher = new_learner(seed=1), new_learner(sinks=0, seed=2), new_learner(sinks=0, seed=3).model
    stage3.SelfForcing(students, critic, teacher, Made(**vars(clips(1))))(0, torch.Generator())
    ((x_hat, fake, real, sigma, eps, _),) = calls
    x = x_hat.map(noised, eps, both(sigma))
    with torch.no_grad():
        wanted = guided_denoiser(critic.model, text), guided_denoiser(teacher, text, prompts().negative, DMD_GUIDANCE)
        for found, score in zip((fake, real), wanted, strict=True):
            assert all(map(torch.equal, found(x, sigma), score(x, sigma)))
    assert not torch.equal(fake(x, sigma).video, real(x, sigma).video)


@each_stage
def test_a_stream_of_weight_zero_teaches_nothing(stage):
    for weights, moves in ((AV(0.0, 0.0), False), (AV(1.0, 0.0), True), (AV(0.0, 1.0), True)):
        numbers = stage(weights=weights)[1](0, torch.Generator().manual_seed(0))
        assert [float(n) > 0 for name, n in numbers.items() if name in ("norm", "critic_norm")] in (
            [moves],
            [moves] * 2,
        )


def test_what_lasts_in_the_sound_counts_beside_its_latents():
    plain, steady = (flow_stage(steady=weight)[1](0, torch.Generator().manual_seed(0)) for weight in (0.0, 3.0))
    assert steady["video"] == plain["video"] and steady["audio"] > plain["audio"]
    with pytest.raises(ValueError, match="without masks"):
        flow_stage(steady=1.0, causal=CAUSAL)


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_the_teacher_learns_its_negative_prompt_where_prompts_are_dropped(drop):
    learners, step = flow_stage(drop=drop)
    heard = []
    learners["teacher"].model.register_forward_hook(lambda _, args, out: heard.extend(args[2].video))
    step(0, torch.Generator().manual_seed(0))
    known = prompts().context.video
    numbers = [next(n for n in range(3) if torch.equal(text, known[n])) for text in heard]
    assert len(numbers) == 4 and {n == 2 for n in numbers} == {bool(drop)}


def test_every_clip_is_drawn_and_none_that_is_not_there():
    drawn = stages.pick(5, 400, torch.Generator().manual_seed(0)).bincount(minlength=6)
    assert (drawn[:5] > 50).all() and drawn[5:].tolist() == [0]


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_only_guidance_moves_the_student_where_critic_and_teacher_agree(cfg):
    """With one model as critic and teacher the scores cancel, and what remains is the prompt's pull."""
    student, critic = new_learner(seed=1), new_learner(sinks=0)
    teacher = new_learner(sinks=0).model.requires_grad_(False).eval()
    config = DMDConfig(guidance=Guidance(cfg=AV(cfg, cfg)))
    step = stage3.SelfForcing(student, critic, teacher, clips(), config)
    norm = float(step(0, torch.Generator().manual_seed(0))["norm"])
    assert norm == 0 if cfg == 1 else norm > 1e-3


def test_on_policy_block_0_is_left_to_the_trajectories():
    """Block 0, which the trajectories keep, never counts; a later block that sees less than its teacher has to move."""
    layout = replace(CAUSAL.layout, sinks=0)
    causal = replace(CAUSAL, steps=(1000, 500, 100, 0), layout=layout)
    student, teacher = new_learner(sinks=0), new_learner(sinks=0).model.requires_grad_(False).eval()
    config = OnPolicyConfig(guidance=Guidance(), stride=1, regression=0.0)
    for blocks, expected in ((1, {1: {False}, 2: {False}}), (2, {1: {True}, 2: {True}})):
        moved = {1: set(), 2: set()}
        frames = layout.block(blocks - 1).video.stop
        step = stage3.OnPolicy(student, teacher, pairs(), clips(2, causal, frames), config)
        for i in range(6):
            student.model.load_state_dict(teacher.state_dict())
            exit_step = 1 + int(torch.randint(2, (), generator=torch.Generator().manual_seed(i)))
            moved[exit_step].add(float(step(i, torch.Generator().manual_seed(i))["norm"]) > 1e-6)
        assert moved == expected


def first_blocks(count: int = 4) -> Pairs:
    states = AV((1, *GRID, 3), (1, 5)).map(lambda size: draw(count, 4, *size, seed=len(size)))
    return Pairs(states, replace(CAUSAL, steps=(1000, 500, 100, 0)).sigmas.float(), torch.arange(count) % 2)


def test_block_0_learns_from_trajectories_of_its_own_alone():
    """Then the ends of the teacher's pairs in block 0 count for nothing, and those of its own do."""
    causal = replace(CAUSAL, steps=(1000, 500, 100, 0))
    teacher = new_learner(sinks=0).model.requires_grad_(False).eval()
    states = SIZES.map(lambda size: draw(3, 4, *size, seed=len(size)))
    wrong = states.map(torch.clone)
    for stream in wrong:
        stream[:, -1, :1] += 100

    def losses_of(states: AV[torch.Tensor], first: Pairs | None) -> list[float]:
        taught = Pairs(states, causal.sigmas.float(), torch.arange(3) % 2)
        config = OnPolicyConfig(guidance=Guidance(), stride=4, regression=1.0, first_blocks=2)
        step = stage3.OnPolicy(new_learner(seed=1), teacher, taught, clips(2, causal), config, first_blocks=first)
        metrics = step(0, torch.Generator().manual_seed(0))
        return [float(metrics[name]) for name in ("video", "audio")]

    assert min(losses_of(wrong, None)) > 10 * max(losses_of(states, None))
    assert losses_of(wrong, first_blocks()) == losses_of(states, first_blocks())
    far = first_blocks()
    for stream in far.states:
        stream[:, -1] += 100
    assert min(losses_of(states, far)) > 10 * max(losses_of(states, first_blocks()))


def test_first_blocks_end_where_their_own_noise_and_the_clean_past_lead():
    """The same noise gives the same blocks in any batch; a causal model under masks goes the same way."""
    causal = replace(CAUSAL, steps=(1000, 500, 100, 0))
    model = new_learner().model.requires_grad_(False).eval()
    together = dataset.first_block_pairs(model, causal, prompts(), range(4), GRID, steps=6)
    alone = dataset.first_block_pairs(model, causal, prompts(), range(4), GRID, steps=6, batch=1)
    last = causal.layout.block(1)
    assert together.states.map(lambda s: s.shape[:3]) == last.map(lambda span: (4, 4, span.stop))
    for a, b in zip(together.states, alone.states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    mask = masks.build(causal.layout, last.video.stop, GRID[0] * GRID[1], window=causal.window)
    for k in range(2):
        blocks = causal.layout.block(k)
        x = together.states.map(lambda s, at: torch.cat([s[:, -1, : at.start], s[:, 0, at.start :]], 1), blocks)
        for now, after in pairwise(ltx2_sigmas(6).tolist()):
            level = x.map(
                lambda part, at, now=now: torch.full(part.shape[:2], now).index_fill(1, torch.arange(at.start), 0.0),
                blocks,
            )
            velocity = model(x, level, prompts().take(together.prompt), masks=mask)
            x = x.map(
                lambda part, v, level, step=after - now: part + step * v * spread(level > 0, part), velocity, level
            )
        for a, b, at in zip(x, together.states, blocks, strict=True):
            torch.testing.assert_close(a[:, at.start : at.stop], b[:, -1, at.start : at.stop], atol=1e-4, rtol=1e-4)


def test_what_has_left_the_window_is_not_recomputed():
    student, other, causal = (
        new_learner(replace(QUICK, recompute=True)),
        new_learner(sinks=0),
        replace(CAUSAL, window=0),
    )
    for begin in (
        lambda: stage3.SelfForcing(student, other, other.model, clips(1, causal)),
        lambda: stage3.OnPolicy(student, other.model, pairs(), clips(1, causal)),
    ):
        with pytest.raises(ValueError, match="3 blocks, a window of 0; train clips of 2 blocks"):
            begin()


def test_states_on_policy_need_a_level_between_noise_and_data():
    with pytest.raises(ValueError, match="three steps or more"):
        stage3.OnPolicy(None, None, None, clips(1, replace(CAUSAL, steps=(1000, 0))))


def test_regression_beside_dmd_adds_its_own_loss():
    """Where the scores cancel, what moves the student is the regression, by its weight."""
    norms = []
    for weight in (0.0, 1.0):
        student, critic = new_learner(seed=1), new_learner(sinks=0)
        teacher = new_learner(sinks=0).model.requires_grad_(False).eval()
        config = DMDConfig(guidance=Guidance(), regression=weight)
        step = stage3.SelfForcing(student, critic, teacher, clips(), config, pairs=pairs())
        norms.append(float(step(0, torch.Generator().manual_seed(0))["norm"]))
    assert norms[0] == 0 < norms[1]


def test_the_critic_learns_in_every_step_and_the_student_in_every_fifth():
    learners, _ = self_forcing_stage()
    student, critic = learners.values()
    teacher = new_learner(sinks=0).model.requires_grad_(False)
    step = stage3.SelfForcing(student, critic, teacher, clips(1), DMDConfig(ratio=5))
    for i in range(6):
        before = {name: p.model.proj_out.weight.detach().clone() for name, p in learners.items()}
        numbers = step(i, torch.Generator().manual_seed(i))
        moved = {name for name, p in learners.items() if not torch.equal(p.model.proj_out.weight, before[name])}
        assert moved == ({"student", "critic"} if i in (0, 5) else {"critic"})
        assert ("dmd_video" in numbers) == (i in (0, 5))


def test_training_after_sampling_in_inference_mode():
    """What sampling leaves behind (tables, caches) can be used where gradients flow."""
    learners, step = self_forcing_stage()
    with torch.inference_mode():
        text, noise = prompts().take(torch.tensor([0])), fresh_noise(torch.Generator(), 1)
        [*rollout(learners["student"].model, CAUSAL, text, noise, GRID, FRAMES)]
    assert float(step(0, torch.Generator())["norm"]) > 0


def test_take_level_picks_the_state_of_each_latents_level():
    states, level = draw(2, 4, 3, 2, 2, seed=0), torch.tensor([[0, 3, 1], [2, 2, 0]])
    picked = stages.take_level(states, level)
    assert picked.shape == (2, 3, 2, 2)
    for clip, latent in [(c, f) for c in range(2) for f in range(3)]:
        assert torch.equal(picked[clip, latent], states[clip, level[clip, latent], latent])


def test_the_rate_warms_up_then_falls_as_a_cosine():
    recipe = OptimConfig(lr=2.0, warmup=4, steps=104, final=0.1)
    assert [recipe.rate(i) for i in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert recipe.rate(54) == pytest.approx(2.0 * 0.55) and recipe.rate(104) == recipe.rate(900) == pytest.approx(0.2)
    assert replace(recipe, steps=0).rate(10_000) == 2.0


def test_a_decay_that_leaves_all_is_none():
    plain, decayed = OptimConfig(lr=3e-4, warmup=4), OptimConfig(lr=3e-4, warmup=4, steps=50, final=1.0)
    assert [plain.rate(i) for i in range(60)] == [decayed.rate(i) for i in range(60)]


def test_the_average_follows_the_model():
    learner = new_learner(OptimConfig(lr=0.1, warmup=1, ema=0.75))
    weight, average = learner.model.proj_out.weight, learner.average.proj_out.weight
    before = weight.detach().clone()
    learner.update(learner.model.proj_out.weight.square().sum())
    assert not torch.equal(weight, before)
    torch.testing.assert_close(average, 0.75 * before + 0.25 * weight.detach())
    assert learner.best is learner.average and new_learner(replace(QUICK, ema=0.0)).best is not None


def test_a_gradient_that_is_not_finite_changes_nothing():
    learner = new_learner()
    before = state(learner)
    norm = learner.update(learner.model.proj_out.weight.sum() * float("nan"))
    assert not torch.isfinite(norm) and learner.skipped == 1 and same(state(learner), before)


def test_matrices_decay_and_biases_do_not():
    learner = new_learner(OptimConfig(weight_decay=0.1))
    decays = {id(p): g["weight_decay"] for g in learner.optimiser.param_groups for p in g["params"]}
    assert all(decays[id(p)] == (0.1 if p.dim() > 1 else 0.0) for p in learner.model.parameters())
    assert len(decays) == len([*learner.model.parameters()])


def test_noise_levels_lean_towards_noise_and_stay_in_range():
    sigma = stages.training_sigma(4096, torch.Generator().manual_seed(0))
    assert 0 < sigma.min() and sigma.max() <= 1
    mild, strong = sigma[::2], sigma[1::2]
    assert 0.5 < mild.median() < 0.75 < strong.median() < 0.95
