"""The family of Forge: Forge itself and Forge Neo, whose networks and text encoders stand under `backend`.

Leans on, as read in Forge (dfdcbab6): `sd_models.forge_model_reload` and `model_data`; of the loaded engine
`forge_objects_after_applying_lora` with the patchers `unet`, `clip`, `vae`, `is_sd1`, `is_sd2`, `is_sdxl`,
`is_inpaint`, `set_clip_skip`, for SDXL `embedder`, and its text engines (`text_processing_engine`, or with `_l` and
`_g`) with `embeddings`, `emphasis`, `clip_skip`, `embedding_key`; of the U-Net's `KModel` `diffusion_model`,
`predictor.sigmas`, `predictor.prediction_type`, `computation_dtype`; `memory_management.load_models_gpu` and
`get_free_memory`;
`emphasis.get_current_option`; `processing.txt2img_image_conditioning`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from backend import memory_management
from backend.text_processing import emphasis
from modules import processing, sd_models, shared
from torch import Tensor, nn

from lib_estimate.errors import ModelError
from lib_estimate.hosts.base import Network
from lib_estimate.hosts.layouts import LAYOUTS
from lib_estimate.hosts.lending import Managed, Views, frozen, kept_for_the_gradient
from lib_estimate.hosts.webui_networks import remembered_objects
from lib_estimate.hosts.webui_text import Engine

TEXT_ENGINES = ("text_processing_engine", "text_processing_engine_l", "text_processing_engine_g")
VELOCITY = "v_prediction"


def loaded() -> ForgeModel:
    """The chosen checkpoint, loaded as Generate would; ModelError where it doesn't work here."""
    model = _chosen()
    kind = type(model).__name__
    if not any(getattr(model, name, False) for name in ("is_sd1", "is_sd2", "is_sdxl")):
        raise ModelError(f"This checkpoint is of another family ({kind}). Choose a checkpoint of SD 1, SD 2 or SDXL.")
    if model.is_sdxl and not hasattr(model, "text_processing_engine_l"):
        raise ModelError("This is SDXL's refiner, which only finishes pictures. Choose an SDXL base checkpoint.")
    return ForgeModel(model)


def _patchers(model: Any) -> dict[Network, Any]:
    """What loads the networks, with the LoRAs that are to be in them."""
    objects = model.forge_objects_after_applying_lora
    found = {Network.TEXT: objects.clip.patcher, Network.UNET: objects.unet}
    if any(patcher.has_online_lora() for patcher in found.values() if hasattr(patcher, "has_online_lora")):
        raise ModelError(
            "LoRAs are put into the weights anew at every use, and nothing can be learnt through that. Choose an entry "
            "without (fp16 LoRA) under Diffusion in Low Bits, and make a picture with the LoRA again."
        )
    return found


def _chosen() -> Any:
    """Forge loads a checkpoint when it is needed first. After a load that failed it has none, and takes the same choice
    for one that is loaded."""
    data = sd_models.model_data
    if data.sd_model is None:
        data.forge_hash = ""
    if not data.forge_loading_parameters.get("checkpoint_info"):
        raise ModelError("No checkpoint is chosen. Choose one at the top of the page.")
    try:
        model, _ = sd_models.forge_model_reload()
    except Exception as error:  # whatever it was, it is the checkpoint that could not be loaded
        raise ModelError(f"The webui could not load the chosen checkpoint: {error}") from error
    return model


def chosen_checkpoint() -> Any:
    """What `use_checkpoint` takes to have again what is there now."""
    return sd_models.model_data.forge_loading_parameters.get("checkpoint_info")


def use_checkpoint(checkpoint: Any) -> None:
    """Loads a checkpoint, if it isn't loaded; the one that the user has chosen in the menu stays chosen there."""
    data = sd_models.model_data
    data.forge_loading_parameters = {**data.forge_loading_parameters, "checkpoint_info": checkpoint}
    if checkpoint is not None:
        _chosen()


def refresh_embeddings() -> None:
    """Reads the embeddings folder again: each text encoder has a list of its own."""
    for engine in _text_engines(sd_models.model_data.sd_model):
        engine.embeddings.load_textual_inversion_embeddings()


def counts_tokens() -> bool:
    """Whether the webui's own count of tokens can be relied on: without a model it counts words."""
    return bool(_text_engines(sd_models.model_data.sd_model))


def text_engines() -> dict[str, Engine]:
    """What reads texts, whether or not a run goes on; of a model that is there."""
    return _engines_of(sd_models.model_data.sd_model)


def _engines_of(model: Any) -> dict[str, Engine]:
    return {engine.embedding_key: _engine(engine) for engine in _text_engines(model)}


def _text_engines(model: Any) -> list[Any]:
    found = (getattr(model, name, None) for name in TEXT_ENGINES)
    return [engine for engine in found if engine is not None]


