"""The unet part: match the predicted noise, with gradients through the whole U-Net."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Session
from lib_estimate.learn.objectives.base import TINY, Distance, Objective
from lib_estimate.target.bank import Bank
from lib_estimate.target.target import Target


class WithUNet(Objective):
    """An objective whose gradient goes through the U-Net, which is what takes memory."""

    PIXELS_AT_ONCE = 2**14  # of latents: beyond that a larger batch takes memory and saves no time

    def __init__(self, session: Session, bank: Bank) -> None:
        self.session, self.bank = session, bank
        self.at_once = max(1, self.PIXELS_AT_ONCE // bank.x[0, 0].numel())  # latents that go through the U-Net together

    def lighten(self) -> bool:
        """First one latent at a time, then activations are computed again in the backward pass."""
        if self.at_once > 1:
            self.at_once = 1
            return True
        return self.session.save_memory()


class Denoising(WithUNet):
    """Match the U-Net's noise prediction: d(eps(x_t, t, E), eps(x_t, t, target)) / d(eps(x_t, t, empty), the same).

    Only the branch that holds the embedding is run: under CFG the other is the same for both, so the difference of the
    guided predictions is this one times a constant. `checks` is a bank that knows the empty prompt's eps.
    """

    def __init__(
        self, session: Session, target: Target, bank: Bank, checks: Bank, distance: Distance, batch: int, fixed: int
    ) -> None:
        """batch: latents per step; fixed: how many at least for an optimizer that needs the same loss at every call."""
        super().__init__(session, bank)
        self.target, self.distance = target, distance
        self.batch, self.fixed = min(batch, len(bank)), min(max(batch, fixed), len(bank))
        self.scale = 1 / distance(checks.empty, checks.target).mean().clamp_min(TINY)

    def draw(self, generator: torch.Generator, fixed: bool) -> Tensor:
        """One entry from each of `batch` equal stretches of the trajectories, so every step sees all noise levels."""
        chosen = spread(len(self.bank), self.fixed if fixed else self.batch, None if fixed else generator)
        return chosen.to(self.bank.x.device, non_blocking=True)

    def losses(self, vectors: Vectors, drawn: Tensor) -> Iterator[Tensor]:
        bank = self.bank
        for at in drawn.split(self.at_once):
            conditioning = self.target.embed(self.session, vectors)
            eps = self.session.predict_noise(bank.x[at], bank.timestep[at], conditioning)
            yield self.distance(eps, bank.target[at]).sum() * (self.scale / len(drawn))


def spread(available: int, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` of `available` indices, one of each of as many stretches: at random, or its middle without generator."""
    edges = torch.linspace(0, available, count + 1)
    inside = torch.rand(count, generator=generator) if generator else torch.full((count,), 0.5)
    return (edges[:-1] + inside * edges.diff()).long().clamp(max=available - 1)
