"""What each objective keeps in memory for its gradient, on models of full size: `python -m tests.bench.memory`.

Counted on PyTorch's meta device, where tensors have a size and no content, so it needs neither a GPU nor the memory.
Attention counts as fused (sdp, xformers): it keeps what goes in and comes out, not the attention matrix. What each
calculates is counted in the same way, for `python -m tests.bench --random-full-size --device meta`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as meta_config
from torch.utils.flop_counter import FlopCounterMode

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts import denoising
from lib_estimate.hosts.base import Conditioning, StepConditioning
from lib_estimate.hosts.standalone import StandaloneSession
from lib_estimate.learn import plan
from lib_estimate.learn.learning import Judged, Lessons
from lib_estimate.learn.objectives.base import Objective
from lib_estimate.learn.objectives.denoising import Denoising
from lib_estimate.learn.objectives.sketch import Sketch, Sketched, SketchInSentences
from lib_estimate.request import EstimateRequest, Part, Use
from lib_estimate.target.bank import Bank
from lib_estimate.target.queries import Queries
from lib_estimate.target.recording import Material, checks, recording
from lib_estimate.target.target import Target
from tests.bench.cost import ATTENTION, KINDS, SENTENCES, SKETCH, UNET, default_sketch, latents
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


def objectives(session: StandaloneSession, family: str) -> dict[str, Judged]:
    """Each of the program's objectives with its check, over a recording of the default size."""
    whole = Lessons(replace(REQUEST, use=Use.WHOLE), session, [_material(session, family)])
    anywhere = Lessons(replace(REQUEST, use=Use.ANYWHERE), session, whole.materials)
    for lessons in (whole, anywhere):
        lessons.sketches.append(default_sketch(lessons, run=1))
    return {
        "transformer": whole.of(plan.DEFAULTS[Part.TRANSFORMER]),
        **{name: (whole if kind.use is Use.WHOLE else anywhere).of(kind.stage) for name, kind in KINDS.items()},
    }


def _material(session: StandaloneSession, family: str) -> Material:
    """Sizes alone."""
    side = SIDE[family]

    def bank(count: int) -> Bank:
        x = torch.empty(count, session.info.latent_channels, side, side, device="meta")
        timestep = torch.zeros(count, dtype=torch.long, device="meta")
        return Bank(x, timestep, torch.zeros(count, dtype=torch.long), torch.empty(count, device="meta"), x, x, None)

    def queries(count: int) -> Queries:
        layers = denoising.attention_modules(session.parts.unet)
        hidden = [
            torch.empty(count, REQUEST.queries, layer.to_q.in_features, dtype=session.dtype, device="meta")
            for layer in layers
        ]
        return Queries(hidden, torch.zeros(count, dtype=torch.long), REQUEST.queries, REQUEST.queries)

    with torch.no_grad():
        given = session.encode(["a red circle"])
        guidance = (StepConditioning(((1.0, given),), given),)
        target = Target(guidance, None, session.encode([""]), False, session.placeholder)
    learnt, checked = latents(recording(REQUEST)), latents(checks(REQUEST))
    return Material(target, bank(learnt), bank(checked), queries(learnt), queries(checked))


def vectors_of(session: StandaloneSession) -> Vectors:
    return {
        key: torch.zeros(VECTORS, width, device="meta", requires_grad=True)
        for key, width in session.info.widths.items()
    }


@contextmanager
def on_meta(family: str) -> Iterator[StandaloneSession]:
    """A session on a model without content."""
    host = random_host("meta", "float16", family)
    # Without content, a mask is taken for one that takes all; here it does.
    masks = mock.patch.object(meta_config, "meta_nonzero_assume_all_nonzero", True)
    # And what is read off the latents is not there to be read.
    levels = mock.patch.object(SketchInSentences, "_levels", lambda self, count: torch.ones(count))
    with host.session() as session, masks, levels:
        yield session


# ---- memory -------------------------------------------------------------------------------------------------------


