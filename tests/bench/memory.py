"""What each part of a run needs on the card, on models of full size: `python -m tests.bench.memory`.

Counted on PyTorch's meta device, where tensors have a size and no content, so it needs neither a GPU nor the memory.
Attention counts as fused (sdp, xformers): it keeps what goes in and comes out, not the attention matrix. What each
calculates is counted in the same way, for `python -m tests.bench --random-full-size --device meta`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts import denoising
from lib_estimate.hosts.base import Conditioning, Network, StepConditioning
from lib_estimate.hosts.placement import Placement
from lib_estimate.hosts.standalone import StandaloneSession
from lib_estimate.learn import plan
from lib_estimate.learn.learning import Judged, Lessons
from lib_estimate.learn.objectives.base import Objective
from lib_estimate.learn.objectives.denoising import Denoising
from lib_estimate.learn.objectives.sketch import Sketched, SketchInSentences
from lib_estimate.learn.plan import Goal
from lib_estimate.request import EstimateRequest, Offload, Part, Use
from lib_estimate.target.bank import Bank
from lib_estimate.target.queries import Queries
from lib_estimate.target.recording import Material, checks, recording
from lib_estimate.target.target import Target
from tests.bench.cost import ATTENTION, KINDS, SENTENCES, SKETCH, UNET, default_sketch, latents
from tests.bench.full_size import SIDE, random_host

GIB = 2**30
MODES = (Offload.OFF, Offload.NETWORKS, Offload.BLOCKS)
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


class Peak(TorchDispatchMode):
    """Bytes of the tensors that are made while it is entered, at the most at once; views count once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, call: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = call(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage(), args)
        return out

    def _see(self, storage: torch.UntypedStorage, args: tuple) -> None:
        place, size = storage._cdata, storage.nbytes()
        given = (tensor for tensor in tree_flatten(args)[0] if isinstance(tensor, Tensor))
        if place in self._known or any(tensor.untyped_storage()._cdata == place for tensor in given):
            return  # a view, of what may have been there before
        self._known[place] = weakref.ref(storage, partial(self._gone, place, size))
        self.now += size
        self.most = max(self.most, self.now)

    def _gone(self, place: int, size: int, _: weakref.ref) -> None:
        del self._known[place]
        self.now -= size


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
    return Material(session, target, bank(learnt), bank(checked), queries(learnt), queries(checked))


def vectors_of(session: StandaloneSession) -> Vectors:
    return {
        key: torch.zeros(VECTORS, width, device="meta", requires_grad=True)
        for key, width in session.info.widths.items()
    }


@contextmanager
def on_meta(family: str) -> Iterator[StandaloneSession]:
    """A session on a model without content, on PyTorch 2.6 or later."""
    from torch.fx.experimental import _config as meta_config

    host = random_host("meta", "float16", family)
    # Without content, a mask is taken for one that takes all; here it does.
    masks = mock.patch.object(meta_config, "meta_nonzero_assume_all_nonzero", True)
    # And what is read off the latents is not there to be read.
    levels = mock.patch.object(SketchInSentences, "_levels", lambda self, count: torch.ones(count))
    with host.session() as session, masks, levels:
        yield session


# ---- memory -------------------------------------------------------------------------------------------------------


class Phase(NamedTuple):
    """Something a run does: what has to be on the device for it, and what lies there besides, in bytes."""

    networks: tuple[Network, ...]
    run: Callable[[], Any]
    recorded: int = 0


