"""What changes on the way and what is composed: `[from:to:when]`, `[a|b]`, AND, and the tags of extra networks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from lib_estimate.errors import PromptSyntaxError
from lib_estimate.prompt.attention import shortened

_TAG = re.compile(r"<\w+:[^>]+>")


def extra_network_tags(prompt: str) -> tuple[str, list[str]]:
    """Takes the `<type:arguments>` tags out of a prompt.

    Returns the prompt without them, and the tags, brackets included, in the order they stood. The host does this
    to the prompt only: in a negative prompt a tag stays and is read as text.
    """
    behind = prompt.rfind(">") + 1  # where no tag can begin, none is looked for: each look would go to the end
    text = _TAG.sub("", prompt[:behind]) + prompt[behind:]
    return text, [tag[0] for tag in _TAG.finditer(prompt, 0, behind)]


def split_and(prompt: str) -> list[tuple[str, float]]:
    """Splits a prompt at the word `AND` into (text, weight).

    A part may end in `:number`; without it the weight is 1. Space at the start of a part is kept, space at its end
    and around the colon is not, as in the host. `AND` counts everywhere, inside brackets as well.

    Raises PromptSyntaxError for a weight beyond all numbers.
    """
    return [_text_and_weight(part) for part in re.split(r"(?<!\w)AND(?!\w)", prompt)]


def _text_and_weight(part: str) -> tuple[str, float]:
    """`"cat :1.2 "` -> `("cat", 1.2)`."""
    text, colon, number = part.rpartition(":")
    number = number.strip()
    # "1.", ".5" and "+2" are numbers here, "1e3" and a lone "." are not.
    if not colon or not re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)", number):
        return part.rstrip(), 1.0
    if not math.isfinite(weight := float(number)):
        raise PromptSyntaxError(
            f'The weight "{shortened(number)}" of a part of the prompt, before an AND or at its end, is beyond all '
            f"numbers. Write a smaller one, such as :0.6."
        )
    return text.rstrip(), weight


_WHEN = re.compile(r":\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*\]")
"""What ends a span that changes at a step: `:0.5]`."""

_SYMBOLS = re.compile(r"\\.|[()\[\]:|]|[^()\[\]:|\\]+")
"""An escape, a bracket or separator, or a run of text."""


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
                f"The prompt says to change a part of it at step {shortened(self.when)}, which is too large for a "
                f"number. Write a whole step, such as 10, or a fraction of all steps, such as 0.5."
            )
        return min(steps, int(value))

    def at(self, step: int, steps: int) -> _Part:
        """The part that is shown at `step`, counted from 1."""
        return self.before if step <= self.switch_step(steps) else self.after

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

    def branches(self) -> tuple[_Part, ...]:
        """Every part that is shown at some time."""
        return self.choices


_Part = tuple["str | _Change | _Alternation", ...]


@dataclass
class _Bracket:
    """A bracket that is still open: the parts between its separators so far, and whether it can be a span.

    What stands in a bracket that is text is a tuple among the nodes: `_flat` puts it in line, once for all that nest.
    """

    opening: str
    parts: list[list[Any]] = field(default_factory=lambda: [[]])
    separators: list[str] = field(default_factory=list)
    spoiled: bool = False

    def add(self, node: Any) -> None:
        self.parts[-1].append(node)

    def separate(self, separator: str) -> None:
        self.separators.append(separator)
        self.parts.append([])

    def closed(self, closing: str) -> tuple[Any, bool]:
        """What it is with its closing bracket ("" where there is none), and whether it is well formed."""
        kinds = set(self.separators)
        if not self.spoiled and closing == "]" and kinds == {"|"}:
            return _Alternation(tuple(map(_flat, self.parts))), True
        fits = not kinds or (closing == ")" and self.separators == [":"])
        between = (piece for pair in zip(self.separators, self.parts[1:], strict=True) for piece in (pair[0], *pair[1]))
        return (self.opening, *self.parts[0], *between, closing), bool(closing) and fits and not self.spoiled

    def changes(self, when: str) -> _Change | None:
        """What it is with `:when]` at its end, where that is a span."""
        if self.spoiled or "|" in self.separators or len(self.parts) > 2:
            return None
        before, after = ((), *map(_flat, self.parts))[-2:]
        return _Change(before, after, when)


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
    periods, switches = _changes_of(part, steps)
    ends = set(range(1, steps + 1)) if periods else {switch for switch in switches if switch >= 1}
    texts: dict[tuple, str] = {}
    schedule = []
    for step in sorted(ends | {steps}):
        # The same choices of all that changes are the same text, and are put together once.
        state = ((step - 1) % math.lcm(*periods), *(step <= switch for switch in switches))
        if state not in texts:
            texts[state] = _text_at(part, step, steps)
        schedule.append((step, texts[state]))
    return schedule


def _parse_spans(prompt: str) -> _Part | None:
    """The prompt as text and spans, or None where the host cannot parse it.

    In one pass, whatever the nesting. A span is well formed if all brackets inside of it are; round ones and stray
    ones change nothing outside of a square span.
    """
    open_brackets = [_Bracket("")]
    position = 0
    while position < len(prompt):
        symbol, inner = _SYMBOLS.match(prompt, position), open_brackets[-1]
        if symbol is None:  # a backslash before nothing, or before the end of a line
            return None
        text, position = symbol[0], symbol.end()
        when = _WHEN.match(prompt, symbol.start()) if text == ":" and inner.opening == "[" else None
        if text in ("(", "["):
            open_brackets.append(_Bracket(text))
        elif when is not None and (change := inner.changes(when[1])) is not None:
            position = when.end()
            open_brackets.pop()
            open_brackets[-1].add(change)
        elif text == "|" and (inner.opening != "[" or inner.spoiled):
            return None
        elif text == "|" or (text == ":" and inner.opening):
            inner.separate(text)
        elif text in (")", "]"):
            matches = inner.opening + text in ("()", "[]")
            # A stray bracket stands inside everything that is still open, which spoils all of it.
            if not (_close(open_brackets, text) if matches else _close_all(open_brackets)):
                return None
            if not matches:
                open_brackets[-1].add(text)
        else:
            inner.add(text)
    return _flat(open_brackets[0].parts[0]) if _close_all(open_brackets) else None


def _close(open_brackets: list[_Bracket], closing: str) -> bool:
    """Ends the innermost bracket. False where it turns out to be no span, but has a `|`."""
    bracket = open_brackets.pop()
    node, well_formed = bracket.closed(closing)
    open_brackets[-1].add(node)
    open_brackets[-1].spoiled |= not well_formed
    return well_formed or "|" not in bracket.separators


def _close_all(open_brackets: list[_Bracket]) -> bool:
    """The same for all brackets that have no partner."""
    return all(_close(open_brackets, "") for _ in open_brackets[1:])


def _flat(nodes: Iterable[Any]) -> _Part:
    """Nodes in line, neighbouring texts as one. A list of things to do, no recursion: brackets may nest deeply."""
    line: list[Any] = []
    to_do = [*nodes][::-1]
    while to_do:
        node = to_do.pop()
        if isinstance(node, tuple):
            to_do.extend(reversed(node))
        else:
            line.append(node)
    flat: list[Any] = []
    for is_text, same in groupby(line, key=lambda node: isinstance(node, str)):
        group = list(same)
        flat += ["".join(group)] if is_text else group
    return tuple(flat)


def _text_at(part: _Part, step: int, steps: int) -> str:
    """What the part reads at one step."""
    texts: list[str] = []
    to_do = [*part][::-1]
    while to_do:
        node = to_do.pop()
        if isinstance(node, str):
            texts.append(node)
        else:
            to_do.extend(reversed(node.at(step, steps)))
    return "".join(texts)


def _changes_of(part: _Part, steps: int) -> tuple[set[int], set[int]]:
    """How many choices the alternations have, and after which steps the rest changes. An alternation counts as a change
    at every step, and branches that are never shown count as well, as in the host."""
    periods: set[int] = set()
    switches: set[int] = set()
    to_do: list[Any] = [*part]
    while to_do:
        node = to_do.pop()
        if isinstance(node, str):
            continue
        if isinstance(node, _Alternation):
            periods.add(len(node.choices))
        else:
            switches.add(node.switch_step(steps))
        for branch in node.branches():
            to_do.extend(branch)
    return periods, switches
