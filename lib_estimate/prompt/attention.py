r"""Emphasis: `(word:1.3)`, `[word]`, BREAK, and the weights put onto what the text encoder made of a prompt."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from lib_estimate.errors import PromptSyntaxError

BREAK = "BREAK"
"""The word that ends a chunk. `parse_attention` gives it as the pair `("BREAK", -1.0)`."""

EMPHASIS_MODES = ("None", "Ignore", "Original", "No norm")
"""The values of the host's option "emphasis"; see `apply_emphasis`, and `chunks` for "None"."""

ROUND_FACTOR = 1.1
SQUARE_FACTOR = 1 / 1.1
BREAK_WEIGHT = -1.0

Array = TypeVar("Array", bound=Any)
"""A torch tensor, or anything else with its arithmetic."""


class _Symbol(NamedTuple):
    """One piece of a prompt as emphasis sees it: a bracket, a run of text, an escape, or `: number )`."""

    text: str
    position: int
    escaped: bool = False
    weight: str | None = None


@dataclass
class _Weighted:
    """Text with a weight that still changes while brackets around it are closed."""

    text: str
    weight: float


def parse_attention(prompt: str) -> list[tuple[str, float]]:
    r"""Splits a prompt into (text, weight).

    `(x)` multiplies the weight by 1.1, `[x]` divides it by 1.1, `(x:1.3)` multiplies it by 1.3; a backslash makes the
    next bracket or backslash a letter; brackets left open reach to the end, closing ones without partner are text.
    The word BREAK comes as `("BREAK", -1.0)`, where emphasis around it multiplies the -1 as well, as in the host:
    then it is text, not a break. Neighbours of the same weight are merged. There is always at least one pair.

    Raises PromptSyntaxError for `(x:1.5.2)`, which the host does not take either.
    """
    pieces: list[_Weighted] = []
    open_round: list[int] = []
    open_square: list[int] = []
    for symbol in _attention_symbols(prompt):
        if symbol.escaped:
            pieces.append(_Weighted(symbol.text, 1.0))
        elif symbol.text == "(":
            open_round.append(len(pieces))
        elif symbol.text == "[":
            open_square.append(len(pieces))
        elif symbol.weight is not None and open_round:
            _multiply(pieces, open_round.pop(), _written_weight(symbol))
        elif symbol.text == ")" and open_round:
            _multiply(pieces, open_round.pop(), ROUND_FACTOR)
        elif symbol.text == "]" and open_square:
            _multiply(pieces, open_square.pop(), SQUARE_FACTOR)
        else:
            pieces.extend(_split_breaks(symbol.text))
    for start in open_round:
        _multiply(pieces, start, ROUND_FACTOR)
    for start in open_square:
        _multiply(pieces, start, SQUARE_FACTOR)
    return _merged(pieces) or [("", 1.0)]


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
        end = prompt.find(")", position)
        weight = prompt[position + 1 : max(end, 0)].strip()
        if _looks_like_weight(weight):
            return _Symbol(prompt[position : end + 1], position, weight=weight), end + 1
        return _Symbol(character, position), position + 1
    end = position
    while end < len(prompt) and prompt[end] not in "\\()[]:":
        end += 1
    return _Symbol(prompt[position:end], position), end


def _looks_like_weight(text: str) -> bool:
    """Whether the host takes this for a weight: a sign, then digits and points in any order, such as 1.5.2."""
    digits = text[1:] if text.startswith(("+", "-")) else text
    return bool(digits) and all(character == "." or character.isdecimal() for character in digits)


def _written_weight(symbol: _Symbol) -> float:
    """The number in `: number )`."""
    try:
        return float(symbol.weight or "")
    except ValueError:
        raise PromptSyntaxError(
            f'The weight "{symbol.weight}" at character {symbol.position + 1} of the prompt is not a number. '
            f"Write one with at most one point, such as (word:1.3), or put a backslash before both brackets if they "
            f"are meant as text."
        ) from None


def _split_breaks(text: str) -> Iterator[_Weighted]:
    """Text with every word BREAK in it as a piece of its own; the space around the word goes."""
    words = re.split(r"(?<!\w)BREAK(?!\w)", text)
    for number, word in enumerate(words):
        if number > 0:
            yield _Weighted(BREAK, BREAK_WEIGHT)
            word = word.lstrip()
        yield _Weighted(word.rstrip() if number + 1 < len(words) else word, 1.0)


def _multiply(pieces: list[_Weighted], start: int, factor: float) -> None:
    """Multiplies the weights of all pieces from `start` on."""
    for piece in pieces[start:]:
        piece.weight *= factor


def _merged(pieces: list[_Weighted]) -> list[tuple[str, float]]:
    """Joins neighbours of the same weight."""
    merged: list[tuple[str, float]] = []
    for piece in pieces:
        if merged and merged[-1][1] == piece.weight:
            merged[-1] = (merged[-1][0] + piece.text, merged[-1][1])
        else:
            merged.append((piece.text, piece.weight))
    return merged


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
