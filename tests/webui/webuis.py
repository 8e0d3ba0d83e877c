"""What the checks have to know of the webui they run in: each family keeps the same things in other places."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lib_estimate.hosts.family import family
from lib_estimate.hosts.webui_session import WebuiSession


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name, getattr(owner, name))  # a method as it is written: static or not
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class A1111:
    """AUTOMATIC1111's webui."""

    rereads = True  # the embeddings folder, when it makes a picture
    remembers_names = False  # of the embeddings in a text until the next picture, whoever had it encoded
    names_weights = False  # it has formats of weights that nothing can be learnt through, and a run says which

    def loaded(self) -> Any:
        from modules import shared

        return shared.sd_model

    def networks(self) -> list[nn.Module]:
        return [self.loaded()]

    def tensors(self) -> list[Any]:
        """Of the networks: what of each must be as before. Nothing here moves them."""
        return [(id(p), p.data_ptr(), p.requires_grad) for network in self.networks() for p in network.parameters()]

    def databases(self) -> list[Any]:
        """Of embeddings that prompts can name, one per text encoder or one for all."""
        from modules import sd_hijack

        return [sd_hijack.model_hijack.embedding_db]

    def left_behind(self) -> dict[str, Any]:
        """Besides weights, options and embeddings, what a run could leave."""
        from modules import sd_hijack

        hijack = sd_hijack.model_hijack
        return {"comments": list(hijack.comments), "infotext": dict(hijack.extra_generation_params)}

    def own_eps(self, session: WebuiSession, x: Tensor, t: Tensor, given: Any) -> Tensor:
        """eps of the webui's own denoiser for latents x at timesteps t; given: as `get_learned_conditioning` makes."""
        from modules import processing

        model, scale = self.loaded(), session.info.latent_scale
        if getattr(model, "cond_stage_key", None) == "edit":
            extra = torch.zeros_like(x)  # no picture to edit: the webui's txt2img has nothing of this shape
        else:
            with torch.random.fork_rng():
                torch.manual_seed(0)  # of an inpainting checkpoint it is drawn
                extra = processing.txt2img_image_conditioning(model, x[:1], x.shape[3] * scale, x.shape[2] * scale)
            extra = extra.expand(len(x), *extra.shape[1:])
        named = given if isinstance(given, dict) else {"c_crossattn": [given]}
        raw = model.apply_model(x, t, {**named, "c_concat": [extra]})
        return model.predict_eps_from_z_and_v(x, t, raw) if model.parameterization == "v" else raw

    def attention_optimizations(self) -> Iterator[str]:
        """Puts in one after the other, and at the end the usual one."""
        from modules import sd_hijack

        try:
            for option in sd_hijack.optimizers:
                sd_hijack.model_hijack.apply_optimizations(option.title())
                yield option.name
        finally:
            sd_hijack.model_hijack.apply_optimizations()

    def clip_skip(self) -> list[tuple[str, Any]]:
        """Options that make another layer of the text encoder count."""
        from modules import shared

        if len(family().loaded().engines) > 1:  # SDXL's first is read at its last layer but one, unless told to skip
            return [("CLIP_stop_at_last_layers", 3), ("sdxl_clip_l_skip", True)]
        if getattr(shared.sd_model, "is_sd2", False):
            return [("emphasis", "None")]  # the webui has no clip skip for it
        return [("CLIP_stop_at_last_layers", shared.opts.CLIP_stop_at_last_layers + 1)]

    def refused(self) -> dict[str, AbstractContextManager]:
        """What can't be worked with, put in place."""
        from modules import devices, shared

        return {
            "old emphasis": changed(shared.opts, "use_old_emphasis_implementation", True),
            "fp8": changed(devices, "fp8", True),
        }

    def without_model(self) -> Sequence[AbstractContextManager[str]]:
        """States without a model, put in place, from which a run loads the chosen checkpoint; with what each is."""
        return ()

    def after_another_error(self) -> AbstractContextManager[bool]:
        """An error of another job is the last that the webui has seen, if it remembers one."""
        return nullcontext(False)


class Patched(A1111):
    """reForge and Forge Classic: A1111's shape, with networks in the hands of a memory management."""

    def networks(self) -> list[nn.Module]:
        objects = self.loaded().forge_objects
        return [objects.unet.model, self.loaded().cond_stage_model, objects.vae.first_stage_model]

    def tensors(self) -> list[Any]:
        """The memory management makes new ones as it moves them: they must be of its kind, and not ours."""
        return [(p.is_inference(), p.requires_grad) for network in self.networks() for p in network.parameters()]

    def own_eps(self, session: WebuiSession, x: Tensor, t: Tensor, given: Any) -> Tensor:
        inner = self.loaded().forge_objects.unet.model
        return _eps_by_sigma(inner, inner.model_sampling.sigmas.to(x.device)[t.long()], x, given)

    def attention_optimizations(self) -> Iterator[str]:
        yield "its own"

    def refused(self) -> dict[str, AbstractContextManager]:
        from modules import shared

        option = "use_old_emphasis_implementation"
        return {"old emphasis": changed(shared.opts, option, True)} if hasattr(shared.opts, option) else {}