def phases(session: StandaloneSession, family: str) -> dict[str, Phase]:
    """What any run consists of, each with as little at once as it goes down to where memory is short."""
    vectors, judged = vectors_of(session), objectives(session, family)
    noise, x = judged[UNET][0], judged[UNET][0].bank.x
    together, noise.at_once = noise.at_once, 1
    given, timestep, probe = noise.target.single(), noise.bank.timestep, torch.empty_like(x[:1])

    @torch.no_grad()
    def forward(count: int) -> None:
        session.predict_noise(x[:count], timestep[:count], given)

    def learning(name: str, at_once: int = 1) -> Callable[[], None]:
        return lambda: _first(judged[name][0], vectors, at_once)

    def sketch() -> None:
        session.sensitivity(x[:1], timestep[:1], given, probe)

    @torch.no_grad()
    def decode() -> None:
        session.placement.bring(Network.VAE)
        session.parts.vae.decode(x[:1].to(session.dtype))

    sketches = {name: stored(judged[name][0].recorded) for name in (SKETCH, SENTENCES)}
    polish, unet = plan.NETWORKS[Goal.NOISE_AND_SKETCH], plan.NETWORKS[Goal.NOISE]
    several = {f"unet, {together} at once": Phase(unet, learning(UNET, together))} if together > 1 else {}
    return {
        "recording": Phase((Network.UNET,), lambda: forward(recording(REQUEST).count)),
        "sketching": Phase((Network.UNET,), sketch, max(sketches.values())),
        "transformer": Phase(plan.NETWORKS[Goal.HIDDEN_STATES], learning("transformer")),
        ATTENTION: Phase(plan.NETWORKS[Goal.CROSS_ATTENTION], learning(ATTENTION)),
        SKETCH: Phase(plan.NETWORKS[Goal.SKETCH], learning(SKETCH), sketches[SKETCH]),
        SENTENCES: Phase(plan.NETWORKS[Goal.SKETCH], learning(SENTENCES), sketches[SENTENCES]),
        UNET: Phase(unet, learning(UNET)),
        **several,
        "polish": Phase(polish, learning(UNET), sketches[SKETCH]),
        "report": Phase((Network.UNET,), lambda: forward(REQUEST.images)),
        "decoding": Phase((Network.VAE,), decode),
    }


def _first(objective: Objective, vectors: Vectors, at_once: int) -> None:
    """The first of an evaluation's losses with its gradient."""
    if isinstance(objective, Denoising):
        objective.at_once = at_once
    drawn = objective.draw(torch.Generator(), fixed=not isinstance(objective, SketchInSentences))
    next(iter(objective.losses(vectors, drawn))).backward()


WITH_GRADIENT = ("sketching", UNET, "polish")  # through the U-Net: what recomputing activations makes smaller
PARTS = {  # what each part of a request goes through
    "transformer": ("recording", "transformer", "report", "decoding"),
    "cross-attention": ("recording", ATTENTION, "report", "decoding"),
    "auto, anywhere": ("recording", "sketching", SENTENCES, "report", "decoding"),
    "auto, whole": ("recording", "sketching", ATTENTION, SKETCH, "polish", "report", "decoding"),
    "unet": ("recording", UNET, "report", "decoding"),
}


def needs(session: StandaloneSession, each: Phase, mode: Offload, *, recomputed: bool) -> int:
    """Bytes on the device at the most."""
    parts = session.parts
    text = [encoder.model for encoder in parts.text_encoders]
    session.placement = Placement(text, parts.unet, parts.vae, session.info.device, mode)
    there = session.room().taken(mode, ()) if mode is Offload.OFF else 0
    try:
        if recomputed:
            session.save_memory()
        with Peak() as peak:
            session.place(*each.networks)
            each.run()
    finally:
        session.placement.end()
    return there + each.recorded + peak.most


def counted(family: str) -> dict[tuple[str, Offload, bool], int]:
    """Bytes by phase, mode and whether activations are recomputed."""
    fused = mock.patch.object(
        nn.functional, "scaled_dot_product_attention", lambda q, k, v, *_, **__: Fused.apply(q, k, v)
    )
    found = {}
    with on_meta(family) as session, fused:
        for name, each in phases(session, family).items():
            for mode in MODES:
                for recomputed in (False, True) if name.startswith(WITH_GRADIENT) else (False,):
                    found[name, mode, recomputed] = needs(session, each, mode, recomputed=recomputed)
    return found


def measure(family: str) -> None:
    """Prints what each phase and each part needs."""
    found = counted(family)
    print(f"{family}, float16, {SIDE[family]} x {SIDE[family]} latents; GB (2^30 bytes) on the card at the most")
    print(f"  {'':40}" + "".join(f"{mode.value:>10}" for mode in MODES))
    for name, recomputed in dict.fromkeys((name, recomputed) for name, _, recomputed in found):
        said = name + (", activations recomputed" if recomputed else "")
        print(f"  {said:40}" + "".join(f"{found[name, mode, recomputed] / GIB:10.2f}" for mode in MODES))
    print("  parts, with the way that needs least")
    for part, names in PARTS.items():
        for recomputed in (False, True):
            if recomputed and not set(names) & set(WITH_GRADIENT):
                continue
            most = [max(found[n, mode, recomputed and n in WITH_GRADIENT] for n in names) for mode in MODES]
            said = part + (", activations recomputed" if recomputed else "")
            print(f"  {said:40}" + "".join(f"{size / GIB:10.2f}" for size in most))


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
