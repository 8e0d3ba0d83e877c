"""What auto makes of the uses a word can have, and of how many vectors it may take."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lib_estimate import job
from lib_estimate.learn import learning
from lib_estimate.learn.initial import initial_vectors
from lib_estimate.progress import Note
from lib_estimate.request import EstimateRequest, Part, Start, Use
from tests.conftest import run


def test_emphasis_is_carried(host, tmp_path) -> None:
    """To a seventh of what leaving the weights out does, on noise never learnt from, with every default."""
    request = EstimateRequest(
        prompt="(red:1.6) circle",
        name="carried",
        out=str(tmp_path),
        use=Use.WHOLE,
        vectors=4,
        images=4,
        sentence=("a photo of {}",),
    )
    figures = run(request, host).fidelity
    assert figures.recovered > 0.7
    assert figures.error < figures.unweighted_error
    assert figures.picture_error < 0.35
    assert set(figures.pictures) == {"prompt", "embedding", "unweighted"}
    assert len(figures.pictures["prompt"]) == 4
    assert 0 < figures.pixel_difference < 0.75 * figures.unweighted_pixel_difference


def test_for_use_anywhere_no_sentence_is_spoiled(host, tmp_path) -> None:
    request = EstimateRequest(prompt="(red:1.6) circle", name="any", out=str(tmp_path), images=0, steps=160)
    outcome = run(request, host)
    assert outcome.record["vectors"] == 2
    assert outcome.record["use"] == "anywhere"
    assert outcome.fidelity.error < 0.75 * outcome.fidelity.unweighted_error
    assert outcome.record["sentence_error"]["median"] < 0.9
    assert len(outcome.fidelity.sentences) == 6


def test_for_use_anywhere_it_goes_a_part_of_the_way(host, short, session, monkeypatch) -> None:
    request = dataclasses.replace(short, use=Use.ANYWHERE, part=Part.CROSS_ATTENTION, overwrite=True)
    start = initial_vectors(request, session)["clip_l"]
    held_back = run(request, host).embedding.vectors["clip_l"] - start
    monkeypatch.setattr(learning, "SHARE_OF_THE_WAY", 1.0)
    whole = run(request, host).embedding.vectors["clip_l"] - start
    assert whole.abs().max() > 0
    assert torch.allclose(held_back, 0.75 * whole, atol=1e-6)


def test_for_one_sentence_it_is_best_there(host, short) -> None:
    sentence = "a photo of a {} on the left"
    request = dataclasses.replace(
        short, prompt="(red:1.6) circle", part=Part.AUTO, use=Use.SENTENCE, sentence=(sentence,), steps=20
    )
    outcome = run(request, host)
    assert outcome.record["fitted_sentence_error"]["median"] < 0.8
    assert [s.text for s in outcome.fidelity.sentences if s.fitted] == [sentence]
    assert outcome.record["sentence_error"] is not None


def test_two_sentences_at_once(host, short) -> None:
    both = ("a {} on the left", "a small {}")
    request = dataclasses.replace(
        short, prompt="(red:1.6) circle", part=Part.CROSS_ATTENTION, use=Use.SENTENCE, sentence=both, steps=20
    )
    outcome = run(request, host)
    assert sum(s.fitted for s in outcome.fidelity.sentences) == 2
    assert outcome.losses[-1] < 0.9 * outcome.losses[0]


def test_auto_says_what_it_picked(host, short) -> None:
    outcome = run(dataclasses.replace(short, part=Part.AUTO, steps=5), host)
    assert [s["part"] for s in outcome.record["stages"]] == ["cross-attention", "sketch", "unet and sketch"]
    assert outcome.record["stages"][0]["optimizer"] == "LBFGS"
    assert sum(s["steps_run"] for s in outcome.record["stages"]) == outcome.record["steps_run"] == 5


@pytest.mark.parametrize(("tolerance", "most"), [(1.0, 1), (0.05, 5)])
def test_vectors_auto_takes_as_few_as_will_do(tolerance, most, host, short) -> None:
    request = dataclasses.replace(
        short, prompt="a large red circle on the left", part=Part.AUTO, vectors="auto", tolerance=tolerance, steps=3
    )
    outcome = run(request, host)
    table = outcome.record["errors_by_vectors"]
    assert outcome.record["vectors"] == list(table)[-1] <= most
    assert all(error > tolerance for error in list(table.values())[:-1])
    assert table[outcome.record["vectors"]] <= tolerance


def test_a_sentence_it_would_spoil_is_warned_about(host, short) -> None:
    """A random embedding is worse than the prompt without weights in any sentence."""
    request = dataclasses.replace(short, part=Part.CROSS_ATTENTION, use=Use.ANYWHERE, start=Start.RANDOM, steps=1)
    notes = [p.text for p in job.estimate(request, host) if isinstance(p, Note)]
    assert any("a photo of {}" in note for note in notes)
