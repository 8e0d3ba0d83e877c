"""A stand-in for the names of the webui that lib_estimate and the checks touch, over the small model.

For where there is no webui: `install()` puts `modules` and its parts into `sys.modules` of this process. It behaves
like the webui where the checks look, and nowhere else. What is here is named as in the webui and listed in STANDS_FOR;
with WEBUI_ROOT a test compares names, attributes and parameters with the real ones. Only what has no annotated
parameters is compared by them: the rest is put together in another way here.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.embeddings import get_timestep_embedding
from PIL import Image
from torch import nn

from lib_estimate.errors import PromptSyntaxError
from lib_estimate.files import reading
from lib_estimate.hosts import checkpoint
from lib_estimate.hosts.text_encoder import TextEncoder
from lib_estimate.prompt import attention, chunks, schedule

# ---- textual_inversion, sd_hijack ---------------------------------------------------------------------------------


class Embedding:
    """An embedding that prompts can name."""

    def __init__(self, vec, name):
        rows = next(iter(vec.values())) if isinstance(vec, dict) else vec
        self.vec, self.name, self.vectors, self.shorthash = vec, name, len(rows), None


class EmbeddingDatabase:
    """Embeddings by the ids of their names."""

    def __init__(self) -> None:
        self.ids_lookup: dict[int, list] = {}
        self.word_embeddings: dict[str, Any] = {}
        self.skipped_embeddings: dict[str, Any] = {}

    def register_embedding_by_name(self, embedding, model, name):
        ids = model.cond_stage_model.tokenize([name])[0]
        others = [row for row in self.ids_lookup.pop(ids[0], []) if row[1].name != name]
        self.word_embeddings.pop(name, None)
        if embedding is not None:
            others.append((ids, embedding))
            self.word_embeddings[name] = embedding
        if others:
            self.ids_lookup[ids[0]] = sorted(others, key=lambda row: len(row[0]), reverse=True)

    def load_textual_inversion_embeddings(self, force_reload=False):
        self.ids_lookup.clear()
        self.word_embeddings.clear()
        self.skipped_embeddings.clear()
        needed = [encoder._encoder.width for encoder in shared.sd_model._texts]
        for path in sorted(Path(shared.cmd_opts.embeddings_dir).rglob("*.*")):
            if path.suffix not in (".pt", ".safetensors"):
                continue
            vectors = reading.load(path).vectors
            made = Embedding(vectors if len(vectors) > 1 else next(iter(vectors.values())), path.stem)
            if [rows.shape[1] for rows in vectors.values()] == needed:
                self.register_embedding_by_name(made, shared.sd_model, path.stem)
            else:
                self.skipped_embeddings[path.stem] = made

    def find_embedding_at_position(self, tokens, offset):
        for ids, embedding in self.ids_lookup.get(tokens[offset], []):
            if list(tokens[offset : offset + len(ids)]) == ids:
                return embedding, len(ids)
        return None, None


class EmbeddingsWithFixes(nn.Module):
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


class SdOptimization:
    """A way to compute attention; here one of diffusers'."""

    def __init__(self, name: str, processor: type) -> None:
        self.name, self._processor = name, processor

    def title(self):
        return self.name

    def apply(self):
        shared.sd_model.model.diffusion_model.set_attn_processor(self._processor())


optimizers = [SdOptimization("sdp", AttnProcessor2_0), SdOptimization("plain", AttnProcessor)]


class StableDiffusionModelHijack:
    """What the webui has put into the model."""

    fixes = None

    def __init__(self):
        self.embedding_db, self.comments, self.extra_generation_params = EmbeddingDatabase(), [], {}

    def apply_optimizations(self, option=None):
        next((each for each in optimizers if each.title() == option), optimizers[0]).apply()


# ---- sd_hijack_clip, sd_models_types ------------------------------------------------------------------------------


class PromptChunkFix(NamedTuple):
    """Where in a chunk an embedding stands."""

    offset: int
    embedding: Any


class PromptChunk:
    """As much of a prompt as the text encoder takes."""

    def __init__(self, tokens: tuple[int, ...], multipliers: tuple[float, ...], fixes: list[PromptChunkFix]) -> None:
        self.tokens, self.multipliers, self.fixes = list(tokens), list(multipliers), fixes


