"""A continued run is held against its file: known vectors in the places of what was learnt, file and prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lib_estimate.report.against_start import Kept, measure_against
from lib_estimate.report.fidelity import Court
from lib_estimate.request import Use
from lib_estimate.target.target import build_target

SHARES = (1.0, 0.5, 0.0)


def kept(session, request, learnt, file, plain, shares=SHARES) -> Kept:
    """`learnt`, `file` and `plain` as prompts, whose tokens are the vectors, or vectors themselves."""
    given = [session.token_vectors(each) if isinstance(each, str) else each for each in (learnt, file, plain)]
    court = Court(session, build_target(request, session), request, ("a photo of {}",))
    *_, last = measure_against(court, *given, shares)
    return last


@pytest.fixture
def request_(short):
    """Prompt and target are one: its own tokens are the best there is, and other colours are worse and worse."""
    return replace(short, prompt="a red circle", images=1, width=64, height=64)


def test_what_is_better_than_the_file_is_taken(session, request_) -> None:
    found = kept(session, request_, "a red circle", "a blue star", None)
    assert (found.share, found.back_to_start) == (1.0, True)
    assert torch.equal(found.vectors["clip_l"], session.token_vectors("a red circle")["clip_l"])
    assert found.fidelity.error < 1e-6


def test_what_is_worse_goes_back_to_the_file(session, request_) -> None:
    found = kept(session, request_, "a blue star", "a red circle", None)
    assert (found.share, found.back_to_start) == (0.0, True)
    assert torch.equal(found.vectors["clip_l"], session.token_vectors("a red circle")["clip_l"])
    assert found.fidelity.error < 1e-6


def test_a_share_of_the_way_is_enough_where_the_whole_goes_too_far(session, request_) -> None:
    best = session.token_vectors("a red circle")["clip_l"]
    off = 0.01 * torch.randn(best.shape, generator=torch.Generator().manual_seed(0))
    file, beyond = {"clip_l": best + off}, {"clip_l": best - 15 * off}
    found = kept(session, request_, beyond, file, None, shares=(1.0, 1 / 16, 0.0))
    assert found.share == 1 / 16
    assert torch.allclose(found.vectors["clip_l"], best, atol=1e-5)


def test_a_file_worse_than_leaving_the_weights_out_is_not_gone_back_to(session, short) -> None:
    request = replace(short, prompt="a (red:1.5) circle", width=64, height=64)
    found = kept(session, request, "a green star", "a blue star", session.token_vectors("a red circle"))
    assert (found.share, found.back_to_start) == (0.0, False)
    assert found.fidelity.recovered == pytest.approx(0, abs=1e-3)
    assert torch.equal(found.vectors["clip_l"], session.token_vectors("a red circle")["clip_l"])


def test_where_the_prompt_does_not_fit_a_bad_file_is_at_least_not_made_worse(session, short) -> None:
    request = replace(short, prompt="a (red:1.5) circle", width=64, height=64)
    better, bad = "a red star", "a blue star"
    assert kept(session, request, better, bad, None).share == 1.0
    found = kept(session, request, bad, better, None)
    assert found.share == 0
    assert torch.equal(found.vectors["clip_l"], session.token_vectors(better)["clip_l"])


def test_sentences_count_where_the_word_will_stand_in_them(session, short) -> None:
    """Whichever of the two was there before, what does better in the sentence is kept."""
    request = replace(short, prompt="a red circle", use=Use.SENTENCE, sentence=("{} on a blue background",), width=64)
    pair = [session.token_vectors(text) for text in ("a red square", "a red shape")]
    found = []
    for learnt, file in (pair, reversed(pair)):
        court = Court(session, build_target(request, session), request, request.sentence)
        *_, last = measure_against(court, learnt, file, None, (1.0, 0.0))
        found.append(last)
    assert {each.share for each in found} == {0.0, 1.0}
    assert torch.equal(found[0].vectors["clip_l"], found[1].vectors["clip_l"])
