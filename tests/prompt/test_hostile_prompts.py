"""Prompts that nobody means: as long, as deep and as odd as they come. A step that is quadratic is felt here."""

from __future__ import annotations

from contextlib import suppress

import pytest

from lib_estimate.errors import PromptSyntaxError
from lib_estimate.prompt.attention import parse_attention
from lib_estimate.prompt.chunks import chunks
from lib_estimate.prompt.cleaning import as_clip
from lib_estimate.prompt.schedule import extra_network_tags, prompt_schedule, split_and
from lib_estimate.prompt.vocabulary import BUNDLED, bundled
from tests.hostile import PROPERTIES, hold

LONG = 50_000  # characters


@pytest.mark.parametrize("name", ["prompts", "names"])
def test_the_properties_hold(name) -> None:
    assert hold(PROPERTIES[name], 60) >= 50


@pytest.mark.parametrize(
    "prompt",
    [
        "(a" * (LONG // 2),
        "[" * 10_000 + "a:b:c" + "]" * 10_000,
        "[" * 30_000 + "[a|b]" + "]" * 30_000,
        "[a|" * 10_000 + "b" + "]" * 10_000,
        "[" + "(" * 30_000 + ")" * 30_000 + "|b]",
        "[|]" * (LONG // 3),
        ":" * LONG + ")",
        "<" * LONG + ">",
        "<a:" * (LONG // 3),
        "[a:" + "1" * LONG + "x]",
        "a :" + "1" * LONG + "x AND b",
        "word " * (LONG // 5),
    ],
    ids=lambda prompt: prompt[:12],
)
def test_length_and_depth_are_read_through(prompt) -> None:
    schedule = prompt_schedule(prompt, 150)
    assert schedule[-1][0] == 150
    text, tags = extra_network_tags(prompt)
    assert len(text) + sum(map(len, tags)) == len(prompt)
    assert split_and(prompt)
    with suppress(PromptSyntaxError):  # of a weight beyond all numbers
        assert parse_attention(prompt)


def test_deep_brackets_keep_their_meaning() -> None:
    deep = 10_000
    assert prompt_schedule("[" * deep + "[a|b]" + "]" * deep, 2) == [
        (n, "[" * deep + t + "]" * deep) for n, t in [(1, "a"), (2, "b")]
    ]
    assert prompt_schedule("[a|" * deep + "b" + "]" * deep, 3) == [(1, "a"), (2, "b"), (3, "a")]
    (text, weight), rest = parse_attention("[" * deep + "a" + "]" * deep + "b")
    assert (text, weight < 1e-300, rest) == ("a", True, ("b", 1.0))
    many = prompt_schedule("[" + "|".join(map(str, range(deep))) + "]", 150)
    assert [text for _, text in many] == list(map(str, range(150)))


@pytest.mark.parametrize(
    "prompt", ["(" * 8000 + "a", "(a:" + "9" * 400 + ")", "((a:" + "9" * 200 + "):" + "9" * 200 + ")"]
)
def test_a_weight_beyond_all_numbers_is_refused(prompt) -> None:
    with pytest.raises(PromptSyntaxError, match="beyond all numbers"):
        parse_attention(prompt)


def test_so_is_that_of_a_part() -> None:
    with pytest.raises(PromptSyntaxError, match="beyond all numbers"):
        split_and(f"a :{'9' * 400} AND b")


def test_half_a_character_is_refused() -> None:
    with pytest.raises(PromptSyntaxError, match="half of a character"):
        chunks("a \ud83d", bundled()[0])


@pytest.mark.parametrize(
    "text", ["a red Circle, 12 I'm <|endoftext|>x", "naïve\n 赤い円 ((x:1.2)) </w>", "\u00a0 ﬁ Ⅳ 👍🏽", ""]
)
def test_the_vocabulary_reads_as_transformers_does(text) -> None:
    from transformers import CLIPTokenizerFast

    theirs, (ours, spelled) = CLIPTokenizerFast.from_pretrained(BUNDLED), bundled()
    assert ours.encode(text) == theirs(as_clip(text), add_special_tokens=False)["input_ids"]
    assert (ours.start, ours.end, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert (ours.comma, ours.chunk_length) == (theirs.get_vocab()[",</w>"], theirs.model_max_length - 2)
    assert [spelled(token) for token in ours.encode(text)] == [theirs.decode([t]).strip() for t in ours.encode(text)]
