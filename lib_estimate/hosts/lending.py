"""A webui's networks on loan: weights that take no gradient, and everything as it was when they go back.

The Forge family loads and moves its networks inside of torch's inference mode, and such tensors can't be part of a
gradient, not even as constants. A view of the same memory that is made outside of it can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lib_estimate.hosts.base import Network
from lib_estimate.hosts.placement import Placement
from lib_estimate.request import Offload

Place = tuple[dict[str, Any], str]  # a module's dictionary of parameters or buffers, and a name in it


@contextmanager
def frozen(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Weights that take no gradient, evaluation mode, no gradient checkpointing of the ldm kind (it wants gradients
    of the weights); afterwards everything is as it was."""
    flags = [(p, p.requires_grad) for network in networks for p in network.parameters()]
    modes = [(module, module.training) for network in networks for module in network.modules()]
    checkpointed = [
        (module, name)
        for module, _ in modes
        for name in ("checkpoint", "use_checkpoint")
        if module.__dict__.get(name) is True
    ]
    try:
        for network in networks:
            network.requires_grad_(False).eval()
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


class Views:
    """Frozen views of networks' weights in the place of the weights, from `put` until `take`.

    Between the two nothing may move the networks: the views would move, and the weights stay.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self.networks = list(networks)
        self._before: list[tuple[Place, Tensor]] = []

    def put(self) -> None:
        """Does nothing where they stand there already. A tensor that several modules share stays shared."""
        if self._before:
            return
        made: dict[int, Tensor] = {}
        with torch.inference_mode(False):
            for tensors, name in self._places():
                tensor = tensors[name]
                if id(tensor) not in made:
                    made[id(tensor)] = _view(tensor)
                self._before.append(((tensors, name), tensor))
                tensors[name] = made[id(tensor)]

    def take(self) -> None:
        """The weights themselves are there again."""
        for (tensors, name), tensor in self._before:
            tensors[name] = tensor
        self._before.clear()

    def _places(self) -> list[Place]:
        return [
            (tensors, name)
            for network in self.networks
            for module in network.modules()
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None and type(tensor) in (Tensor, nn.Parameter)  # quantised ones have a type of their own
        ]


def _view(tensor: Tensor) -> Tensor:
    """Of the same memory, made where this is called: in inference mode or not."""
    view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    view.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return nn.Parameter(view, requires_grad=False) if isinstance(tensor, nn.Parameter) else view


class Managed(Placement):
    """The placement of a webui that moves its networks itself: told what is needed, it loads that.

    Views stand in for the weights from then on, until something else is needed.
    """

    adds_in_place = True

    def __init__(
        self,
        text: Sequence[nn.Module],
        unet: nn.Module,
        vae: nn.Module,
        device: torch.device,
        views: Views,
        load: Callable[[Mapping[Network, bool]], None],
        free: Callable[[], int | None],
    ) -> None:
        """load: has the webui load the networks that are needed, of TEXT and UNET."""
        super().__init__(text, unet, vae, device, Offload.OFF, free=free)
        self.mode, self._views, self._load = Offload.NETWORKS, views, load

    def place(self, *networks: Network) -> None:
        needed = {Network.UNET if network is Network.ATTENTION else network for network in networks} - {Network.VAE}
        if needed and needed == self.placed:
            return
        self.leave()
        self._load({network: network in needed for network in (Network.TEXT, Network.UNET)})
        self._views.put()
        self.placed = frozenset(needed)

    def bring(self, network: Network) -> None:
        network = Network.UNET if network is Network.ATTENTION else network
        if network not in self.placed:
            self.place(*self.placed, network)

    def leave(self) -> None:
        """The webui's weights are in their place again; what is needed next is loaded anew."""
        self._views.take()
        self.placed = frozenset()

    def choose(self, mode: Offload) -> None:
        """The webui has chosen."""

    def end(self) -> None:
        super().end()
        self.leave()


@contextmanager
def kept_for_the_gradient(unet: nn.Module) -> Iterator[None]:
    """The blocks of the Forge family add to what their norms have kept for the gradient; here the norms keep a copy."""

    def copied(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (given[0].clone(), *given[1:]) if given[0].requires_grad else given

    blocks = [module for module in unet.modules() if getattr(module, "attn2", None) is not None]
    handles = [
        norm.register_forward_pre_hook(copied) for b in blocks for norm in (b.norm1, b.norm2) if norm is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