class Forge(Patched):
    """Forge and Forge Neo."""

    rereads, names_weights = False, True

    @property
    def remembers_names(self) -> bool:
        from backend.text_processing import classic_engine

        return hasattr(classic_engine, "last_extra_generation_params")

    def loaded(self) -> Any:
        return family().loaded().model  # before first use there is none

    def networks(self) -> list[nn.Module]:
        objects = self.loaded().forge_objects
        return [objects.unet.model, objects.clip.cond_stage_model, objects.vae.first_stage_model]

    def databases(self) -> list[Any]:
        names = ("text_processing_engine", "text_processing_engine_l", "text_processing_engine_g")
        return [getattr(self.loaded(), name).embeddings for name in names if hasattr(self.loaded(), name)]

    def left_behind(self) -> dict[str, Any]:
        from backend.text_processing import classic_engine

        engines = [engine.encoder for engine in family().loaded().engines.values()]
        return {
            "comments": list(self.loaded().comments),
            "infotext": dict(getattr(classic_engine, "last_extra_generation_params", {})),
            "text": [(engine.clip_skip, type(engine.emphasis)) for engine in engines],
        }

    def own_eps(self, session: WebuiSession, x: Tensor, t: Tensor, given: Any) -> Tensor:
        inner = self.loaded().forge_objects.unet.model
        return _eps_by_sigma(inner, inner.predictor.sigmas.to(x.device)[t.long()], x, given)

    def clip_skip(self) -> list[tuple[str, Any]]:
        from modules import shared

        return [("CLIP_stop_at_last_layers", max(shared.opts.CLIP_stop_at_last_layers, self.loaded().is_sdxl + 1) + 1)]

    def refused(self) -> dict[str, AbstractContextManager]:
        return {"another family": changed(self.loaded(), "is_sd1", False)} if self.loaded().is_sd1 else {}

    def without_model(self) -> Sequence[AbstractContextManager[str]]:
        return _before_first_use(), _after_a_failed_load()

    def after_another_error(self) -> AbstractContextManager[bool]:
        return _after_another_error()


@contextmanager
def _before_first_use() -> Iterator[str]:
    """What is there then counts words in place of tokens."""
    from modules import sd_models

    sd_models.model_data.sd_model, sd_models.model_data.forge_hash = sd_models.FakeInitialModel(), ""
    assert sd_models.model_data.sd_model.get_prompt_lengths_on_ui("a_red_circle")[0] == 1
    yield "before first use"


@contextmanager
def _after_a_failed_load() -> Iterator[str]:
    """A damaged file was chosen, and then the checkpoint from before again. Forge takes it for loaded, and has none."""
    from modules import sd_models

    data, file = sd_models.model_data, Path(tempfile.mkdtemp()) / "damaged.safetensors"
    file.write_bytes(b"no weights at all")
    before = data.forge_loading_parameters
    data.forge_loading_parameters = {**before, "checkpoint_info": SimpleNamespace(filename=str(file))}
    try:
        sd_models.forge_model_reload()
    except Exception:  # noqa: BLE001 (whatever the webui says of such a file)
        data.forge_loading_parameters = before
    mistaken = data.forge_hash == str(before)
    if mistaken:
        assert sd_models.forge_model_reload()[0] is None
    yield f"after a failed load{', taken for loaded' if mistaken else ''}"


@contextmanager
def _after_another_error() -> Iterator[bool]:
    try:
        from modules_forge import main_thread
    except ImportError:
        yield False
        return
    with changed(main_thread, "last_exception", "RuntimeError: of another job"):
        yield True


def _eps_by_sigma(inner: Any, sigma: Tensor, x: Tensor, given: Any) -> Tensor:
    """From what a model that is told sigma makes of a latent with so much noise on it: x_sigma = x0 + sigma eps."""
    named = {"c_crossattn": given}
    if isinstance(given, dict):
        named = {"c_crossattn": given["crossattn"], "y": given["vector"]}
    spread = sigma[:, None, None, None]
    noisy = x * (spread**2 + 1).sqrt()
    return (noisy - inner.apply_model(noisy, sigma, transformer_options={}, **named)) / spread


def this() -> A1111:
    """The one the checks run in."""
    if family().__name__.endswith(".forge"):
        return Forge()
    return Patched() if hasattr(A1111().loaded(), "forge_objects") else A1111()
