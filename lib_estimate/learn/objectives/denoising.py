"""The unet part: match the predicted noise, with gradients through the whole U-Net."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

import torch
from torch import Tensor

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Session
from lib_estimate.learn.objectives.base import TINY, Distance, Objective, in_sentences
from lib_estimate.request import HOLE
from lib_estimate.target import sentences
from lib_estimate.target.bank import Bank, noise_under
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

    FIXED_ENTRIES = 12  # of an optimizer that needs the same loss at every call

    def __init__(
        self, session: Session, target: Target, bank: Bank, checks: Bank, distance: Distance, batch: int
    ) -> None:
        super().__init__(session, bank)
        self.target, self.distance = target, distance
        self.batch = min(batch, len(bank))
        self.scale = 1 / distance(checks.empty, checks.target).mean().clamp_min(TINY)

    def draw(self, generator: torch.Generator, fixed: bool) -> Tensor:
        """One entry from each of `batch` equal stretches of the trajectories, so every step sees all noise levels."""
        count = min(max(self.batch, self.FIXED_ENTRIES), len(self.bank)) if fixed else self.batch
        chosen = spread(len(self.bank), count, None if fixed else generator)
        return chosen.to(self.bank.x.device, non_blocking=True)

    def losses(self, vectors: Vectors, drawn: Tensor) -> Iterator[Tensor]:
        bank = self.bank
        for at in drawn.split(self.at_once):
            conditioning = self.target.embed(self.session, vectors)
            eps = self.session.predict_noise(bank.x[at], bank.timestep[at], conditioning)
            yield self.distance(eps, bank.target[at]).sum() * (self.scale / len(drawn))


class DenoisingInSentences(WithUNet):
    """Match the predicted noise with the embedding alone and inside of random sentences at once.

    Per sentence s, over a few latents x of the stand-alone target:

        mean d(eps(x, z_s(E)), eps(x, z_s*)) / (mean d(eps(x, z_s(plain)), eps(x, z_s*)) + FLOOR far)

    with far = mean d(eps(x, z(empty)), eps(x, z*)). As InSentences, but of what the whole U-Net makes of the text; both
    references are run anew for every sentence, so a step costs five thirds of a Denoising step of as many latents.
    """

    FLOOR, FRESH, FIXED, LATENTS = 0.01, 3, 12, 2

    def __init__(
        self, session: Session, target: Target, bank: Bank, checks: Bank, distance: Distance, text: str,
        avoid: Sequence[str],
    ) -> None:  # fmt: skip
        super().__init__(session, bank)
        self.distance, self.text, self.avoid = distance, text, set(avoid)
        self.floor = self.FLOOR * distance(checks.empty, checks.target).mean().clamp_min(TINY)

    def draw(self, generator: torch.Generator, fixed: bool) -> list:
        seed = 0 if fixed else int(torch.randint(2**31, (1,), generator=generator))
        chosen = sentences.distinct(
            Random(seed), self.FIXED if fixed else self.FRESH, self.avoid, self.session.random_text
        )
        return self.prepared([HOLE, *chosen], self.bank, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def prepared(self, chosen: Sequence[str], bank: Bank, generator: torch.Generator) -> list:
        """For sentences: frames, and x, timestep and eps `[S*L, ...]` of L latents each, and scales `[S]`."""
        frames, wanted, plain = in_sentences(self.session, self.text, chosen)
        at = torch.cat([spread(len(bank), self.LATENTS, generator) for _ in chosen]).to(bank.x.device)
        x, timestep = bank.x[at], bank.timestep[at]
        eps, unweighted = (
            noise_under(self.session, x, timestep, each.repeat_each(self.LATENTS)) for each in (wanted, plain)
        )
        off = self.distance(unweighted, eps).view(-1, self.LATENTS).mean(1)
        return [frames, x, timestep, eps, 1 / (off + self.floor)]

    def losses(self, vectors: Vectors, drawn: list) -> Iterator[Tensor]:
        frames, x, timestep, wanted, scales = drawn
        shares = scales.repeat_interleave(self.LATENTS) / len(x)
        for first in range(0, len(x), self.at_once):
            at = slice(first, first + self.at_once)
            # All sentences, as shorter ones are filled up to the longest.
            given = self.session.encode(frames, vectors).repeat_each(self.LATENTS).rows(at)
            eps = self.session.predict_noise(x[at], timestep[at], given)
            yield (self.distance(eps, wanted[at]) * shares[at]).sum()


def spread(available: int, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` of `available` indices, one of each of as many stretches: at random, or its middle without generator."""
    edges = torch.linspace(0, available, count + 1)
    inside = torch.rand(count, generator=generator) if generator else torch.full((count,), 0.5)
    return (edges[:-1] + inside * edges.diff()).long().clamp(max=available - 1)
