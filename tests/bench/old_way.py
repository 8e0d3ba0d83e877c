"""The old tool's U-NET way, stated again to be measured against; nothing but the benchmark uses it.

Per update: from one latent at a random position of the target's trajectory, one step of DPM++ SDE under CFG with the
target's conditioning (encoded anew each time), the same step with the embedding's, the same noise in both, and the mean
squared difference of the two latents as loss. Batch 1, Adam, cosine, the last vectors are the result.

What an update costs: a step evaluates the model twice, each time the conditional and the unconditional sample in one
batch of two, as webuis run CFG. That is 4 samples forward for the target and 4 for the embedding. Backward go the
embedding's 4. In its first evaluation only the conditional sample leads to the vectors, but it shares a batch with the
other; in the second both do, since the latent itself depends on the vectors by then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Conditioning, Session
from lib_estimate.target.bank import Bank
from lib_estimate.target.target import Target

LEARNING_RATE = 2e-3

Denoiser = Callable[[Tensor, float], Tensor]  # (latents x_0 + sigma * noise `[B, c, h, w]`, sigma) -> estimate of x_0


# ---- the sampler's step -------------------------------------------------------------------------------------------


def ancestral(sigma: float, sigma_to: float, eta: float = 1.0) -> tuple[float, float]:
    """(down, up): go down to `down` without noise, then add noise of size `up`; down^2 + up^2 = sigma_to^2."""
    up = min(sigma_to, eta * math.sqrt(sigma_to**2 * (sigma**2 - sigma_to**2) / sigma**2))
    return math.sqrt(sigma_to**2 - up**2), up


def towards(x: Tensor, denoised: Tensor, sigma: float, sigma_to: float) -> Tensor:
    """Solves dx/dsigma = (x - denoised) / sigma exactly while `denoised` stays what it is."""
    share = sigma_to / sigma
    return share * x + (1 - share) * denoised


def dpmpp_sde_step(
    denoise: Denoiser, x: Tensor, sigma: float, sigma_to: float, noises: tuple[Tensor, Tensor], eta: float = 1.0
) -> Tensor:
    """DPM-Solver++ of second order for the SDE, r = 1/2 (Lu et al. 2022); k-diffusion's `sample_dpmpp_sde`.

    With r = 1/2 the two estimates of x_0 count 1 - 1/(2r) = 0 and 1/(2r) = 1: the whole step is made with the one of
    the middle, in log sigma, alone.
    """
    middle = math.sqrt(sigma * sigma_to)
    down, up = ancestral(sigma, middle, eta)
    halfway = towards(x, denoise(x, sigma), sigma, down) + up * noises[0]
    denoised = denoise(halfway, middle)
    down, up = ancestral(sigma, sigma_to, eta)
    return towards(x, denoised, sigma, down) + up * noises[1]


# ---- the objective ------------------------------------------------------------------------------------------------


def _both(first: Conditioning, second: Conditioning) -> Conditioning:
    """The rows of both."""
    pooled = None if first.pooled is None else torch.cat([first.pooled, second.pooled])
    return Conditioning(torch.cat([first.hidden, second.hidden]), pooled)


class OldWay:
    """Loss of one update. `bank` holds the target's trajectories; only where they pass is taken from it.

    The last position of a trajectory is left out: from there the sampler goes to sigma 0 with one evaluation, not two.
    """

    def __init__(
        self, session: Session, target: Target, bank: Bank, alphas_cumprod: Tensor, prompt: str, cfg_scale: float
    ) -> None:
        self.session, self.target, self.bank, self.prompt, self.cfg_scale = session, target, bank, prompt, cfg_scale
        abar = alphas_cumprod.double().cpu().numpy()
        self.log_sigmas = np.log((1 - abar) / abar) / 2  # per training timestep
        steps = bank.step.unique()
        self.seeds = len(bank) // len(steps)  # the entry of the next sampling step of a seed is this much further on
        self.timesteps = bank.timestep.tolist()
        self.negative = target.guidance[0].negative

    @property
    def positions(self) -> int:
        return len(self.bank) - self.seeds

    def loss(self, vectors: Vectors, position: int, noises: tuple[Tensor, Tensor]) -> Tensor:
        """Mean squared difference of the latents after one step from a position, under the target and the vectors."""
        with torch.no_grad():
            wanted = self.step(position, self.session.encode([self.prompt]), noises)
        return (self.step(position, self.target.embed(self.session, vectors), noises) - wanted).square().mean()

    def step(self, position: int, conditioning: Conditioning, noises: tuple[Tensor, Tensor]) -> Tensor:
        """The latent `[1, c, h, w]` one sampling step on."""
        sigma, sigma_to = (self._sigma(self.timesteps[p]) for p in (position, position + self.seeds))
        both = _both(conditioning, self.negative)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            # x_0 + sigma * noise is what samplers move, the U-Net takes it scaled to unit variance
            scaled = (x / math.sqrt(1 + sigma**2)).expand(2, -1, -1, -1)
            eps, eps_negative = self.session.predict_noise(scaled, self._timestep(sigma, x.device), both).chunk(2)
            return x - sigma * (eps_negative + self.cfg_scale * (eps - eps_negative))

        x = self.bank.x[position : position + 1] * math.sqrt(1 + sigma**2)
        return dpmpp_sde_step(denoise, x, sigma, sigma_to, noises)

    def _sigma(self, timestep: float) -> float:
        return float(np.exp(self.log_sigmas[int(timestep)]))

    def _timestep(self, sigma: float, device: torch.device) -> Tensor:
        """The timestep of a noise level `[2]`, between two where it falls between."""
        at = np.interp(math.log(sigma), self.log_sigmas, np.arange(len(self.log_sigmas)))
        return torch.full((2,), float(at), device=device)


def learn(way: OldWay, start: Vectors, seed: int, share_done: Callable[[], float]) -> Iterator[Vectors]:
    """Updates until `share_done()`, the share of the budget that is spent, reaches 1. Yields the vectors after each."""
    vectors = {key: rows.detach().clone().requires_grad_(True) for key, rows in start.items()}
    optimizer = torch.optim.Adam(list(vectors.values()), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    shape, device = way.bank.x[:1].shape, way.bank.x.device
    while (share := share_done()) < 1:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * share)) / 2
        position = int(torch.randint(way.positions, (1,), generator=generator))
        first, second = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        optimizer.zero_grad()
        way.loss(vectors, position, (first, second)).backward()
        optimizer.step()
        yield {key: rows.detach() for key, rows in vectors.items()}
