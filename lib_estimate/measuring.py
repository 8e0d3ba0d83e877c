"""An embedding that is there already, held against a prompt: the report without the learning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib_estimate.costs import case_of, of_report
from lib_estimate.errors import EstimateError
from lib_estimate.files.embedding import Embedding
from lib_estimate.hosts.base import Host, Network
from lib_estimate.hosts.several import in_turn
from lib_estimate.job import check_size
from lib_estimate.learn.continued import fitting_vectors
from lib_estimate.learn.needs import shortage_said
from lib_estimate.progress import Next, Note, Phase, Planned
from lib_estimate.report.fidelity import Court, Fidelity, OnCheckpoint, first_good, report_sentences
from lib_estimate.request import EstimateRequest
from lib_estimate.target.target import build_target


def measured(embedding: Embedding, request: EstimateRequest, host: Host) -> Iterator[Planned | Phase | Note | Fidelity]:
    """Measures an embedding against a prompt, as at the end of an estimate; last yields the Fidelity.

    On each of a host's checkpoints, one after the other. One that the embedding can't be measured on is noted and left
    out; EstimateError where no other is left.
    """
    rows, failed = [], None
    with closing(in_turn(host)) as hosts:
        for number, total, each in hosts:
            try:
                rows.append((yield from _row(embedding, request, each, number, total)))
            except EstimateError as error:
                failed = error
                if total > 1:
                    yield Note(f"Not measured on one of the checkpoints: {error}")
    if not rows:
        raise failed
    yield rows[0].fidelity if total == 1 else replace(rows[0].fidelity, checkpoints=tuple(rows))


def _row(
    embedding: Embedding, request: EstimateRequest, host: Host, number: int, total: int
) -> Iterator[Planned | Phase | Note]:
    """What comes of one checkpoint, an OnCheckpoint."""
    with host.session(tags=request.take_over_lora) as session, shortage_said(request, [session]):
        info = session.info
        if total > 1:
            yield Next(f"{info.name}: checkpoint {number} of {total}.", number, total)
        check_size(request, [info])
        vectors = fitting_vectors(embedding, info)
        session.place(Network.TEXT)
        target, chosen = build_target(request, session), report_sentences(request)
        court = Court(session, target, request, chosen)
        yield Planned(
            tuple(of_report(request, case_of(request, [session], target), len(chosen))), lambda: session.forwards
        )
        for progress in first_good(court, [lambda: vectors]):
            if isinstance(progress, Fidelity):
                return OnCheckpoint(info.name, info.hash, progress, court.below_plain(progress))
            yield Phase(*progress)
    raise AssertionError("a court ends with a Fidelity")


def measurement(path: Path, embedding: Embedding, request: EstimateRequest, fidelity: Fidelity) -> dict[str, Any]:
    """What was measured, as plain values."""
    names = {"prompt": request.prompt, "negative": request.negative, "target": request.target.value}
    return {"file": str(path), "name": embedding.name, **names, **fidelity.figures()}
