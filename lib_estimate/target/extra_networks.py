"""LoRAs and other extra networks in the prompt, which the word is to take over: whether they do anything here."""

from __future__ import annotations

import torch

from lib_estimate.errors import RequestError
from lib_estimate.hosts.base import ROUNDING, Session
from lib_estimate.request import EstimateRequest
from lib_estimate.target.bank import TRAIN, latent_noise
from lib_estimate.target.target import own_text

TIMESTEP = 500  # half way from noise to picture


def check_tags(request: EstimateRequest, session: Session) -> None:
    """Refuses a prompt with nothing to take over, or with a tag that does nothing: a webui passes over what it can't
    find or can't use without a word on its pages."""
    if not request.take_over_lora:
        return
    tags = list(dict.fromkeys(session.tags(request.prompt)[1]))
    if not tags:
        raise RequestError(
            "There is no LoRA to take over in the prompt: write its tag there, such as <lora:name:1>, or leave "
            "--take-over-lora out."
        )
    for tag in _idle(tags, request, session):
        raise RequestError(
            f"{tag} changes nothing here: check its name, its weight, and that it was made for this kind of model, or "
            "take it out of the prompt."
        )


@torch.no_grad()
def _idle(tags: list[str], request: EstimateRequest, session: Session) -> list[str]:
    """The tags under which the U-Net predicts for the prompt what it predicts without them."""
    x, text = latent_noise(request, session, TRAIN, 1), own_text(request, session)
    timestep = torch.full((1,), TIMESTEP, device=x.device)
    usual, *changed = (session.predict_noise(x, timestep, session.encode([text], networks=tag)) for tag in ("", *tags))
    least = ROUNDING * usual.square().sum()
    return [tag for tag, eps in zip(tags, changed, strict=True) if (eps - usual).square().sum() <= least]
