"""A webui's model as a `base.Session`: what all webuis share, over what each family does in its own way (`Loaded`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from modules import call_queue, devices, processing
from torch import Tensor, nn

from lib_estimate.hosts import denoising
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
from lib_estimate.hosts.family import family
from lib_estimate.hosts.placement import Placed, Placement
from lib_estimate.hosts.precision import Precision
from lib_estimate.hosts.webui_networks import Switch, Switchable, switching
from lib_estimate.hosts.webui_text import Engine, WebuiText


class Loaded(Switchable, Protocol):
    """A webui's checkpoint that can be learnt on, as one family of webuis holds it."""

    model: Any  # what the webui's own functions take
    engines: Mapping[str, Engine]
    unet: nn.Module
    velocity: bool  # whether the U-Net predicts v
    latent_channels: int
    latent_scale: int
    default_size: int
    device: torch.device
    dtype: torch.dtype  # what the U-Net calculates in
    placement: Placement  # while it is lent

    def lent(self) -> AbstractContextManager[None]:
        """Frozen, in its place, and ready for gradients; afterwards as the webui wants it."""

    def returned(self) -> AbstractContextManager[None]:
        """Inside of `lent`: the webui's for a moment, to decode or encode pictures in its own way."""

    def alphas_cumprod(self) -> Tensor:
        """`[T]`, float32, on the device."""

    def network_output(
        self, x: Tensor, timestep: Tensor, hidden: Tensor, vector: Tensor | None, extra: Tensor | None
    ) -> Tensor:
        """What the U-Net says for latents x; vector `[B, V]` for SDXL; extra: channels of inpainting checkpoints."""

    def told_sizes(self, height: int, width: int) -> Tensor:
        """`[1, S]`, what SDXL is told of a picture's size and of what was cut off."""

    def image_conditioning(self, x: Tensor, width: int, height: int) -> Tensor | None:
        """`[1, ...]`, what txt2img feeds into the extra channels of inpainting checkpoints, for one latent x. A dummy,
        or None, for all others."""


class WebuiHost:
    """The webui's model on loan. `locked`: whether the caller holds the webui's queue lock already."""

    def __init__(self, *, locked: bool) -> None:
        self.locked = locked

    @contextmanager
    def session(self, *, tags: bool = False) -> Iterator[WebuiSession]:
        if not self.locked:
            with call_queue.queue_lock:
                yield from self._session(tags)
            return
        yield from self._session(tags)

    def without(self, names: Collection[str]) -> WebuiHost:
        return self  # the webui doesn't know a batch's files before the tab tells it of them, after the batch

    def _session(self, tags: bool) -> Iterator[WebuiSession]:
        model = family().loaded()
        with switching(model) if tags else nullcontext() as switch, model.lent():
            session = WebuiSession(model, switch)
            try:
                yield session
            finally:
                session.close()


