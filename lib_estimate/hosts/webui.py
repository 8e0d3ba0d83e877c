"""The host inside AUTOMATIC1111's webui: its loaded checkpoint, its parser, its text encoder, its U-Net.

Leans on, as read in 1.10.1 (82a973c0): `prompt_parser.get_multicond_prompt_list` and
`get_learned_conditioning_prompt_schedules`; of each text encoder (`cond_stage_model`, or for SDXL its `embedders`)
`tokenize_line`, `process_tokens`, `empty_chunk` and `tokenize`; `EmbeddingsWithFixes` (the token table, known by its
`textual_inversion_key`) and `hijack.fixes`; `embedding_db.register_embedding_by_name`, `word_embeddings` and
`skipped_embeddings`; `sd_model.apply_model`, `alphas_cumprod`, `parameterization`;
`processing.txt2img_image_conditioning` and `decode_latent_batch`; `devices.autocast`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from modules import call_queue, devices, extra_networks, processing, prompt_parser, sd_hijack, shared
from torch import Tensor, nn

from lib_estimate.errors import ModelError, PromptSyntaxError
from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts import denoising
from lib_estimate.hosts.base import (
    FIRST_WORD_ID,
    PLACEHOLDER,
    Conditioning,
    CrossAttentionLayer,
    ModelInfo,
    PromptPart,
    Sensitivity,
    StepConditioning,
    Token,
    Trajectory,
    Watch,
    foreign_embedding,
)
from lib_estimate.hosts.layouts import LAYOUTS
from lib_estimate.hosts.placement import Placed, Placement
from lib_estimate.hosts.webui_model import engines_of, frozen, usable_model
from lib_estimate.request import Offload

MOST_BATCHES = 64


class WebuiHost:
    """The webui's model on loan. `locked`: whether the caller holds the webui's queue lock already."""

    def __init__(self, *, locked: bool) -> None:
        self.locked = locked

    @contextmanager
    def session(self) -> Iterator[WebuiSession]:
        if not self.locked:
            with call_queue.queue_lock:
                yield from self._session()
            return
        yield from self._session()

    def _session(self) -> Iterator[WebuiSession]:
        model = usable_model()
        with frozen(model):
            session = WebuiSession(model)
            try:
                yield session
            finally:
                session.close()


class WebuiSession(Placed):
    """See `base.Session`."""

    placeholder = PLACEHOLDER

    def __init__(self, model: Any) -> None:
        self.model, self.engines = model, engines_of(model)
        self.encoder = next(iter(self.engines.values())).encoder  # whose reading of a text is shown
        self.unet: nn.Module = model.model.diffusion_model
        self.info = self._info()
        self._embeddings = sd_hijack.model_hijack.embedding_db
        self._placed = SimpleNamespace(name=PLACEHOLDER, vectors=0, vec=None, shorthash=None)
        self._batches: dict[tuple, list[dict[str, list[Any]]]] = {}
        self._image_conditionings: dict[tuple[int, ...], Tensor] = {}
        self._told_sizes: dict[tuple[int, ...], Tensor] = {}
        self._recomputed: denoising.Recomputed | None = None
        self.placement = Placement([], self.unet, nn.Module(), devices.device, Offload.OFF)  # moves nothing yet
        self.forwards = 0

    def _info(self) -> ModelInfo:
        model, checkpoint = self.model, self.model.sd_checkpoint_info
        scale = 2 ** (len(model.first_stage_model.encoder.down) - 1)
        return ModelInfo(
            name=checkpoint.model_name,
            hash=checkpoint.shorthash,
            widths={key: engine.table.shape[1] for key, engine in self.engines.items()},
            chunk_length=self.encoder.chunk_length,
            latent_channels=self.unet.out_channels,
            latent_scale=scale,
            default_size=int(getattr(model, "image_size", LAYOUTS["sdxl"]["image_size"])) * scale,
            device=devices.device,
            dtype=devices.dtype_unet,
        )

    def close(self) -> None:
        sd_hijack.model_hijack.fixes = None
        self._batches.clear()
        if self._recomputed is not None:
            self._recomputed.restore()

    def save_memory(self) -> bool:
        if self._recomputed is not None:
            return False
        self._recomputed = denoising.Recomputed(self.unet)
        return True

    # ---- text ----

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
        except ValueError as error:
            raise PromptSyntaxError(f"The webui can't read the prompt {prompt!r}: {error}.") from error
        rows = (tuple((int(until), text) for until, text in schedule) for schedule in schedules)
        return [PromptPart(float(w), row) for w, row in zip(weights, rows, strict=True)]

    def notes(self, prompt: str) -> list[str]:
        _, found = extra_networks.parse_prompt(prompt)
        tags = [f"<{name}:{':'.join(p.items)}>" for name, entries in found.items() for p in entries]
        notes = [f"{tag} is left out: an embedding can't carry it. Write it beside the word." for tag in tags]
        skipped = self._embeddings.skipped_embeddings
        return notes + [
            foreign_embedding(name, _widths(skipped[name].vec), self.info.widths.values())
            for name in skipped
            if self._stands_in(name, prompt)
        ]

    def _stands_in(self, name: str, prompt: str) -> bool:
        wanted, ids = self.token_ids(name), self.token_ids(prompt)
        return any(ids[at : at + len(wanted)] == wanted for at in range(len(ids)))

    def tokens(self, text: str) -> list[list[Token]]:
        return [self._chunk_tokens(chunk) for chunk in self._chunks(self.encoder, text)]

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
        encoder, table = self.engines[key]
        rows = [torch.zeros(0, table.shape[1], device=devices.device)]
        for chunk in self._chunks(encoder, text):
            for token, embedding, _ in self._pieces(chunk):
                row = table[token][None] if embedding is None else _of(embedding, key)
                rows.append(row.to(devices.device).float())
        return torch.cat(rows).detach().clone()

    def end_vectors(self) -> Vectors:
        return {key: table[encoder.id_end][None].detach().float() for key, (encoder, table) in self.engines.items()}

    def table_norm(self) -> dict[str, float]:
        return {key: table.detach().float().norm(dim=1).median().item() for key, (_, table) in self.engines.items()}

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
            per_encoder = {
                name: [self._chunks(encoder, text, count) for text in texts]
                for name, (encoder, _) in self.engines.items()
            }
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

    def _chunks(self, encoder: Any, text: str, count: int = 0) -> list[Any]:
        """The webui's own chunks of a text, with `count` learnt vectors where the placeholder stands."""
        self._placed.vectors = count
        if count:
            self._embeddings.register_embedding_by_name(self._placed, self.model, PLACEHOLDER)
        try:
            chunks, _ = encoder.tokenize_line(text)
        except ValueError as error:  # such as (a:1.5.2)
            raise PromptSyntaxError(f"The webui can't read the prompt {text!r}: {error}.") from error
        finally:
            if count:
                self._embeddings.register_embedding_by_name(None, self.model, PLACEHOLDER)
        return chunks

    def _encode_column(
        self, column: Mapping[str, list[Any]], weighted: bool, together: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One chunk of each text -> hidden states `[B, T, C]` with the webui's emphasis, and `[B, P]` pooled."""
        encoded = [
            self._encode_chunks(self.engines[key].encoder, chunks, weighted, together) for key, chunks in column.items()
        ]
        pooled = next((pooled for _, pooled in encoded if pooled is not None), None)
        return torch.cat([hidden for hidden, _ in encoded], dim=2), pooled

    def _encode_chunks(
        self, encoder: Any, chunks: list[Any], weighted: bool, together: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The webui normalises all texts of one call as one, so texts of their own are encoded one by one where a
        weight makes that matter."""
        plain = all(weight == 1.0 for chunk in chunks for weight in chunk.multipliers)
        if together or plain or not weighted:
            return self._process(encoder, chunks, weighted)
        hidden, pooled = zip(*(self._process(encoder, [chunk], weighted) for chunk in chunks), strict=True)
        return torch.cat(hidden), None if pooled[0] is None else torch.cat(pooled)

    def _process(self, encoder: Any, chunks: list[Any], weighted: bool) -> tuple[Tensor, Tensor | None]:
        weights = [c.multipliers if weighted else [1.0] * len(c.multipliers) for c in chunks]
        encoder.hijack.fixes = [chunk.fixes for chunk in chunks]
        with devices.autocast():
            z = encoder.process_tokens([chunk.tokens for chunk in chunks], weights)
        pooled = getattr(z, "pooled", None) if encoder.return_pooled else None
        return z.float(), None if pooled is None else pooled.float()

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

    # ---- pictures ----

    def predict_noise(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        given = self._given(x, conditioning.expand(len(x)))
        self.forwards += len(x) * denoising.cost(conditioning, self._recomputed is not None)
        with devices.autocast():
            out = self.model.apply_model(x.to(devices.dtype_unet), timestep, given).float()
        if self.model.parameterization != "v":
            return out
        return denoising.noise_of_velocity(out, x.float(), self._alphas_cumprod()[timestep.long()])

    def _given(self, x: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """What the webui's U-Net takes beside latents x: under the names of ldm, and for SDXL of sgm."""
        hidden, concat = conditioning.hidden.to(devices.dtype_unet), [self._image_conditioning(x)]
        if conditioning.pooled is None:
            return {"c_crossattn": [hidden], "c_concat": concat}
        sizes = self._sizes(x).expand(len(x), -1)
        vector = torch.cat([conditioning.pooled, sizes], dim=1).to(devices.dtype_unet)
        return {"crossattn": hidden, "vector": vector, "c_concat": concat}

    @torch.no_grad()
    def _sizes(self, x: Tensor) -> Tensor:
        """`[1, S]`, what SDXL is told of the picture's size and of what was cut off, by the webui's own embedders."""
        shape = tuple(x.shape[-2:])
        if shape in self._told_sizes:
            return self._told_sizes[shape]
        size = [side * self.info.latent_scale for side in x.shape[-2:]]
        told = {
            "original_size_as_tuple": size,
            "crop_coords_top_left": [shared.opts.sdxl_crop_top, shared.opts.sdxl_crop_left],
            "target_size_as_tuple": size,
        }
        embedders = [e for e in self.model.conditioner.embedders if e.input_key in told]
        rows = [e(torch.tensor([told[e.input_key]], device=x.device, dtype=devices.dtype)) for e in embedders]
        self._told_sizes[shape] = torch.cat(rows, dim=1).float()
        return self._told_sizes[shape]

    @torch.no_grad()
    def _image_conditioning(self, x: Tensor) -> Tensor:
        """What txt2img feeds into the extra channels of inpainting checkpoints; a dummy for all others.

        The webui draws it from what its VAE makes of a grey picture; here it is the same draw each time. For
        instruct-pix2pix its txt2img has nothing that fits: no picture, which it is trained with zeros for.
        """
        shape = tuple(x.shape[1:])
        if shape not in self._image_conditionings:
            height, width = (side * self.info.latent_scale for side in x.shape[-2:])
            if getattr(self.model, "cond_stage_key", None) == "edit":
                made = torch.zeros_like(x[:1])
            else:
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    made = processing.txt2img_image_conditioning(self.model, x[:1].detach(), width, height)
            self._image_conditionings[shape] = made.to(devices.dtype_unet)
        made = self._image_conditionings[shape]
        return made.expand(len(x), *made.shape[1:])

    def _alphas_cumprod(self) -> Tensor:
        return self.model.alphas_cumprod.to(devices.device, torch.float32)

    def sensitivity(self, x: Tensor, timestep: Tensor, conditioning: Conditioning, probe: Tensor) -> Sensitivity:
        return denoising.sensitivity(self.unet, self.predict_noise, x, timestep, conditioning, probe)

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
        return denoising.sample(
            self.predict_noise, self._alphas_cumprod(), noise.to(devices.device).float(), guidance, cfg_scale,
            offset=offset,
            watch_positive=lambda step: denoising.watching(self.unet, None if watch_negative else watch, step),
            watch_negative=lambda step: denoising.watching(self.unet, watch if watch_negative else None, step),
        )  # fmt: skip

    def cross_attention(self) -> list[CrossAttentionLayer]:
        def call(module: nn.Module) -> CrossAttentionLayer:
            def layer(hidden: Tensor, context: Tensor) -> Tensor:
                with devices.autocast():
                    return module(hidden, context=context.to(devices.dtype_unet)).float()

            return layer

        return [call(module) for module in denoising.attention_modules(self.unet)]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        with devices.autocast():
            pictures = processing.decode_latent_batch(self.model, latents, target_device=devices.cpu)
        return (torch.stack(list(pictures)).float() / 2 + 0.5).clamp(0, 1)


def _of(embedding: Any, key: str) -> Tensor:
    """A loaded embedding's vectors `[N, C]` for one encoder."""
    return embedding.vec[key] if isinstance(embedding.vec, dict) else embedding.vec


def _widths(vec: Tensor | Mapping[str, Tensor]) -> list[int]:
    return [rows.shape[1] for rows in (vec.values() if isinstance(vec, Mapping) else [vec])]
