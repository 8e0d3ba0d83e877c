r"""Emphasis: `(word:1.3)`, `[word]`, BREAK, and the weights put onto what the text encoder made of a prompt."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np

from lib_estimate.errors import PromptSyntaxError

BREAK = "BREAK"
"""The word that ends a chunk. `parse_attention` gives it as the pair `("BREAK", -1.0)`."""

EMPHASIS_MODES = ("None", "Ignore", "Original", "No norm")
"""The values of the host's option "emphasis"; see `apply_emphasis`, and `chunks` for "None"."""

ROUND_FACTOR = 1.1
SQUARE_FACTOR = 1 / 1.1
BREAK_WEIGHT = -1.0

_TEXT = re.compile(r"[^\\()\[\]:]+")
_WEIGHT = re.compile(r":\s*([+-]?[.\d]+)\s*\)")
"""What the host takes for a weight: a sign, then digits and points in any order, such as 1.5.2."""

Array = TypeVar("Array", bound=Any)
"""A torch tensor, or anything else with its arithmetic."""


class _Symbol(NamedTuple):
    """One piece of a prompt as emphasis sees it: a bracket, a run of text, an escape, or `: number )`."""

    text: str
    position: int
    escaped: bool = False
    weight: str | None = None


def parse_attention(prompt: str) -> list[tuple[str, float]]:
    r"""Splits a prompt into (text, weight).

    `(x)` multiplies the weight by 1.1, `[x]` divides it by 1.1, `(x:1.3)` multiplies it by 1.3; a backslash makes the
    next bracket or backslash a letter; brackets left open reach to the end, closing ones without partner are text.
    The word BREAK comes as `("BREAK", -1.0)`, where emphasis around it multiplies the -1 as well, as in the host:
    then it is text, not a break. Neighbours of the same weight are merged. There is always at least one pair.

    Raises PromptSyntaxError for `(x:1.5.2)`, which the host does not take either, and for a weight beyond all numbers.
    """
    texts: list[str] = []
    starts: list[float] = []  # the weight of each text before that of the brackets
    spans: list[tuple[int, int, float]] = []  # from one text up to another, and the weight of the brackets around
    open_round: list[int] = []
    open_square: list[int] = []

    def add(text: str, weight: float = 1.0) -> None:
        texts.append(text)
        starts.append(weight)

    for symbol in _attention_symbols(prompt):
        if symbol.escaped:
            add(symbol.text)
        elif symbol.text == "(":
            open_round.append(len(texts))
        elif symbol.text == "[":
            open_square.append(len(texts))
        elif symbol.weight is not None and open_round:
            spans.append((open_round.pop(), len(texts), _written_weight(symbol)))
        elif symbol.text == ")" and open_round:
            spans.append((open_round.pop(), len(texts), ROUND_FACTOR))
        elif symbol.text == "]" and open_square:
            spans.append((open_square.pop(), len(texts), SQUARE_FACTOR))
        else:
            for piece in _split_breaks(symbol.text):
                add(*piece)
    spans += [(start, len(texts), ROUND_FACTOR) for start in open_round]
    spans += [(start, len(texts), SQUARE_FACTOR) for start in open_square]
    return _merged(texts, _multiplied(starts, spans)) or [("", 1.0)]


def _attention_symbols(prompt: str) -> Iterator[_Symbol]:
    """Cuts a prompt into symbols, without a character lost except the backslashes."""
    position = 0
    while position < len(prompt):
        symbol, end = _symbol_at(prompt, position)
        yield symbol
        position = end


def _symbol_at(prompt: str, position: int) -> tuple[_Symbol, int]:
    """The symbol that starts at a position, and the position after it."""
    character = prompt[position]
    if character == "\\":
        letter = prompt[position + 1 : position + 2]
        # Before anything else a backslash vanishes, and what follows is read as if it had not been there.
        letter = letter if letter in ("(", ")", "[", "]", "\\") else ""
        return _Symbol(letter, position, escaped=True), position + 1 + len(letter)
    if character in "()[]":
        return _Symbol(character, position), position + 1
    if character == ":":
        weight = _WEIGHT.match(prompt, position)
        if weight is not None:
            return _Symbol(weight[0], position, weight=weight[1]), weight.end()
        return _Symbol(character, position), position + 1
    text = _TEXT.match(prompt, position)[0]
    return _Symbol(text, position), position + len(text)


def _written_weight(symbol: _Symbol) -> float:
    """The number in `: number )`."""
    try:
        weight = float(symbol.weight or "")
    except ValueError:
        weight = math.nan
    if math.isfinite(weight):
        return weight
    raise PromptSyntaxError(
        f'The weight "{shortened(symbol.weight or "")}" at character {symbol.position + 1} of the prompt is not a '
        f"number, or is beyond all numbers. Write one with at most one point, such as (word:1.3), or put a backslash "
        f"before both brackets if they are meant as text."
    )


def _split_breaks(text: str) -> Iterator[tuple[str, float]]:
    """Text with every word BREAK in it as a piece of its own; the space around the word goes."""
    words = re.split(r"(?<!\w)BREAK(?!\w)", text)
    for number, word in enumerate(words):
        if number > 0:
            yield BREAK, BREAK_WEIGHT
            word = word.lstrip()
        yield word.rstrip() if number + 1 < len(words) else word, 1.0


def _multiplied(starts: list[float], spans: list[tuple[int, int, float]]) -> list[float]:
    """The weights with those of all brackets around, in the order in which the host multiplies: it decides about
    rounding. In numpy, as brackets that nest 10,000 times are multiplied 10,000 times each."""
    weights = np.array(starts, np.float64)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for start, end, factor in spans:
            weights[start:end] *= factor
    if not np.isfinite(weights).all():
        raise PromptSyntaxError(
            "The brackets of the prompt multiply to a weight that is beyond all numbers. Leave some of them out, or "
            "put a backslash before those that are meant as text."
        )
    return weights.tolist()


def _merged(texts: list[str], weights: list[float]) -> list[tuple[str, float]]:
    """Joins neighbours of the same weight."""
    pairs = zip(texts, weights, strict=True)
    return [("".join(text for text, _ in same), weight) for weight, same in groupby(pairs, key=itemgetter(1))]


def shortened(text: str, length: int = 60) -> str:
    """Text as a sentence can quote it."""
    return text if len(text) <= length else f"{text[:length]}..."


def apply_emphasis(z: Array, weights: Array, mode: str) -> Array:
    """Applies the weights of a chunk to what the text encoder made of it, z [B, T, C], weights [B, T] -> [B, T, C].

    "None" and "Ignore": z. "No norm": z * w. "Original": z * w * mean(z) / mean(z * w), both means over all of
    B, T and C. So with "Original" the texts that are encoded together change each other's result, as they do in the
    host, where B is the number of texts in one prompt's schedule. Nor does the host look at what it divides by, however
    near to 0: that is kept. The pooled output of an encoder is not to be given here, the host leaves it as it is.
    """
    if mode not in EMPHASIS_MODES:
        raise ValueError(f'There is no emphasis mode "{mode}"; the modes are {", ".join(EMPHASIS_MODES)}.')
    if mode in ("None", "Ignore"):
        return z
    weighted = z * weights[..., None]
    if mode == "No norm":
        return weighted
    return weighted * (z.mean() / weighted.mean())
