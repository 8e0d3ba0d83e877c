"""What a running job tells whoever started it, and how that one stops it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lib_estimate.errors import EstimateError


class Interrupted(EstimateError):
    """The user stopped the run and nothing is to be saved."""


@dataclass(frozen=True)
class Phase:
    """Progress of a part of the job that is not the learning itself."""

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class Cost:
    """What a phase will cost: U-Net forward-equivalents, and what it computes without the U-Net, in forwards' worth."""

    phase: str  # as its progress calls it; of learning "Learning (part)"
    forwards: int
    aside: float = 0.0


@dataclass(frozen=True)
class Planned:
    """What is to come, in order, before it begins; and what counts how many forwards there have been so far."""

    costs: tuple[Cost, ...]
    spent: Callable[[], int]


@dataclass(frozen=True)
class Note:
    """A sentence the user should read."""

    text: str


@dataclass(frozen=True)
class Next(Note):
    """One of several embeddings of a run, or of several checkpoints, begins."""

    number: int
    total: int


class Cancel:
    """How somebody stops a run: keep the best vectors so far, or drop everything."""

    def __init__(self) -> None:
        self.wanted: str | None = None

    def save(self) -> None:
        self.wanted = "save"

    def discard(self) -> None:
        self.wanted = "discard"


@dataclass(frozen=True)
class StepReport:
    """One learning step. `error` is set where the validation error was measured."""

    part: str
    step: int
    steps: int
    loss: float
    learning_rate: float
    seconds: float
    seconds_left: float
    error: float | None
    best_error: float
    start_error: float  # of the vectors the stage started from
