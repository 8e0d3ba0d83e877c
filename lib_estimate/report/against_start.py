"""What was learnt held against what it began from: a file that is continued, or the tokens of a prompt that is several
texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from lib_estimate.files.embedding import Vectors
from lib_estimate.report.fidelity import Court, Fidelity, Progress


@dataclass(frozen=True)
class Kept:
    """What the report of a continued run found best."""

    fidelity: Fidelity
    vectors: Vectors
    share: float  # of the way from `back_to` to what was learnt
    back_to_start: bool  # else to the prompt without its weights


def measure_against(
    court: Court, learnt: Vectors, start: Vectors, plain: Vectors | None, shares: Sequence[float]
) -> Iterator[Progress | Kept]:
    """Measures the start, then what was learnt, then shares of the way back, the last of them 0, until one is good
    enough. Yields progress and last what is kept.

    Back means to the start, so that going on never makes a file worse: good enough is what does no worse than it does
    and no worse than leaving the weights out. Where the start itself does worse than that, there is nothing in it to
    keep: back then means to the prompt without its weights, as in any run, and that alone is what counts. Only where
    that does not fit into the vectors (`plain` is None) is the start what remains.
    """
    yield from court.prepare()
    before = yield from court.judge(start, pictures_anyway=True)
    poor = court.below_plain(before)
    to_start = plain is None or not poor
    if to_start:
        for own, figures in court.each(before):
            own.bars = [*([] if poor else [own.below_plain]), below(own, figures)]
    origin = start if to_start else plain
    unmoved = all(torch.equal(rows, learnt[key]) for key, rows in start.items())
    for share in (0.0,) if to_start and unmoved else shares:
        vectors = {key: torch.lerp(origin[key], rows, share) for key, rows in learnt.items()}
        last = share == 0
        fidelity = before if last and to_start else (yield from court.judge(vectors, pictures_anyway=last))
        if fidelity is not None and (last or not court.worse(fidelity)):
            yield Kept(fidelity, vectors, share, to_start)
            return


def below(court: Court, before: Fidelity) -> Callable[[Fidelity], bool]:
    """Tells whether one of the figures of a report is worse than before, where the embedding is meant to stand.

    While a report is still being made, only what it has so far is compared.
    """

    def worse(now: Fidelity) -> bool:
        pairs = [*(_alone(now, before) if court.alone() else ())]
        sentences = [[s.error if s.share is None else s.share for s in court.meant(f)] for f in (now, before)]
        if sentences[1] and len(sentences[0]) == len(sentences[1]):
            pairs.append((median(sentences[0]), median(sentences[1])))
        return any(mine > theirs for mine, theirs in pairs)

    return worse


def _alone(now: Fidelity, before: Fidelity) -> Iterator[tuple[float, float]]:
    """Figures of two embeddings standing alone, smaller is better."""
    yield now.error, before.error
    if now.recovered is not None and before.recovered is not None:
        yield -now.recovered, -before.recovered
    if now.picture_error is not None and before.picture_error is not None:
        yield now.picture_error, before.picture_error
