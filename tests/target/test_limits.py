"""What is refused before the run, on the small model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lib_estimate import job
from lib_estimate.errors import RequestError
from lib_estimate.files import writing
from lib_estimate.files.embedding import Embedding
from lib_estimate.hosts.standalone import StandaloneHost
from lib_estimate.progress import Note
from lib_estimate.request import Target as Which
from lib_estimate.request import Use
from lib_estimate.target import limits
from lib_estimate.target.target import build_target


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "a (red:1001) circle"}, 'prompt "red" has the weight 1001'),
        ({"prompt": "a (red circle:-5000), (big:2)"}, '"red circle" has the weight -5000'),
        ({"prompt": "a [cat:(dog:2000):0.5]"}, '"dog" has the weight 2000'),
        ({"prompt": "a red circle AND (blue:3000) :0.5"}, '"blue" has the weight 3000'),
        ({"prompt": "a red circle :9999 AND blue"}, '"a red circle" has the weight 9999'),
        ({"prompt": "(" * 80 + "red" + ")" * 80}, '"red" has the weight 2048'),
        ({"negative": "(bad:1e9), (worse:1000000000)"}, 'negative prompt "worse" has the weight 1e\\+09'),
        ({"prompt": "BREAK " * 65}, "65 chunks of 75 tokens, and 64 is the most"),
    ],
)
def test_what_no_model_can_be_told_is_said_before_the_run(change, words, host, short) -> None:
    steps = (step for step in job.estimate(replace(short, **change), host) if not isinstance(step, Note))
    with pytest.raises(RequestError, match=words):
        next(steps)


@pytest.mark.parametrize(
    "change",
    [
        {"use": Use.SENTENCE, "sentence": ("a {}", "a {}, (red:2000)")},
        {"target": Which.NEGATIVE, "negative": "x", "beside": ("(a:2000)",)},
    ],
)
def test_so_it_is_in_sentences_and_beside(change, session, short) -> None:
    with pytest.raises(RequestError, match="has the weight 2000"):
        build_target(replace(short, **change), session)


@pytest.mark.parametrize("prompt", ["(red:1000) circle", "(red:1e9) circle", "(red:nan) circle", "(red:-3) :2 AND a"])
def test_what_a_webui_takes_for_text_or_can_hold_is_not_refused(prompt, session, short) -> None:
    assert build_target(replace(short, prompt=prompt), session)


def test_numbers_that_are_not_finite_are_said_with_the_largest_weight(host, short, tmp_path) -> None:
    width = next(iter(host.parts.text_encoders)).width
    writing.save(Embedding("huge_word", {"clip_l": torch.full((1, width), 1e38)}, {}), tmp_path / "huge_word.pt")
    other = StandaloneHost.__new__(StandaloneHost)
    other.__dict__ |= host.__dict__ | {"embeddings": tmp_path}
    with other.session() as session, pytest.raises(RequestError, match=r'weight is 1[.]5, of "huge_word"'):
        build_target(replace(short, prompt="a (huge_word:1.5)"), session)


def test_what_is_heaviest_is_named_as_a_whole(session) -> None:
    assert limits.heaviest(session.tokens("a (big red:1.5) BREAK (circle:-2)")) == ("circle", -2.0)
    assert limits.heaviest(session.tokens("")) == ("", 1.0)
