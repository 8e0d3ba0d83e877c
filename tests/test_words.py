"""Several words from one request: both prompts at once, and a word for each text of AND or editing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from lib_estimate import job, words
from lib_estimate.errors import EstimateError, ReportFailed, RequestError
from lib_estimate.files import reading
from lib_estimate.hosts.standalone import StandaloneHost
from lib_estimate.progress import Cancel, Next, Note, StepReport
from lib_estimate.report.court_of_words import CourtOfWords
from lib_estimate.report.fidelity import picture_error
from lib_estimate.request import Effort, EstimateRequest, ModelOptions, Part, Use
from lib_estimate.request import Target as Which
from lib_estimate.target.bank import PICTURES, latent_noise
from lib_estimate.target.target import build_target
from lib_estimate.target.together import build_together
from tests.conftest import SHAPES_SD


@pytest.fixture
def asked(tmp_path) -> EstimateRequest:
    return EstimateRequest(
        prompt="a (yellow:1.4) star", negative="(red:1.4), small", name="w_test", target=Which.BOTH, use=Use.WHOLE,
        sampling_steps=5, effort=Effort.QUICK, images=1, out=str(tmp_path), part=Part.CROSS_ATTENTION, steps=30,
        width=64, height=64,
    )  # fmt: skip


def final(session, request, prompt: str, negative: str) -> torch.Tensor:
    """Finished latents of a generation with these texts, as a user would write them."""
    target = build_target(dataclasses.replace(request, prompt=prompt, negative=negative, target=Which.PROMPT), session)
    noise = latent_noise(request, session, PICTURES, 2)
    *_, path = session.sample(noise, target.guidance, request.cfg_scale)
    return path.final


def test_both_at_once_from_one_recording(host, asked, monkeypatch) -> None:
    """Two files, whose names together make the picture that the two prompts make; recorded as cheaply as one."""
    asked = dataclasses.replace(asked, width=0, height=0)  # pictures as the model was trained to make them
    seen = list(words.estimate(asked, host))
    outcome = seen[-1]
    assert [path.name for path in (outcome.path, *outcome.others)] == ["w_test.pt", "w_test-neg.pt"]
    assert outcome.written == {"prompt": "w_test", "negative prompt": "w_test-neg"}
    assert [(p.number, p.total) for p in seen if isinstance(p, Next)] == [(1, 2), (2, 2)]
    one = dataclasses.replace(asked, target=Which.PROMPT, name="w_one")
    *_, alone = job.estimate(one, host)
    assert (
        outcome.record["forwards"]["recording"] <= alone.record["forwards"]["recording"] + 10
    )  # the other's empty eps
    assert outcome.fidelity.picture_error < 0.6
    assert outcome.fidelity.error < outcome.fidelity.unweighted_error / 2
    assert [word["name"] for word in outcome.record["words"]] == ["w_test", "w_test-neg"]
    assert reading.load(outcome.others[0]).metadata["written"] == outcome.written
    fresh = StandaloneHost(ModelOptions(model=str(SHAPES_SD), device="cpu"), outcome.path.parent)
    with fresh.session() as session:
        wanted = final(session, asked, asked.prompt, asked.negative)
        given = final(session, asked, "w_test", "w_test-neg")
        plain = final(session, asked, "a yellow star", "red, small")
        assert picture_error(given, wanted, plain) < 0.8
        # Without either of the two words it is another picture.
        assert picture_error(given, wanted, plain) < picture_error(final(session, asked, "w_test", ""), wanted, plain)


@pytest.mark.parametrize(
    ("prompt", "written"),
    [
        ("a (red:1.5) circle :1.2 AND a green square :0.6", "w_test-1 :1.2 AND w_test-2 :0.6"),
        ("a [(red:1.4):blue:0.4] circle", "[w_test-1:w_test-2:0.4]"),
    ],
)
def test_a_word_for_each_text_says_what_the_prompt_says(host, asked, prompt, written) -> None:
    """What is to be written makes the prompt's own picture, where one word can't."""
    request = dataclasses.replace(asked, prompt=prompt, target=Which.PROMPT, stages=True, width=0, height=0)
    *_, outcome = words.estimate(request, host)
    assert outcome.written == {"prompt": written}
    assert [path.stem for path in (outcome.path, *outcome.others)] == ["w_test-1", "w_test-2"]
    assert outcome.fidelity.reference == "unweighted"
    assert not outcome.fidelity.below_plain()
    fresh = StandaloneHost(ModelOptions(model=str(SHAPES_SD), device="cpu"), outcome.path.parent)
    with fresh.session() as session:
        wanted, given = (final(session, request, text, request.negative) for text in (prompt, written))
        empty = final(session, request, "", request.negative)
        assert picture_error(given, wanted, empty) < 0.05


def test_words_without_weights_are_exact(host, asked) -> None:
    request = dataclasses.replace(asked, prompt="a red circle AND a blue star", target=Which.PROMPT, stages=True)
    *_, outcome = words.estimate(request, host)
    assert (outcome.fidelity.error, outcome.losses) == (0.0, [])
    with host.session() as session:
        own = session.token_vectors("a blue star")["clip_l"]
    assert torch.equal(reading.load(outcome.others[0]).vectors["clip_l"], own)


def test_one_text_is_one_word(host, asked) -> None:
    request = dataclasses.replace(asked, prompt="a red circle", target=Which.PROMPT, stages=True)
    seen = list(words.estimate(request, host))
    assert seen[-1].path.stem == "w_test"
    assert words.ONE_TEXT in [p.text for p in seen if isinstance(p, Note)]


def test_the_report_counts_cfg_with_all_words_in_place(session, asked) -> None:
    """The prompts' own conditionings have no error, those without weights all of it."""
    targets = [
        build_target(dataclasses.replace(asked, target=which), session, beside=asked.prompt)
        for which in (Which.PROMPT, Which.NEGATIVE)
    ]
    together = build_together(asked, session, targets, ((asked.prompt,), (asked.negative,)))
    court = CourtOfWords(session, together, asked)
    list(court.prepare())
    own = court._by_noise([targets[0].wanted(0)[0][1], targets[1].wanted(0)[0][1]])
    assert own.error < 1e-6
    plain = [session.encode(["a yellow star"]), session.encode(["red, small"], negative=True)]
    left_out = court._by_noise(plain)
    assert left_out.error == pytest.approx(left_out.unweighted_error, rel=1e-3)
    assert 0.001 < left_out.error < 1
    half = court._by_noise([targets[0].wanted(0)[0][1], plain[1]])
    assert 0 < half.error < left_out.error


