"""How a webui reads and encodes text, whichever it is: its own parsers, chunks, embeddings and emphasis.

Leans on, alike in AUTOMATIC1111 1.10.1 and the Forge family: `prompt_parser.get_multicond_prompt_list` and
`get_learned_conditioning_prompt_schedules`, `extra_networks.parse_prompt`; of each text encoder `tokenize_line`,
`process_tokens`, `empty_chunk`, `tokenize`, `id_start`, `id_end`, `chunk_length`, `return_pooled`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from modules import extra_networks, prompt_parser
from torch import Tensor

from lib_estimate.errors import ModelError, PromptSyntaxError
from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import (
    FIRST_WORD_ID,
    PLACEHOLDER,
    Conditioning,
    PromptPart,
    Token,
    Words,
    foreign_embedding,
)
from lib_estimate.prompt.attention import shortened

MOST_BATCHES = 64


@dataclass(frozen=True)
class Engine:
    """One of a webui's text encoders.

    table: its token table `[V, C]`. fixes: the object whose `fixes` says where in the tokens embeddings stand.
    register(embedding or None, name): lets the encoder know an embedding, or no longer. skipped: the embeddings, by
    name, that it knows and can't use.
    """

    encoder: Any
    table: Tensor
    fixes: Any
    register: Callable[[Any, str], Any]
    skipped: Mapping[str, Any]


class WebuiText:
    """The part of `base.Session` that is about text. `engines` by the key each has in embedding files."""

    placeholder = PLACEHOLDER

    def __init__(self, engines: Mapping[str, Engine], device: torch.device) -> None:
        self.engines, self.device = engines, device
        self.encoder = next(iter(engines.values())).encoder  # whose reading of a text is shown
        self._placed = SimpleNamespace(name=PLACEHOLDER, vectors=0, vec=None, shorthash=None)
        self._batches: dict[tuple, list[dict[str, list[Any]]]] = {}

    def close(self) -> None:
        for engine in self.engines.values():
            engine.fixes.fixes = None
        self._batches.clear()

    def widths(self) -> dict[str, int]:
        return {key: engine.table.shape[1] for key, engine in self.engines.items()}

    def read(self, prompt: str, steps: int, *, negative: bool = False) -> list[PromptPart]:
        try:
            if negative:  # the webui composes only the prompt, and takes extra network tags only out of it
                texts, weights = [prompt], [1.0]
            else:
                text, _ = extra_networks.parse_prompt(prompt)
                (parts,), texts, _ = prompt_parser.get_multicond_prompt_list([text])
                weights = [weight for _, weight in parts]
                texts = [texts[index] for index, _ in parts]
            schedules = prompt_parser.get_learned_conditioning_prompt_schedules(texts, steps)
        except (ValueError, RecursionError) as error:  # of brackets that nest deeply
            raise _unreadable(prompt, error) from error
        rows = (tuple((int(until), text) for until, text in schedule) for schedule in schedules)
        return [PromptPart(float(w), row) for w, row in zip(weights, rows, strict=True)]

    def tags(self, prompt: str) -> tuple[str, list[str]]:
        text, found = extra_networks.parse_prompt(prompt)
        return text, [f"<{name}:{':'.join(p.items)}>" for name, entries in found.items() for p in entries]

    def notes(self, prompt: str) -> list[str]:
        notes = [
            f"{tag} is left out. Write it beside the word, or let the word take it over (--take-over-lora)."
            for tag in self.tags(prompt)[1]
        ]
        skipped = next(iter(self.engines.values())).skipped
        return notes + [
            foreign_embedding(name, _widths(skipped[name].vec), self.widths().values())
            for name in skipped
            if self._stands_in(name, prompt)
        ]

    def _stands_in(self, name: str, prompt: str) -> bool:
        wanted, ids = self.token_ids(name), self.token_ids(prompt)
        return any(ids[at : at + len(wanted)] == wanted for at in range(len(ids)))

    def tokens(self, text: str) -> list[list[Token]]:
        return [self._chunk_tokens(chunk) for chunk in self._chunks(next(iter(self.engines)), text)]

    def token_ids(self, text: str) -> list[int]:
        return list(self.encoder.tokenize([text])[0])

    def random_text(self, rng: Random, count: int) -> str:
        words: list[str] = []
        while len(words) < count:
            word = self._decode(rng.randrange(FIRST_WORD_ID, self.encoder.id_start))
            if word.isascii() and word.isalnum():
                words.append(word)
        return " ".join(words)

    def token_vectors(self, text: str) -> Vectors:
        return {key: self._token_vectors(text, key) for key in self.engines}

    def _token_vectors(self, text: str, key: str) -> Tensor:
        table = self.engines[key].table
        rows = [torch.zeros(0, table.shape[1], device=self.device)]
        for chunk in self._chunks(key, text):
            for token, embedding, _ in self._pieces(chunk):
                row = table[token][None] if embedding is None else _of(embedding, key)
                rows.append(row.to(self.device).float())
        return torch.cat(rows).detach().clone()

    def end_vectors(self) -> Vectors:
        return {
            key: engine.table[engine.encoder.id_end][None].detach().to(self.device).float().clone()
            for key, engine in self.engines.items()
        }

    def table_norm(self) -> dict[str, float]:
        return {key: engine.table.detach().float().norm(dim=1).median().item() for key, engine in self.engines.items()}

    def words(self) -> Words:
        return Words({key: engine.table.detach() for key, engine in self.engines.items()}, self._decode)

    def encode(
        self,
        texts: Sequence[str],
        vectors: Mapping[str, Tensor] | None = None,
        *,
        weighted: bool = True,
        together: bool = False,
        negative: bool = False,
    ) -> Conditioning:
        self._placed.vec = None if vectors is None else dict(vectors)
        try:
            columns = self._prepared(tuple(texts), 0 if vectors is None else len(next(iter(vectors.values()))))
            encoded = [self._encode_column(column, weighted, together) for column in columns]
        finally:
            self._placed.vec = None
        hidden, pooled = torch.cat([hidden for hidden, _ in encoded], dim=1), encoded[0][1]
        if pooled is not None and negative and not any(texts):
            return Conditioning(torch.zeros_like(hidden), torch.zeros_like(pooled))
        return Conditioning(hidden, pooled)

    def _prepared(self, texts: tuple[str, ...], count: int) -> list[dict[str, list[Any]]]:
        """The texts as each encoder's chunks, the first of each, the second of each and so on; kept for the next
        step."""
        key = (texts, count)
        if key not in self._batches:
            if len(self._batches) > MOST_BATCHES:
                self._batches.clear()
            per_encoder = {name: [self._chunks(name, text, count) for text in texts] for name in self.engines}
            read = [chunks for per_text in per_encoder.values() for chunks in per_text]
            if count and not all(any(chunk.fixes for chunk in chunks) for chunks in read):
                raise ModelError(f"Internal error: the learnt vectors did not stand in {texts!r}.")
            self._batches[key] = [
                {
                    name: [c[k] if k < len(c) else self.engines[name].encoder.empty_chunk() for c in per_text]
                    for name, per_text in per_encoder.items()
                }
                for k in range(max(map(len, read)))
            ]
        return self._batches[key]

    def _chunks(self, key: str, text: str, count: int = 0) -> list[Any]:
        """The webui's own chunks of a text, with `count` learnt vectors where the placeholder stands."""
        engine, self._placed.vectors = self.engines[key], count
        if count:
            engine.register(self._placed, PLACEHOLDER)
        try:
            chunks, _ = engine.encoder.tokenize_line(text)
        except (ValueError, RecursionError) as error:  # such as (a:1.5.2)
            raise _unreadable(text, error) from error
        finally:
            if count:
                engine.register(None, PLACEHOLDER)
        return chunks

    def _encode_column(
        self, column: Mapping[str, list[Any]], weighted: bool, together: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One chunk of each text -> hidden states `[B, T, C]` with the webui's emphasis, and `[B, P]` pooled."""
        encoded = [self._encode_chunks(self.engines[key], chunks, weighted, together) for key, chunks in column.items()]
        pooled = next((pooled for _, pooled in encoded if pooled is not None), None)
        return torch.cat([hidden for hidden, _ in encoded], dim=2), pooled

    def _encode_chunks(
        self, engine: Engine, chunks: list[Any], weighted: bool, together: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The webui normalises all texts of one call as one, so texts of their own are encoded one by one where a
        weight makes that matter."""
        plain = all(weight == 1.0 for chunk in chunks for weight in chunk.multipliers)
        if together or plain or not weighted:
            return self._process(engine, chunks, weighted)
        hidden, pooled = zip(*(self._process(engine, [chunk], weighted) for chunk in chunks), strict=True)
        return torch.cat(hidden), None if pooled[0] is None else torch.cat(pooled)

    def _process(self, engine: Engine, chunks: list[Any], weighted: bool) -> tuple[Tensor, Tensor | None]:
        weights = [c.multipliers if weighted else [1.0] * len(c.multipliers) for c in chunks]
        engine.fixes.fixes = [chunk.fixes for chunk in chunks]
        with self._autocast():
            z = engine.encoder.process_tokens([chunk.tokens for chunk in chunks], weights)
        pooled = getattr(z, "pooled", None) if getattr(engine.encoder, "return_pooled", True) else None
        return z.to(self.device).float(), None if pooled is None else pooled.to(self.device).float()

    def _autocast(self) -> Any:
        raise NotImplementedError

    def _pieces(self, chunk: Any) -> Iterator[tuple[int | None, Any, float]]:
        """(token id, None, weight) of each word of a chunk and (None, embedding, weight) of each embedding in it."""
        fixes = {fix.offset + 1: fix.embedding for fix in chunk.fixes}
        covered = max((fix.offset + 1 + int(fix.embedding.vectors) for fix in chunk.fixes), default=1)
        end = next(i for i in range(covered, len(chunk.tokens)) if chunk.tokens[i] == self.encoder.id_end)
        position = 1
        while position < end:
            embedding, weight = fixes.get(position), chunk.multipliers[position]
            yield (chunk.tokens[position] if embedding is None else None), embedding, weight
            position += 1 if embedding is None else int(embedding.vectors)

    def _chunk_tokens(self, chunk: Any) -> list[Token]:
        return [
            Token(self._decode(token), weight, 0) if embedding is None
            else Token(embedding.name, weight, int(embedding.vectors))
            for token, embedding, weight in self._pieces(chunk)
        ]  # fmt: skip

    def _decode(self, token: int) -> str:
        tokenizer = getattr(self.encoder, "tokenizer", None)
        if tokenizer is None:
            from modules.sd_hijack_open_clip import tokenizer
        return tokenizer.decode([token]).strip().removesuffix("</w>")


def _unreadable(prompt: str, error: Exception) -> PromptSyntaxError:
    return PromptSyntaxError(f"The webui can't read the prompt {shortened(prompt)!r}: {error}.")


def _of(embedding: Any, key: str) -> Tensor:
    """A loaded embedding's vectors `[N, C]` for one encoder."""
    return embedding.vec[key] if isinstance(embedding.vec, dict) else embedding.vec


def _widths(vec: Tensor | Mapping[str, Tensor]) -> list[int]:
    return [rows.shape[1] for rows in (vec.values() if isinstance(vec, Mapping) else [vec])]