class WebuiSession(Placed, WebuiText):
    """See `base.Session`."""

    def __init__(self, model: Loaded, switch: Switch | None) -> None:
        super().__init__(model.engines, model.device)
        self.model, self.unet, self.switch = model, model.unet, switch
        checkpoint = model.model.sd_checkpoint_info
        self.info = ModelInfo(
            name=checkpoint.model_name,
            hash=checkpoint.shorthash,
            widths=self.widths(),
            chunk_length=self.encoder.chunk_length,
            latent_channels=model.latent_channels,
            latent_scale=model.latent_scale,
            default_size=model.default_size,
            device=model.device,
            dtype=model.dtype,
        )
        self.levels = denoising.Levels(model.alphas_cumprod(), model.velocity)
        self.placement, self.precision = model.placement, Precision(model.device, model.dtype)
        self.forwards, self._at_once = 0, denoising.AtOnce()
        self._extra: dict[tuple[int, ...], Tensor | None] = {}
        self._sizes: dict[tuple[int, ...], Tensor] = {}

    def close(self) -> None:
        self.precision.end()
        super().close()

    def encode(self, *given: Any, networks: str = "", **named: Any) -> Conditioning:
        self._have_at_work(networks)
        self.placement.bring(Network.TEXT)
        return replace(super().encode(*given, **named), networks=networks)

    def _have_at_work(self, networks: str) -> None:
        """Extra networks may bring embeddings with them, so that texts are read anew."""
        if self.switch is not None and self.switch.to(networks):
            self._batches.clear()

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        with devices.autocast(), self.precision.of(Network.TEXT):
            yield

    def predict_noise(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return self._at_once.run(self.predict_at_once, x, timestep, conditioning)

    def predict_at_once(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        self._have_at_work(conditioning.networks)
        given, dtype = conditioning.expand(len(x)), self.precision.given(Network.UNET)
        vector, extra = self._vector(x, given), self._image_conditioning(x)
        self.placement.bring(Network.UNET)
        self.forwards += len(x) * denoising.cost(conditioning, self.placement.recomputes)
        with devices.autocast(), self.precision.of(Network.UNET):
            out = self.model.network_output(x.to(dtype), timestep, given.hidden.to(dtype), vector, extra).float()
        return self.levels.said(out, x, timestep)

    def _vector(self, x: Tensor, given: Conditioning) -> Tensor | None:
        """`[B, V]`, SDXL's pooled vector and sizes."""
        if given.pooled is None:
            return None
        return torch.cat([given.pooled, self._told_sizes(x).expand(len(x), -1)], dim=1).to(
            self.precision.given(Network.UNET)
        )

    @torch.no_grad()
    def _told_sizes(self, x: Tensor) -> Tensor:
        height, width = size = tuple(side * self.info.latent_scale for side in x.shape[-2:])
        if size not in self._sizes:
            self._sizes[size] = self.model.told_sizes(height, width).to(self.info.device).float()
        return self._sizes[size]

    @torch.no_grad()
    def _image_conditioning(self, x: Tensor) -> Tensor | None:
        """The webui draws it from what its VAE makes of a grey picture; here it is the same draw each time."""
        shape = tuple(x.shape[1:])
        if shape not in self._extra:
            height, width = (side * self.info.latent_scale for side in x.shape[-2:])
            self.placement.bring(Network.VAE)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                made = self.model.image_conditioning(x[:1].detach(), width, height)
            self._extra[shape] = None if made is None else made.to(self.info.device, self.info.dtype, copy=True)
        made = self._extra[shape]
        return None if made is None else made.expand(len(x), *made.shape[1:])

    def sensitivity(self, x: Tensor, timestep: Tensor, conditioning: Conditioning, probe: Tensor) -> Sensitivity:
        return denoising.sensitivity(self.unet, self.predict_noise, x, timestep, conditioning, probe)

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
        watched = watch is not None or watch_negative is not None
        predict = self.predict_at_once if watched else self.predict_noise
        return denoising.sample(
            predict, self.levels, noise.to(self.info.device).float(), guidance, cfg_scale, offset=offset,
            watch_positive=lambda step: denoising.watching(self.unet, watch, step),
            watch_negative=lambda step: denoising.watching(self.unet, watch_negative, step),
        )  # fmt: skip

    def cross_attention(self) -> list[CrossAttentionLayer]:
        def call(module: nn.Module) -> CrossAttentionLayer:
            def layer(hidden: Tensor, context: Tensor) -> Tensor:
                self._have_at_work("")
                self.placement.bring(Network.ATTENTION)
                with devices.autocast(), self.precision.of(Network.UNET):
                    return module(hidden, context=context.to(self.precision.given(Network.UNET))).float()

            return layer

        return [call(module) for module in denoising.attention_modules(self.unet)]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        self.placement.bring(Network.VAE)
        with self.model.returned(), devices.autocast(), self.precision.of(Network.VAE):
            pictures = processing.decode_latent_batch(self.model.model, latents, target_device=devices.cpu)
        made = torch.stack(list(pictures)).float()
        if not made.isfinite().all() and self.widen(Network.VAE):
            return self.decode(latents)
        return (made / 2 + 0.5).clamp(0, 1)
