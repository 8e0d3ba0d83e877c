"""The webui's loaded checkpoint: whether it can be learnt on, frozen while it is on loan, and its text encoders.

Leans on, as read in AUTOMATIC1111 1.10.1 (82a973c0): `shared.sd_model`, `cond_stage_model` (for SDXL its `embedders`),
`EmbeddingsWithFixes` (the token table, known by its `textual_inversion_key`), `devices.fp8`, `sd_unet.current_unet`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from modules import devices, sd_unet, shared
from torch import Tensor, nn

from lib_estimate.errors import ModelError


def usable_model() -> Any:
    """The loaded checkpoint; ModelError where it, or how the webui runs it, doesn't work here."""
    if shared.opts.use_old_emphasis_implementation:
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
    if getattr(model, "lowvram", False):
        raise ModelError(
            "The webui runs with --medvram or --lowvram, which moves the networks off the GPU while they are still "
            "needed for learning. Start it without; a run with the cross-attention part needs little more memory than "
            "a picture."
        )
    if getattr(devices, "fp8", False):
        raise ModelError("FP8 weights are on. Switch them off under Settings > Optimizations for the estimate.")
    if sd_unet.current_unet is not None:
        raise ModelError("Another U-Net (TensorRT or the like) is active. Set SD Unet to None under Settings.")
    return model


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Weights that take no gradient, evaluation mode, no gradient checkpointing of the ldm kind (it wants gradients
    of the weights); afterwards everything is as it was."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    checkpointed = [
        (module, name)
        for module in model.modules()
        for name in ("checkpoint", "use_checkpoint")
        if module.__dict__.get(name) is True
    ]
    try:
        model.requires_grad_(False).eval()
        for module, name in checkpointed:
            setattr(module, name, False)
        yield
    finally:
        for module, name in checkpointed:
            setattr(module, name, True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


class Engine(NamedTuple):
    """One of the webui's text encoders, and its token table `[V, C]`."""

    encoder: Any
    table: Tensor


def engines_of(model: Any) -> dict[str, Engine]:
    """By the key each has in embedding files. SDXL has two, and beside them what encodes sizes."""
    stage, found = model.cond_stage_model, {}
    for encoder in getattr(stage, "embedders", [stage]):
        for module in encoder.modules():
            if hasattr(module, "textual_inversion_key") and hasattr(module, "wrapped"):
                found[module.textual_inversion_key] = Engine(encoder, module.wrapped.weight)
    if not found:
        raise ModelError("This checkpoint's text encoder is of a kind that is not supported.")
    return found