class ForgeModel:
    """See `webui_session.Loaded`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        objects = model.forge_objects_after_applying_lora
        self._patchers = _patchers(model)
        inner = objects.unet.model
        self.engines = _engines_of(model)
        self.unet: nn.Module = inner.diffusion_model
        self.velocity = inner.predictor.prediction_type == VELOCITY
        self.latent_channels, self.latent_scale = objects.vae.latent_channels, objects.vae.downscale_ratio
        self.default_size = _size(model, objects.vae)
        self.device, self.dtype = objects.unet.load_device, inner.computation_dtype
        self._sigmas = inner.predictor.sigmas
        text, vae = objects.clip.cond_stage_model, objects.vae.first_stage_model
        self._networks = [inner, text]
        free = partial(memory_management.get_free_memory, self.device) if self.device.type != "cpu" else lambda: None
        self.placement = Managed([text], self.unet, vae, self.device, Views(self._networks), self._load, free)

    @contextmanager
    def lent(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._as_for_a_generation())
            stack.callback(self.placement.end)
            self.placement.place(Network.TEXT)
            stack.enter_context(frozen(self._networks))
            stack.enter_context(kept_for_the_gradient(self.unet))
            try:
                yield
            except RuntimeError as error:
                said = self._unlearnable(error)
                if said is None:
                    raise
                raise said from error

    @contextmanager
    def _as_for_a_generation(self) -> Iterator[None]:
        """Clip skip and emphasis as the settings say, which the webui looks up when it makes a picture."""
        before = [(engine, engine.clip_skip, engine.emphasis) for engine in _text_engines(self.model)]
        try:
            self.model.set_clip_skip(int(shared.opts.CLIP_stop_at_last_layers))
            for engine, _, _ in before:
                engine.emphasis = emphasis.get_current_option(shared.opts.emphasis)()
            yield
        finally:
            for engine, clip_skip, used in before:
                engine.clip_skip, engine.emphasis = clip_skip, used

    def _unlearnable(self, error: RuntimeError) -> ModelError | None:
        """What to say where the weights' own format has no gradient; None where that isn't it."""
        kinds = {type(p).__name__ for p in self.unet.parameters()} - {nn.Parameter.__name__}
        if not kinds or isinstance(error, torch.cuda.OutOfMemoryError):
            return None
        return ModelError(
            f"The U-Net's weights are kept as {', '.join(sorted(kinds))}, and nothing can be learnt through them "
            f"({error}). Set Diffusion in Low Bits to Automatic, or choose a checkpoint that is not quantised."
        )

    @torch.inference_mode()  # as the webui: weights made in it and moved outside of it can't even be multiplied
    def _load(self, needed: Mapping[Network, bool]) -> None:
        memory_management.load_models_gpu([self._patchers[network] for network in needed if needed[network]])

    def switch(self, activate: Callable[[], None]) -> None:
        self.placement.leave()
        with torch.inference_mode():
            activate()
        self._patchers = _patchers(self.model)

    def remembered(self) -> Callable[[], None]:
        patchers = self._patchers

        def load() -> None:
            self._patchers = patchers
            self._load(dict.fromkeys(patchers, True))

        return remembered_objects(self.model, load)

    @contextmanager
    def returned(self) -> Iterator[None]:
        self.placement.leave()
        with torch.inference_mode():
            yield

    def alphas_cumprod(self) -> Tensor:
        return (1 / (self._sigmas.float().square() + 1)).to(self.device)

    def network_output(
        self, x: Tensor, timestep: Tensor, hidden: Tensor, vector: Tensor | None, extra: Tensor | None
    ) -> Tensor:
        if extra is not None:
            x = torch.cat([x, extra], dim=1)
        return self.unet(x, timestep.float(), context=hidden, y=vector, transformer_options={})

    def told_sizes(self, height: int, width: int) -> Tensor:
        crop = (shared.opts.sdxl_crop_top, shared.opts.sdxl_crop_left)
        numbers = torch.tensor([height, width, *crop, height, width], dtype=torch.float32)
        return self.model.embedder(numbers).flatten()[None]

    def image_conditioning(self, x: Tensor, width: int, height: int) -> Tensor | None:
        if not self.model.is_inpaint:
            return None
        with self.returned():
            return processing.txt2img_image_conditioning(self.model, x, width, height)


def _size(model: Any, vae: Any) -> int:
    """The pixels a side that the checkpoint was made for. What Forge says of inpainting ones is too small."""
    if not model.is_inpaint:
        return int(vae.first_stage_model.config.sample_size)
    return LAYOUTS["sdxl" if model.is_sdxl else "sd1"]["image_size"] * vae.downscale_ratio


def _engine(engine: Any) -> Engine:
    table = engine.text_encoder.transformer.text_model.embeddings.token_embedding
    return Engine(
        encoder=engine,
        table=table.wrapped.weight,
        fixes=engine.embeddings,
        register=partial(_register, engine.embeddings),
        skipped=engine.embeddings.skipped_embeddings,
    )


def _register(embeddings: Any, embedding: Any, name: str) -> None:
    embeddings.register_embedding_by_name(embedding, name)
