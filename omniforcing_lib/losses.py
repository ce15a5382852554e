"""Losses of the three stages, one scalar per stream: flow matching, ODE regression, DMD generator and critic.

Each is a pure function of tensors and of denoisers (x, sigma) -> x0; `total` weighs and adds the streams.
The losses draw no noise: the caller passes what was drawn, so every number can be checked.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from omniforcing_lib.flow import ONES, Denoiser, both, dmd_lut, noised, precise, spread, velocity_of
from omniforcing_lib.layout import AV

MIN_TIMESTEP, MAX_TIMESTEP = 20, 980


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Average everything, each latent counted `weight` times; 0, with its graph, where nothing counts."""
    if weight is None:
        return values.mean()
    # A product alone would carry a NaN of a latent that does not count into the sum.
    counted = spread(weight, values).expand_as(values)
    return torch.where(counted > 0, values * counted, 0.0).sum() / counted.sum().clamp_min(
        torch.finfo(values.dtype).tiny
    )


def _squared(a: Tensor, b: Tensor) -> Tensor:
    return (precise(a) - precise(b)).square()


def _weights(weight: AV[Tensor] | None) -> AV[Tensor | None]:
    return AV(None, None) if weight is None else weight


def total(losses: AV[Tensor], weights: AV[float] = ONES) -> Tensor:
    """Add the losses of the two streams: weights.video loss.video + weights.audio loss.audio."""
    return weights[0] * losses.video + weights[1] * losses.audio


def flow_matching(
    velocity: AV[Tensor], x0: AV[Tensor], eps: AV[Tensor], weight: AV[Tensor] | None = None
) -> AV[Tensor]:
    """Compare a predicted velocity with eps - x0: mean squared error of each stream.

    Shapes: [B, F, ...] per stream; weight [B] or [B, F] per stream, 0 = not counted.
    """
    target = x0.map(lambda data, noise: precise(noise) - precise(data), eps)
    return velocity.map(_squared, target).map(_mean, _weights(weight))


def steady_flow_matching(velocity: AV[Tensor], x0: AV[Tensor], eps: AV[Tensor]) -> AV[Tensor]:
    """Compare a predicted velocity with eps - x0 after both are averaged over the latents of a clip.

    The noise of single latents averages out, and what lasts throughout a clip, such as the pitch of a steady tone,
    stays. E[eps - x0 | x], which minimises `flow_matching`, minimises this as well, so their sum trains the same model.

    Shapes: [B, F, ...] per stream.
    """
    means = (clip.map(lambda x: precise(x).mean(1)) for clip in (velocity, x0, eps))
    return flow_matching(*means)


def ode_regression(x0_hat: AV[Tensor], clean: AV[Tensor], sigma: AV[Tensor]) -> AV[Tensor]:
    """Regress the end of a teacher's trajectory from a state on it: mean squared error of x0 (specification 5.4).

    Only noisy latents count; a stream with none gives 0 with a graph, so that every process has a backward pass.

    Shapes: x0_hat, clean [B, F, ...] per stream; sigma [B] or [B, F] per stream.
    """
    noisy = sigma.map(lambda level: (level > 1e-6).to(torch.float32))
    return x0_hat.map(_squared, clean).map(_mean, noisy)


def sample_dmd_sigma(batch: int, generator: torch.Generator, most: int = MAX_TIMESTEP) -> Tensor:
    """Draw the noise level at which the scores are compared, uniform in integer timesteps (specification 5.0).

    t is uniform in 0 .. 999, clamped to 20 .. 980 and looked up in `dmd_lut`: 0.217 to 0.998, mean 0.82. A lower `most`
    draws it from 0 .. most.

    Shapes: float32 [batch], on the generator's device.
    """
    end = 1000 if most >= MAX_TIMESTEP else most + 1
    # Clamping after the draw puts the weight of 0 .. 19 and of 981 .. 999 on the edges.
    t = torch.randint(0, end, (batch,), generator=generator, device=generator.device)
    return _lut(t.device)[t.clamp(MIN_TIMESTEP, most)]


@lru_cache
def _lut(device: torch.device) -> Tensor:
    return dmd_lut().to(device, torch.float32)


def dmd_direction(x_hat: Tensor, fake: Tensor, real: Tensor, weight: Tensor | None = None) -> Tensor:
    """Compute DMD's gradient direction, `(fake - real) / mean |x_hat - real|`, for one stream (specification 5.1).

    The normaliser is per sample, over the counted latents; what is not finite becomes 0.

    Shapes: x_hat and both predictions of x0 [B, F, ...] -> [B, F, ...], no graph; weight [B] or [B, F].
    """
    x_hat, fake, real = (precise(x.detach()) for x in (x_hat, fake, real))
    # Far from the teacher the two scores differ by more, so each sample is divided by its own distance.
    distance = (x_hat - real).abs()
    counted = torch.ones_like(distance) if weight is None else spread(weight, distance).expand_as(distance)
    scale = (distance * counted).flatten(1).sum(1) / counted.flatten(1).sum(1) + 1e-8
    return torch.nan_to_num((fake - real) / spread(scale, distance), nan=0.0, posinf=0.0, neginf=0.0)


def dmd(
    x_hat: AV[Tensor],
    fake: Denoiser,
    real: Denoiser,
    sigma: Tensor | AV[Tensor],
    eps: AV[Tensor],
    weight: AV[Tensor] | None = None,
) -> AV[Tensor]:
    """Pull the student's samples from its own distribution to the teacher's (Stages 1 and 3; specification 5.1).

    The gradient by x_hat is `dmd_direction` / number of elements; neither score gets one. `real` is guided.

    Shapes: x_hat, eps [B, F, ...] per stream; sigma [B], shared by the streams; weight [B] or [B, F] per stream.
    """
    # The gradient of half the squared distance to (x_hat - direction), by x_hat, is the direction.
    with torch.no_grad():
        # 1. Both scores see the sample at one noise level.
        x = x_hat.map(noised, eps, both(sigma))
        # 2. Fake less real: where the student's own distribution is denser than the teacher's.
        direction = x_hat.map(dmd_direction, fake(x, sigma), real(x, sigma), _weights(weight))
        # 3. The target is a constant, so the loss needs no gradient through either score.
        target = x_hat.map(lambda sample, away: precise(sample) - away, direction)
    return x_hat.map(_squared, target).map(_mean, _weights(weight)).map(lambda loss: loss / 2)


def critic(
    x_hat: AV[Tensor], fake: Denoiser, sigma: Tensor | AV[Tensor], eps: AV[Tensor], weight: AV[Tensor] | None = None
) -> AV[Tensor]:
    """Teach the fake score the student's own distribution: flow matching on detached samples (specification 5.2).

    Shapes: x_hat, eps [B, F, ...] per stream; sigma [B], shared by the streams; weight [B] or [B, F] per stream.
    """
    # The student is not taught here: its samples are data.
    x_hat = x_hat.map(Tensor.detach)
    x = x_hat.map(noised, eps, both(sigma))
    # The denoiser gives x0, and the loss compares velocities.
    return flow_matching(fake(x, sigma).map(velocity_of, x, both(sigma)), x_hat, eps, weight)
