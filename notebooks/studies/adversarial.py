"""Two remedies that need a discriminator: a GAN loss beside DMD, and DMD weighed by an f-divergence.

DMD minimises the reverse KL divergence, which forgives a student for what it leaves out. DMD2 (Yin et al. 2024,
arXiv 2405.14867) adds a GAN loss whose discriminator reads the critic's features. f-distill (Xu et al. 2025, arXiv
2502.15681) weighs the gradient of DMD by the density ratio r = teacher / student, which such a discriminator knows:
other divergences count more where the teacher is dense and the student is not.

Here both are a method of Stage 3, see `training.recipes.Stage3.train`: neither is in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from omniforcing_lib import losses
from omniforcing_lib.flow import both, noise_like, noised
from omniforcing_lib.layout import AV
from omniforcing_lib.rollout import fresh_noise, join, rollout
from omniforcing_lib.training.dataset import Clips
from omniforcing_lib.training.stage3 import SelfForcing
from omniforcing_lib.training.stages import pick
from omniforcing_lib.training.train import Metrics
from omniforcing_lib.transformer import Transformer

MOST_LOGIT = 3.0
"""Density ratios are cut at e^3 and e^-3; a loss then divides them by their mean over its batch."""


class Discriminator(nn.Module):
    """Tell the teacher's clips from the student's by the tokens that a middle layer of the critic gives.

    Each token passes one layer of its own, tokens are averaged, and the two streams are judged together: what does not
    fit together is seen too.
    """

    def __init__(self, dims: AV[int], generator: torch.Generator, hidden: int = 64) -> None:
        super().__init__()
        self.tokens = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.SiLU()) for dim in dims)
        self.clip = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                nn.init.xavier_uniform_(weight, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, hidden: AV[Tensor]) -> Tensor:
        """Give the logit that a clip is the teacher's. Shapes: AV([B, N, D], [B, N, D]) to [B]."""
        pooled = [layer(tokens).mean(1) for layer, tokens in zip(self.tokens, hidden, strict=True)]
        return self.clip(torch.cat(pooled, dim=-1))[:, 0].float()


@contextmanager
def middle_tokens(model: Transformer) -> Iterator[list[AV[Tensor]]]:
    """Collect the tokens that a middle layer gives in every pass. Shapes: AV([B, N, D], [B, N, D])."""
    seen: list[AV[Tensor]] = []
    middle = model.transformer_blocks[len(model.transformer_blocks) // 2]
    hook = middle.register_forward_hook(lambda layer, args, hidden: seen.append(hidden))
    try:
        yield seen
    finally:
        hook.remove()


def importance(logit: Tensor, divergence: str) -> Tensor:
    """Weigh DMD's gradient for a divergence, `f''(r) r^2` of the density ratio r = e^logit (f-distill, Table 1).

    Shapes: [B] to [B].
    """
    return DIVERGENCES[divergence](logit.clamp(-MOST_LOGIT, MOST_LOGIT).exp())


DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse KL": torch.ones_like,
    "Jensen-Shannon": lambda ratio: ratio / (1 + ratio),
    "forward KL": lambda ratio: ratio,
}
"""What DMD may be weighed for: weights by density ratio."""


class Made(NamedTuple):
    """Clips that the student made, and their text. Shapes: AV([B, F, h, w, C], [B, T, C]), AV [B, L, C]."""

    clips: AV[Tensor]
    text: AV[Tensor]

    def before(self, older: Made, most: int) -> Made:
        """Put these in front of older ones, `most` of all. Shapes: [B, ...] and [C, ...] to [most, ...]."""
        return Made(
            *(new.map(lambda x, old: torch.cat([x, old])[:most], old) for new, old in zip(self, older, strict=True))
        )

    def take(self, index: Tensor) -> Made:
        """Give some clips."""
        return Made(*(part.map(lambda x: x[index]) for part in self))


