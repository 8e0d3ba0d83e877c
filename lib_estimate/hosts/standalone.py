"""The host without a webui: a Stable Diffusion 1, 2 or XL checkpoint loaded through diffusers and transformers.

Leans on diffusers' `UNet2DConditionModel` and `AutoencoderKL` (read in 0.42), and on what text_encoder.py says.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from lib_estimate.errors import ModelError
from lib_estimate.files.names import folded
from lib_estimate.hosts import checkpoint, denoising
from lib_estimate.hosts.base import (
    Conditioning,
    CrossAttentionLayer,
    ModelInfo,
    Network,
    Sensitivity,
    StepConditioning,
    Trajectory,
    Watch,
)
from lib_estimate.hosts.placement import Placed, Placement
from lib_estimate.hosts.precision import Precision
from lib_estimate.hosts.standalone_text import StandaloneText, stored_embeddings
from lib_estimate.request import ModelOptions, Offload

log = logging.getLogger(__name__)

SWITCHES = {mode: f"--offload {mode.value}" for mode in (Offload.NETWORKS, Offload.BLOCKS)}


class StandaloneHost:
    """A checkpoint in memory; `embeddings` is the folder whose files can be used by name in prompts."""

    def __init__(self, options: ModelOptions, embeddings: Path | None = None) -> None:
        self.device = _device(options.device)
        self.options, self.embeddings = options, embeddings
        self.unknown: frozenset[str] = frozenset()  # names of files there that are not to be used in prompts
        self.parts = checkpoint.load(Path(options.model), _dtype(options.dtype, self.device))
        self.mode = options.offload
        if self.mode is Offload.AUTO and self.device.type != "cuda":
            self.mode = Offload.OFF  # nobody says what is free there, or it is main memory itself
        for network in self.parts.networks():
            network.eval()
            if self.mode is Offload.OFF:
                network.to(self.device)

    def without(self, names: Collection[str]) -> StandaloneHost:
        host = copy.copy(self)  # of the same networks
        host.unknown = frozenset(map(folded, names))
        return host

    def placement(self) -> Placement:
        parts, mode = self.parts, self.mode
        text = [encoder.model for encoder in parts.text_encoders]
        return Placement(text, parts.unet, parts.vae, self.device, mode, switches=SWITCHES)

    @contextmanager
    def session(self, *, tags: bool = False) -> Iterator[StandaloneSession]:
        if tags:
            raise ModelError(
                "A word can take over a LoRA only in a webui, where LoRAs are: leave --take-over-lora out."
            )
        networks = self.parts.networks()
        flags = [(p, p.requires_grad) for network in networks for p in network.parameters()]
        modes = [(module, module.training) for network in networks for module in network.modules()]
        session = StandaloneSession(self)
        try:
            for network in networks:
                network.requires_grad_(False).eval()
            yield session
        finally:
            session.close()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, mode in modes:
                module.training = mode


class StandaloneSession(Placed, StandaloneText):
    """See `base.Session`."""

    def __init__(self, host: StandaloneHost) -> None:
        parts = host.parts
        super().__init__(parts, host.options, host.device)
        self.dtype = parts.unet.dtype
        self.info = ModelInfo(
            name=parts.name,
            hash=parts.hash,
            widths=self.widths(),
            chunk_length=self.vocabulary.chunk_length,
            latent_channels=parts.vae.config.latent_channels,
            latent_scale=2 ** (len(parts.vae.config.block_out_channels) - 1),
            default_size=parts.default_size,
            device=host.device,
            dtype=self.dtype,
        )
        self.know(stored_embeddings(host.embeddings, host.unknown))
        abar = parts.alphas_cumprod.to(host.device, torch.float32)
        self.levels = denoising.Levels(abar, parts.prediction == "v_prediction")
        self._missing = parts.unet.config.in_channels - self.info.latent_channels
        self._extra: dict[tuple[int, ...], Tensor] = {}
        self.placement, self.precision = host.placement(), Precision(host.device, self.dtype)
        self.forwards, self._at_once = 0, denoising.AtOnce()
        self._handles = [encoder.watch() for encoder in parts.text_encoders]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.precision.end()
        self.placement.end()

    def predict_noise(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return self._at_once.run(self.predict_at_once, x, timestep, conditioning)

    def predict_at_once(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        given, dtype = conditioning.expand(len(x)), self.precision.given(Network.UNET)
        self.forwards += len(x) * denoising.cost(given, self.placement.recomputes)
        self.placement.bring(Network.UNET)
        inputs, added = self._with_extra_channels(x).to(dtype), self.added(x, given.pooled)
        with self.precision.of(Network.UNET):
            out = self.parts.unet(inputs, timestep, given.hidden.to(dtype), **added, return_dict=False)[0].float()
        return self.levels.said(out, x, timestep)

    def added(self, x: Tensor, pooled: Tensor | None) -> dict[str, Any]:
        """SDXL's pooled vector and sizes: the picture's, no crop, and the picture's again, each (height, width)."""
        if pooled is None:
            return {}
        height, width = (side * self.info.latent_scale for side in x.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=x.device).expand(len(x), -1)
        dtype, unet = self.precision.given(Network.UNET), self.parts.unet
        pooled = pooled.to(dtype)
        if unet.config.addition_embed_type == "text_time":
            return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        # diffusers reads single files of other widths than SDXL's own as a network with a projected class label.
        each = (unet.config.projection_class_embeddings_input_dim - pooled.shape[1]) // sizes.shape[1]
        angles = get_timestep_embedding(sizes.flatten(), each, flip_sin_to_cos=True, downscale_freq_shift=0)
        return {"class_labels": torch.cat([pooled, angles.view(len(x), -1).to(dtype)], dim=1)}

    @torch.no_grad()
    def _with_extra_channels(self, x: Tensor) -> Tensor:
        """Latents with what txt2img feeds into the other channels an inpainting or instruct checkpoint takes.

        Inpainting: everything is masked, over a grey picture. Instruct: no picture, which it is trained with zeros for.
        """
        if not self._missing:
            return x
        shape = (self._missing, *x.shape[-2:])
        if shape not in self._extra:
            extra = x.new_zeros(1, *shape)
            if self._missing > x.shape[1]:
                vae, side = self.parts.vae, self.info.latent_scale
                self.placement.bring(Network.VAE)
                grey = torch.zeros(1, vae.config.in_channels, *(side * n for n in shape[1:]), device=x.device)
                latent = vae.encode(grey.to(vae.dtype)).latent_dist.mode() * vae.config.scaling_factor
                extra = torch.cat([torch.ones_like(extra[:, :1]), latent.to(x)], dim=1)
            self._extra[shape] = extra
        return torch.cat([x, self._extra[shape].expand(len(x), -1, -1, -1)], dim=1)

    def sensitivity(self, x: Tensor, timestep: Tensor, conditioning: Conditioning, probe: Tensor) -> Sensitivity:
        return denoising.sensitivity(self.parts.unet, self.predict_noise, x, timestep, conditioning, probe)

    def sample(
        self,
        noise: Tensor,
        guidance: Sequence[StepConditioning],
        cfg_scale: float,
        *,
        offset: float = 0.0,
        watch: Watch | None = None,
        watch_negative: Watch | None = None,
    ) -> Iterator[int | Trajectory]:
        unet, watched = self.parts.unet, watch is not None or watch_negative is not None
        predict = self.predict_at_once if watched else self.predict_noise
        return denoising.sample(
            predict, self.levels, noise.to(self.device).float(), guidance, cfg_scale, offset=offset,
            watch_positive=lambda step: denoising.watching(unet, watch, step),
            watch_negative=lambda step: denoising.watching(unet, watch_negative, step),
        )  # fmt: skip

    def cross_attention(self) -> list[CrossAttentionLayer]:
        def call(module: nn.Module) -> CrossAttentionLayer:
            def layer(hidden: Tensor, context: Tensor) -> Tensor:
                self.placement.bring(Network.ATTENTION)
                with self.precision.of(Network.UNET):
                    return module(hidden, encoder_hidden_states=context.to(hidden.dtype)).float()

            return layer

        return [call(module) for module in denoising.attention_modules(self.parts.unet)]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        self.placement.bring(Network.VAE)
        pictures = [self._decoded(z[None]) for z in latents]
        if not torch.cat(pictures).isfinite().all() and self.widen(Network.VAE):
            return self.decode(latents)
        return (torch.cat(pictures).cpu() / 2 + 0.5).clamp(0, 1)

    def _decoded(self, z: Tensor) -> Tensor:
        vae = self.parts.vae
        with self.precision.of(Network.VAE):
            z = z.to(self.precision.given(Network.VAE)) / vae.config.scaling_factor
            return vae.decode(z, return_dict=False)[0].float()


def _device(name: str) -> torch.device:
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"The device {name!r} can't be used here ({str(error).splitlines()[0]}). Use auto or cpu."
        ) from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    return getattr(torch, name)
