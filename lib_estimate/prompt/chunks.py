"""Token ids and weights in pieces the text encoder can take, and the embeddings found among the tokens by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lib_estimate.errors import PromptSyntaxError
from lib_estimate.prompt.attention import BREAK, BREAK_WEIGHT, parse_attention

FindEmbedding = Callable[[Sequence[int], int], "tuple[str, int, int] | None"]
"""`find(tokens, position)`: name, number of tokens (>= 1) matched from `position` on, number of vectors; or None."""


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

    Raises PromptSyntaxError for an embedding with more vectors than a chunk holds; the host's encoder fails on it. And
    for half of a character, as pasting sometimes leaves it, which no tokenizer takes.
    """
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise PromptSyntaxError("The prompt has half of a character in it. Type that place instead of pasting it.")
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
