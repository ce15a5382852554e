"""The losses are right where the truth is known: on Gaussian and mixture data, whose scores are closed forms.

The data are clips of 3 video latents and 2 audio latents with one channel: a vector of 5 with a mean and a covariance,
whose off-diagonal block is what the two streams know of each other.
"""

from itertools import pairwise

import pytest
import torch

from omniforcing_lib import flow, losses
from omniforcing_lib.layout import AV

F64 = torch.float64
VIDEO, AUDIO = 3, 2
DIM = VIDEO + AUDIO


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def whitened(*shape: int, seed: int) -> torch.Tensor:
    """Draw noise whose sample mean is exactly 0 and sample covariance exactly 1: no sampling error in the tests."""
    x = randn(*shape, seed=seed)
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / len(x)), x.T, upper=False).T


def split(z: torch.Tensor, video: int = VIDEO) -> AV:
    return AV(z[:, :video, None], z[:, video:, None])


def join(x: AV) -> torch.Tensor:
    return torch.cat([part[..., 0] for part in x], 1)


class Gaussian:
    """Audio-visual Gaussian data with its exact denoiser and its exact probability-flow map."""

    def __init__(self, mean: torch.Tensor, covariance: torch.Tensor):
        self.mean, self.covariance = mean, covariance
        self.values, self.vectors = torch.linalg.eigh(covariance)

    def _scaled(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return ((x @ self.vectors) * factor) @ self.vectors.T

    def denoise(self, x: AV, sigma: torch.Tensor) -> AV:
        """E[x0 | x] = mean + (1 - s) C ((1 - s)^2 C + s^2)^-1 (x - (1 - s) mean)."""
        s = sigma.to(F64).reshape(-1, 1)
        factor = (1 - s) * self.values / ((1 - s) ** 2 * self.values + s**2)
        return split(self.mean + self._scaled(join(x) - (1 - s) * self.mean, factor))

    def flow_map(self, x: torch.Tensor, s: float) -> torch.Tensor:
        """Carry a state at noise level s along the probability-flow ODE to the data."""
        factor = (self.values / ((1 - s) ** 2 * self.values + s**2)).sqrt()
        return self.mean + self._scaled(x - (1 - s) * self.mean, factor)


def target() -> Gaussian:
    root = randn(DIM, DIM, seed=5) * 0.4 + torch.eye(DIM, dtype=F64)
    return Gaussian(randn(DIM, seed=6), root @ root.T)


def minimise(loss, *parameters: torch.Tensor) -> None:
    """Go to the bottom of a quadratic."""
    optimiser = torch.optim.LBFGS(parameters, max_iter=200, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)


class Student:
    """A linear generator: x_hat = root z + mean."""

    def __init__(self, mean: torch.Tensor, root: torch.Tensor):
        self.mean, self.root = mean.clone().requires_grad_(), root.clone().requires_grad_()

    def __call__(self, z: torch.Tensor) -> AV:
        return split(z @ self.root.T + self.mean)

    def law(self) -> Gaussian:
        root = self.root.detach()
        return Gaussian(self.mean.detach().clone(), root @ root.T)


def dmd_step(student: Student, real: Gaussian, draw: torch.Generator, batch: int = 256) -> torch.Tensor:
    z, eps = (torch.randn(batch, DIM, generator=draw, dtype=F64) for _ in range(2))
    sigma = losses.sample_dmd_sigma(batch, draw)
    return losses.total(losses.dmd(student(z), student.law().denoise, real.denoise, sigma, split(eps)))


def test_the_gaussian_used_here_denoises_as_regression_says():
    data, n = target(), 4000
    x = whitened(n, 2 * DIM, seed=0)
    x0 = x[:, :DIM] @ torch.linalg.cholesky(data.covariance).T + data.mean
    noisy = 0.4 * x0 + 0.6 * x[:, DIM:]
    ones = torch.ones(n, 1, dtype=F64)
    fit = torch.linalg.lstsq(torch.cat([noisy, ones], 1), x0).solution
    torch.testing.assert_close(
        join(data.denoise(split(noisy), torch.tensor(0.6, dtype=F64))), torch.cat([noisy, ones], 1) @ fit
    )


def test_dmd_drives_a_student_to_the_mean_and_the_covariance_of_both_streams():
    real, draw = target(), generator(1)
    student = Student(torch.zeros(DIM, dtype=F64), torch.eye(DIM, dtype=F64))
    optimiser = torch.optim.Adam([student.mean, student.root], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 400)
    for _ in range(400):
        optimiser.zero_grad()
        dmd_step(student, real, draw).backward()
        optimiser.step()
        schedule.step()
    assert real.covariance[:VIDEO, VIDEO:].abs().max() > 1
    torch.testing.assert_close(student.law().mean, real.mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(student.law().covariance, real.covariance, rtol=0, atol=1e-3)


def test_the_dmd_gradient_vanishes_at_the_target_and_only_there():
    real = target()
    root = torch.linalg.cholesky(real.covariance)
    turned = root @ torch.linalg.qr(randn(DIM, DIM, seed=8)).Q
    apart = torch.block_diag(*(torch.linalg.cholesky(c) for c in diagonal_blocks(real.covariance)))
    laws = {"same": (real.mean, turned), "moved": (real.mean + 0.1, root), "apart": (real.mean, apart)}
    size = {}
    for name, law in laws.items():
        student = Student(*law)
        dmd_step(student, real, generator(2)).backward()
        size[name] = max(student.mean.grad.norm().item(), student.root.grad.norm().item())
    assert size["same"] < 1e-12 and size["moved"] > 1e-2 and size["apart"] > 1e-2


def diagonal_blocks(covariance: torch.Tensor) -> AV:
    return AV(covariance[:VIDEO, :VIDEO], covariance[VIDEO:, VIDEO:])


def test_dmd_particles_take_the_modes_of_a_mixture_and_pair_them_across_streams():
    weights, width, n = torch.tensor([0.25, 0.75], dtype=F64), 0.3, 64
    means = torch.tensor([[1.2, 1.2, 1.2, -0.9, -0.9, -0.9], [-0.6, -0.6, -0.6, 0.6, 0.6, 0.6]], dtype=F64)
    draw, points = generator(3), randn(n, 6, seed=4).requires_grad_()
    optimiser = torch.optim.Adam([points], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 300)
    for _ in range(300):
        fake = mixture(torch.full((n,), 1 / n, dtype=F64), points.detach(), 0.0)
        eps, sigma = torch.randn(4 * n, 6, generator=draw, dtype=F64), losses.sample_dmd_sigma(4 * n, draw)
        x_hat = split(points.repeat(4, 1))
        loss = losses.total(losses.dmd(x_hat, fake, mixture(weights, means, width), sigma, split(eps)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    points, mean = points.detach(), weights @ means
    covariance = (means - mean).T @ ((means - mean) * weights[:, None]) + width**2 * torch.eye(6)
    torch.testing.assert_close(points.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(points.T), covariance, rtol=0, atol=0.06)
    first_mode = AV(points[:, 0] > 0.3, points[:, 3] < -0.15)
    assert torch.equal(*first_mode) and abs(first_mode.video.double().mean() - 0.25) < 0.04


def mixture(weights: torch.Tensor, means: torch.Tensor, width: float):
    """Build the exact denoiser of a mixture of round Gaussians (of points, at width 0)."""

    def denoise(x: AV, sigma: torch.Tensor) -> AV:
        s, x = sigma.to(F64).reshape(-1, 1), join(x)
        variance = (1 - s) ** 2 * width**2 + s**2
        distance = (x[:, None] - (1 - s)[..., None] * means).square().sum(-1)
        centre = (weights.log() - distance / (2 * variance)).softmax(1) @ means
        return split(centre + (1 - s) * width**2 / variance * (x - (1 - s) * centre))

    return denoise


def test_the_dmd_gradient_is_the_normalised_difference_of_the_scores():
    x_hat, eps = split(randn(2, DIM, seed=0)).map(torch.Tensor.requires_grad_), split(randn(2, DIM, seed=1))
    real, fake = (split(randn(2, DIM, seed=s)).map(torch.Tensor.requires_grad_) for s in (2, 3))
    weight = torch.tensor(1.0, requires_grad=True)
    scores = (lambda x, sigma, out=out: out.map(lambda o, x: o * weight + 0 * x, x) for out in (fake, real))
    loss = losses.dmd(x_hat, *scores, torch.tensor([0.3, 0.9]), eps)
    losses.total(loss).backward()
    for x, f, r in zip(x_hat, fake, real, strict=True):
        scale = torch.stack([(x[b] - r[b]).abs().mean() for b in range(2)])[:, None, None]
        torch.testing.assert_close(x.grad, ((f - r) / scale / x.numel()).detach())
        assert f.grad is None and r.grad is None
    assert weight.grad is None


def test_scores_see_one_noisy_sample_and_the_noise_level_that_was_drawn():
    x_hat, eps, sigma, seen = split(randn(2, DIM, seed=0)), split(randn(2, DIM, seed=1)), torch.tensor([0.3, 0.9]), []

    def score(x, level):
        seen.append((x, level))
        return x

    losses.dmd(x_hat, score, score, sigma, eps)
    losses.critic(x_hat, score, sigma, eps)
    for x, level in seen:
        assert level is sigma
        torch.testing.assert_close(join(x), (1 - sigma[:, None]) * join(x_hat) + sigma[:, None] * join(eps))
    assert len(seen) == 3


def test_dmd_normalises_each_sample_of_each_stream_on_its_own():
    x, f, r = (randn(3, 4, 2, seed=s) for s in range(3))
    base = losses.dmd_direction(x, f, r)
    scale = torch.tensor([1.0, 1e-3, 1e3], dtype=F64)[:, None, None]
    torch.testing.assert_close(losses.dmd_direction(x * scale, f * scale, r * scale), base, rtol=1e-4, atol=0)


def test_a_score_that_is_not_finite_moves_nothing_else():
    x, f, r = (randn(3, 4, 2, seed=s) for s in range(3))
    broken = f.clone()
    broken[1, 2] = torch.nan
    broken[2, 0] = torch.inf
    out, base = losses.dmd_direction(x, broken, r), losses.dmd_direction(x, f, r)
    assert (out[1, 2] == 0).all() and (out[2, 0] == 0).all()
    kept = broken.isfinite()
    assert torch.equal(out[kept], base[kept])
    r[0] = torch.nan
    assert (losses.dmd_direction(x, f, r)[0] == 0).all()


def test_latents_of_weight_zero_neither_learn_nor_count():
    x_hat, eps, real = (split(randn(2, DIM, seed=s)) for s in range(3))
    weight = AV(torch.tensor([[1.0, 0.0, 1.0]]).expand(2, -1), torch.tensor([[0.0, 1.0]]).expand(2, -1))
    cut = AV([0, 2], [1])

    def score(out: AV):
        return lambda x, sigma: out

    def loss(parts: AV, weight: AV | None) -> AV:
        return losses.dmd(parts, score(parts.map(torch.zeros_like)), score(real), torch.ones(2), eps, weight)

    full = loss(x_hat.map(torch.Tensor.requires_grad_), weight)
    losses.total(full).backward()
    assert (x_hat.video.grad[:, 1] == 0).all() and (x_hat.audio.grad[:, 0] == 0).all()
    kept, eps, real = (pair.map(lambda p, i: p.detach()[:, i], cut) for pair in (x_hat, eps, real))
    torch.testing.assert_close(full, loss(kept, None))


@pytest.mark.parametrize("level", [0.25, 0.8])
def test_a_linear_critic_converges_to_the_score_of_the_student(level):
    law, n = target(), 500
    noise, sigma = whitened(n, 2 * DIM, seed=0), torch.full((n,), level, dtype=F64)
    x_hat = split(noise[:, :DIM] @ torch.linalg.cholesky(law.covariance).T + law.mean).map(torch.Tensor.requires_grad_)
    gain, bias = torch.eye(DIM, dtype=F64).requires_grad_(), torch.zeros(DIM, dtype=F64, requires_grad=True)

    def fake(x: AV, sigma: torch.Tensor) -> AV:
        return split(join(x) @ gain.T + bias)

    minimise(lambda: losses.total(losses.critic(x_hat, fake, sigma, split(noise[:, DIM:]))), gain, bias)
    probe = split(randn(10, DIM, seed=9) * 2)
    torch.testing.assert_close(fake(probe, sigma), law.denoise(probe, sigma[:10]), rtol=0, atol=1e-4)
    assert x_hat.video.grad is None and x_hat.audio.grad is None


def test_the_critic_loss_is_flow_matching_of_its_velocity():
    x_hat, eps, out = (split(randn(3, DIM, seed=s)) for s in range(3))
    sigma = torch.tensor([0.3, 0.5, 0.9], dtype=F64)
    x = x_hat.map(flow.noised, eps, flow.both(sigma))
    loss = losses.critic(x_hat, lambda x, s: out, sigma, eps)
    torch.testing.assert_close(loss, losses.flow_matching(out.map(flow.velocity_of, x, flow.both(sigma)), x_hat, eps))
    assert losses.critic(x_hat, lambda x, s: x_hat, sigma, eps).video < 1e-25


def test_ode_regression_learns_the_flow_map_of_the_teacher():
    teacher, n, steps = target(), 200, 400
    sigmas = torch.linspace(1, 0, steps + 1, dtype=F64)
    states = flow.trajectory(teacher.denoise, split(whitened(n, DIM, seed=0)), sigmas, [0, 100, 200, steps])
    for k, level in enumerate((1.0, 0.75, 0.5)):
        gain, bias = torch.eye(DIM, dtype=F64).requires_grad_(), torch.zeros(DIM, dtype=F64, requires_grad=True)
        x, clean = (states.map(lambda part, i=i: part[:, i]) for i in (k, -1))
        sigma = x.map(lambda part, level=level: torch.full(part.shape[:2], level))

        def loss(x=x, clean=clean, sigma=sigma, gain=gain, bias=bias) -> torch.Tensor:
            return losses.total(losses.ode_regression(split(join(x) @ gain.T + bias), clean, sigma))

        minimise(loss, gain, bias)
        probe = randn(10, DIM, seed=9)
        learned = (probe @ gain.T + bias).detach()
        torch.testing.assert_close(learned, teacher.flow_map(probe, level), rtol=0, atol=0.03)


def test_euler_converges_to_the_exact_flow_at_first_order():
    teacher, noise = target(), randn(50, DIM, seed=0)
    exact = teacher.flow_map(noise, 1.0)

    def error(steps: int) -> float:
        out = flow.euler(teacher.denoise, split(noise), torch.linspace(1, 0, steps + 1, dtype=F64))
        return (join(out) - exact).abs().max().item()

    errors = [error(steps) for steps in (100, 200, 400)]
    assert errors[2] < 0.02 and all(1.8 < a / b < 2.2 for a, b in pairwise(errors))


def test_ode_regression_counts_noisy_latents_only():
    x0_hat, clean = split(randn(2, DIM, seed=0)).map(torch.Tensor.requires_grad_), split(randn(2, DIM, seed=1))
    sigma = AV(torch.tensor([[0.0, 0.9, 0.4], [0.0, 0.0, 1.0]]), torch.tensor([[0.0, 0.2], [0.0, 0.0]]))
    loss = losses.ode_regression(x0_hat, clean, sigma)
    for part, x, c, s in zip(loss, x0_hat, clean, sigma, strict=True):
        torch.testing.assert_close(part, (x - c)[s > 0].square().mean())
    losses.total(loss).backward()
    for x, s in zip(x0_hat, sigma, strict=True):
        assert torch.equal(x.grad[..., 0] == 0, s == 0)


def test_a_clip_without_noisy_latents_gives_zero_and_a_zero_gradient():
    x0_hat, clean = split(randn(2, DIM, seed=0)).map(torch.Tensor.requires_grad_), split(randn(2, DIM, seed=1))
    loss = losses.total(losses.ode_regression(x0_hat, clean, AV(torch.zeros(2, VIDEO), torch.zeros(2, AUDIO))))
    loss.backward()
    assert loss == 0 and all((x.grad == 0).all() for x in x0_hat)


@pytest.mark.parametrize("lasts", [False, True], ids=["latents", "their mean"])
def test_flow_matching_is_least_at_the_exact_velocity(lasts):
    law, n, level = target(), 2000, torch.tensor(0.6, dtype=F64)
    noise = whitened(n, 2 * DIM, seed=0)
    x0 = split(noise[:, :DIM] @ torch.linalg.cholesky(law.covariance).T + law.mean)
    eps = split(noise[:, DIM:])
    x = x0.map(flow.noised, eps, flow.both(level))
    exact = law.denoise(x, level).map(flow.velocity_of, x, flow.both(level))

    def loss(velocity: AV) -> torch.Tensor:
        matching = losses.steady_flow_matching if lasts else losses.flow_matching
        return losses.total(matching(velocity, x0, eps))

    def size(change: torch.Tensor) -> torch.Tensor:
        return (change.mean(1) if lasts else change).square().mean()

    best = loss(exact)
    for seed in range(5):
        change = join(x) @ randn(DIM, DIM, seed=seed).T * 0.1
        worse = loss(exact.map(torch.add, split(change)))
        torch.testing.assert_close(worse - best, losses.total(split(change).map(size)))


def test_losses_of_bfloat16_latents_are_computed_in_float32():
    x0, eps, velocity = (split(randn(2, DIM, seed=s)).map(lambda x: x.bfloat16()) for s in range(3))
    loss = losses.flow_matching(velocity, x0, eps)
    wide = losses.flow_matching(*(pair.map(torch.Tensor.float) for pair in (velocity, x0, eps)))
    assert loss.video.dtype == torch.float32 and torch.equal(loss.video, wide.video)


def test_total_weighs_the_streams():
    assert losses.total(AV(torch.tensor(2.0), torch.tensor(3.0)), AV(1.0, 0.16)) == 2.0 + 0.16 * 3.0


def test_dmd_noise_levels_have_the_distribution_of_the_released_code():
    sigma = losses.sample_dmd_sigma(200_000, generator(0))
    lut = flow.dmd_lut().float()
    assert (sigma.min(), sigma.max()) == (lut[20], lut[980])
    assert abs(sigma.mean() - 0.819) < 2e-3 and abs(sigma.median() - 0.896) < 2e-3
    assert abs((sigma > 0.9).double().mean() - 0.49) < 5e-3
    assert torch.equal(sigma[:9], losses.sample_dmd_sigma(200_000, generator(0))[:9])


def test_a_lower_limit_keeps_the_scores_to_low_noise():
    lut, sigma = flow.dmd_lut().float(), losses.sample_dmd_sigma(20_000, generator(0), 400)
    assert (sigma.min(), sigma.max()) == (lut[20], lut[400])
