"""The host without a webui: a Stable Diffusion 1, 2 or XL checkpoint loaded through diffusers and transformers.

Leans on diffusers' `UNet2DConditionModel` and `AutoencoderKL` (read in 0.42), and on what text_encoder.py says.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from lib_estimate.errors import EstimateError, ModelError
from lib_estimate.files import reading
from lib_estimate.files.embedding import Vectors
from lib_estimate.files.names import folded
from lib_estimate.hosts import checkpoint, denoising
from lib_estimate.hosts.base import (
    FIRST_WORD_ID,
    PLACEHOLDER,
    Conditioning,
    CrossAttentionLayer,
    ModelInfo,
    Network,
    PromptPart,
    Sensitivity,
    StepConditioning,
    Token,
    Trajectory,
    Watch,
    Words,
    foreign_embedding,
)
from lib_estimate.hosts.placement import Placed, Placement
from lib_estimate.hosts.precision import Precision
from lib_estimate.hosts.text_encoder import TextEncoder
from lib_estimate.prompt import attention, chunks, schedule
from lib_estimate.request import ModelOptions, Offload

log = logging.getLogger(__name__)

MOST_BATCHES = 64
SWITCHES = {mode: f"--offload {mode.value}" for mode in (Offload.NETWORKS, Offload.BLOCKS)}


class StandaloneHost:
    """A checkpoint in memory; `embeddings` is the folder whose files can be used by name in prompts."""

    def __init__(self, options: ModelOptions, embeddings: Path | None = None) -> None:
        self.device = _device(options.device)
        self.options, self.embeddings = options, embeddings
        self.unknown: frozenset[str] = frozenset()  # names of files there that are not to be used in prompts
        self.parts = checkpoint.load(Path(options.model), _dtype(options.dtype, self.device))
        self.mode = options.offload
        if self.mode is Offload.AUTO and self.device.type != "cuda":
            self.mode = Offload.OFF  # nobody says what is free there, or it is main memory itself
        for network in self.parts.networks():
            network.eval()
            if self.mode is Offload.OFF:
                network.to(self.device)

    def without(self, names: Collection[str]) -> StandaloneHost:
        host = copy.copy(self)  # of the same networks
        host.unknown = frozenset(map(folded, names))
        return host

    def placement(self) -> Placement:
        parts, mode = self.parts, self.mode
        text = [encoder.model for encoder in parts.text_encoders]
        return Placement(text, parts.unet, parts.vae, self.device, mode, switches=SWITCHES)

    @contextmanager
    def session(self, *, tags: bool = False) -> Iterator[StandaloneSession]:
        if tags:
            raise ModelError(
                "A word can take over a LoRA only in a webui, where LoRAs are: leave --take-over-lora out."
            )
        networks = self.parts.networks()
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
    placed: list[tuple[chunks.Placed, ...]]


class StandaloneSession(Placed):
    """See `base.Session`."""

    placeholder = PLACEHOLDER

    def __init__(self, host: StandaloneHost) -> None:
        parts = host.parts
        self.options, self.parts, self.device = host.options, parts, host.device
        self.dtype = parts.unet.dtype
        ids = parts.tokenizer
        self.vocabulary = chunks.Vocabulary(
            encode=self.token_ids,
            start=ids.bos_token_id,
            end=ids.eos_token_id,
            pad=ids.eos_token_id,  # each text encoder fills up in its own way
            comma=next(iter(self.token_ids(",")), None),
            chunk_length=min(encoder.places for encoder in parts.text_encoders) - 2,
        )
        self.info = ModelInfo(
            name=parts.name,
            hash=parts.hash,
            widths={encoder.key: encoder.width for encoder in parts.text_encoders},
            chunk_length=self.vocabulary.chunk_length,
            latent_channels=parts.vae.config.latent_channels,
            latent_scale=2 ** (len(parts.vae.config.block_out_channels) - 1),
            default_size=parts.default_size,
            device=host.device,
            dtype=self.dtype,
        )
        self._names, self._foreign = chunks.EmbeddingNames(self.token_ids), chunks.EmbeddingNames(self.token_ids)
        self._stored = _stored_embeddings(host.embeddings, host.unknown)
        for name, rows in self._stored.items():
            fits = [r.shape[1] for r in rows.values()] == list(self.info.widths.values())
            (self._names if fits else self._foreign).add(name, len(next(iter(rows.values()))))
        self._alphas_cumprod = parts.alphas_cumprod.to(host.device, torch.float32)
        self._batches: dict[tuple, list[ChunkBatch]] = {}
        self._missing = parts.unet.config.in_channels - self.info.latent_channels
        self._extra: dict[tuple[int, ...], Tensor] = {}
        self.placement, self.precision = host.placement(), Precision(host.device, self.dtype)
        self.forwards, self._at_once = 0, denoising.AtOnce()
        self._handles = [encoder.watch() for encoder in parts.text_encoders]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.precision.end()
        self.placement.end()

    # ---- text ----

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
            notes.append(foreign_embedding(name, widths, self.info.widths.values()))
        return notes

    def tokens(self, text: str) -> list[list[Token]]:
        return [self._chunk_tokens(chunk) for chunk in self._chunks(text)]

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
        for chunk in self._chunks(text):
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

    def _batch(self, column: list[chunks.Chunk]) -> ChunkBatch:
        ids = torch.tensor([chunk.tokens for chunk in column], device=self.device)
        return ChunkBatch(
            ids, torch.tensor([c.weights for c in column], device=self.device), [c.placed for c in column]
        )

    def _encode_chunks(
        self, batch: ChunkBatch, vectors: Mapping[str, Tensor] | None, weighted: bool, together: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One chunk of each text -> hidden states `[B, T, C]` with emphasis, and `[B, P]` pooled, float32."""
        placed = [
            [(p.offset, vectors if p.name == PLACEHOLDER else self._embedding(p.name)) for p in row]
            for row in batch.placed
        ]
        hidden, pooled = [], None
        for encoder in self.parts.text_encoders:
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
        return dict(zip(self.info.widths, self._stored[name].values(), strict=True))

    def _chunks(self, text: str) -> list[chunks.Chunk]:
        emphasis = self.options.emphasis.value != "None"
        return chunks.chunks(text, self.vocabulary, self._names.find, emphasis=emphasis)[0]

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
        return self.parts.tokenizer(text, truncation=False, add_special_tokens=False)["input_ids"]

    # ---- pictures ----

    def predict_noise(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return self._at_once.run(self.predict_at_once, x, timestep, conditioning)

    def predict_at_once(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        given, dtype = conditioning.expand(len(x)), self.precision.given(Network.UNET)
        self.forwards += len(x) * denoising.cost(given, self.placement.recomputes)
        self.placement.bring(Network.UNET)
        inputs, added = self._with_extra_channels(x).to(dtype), self.added(x, given.pooled)
        with self.precision.of(Network.UNET):
            out = self.parts.unet(inputs, timestep, given.hidden.to(dtype), **added, return_dict=False)[0].float()
        if self.parts.prediction == "epsilon":
            return out
        return denoising.noise_of_velocity(out, x.float(), self._alphas_cumprod[timestep.long()].float())

    def added(self, x: Tensor, pooled: Tensor | None) -> dict[str, Any]:
        """SDXL's pooled vector and sizes: the picture's, no crop, and the picture's again, each (height, width)."""
        if pooled is None:
            return {}
        height, width = (side * self.info.latent_scale for side in x.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=x.device).expand(len(x), -1)
        dtype, unet = self.precision.given(Network.UNET), self.parts.unet
        pooled = pooled.to(dtype)
        if unet.config.addition_embed_type == "text_time":
            return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        # diffusers reads single files of other widths than SDXL's own as a network with a projected class label.
        each = (unet.config.projection_class_embeddings_input_dim - pooled.shape[1]) // sizes.shape[1]
        angles = get_timestep_embedding(sizes.flatten(), each, flip_sin_to_cos=True, downscale_freq_shift=0)
        return {"class_labels": torch.cat([pooled, angles.view(len(x), -1).to(dtype)], dim=1)}

    @torch.no_grad()
    def _with_extra_channels(self, x: Tensor) -> Tensor:
        """Latents with what txt2img feeds into the other channels an inpainting or instruct checkpoint takes.

        Inpainting: everything is masked, over a grey picture. Instruct: no picture, which it is trained with zeros for.
        """
        if not self._missing:
            return x
        shape = (self._missing, *x.shape[-2:])
        if shape not in self._extra:
            extra = x.new_zeros(1, *shape)
            if self._missing > x.shape[1]:
                vae, side = self.parts.vae, self.info.latent_scale
                self.placement.bring(Network.VAE)
                grey = torch.zeros(1, vae.config.in_channels, *(side * n for n in shape[1:]), device=x.device)
                latent = vae.encode(grey.to(vae.dtype)).latent_dist.mode() * vae.config.scaling_factor
                extra = torch.cat([torch.ones_like(extra[:, :1]), latent.to(x)], dim=1)
            self._extra[shape] = extra
        return torch.cat([x, self._extra[shape].expand(len(x), -1, -1, -1)], dim=1)

    def sensitivity(self, x: Tensor, timestep: Tensor, conditioning: Conditioning, probe: Tensor) -> Sensitivity:
        return denoising.sensitivity(self.parts.unet, self.predict_noise, x, timestep, conditioning, probe)

    def sample(
        self,
        noise: Tensor,
        guidance: Sequence[StepConditioning],
        cfg_scale: float,
        *,
        offset: float = 0.0,
        watch: Watch | None = None,
        watch_negative: Watch | None = None,
    ) -> Iterator[int | Trajectory]:
        unet, watched = self.parts.unet, watch is not None or watch_negative is not None
        predict = self.predict_at_once if watched else self.predict_noise
        return denoising.sample(
            predict, self._alphas_cumprod, noise.to(self.device).float(), guidance, cfg_scale, offset=offset,
            watch_positive=lambda step: denoising.watching(unet, watch, step),
            watch_negative=lambda step: denoising.watching(unet, watch_negative, step),
        )  # fmt: skip

    def cross_attention(self) -> list[CrossAttentionLayer]:
        def call(module: nn.Module) -> CrossAttentionLayer:
            def layer(hidden: Tensor, context: Tensor) -> Tensor:
                self.placement.bring(Network.ATTENTION)
                with self.precision.of(Network.UNET):
                    return module(hidden, encoder_hidden_states=context.to(hidden.dtype)).float()

            return layer

        return [call(module) for module in denoising.attention_modules(self.parts.unet)]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        self.placement.bring(Network.VAE)
        pictures = [self._decoded(z[None]) for z in latents]
        if not torch.cat(pictures).isfinite().all() and self.widen(Network.VAE):
            return self.decode(latents)
        return (torch.cat(pictures).cpu() / 2 + 0.5).clamp(0, 1)

    def _decoded(self, z: Tensor) -> Tensor:
        vae = self.parts.vae
        with self.precision.of(Network.VAE):
            z = z.to(self.precision.given(Network.VAE)) / vae.config.scaling_factor
            return vae.decode(z, return_dict=False)[0].float()


def _stored_embeddings(folder: Path | None, unknown: Collection[str]) -> dict[str, Vectors]:
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