class FrozenCLIPEmbedderWithCustomWords(nn.Module):
    """One of the webui's text encoders: chunks, embeddings, emphasis."""

    input_key = "txt"

    def __init__(self, parts: checkpoint.Components, encoder: TextEncoder, hijack: Any) -> None:
        super().__init__()
        self.hijack, self.tokenizer, self._model, self._encoder = hijack, parts.tokenizer, encoder.model, encoder
        self.id_start, self.id_end = parts.tokenizer.bos_token_id, parts.tokenizer.eos_token_id
        self.chunk_length, self.return_pooled = encoder.places - 2, encoder.pooled
        embeddings = getattr(encoder.model, "text_model", encoder.model).embeddings
        embeddings.token_embedding = EmbeddingsWithFixes(embeddings.token_embedding, hijack, encoder.key)
        self._vocabulary = chunks.Vocabulary(
            encode=lambda text: self.tokenize([text])[0], start=self.id_start, end=self.id_end, pad=self.id_end,
            comma=self.tokenize([","])[0][0], chunk_length=self.chunk_length,
        )  # fmt: skip

    def tokenize(self, texts):
        return self.tokenizer(list(texts), truncation=False, add_special_tokens=False)["input_ids"]

    def empty_chunk(self):
        return self.tokenize_line("")[0][0]

    def tokenize_line(self, line):
        database = self.hijack.embedding_db

        def find(tokens, position):
            embedding, length = database.find_embedding_at_position(list(tokens), position)
            return None if embedding is None else (embedding.name, length, embedding.vectors)

        try:
            found, count = chunks.chunks(line, self._vocabulary, find, emphasis=shared.opts.emphasis != "None")
        except PromptSyntaxError as error:
            raise ValueError(str(error)) from error
        return [self._chunk(chunk, database) for chunk in found], count

    def _chunk(self, chunk: chunks.Chunk, database: EmbeddingDatabase) -> PromptChunk:
        fixes = [PromptChunkFix(placed.offset - 1, database.word_embeddings[placed.name]) for placed in chunk.placed]
        return PromptChunk(chunk.tokens, chunk.weights, fixes)

    def process_tokens(self, remade_batch_tokens, batch_multipliers):
        skips = self._encoder.clip_skip or (shared.opts.sdxl_clip_l_skip and not self._encoder.pooled)
        layer = shared.opts.CLIP_stop_at_last_layers if skips else self._encoder.layer
        z, pooled = self._encoder.states(torch.tensor(remade_batch_tokens), self.id_end, (), layer)
        z = attention.apply_emphasis(z, torch.tensor(batch_multipliers), shared.opts.emphasis)
        z.pooled = pooled
        return z

    def forward(self, texts):
        per_text = [self.tokenize_line(text)[0] for text in texts]
        columns = []
        for k in range(max(map(len, per_text))):
            column = [chunks[k] if k < len(chunks) else self.empty_chunk() for chunks in per_text]
            self.hijack.fixes = [chunk.fixes for chunk in column]
            columns.append(self.process_tokens([c.tokens for c in column], [c.multipliers for c in column]))
        return (torch.hstack(columns), columns[0].pooled) if self.return_pooled else torch.hstack(columns)


