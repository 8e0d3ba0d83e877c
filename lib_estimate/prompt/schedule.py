"""What changes on the way and what is composed: `[from:to:when]`, `[a|b]`, AND, and the tags of extra networks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import lark

from lib_estimate.errors import PromptSyntaxError


def extra_network_tags(prompt: str) -> tuple[str, list[str]]:
    """Takes the `<type:arguments>` tags out of a prompt.

    Returns the prompt without them, and the tags, brackets included, in the order they stood. The host does this
    to the prompt only: in a negative prompt a tag stays and is read as text.
    """
    kept: list[str] = []
    tags: list[str] = []
    position = 0
    while position < len(prompt):
        end = prompt.find(">", position) if prompt[position] == "<" else -1
        kind, _, arguments = prompt[position + 1 : max(end, 0)].partition(":")
        if arguments and re.fullmatch(r"\w+", kind):
            tags.append(prompt[position : end + 1])
            position = end + 1
        else:
            kept.append(prompt[position])
            position += 1
    return "".join(kept), tags


def split_and(prompt: str) -> list[tuple[str, float]]:
    """Splits a prompt at the word `AND` into (text, weight).

    A part may end in `:number`; without it the weight is 1. Space at the start of a part is kept, space at its end
    and around the colon is not, as in the host. `AND` counts everywhere, inside brackets as well.
    """
    return [_text_and_weight(part) for part in re.split(r"(?<!\w)AND(?!\w)", prompt)]


def _text_and_weight(part: str) -> tuple[str, float]:
    """`"cat :1.2 "` -> `("cat", 1.2)`."""
    text, colon, number = part.rpartition(":")
    number = number.strip()
    # "1.", ".5" and "+2" are numbers here, "1e3" and a lone "." are not.
    if colon and re.fullmatch(r"[+-]?(?=\.?\d)\d*\.?\d*", number):
        return text.rstrip(), float(number)
    return part.rstrip(), 1.0


_SPAN_GRAMMAR = r"""
span: "(" part ")"                   -> round
    | "(" part ":" part ")"          -> round_pair
    | "[" part "]"                   -> square
    | "[" part WHEN                  -> appears
    | "[" part ":" part WHEN         -> changes
    | "[" part ("|" part)+ "]"       -> alternates
part: (WORDS | ESCAPED | span)*

