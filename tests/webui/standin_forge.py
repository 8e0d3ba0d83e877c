"""A stand-in for Forge, over the small model: its `modules`, over its `backend`; see standin_shared.py.

What makes Forge another matter than AUTOMATIC1111's webui is here as it is there: the model is loaded when it is needed
first, and may be none after a load that failed; the last error of another job is shown in place of a new one; files
that can't be read lose their names. For what is so in the networks see standin_backend.py.
"""

from __future__ import annotations

import html
import os
from pathlib import Path
from types import ModuleType

import safetensors.torch
import torch

from lib_estimate.hosts import checkpoint
from tests.webui import standin_backend as backend
from tests.webui import standin_lora, standin_shared
from tests.webui.standin_shared import shared

# ---- modules.sd_models --------------------------------------------------------------------------------------------


class FakeInitialModel:
    """What stands for a model before the first one is loaded."""

    def __init__(self):
        self.cond_stage_model, self.chunk_length = None, 75

    def get_prompt_lengths_on_ui(self, prompt):
        return len(prompt.split()), self.chunk_length


class SdModelData:
    """The loaded model, and what is chosen."""

    def __init__(self):
        self.sd_model, self.forge_loading_parameters, self.forge_hash = FakeInitialModel(), {}, ""


model_data = SdModelData()


@torch.inference_mode()
def forge_model_reload():
    """After a load that failed, the hash is still that of the model before."""
    wanted = str(model_data.forge_loading_parameters)
    if model_data.forge_hash == wanted:
        return model_data.sd_model, False
    model_data.sd_model = None
    backend.current_loaded_models.clear()
    info = model_data.forge_loading_parameters["checkpoint_info"]
    parts = checkpoint.load(Path(info.filename), torch.float32)
    model = (backend.StableDiffusionXL if len(parts.text_encoders) > 1 else backend.StableDiffusion)(parts)
    model.comments, model.extra_generation_params, model.sd_checkpoint_info = [], {}, info
    model_data.sd_model, model_data.forge_hash = model, wanted
    return model, True


class Shared(ModuleType):
    """`modules.shared`, whose model is the loaded one."""

    @property
    def sd_model(self):
        return model_data.sd_model


class StableDiffusionModelHijack:
    """What is left of it: nothing in Forge is patched, and there are no embeddings here."""

    def apply_optimizations(self, option=None):
        pass


# ---- modules.processing, modules.call_queue, modules.ui -----------------------------------------------------------


def decode_latent_batch(model, batch, target_device=None, check_for_nans=False):
    return list(model.decode_first_stage(batch))


@torch.inference_mode()
def process_images(p):
    p.sd_model, _ = forge_model_reload()
    model, engine = p.sd_model, backend.classic_engine()
    model.forge_objects = model.forge_objects_original.shallow_copy()
    standin_shared.activate(p, standin_shared.parse_prompt(p.prompt)[1])
    objects = model.forge_objects = model.forge_objects_after_applying_lora.shallow_copy()
    model.set_clip_skip(shared.opts.CLIP_stop_at_last_layers)
    standin_shared.encode_prompts(p)
    model.extra_generation_params, engine.last_extra_generation_params = engine.last_extra_generation_params, {}
    backend.load_models_gpu([objects.unet])
    sigmas, side = objects.unet.model.predictor.sigmas, p.height // objects.vae.downscale_ratio

    def eps(x, t, cond):
        named, sigma = {"c_crossattn": cond}, sigmas[t]
        if isinstance(cond, dict):
            named = {"c_crossattn": cond["crossattn"], "y": cond["vector"]}
        noisy = x * (sigma**2 + 1).sqrt()
        return (noisy - objects.unet.model.apply_model(noisy, sigma, transformer_options={}, **named)) / sigma

    return standin_shared.drawn(
        p, (1, objects.vae.latent_channels, side, side), 1 / (sigmas**2 + 1), eps,
        lambda x: decode_latent_batch(model, x),
        "".join(f", {name}: {value}" for name, value in model.extra_generation_params.items()),
    )  # fmt: skip


def wrap_gradio_gpu_call(func, extra_outputs=None):
    def f(*args, **kwargs):
        with VALUES["modules/call_queue.py"]["queue_lock"]:
            return func(*args, **kwargs)

    return wrap_gradio_call(f, extra_outputs)


def wrap_gradio_call(func, extra_outputs=None, add_stats=False):
    """Shows the last error of the main thread in place of a new one."""

    def f(*args, **kwargs):
        from modules_forge import main_thread

        try:
            return tuple(func(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 (as there)
            error = main_thread.last_exception or error
            said = html.escape(f"{type(error).__name__}: {error}")
            return (*(extra_outputs or [None, ""]), f"<div class='error'>{said}</div>")

    return f


def update_token_counter(text, steps, styles, *, is_positive=True):
    count, longest = model_data.sd_model.get_prompt_lengths_on_ui(text)
    return f"<span>{count}/{longest}</span>"


# ---- modules_forge ------------------------------------------------------------------------------------------------


def build_loaded(module, loader_name):
    """Wraps a function that reads a file: where it fails, the file is renamed."""
    origin = getattr(module, loader_name)

    def loader(*args, **kwargs):
        try:
            return origin(*args, **kwargs)
        except Exception as error:
            for path in (*args, *kwargs.values()):
                if isinstance(path, str) and os.path.exists(path):
                    os.replace(path, f"{path}.corrupted")
            raise ValueError(str(error)) from error

    setattr(module, f"{loader_name}_origin", origin)
    setattr(module, loader_name, loader)


# ---- in place -----------------------------------------------------------------------------------------------------

OPTIONS = {"emphasis": "Original", "CLIP_stop_at_last_layers": 1, "sdxl_crop_top": 0, "sdxl_crop_left": 0}
STANDS_FOR, VALUES = standin_shared.with_shared(
    {
        **backend.STANDS_FOR,
        "modules/call_queue.py": (wrap_gradio_gpu_call, wrap_gradio_call),
        "modules/processing.py": (decode_latent_batch, process_images),
        "modules/sd_hijack.py": (StableDiffusionModelHijack,),
        "modules/sd_hijack_clip.py": (),
        "modules/sd_models.py": (FakeInitialModel, SdModelData, forge_model_reload),
        "modules/shared_items.py": (Shared,),
        "modules/ui.py": (update_token_counter,),
        "modules_forge/main_thread.py": (),
        "modules_forge/patch_basic.py": (build_loaded,),
    },
    {
        **backend.VALUES,
        "modules/sd_hijack.py": {"model_hijack": StableDiffusionModelHijack()},
        "modules/sd_models.py": {"model_data": model_data},
        "modules_forge/main_thread.py": {"last_exception": None},
    },
)


def install(model: Path) -> None:
    """Makes `import backend` and `import modules` work in this process, with a checkpoint chosen and not yet loaded."""
    chosen = standin_shared.install(model, STANDS_FOR, VALUES, OPTIONS)
    shared.__class__ = Shared
    model_data.forge_loading_parameters = {"checkpoint_info": chosen}
    build_loaded(safetensors.torch, "load_file")
    build_loaded(torch, "load")
    standin_lora.install_in_patchers(lambda: model_data.sd_model)


if __name__ == "__main__":
    standin_shared.main(install)