class _Sizes(nn.Module):
    """What tells SDXL one pair of sizes."""

    def __init__(self, input_key: str, channels: int) -> None:
        super().__init__()
        self.input_key, self._channels = input_key, channels

    def forward(self, pairs):
        angles = get_timestep_embedding(pairs.flatten(), self._channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        return angles.view(len(pairs), -1)


class _Conditioner(nn.Module):
    """SDXL's text encoders and what tells it sizes."""

    def __init__(self, encoders: list[FrozenCLIPEmbedderWithCustomWords], unet: nn.Module) -> None:
        super().__init__()
        sizes = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
        channels = unet.config.addition_time_embed_dim
        self.embedders = nn.ModuleList([*encoders, *(_Sizes(key, channels) for key in sizes)])

    def tokenize(self, texts):
        return self.embedders[0].tokenize(texts)

    def tokenize_line(self, line):
        return self.embedders[0].tokenize_line(line)

    def forward(self, texts):
        size, crop = [texts.height, texts.width], [shared.opts.sdxl_crop_top, shared.opts.sdxl_crop_left]
        (first, (second, pooled)), sizes = (e(texts) for e in self.embedders[:2]), self.embedders[2:]
        hidden = torch.cat([first, second], dim=2)
        if texts.is_negative_prompt and not any(texts):
            hidden, pooled = torch.zeros_like(hidden), torch.zeros_like(pooled)
        pairs = [torch.tensor([pair] * len(texts)) for pair in (size, crop, size)]
        vector = torch.cat([pooled, *(embed(pair) for embed, pair in zip(sizes, pairs, strict=True))], dim=1)
        return {"crossattn": hidden, "vector": vector}


class _CrossAttention(nn.Module):
    """diffusers' layer, called as the webui's U-Net calls its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, context=None, mask=None, encoder_hidden_states=None, **others):
        return self.inner(x, encoder_hidden_states=encoder_hidden_states if context is None else context)


class WebuiSdModel(nn.Module):
    """A loaded checkpoint."""

    is_sd3, lowvram = False, False

    def __init__(self, parts: checkpoint.Components, hijack: Any) -> None:
        super().__init__()
        self._texts = [FrozenCLIPEmbedderWithCustomWords(parts, encoder, hijack) for encoder in parts.text_encoders]
        self.is_sdxl = len(self._texts) > 1
        if self.is_sdxl:
            self.conditioner = _Conditioner(self._texts, parts.unet)
        self.cond_stage_model = self.conditioner if self.is_sdxl else self._texts[0]
        self.parameterization = "v" if parts.prediction == "v_prediction" else "eps"
        self.model = nn.Module()
        self.model.diffusion_model, self._vae = parts.unet, parts.vae
        parts.unet.out_channels = parts.unet.config.out_channels
        for block in [m for m in parts.unet.modules() if getattr(m, "attn2", None) is not None]:
            block.attn2 = _CrossAttention(block.attn2)
        levels = len(parts.vae.config.block_out_channels)
        self.first_stage_model = nn.Module()
        self.first_stage_model.encoder = SimpleNamespace(down=[None] * levels)
        self.image_size = parts.default_size // 2 ** (levels - 1)
        self.alphas_cumprod = parts.alphas_cumprod
        self.sd_checkpoint_info = SimpleNamespace(model_name=parts.name, shorthash=parts.hash)

    def get_learned_conditioning(self, c):
        return self.cond_stage_model(c)

    def apply_model(self, x_noisy, t, cond):
        unet = self.model.diffusion_model
        if not self.is_sdxl:
            return unet(x_noisy, t, torch.cat(cond["c_crossattn"], 1), return_dict=False)[0]
        # diffusers' U-Net encodes the sizes itself; here they are encoded already, as in the webui.
        added = unet.add_embedding(cond["vector"])
        with _instead(unet, "get_aug_embed", lambda emb, encoder_hidden_states, added_cond_kwargs: added):
            return unet(x_noisy, t, cond["crossattn"], return_dict=False)[0]


@contextlib.contextmanager
def _instead(owner: Any, name: str, value: Any):
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)


# ---- prompt_parser ------------------------------------------------------------------------------------------------


class SdConditioning(list):
    """Prompts of a batch."""

    def __init__(self, prompts, is_negative_prompt=False, width=None, height=None, copy_from=None):
        super().__init__(prompts)
        self.is_negative_prompt, self.width, self.height = is_negative_prompt, width, height
        if copy_from is not None:
            self.__dict__.update(copy_from.__dict__)


class ScheduledPromptConditioning(NamedTuple):
    """What a prompt is encoded to, and until which step."""

    end_at_step: int
    cond: torch.Tensor


class MulticondLearnedConditioning:
    """The encoded parts of prompts with AND."""

    def __init__(self, batch: list) -> None:
        self.batch = batch


def get_learned_conditioning_prompt_schedules(prompts, base_steps, hires_steps=None, use_old_scheduling=False):
    try:
        return [[list(row) for row in schedule.prompt_schedule(prompt, base_steps)] for prompt in prompts]
    except PromptSyntaxError as error:
        raise ValueError(str(error)) from error


def get_multicond_prompt_list(prompts):
    flat, indexes = [], []
    for prompt in prompts:
        parts = schedule.split_and(prompt)
        indexes.append([(len(flat) + i, weight) for i, (_, weight) in enumerate(parts)])
        flat += [text for text, _ in parts]
    return indexes, flat, {text: i for i, text in enumerate(flat)}


def get_learned_conditioning(model, prompts, steps, hires_steps=None, use_old_scheduling=False):
    out = []
    for changes in get_learned_conditioning_prompt_schedules(prompts, steps):
        conds = model.get_learned_conditioning(SdConditioning([text for _, text in changes], copy_from=prompts))
        out.append([ScheduledPromptConditioning(end, _row(conds, i)) for i, (end, _) in enumerate(changes)])
    return out


def get_multicond_learned_conditioning(model, prompts, steps, hires_steps=None, use_old_scheduling=False):
    indexes, flat, _ = get_multicond_prompt_list(prompts)
    learned = get_learned_conditioning(model, SdConditioning(flat, copy_from=prompts), steps)
    return MulticondLearnedConditioning([[(learned[i], weight) for i, weight in parts] for parts in indexes])


def _at(schedule, step):
    return next(entry.cond for entry in schedule if step <= entry.end_at_step)


def _row(conds, index):
    return {key: rows[index] for key, rows in conds.items()} if isinstance(conds, dict) else conds[index]


def _stacked(rows):
    if isinstance(rows[0], dict):
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return torch.stack(rows)


def reconstruct_cond_batch(c, current_step):
    return _stacked([_at(schedule, current_step) for schedule in c])


def reconstruct_multicond_batch(c, current_step):
    conds, tensors = [], []
    for parts in c.batch:
        conds.append([(len(tensors) + i, weight) for i, (_, weight) in enumerate(parts)])
        tensors += [_at(schedule, current_step) for schedule, _ in parts]
    return conds, _stacked(tensors)


# ---- processing ---------------------------------------------------------------------------------------------------


class StableDiffusionProcessing:
    """One generation, and what the last ones were encoded to."""

    cached_c = [None, None]  # noqa: RUF012 (shared on purpose, as the webui's)
    cached_uc = [None, None]  # noqa: RUF012

    def __init__(self, **given: Any) -> None:
        self.__dict__.update(given)


class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    """One generation from text."""


class Processed:
    """What a generation gives."""

    def __init__(self, images: list) -> None:
        self.images = images


def txt2img_image_conditioning(sd_model, x, width, height):
    return x.new_zeros(x.shape[0], 5, 1, 1)


@torch.no_grad()
def decode_latent_batch(model, batch, target_device=None, check_for_nans=False):
    return [model._vae.decode(z[None] / model._vae.config.scaling_factor, return_dict=False)[0][0] for z in batch]


def _named(conds):
    return conds if isinstance(conds, dict) else {"c_crossattn": [conds]}


@torch.no_grad()
def process_images(p):
    """A few steps of DDIM under CFG; encoded prompts come out of the cache, which goes by their text."""
    model = p.sd_model
    for cache, text in ((p.cached_c, p.prompt), (p.cached_uc, p.negative_prompt)):
        if cache[0] != text:
            given = SdConditioning([text], cache is p.cached_uc, p.width, p.height)
            cache[:] = [text, get_learned_conditioning(model, given, p.steps)]
    side = p.height // 2 ** (len(model.first_stage_model.encoder.down) - 1)
    shape = (1, model.model.diffusion_model.out_channels, side, side)
    x, apart = torch.randn(shape, generator=torch.Generator().manual_seed(p.seed)), 1000 // p.steps
    for step in range(p.steps):
        t = 1 + apart * (p.steps - 1 - step)
        eps = [
            model.apply_model(x, torch.tensor([t]), _named(reconstruct_cond_batch(cache[1], step)))
            for cache in (p.cached_uc, p.cached_c)
        ]
        guided = eps[0] + p.cfg_scale * (eps[1] - eps[0])
        a, b = (model.alphas_cumprod[i].float() for i in (t, max(t - apart, 0)))
        x = b.sqrt() * (x - (1 - a).sqrt() * guided) / a.sqrt() + (1 - b).sqrt() * guided
    (picture,) = decode_latent_batch(model, x)
    array = ((picture / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy().astype(np.uint8)
    return Processed([Image.fromarray(array)])


# ---- the rest -----------------------------------------------------------------------------------------------------


class OptionInfo:
    """An option of the settings page."""

    def __init__(self, default=None, label="", component=None, component_args=None):
        self.default, self.section = default, None


class Options:
    """Options, with their values in `data` as in the webui."""

    def __init__(self, **values: Any) -> None:
        self.__dict__["data"] = values

    def add_option(self, key, info):
        self.data.setdefault(key, info.default)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.data[name] = value


class State:
    """How far the running job is."""

    interrupted = stopping_generation = False
    job, textinfo, current_image = "", None, None
    job_count = job_no = sampling_step = sampling_steps = 0

    def begin(self, job="(unknown)"):
        self.job = job

    def end(self):
        self.job = ""

    def assign_current_image(self, image):
        self.current_image = image


class ExtraNetworkParams:
    """What is written in a tag."""

    def __init__(self, items=None):
        self.items = items


def parse_prompt(prompt):
    text, tags = schedule.extra_network_tags(prompt)
    found: dict[str, list] = {}
    for tag in tags:
        kind, *items = tag.strip("<>").split(":")
        found.setdefault(kind, []).append(ExtraNetworkParams(items))
    return text, found


def autocast(disable=False):
    return contextlib.nullcontext()


def send_everything_to_cpu():
    lowvram = sys.modules["modules.lowvram"]
    if lowvram.module_in_gpu is not None:
        lowvram.module_in_gpu.to(torch.device("cpu"))
    lowvram.module_in_gpu = None


def wrap_gradio_gpu_call(func, extra_outputs=None):
    return func


def restore_progress(id_task):
    return None


def update_token_counter(text, steps, styles, *, is_positive=True):
    count = shared.sd_model.cond_stage_model.tokenize_line(text)[1]
    return f"<span>{count}/75</span>"


# ---- in place -----------------------------------------------------------------------------------------------------

shared = ModuleType("modules.shared")
OPTIONS = {
    "emphasis": "Original", "use_old_emphasis_implementation": False, "CLIP_stop_at_last_layers": 1,
    "sdxl_clip_l_skip": False, "sdxl_crop_top": 0, "sdxl_crop_left": 0,
}  # fmt: skip
VALUES: dict[str, dict[str, Any]] = {  # file of the webui -> names in it
    "modules/call_queue.py": {"queue_lock": threading.Lock()},
    "modules/devices.py": {
        "device": torch.device("cpu"), "cpu": torch.device("cpu"), "dtype": torch.float32, "dtype_unet": torch.float32,
        "fp8": False,
    },
    "modules/lowvram.py": {"module_in_gpu": None},
    "modules/sd_hijack.py": {"model_hijack": StableDiffusionModelHijack(), "optimizers": optimizers},
    "modules/sd_unet.py": {"current_unet": None},
}  # fmt: skip
STANDS_FOR: dict[str, tuple[Any, ...]] = {  # file of the webui -> classes and functions in it
    "modules/call_queue.py": (wrap_gradio_gpu_call,),
    "modules/devices.py": (autocast,),
    "modules/extra_networks.py": (ExtraNetworkParams, parse_prompt),
    "modules/lowvram.py": (send_everything_to_cpu,),
    "modules/options.py": (OptionInfo, Options),
    "modules/processing.py": (
        StableDiffusionProcessing, StableDiffusionProcessingTxt2Img, Processed, txt2img_image_conditioning,
        decode_latent_batch, process_images,
    ),
    "modules/progress.py": (restore_progress,),
    "modules/prompt_parser.py": (
        SdConditioning, ScheduledPromptConditioning, MulticondLearnedConditioning, get_multicond_prompt_list,
        get_learned_conditioning_prompt_schedules, get_learned_conditioning, get_multicond_learned_conditioning,
        reconstruct_cond_batch, reconstruct_multicond_batch,
    ),
    "modules/sd_hijack.py": (EmbeddingsWithFixes, StableDiffusionModelHijack),
    "modules/sd_hijack_clip.py": (PromptChunk, PromptChunkFix, FrozenCLIPEmbedderWithCustomWords),
    "modules/sd_hijack_optimizations.py": (SdOptimization,),
    "modules/sd_models_types.py": (WebuiSdModel,),
    "modules/sd_unet.py": (),
    "modules/shared_state.py": (State,),
    "modules/textual_inversion/textual_inversion.py": (Embedding, EmbeddingDatabase),
    "modules/ui.py": (update_token_counter,),
}  # fmt: skip


def install(model: Path) -> None:
    """Makes `import modules` and what is below it work in this process, with a model loaded."""
    package = sys.modules["modules"] = ModuleType("modules")
    sys.modules["modules.shared"] = package.shared = shared
    for file, members in STANDS_FOR.items():
        name = Path(file).stem
        made = sys.modules[f"modules.{name}"] = ModuleType(f"modules.{name}")
        made.__dict__.update({member.__name__: member for member in members}, **VALUES.get(file, {}))
        setattr(package, name, made)
    hijack = VALUES["modules/sd_hijack.py"]["model_hijack"]
    shared.prompt_styles = SimpleNamespace(styles={})
    shared.opts, shared.state = Options(**OPTIONS), State()
    shared.cmd_opts = SimpleNamespace(embeddings_dir=tempfile.mkdtemp())
    shared.sd_model = WebuiSdModel(checkpoint.load(model, torch.float32), hijack).eval()
    hijack.apply_optimizations()


def main() -> None:
    """Runs every check on the model of the first argument; one line of JSON each."""
    import json
    import traceback

    torch.set_num_threads(1)
    install(Path(sys.argv[1]))
    from lib_estimate.hosts import webui_shell
    from tests.webui import checks

    webui_shell.add_settings()
    for name in sys.argv[2:] or checks.CHECKS:
        try:
            result = {"name": name, "figures": checks.CHECKS[name]()}
        except Exception:  # noqa: BLE001 (whatever it was, the test shows it)
            result = {"name": name, "error": traceback.format_exc()}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
