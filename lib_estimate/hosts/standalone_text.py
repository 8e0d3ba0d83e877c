"""How the host without a webui reads and encodes text: its own parsers, chunks, embeddings and emphasis."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from lib_estimate.errors import EstimateError, ModelError
from lib_estimate.files import reading
from lib_estimate.files.embedding import Vectors
from lib_estimate.files.names import folded
from lib_estimate.hosts.base import (
    FIRST_WORD_ID,
    PLACEHOLDER,
    Conditioning,
    Network,
    PromptPart,
    Token,
    Words,
    foreign_embedding,
)
from lib_estimate.hosts.checkpoint import Components
from lib_estimate.hosts.placement import Placement
from lib_estimate.hosts.precision import Precision
from lib_estimate.hosts.text_encoder import TextEncoder
from lib_estimate.prompt import attention, chunks, schedule
from lib_estimate.request import ModelOptions

log = logging.getLogger(__name__)

MOST_BATCHES = 64


class ChunkBatch(NamedTuple):
    """One chunk of each of several texts: ids `[B, T]`, weights `[B, T]`, and the embeddings in each."""

    ids: Tensor
    weights: Tensor
    placed: list[tuple[chunks.Placed, ...]]


class StandaloneText:
    """The part of `base.Session` that is about text. Each text encoder reads a text in its own way."""

    placeholder = PLACEHOLDER
    placement: Placement
    precision: Precision

    def __init__(self, parts: Components, options: ModelOptions, device: torch.device) -> None:
        self.parts, self.options, self.device = parts, options, device
        ids, length = parts.tokenizer, min(encoder.places for encoder in parts.text_encoders) - 2
        self.vocabularies = {
            encoder.key: chunks.Vocabulary(
                encode=partial(self._read_by, encoder),
                start=ids.bos_token_id,
                end=ids.eos_token_id,
                pad=ids.eos_token_id,  # each text encoder fills up in its own way
                comma=next(iter(self._read_by(encoder, ",")), None),
                chunk_length=length,
            )
            for encoder in parts.text_encoders
        }
        self.vocabulary = next(iter(self.vocabularies.values()))  # whose reading of a text is shown
        self._names, self._foreign = chunks.EmbeddingNames(self.token_ids), chunks.EmbeddingNames(self.token_ids)
        self._stored: dict[str, Vectors] = {}
        self._batches: dict[tuple, list[dict[str, ChunkBatch]]] = {}

    def know(self, embeddings: Mapping[str, Vectors]) -> None:
        """From now on these can be used by name, where their widths fit."""
        self._stored = dict(embeddings)
        for name, rows in embeddings.items():
            fits = [r.shape[1] for r in rows.values()] == list(self.widths().values())
            (self._names if fits else self._foreign).add(name, len(next(iter(rows.values()))))

    def widths(self) -> dict[str, int]:
        return {encoder.key: encoder.width for encoder in self.parts.text_encoders}

    def read(self, prompt: str, steps: int, *, negative: bool = False) -> list[PromptPart]:
        if negative:  # a webui composes only the prompt, and takes extra network tags only out of it
            return [PromptPart(1.0, tuple(schedule.prompt_schedule(prompt, steps)))]
        text, _ = schedule.extra_network_tags(prompt)
        return [PromptPart(w, tuple(schedule.prompt_schedule(part, steps))) for part, w in schedule.split_and(text)]

    def tags(self, prompt: str) -> tuple[str, list[str]]:
        return schedule.extra_network_tags(prompt)

    def notes(self, prompt: str) -> list[str]:
        notes = [f"{tag} has no effect: extra networks such as LoRA need a webui." for tag in self.tags(prompt)[1]]
        ids = self.token_ids(prompt)
        found = [self._foreign.find(ids, position) for position in range(len(ids))]
        for name in dict.fromkeys(name for name, _, _ in filter(None, found)):
            widths = [rows.shape[1] for rows in self._stored[name].values()]
            notes.append(foreign_embedding(name, widths, self.widths().values()))
        return notes

    def tokens(self, text: str) -> list[list[Token]]:
        return [self._chunk_tokens(chunk) for chunk in self._chunks(text, self.vocabulary)]

    def random_text(self, rng: Random, count: int) -> str:
        words: list[str] = []
        while len(words) < count:
            word = self.parts.tokenizer.decode([rng.randrange(FIRST_WORD_ID, self.vocabulary.start)]).strip()
            if word.isascii() and word.isalnum():
                words.append(word)
        return " ".join(words)

    def token_vectors(self, text: str) -> Vectors:
        return {encoder.key: self._token_vectors(text, encoder) for encoder in self.parts.text_encoders}

    def _token_vectors(self, text: str, encoder: TextEncoder) -> Tensor:
        rows = [torch.zeros(0, encoder.width, device=self.device)]
        for chunk in self._chunks(text, self.vocabularies[encoder.key]):
            here = {placed.offset: placed for placed in chunk.placed}
            position, end = 1, self._text_end(chunk)
            while position < end:
                if position in here:
                    rows.append(self._embedding(here[position].name)[encoder.key].to(self.device))
                    position += here[position].vectors
                else:
                    rows.append(encoder.table.weight[chunk.tokens[position]][None].float().to(self.device))
                    position += 1
        return torch.cat(rows).detach().clone()

    def end_vectors(self) -> Vectors:
        end = self.vocabulary.end
        return {e.key: e.table.weight[end][None].detach().float().to(self.device) for e in self.parts.text_encoders}

    def table_norm(self) -> dict[str, float]:
        return {e.key: e.table.weight.detach().float().norm(dim=1).median().item() for e in self.parts.text_encoders}

    def words(self) -> Words:
        tables = {encoder.key: encoder.table.weight.detach() for encoder in self.parts.text_encoders}
        return Words(tables, lambda token: self.parts.tokenizer.decode([token]).strip())

    def encode(
        self,
        texts: Sequence[str],
        vectors: Mapping[str, Tensor] | None = None,
        *,
        weighted: bool = True,
        together: bool = False,
        negative: bool = False,
        networks: str = "",
    ) -> Conditioning:
        self.placement.bring(Network.TEXT)
        columns = self._prepared(tuple(texts), 0 if vectors is None else len(next(iter(vectors.values()))))
        encoded = [self._encode_chunks(column, vectors, weighted, together) for column in columns]
        hidden, pooled = torch.cat([hidden for hidden, _ in encoded], dim=1), encoded[0][1]
        if pooled is not None and negative and not any(texts):
            return Conditioning(torch.zeros_like(hidden), torch.zeros_like(pooled))
        return Conditioning(hidden, pooled)

    def _prepared(self, texts: tuple[str, ...], count: int) -> list[dict[str, ChunkBatch]]:
        """The texts as each encoder's batches of chunks, the first of each, the second of each and so on, with `count`
        vectors at the placeholder; kept, as a fit asks every step."""
        key = (texts, count)
        if key not in self._batches:
            if len(self._batches) > MOST_BATCHES:
                self._batches.clear()
            if count:
                self._names.add(PLACEHOLDER, count)
            try:
                read = {name: [self._chunks(t, words) for t in texts] for name, words in self.vocabularies.items()}
            finally:
                self._names.remove(PLACEHOLDER)
            per_text = [chunks for found in read.values() for chunks in found]
            if count and not all(any(c.placed for c in chunks) for chunks in per_text):
                raise ModelError(f"Internal error: the learnt vectors did not stand in {texts!r}.")
            empty, most = self._chunks("", self.vocabulary)[0], max(map(len, per_text))
            self._batches[key] = [
                {name: self._batch([c[k] if k < len(c) else empty for c in found]) for name, found in read.items()}
                for k in range(most)
            ]
        return self._batches[key]

    def _batch(self, column: list[chunks.Chunk]) -> ChunkBatch:
        ids = torch.tensor([chunk.tokens for chunk in column], device=self.device)
        return ChunkBatch(
            ids, torch.tensor([c.weights for c in column], device=self.device), [c.placed for c in column]
        )

    def _encode_chunks(
        self, column: Mapping[str, ChunkBatch], vectors: Mapping[str, Tensor] | None, weighted: bool, together: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One chunk of each text -> hidden states `[B, T, C]` with emphasis, and `[B, P]` pooled, float32."""
        hidden, pooled = [], None
        for encoder in self.parts.text_encoders:
            batch = column[encoder.key]
            placed = [
                [(p.offset, vectors if p.name == PLACEHOLDER else self._embedding(p.name)) for p in row]
                for row in batch.placed
            ]
            with self.precision.of(Network.TEXT):
                z, own = encoder.states(batch.ids, self.vocabulary.end, placed, self._layer(encoder))
            hidden.append(self._emphasised(z, batch.weights, together) if weighted else z)
            pooled = own if own is not None else pooled
        return torch.cat(hidden, dim=2), pooled

    def _layer(self, encoder: TextEncoder) -> int:
        skip, moved = self.options.clip_skip, self.options.sdxl_clip_l_skip and len(self.parts.text_encoders) > 1
        if not encoder.clip_skip and (not moved or encoder.pooled):
            return encoder.layer
        if skip > encoder.layers:
            raise ModelError(f"Clip skip is {skip}, but this model's text encoder has {encoder.layers} layers.")
        return skip

    def _emphasised(self, z: Tensor, weights: Tensor, together: bool) -> Tensor:
        mode = self.options.emphasis.value
        if together:
            return attention.apply_emphasis(z, weights, mode)
        return torch.cat(
            [attention.apply_emphasis(a, w, mode) for a, w in zip(z.split(1), weights.split(1), strict=True)]
        )

    def _embedding(self, name: str) -> Vectors:
        """A stored embedding under the model's own keys."""
        return dict(zip(self.widths(), self._stored[name].values(), strict=True))

    def _chunks(self, text: str, words: chunks.Vocabulary) -> list[chunks.Chunk]:
        emphasis = self.options.emphasis.value != "None"
        return chunks.chunks(text, words, self._names.find, emphasis=emphasis)[0]

    def _chunk_tokens(self, chunk: chunks.Chunk) -> list[Token]:
        here = {placed.offset: placed for placed in chunk.placed}
        tokens, position, end = [], 1, self._text_end(chunk)
        while position < end:
            placed = here.get(position)
            text = placed.name if placed else self.parts.tokenizer.decode([chunk.tokens[position]]).strip()
            count = placed.vectors if placed else 1
            tokens.append(Token(text, chunk.weights[position], count if placed else 0))
            position += count
        return tokens

    def _text_end(self, chunk: chunks.Chunk) -> int:
        """Index of the end token that closes the chunk's text."""
        covered = max((p.offset + p.vectors for p in chunk.placed), default=1)
        end = self.vocabulary.end
        return next((i for i in range(covered, len(chunk.tokens)) if chunk.tokens[i] == end), len(chunk.tokens) - 1)

    def token_ids(self, text: str) -> list[int]:
        return self.vocabulary.encode(text)

    def _read_by(self, encoder: TextEncoder, text: str) -> list[int]:
        ids = self.parts.tokenizer
        return ids(encoder.clean(text), truncation=False, add_special_tokens=False)["input_ids"]


def stored_embeddings(folder: Path | None, unknown: Collection[str]) -> dict[str, Vectors]:
    """The embeddings of a folder and below, by name, but for those of unknown names."""
    found: dict[str, Vectors] = {}
    if folder is None or not folder.is_dir():
        return found
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in (".pt", ".bin", ".safetensors") or not path.is_file():
            continue
        if folded(path.stem) in unknown:
            continue
        try:
            found.setdefault(path.stem, reading.load(path).vectors)
        except EstimateError as error:
            log.warning("Skipped an embedding: %s", error)
    return found
