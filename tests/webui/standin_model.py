"""The small model in the webuis' terms, for their stand-ins: embeddings, prompts in chunks, the U-Net as ldm's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from lib_estimate.errors import PromptSyntaxError
from lib_estimate.files import reading
from lib_estimate.hosts import checkpoint
from lib_estimate.hosts.text_encoder import TextEncoder
from lib_estimate.prompt import chunks

# ---- embeddings ---------------------------------------------------------------------------------------------------


class Embedding:
    """An embedding that prompts can name."""

    def __init__(self, vec, name):
        rows = next(iter(vec.values())) if isinstance(vec, dict) else vec
        self.vec, self.name, self.vectors = vec, name, len(rows)


class Database:
    """Embeddings by the ids of their names."""

    def __init__(self) -> None:
        self.ids_lookup: dict[int, list] = {}
        self.word_embeddings: dict[str, Any] = {}
        self.skipped_embeddings: dict[str, Any] = {}

    def _place(self, embedding: Any, name: str, ids: list[int]) -> None:
        """The embedding, or none, under this name."""
        others = [row for row in self.ids_lookup.pop(ids[0], []) if row[1].name != name]
        self.word_embeddings.pop(name, None)
        if embedding is not None:
            others.append((ids, embedding))
            self.word_embeddings[name] = embedding
        if others:
            self.ids_lookup[ids[0]] = sorted(others, key=lambda row: len(row[0]), reverse=True)

    def _read(self, folder: str, widths: list[int], place: Callable[[Embedding], Any]) -> None:
        """Forgets all, and reads the folder; only those of these widths are placed."""
        for known in (self.ids_lookup, self.word_embeddings, self.skipped_embeddings):
            known.clear()
        for path in sorted(Path(folder).rglob("*.*")):
            if path.suffix not in (".pt", ".safetensors"):
                continue
            vectors = reading.load(path).vectors
            made = Embedding(vectors if len(vectors) > 1 else next(iter(vectors.values())), path.stem)
            if [rows.shape[1] for rows in vectors.values()] == widths:
                place(made)
            else:
                self.skipped_embeddings[path.stem] = made

    def find_embedding_at_position(self, tokens, offset):
        for ids, embedding in self.ids_lookup.get(tokens[offset], []):
            if list(tokens[offset : offset + len(ids)]) == ids:
                return embedding, len(ids)
        return None, None


class TokenTable(nn.Module):
    """The token table, with embeddings put over its rows."""

    def __init__(self, wrapped, embeddings, textual_inversion_key="clip_l"):
        super().__init__()
        self.wrapped, self.embeddings, self.textual_inversion_key = wrapped, embeddings, textual_inversion_key

    def forward(self, input_ids):
        fixes, self.embeddings.fixes = self.embeddings.fixes or [], None
        rows = list(self.wrapped(input_ids))
        for index, row_fixes in enumerate(fixes):
            for offset, embedding in row_fixes:
                vec = embedding.vec[self.textual_inversion_key] if isinstance(embedding.vec, dict) else embedding.vec
                row, vec = rows[index], vec.to(rows[index])
                rows[index] = torch.cat([row[: offset + 1], vec, row[offset + 1 + len(vec) :]])
        return torch.stack(rows)


# ---- text encoders ------------------------------------------------------------------------------------------------


class PromptChunkFix(NamedTuple):
    """Where in a chunk an embedding stands."""

    offset: int
    embedding: Any


class PromptChunk:
    """As much of a prompt as the text encoder takes."""

    def __init__(self, tokens: tuple[int, ...], multipliers: tuple[float, ...], fixes: list[PromptChunkFix]) -> None:
        self.tokens, self.multipliers, self.fixes = list(tokens), list(multipliers), fixes


class Reader:
    """Prompts in chunks. Whoever is one has `_database()`, of embeddings, and `_emphasis()`, the option's name."""

    def _learn_to_read(self, parts: checkpoint.Components, encoder: TextEncoder) -> None:
        self.tokenizer, self._encoder = parts.tokenizer, encoder
        self.id_start, self.id_end = parts.tokenizer.bos_token_id, parts.tokenizer.eos_token_id
        self.chunk_length, self.return_pooled = encoder.places - 2, encoder.pooled
        self._vocabulary = chunks.Vocabulary(
            encode=lambda text: self.tokenize([text])[0], start=self.id_start, end=self.id_end, pad=self.id_end,
            comma=self.tokenize([","])[0][0], chunk_length=self.chunk_length,
        )  # fmt: skip

    def tokenize(self, texts):
        return self.tokenizer(list(texts), truncation=False, add_special_tokens=False)["input_ids"]

    def empty_chunk(self):
        return self.tokenize_line("")[0][0]

    def tokenize_line(self, line):
        database = self._database()

        def find(tokens, position):
            embedding, length = database.find_embedding_at_position(list(tokens), position)
            return None if embedding is None else (embedding.name, length, embedding.vectors)

        try:
            found, count = chunks.chunks(line, self._vocabulary, find, emphasis=self._emphasis() != "None")
        except PromptSyntaxError as error:
            raise ValueError(str(error)) from error
        return [self._chunk(chunk, database) for chunk in found], count

    def _chunk(self, chunk: chunks.Chunk, database: Database) -> PromptChunk:
        fixes = [PromptChunkFix(placed.offset - 1, database.word_embeddings[placed.name]) for placed in chunk.placed]
        return PromptChunk(chunk.tokens, chunk.weights, fixes)

    def _columns(self, texts: list[str]) -> list[list[PromptChunk]]:
        """The first chunk of each text, the second of each, and so on."""
        per_text = [self.tokenize_line(text)[0] for text in texts]
        longest = max(map(len, per_text))
        return [[found[k] if k < len(found) else self.empty_chunk() for found in per_text] for k in range(longest)]


# ---- the U-Net ----------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """diffusers' layer, called as a webui's U-Net calls its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, context=None, mask=None, encoder_hidden_states=None, **others):
        return self.inner(x, encoder_hidden_states=encoder_hidden_states if context is None else context)


def blocks_called_as_ldm(unet: nn.Module) -> list[nn.Module]:
    """The transformer blocks, each with such a cross-attention."""
    blocks = [module for module in unet.modules() if getattr(module, "attn2", None) is not None]
    for block in blocks:
        block.attn2 = CrossAttention(block.attn2)
    return blocks


def called_as_ldm(unet: nn.Module, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None) -> Tensor:
    """diffusers' U-Net encodes SDXL's sizes itself; in y `[B, V]` they are encoded already, as in the webuis."""
    if y is None:
        return unet(x, t, context, return_dict=False)[0]
    added = unet.add_embedding(y)
    with instead(unet, "get_aug_embed", lambda emb, encoder_hidden_states, added_cond_kwargs: added):
        return unet(x, t, context, return_dict=False)[0]


@contextlib.contextmanager
def instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)


def angles(numbers: Tensor, channels: int) -> Tensor:
    """Numbers `[N]` as SDXL is told them, `[N, channels]`."""
    return get_timestep_embedding(numbers, channels, flip_sin_to_cos=True, downscale_freq_shift=0)
