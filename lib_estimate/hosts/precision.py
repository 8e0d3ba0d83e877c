"""What networks of float16 calculate in. Its largest number is 65,504; where a model goes beyond, bfloat16, which holds
numbers as large as float32 does, goes on.

The weights stay as they are: each layer takes a copy of its own for as long as it runs. Autocast can't do that: float16
and bfloat16 beside each other are a mistake to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lib_estimate.hosts.base import Network

NORMS = (nn.GroupNorm, nn.LayerNorm)  # some take what they are given as float32 anyway


class Precision:
    """Which networks of one session calculate in bfloat16 instead of float16. After `end` all do as at first."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """dtype: what the networks calculate in."""
        self.device, self.dtype = device, dtype
        self._wide: set[Network] = set()
        self._layers: list[tuple[nn.Module, Any]] = []  # with what stood in the place of their forward

    def widen(self, network: Network, roots: Sequence[nn.Module]) -> bool:
        """See `base.Session.widen`. roots: the network's modules."""
        if self.dtype is not torch.float16 or network in self._wide:
            return False
        self._wide.add(network)
        for module in {id(m): m for root in roots for m in root.modules()}.values():
            # Rows of a token table are looked up, and what follows takes them in any format.
            if not isinstance(module, nn.Embedding) and any(True for _ in module.parameters(recurse=False)):
                self._layers.append((module, vars(module).get("forward")))
                module.forward = partial(_widely, module, module.forward)
        return True

    def of(self, network: Network) -> AbstractContextManager[Any]:
        """Around each use of a network: no autocast, which would go back to float16."""
        return torch.autocast(self.device.type, enabled=False) if network in self._wide else nullcontext()

    def given(self, network: Network) -> torch.dtype:
        """What a network's inputs are given in."""
        return torch.float32 if network in self._wide else self.dtype

    def end(self) -> None:
        """Puts the layers' own methods back."""
        while self._layers:
            module, before = self._layers.pop()
            if before is None:
                del module.forward
            else:
                module.forward = before
        self._wide.clear()


def _widely(module: nn.Module, forward: Any, *given: Any, **named: Any) -> Any:
    """forward(*given, **named) of a layer, in float32 for norms and else in bfloat16."""
    dtype = torch.float32 if isinstance(module, NORMS) else torch.bfloat16
    given, named = [_as(dtype, value) for value in given], {key: _as(dtype, value) for key, value in named.items()}
    # Torch's own attention reads the weights of the layer behind it by itself.
    modules = module.modules() if isinstance(module, nn.MultiheadAttention) else [module]
    with _copies(modules, dtype):
        return forward(*given, **named)


def _as(dtype: torch.dtype, value: Any) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def _copies(modules: Sequence[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Copies of modules' own parameters stand in their place."""
    own = [(m._parameters, name, p) for m in modules for name, p in m._parameters.items() if p is not None]
    try:
        for parameters, name, parameter in own:
            parameters[name] = _as(dtype, parameter)
        yield
    finally:
        for parameters, name, parameter in own:
            parameters[name] = parameter
