"""A negative embedding is learnt and judged beside several prompts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lib_estimate.progress import Cancel
from lib_estimate.report.fidelity import measure
from lib_estimate.report.in_words import result_sentence
from lib_estimate.request import Effort, EstimateRequest, Use
from lib_estimate.request import Target as Which
from lib_estimate.target import besides
from lib_estimate.target.recording import materials_of
from lib_estimate.target.target import build_target
from tests.bench.measure import counting, drained

REQUEST = EstimateRequest(
    prompt="a photo of a star", negative="(red:1.5), circle", target=Which.NEGATIVE, name="neg", use=Use.WHOLE,
    sampling_steps=5, effort=Effort.NORMAL, images=0, width=64, height=64,
)  # fmt: skip


def test_the_users_prompts_come_first_and_the_judges_are_never_learnt_beside() -> None:
    request = dataclasses.replace(REQUEST, beside=("a green ring", " ", "a photo of a star"))
    assert besides.own(request) == ("a photo of a star", "a green ring")
    assert besides.learnt(request)[:2] == besides.own(request)
    assert len(besides.learnt(request)) == besides.AT_LEAST
    assert len(besides.others(request)) == besides.OTHERS
    for seed in range(50):
        other = dataclasses.replace(request, seed=seed)
        assert not set(besides.learnt(other)) & set(besides.others(other))
    many = dataclasses.replace(request, beside=tuple(f"a house number {n}" for n in range(9)))
    assert besides.learnt(many) == besides.own(many)


@pytest.mark.parametrize(("own", "effort"), [(1, Effort.NORMAL), (1, Effort.QUICK), (6, Effort.NORMAL)])
def test_each_of_the_users_prompts_is_recorded(session, monkeypatch, own, effort) -> None:
    """With one prompt it costs what a positive one costs; with more than that, a generation each."""
    request = dataclasses.replace(REQUEST, effort=effort, beside=tuple(f"a ring number {n}" for n in range(own - 1)))
    used, sample = [], session.sample

    def seen(noise, guidance, *given, **named):
        used.append(guidance[0].positive[0][1].hidden)
        return sample(noise, guidance, *given, **named)

    monkeypatch.setattr(session, "sample", seen)
    with counting(session) as count:
        (material,) = drained(materials_of(request, session, build_target(request, session), Cancel()))
    told = [session.encode([text]).hidden for text in besides.own(request)]
    assert all(any(torch.equal(text, hidden) for hidden in used) for text in told)
    if own == 1:
        alike = dataclasses.replace(request, target=Which.PROMPT, prompt=request.negative, negative=request.prompt)
        with counting(session) as positive:
            drained(materials_of(alike, session, build_target(alike, session), Cancel()))
        assert count.equivalents == positive.equivalents
    assert len(material.queries.hidden[0]) == len(material.bank) == 5 * max(own, 4 if effort is Effort.NORMAL else 2)


def test_the_queries_and_the_targets_are_of_the_same_latents(session) -> None:
    """Recorded beside several prompts in turn, they are sorted alike: each latent's target is what the U-Net says."""
    (material,) = drained(materials_of(REQUEST, session, build_target(REQUEST, session), Cancel()))
    bank = material.bank
    eps = session.predict_noise(bank.x, bank.timestep, material.target.wanted(0)[0][1])
    assert torch.allclose(eps, bank.target, atol=1e-4)
    assert (bank.step.diff() >= 0).all()
    assert torch.equal(material.queries.step, bank.step)


def test_the_memory_asked_for_is_not_gone_beyond(session) -> None:
    request = dataclasses.replace(REQUEST, queries=256, memory=0.001)
    (material,) = drained(materials_of(request, session, build_target(request, session), Cancel()))
    assert sum(hidden.nbytes for hidden in material.queries.hidden) <= 0.001 * 2**30 / 2
    assert 1 < material.queries.kept < 256


def test_the_report_tells_your_prompts_from_others(session) -> None:
    """Leaving the weights out is all of the error everywhere; the prompt itself none, also where it has no weights."""

    def report(request, vectors):
        *_, fidelity = measure(session, build_target(request, session), request, [lambda: vectors], ())
        return fidelity

    plain = report(REQUEST, session.token_vectors(REQUEST.negative))
    assert [there.text for there in plain.beside] == [*besides.own(REQUEST), *besides.others(REQUEST)]
    assert [there.fitted for there in plain.beside] == [True] + [False] * besides.OTHERS
    assert all(there.share == pytest.approx(1, rel=1e-3) for there in plain.beside)
    assert plain.figures()["other_beside_error"]["worst"] == pytest.approx(1, rel=1e-3)
    bare = dataclasses.replace(REQUEST, negative="red, circle")
    same = report(bare, session.token_vectors(bare.negative))
    assert same.figures()["beside_error"]["worst"] < 1e-6
    words = result_sentence(same, "neg")
    assert "Beside your prompts 0.0% of what the prompt changes is left" in words
    assert "Beside prompts it was not learnt with" in words