@dataclass
class AdversarialForcing(SelfForcing):
    """Stage 3 with a discriminator on the critic's features; it learns first, and then at every step of the critic.

    The discriminator reads features and does not train them: the critic stays the score of the student's clips.

    Attributes:
        real: what the discriminator takes for real: the teacher's clips, as long as the student's.
        gan: weight of the student's GAN loss; 0 is none.
        divergence: what DMD is weighed for, see `importance`.
        head_start: steps of the discriminator on clips of the untrained student, before all others.
        seed: of the discriminator's own draws; student and critic draw what they draw without one.

    What a step tells of DMD, its losses and the `gap`, contains the GAN loss.

    Raises:
        ValueError: an unknown divergence, real clips of another length, or micro-batches.
    """

    real: Clips = field(kw_only=True)
    gan: float = field(default=0.0, kw_only=True)
    divergence: str = field(default="reverse KL", kw_only=True)
    head_start: int = field(default=120, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"a divergence is one of {', '.join(DIVERGENCES)}; found {self.divergence!r}")
        if (there := self.real.latents.video.shape[1]) != self.clips.video_latents:
            raise ValueError(
                f"real clips are as long as the student's, {self.clips.video_latents} latents; found {there}"
            )
        if max(self.student.config.accumulate, self.critic.config.accumulate) > 1:
            raise ValueError("the discriminator learns once in a step: use it with accumulate 1")
        self._draws, config = torch.Generator().manual_seed(self.seed), self.critic.model.config
        self.discriminator = Discriminator(AV(config.video_dim, config.audio_dim), self._draws)
        self._made = self._first_clips()
        self._optimiser = torch.optim.AdamW(self.discriminator.parameters(), lr=3e-3, betas=(0.5, 0.99))

    def __call__(self, i: int, generator: torch.Generator) -> Metrics:
        """Train the discriminator before the first step."""
        for _ in range(self.head_start if i == 0 else 0):
            self._tell_apart(3e-3)
        return super().__call__(i, generator)

    def student_loss(
        self, x_hat: AV[Tensor], text: AV[Tensor], sigma: Tensor, eps: AV[Tensor], weight: AV[Tensor] | None = None
    ) -> AV[Tensor]:
        """Add the GAN loss to DMD's, whose clips count by their density ratio."""
        with torch.set_grad_enabled(bool(self.gan)):
            logit = self._logit(x_hat.map(noised, eps, both(sigma)), text, sigma)
        counted = both(importance(logit.detach(), self.divergence))
        loss = super().student_loss(x_hat, text, sigma, eps, counted)
        return loss.map(lambda value: value + self.gan * softplus(-logit).mean() / 2)

    def critic_loss(self, x_hat: AV[Tensor], text: AV[Tensor], sigma: Tensor, eps: AV[Tensor]) -> AV[Tensor]:
        """Teach the discriminator beside the critic, on the clips of the last steps."""
        self._made = Made(x_hat.map(Tensor.detach), text).before(self._made, 8 * self.clips.batch)
        self._tell_apart(1e-3)
        return super().critic_loss(x_hat, text, sigma, eps)

    def _tell_apart(self, rate: float) -> None:
        """Take a step of the discriminator, on as many clips of the student as of the teacher."""
        many = 2 * self.clips.batch
        mine = self._made.take(pick(len(self._made.text.video), many, self._draws))
        chosen = pick(len(self.real), many, self._draws)
        real = Made(self.real.latents.map(lambda x: x[chosen]), self.clips.prompts.take(self.real.prompt[chosen]))
        sigma, logits = losses.sample_dmd_sigma(many, self._draws, self.config.most), []
        for clips, text in (mine, real):
            logits.append(self._logit(clips.map(noised, noise_like(clips, self._draws), both(sigma)), text, sigma))
        self._optimiser.param_groups[0]["lr"] = rate
        self._optimiser.zero_grad(set_to_none=True)
        (softplus(logits[0]) + softplus(-logits[1])).mean().backward()
        self._optimiser.step()

    def _logit(self, x: AV[Tensor], text: AV[Tensor], sigma: Tensor) -> Tensor:
        """Judge noisy clips, with a gradient by the clips where they have one. Shapes: to [B]."""
        with torch.set_grad_enabled(any(part.requires_grad for part in x)), middle_tokens(self.critic.model) as seen:
            self.critic.model(x, both(sigma), text)
        return self.discriminator(seen[0])

    @torch.no_grad()
    def _first_clips(self) -> Made:
        """Roll out a clip of the student for each of the teacher's, of the same prompts."""
        text, size = self.clips.prompts.take(self.real.prompt), (self.clips.grid, self.clips.video_latents)
        noise = fresh_noise(self._draws, len(self.real))
        return Made(join(list(rollout(self.student.model, self.clips.causal, text, noise, *size))), text)
