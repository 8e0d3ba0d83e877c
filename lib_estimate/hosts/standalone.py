"""The host without a webui: a Stable Diffusion 1 checkpoint loaded through diffusers and transformers.

Leans on: the forward hook of the text encoder's `token_embedding`, `hidden_states` and `final_layer_norm` of
transformers' CLIP text model (4.30 to 5), diffusers' `UNet2DConditionModel` and `AutoencoderKL`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lib_estimate import embedding_file
from lib_estimate import prompt_syntax as syntax
from lib_estimate.embedding_file import Vectors
from lib_estimate.errors import EstimateError, ModelError
from lib_estimate.hosts import checkpoint, denoising
from lib_estimate.hosts.base import (
    Conditioning,
    CrossAttentionLayer,
    ModelInfo,
    PromptPart,
    StepConditioning,
    Token,
    Trajectory,
    Watch,
)
from lib_estimate.request import ModelOptions

log = logging.getLogger(__name__)

KEY = "clip_l"
PLACEHOLDER = "embeddingestimateplaceholder"
MOST_BATCHES = 64


class StandaloneHost:
    """A checkpoint in memory; `embeddings` is the folder whose files can be used by name in prompts."""

    def __init__(self, options: ModelOptions, embeddings: Path | None = None) -> None:
        self.device = _device(options.device)
        self.options, self.embeddings = options, embeddings
        self.parts = checkpoint.load(Path(options.model), _dtype(options.dtype, self.device))
        for network in (self.parts.text_encoder, self.parts.unet, self.parts.vae):
            network.to(self.device).eval()

    @contextmanager
    def session(self) -> Iterator[StandaloneSession]:
        networks = (self.parts.text_encoder, self.parts.unet, self.parts.vae)
        flags = [(p, p.requires_grad) for network in networks for p in network.parameters()]
        modes = [(module, module.training) for network in networks for module in network.modules()]
        session = StandaloneSession(self)
        try:
            for network in networks:
                network.requires_grad_(False).eval()
            yield session
        finally:
            session.close()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, mode in modes:
                module.training = mode


class ChunkBatch(NamedTuple):
    """One chunk of each of several texts: ids `[B, T]`, weights `[B, T]`, and the embeddings in each."""

    ids: Tensor
    weights: Tensor
    placed: list[tuple[syntax.Placed, ...]]


class StandaloneSession:
    """See `base.Session`."""

    placeholder = PLACEHOLDER

    def __init__(self, host: StandaloneHost) -> None:
        parts = host.parts
        self.options, self.parts, self.device = host.options, parts, host.device
        self.dtype = parts.unet.dtype
        ids = parts.tokenizer
        self.vocabulary = syntax.Vocabulary(
            encode=self.token_ids,
            start=ids.bos_token_id,
            end=ids.eos_token_id,
            pad=ids.pad_token_id,
            comma=next(iter(self.token_ids(",")), None),
            chunk_length=parts.text_encoder.config.max_position_embeddings - 2,
        )
        self.info = ModelInfo(
            name=parts.name,
            hash=parts.hash,
            widths={KEY: parts.text_encoder.config.hidden_size},
            chunk_length=self.vocabulary.chunk_length,
            latent_channels=parts.unet.config.in_channels,
            latent_scale=2 ** (len(parts.vae.config.block_out_channels) - 1),
            default_size=parts.default_size,
            device=host.device,
            dtype=self.dtype,
        )
        self._names = syntax.EmbeddingNames(self.token_ids)
        self._stored = _stored_embeddings(host.embeddings, self.info.widths[KEY])
        for name, rows in self._stored.items():
            self._names.add(name, len(rows))
        text = getattr(parts.text_encoder, "text_model", parts.text_encoder)
        self._table: nn.Embedding = text.embeddings.token_embedding
        self._final_norm: nn.LayerNorm = text.final_layer_norm
        self._alphas_cumprod = parts.alphas_cumprod.to(host.device, torch.float32)
        self._batches: dict[tuple, list[ChunkBatch]] = {}
        self._spliced: list[list[tuple[int, Tensor]]] = []
        self._hook = self._table.register_forward_hook(self._splice)

    def close(self) -> None:
        self._hook.remove()

    # ---- text ----

    def read(self, prompt: str, steps: int, *, negative: bool = False) -> list[PromptPart]:
        if negative:  # a webui composes only the prompt, and takes extra network tags only out of it
            return [PromptPart(1.0, tuple(syntax.prompt_schedule(prompt, steps)))]
        text, _ = syntax.extra_network_tags(prompt)
        return [PromptPart(w, tuple(syntax.prompt_schedule(part, steps))) for part, w in syntax.split_and(text)]

    def notes(self, prompt: str) -> list[str]:
        tags = syntax.extra_network_tags(prompt)[1]
        return [f"{tag} has no effect: extra networks such as LoRA need a webui." for tag in tags]

    def tokens(self, text: str) -> list[list[Token]]:
        return [self._chunk_tokens(chunk) for chunk in self._chunks(text)]

    def random_text(self, rng: Random, count: int) -> str:
        words: list[str] = []
        while len(words) < count:
            # Ids below 512 are single bytes; brackets and the like would mean something in a prompt.
            word = self.parts.tokenizer.decode([rng.randrange(512, self.vocabulary.start)]).strip()
            if word.isascii() and word.isalnum():
                words.append(word)
        return " ".join(words)

    def token_vectors(self, text: str) -> Vectors:
        rows = []
        for chunk in self._chunks(text):
            here = {placed.offset: placed for placed in chunk.placed}
            position, end = 1, self._text_end(chunk)
            while position < end:
                if position in here:
                    rows.append(self._stored[here[position].name].to(self.device))
                    position += here[position].vectors
                else:
                    rows.append(self._table.weight[chunk.tokens[position]][None].float())
                    position += 1
        width = self.info.widths[KEY]
        return {KEY: torch.cat(rows).detach().clone() if rows else torch.zeros(0, width, device=self.device)}

    def end_vectors(self) -> Vectors:
        return {KEY: self._table.weight[self.vocabulary.end][None].detach().float()}

    def table_norm(self) -> dict[str, float]:
        return {KEY: self._table.weight.detach().float().norm(dim=1).median().item()}

    def encode(
        self,
        texts: Sequence[str],
        vectors: Mapping[str, Tensor] | None = None,
        *,
        weighted: bool = True,
        together: bool = False,
    ) -> Conditioning:
        rows = None if vectors is None else vectors[KEY]
        columns = self._prepared(tuple(texts), 0 if rows is None else len(rows))
        return Conditioning(torch.cat([self._encode_chunks(c, rows, weighted, together) for c in columns], dim=1))

    def _prepared(self, texts: tuple[str, ...], count: int) -> list[ChunkBatch]:
        """The texts as batches of chunks, with `count` vectors at the placeholder; kept, as a fit asks every step."""
        key = (texts, count)
        if key not in self._batches:
            if len(self._batches) > MOST_BATCHES:
                self._batches.clear()
            if count:
                self._names.add(PLACEHOLDER, count)
            try:
                per_text = [self._chunks(text) for text in texts]
            finally:
                self._names.remove(PLACEHOLDER)
            if count and not all(any(c.placed for c in chunks) for chunks in per_text):
                raise ModelError(f"Internal error: the learnt vectors did not stand in {texts!r}.")
            empty = self._chunks("")[0]
            most = max(len(chunks) for chunks in per_text)
            columns = ([c[k] if k < len(c) else empty for c in per_text] for k in range(most))
            self._batches[key] = [self._batch(column) for column in columns]
        return self._batches[key]

    def _batch(self, column: list[syntax.Chunk]) -> ChunkBatch:
        ids = torch.tensor([chunk.tokens for chunk in column], device=self.device)
        return ChunkBatch(
            ids, torch.tensor([c.weights for c in column], device=self.device), [c.placed for c in column]
        )

    def _encode_chunks(self, batch: ChunkBatch, rows: Tensor | None, weighted: bool, together: bool) -> Tensor:
        """One chunk of each text -> hidden states `[B, T, C]` with emphasis, float32."""
        self._spliced = [
            [(p.offset, rows if p.name == PLACEHOLDER else self._stored[p.name].to(self.device)) for p in placed]
            for placed in batch.placed
        ]
        try:
            z = self._hidden_states(batch.ids)
        finally:
            self._spliced = []
        if not weighted:
            return z
        mode = self.options.emphasis.value
        if together:
            return syntax.apply_emphasis(z, batch.weights, mode)
        pairs = zip(z.split(1), batch.weights.split(1), strict=True)
        return torch.cat([syntax.apply_emphasis(a, w, mode) for a, w in pairs])

    def _hidden_states(self, ids: Tensor) -> Tensor:
        """The text encoder's states `[B, T, C]` at the chosen layer, after its final norm, float32."""
        skip = self.options.clip_skip
        out = self.parts.text_encoder(input_ids=ids, output_hidden_states=skip > 1)
        z = out.last_hidden_state if skip == 1 else self._final_norm(out.hidden_states[-skip])
        return z.float()

    def _splice(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        """Forward hook of the token table: puts vectors over the places that embeddings take, `[B, T, C]`."""
        if not any(self._spliced):
            return out
        rows = []
        for row, placed in zip(out, self._spliced, strict=True):
            for offset, vectors in placed:
                # A webui cuts off what hangs over the chunk's end.
                vectors = vectors[: len(row) - 1 - offset].to(row.dtype)
                row = torch.cat([row[:offset], vectors, row[offset + len(vectors) :]])
            rows.append(row)
        return torch.stack(rows)

    def _chunks(self, text: str) -> list[syntax.Chunk]:
        emphasis = self.options.emphasis.value != "None"
        return syntax.chunks(text, self.vocabulary, self._names.find, emphasis=emphasis)[0]

    def _chunk_tokens(self, chunk: syntax.Chunk) -> list[Token]:
        here = {placed.offset: placed for placed in chunk.placed}
        tokens, position, end = [], 1, self._text_end(chunk)
        while position < end:
            placed = here.get(position)
            text = placed.name if placed else self.parts.tokenizer.decode([chunk.tokens[position]]).strip()
            count = placed.vectors if placed else 1
            tokens.append(Token(text, chunk.weights[position], count if placed else 0))
            position += count
        return tokens

    def _text_end(self, chunk: syntax.Chunk) -> int:
        """Index of the end token that closes the chunk's text."""
        covered = max((p.offset + p.vectors for p in chunk.placed), default=1)
        end = self.vocabulary.end
        return next((i for i in range(covered, len(chunk.tokens)) if chunk.tokens[i] == end), len(chunk.tokens) - 1)

    def token_ids(self, text: str) -> list[int]:
        return self.parts.tokenizer(text, truncation=False, add_special_tokens=False)["input_ids"]

    # ---- pictures ----

    def predict_noise(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        hidden = conditioning.hidden
        if len(hidden) == 1:
            hidden = hidden.expand(len(x), -1, -1)
        out = self.parts.unet(x.to(self.dtype), timestep, hidden.to(self.dtype), return_dict=False)[0].float()
        if self.parts.prediction == "epsilon":
            return out
        return denoising.noise_of_velocity(out, x.float(), self._alphas_cumprod[timestep.long()].float())

    def sample(
        self,
        noise: Tensor,
        guidance: Sequence[StepConditioning],
        cfg_scale: float,
        *,
        offset: float = 0.0,
        watch: Watch | None = None,
        watch_negative: bool = False,
    ) -> Iterator[int | Trajectory]:
        unet = self.parts.unet
        return denoising.sample(
            self.predict_noise, self._alphas_cumprod, noise.to(self.device).float(), guidance, cfg_scale, offset=offset,
            watch_positive=lambda step: denoising.watching(unet, None if watch_negative else watch, step),
            watch_negative=lambda step: denoising.watching(unet, watch if watch_negative else None, step),
        )  # fmt: skip

    def cross_attention(self) -> list[CrossAttentionLayer]:
        def call(module: nn.Module) -> CrossAttentionLayer:
            return lambda hidden, context: module(hidden, encoder_hidden_states=context.to(self.dtype)).float()

        return [call(module) for module in denoising.attention_modules(self.parts.unet)]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.parts.vae
        pictures = [
            vae.decode(z[None].to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0] for z in latents
        ]
        return (torch.cat(pictures).float().cpu() / 2 + 0.5).clamp(0, 1)


def _stored_embeddings(folder: Path | None, width: int) -> dict[str, Tensor]:
    """The embeddings that can be used by name: those of the folder (and below) that fit the model."""
    found: dict[str, Tensor] = {}
    if folder is None or not folder.is_dir():
        return found
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in (".pt", ".bin", ".safetensors") or not path.is_file():
            continue
        try:
            vectors = embedding_file.load(path).vectors
        except EstimateError as error:
            log.warning("Skipped an embedding: %s", error)
            continue
        rows = next(iter(vectors.values()))
        if len(vectors) == 1 and rows.shape[1] == width:
            found.setdefault(path.stem, rows)
    return found


def _device(name: str) -> torch.device:
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"The device {name!r} can't be used here ({str(error).splitlines()[0]}). Use auto or cpu."
        ) from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    return getattr(torch, name)
