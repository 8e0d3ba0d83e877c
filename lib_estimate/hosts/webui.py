"""The family of AUTOMATIC1111's webui: the webui itself, and reForge and Forge Classic, which are shaped like it.

Leans on, as read in 1.10.1 (82a973c0): `shared.sd_model` with `cond_stage_model` (for SDXL its `embedders`),
`apply_model`, `alphas_cumprod`, `parameterization`, `first_stage_model`; `EmbeddingsWithFixes` (the token table, known
by its `textual_inversion_key`), `model_hijack.embedding_db` with `register_embedding_by_name`, `skipped_embeddings` and
`load_textual_inversion_embeddings`; `sd_models.reload_model_weights`, `devices.dtype_unet`, `devices.fp8`,
`sd_unet.current_unet`,
`processing.txt2img_image_conditioning`, `lowvram.send_everything_to_cpu` and `module_in_gpu`; of its
LoRA extension `load_networks` and `network_apply_weights`. In reForge (3b56b268) and
Forge Classic (1f95d717) besides: `forge_objects` with the patchers `unet`, `clip`, `vae`,
`ldm_patched.modules.model_management` with `load_models_gpu` and `get_free_memory`, and
`modules_forge.forge_clip.move_clip_to_gpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from modules import devices, processing, sd_hijack, sd_models, sd_unet, shared
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lib_estimate.errors import ModelError
from lib_estimate.hosts.base import Network
from lib_estimate.hosts.layouts import LAYOUTS
from lib_estimate.hosts.lending import Managed, Views, frozen, kept_for_the_gradient
from lib_estimate.hosts.placement import Placement
from lib_estimate.hosts.webui_networks import lora_networks, remembered_objects
from lib_estimate.hosts.webui_text import Engine
from lib_estimate.request import Offload

MULTIPLIERS = ("te_multiplier", "unet_multiplier", "dyn_dim")  # of a loaded LoRA, as `load_networks` is told them
# What the webui's LoRAs are put into. What leaves torch's own attention is put into with the attention itself.
LORA_LAYERS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.MultiheadAttention)
SWITCHES = {Offload.NETWORKS: "--medvram", Offload.BLOCKS: "--lowvram"}


def loaded() -> WebuiModel:
    """The loaded checkpoint; ModelError where it, or how the webui runs it, doesn't work here."""
    if getattr(shared.opts, "use_old_emphasis_implementation", False):
        raise ModelError(
            "The setting 'Use old emphasis implementation' is on: its weights can't be learnt. "
            "Switch it off under Settings > Compatibility."
        )
    model = shared.sd_model
    if model is None or not hasattr(model, "cond_stage_model"):
        raise ModelError("No checkpoint is loaded. Choose one at the top of the page and wait until it is loaded.")
    if getattr(model, "is_sd3", False):
        raise ModelError("This checkpoint is of the SD3 family. Choose a checkpoint of SD 1, SD 2 or SDXL.")
    if getattr(model, "is_sdxl", False) and not hasattr(model.cond_stage_model, "embedders"):
        raise ModelError("This is SDXL's refiner, which only finishes pictures. Choose an SDXL base checkpoint.")
    if getattr(devices, "fp8", False):
        raise ModelError("FP8 weights are on. Switch them off under Settings > Optimizations for the estimate.")
    if sd_unet.current_unet is not None:
        raise ModelError("Another U-Net (TensorRT or the like) is active. Set SD Unet to None under Settings.")
    return PatchedModel(model) if hasattr(model, "forge_objects") else WebuiModel(model)


def chosen_checkpoint() -> Any:
    """What `use_checkpoint` takes to have again what is there now."""
    return getattr(shared.sd_model, "sd_checkpoint_info", None)


def use_checkpoint(checkpoint: Any) -> None:
    """Loads a checkpoint, if it isn't loaded; the one that the user has chosen in the menu stays chosen there."""
    sd_models.reload_model_weights(info=checkpoint)


def refresh_embeddings() -> None:
    """Reads the embeddings folder again."""
    sd_hijack.model_hijack.embedding_db.load_textual_inversion_embeddings(force_reload=True)


