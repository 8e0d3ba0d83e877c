"""The report of several words at once: the pictures with all of them in their places, and the noise under CFG."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lib_estimate.hosts.base import Conditioning, Session, StepConditioning, Trajectory
from lib_estimate.report.fidelity import LEVELS, Court
from lib_estimate.request import EstimateRequest
from lib_estimate.target.bank import Bank, guided_noise
from lib_estimate.target.together import Together


class CourtOfWords(Court):
    """What candidates, each the vectors of all words, are measured against."""

    target: Together

    def __init__(self, session: Session, target: Together, request: EstimateRequest) -> None:
        super().__init__(session, target, request, ())

    def _bank(self, path: Trajectory) -> Bank:
        """Latents at LEVELS noise levels with what CFG makes of both sides there."""
        steps, seeds = path.x.shape[:2]
        edges = [level * steps // LEVELS for level in range(LEVELS + 1)] if steps > LEVELS else list(range(steps + 1))
        taken = [(a + b) // 2 for a, b in pairwise(edges)]
        moves = torch.stack([path.dsigma[a:b].square().sum() for a, b in pairwise(edges)])
        x, timestep = path.x[taken].flatten(0, 1), path.timestep[taken].repeat_interleave(seeds)
        step = torch.tensor(taken).repeat_interleave(seeds)
        eps = path.positive
        if path.negative is not None:
            eps = path.negative + self.request.cfg_scale * (path.positive - path.negative)
        bank = Bank(x, timestep, step, moves.repeat_interleave(seeds), eps[taken].flatten(0, 1), None, None)
        empty = self._guided(bank, self.target.emptied())
        plain = None if self.target.plain is None else self._guided(bank, self.target.plain)
        return Bank(bank.x, bank.timestep, bank.step, bank.weight, bank.target, empty, plain)

    def _eps(self, embedding: Sequence[Conditioning]) -> Tensor:
        return self._guided(self.bank, self.target.with_embedding(embedding))

    def _guided(self, bank: Bank, guidance: Sequence[StepConditioning]) -> Tensor:
        """eps `[M, c, h, w]` under CFG of a bank's latents."""
        given = (self.session, bank.x, bank.timestep, bank.step, guidance)
        positive = guided_noise(*given, negative=False)
        if self.request.cfg_scale == 1:
            return positive
        negative = guided_noise(*given, negative=True)
        return negative + self.request.cfg_scale * (positive - negative)
