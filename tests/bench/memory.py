"""What each part keeps in memory for its gradient, on models of full size: `python -m tests.bench.memory`.

Counted on PyTorch's meta device, where tensors have a size and no content, so it needs neither a GPU nor the memory.
Attention counts as fused (sdp, xformers): it keeps what goes in and comes out, not the attention matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as meta_config

from lib_estimate.hosts import denoising
from lib_estimate.hosts.base import StepConditioning
from lib_estimate.hosts.standalone import StandaloneSession
from lib_estimate.learn.objectives.base import Objective
from lib_estimate.learn.objectives.cross_attention import CrossAttention
from lib_estimate.learn.objectives.denoising import Denoising
from lib_estimate.learn.objectives.hidden_state import HiddenState
from lib_estimate.learn.registry import LOSSES
from lib_estimate.request import EstimateRequest
from lib_estimate.target.bank import Bank
from lib_estimate.target.queries import Queries
from lib_estimate.target.recording import recording
from lib_estimate.target.target import Target
from tests.bench.full_size import SIDE, random_host

GIB = 2**30
VECTORS = 20
REQUEST = EstimateRequest(prompt="a red circle", name="memory")


class Fused(torch.autograd.Function):
    """Attention that keeps its inputs and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class Kept:
    """Bytes kept for a gradient while it is entered, weights left out; each tensor counts once."""

    def __init__(self, weights: list[nn.Module]) -> None:
        self.ignored = {p.untyped_storage()._cdata for network in weights for p in network.parameters()}
        self.seen: dict[int, Tensor] = {}  # the tensors themselves, so that no address is used again
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in self.ignored:
            self.seen[place] = tensor
        return tensor

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *given: Any) -> None:
        self._hooks.__exit__(*given)

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.seen.values())


def kept(session: StandaloneSession, run: Callable[[], Tensor]) -> int:
    with Kept(list(session.parts.networks())) as count:
        run()
    return count.bytes


def recomputed(session: StandaloneSession, run: Callable[[], Tensor]) -> int:
    """With activations computed again: what enters every block, what is kept outside of them, and the largest block."""
    entering, largest = 0, 0

    def counted(forward: Callable[..., Tensor], *given: Any, **named: Any) -> Tensor:
        nonlocal entering, largest
        inputs = [t for t in (*given, *named.values()) if isinstance(t, Tensor)]
        entering += inputs[0].nbytes  # the timestep and the text are the same for all
        with Kept([session.parts.unet]) as inside:
            out = forward(*given, **named)
        largest = max(largest, inside.bytes)
        return out

    with mock.patch.object(denoising.Recomputed, "_run", staticmethod(counted)):
        blocks = denoising.Recomputed(session.parts.unet)
        try:
            outside = kept(session, run)
        finally:
            blocks.restore()
    return outside + entering + largest


def objectives(session: StandaloneSession, family: str) -> dict[str, Objective]:
    """Each part, with a recording of its default size."""
    side, dtype = SIDE[family], session.dtype

    def bank(entries: int) -> Bank:
        x = torch.empty(entries, session.info.latent_channels, side, side, device="meta")
        timestep = torch.zeros(entries, dtype=torch.long, device="meta")
        return Bank(x, timestep, torch.zeros(entries, dtype=torch.long), x, x, None)

    with torch.no_grad():
        given = session.encode(["a red circle"])
        guidance = (StepConditioning(((1.0, given),), given),)
        target = Target(guidance, None, session.encode([""]), False, session.placeholder)
    what = recording(REQUEST)
    latents = what.count * what.steps * len(what.offsets)
    layers = denoising.attention_modules(session.parts.unet)
    hidden = [
        torch.empty(latents, REQUEST.queries, layer.to_q.in_features, dtype=dtype, device="meta") for layer in layers
    ]
    queries = Queries(hidden, torch.zeros(latents, dtype=torch.long), REQUEST.queries, REQUEST.queries)
    distance = LOSSES[REQUEST.loss]
    return {
        "transformer": HiddenState(session, target, distance),
        "cross-attention": CrossAttention(session, target, queries, distance),
        "unet": Denoising(session, target, bank(latents), bank(latents), distance, REQUEST.batch),
    }


def measure(family: str) -> None:
    host = random_host("meta", "float16", family)
    fused = mock.patch.object(
        nn.functional, "scaled_dot_product_attention", lambda q, k, v, *_, **__: Fused.apply(q, k, v)
    )
    # Without content, a mask is taken for one that takes all; here it does.
    masks = mock.patch.object(meta_config, "meta_nonzero_assume_all_nonzero", True)
    with host.session() as session, fused, masks:
        weights = {type(n).__name__: sum(p.nbytes for p in n.parameters()) / GIB for n in host.parts.networks()}
        print(f"{family}, float16, {SIDE[family]} x {SIDE[family]} latents; GiB")
        print("  weights: " + ", ".join(f"{name} {size:.2f}" for name, size in weights.items()))
        vectors = {
            key: torch.zeros(VECTORS, width, device="meta", requires_grad=True)
            for key, width in session.info.widths.items()
        }
        for name, objective in objectives(session, family).items():
            drawn = objective.draw(torch.Generator(), fixed=True)

            def first(objective: Objective = objective, drawn: Any = drawn) -> Tensor:
                return next(iter(objective.losses(vectors, drawn)))

            print(f"  {name}: {kept(session, first) / GIB:.2f}")
            if isinstance(objective, Denoising):
                print(f"  {name} takes {objective.at_once} at once")
                objective.at_once = 1
                print(f"  {name}, one latent at a time: {kept(session, first) / GIB:.2f}")
                print(f"  {name}, activations computed again: {recomputed(session, first) / GIB:.2f}")


if __name__ == "__main__":
    for each in SIDE:
        measure(each)
