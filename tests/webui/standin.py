"""A stand-in for AUTOMATIC1111's webui, over the small model; see standin_shared.py."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

from lib_estimate.hosts import checkpoint
from lib_estimate.hosts.text_encoder import TextEncoder
from lib_estimate.prompt import attention
from tests.webui import standin_lora, standin_model, standin_shared
from tests.webui.standin_model import Database, Embedding, PromptChunk, PromptChunkFix, Reader, TokenTable
from tests.webui.standin_shared import shared

# ---- textual_inversion, sd_hijack ---------------------------------------------------------------------------------


class EmbeddingDatabase(Database):
    """The embeddings, for all text encoders together."""

    def register_embedding_by_name(self, embedding, model, name):
        self._place(embedding, name, model.cond_stage_model.tokenize([name])[0])

    def load_textual_inversion_embeddings(self, force_reload=False):
        def place(made: Embedding) -> None:
            self.register_embedding_by_name(made, shared.sd_model, made.name)

        self._read(shared.cmd_opts.embeddings_dir, [each._encoder.width for each in shared.sd_model._texts], place)


class EmbeddingsWithFixes(TokenTable):
    """The token table, with embeddings put over its rows."""


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


class FrozenCLIPEmbedderWithCustomWords(Reader, nn.Module):
    """One of the webui's text encoders: chunks, embeddings, emphasis."""

    input_key = "txt"

    def __init__(self, parts: checkpoint.Components, encoder: TextEncoder, hijack: Any) -> None:
        super().__init__()
        self.hijack, self._model = hijack, encoder.model
        embeddings = getattr(encoder.model, "text_model", encoder.model).embeddings
        embeddings.token_embedding = EmbeddingsWithFixes(embeddings.token_embedding, hijack, encoder.key)
        self._learn_to_read(parts, encoder)

    def _database(self) -> EmbeddingDatabase:
        return self.hijack.embedding_db

    def _emphasis(self) -> str:
        return shared.opts.emphasis

    def process_tokens(self, remade_batch_tokens, batch_multipliers):
        skips = self._encoder.clip_skip or (shared.opts.sdxl_clip_l_skip and not self._encoder.pooled)
        layer = shared.opts.CLIP_stop_at_last_layers if skips else self._encoder.layer
        z, pooled = self._encoder.states(torch.tensor(remade_batch_tokens), self.id_end, (), layer)
        z = attention.apply_emphasis(z, torch.tensor(batch_multipliers), shared.opts.emphasis)
        z.pooled = pooled
        return z

    def forward(self, texts):
        encoded = []
        for column in self._columns(texts):
            self.hijack.fixes = [chunk.fixes for chunk in column]
            encoded.append(self.process_tokens([c.tokens for c in column], [c.multipliers for c in column]))
        return (torch.hstack(encoded), encoded[0].pooled) if self.return_pooled else torch.hstack(encoded)


class _Sizes(nn.Module):
    """What tells SDXL one pair of sizes."""

    def __init__(self, input_key: str, channels: int) -> None:
        super().__init__()
        self.input_key, self._channels = input_key, channels

    def forward(self, pairs):
        return standin_model.angles(pairs.flatten(), self._channels).view(len(pairs), -1)


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
        standin_model.blocks_called_as_ldm(parts.unet)
        levels = len(parts.vae.config.block_out_channels)
        self.first_stage_model = nn.Module()
        self.first_stage_model.encoder = SimpleNamespace(down=[None] * levels)
        self.image_size = parts.default_size // 2 ** (levels - 1)
        self.alphas_cumprod = parts.alphas_cumprod

    def get_learned_conditioning(self, c):
        return self.cond_stage_model(c)

    def apply_model(self, x_noisy, t, cond):
        context = cond["crossattn"] if self.is_sdxl else torch.cat(cond["c_crossattn"], 1)
        return standin_model.called_as_ldm(self.model.diffusion_model, x_noisy, t, context, cond.get("vector"))


# ---- processing, call_queue, ui -----------------------------------------------------------------------------------


