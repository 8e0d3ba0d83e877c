"""What enters the U-Net's cross-attention layers along the target's trajectories, kept to be attended with again.

The text reaches the U-Net through these layers alone. So an embedding that brings about the same output of every one
of them, for the hidden states that come by on the way from noise to picture, brings about the same picture, and that
can be tried without running the U-Net.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Queries:
    """Hidden states that entered each cross-attention layer.

    hidden: per layer `[M, Q, C]` (M noisy latents, Q positions of each), in the number format of the U-Net.
    step `[M]`: the sampling step each latent comes from. kept: positions per latent and layer, asked for and kept.
    """

    hidden: list[Tensor]
    step: Tensor
    asked: int
    kept: int


class Recorder:
    """Collects queries while a session samples; pass `see` as its `watch`.

    Takes `positions` random positions of each latent and layer, fewer where all of them together would not fit into
    `budget` bytes.
    """

    def __init__(self, positions: int, steps: int, budget: int, seed: int) -> None:
        self.asked = self.kept = positions
        self.steps, self.budget, self.fitted = steps, budget, False
        self.generator = torch.Generator().manual_seed(seed)
        self.seen: dict[int, list[Tensor]] = {}

    def see(self, step: int, layer: int, hidden: Tensor) -> None:
        """hidden `[B, L, C]` entering a layer; all of a batch keep the same positions."""
        if step == 1 and layer == 0 and not self.fitted:  # every layer has been seen once
            self._fit_budget()
        chosen = torch.randperm(hidden.shape[1], generator=self.generator)[: self.kept]
        self.seen.setdefault(layer, []).append(hidden[:, chosen.to(hidden.device)].detach().clone())

    def _fit_budget(self) -> None:
        """After the first step: keeps as many positions per latent as all that comes fits into the budget with."""
        self.fitted = True  # several generations may come one after the other, all of them cut alike

        def whole(kept: int) -> int:
            return self.steps * sum(pieces[0][:, :kept].nbytes for pieces in self.seen.values())

        self.kept = max(1, bisect_right(range(1, self.kept + 1), self.budget, key=whole))
        for pieces in self.seen.values():
            pieces[0] = pieces[0][:, : self.kept]

    def queries(self, step: Tensor, order: Tensor) -> Queries:
        """All that was seen, in the order `[M]` that the entries of the bank have, whose sampling steps are given."""
        hidden = [torch.cat(self.seen[layer])[order] for layer in sorted(self.seen)]
        return Queries(hidden, step, self.asked, self.kept)
