"""The report of several checkpoints: the same vectors, held against what each of them does under the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Session
from lib_estimate.report.fidelity import Court, Fidelity, OnCheckpoint, Progress, exact
from lib_estimate.request import EstimateRequest
from lib_estimate.target.target import Target


class Courts(Court):
    """A court on each checkpoint, as one: what is worse on one of them is worse."""

    def __init__(self, courts: Sequence[Court]) -> None:
        self.courts = courts

    def prepare(self) -> Iterator[Progress]:
        for court in self.courts:
            yield from court.prepare()
            court.session.place()  # the next one needs the room

    def judge(self, vectors: Vectors, pictures_anyway: bool) -> Iterator[Progress]:
        rows: list[OnCheckpoint] = []
        for court in self.courts:
            fidelity = yield from court.judge(vectors, pictures_anyway)
            court.session.place()
            if fidelity is None or (not pictures_anyway and court.worse(fidelity)):
                return None
            info = court.session.info
            rows.append(OnCheckpoint(info.name, info.hash, fidelity, court.below_plain(fidelity)))
        return replace(rows[0].fidelity, checkpoints=tuple(rows))

    def worse(self, fidelity: Fidelity) -> bool:
        return any(court.worse(own) for court, own in self.each(fidelity))

    def below_plain(self, fidelity: Fidelity) -> bool:
        return any(court.below_plain(own) for court, own in self.each(fidelity))

    def each(self, fidelity: Fidelity) -> list[tuple[Court, Fidelity]]:
        return [(court, row.fidelity) for court, row in zip(self.courts, fidelity.checkpoints, strict=True)]


def court_of(
    sessions: Sequence[Session], targets: Sequence[Target], request: EstimateRequest, chosen: Sequence[str]
) -> Court:
    """For a session and a target of each checkpoint."""
    courts = [Court(*each, request, chosen) for each in zip(sessions, targets, strict=True)]
    return courts[0] if len(courts) == 1 else Courts(courts)


def exact_on(sessions: Sequence[Session], target: Target, chosen: Sequence[str]) -> Fidelity:
    """The figures of vectors that are the prompt's own tokens, on every checkpoint."""
    fidelity, infos = exact(target, chosen), [session.info for session in sessions]
    rows = [OnCheckpoint(info.name, info.hash, fidelity, False) for info in infos]
    return replace(fidelity, checkpoints=tuple(rows)) if len(rows) > 1 else fidelity