def test_an_interruption_keeps_what_was_learnt(host, asked) -> None:
    """The word that was learnt is saved, the one that had not begun as it would have started."""
    cancel = Cancel()
    outcome = None
    for progress in words.estimate(dataclasses.replace(asked, images=0), host, cancel):
        if isinstance(progress, StepReport):
            cancel.save()
        outcome = progress
    assert outcome.others[0].exists()
    with host.session() as session:
        start = session.token_vectors(asked.negative)["clip_l"]
    assert torch.equal(reading.load(outcome.others[0]).vectors["clip_l"], start)
    assert [word["stopped"] for word in outcome.record["words"]] == ["interrupted", "interrupted"]


def test_what_was_learnt_is_saved_when_the_report_fails(host, asked, monkeypatch) -> None:
    def broken(*_):
        raise RuntimeError("no report")

    monkeypatch.setattr(CourtOfWords, "_bank", broken)
    with pytest.raises(ReportFailed, match="no report"):
        list(words.estimate(asked, host))
    assert {path.name for path in Path(asked.out).iterdir()} == {"w_test.pt", "w_test-neg.pt"}


def test_names_that_are_taken_are_refused_before_anything_is_learnt(host, asked) -> None:
    (Path(asked.out) / "w_test-neg.pt").write_bytes(b"another's")
    with pytest.raises(EstimateError, match=r"w_test-neg\.pt exists already"):
        list(words.estimate(asked, host))
    assert not (Path(asked.out) / "w_test.pt").exists()


@pytest.mark.parametrize("changes", [{"init": "red"}, {"continue_from": "x"}, {"use": Use.SENTENCE}])
def test_what_several_words_have_no_place_for_is_refused(asked, changes) -> None:
    with pytest.raises(RequestError, match="several embeddings"):
        dataclasses.replace(asked, sentence=("a {}",), **changes).validate()
