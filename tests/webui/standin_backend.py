"""Forge's `backend` over the small model, for the stand-in of Forge.

What makes learning in Forge another matter is here as it is there: weights are made and moved in torch's inference
mode, transformer blocks add to their own input in place, the U-Net writes into the options it is given, decoding moves
the other networks, and each text encoder has embeddings of its own and remembers which it has used.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import diffusers.models.attention
import torch
from torch import Tensor, nn

from lib_estimate.hosts import checkpoint
from lib_estimate.hosts.text_encoder import TextEncoder
from lib_estimate.prompt import attention
from tests.webui import standin_model
from tests.webui.standin_lora import LoraLoader
from tests.webui.standin_model import Database, Embedding, PromptChunk, PromptChunkFix, Reader, TokenTable
from tests.webui.standin_shared import Standing, Values, shared

# ---- backend.memory_management, backend.patcher -------------------------------------------------------------------

current_loaded_models: list[Any] = []


class ModelPatcher:
    """A network in the hands of the memory management."""

    def __init__(self, model, load_device, offload_device):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.lora_patches: dict[tuple, dict] = {}
        if not hasattr(model, "lora_loader"):
            model.lora_loader = LoraLoader(model)

    def clone(self):
        made = ModelPatcher(self.model, self.load_device, self.offload_device)
        made.lora_patches = {key: dict(patches) for key, patches in self.lora_patches.items()}
        return made

    def refresh_loras(self):
        self.model.lora_loader.refresh(lora_patches=self.lora_patches)


def load_models_gpu(models, memory_required=0, hard_memory_preservation=0):
    """Moves those that are not there; where memory is required, the others away."""
    away = [each for each in current_loaded_models if memory_required and each not in models]
    missing = [each for each in models if each not in current_loaded_models]
    clones = [each for each in current_loaded_models if any(each.model is other.model for other in missing)]
    for patcher in (*away, *missing):
        patcher.model._apply(torch.clone)  # as `.to` of another device does: new memory, of the mode that is on
    for patcher in missing:
        patcher.refresh_loras()
    left = [each for each in current_loaded_models if each not in clones]
    current_loaded_models[:] = [each for each in (*left, *missing) if each not in away]


def load_model_gpu(model):
    load_models_gpu([model])


def _patcher(network: nn.Module) -> ModelPatcher:
    return ModelPatcher(network, torch.device("cpu"), torch.device("cpu"))


class CLIP:
    """The text encoders together."""

    def __init__(self, model_dict: dict[str, nn.Module]) -> None:
        self.cond_stage_model = nn.ModuleDict(model_dict)
        self.patcher = _patcher(self.cond_stage_model)

    def clone(self):
        made = copy.copy(self)
        made.patcher = self.patcher.clone()
        return made


class VAE:
    """From latents to pictures."""

    def __init__(self, model: nn.Module) -> None:
        self.first_stage_model, self.patcher = model, _patcher(model)
        self.downscale_ratio = 2 ** (len(model.config.block_out_channels) - 1)
        self.latent_channels = model.config.latent_channels

    def decode(self, samples_in):
        load_models_gpu([self.patcher], memory_required=samples_in.numel())
        pictures = self.first_stage_model.decode(samples_in, return_dict=False)[0]
        return (pictures / 2 + 0.5).clamp(0, 1).movedim(1, -1)


# ---- backend.nn.unet, backend.modules -----------------------------------------------------------------------------


class _InPlace(diffusers.models.attention.BasicTransformerBlock):
    """diffusers' transformer block, with the sums made in the input's own memory, which norm1 and norm2 have kept."""

    def forward(self, x: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        x += self.attn1(self.norm1(x))
        x += self.attn2(self.norm2(x), context=encoder_hidden_states)
        out = self.ff(self.norm3(x))
        out += x
        return out


class IntegratedUNet2DConditionModel(nn.Module):
    """diffusers' U-Net, called as Forge's."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self._inner, self.in_channels = unet, unet.config.in_channels
        for block in standin_model.blocks_called_as_ldm(unet):
            block.__class__ = _InPlace

    def forward(self, x, timesteps=None, context=None, y=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        transformer_options["original_shape"] = list(x.shape)
        transformer_options["block"] = ("last", 0)
        return standin_model.called_as_ldm(self._inner, x, timesteps, context, y)


class Timestep(nn.Module):
    """What tells SDXL a size."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, t):
        return standin_model.angles(t, self.dim)


class Prediction(nn.Module):
    """What the U-Net predicts, and the noise of each timestep."""

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str) -> None:
        super().__init__()
        self.prediction_type = prediction_type
        self.register_buffer("sigmas", ((1 - alphas_cumprod) / alphas_cumprod).sqrt().float())

    def timestep(self, sigma):
        return (sigma.log()[:, None] - self.sigmas.log()).abs().argmin(1)

    def calculate_input(self, sigma, noise):
        return noise / (sigma[:, None, None, None] ** 2 + 1).sqrt()

    def calculate_denoised(self, sigma, model_output, model_input):
        sigma = sigma[:, None, None, None]
        if self.prediction_type == "v_prediction":
            return model_input / (sigma**2 + 1) - model_output * sigma / (sigma**2 + 1).sqrt()
        return model_input - model_output * sigma


class KModel(nn.Module):
    """The U-Net, which is told sigma and says what is under the noise."""

    def __init__(self, unet: nn.Module, predictor: Prediction) -> None:
        super().__init__()
        self.diffusion_model, self.predictor, self.computation_dtype = unet, predictor, torch.float32

    def apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        given, step = self.predictor.calculate_input(t, x), self.predictor.timestep(t).float()
        out = self.diffusion_model(
            given, step, context=c_crossattn, control=control, transformer_options=transformer_options, **kwargs
        )
        return self.predictor.calculate_denoised(t, out, x)


# ---- backend.text_processing --------------------------------------------------------------------------------------


class EmbeddingDatabase(Database):
    """The embeddings of one text encoder. Nothing reads its folder again by itself."""

    def __init__(self, tokenizer, expected_shape=-1):
        super().__init__()
        self.tokenizer, self.expected_shape, self.fixes = tokenizer, expected_shape, []

    def register_embedding(self, embedding):
        return self.register_embedding_by_name(embedding, embedding.name)

    def register_embedding_by_name(self, embedding, name):
        self._place(embedding, name, self.tokenizer([name], truncation=False, add_special_tokens=False)["input_ids"][0])
        return embedding

    def load_textual_inversion_embeddings(self):
        self._read(shared.cmd_opts.embeddings_dir, self.expected_shape, self.register_embedding)


class CLIPEmbeddingForTextualInversion(TokenTable):
    """The token table, with embeddings put over its rows; its weight is that of the table in it."""

    def __init__(self, wrapped, embeddings, textual_inversion_key="clip_l"):
        super().__init__(wrapped, embeddings, textual_inversion_key)
        self.weight = wrapped.weight


class Emphasis:
    """What is made of the weights of words."""

    name = "Base"

    def after_transformers(self):
        self.z = attention.apply_emphasis(self.z, self.multipliers, self.name)


class EmphasisNone(Emphasis):
    name = "None"


class EmphasisIgnore(Emphasis):
    name = "Ignore"


class EmphasisOriginal(Emphasis):
    name = "Original"


class EmphasisOriginalNoNorm(EmphasisOriginal):
    name = "No norm"


options = [EmphasisNone, EmphasisIgnore, EmphasisOriginal, EmphasisOriginalNoNorm]


def get_current_option(emphasis_option_name):
    return next((each for each in options if each.name == emphasis_option_name), EmphasisOriginal)


class IntegratedCLIP(nn.Module):
    """A text encoder in the place where Forge has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.transformer = model
        if not hasattr(model, "text_model"):  # of newer transformers
            self.transformer = nn.Module()
            self.transformer.text_model = model


class ClassicTextProcessingEngine(Reader):
    """One of the text encoders: chunks, embeddings, emphasis."""

    def __init__(self, parts: checkpoint.Components, encoder: TextEncoder, widths: list[int]) -> None:
        self.embeddings = EmbeddingDatabase(parts.tokenizer, widths)
        self.embedding_key, self.text_encoder = encoder.key, IntegratedCLIP(encoder.model)
        within = self.text_encoder.transformer.text_model.embeddings
        within.token_embedding = CLIPEmbeddingForTextualInversion(within.token_embedding, self.embeddings, encoder.key)
        self.emphasis = get_current_option(shared.opts.emphasis)()
        self.minimal_clip_skip = self.clip_skip = encoder.layer
        self._learn_to_read(parts, encoder)
        self.embeddings.load_textual_inversion_embeddings()

    def _database(self) -> EmbeddingDatabase:
        return self.embeddings

    def _emphasis(self) -> str:
        return self.emphasis.name

    def process_texts(self, texts):
        read = [self.tokenize_line(text) for text in texts]
        return [chunks for chunks, _ in read], max(count for _, count in read)

    def get_target_prompt_token_count(self, token_count):
        return math.ceil(max(token_count, 1) / self.chunk_length) * self.chunk_length

    def process_tokens(self, remade_batch_tokens, batch_multipliers):
        layer = max(self.clip_skip, self.minimal_clip_skip)
        z, pooled = self._encoder.states(torch.asarray(remade_batch_tokens), self.id_end, (), layer)
        self.emphasis.multipliers, self.emphasis.z = torch.asarray(batch_multipliers).to(z), z
        self.emphasis.after_transformers()
        z = self.emphasis.z
        z.pooled = pooled
        return z

    def __call__(self, texts):
        self.emphasis = get_current_option(shared.opts.emphasis)()
        encoded = []
        for column in self._columns(texts):
            self.embeddings.fixes = [chunk.fixes for chunk in column]
            for name in {fix.embedding.name: 0 for chunk in column for fix in chunk.fixes}:
                said = classic_engine().last_extra_generation_params
                said["TI"] = ", ".join(filter(None, (said.get("TI"), name)))
            encoded.append(self.process_tokens([c.tokens for c in column], [c.multipliers for c in column]))
        return (torch.hstack(encoded), encoded[0].pooled) if self.return_pooled else torch.hstack(encoded)


def classic_engine() -> Any:
    from backend.text_processing import classic_engine

    return classic_engine


# ---- backend.diffusion_engine -------------------------------------------------------------------------------------


class ForgeObjects:
    """The networks."""

    def __init__(self, unet, clip, vae, clipvision):
        self.unet, self.clip, self.vae, self.clipvision = unet, clip, vae, clipvision

    def shallow_copy(self):
        return ForgeObjects(self.unet, self.clip, self.vae, self.clipvision)


class ForgeDiffusionEngine:
    """A loaded checkpoint."""

    is_inpaint = is_sd1 = is_sd2 = is_sdxl = is_sd3 = False
    cond_stage_model = first_stage_model = None

    def __init__(self, parts: checkpoint.Components) -> None:
        widths = [encoder.width for encoder in parts.text_encoders]
        self._engines = [ClassicTextProcessingEngine(parts, encoder, widths) for encoder in parts.text_encoders]
        clip, vae = CLIP({engine.embedding_key: engine.text_encoder for engine in self._engines}), VAE(parts.vae)
        predictor = Prediction(parts.alphas_cumprod, parts.prediction)
        unet = _patcher(KModel(IntegratedUNet2DConditionModel(parts.unet), predictor))
        for network in (clip.cond_stage_model, unet.model, vae.first_stage_model):
            network.requires_grad_(True).eval()  # as a network is made that nobody has told otherwise
        self.current_lora_hash = str([])
        self.forge_objects = ForgeObjects(unet=unet, clip=clip, vae=vae, clipvision=None)
        self.forge_objects_original = self.forge_objects.shallow_copy()
        self.forge_objects_after_applying_lora = self.forge_objects.shallow_copy()

    def set_clip_skip(self, clip_skip):
        for engine in self._engines:
            engine.clip_skip = clip_skip

    @torch.inference_mode()
    def get_prompt_lengths_on_ui(self, prompt):
        _, count = self._engines[0].process_texts([prompt])
        return count, self._engines[0].get_target_prompt_token_count(count)

    @torch.inference_mode()
    def decode_first_stage(self, x):
        vae = self.forge_objects.vae
        return vae.decode(x / vae.first_stage_model.config.scaling_factor).movedim(-1, 1) * 2 - 1


class StableDiffusion(ForgeDiffusionEngine):
    """Of SD 1."""

    is_sd1 = True

    def __init__(self, parts: checkpoint.Components) -> None:
        super().__init__(parts)
        (self.text_processing_engine,) = self._engines

    @torch.inference_mode()
    def get_learned_conditioning(self, prompt):
        load_model_gpu(self.forge_objects.clip.patcher)
        return self.text_processing_engine(prompt)


class StableDiffusionXL(ForgeDiffusionEngine):
    """Of SDXL."""

    is_sdxl = True

    def __init__(self, parts: checkpoint.Components) -> None:
        super().__init__(parts)
        self.text_processing_engine_l, self.text_processing_engine_g = self._engines
        self.embedder = Timestep(parts.unet.config.addition_time_embed_dim)

    @torch.inference_mode()
    def get_learned_conditioning(self, prompt):
        load_model_gpu(self.forge_objects.clip.patcher)
        first, (second, pooled) = self.text_processing_engine_l(prompt), self.text_processing_engine_g(prompt)
        size, crop = [prompt.height, prompt.width], [shared.opts.sdxl_crop_top, shared.opts.sdxl_crop_left]
        told = self.embedder(torch.tensor([*size, *crop, *size])).flatten()[None].repeat(len(pooled), 1)
        hidden = torch.cat([first, second], dim=2)
        if prompt.is_negative_prompt and not any(prompt):
            hidden, pooled = torch.zeros_like(hidden), torch.zeros_like(pooled)
        return {"crossattn": hidden, "vector": torch.cat([pooled, told], dim=1)}


# ---- in place -----------------------------------------------------------------------------------------------------

STANDS_FOR: Standing = {
    "backend/diffusion_engine/base.py": (ForgeObjects, ForgeDiffusionEngine),
    "backend/diffusion_engine/sd15.py": (StableDiffusion,),
    "backend/diffusion_engine/sdxl.py": (StableDiffusionXL,),
    "backend/memory_management.py": (load_models_gpu, load_model_gpu),
    "backend/modules/k_model.py": (KModel,),
    "backend/modules/k_prediction.py": (Prediction,),
    "backend/nn/clip.py": (IntegratedCLIP,),
    "backend/nn/unet.py": (IntegratedUNet2DConditionModel, Timestep),
    "backend/patcher/base.py": (ModelPatcher,),
    "backend/patcher/clip.py": (CLIP,),
    "backend/patcher/lora.py": (LoraLoader,),
    "backend/patcher/vae.py": (VAE,),
    "backend/text_processing/classic_engine.py": (
        PromptChunk, PromptChunkFix, CLIPEmbeddingForTextualInversion, ClassicTextProcessingEngine,
    ),
    "backend/text_processing/emphasis.py": (Emphasis, *options, get_current_option),
    "backend/text_processing/textual_inversion.py": (Embedding, EmbeddingDatabase),
}  # fmt: skip
VALUES: Values = {
    "backend/memory_management.py": {"current_loaded_models": current_loaded_models},
    "backend/text_processing/classic_engine.py": {"last_extra_generation_params": {}},
    "backend/text_processing/emphasis.py": {"options": options},
}