WHEN.1: /:\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*\]/
WORDS: /[^()\[\]:|\\]+/
ESCAPED: /\\[^\n]/
"""
"""One bracketed span, from its opening bracket to the closing one. `WHEN` takes the colon and the closing bracket
along, so that one token ahead is enough to know `[a:5]` from `[a:5:0.3]`: the grammar is LALR(1), without a choice
to make. (The host's own grammar is ambiguous, see `prompt_schedule`.)"""


@dataclass(frozen=True)
class _Change:
    """`[before:after:when]`; `when` is still text, because "1.0" (a fraction) and "1" (a step) differ."""

    before: _Part
    after: _Part
    when: str

    def switch_step(self, steps: int) -> int:
        """The last step that shows `before`; below 1, `before` is never shown."""
        value = float(self.when)
        if "." in self.when:
            value *= steps
        if value in (float("inf"), float("-inf")):
            raise PromptSyntaxError(
                f"The prompt says to change a part of it at step {self.when}, which is too large for a "
                f"number. Write a whole step, such as 10, or a fraction of all steps, such as 0.5."
            )
        return min(steps, int(value))

    def at(self, step: int, steps: int) -> _Part:
        """The part that is shown at `step`, counted from 1."""
        return self.before if step <= self.switch_step(steps) else self.after

    def boundaries(self, steps: int) -> Iterator[int]:
        """The steps after which the text can change because of this node."""
        if self.switch_step(steps) >= 1:
            yield self.switch_step(steps)

    def branches(self) -> tuple[_Part, ...]:
        """Every part that is shown at some time."""
        return self.before, self.after


@dataclass(frozen=True)
class _Alternation:
    """`[a|b|c]`: one choice per step, over and over."""

    choices: tuple[_Part, ...]

    def at(self, step: int, steps: int) -> _Part:
        """The choice that is shown at `step`, counted from 1."""
        return self.choices[(step - 1) % len(self.choices)]

    def boundaries(self, steps: int) -> Iterator[int]:
        """Every step, even where two neighbouring choices are the same text."""
        yield from range(1, steps + 1)

    def branches(self) -> tuple[_Part, ...]:
        """Every part that is shown at some time."""
        return self.choices


_Part = tuple["str | _Change | _Alternation", ...]


@lark.v_args(inline=True)
class _SpanBuilder(lark.Transformer):
    """Turns what the grammar found into parts, while it is being parsed. Emphasis stays text, `chunks` reads it."""

    def part(self, *items: Any) -> _Part:
        # A span comes as a part of its own (a tuple), words come as tokens (a str).
        return tuple(node for item in items for node in (item if isinstance(item, tuple) else (str(item),)))

    def round(self, inside: _Part) -> _Part:
        return ("(", *inside, ")")

    def round_pair(self, inside: _Part, weight: _Part) -> _Part:
        return ("(", *inside, ":", *weight, ")")

    def square(self, inside: _Part) -> _Part:
        return ("[", *inside, "]")

    def appears(self, after: _Part, when: str) -> _Part:
        return (_Change((), after, when[1:-1].strip()),)

    def changes(self, before: _Part, after: _Part, when: str) -> _Part:
        return (_Change(before, after, when[1:-1].strip()),)

    def alternates(self, *choices: _Part) -> _Part:
        return (_Alternation(choices),)


@cache
def _span_parser() -> lark.Lark:
    """Built at the first prompt with a square bracket, and once."""
    return lark.Lark(_SPAN_GRAMMAR, start="span", parser="lalr", transformer=_SpanBuilder())


def prompt_schedule(prompt: str, steps: int) -> list[tuple[int, str]]:
    """The texts a prompt stands for over `steps` sampling steps: (last step, text), steps counted from 1.

    `[from:to:when]` and `[to:when]` change at `when`: a number with a point is a fraction of all steps, one without
    is a step. `[a|b]` takes turns. Both nest. Emphasis and escapes stay in the text. Text with an odd bracket is kept
    as it is; a prompt with a `|` outside of `[a|b]`, or with a backslash before nothing, is taken whole, as text.

    The host parses with an ambiguous grammar, and where a prompt has a colon or an odd bracket outside of all spans,
    as in `[a:b:5]: c`, its reading depends on the hash seed of the Python process: the same prompt is edited in one
    run and left as text in the next. Here a span that is well formed always counts, the outermost one first, which is
    one of the readings of the host and the one its documentation shows.
    """
    part = _parse_spans(prompt)
    if part is None:
        return [(steps, prompt)]
    return [(step, _text_at(part, step, steps)) for step in _boundaries(part, steps)]


def _parse_spans(prompt: str) -> _Part | None:
    """The prompt as text and spans, or None where the host cannot parse it.

    Only square brackets are tried: round ones and stray ones change nothing outside of a square span.
    """
    partners = _bracket_partners(prompt)
    nodes: list[Any] = []
    position = 0
    while position < len(prompt):
        text = prompt[position]
        if text == "\\":
            text = prompt[position : position + 2]
            if text in ("\\", "\\\n"):
                return None
        elif text == "|":
            return None
        elif text == "[" and position in partners:
            end = partners[position] + 1
            span = _parse_span(prompt[position:end])
            if span is not None:
                nodes.extend(span)
                position = end
                continue
        nodes.append(text)
        position += len(text)
    return tuple(nodes)


def _parse_span(text: str) -> _Part | None:
    """One span from bracket to bracket, or None when it is not well formed."""
    try:
        return _span_parser().parse(text)
    except lark.exceptions.LarkError:
        return None


def _bracket_partners(prompt: str) -> dict[int, int]:
    """Position of each opening bracket -> that of the closing one, for brackets that nest properly."""
    partners: dict[int, int] = {}
    open_at: list[int] = []
    for position, character in _unescaped(prompt):
        if character in "([":
            open_at.append(position)
        elif character in ")]":
            if open_at and prompt[open_at[-1]] + character in ("()", "[]"):
                partners[open_at.pop()] = position
            else:
                # A stray bracket stands inside everything that is still open, which spoils all of it.
                open_at.clear()
    return partners


def _unescaped(prompt: str) -> Iterator[tuple[int, str]]:
    """The characters that do not belong to an escape, with their positions."""
    position = 0
    while position < len(prompt):
        if prompt[position] == "\\":
            position += 2
            continue
        yield position, prompt[position]
        position += 1


def _text_at(part: _Part, step: int, steps: int) -> str:
    """What the part reads at one step. A list of things to do instead of recursion: brackets may nest deeply."""
    texts: list[str] = []
    to_do = list(reversed(part))
    while to_do:
        node = to_do.pop()
        if isinstance(node, str):
            texts.append(node)
        else:
            to_do.extend(reversed(node.at(step, steps)))
    return "".join(texts)


def _boundaries(part: _Part, steps: int) -> list[int]:
    """The steps at which a text ends. Branches that are never shown count as well, as in the host."""
    found = {steps}
    to_do = list(part)
    while to_do:
        node = to_do.pop()
        if not isinstance(node, str):
            found.update(node.boundaries(steps))
            to_do.extend(child for branch in node.branches() for child in branch)
    return sorted(found)
