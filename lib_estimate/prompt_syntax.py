r"""The prompt language of AUTOMATIC1111, for hosts that have none of their own.

Re-implemented from the behaviour of AUTOMATIC1111 1.10.1 (commit 82a973c0), first pass, with the setting
"use old scheduling" off. Inside a webui this module is not used: there the webui's own parser speaks.

A prompt goes through these functions in this order, each of which can be used alone:

    extra_network_tags   "<lora:name:1> a cat"      tags out, text left
    split_and            "a cat :1.2 AND a dog"     several prompts, each with a weight
    prompt_schedule      "[cat:dog:0.5], [a|b]"     the text that holds up to each sampling step
    chunks               "a (cat:1.3) BREAK x"      token ids and weights in pieces the text encoder can take
      parse_attention                               (called by chunks) text with its weight
      EmbeddingNames                                (given to chunks) finds the embeddings among the tokens
    apply_emphasis                                  the weights, put onto what the text encoder made of a chunk

Nothing here touches a model, and nothing imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import lark

from lib_estimate.errors import PromptSyntaxError

BREAK = "BREAK"
"""The word that ends a chunk. `parse_attention` gives it as the pair `("BREAK", -1.0)`."""

EMPHASIS_MODES = ("None", "Ignore", "Original", "No norm")
"""The values of the host's option "emphasis"; see `apply_emphasis`, and `chunks` for "None"."""

ROUND_FACTOR = 1.1
SQUARE_FACTOR = 1 / 1.1
BREAK_WEIGHT = -1.0

FindEmbedding = Callable[[Sequence[int], int], "tuple[str, int, int] | None"]
"""`find(tokens, position)`: name, number of tokens (>= 1) matched from `position` on, number of vectors; or None."""

Array = TypeVar("Array", bound=Any)
"""A torch tensor, or anything else with its arithmetic."""


# ---------------------------------------------------------------------------------------------------------------------
# Extra networks: <lora:name:1>


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


# ---------------------------------------------------------------------------------------------------------------------
# Several prompts at once: cat :1.2 AND dog


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


# ---------------------------------------------------------------------------------------------------------------------
# Prompts that change on the way: [from:to:when] and [a|b]

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


# ---------------------------------------------------------------------------------------------------------------------
# Emphasis: (word:1.3), [word]


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


# ---------------------------------------------------------------------------------------------------------------------
# Chunks of tokens


@dataclass(frozen=True)
class Vocabulary:
    """What `chunks` needs to know of a text encoder's tokenizer."""

    encode: Callable[[str], list[int]]
    """Text -> token ids, without start and end, not cut off."""
    start: int
    """Id of the token every chunk starts with."""
    end: int
    """Id of the token that ends the text of a chunk."""
    pad: int
    """Id that fills a chunk after its end token: the same as `end` for CLIP-L, 0 for OpenCLIP."""
    comma: int | None
    """Id of a comma at the end of a word, for `comma_padding_backtrack`; None if there is none."""
    chunk_length: int
    """Number of tokens in a chunk, without start and end: 75 for every CLIP."""


@dataclass(frozen=True)
class Placed:
    """An embedding that stands in a chunk."""

    offset: int
    """Index into `Chunk.tokens` (and `Chunk.weights`, and the encoder's input) of its first vector. The start token
    has index 0, so this is at least 1. (The host counts from the first token after the start token: one less.)"""
    name: str
    """The name it was found under."""
    vectors: int
    """How many places it takes, from `offset` on."""


@dataclass(frozen=True)
class Chunk:
    """One piece of a prompt, of exactly the length the text encoder takes."""

    tokens: tuple[int, ...]
    """`chunk_length + 2` ids: start, text, then end and padding. Places an embedding takes hold 0."""
    weights: tuple[float, ...]
    """The emphasis of each token; 1 for start, end and padding."""
    placed: tuple[Placed, ...]
    """The embeddings, in the order they were found."""


def chunks(
    prompt: str,
    vocabulary: Vocabulary,
    find_embedding: FindEmbedding | None = None,
    *,
    emphasis: bool = True,
    comma_padding_backtrack: int = 20,
) -> tuple[list[Chunk], int]:
    """Cuts a prompt into chunks, and counts its tokens as the host shows them.

    A chunk ends when it is full, at BREAK, and before an embedding with more vectors than are left in it. If it is
    full and the last comma is at most `comma_padding_backtrack` tokens back, what follows that comma moves on into the
    next chunk. The count takes every chunk but the last as full. An empty prompt gives one chunk of padding, which is
    also what the host appends to the shorter one of two prompts that are encoded together.

    `emphasis=False` is the host's option "None": brackets, weights and BREAK are text. Two things are kept that look
    like mistakes of the host: vectors that stand behind the comma do not move on with their places (the chunk before
    gets them, after its end token, while the next one has token 0 in their stead), and an end token written out in
    the prompt has everything behind it padded over where `pad` differs from `end`.

    Raises PromptSyntaxError for an embedding with more vectors than a chunk holds; the host's encoder fails on it.
    """
    builder = _ChunkBuilder(vocabulary, comma_padding_backtrack)
    for text, weight in parse_attention(prompt) if emphasis else [(prompt, 1.0)]:
        if text == BREAK and weight == BREAK_WEIGHT:
            builder.close()
            continue
        tokens = vocabulary.encode(text)
        position = 0
        while position < len(tokens):
            builder.make_room(tokens[position])
            found = find_embedding(tokens, position) if find_embedding else None
            if found is None:
                builder.add_token(tokens[position], weight)
                position += 1
            else:
                name, matched, vectors = found
                builder.add_embedding(name, vectors, weight)
                position += matched
    return builder.finish()