def measure(family: str) -> None:
    fused = mock.patch.object(
        nn.functional, "scaled_dot_product_attention", lambda q, k, v, *_, **__: Fused.apply(q, k, v)
    )
    with on_meta(family) as session, fused:
        networks = session.parts.networks()
        weights = {type(n).__name__: sum(p.nbytes for p in n.parameters()) / GIB for n in networks}
        print(f"{family}, float16, {SIDE[family]} x {SIDE[family]} latents; GiB")
        print("  weights: " + ", ".join(f"{name} {size:.2f}" for name, size in weights.items()))
        vectors = vectors_of(session)
        for name, (objective, _) in objectives(session, family).items():
            drawn = objective.draw(torch.Generator(), fixed=not isinstance(objective, SketchInSentences))

            def first(objective: Objective = objective, drawn: Any = drawn) -> Tensor:
                return next(iter(objective.losses(vectors, drawn)))

            print(f"  {name}: {kept(session, first) / GIB:.2f}")
            if isinstance(objective, Sketch | SketchInSentences):
                size = f"{stored(objective.recorded) / GIB:.2f} of {len(objective.recorded.given)} latents"
                print(f"  {name}, recorded at --memory {REQUEST.memory:g}: {size}")
            if isinstance(objective, Denoising):
                print(f"  {name} takes {objective.at_once} at once")
                objective.at_once = 1
                print(f"  {name}, one latent at a time: {kept(session, first) / GIB:.2f}")
                print(f"  {name}, activations computed again: {recomputed(session, first) / GIB:.2f}")


def stored(sketched: Sketched) -> int:
    """Bytes of a sketch."""
    pooled = 0 if sketched.pooled is None else sketched.pooled.nbytes
    return pooled + sum(layer.hidden.nbytes + layer.gradient.nbytes for layer in sketched.layers)


# ---- arithmetic ---------------------------------------------------------------------------------------------------


def arithmetic(family: str) -> dict[str, float]:
    """What each objective calculates in an evaluation (loss and gradient), and a check of vectors, as shares of what a
    U-Net forward of one latent does. Matrix products and convolutions are counted, which is nearly all."""
    with on_meta(family) as session:
        vectors, judged = vectors_of(session), objectives(session, family)
        noise, _ = judged.pop(UNET)
        x, timestep = noise.bank.x[:1], noise.bank.timestep[:1]
        with torch.no_grad():
            forward = flops(lambda: session.predict_noise(x, timestep, noise.target.empty))
        given = Conditioning(*(None if t is None else t.clone().requires_grad_(True) for t in _tensors(noise.target)))
        shares = {"with gradient": flops(lambda: session.predict_noise(x, timestep, given).sum().backward())}
        for name, (objective, _) in judged.items():
            shares[name] = flops(lambda o=objective: _evaluate(o, vectors))
        for name in (ATTENTION, SKETCH, SENTENCES):
            shares[f"check, {name}"] = flops(lambda error=judged[name][1]: _checked(error, vectors))
        shares["picture"] = flops(lambda: session.parts.vae.decode(x.to(session.dtype)))
    return {name: share / forward for name, share in shares.items()}


def flops(run: Callable[[], Any]) -> int:
    """Operations of the matrix products and convolutions in it."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _tensors(target: Target) -> tuple[Tensor, Tensor | None]:
    return target.empty.hidden, target.empty.pooled


def _evaluate(objective: Objective, vectors: Vectors) -> None:
    """As in a step of the loop; sentences are drawn anew in each."""
    drawn = objective.draw(torch.Generator().manual_seed(0), fixed=not isinstance(objective, SketchInSentences))
    for loss in objective.losses(vectors, drawn):
        loss.backward()


def _checked(error: Callable[[Vectors], float], vectors: Vectors) -> None:
    """The check up to its number, which without content there is none of."""
    with suppress(RuntimeError, NotImplementedError):
        error(vectors)


if __name__ == "__main__":
    for each in SIDE:
        measure(each)
