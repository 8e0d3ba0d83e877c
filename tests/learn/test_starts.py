"""The start of a prompt that is several texts is found by trial, and never ends worse than that."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lib_estimate import job
from lib_estimate.learn.count import knee
from lib_estimate.learn.initial import initial_vectors
from lib_estimate.learn.starts import best_start, candidates, picture_moving_error
from lib_estimate.progress import Cancel, Note
from lib_estimate.report.fidelity import Court
from lib_estimate.request import Effort, Part, Start
from lib_estimate.target.recording import materials_of
from lib_estimate.target.target import build_target
from tests.bench.measure import drained

AND = "a (red:1.5) circle :1.2 AND a green square :0.6"


@pytest.fixture
def composed(short):
    return dataclasses.replace(
        short, prompt=AND, part=Part.AUTO, effort=Effort.QUICK, sampling_steps=5, trajectories=0, steps=0, sentence=()
    )


def recorded(session, request):
    return drained(materials_of(request, session, build_target(request, session), Cancel()))


def test_candidates_are_made_of_the_texts_tokens(session) -> None:
    parts = session.read(AND, 20)
    first, second = (session.token_vectors(part.text_at(0))["clip_l"] for part in parts)
    found = [vectors["clip_l"] for vectors in candidates(session, parts, 8)]
    assert all(rows.shape == (8, first.shape[1]) for rows in found)
    assert torch.equal(found[0][:6], torch.cat([first, second]))
    assert torch.equal(found[1][:6], torch.cat([second, first]))
    assert torch.equal(found[2][:3], first)
    assert torch.equal(found[3][:3], second)
    assert torch.allclose(found[4][:3], (1.2 * first + 0.6 * second) / 1.8, atol=1e-6)
    few = [vectors["clip_l"] for vectors in candidates(session, parts, 4)]
    assert len(few) == 6
    assert torch.allclose(few[2][0], torch.cat([first, second])[:2].mean(0))


def test_the_nearest_candidate_is_the_start(session, composed) -> None:
    materials = recorded(session, composed)
    chosen = drained(best_start(composed, session, materials))
    found = candidates(session, session.read(AND, 5), len(chosen["clip_l"]))
    errors = [picture_moving_error(materials, vectors) for vectors in found]
    assert picture_moving_error(materials, chosen) == min(errors) < max(errors) / 1.2


@pytest.mark.parametrize("changes", [{"init": "a red circle"}, {"start": Start.RANDOM}, {"prompt": "a red circle"}])
def test_a_start_that_is_asked_for_is_taken(session, composed, changes) -> None:
    request = dataclasses.replace(composed, **changes)
    chosen = drained(best_start(request, session, recorded(session, composed)))
    assert torch.equal(chosen["clip_l"], initial_vectors(request, session)["clip_l"])


def test_it_never_ends_worse_than_its_start_and_says_what_to_write_instead(host, composed, monkeypatch) -> None:
    """Spoilt vectors go all the way back; a prompt that one word can't hold is offered as several."""
    learnt = job.learn

    def spoilt(*given):
        run = yield from learnt(*given)
        run.best = {key: rows + torch.randn_like(rows) for key, rows in run.best.items()}
        return run

    monkeypatch.setattr(job, "learn", spoilt)
    judged = []
    judge = Court.judge

    def seen(self, vectors, pictures_anyway):
        judged.append(vectors)
        return judge(self, vectors, pictures_anyway)

    monkeypatch.setattr(Court, "judge", seen)
    *before, outcome = job.estimate(dataclasses.replace(composed, name="w_and"), host)
    assert torch.equal(outcome.embedding.vectors["clip_l"], judged[0]["clip_l"])  # the start is judged first
    notes = [p.text for p in before if isinstance(p, Note)]
    assert any("prompt's own tokens did before" in note for note in notes)
    assert any("w_and-1 :1.2 AND w_and-2 :0.6" in note for note in notes)


def test_the_knee_is_where_more_vectors_bring_little() -> None:
    errors = {1: 0.9, 4: 0.3, 8: 0.05, 16: 0.04, 32: 0.039}
    assert knee(errors, 0.01) == 8
    assert knee(errors, 0.3) == 4
    assert knee({2: 0.5, 1: 0.9}, 0.01) == 2
