"""What every objective is: something that maps vectors to one scalar loss, by the same call.

A loss is divided by the same loss of the empty prompt, so 1 means "as far away as an empty prompt" and 0 a perfect
match, whatever the model, the distance measure and the objective.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Conditioning, Network, Session
from lib_estimate.request import HOLE

Distance = Callable[[Tensor, Tensor], Tensor]  # (prediction [B, ...], target [B, ...]) -> [B], float32
TINY = 1e-12


class Objective(ABC):
    """Something to minimise over vectors."""

    session: Session | None = None  # whose networks it runs

    @abstractmethod
    def draw(self, generator: torch.Generator, fixed: bool) -> Any:
        """What the next step learns from; `fixed` gives the same spread-out choice every time."""

    @abstractmethod
    def losses(self, vectors: Vectors, drawn: Any) -> Iterator[Tensor]:
        """Scalars float32 whose sum is the loss, each with a gradient to every tensor in `vectors`.

        Whoever takes each one's gradient before asking for the next holds only one's activations in memory.
        """

    def loss(self, vectors: Vectors, drawn: Any) -> Tensor:
        """The loss as one scalar."""
        return torch.stack(list(self.losses(vectors, drawn))).sum()

    def lighten(self) -> bool:
        """Makes what follows need less memory and more time; False where there is no way left."""
        return False

    def widen(self) -> bool:
        """Where float16 was too small for a number: has one more of its networks calculate in bfloat16. False where
        none is left."""
        networks = (Network.UNET, Network.TEXT)
        return self.session is not None and any(self.session.widen(network) for network in networks)


def in_sentences(session: Session, text: str, chosen: Sequence[str]) -> tuple[list[str], Conditioning, Conditioning]:
    """Sentences as frames for the embedding, and their S conditionings with the prompt and without its weights.

    Only the prompt's own weights are left out, not the sentence's.
    """
    frames = [s.replace(HOLE, session.placeholder) for s in chosen]
    filled = [s.replace(HOLE, text) for s in chosen]
    rows = session.token_vectors(text)
    if max(map(len, rows.values())) > session.info.chunk_length:  # more than an embedding can hold
        plain = session.encode(filled, weighted=False)
    else:
        plain = session.encode(frames, rows)
    return frames, session.encode(filled), plain


class Together(Objective):
    """The mean of several objectives: one per sentence the embedding is made for."""

    def __init__(self, objectives: Sequence[Objective]) -> None:
        self.objectives = objectives

    def draw(self, generator: torch.Generator, fixed: bool) -> list:
        return [objective.draw(generator, fixed) for objective in self.objectives]

    def losses(self, vectors: Vectors, drawn: list) -> Iterator[Tensor]:
        for objective, part in zip(self.objectives, drawn, strict=True):
            for loss in objective.losses(vectors, part):
                yield loss / len(self.objectives)

    def lighten(self) -> bool:
        lightened = [objective.lighten() for objective in self.objectives]  # all of them, not up to the first
        return any(lightened)

    def widen(self) -> bool:
        widened = [objective.widen() for objective in self.objectives]
        return any(widened)
