"""Prompts taken apart into texts, and put together again from words."""

from __future__ import annotations

import pytest

from lib_estimate.errors import RequestError
from lib_estimate.target.texts import put_together, texts_of


@pytest.mark.parametrize(
    ("prompt", "pasted"),
    [
        ("a (red:1.5) circle :1.2 AND a green square on the left :0.6", "w1 :1.2 AND w2 :0.6"),
        ("a red circle AND a blue background", "w1 AND w2"),
        ("a circle :0.25 AND a circle", "w1 :0.25 AND w1"),
        ("a [red:(blue:1.3):0.5] circle", "[w1:w2:0.5]"),
        ("a [red:blue:7] circle", "[w1:w2:7]"),
        ("a [red|blue] circle", "[w1|w2]"),
        ("a [red|blue|green] circle", "[w1|w2|w3]"),
        ("a [red:[blue:green:15]:5] circle", "[w1:[w2:w3:15]:5]"),
        ("a [large:0.3] red [circle::0.6] on white", "[w1:[w2:w3:0.6]:0.3]"),
        ("[red:blue:0.25] AND a [square|ring] :0.5", "[w1:w2:0.25] AND [w3|w4] :0.5"),
        ("a plain circle", "w1"),
    ],
)
def test_a_prompt_is_put_together_from_words(session, prompt, pasted) -> None:
    texts = texts_of(session.read(prompt, 20))
    assert all(text == text.strip() for text in texts)
    words = {text: f"w{number}" for number, text in enumerate(texts, 1)}
    assert put_together(session.read, prompt, 20, words) == pasted


def test_few_steps_are_enough_to_see_that_texts_take_turns(session) -> None:
    assert (
        put_together(session.read, "a [red|blue] circle", 4, {"a red circle": "w1", "a blue circle": "w2"}) == "[w1|w2]"
    )


@pytest.mark.parametrize("steps", [11, 20, 30])
def test_read_again_each_word_stands_where_its_text_stood(session, steps) -> None:
    for prompt in ("a [red:blue:0.35] circle", "[a:b:3] [c|d] e", "[a|b|c] and [d:e:0.7]"):
        texts = texts_of(session.read(prompt, steps))
        words = {text: f"w{number}" for number, text in enumerate(texts, 1)}
        (part,) = session.read(prompt, steps)
        (again,) = session.read(put_together(session.read, prompt, steps, words), steps)
        wanted = [words[part.text_at(step).strip()] for step in range(1, steps + 1)]
        assert [again.text_at(step) for step in range(1, steps + 1)] == wanted


def test_what_reads_otherwise_is_refused() -> None:
    from lib_estimate.hosts.base import PromptPart

    def read(prompt, steps):
        return [PromptPart(1.0, ((1, prompt), (steps, "other")))]

    with pytest.raises(RequestError, match="can't be put together"):
        put_together(read, "a", 20, {"a": "w1", "other": "w2"})