def counts_tokens() -> bool:
    """Whether the webui's own count of tokens can be relied on."""
    return True


def text_engines() -> dict[str, Engine]:
    """What reads texts, whether or not a run goes on."""
    return _engines_of(shared.sd_model)


class WebuiModel:
    """See `webui_session.Loaded`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.engines = _engines_of(model)
        self.unet: nn.Module = model.model.diffusion_model
        self.velocity = model.parameterization == "v"
        self.latent_channels = self.unet.out_channels
        self.latent_scale = 2 ** (len(model.first_stage_model.encoder.down) - 1)
        self.default_size = int(getattr(model, "image_size", LAYOUTS["sdxl"]["image_size"])) * self.latent_scale
        self.device, self.dtype = devices.device, devices.dtype_unet

    @contextmanager
    def lent(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(frozen([self.model]))
            mode = Offload.OFF
            if getattr(self.model, "lowvram", False):
                stack.enter_context(_by_hand(self.model))
                mode = Offload.BLOCKS if shared.cmd_opts.lowvram else Offload.NETWORKS
            vae = self.model.first_stage_model
            self.placement = Placement(
                [self.model.cond_stage_model], self.unet, vae, self.device, mode, switches=SWITCHES
            )
            stack.callback(self.placement.end)
            yield

    def returned(self) -> nullcontext:
        return nullcontext()

    def switch(self, activate: Callable[[], None]) -> None:
        """At once, in every layer: the webui would do it when a layer is used, and then in a copy of its weights where
        these come and go."""
        self.placement.place()
        activate()
        self._apply_loras()

    def remembered(self) -> Callable[[], None]:
        networks = lora_networks()
        before = [] if networks is None else list(networks.loaded_networks)
        numbers = [[getattr(each, name) for each in before] for name in MULTIPLIERS]

        def give_back() -> None:
            if networks is not None:
                networks.load_networks([each.name for each in before], *numbers)
            self._apply_loras()

        return give_back

    @torch.no_grad()
    def _apply_loras(self) -> None:
        networks = lora_networks()
        if networks is None or shared.opts.lora_functional:  # that is a way to leave the weights as they are
            return
        for module in self.model.modules():
            if isinstance(module, LORA_LAYERS) and not isinstance(module, NonDynamicallyQuantizableLinear):
                networks.network_apply_weights(module)

    def alphas_cumprod(self) -> Tensor:
        return self.model.alphas_cumprod.to(self.device, torch.float32)

    def network_output(
        self, x: Tensor, timestep: Tensor, hidden: Tensor, vector: Tensor | None, extra: Tensor | None
    ) -> Tensor:
        """By the webui's own call: under the names of ldm, and for SDXL of sgm."""
        given = {"c_crossattn": [hidden]} if vector is None else {"crossattn": hidden, "vector": vector}
        return self.model.apply_model(x, timestep, {**given, "c_concat": [extra]})

    def told_sizes(self, height: int, width: int) -> Tensor:
        told = {
            "original_size_as_tuple": [height, width],
            "crop_coords_top_left": [shared.opts.sdxl_crop_top, shared.opts.sdxl_crop_left],
            "target_size_as_tuple": [height, width],
        }
        embedders = [e for e in self.model.conditioner.embedders if e.input_key in told]
        rows = [e(torch.tensor([told[e.input_key]], device=self.device, dtype=devices.dtype)) for e in embedders]
        return torch.cat(rows, dim=1)

    def image_conditioning(self, x: Tensor, width: int, height: int) -> Tensor | None:
        if getattr(self.model, "cond_stage_key", None) == "edit":
            # instruct-pix2pix: txt2img has nothing that fits. No picture then, which it is trained with zeros for.
            return torch.zeros_like(x)
        return processing.txt2img_image_conditioning(self.model, x, width, height)