@torch.no_grad()
def decode_latent_batch(model, batch, target_device=None, check_for_nans=False):
    return [model._vae.decode(z[None] / model._vae.config.scaling_factor, return_dict=False)[0][0] for z in batch]


def process_images(p):
    model = p.sd_model
    side = p.height // 2 ** (len(model.first_stage_model.encoder.down) - 1)

    def eps(x, t, cond):
        return model.apply_model(x, t, cond if isinstance(cond, dict) else {"c_crossattn": [cond]})

    standin_shared.activate(p, standin_shared.parse_prompt(p.prompt)[1])
    standin_shared.encode_prompts(p)
    shape = (1, model.model.diffusion_model.out_channels, side, side)
    return standin_shared.drawn(p, shape, model.alphas_cumprod, eps, lambda x: decode_latent_batch(model, x))


def send_everything_to_cpu():
    lowvram = sys.modules["modules.lowvram"]
    if lowvram.module_in_gpu is not None:
        lowvram.module_in_gpu.to(torch.device("cpu"))
    lowvram.module_in_gpu = None


def wrap_gradio_gpu_call(func, extra_outputs=None):
    return func


def update_token_counter(text, steps, styles, *, is_positive=True):
    count = shared.sd_model.cond_stage_model.tokenize_line(text)[1]
    return f"<span>{count}/75</span>"


def reload_model_weights(sd_model=None, info=None, forced_reload=False):
    """Loads the checkpoint, if it isn't loaded."""
    loaded = getattr(shared, "sd_model", None)
    if loaded is not None and loaded.sd_checkpoint_info.filename == info.filename:
        return
    hijack = VALUES["modules/sd_hijack.py"]["model_hijack"]
    shared.sd_model = WebuiSdModel(checkpoint.load(Path(info.filename), torch.float32), hijack).eval()
    shared.sd_model.sd_checkpoint_info = info
    hijack.apply_optimizations()
    standin_lora.install_in_layers(shared.sd_model.model.diffusion_model, [e._model for e in shared.sd_model._texts])
    hijack.embedding_db.load_textual_inversion_embeddings()


# ---- in place -----------------------------------------------------------------------------------------------------

OPTIONS = {
    "emphasis": "Original", "use_old_emphasis_implementation": False, "CLIP_stop_at_last_layers": 1,
    "sdxl_clip_l_skip": False, "sdxl_crop_top": 0, "sdxl_crop_left": 0,
}  # fmt: skip
STANDS_FOR, VALUES = standin_shared.with_shared(
    {
        "modules/call_queue.py": (wrap_gradio_gpu_call,),
        "modules/lowvram.py": (send_everything_to_cpu,),
        "modules/processing.py": (decode_latent_batch, process_images),
        "modules/sd_hijack.py": (EmbeddingsWithFixes, StableDiffusionModelHijack),
        "modules/sd_hijack_clip.py": (PromptChunk, PromptChunkFix, FrozenCLIPEmbedderWithCustomWords),
        "modules/sd_hijack_optimizations.py": (SdOptimization,),
        "modules/sd_models.py": (reload_model_weights,),
        "modules/sd_models_types.py": (WebuiSdModel,),
        "modules/sd_unet.py": (),
        "modules/textual_inversion/textual_inversion.py": (Embedding, EmbeddingDatabase),
        "modules/ui.py": (update_token_counter,),
    },
    {
        "modules/devices.py": {"dtype": torch.float32, "dtype_unet": torch.float32, "fp8": False},
        "modules/lowvram.py": {"module_in_gpu": None},
        "modules/sd_hijack.py": {"model_hijack": StableDiffusionModelHijack(), "optimizers": optimizers},
        "modules/sd_unet.py": {"current_unet": None},
    },
)


def install(model: Path) -> None:
    """Makes `import modules` work in this process, with a model loaded."""
    reload_model_weights(info=standin_shared.install(model, STANDS_FOR, VALUES, OPTIONS))


if __name__ == "__main__":
    standin_shared.main(install)
