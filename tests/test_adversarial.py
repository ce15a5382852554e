"""Laws of the remedies with a discriminator: it tells clips apart, and without weight it changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_train import CAUSAL, QUICK, clips, draw, ended, new_learner, pairs, same, self_forcing_stage

from omniforcing_lib.flow import noised
from omniforcing_lib.layout import AV
from omniforcing_lib.training import stage3, train
from omniforcing_lib.training.dataset import Clips
from omniforcing_lib.training.stage3 import DMDConfig
from studies import adversarial, distill
from studies.adversarial import AdversarialForcing, Made


def forcing(count: int = 3, **how: object) -> AdversarialForcing:
    student, critic = new_learner(seed=1), new_learner(replace(QUICK, ema=0.0), sinks=0)
    teacher = new_learner(sinks=0).model.requires_grad_(False).eval()
    real = Clips(distill.ends(pairs(count)), pairs(count).prompt)
    how = {"real": real, "head_start": 2} | how
    return AdversarialForcing(student, critic, teacher, clips(), DMDConfig(ratio=2), **how)


def trained(step: stage3.SelfForcing) -> dict[str, torch.Tensor]:
    learners = {"student": step.student, "critic": step.critic}
    train.fit(step, learners, 2, progress=False)
    return ended(learners)


def test_a_discriminator_without_weight_changes_nothing():
    plain = trained(self_forcing_stage()[1])
    assert same(trained(forcing()), plain)
    for how in ({"gan": 1.0}, {"divergence": "forward KL"}):
        other = trained(forcing(**how))
        assert not all(torch.equal(other[n], plain[n]) for n in plain if n.startswith("student/model"))


def test_the_divergences_weigh_a_clip_by_its_density_ratio():
    logit = torch.tensor([-100.0, -1.0, 0.0, 1.0, 100.0])
    reverse, shannon, forward = (
        adversarial.importance(logit, name) for name in ("reverse KL", "Jensen-Shannon", "forward KL")
    )
    assert (reverse == 1).all() and torch.allclose(shannon, logit.clamp(-3, 3).sigmoid())
    assert torch.allclose(forward, logit.clamp(-3, 3).exp())


def test_a_step_down_the_loss_looks_more_like_the_teacher_and_minds_what_the_student_left_out():
    """Alone, the GAN loss raises the logit; alone, DMD for the forward divergence moves a likely clip the most."""
    step = forcing(gan=1e4)
    made = AV(*(draw(4, *size, seed=9) for size in sizes()))
    text, sigma = step.clips.prompts.take(torch.tensor([0, 1, 0, 1])), torch.full((4,), 0.5)
    eps = AV(*(draw(4, *size, seed=8) for size in sizes()))

    def moved(step: AdversarialForcing) -> AV[torch.Tensor]:
        leaf = made.map(lambda x: x.clone().requires_grad_())
        return AV(*torch.autograd.grad(sum(step.student_loss(leaf, text, sigma, eps)), [*leaf]))

    def logit(x: AV[torch.Tensor]) -> torch.Tensor:
        return step._logit(x.map(noised, eps, AV(sigma, sigma)), text, sigma)

    gradient = moved(step)
    further = made.map(lambda x, g: x - 0.1 * g / g.abs().max(), gradient)
    assert logit(further).mean() > logit(made).mean()
    plain, step = moved(forcing()), forcing(divergence="forward KL")
    step._logit = lambda *_: torch.tensor([2.0, -2.0, 0.0, 0.0])
    shares = [
        float(g[0].norm() / p[0].norm() / (g[1].norm() / p[1].norm())) for g, p in zip(moved(step), plain, strict=True)
    ]
    assert shares == pytest.approx([math.exp(4)] * 2, rel=1e-3)


def test_what_the_discriminator_cannot_serve_is_refused():
    short = Clips(AV(*(draw(3, 4, *size[1:], seed=1) for size in sizes())), torch.zeros(3, dtype=torch.long))
    for how, says in (({"divergence": "none"}, "found 'none'"), ({"real": short}, "latents; found 4")):
        with pytest.raises(ValueError, match=says):
            forcing(**how)


def test_the_discriminator_hears_the_sound_of_another_clip():
    """The sound of the opposite clip: in each stream alone nothing is wrong, so only both together can tell."""
    signs = torch.tensor([1.0, -1.0] * 8)
    real = sizes().map(lambda size: signs.reshape(16, *[1] * len(size)).expand(16, *size))
    step = forcing(real=Clips(real, torch.zeros(16, dtype=torch.long)))
    wrong = Made(AV(real.video, -real.audio), step.clips.prompts.take(step.real.prompt))
    step._made = wrong
    for _ in range(120):
        step._tell_apart(1e-2)
    sigma = torch.full((16,), 0.3)
    told = step._logit(real, wrong.text, sigma).mean() - step._logit(wrong.clips, wrong.text, sigma).mean()
    assert told > 1


def sizes() -> AV[tuple[int, ...]]:
    frames = clips().video_latents
    return AV((frames, *clips().grid, 3), (CAUSAL.layout.audio_latents(frames), 5))


def test_made_clips_are_the_newest():
    made = [
        Made(AV(torch.full((2, 1), k), torch.full((2, 1), k)), AV(torch.zeros(2, 1), torch.zeros(2, 1))) for k in (1, 2)
    ]
    assert made[1].before(made[0], 3).clips.audio.flatten().tolist() == [2, 2, 1]