@contextmanager
def _by_hand(model: nn.Module) -> Iterator[None]:
    """--medvram and --lowvram send a network, or a block of one, to the GPU when it runs and the one before to main
    memory, which a gradient can't follow. Here all of them begin in main memory, and nothing of that goes on."""
    from modules import lowvram  # not at the top: Forge Classic has none

    lowvram.send_everything_to_cpu()
    taken = [
        (module._forward_pre_hooks, key, hook)
        for module in model.modules()
        for key, hook in module._forward_pre_hooks.items()
        if getattr(hook, "__name__", "") == "send_me_to_gpu"
    ]
    for hooks, key, _ in taken:
        del hooks[key]
    try:
        yield
    finally:
        for hooks, key, hook in taken:
            hooks[key] = hook
            hooks.move_to_end(key, last=False)
        lowvram.module_in_gpu = None  # decoding pictures has put the VAE there, which is in main memory again


class PatchedModel(WebuiModel):
    """In reForge and Forge Classic: A1111's text encoders, and networks that a memory management of their own moves."""

    def __init__(self, model: Any) -> None:
        from ldm_patched.modules import model_management

        super().__init__(model)
        objects = model.forge_objects
        self._patchers = _patchers(objects)
        inner = objects.unet.model
        self.unet = inner.diffusion_model
        self.dtype = getattr(inner, "manual_cast_dtype", None) or inner.get_dtype()
        self._networks = [inner, objects.clip.cond_stage_model, model.cond_stage_model]
        free = partial(model_management.get_free_memory, self.device) if self.device.type != "cpu" else lambda: None
        vae = objects.vae.first_stage_model
        self.placement = Managed(
            self._networks[1:], self.unet, vae, self.device, Views(self._networks), self._load, free
        )

    @contextmanager
    def lent(self) -> Iterator[None]:
        from modules_forge import forge_clip

        move = forge_clip.move_clip_to_gpu
        with ExitStack() as stack:
            stack.callback(self.placement.end)
            self.placement.place(Network.TEXT)
            stack.enter_context(frozen(self._networks))
            stack.enter_context(kept_for_the_gradient(self.unet))
            # At every text it would see that the encoder is loaded, and might unload the U-Net for it.
            forge_clip.move_clip_to_gpu = lambda: None
            stack.callback(partial(setattr, forge_clip, "move_clip_to_gpu", move))
            yield

    @torch.inference_mode()  # as the webui: weights made in it and moved outside of it can't even be multiplied
    def _load(self, needed: Mapping[Network, bool]) -> None:
        from ldm_patched.modules import model_management

        model_management.load_models_gpu([self._patchers[network] for network in needed if needed[network]])

    def switch(self, activate: Callable[[], None]) -> None:
        self.placement.leave()
        with torch.inference_mode():
            activate()
        self._patchers = _patchers(self.model.forge_objects_after_applying_lora)

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

    def network_output(
        self, x: Tensor, timestep: Tensor, hidden: Tensor, vector: Tensor | None, extra: Tensor | None
    ) -> Tensor:
        if self.unet.in_channels > x.shape[1]:
            x = torch.cat([x, extra], dim=1)
        return self.unet(x, timestep.float(), context=hidden, y=vector, transformer_options={})

    def image_conditioning(self, x: Tensor, width: int, height: int) -> Tensor | None:
        if self.unet.in_channels == x.shape[1]:
            return None
        with self.returned():
            return super().image_conditioning(x, width, height)


def _patchers(objects: Any) -> dict[Network, Any]:
    """What loads the networks, with the LoRAs that are to be in them."""
    return {Network.TEXT: objects.clip.patcher, Network.UNET: objects.unet}


def _engines_of(model: Any) -> dict[str, Engine]:
    """By the key each has in embedding files. SDXL has two, and beside them what encodes sizes."""
    stage, found = model.cond_stage_model, {}
    database = sd_hijack.model_hijack.embedding_db
    for encoder in getattr(stage, "embedders", [stage]):
        for module in encoder.modules():
            if hasattr(module, "textual_inversion_key") and hasattr(module, "wrapped"):
                found[module.textual_inversion_key] = Engine(
                    encoder=encoder,
                    table=module.wrapped.weight,
                    fixes=encoder.hijack,
                    register=lambda embedding, name: database.register_embedding_by_name(embedding, model, name),
                    skipped=database.skipped_embeddings,
                )
    if not found:
        raise ModelError("This checkpoint's text encoder is of a kind that is not supported.")
    return found
