"""Which of the model's networks are on the device now.

Nothing is written back when a network is taken off: the weights are frozen while a model is on loan, so the tensors it
came with stay untouched in main memory, and a copy on the device takes their place for as long as it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from lib_estimate.hosts.base import Network, Room
from lib_estimate.hosts.denoising import Recomputed, attention_modules, blocks_of
from lib_estimate.hosts.precision import Precision
from lib_estimate.request import Offload

MAIN_MEMORY = ("cpu", "meta")  # weights that are elsewhere are on a card already, and their host's to move


@dataclass(eq=False)
class Weight:
    """Memory that one or more parameters (tied weights) or buffers show."""

    own: Tensor  # what the holders had at first
    holders: list[Tensor] = field(default_factory=list)
    on: bool = False

    @property
    def bytes(self) -> int:
        return self.own.nbytes

    def show(self, tensor: Tensor) -> None:
        for holder in self.holders:
            holder.data = tensor


class Placement:
    """The networks of a model that share a device.

    With mode OFF all of them stay where they are. With NETWORKS only what is needed is on the device. With BLOCKS,
    besides, only one block of the U-Net at a time, which brings its weights when it runs and, for the gradient, once
    more when it runs again. AUTO is NETWORKS until `choose` is called. After `end` every parameter has the memory it
    had at first.

    The weights must be in main memory when a placement is made; what is on a card then is left alone. So are parameters
    of other classes than torch's own, as quantised ones are.
    """

    adds_in_place = False  # see `Recomputed`

    def __init__(
        self,
        text: Sequence[nn.Module],
        unet: nn.Module,
        vae: nn.Module,
        device: torch.device,
        mode: Offload,
        *,
        free: Callable[[], int | None] | None = None,
        switches: Mapping[Offload, str] | None = None,
    ) -> None:
        """free: bytes that are free on the device, where the host knows better. switches: see `Room`."""
        self.modules = {Network.TEXT: list(text), Network.UNET: [unet], Network.VAE: [vae]}
        self.unet, self.device, self.mode = unet, device, mode
        self.free, self.switches = free or (lambda: free_on(device)), switches or {}
        self.placed: frozenset[Network] = frozenset()
        self.held = self.most = 0  # bytes of weights on the device by this placement, now and at the most
        self._kept: set[Weight] = set()  # weights of what is placed
        self._passing: set[Weight] = set()  # weights of the block that runs
        self._recomputed: Recomputed | None = None
        if mode is Offload.BLOCKS:
            self._go_by_blocks()

    # ---- what is on the device ----

    def place(self, *networks: Network) -> None:
        """See `base.Session.place`."""
        if self.mode is Offload.OFF:
            return
        needed = {weight for network in networks for weight in self._needed(network)}
        self.placed, self._passing = frozenset(), set()  # so what fails on the way can be tried again
        self._take_off(weight for weight in self._all.values() if weight not in needed)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._put_on(needed)
        self.placed, self._kept = frozenset(networks), needed

    def bring(self, network: Network) -> None:
        """Before each use of a network: puts it beside what is there, if it isn't there yet."""
        whole = Network.UNET in self.placed and self.mode is not Offload.BLOCKS
        if self.mode is Offload.OFF or network in self.placed or (network is Network.ATTENTION and whole):
            return
        needed = self._needed(network)
        self._put_on(needed)
        self.placed, self._kept = self.placed | {network}, self._kept | needed

    def choose(self, mode: Offload) -> None:
        """See `base.Session.offload`."""
        if self.mode is not Offload.AUTO:
            return
        if mode is Offload.OFF:
            self.place(Network.TEXT, Network.UNET, Network.VAE)
        elif mode is Offload.BLOCKS:
            self.place()
            self._go_by_blocks()
        self.mode = mode

    def recompute(self) -> bool:
        """See `base.Session.save_memory`."""
        if self._recomputed is not None:
            return False
        self._recomputed = Recomputed(self.unet, adds_in_place=self.adds_in_place)
        return True

    @property
    def recomputes(self) -> bool:
        return self._recomputed is not None

    def end(self) -> None:
        """Puts everything back."""
        if self._recomputed is not None:
            self._recomputed.restore()
            self._recomputed = None
        self.placed, self._kept, self._passing = frozenset(), set(), set()
        if "_all" in vars(self):
            self._take_off(self._all.values())

    def room(self) -> Room:
        """See `base.Session.room`."""
        free, there = self.free(), sum(t.nbytes for t in _plain(self._roots()) if t.device.type not in MAIN_MEMORY)
        return Room(
            free=None if free is None else free + self.held + there,
            there=self.held + there,
            mode=self.mode,
            weights={
                network: sum({id(t): t.nbytes for t in _plain(self._roots(network))}.values()) for network in Network
            },
            outside=sum(weight.bytes for weight in self._outside),
            block=max((sum(weight.bytes for weight in weights) for weights in self._blocks.values()), default=0),
            switches=self.switches,
        )

    # ---- weights ----

    def _roots(self, *networks: Network) -> list[nn.Module]:
        """The modules of networks; of all by default."""
        roots = self.modules | {Network.ATTENTION: attention_modules(self.unet)}
        return [module for network in networks or self.modules for module in roots[network]]

    @cached_property
    def _all(self) -> dict[tuple, Weight]:
        """All weights that can be moved, each memory once."""
        found: dict[tuple, Weight] = {}
        for tensor in _plain(self._roots()):
            if tensor.device.type in MAIN_MEMORY:
                found.setdefault(_memory(tensor), Weight(tensor.data)).holders.append(tensor)
        return found

    @cached_property
    def _weight_of(self) -> dict[int, Weight]:
        return {id(holder): weight for weight in self._all.values() for holder in weight.holders}

    def _weights(self, modules: Iterable[nn.Module]) -> set[Weight]:
        return {self._weight_of[id(tensor)] for tensor in _plain(modules) if id(tensor) in self._weight_of}

    @cached_property
    def _blocks(self) -> dict[nn.Module, set[Weight]]:
        return {block: self._weights([block]) for block in blocks_of(self.unet)}

    @cached_property
    def _outside(self) -> set[Weight]:
        """The U-Net's weights that are in no block."""
        return self._weights([self.unet]).difference(*self._blocks.values())

    def _needed(self, network: Network) -> set[Weight]:
        if network is Network.UNET and self.mode is Offload.BLOCKS:
            return self._outside
        return self._weights(self._roots(network))

    def _put_on(self, weights: Iterable[Weight]) -> None:
        for weight in weights:
            if not weight.on:
                copy = weight.own.to(self.device, copy=True)
                weight.on = True
                self.held += weight.bytes
                self.most = max(self.most, self.held)
                weight.show(copy)

    def _take_off(self, weights: Iterable[Weight]) -> None:
        for weight in weights:
            if weight.on:
                weight.show(weight.own)
                weight.on = False
                self.held -= weight.bytes

    # ---- block by block ----

    def _go_by_blocks(self) -> None:
        if self._recomputed is not None:
            self._recomputed.restore()
        self._recomputed = Recomputed(self.unet, self._pass)

    def _pass(self, block: nn.Module) -> None:
        """The block is about to run: it takes the place of the one before."""
        weights = self._blocks[block]
        self._take_off(self._passing - weights - self._kept)
        self._passing = weights
        self._put_on(weights)


class Placed:
    """What of `base.Session` its placement and its precision answer."""

    placement: Placement
    precision: Precision

    def widen(self, network: Network) -> bool:
        return self.precision.widen(network, self.placement.modules[network])

    def place(self, *networks: Network) -> None:
        self.placement.place(*networks)

    def room(self) -> Room:
        return self.placement.room()

    def offload(self, mode: Offload) -> None:
        self.placement.choose(mode)

    def save_memory(self) -> bool:
        return self.placement.recompute()


def _plain(modules: Iterable[nn.Module]) -> Iterable[Tensor]:
    """Parameters and buffers of torch's own classes, each object once."""
    for module in modules:
        yield from (p for p in module.parameters() if type(p) is nn.Parameter)
        yield from (b for b in module.buffers() if type(b) is Tensor)


def _memory(tensor: Tensor) -> tuple:
    """What two tensors have in common that show the same memory in the same way."""
    return (
        tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype,
    )  # fmt: skip


def free_on(device: torch.device) -> int | None:
    """Bytes that can be had on a device; None where PyTorch doesn't say."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached
