"""The transformer part: match what the text encoder says."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lib_estimate.errors import RequestError
from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Conditioning, Session
from lib_estimate.learn.objectives.base import TINY, Distance, Objective
from lib_estimate.target.target import Target


class HiddenState(Objective):
    """Match the text encoder's hidden states at all positions: d(z(E), z*) / d(z(empty), z*).

    The positions after the embedding count too: the U-Net attends to padding as well. Where the model takes a pooled
    vector, it is half of the loss.
    """

    def __init__(self, session: Session, target: Target, distance: Distance) -> None:
        wanted = target.single()
        if wanted is None:
            raise RequestError(
                "The transformer part can't follow a prompt that changes from step to step or is composed with AND. "
                "Use the unet part, which can."
            )
        if wanted.hidden.shape[1] != target.empty.hidden.shape[1]:
            raise RequestError(
                f"The prompt is longer than one chunk of {session.info.chunk_length} tokens, and the transformer part "
                "compares one chunk. Use the unet part, or shorten the prompt."
            )
        self.session, self.target, self.wanted, self.distance = session, target, _tensors(wanted), distance
        pairs = zip(_tensors(target.empty), self.wanted, strict=True)
        self.scales = [1 / distance(empty, z).mean().clamp_min(TINY) for empty, z in pairs]

    def draw(self, generator: torch.Generator, fixed: bool) -> None:
        return None

    def losses(self, vectors: Vectors, drawn: None) -> Iterator[Tensor]:
        given = _tensors(self.target.embed(self.session, vectors))
        terms = [
            self.distance(z, wanted).mean() * scale
            for z, wanted, scale in zip(given, self.wanted, self.scales, strict=True)
        ]
        yield torch.stack(terms).mean()


def _tensors(conditioning: Conditioning) -> list[Tensor]:
    """All that the U-Net is told: hidden states `[B, T, C]`, and `[B, P]` where there is a pooled vector."""
    return [conditioning.hidden, *([] if conditioning.pooled is None else [conditioning.pooled])]