class _ChunkBuilder:
    """Takes tokens one by one and closes chunks where the host closes them."""

    def __init__(self, vocabulary: Vocabulary, backtrack: int) -> None:
        self._vocabulary = vocabulary
        self._backtrack = backtrack
        self._done: list[Chunk] = []
        self._tokens: list[int] = []
        self._weights: list[float] = []
        self._placed: list[Placed] = []
        self._after_comma: int | None = None

    def make_room(self, token: int) -> None:
        """Called before each token of the prompt: notes commas, closes the chunk if it is full."""
        full = len(self._tokens) == self._vocabulary.chunk_length
        if token == self._vocabulary.comma:
            # Also where an embedding's name starts with the comma, and its vectors will stand in this place.
            self._after_comma = len(self._tokens) + 1
        elif full and self._comma_is_near():
            self._close_at_comma()
            full = False
        if full:
            self.close()

    def add_token(self, token: int, weight: float) -> None:
        """Appends one token."""
        self._tokens.append(token)
        self._weights.append(weight)

    def add_embedding(self, name: str, vectors: int, weight: float) -> None:
        """Appends the places of an embedding; they are never split over two chunks."""
        room = self._vocabulary.chunk_length
        if vectors > room:
            raise PromptSyntaxError(
                f'The embedding "{name}" has {vectors} vectors, but the text encoder takes at most {room} at once. '
                f"Leave it out of the prompt, or use one with fewer vectors."
            )
        if len(self._tokens) + vectors > room:
            self.close()
        self._placed.append(Placed(len(self._tokens) + 1, name, vectors))
        self._tokens += [0] * vectors
        self._weights += [weight] * vectors

    def close(self) -> None:
        """Pads the current chunk to its full length and starts the next."""
        vocabulary = self._vocabulary
        missing = vocabulary.chunk_length - len(self._tokens)
        tokens = [vocabulary.start, *self._tokens, *[vocabulary.end] * (missing + 1)]
        end = tokens.index(vocabulary.end) + 1
        tokens[end:] = [vocabulary.pad] * len(tokens[end:]) if vocabulary.pad != vocabulary.end else tokens[end:]
        weights = [1.0, *self._weights, *[1.0] * (missing + 1)]
        self._done.append(Chunk(tuple(tokens), tuple(weights), tuple(self._placed)))
        self._tokens, self._weights, self._placed = [], [], []
        self._after_comma = None

    def finish(self) -> tuple[list[Chunk], int]:
        """Closes the last chunk, unless it is empty and there are others, and counts."""
        count = len(self._done) * self._vocabulary.chunk_length + len(self._tokens)
        if self._tokens or not self._done:
            self.close()
        return self._done, count

    def _comma_is_near(self) -> bool:
        if self._backtrack == 0 or self._after_comma is None:
            return False
        return len(self._tokens) - (self._after_comma - 1) <= self._backtrack

    def _close_at_comma(self) -> None:
        """Closes the chunk after its last comma; the tokens behind it start the next one."""
        tokens, weights = self._tokens[self._after_comma :], self._weights[self._after_comma :]
        del self._tokens[self._after_comma :], self._weights[self._after_comma :]
        self.close()
        self._tokens, self._weights = tokens, weights


# ---------------------------------------------------------------------------------------------------------------------
# Names of embeddings


class EmbeddingNames:
    """Finds the names of embeddings in a list of token ids, as the host does: by their own ids, longest first.

    So a name is found inside of a longer word if the tokens of that word happen to fall that way, and upper and lower
    case are the same if the tokenizer makes them so. Of two names with the same ids the one added first wins.
    """

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        """`encode`: text -> token ids without start and end, the same as in `Vocabulary`."""
        self._encode = encode
        self._by_first_token: dict[int, list[tuple[list[int], str, int]]] = {}

    def add(self, name: str, vectors: int) -> None:
        """Adds an embedding, or replaces the one of that very name."""
        tokens = self._tokens(name)
        self.remove(name)
        same_start = [*self._by_first_token.get(tokens[0], []), (tokens, name, vectors)]
        # The sort is stable: among names of the same length the order stays that of adding.
        self._by_first_token[tokens[0]] = sorted(same_start, key=lambda entry: len(entry[0]), reverse=True)

    def remove(self, name: str) -> None:
        """Takes an embedding out; one that is not there is no mistake."""
        first = self._tokens(name)[0]
        others = [entry for entry in self._by_first_token.get(first, []) if entry[1] != name]
        self._by_first_token[first] = others

    def find(self, tokens: Sequence[int], position: int) -> tuple[str, int, int] | None:
        """Name, number of tokens matched and number of vectors of the embedding at `position`; a `FindEmbedding`."""
        for ids, name, vectors in self._by_first_token.get(tokens[position], []):
            if list(tokens[position : position + len(ids)]) == ids:
                return name, len(ids), vectors
        return None

    def _tokens(self, name: str) -> list[int]:
        tokens = list(self._encode(name))
        if not tokens:
            raise PromptSyntaxError(
                f'The embedding name "{name}" holds nothing a prompt could be made of. Use letters or digits.'
            )
        return tokens


# ---------------------------------------------------------------------------------------------------------------------
# Weights onto the output of the text encoder


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
