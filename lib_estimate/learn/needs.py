"""What a run needs on the device, before it starts: which phase needs most, what fits, and what would.

need = weights of the networks that the phase uses + what is recorded + a rate x latents x their pixels

Weights are counted on the loaded model. With attention computed in one piece, which keeps no matrix of all positions
with all others, activations grow with the latent's area. The rates are those that `python -m tests.bench.memory` counts
on models of full size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from lib_estimate.errors import OutOfMemory
from lib_estimate.hosts.base import ModelInfo, Network, Room, Session
from lib_estimate.learn import plan
from lib_estimate.learn.learning import ANCHORS
from lib_estimate.learn.plan import RUNS_THE_UNET, Goal
from lib_estimate.report.fidelity import SEEDS
from lib_estimate.request import EstimateRequest, Offload, Part
from lib_estimate.target.recording import recording

GB = 2**30
RESERVE = GB // 4  # what libraries take for themselves, and gaps between tensors
LESS_MEMORY = (0.5, 0.25, 0.1)  # for the sketch
SIZE_STEP = 64  # pixels by which smaller sizes are tried
MODES = (Offload.OFF, Offload.NETWORKS, Offload.BLOCKS)


@dataclass(frozen=True)
class Rates:
    """KiB per latent and pixel of it, in float16."""

    forward: float  # the U-Net without a gradient
    kept: float  # with its gradient
    recomputed: float  # the same, activations computed again
    decoded: float  # the VAE
    sketched: float  # what is kept of a sketch


# By the number of text encoders: Stable Diffusion 1 and 2, and XL.
RATES = {1: Rates(16.3, 188, 58, 96, 2.8), 2: Rates(9.9, 325, 42, 96, 6.4)}
# What learning without the U-Net takes beside the weights: as a share of these, or of what is recorded.
OF_WEIGHTS, OF_WEIGHTS_IN_SENTENCES = 0.08, 0.28
OF_THE_SKETCH = 2.2


@dataclass(frozen=True)
class Need:
    """Bytes that a phase needs: at the least, and with activations kept where it takes a gradient of the U-Net."""

    phase: str
    least: int
    kept: int


@dataclass(frozen=True)
class Way:
    """How a run goes about the memory that there is."""

    mode: Offload
    recompute: bool
    note: str | None


def shared(rooms: Sequence[Room]) -> Room:
    """The room of several checkpoints on one device, as that of a model with the weights of all of them."""
    first, *others = rooms
    return replace(
        first,
        free=None if first.free is None else first.free + sum(room.there for room in others),
        there=sum(room.there for room in rooms),
        weights={network: sum(room.weights[network] for room in rooms) for network in first.weights},
        outside=sum(room.outside for room in rooms),
        block=max(room.block for room in rooms),
    )


@dataclass(frozen=True)
class Case:
    """A request, on a model, on a device. composed: the prompt has AND, or a LoRA to take over; steady: it is the same
    at every step."""

    request: EstimateRequest
    info: ModelInfo
    room: Room
    composed: bool
    steady: bool

    def way(self) -> Way:
        """The first way that fits, of those that the host and the user leave open."""
        modes = MODES if self.room.mode is Offload.AUTO else (self.room.mode,)
        if self.room.free is None:
            return Way(modes[0], False, None)
        mode = next((mode for mode in modes if self.fits(mode)), None)
        if mode is None:
            fitting = "; ".join(self._fitting(modes[-1])) or "a card with more memory, or --device cpu"
            note = f"{self._least(modes[-1])}: it will probably not fit. What would: {fitting}."
            return Way(modes[-1], modes[-1] is not Offload.BLOCKS, note)
        roomy = max(self.needs(mode), key=lambda need: need.kept)
        if mode is not Offload.BLOCKS and roomy.kept > self.room.free:
            said = self._said(roomy.phase, roomy.kept)
            return Way(mode, True, f"{said}: it will recompute activations, about a third slower.")
        if mode is Offload.BLOCKS and self.room.mode is Offload.AUTO:
            said = self._least(Offload.NETWORKS)
            return Way(mode, False, f"{said}: the U-Net goes over the card block by block, which is slow.")
        return Way(mode, False, None)

    def full(self, error: str) -> str:
        """What to say once memory has run out all the same. error: torch's own words."""
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", error)
        said = "The card's memory is full" + (f": there was no room for {asked[1]} more." if asked else ".")
        mode = MODES[-1] if self.room.mode is Offload.AUTO else self.room.mode
        if self.room.free is None:
            return f"{said} Make --width and --height of the generations smaller."
        least = max(need.least for need in self.needs(mode))
        smaller = replace(self, room=replace(self.room, free=min(self.room.free, least - 1)))
        fitting = "; ".join(smaller._fitting(mode)) or "a card with more memory"
        return f"{said} {self._least(mode)}. What may fit: {fitting}."

    def fits(self, mode: Offload) -> bool:
        return max(need.least for need in self.needs(mode)) <= self.room.free

    def needs(self, mode: Offload) -> list[Need]:
        """Of each phase of a run, in order."""
        request, unit, unet = self.request, self._unit(), (Network.UNET,)
        goals = [stage.goal for stage in plan.stages(request, composed=self.composed, steady=self.steady)]
        sketch = self._sketch() if Goal.SKETCH in goals else 0
        gradient = (self.rates.recomputed * unit, self.rates.kept * unit)

        def need(phase: str, networks: tuple[Network, ...], least: float, kept: float = 0, sketch: float = 0) -> Need:
            there = self.room.taken(mode, networks) + sketch + RESERVE
            # Where much is active the blocks are small, so the two don't add up.
            block = self.room.block if mode is Offload.BLOCKS and Network.UNET in networks else 0
            return Need(phase, *(int(there + max(block, active)) for active in (least, kept or least)))

        out = [need("Recording", unet, recording(request).count * self.rates.forward * unit)]
        if sketch:
            out.append(need("Sketching the U-Net", unet, *gradient, sketch))
        for goal in goals:
            if goal in RUNS_THE_UNET:
                out.append(need("Learning with the U-Net", plan.NETWORKS[goal], *gradient, sketch))
            else:
                out.append(need("Learning", plan.NETWORKS[goal], self._without_the_unet(goal, sketch), 0, sketch))
        out.append(need("The report", unet, (request.images or SEEDS) * self.rates.forward * unit))
        if request.images:
            out.append(need("Decoding the pictures", (Network.VAE,), self.rates.decoded * unit))
        return out

    @property
    def rates(self) -> Rates:
        return RATES[min(len(self.info.widths), max(RATES))]

    @property
    def size(self) -> tuple[int, int]:
        """Of the pictures, (width, height)."""
        return self.request.width or self.info.default_size, self.request.height or self.info.default_size

    def _unit(self) -> float:
        """Bytes that a rate of 1 is for one latent."""
        pixels = self.size[0] * self.size[1] / self.info.latent_scale**2
        return pixels * 2**10 * self.info.dtype.itemsize / torch.float16.itemsize

    def _in_sentences(self) -> bool:
        return plan.in_sentences(self.request, steady=self.steady and not self.composed)

    def _sketch(self) -> float:
        """Bytes that the sketch is."""
        what = recording(self.request)
        latents = ANCHORS[self.request.effort] if self._in_sentences() else what.count * what.steps * len(what.offsets)
        return min(self.request.memory * GB, latents * self.rates.sketched * self._unit())

    def _without_the_unet(self, goal: Goal, sketch: float) -> float:
        """Bytes that a step of such a stage takes beside the weights and the sketch."""
        weights = self.room.taken(Offload.NETWORKS, plan.NETWORKS[goal])
        if self._in_sentences():
            return OF_WEIGHTS_IN_SENTENCES * weights
        return OF_THE_SKETCH * sketch if goal is Goal.SKETCH else OF_WEIGHTS * weights

    def _least(self, mode: Offload) -> str:
        most = max(self.needs(mode), key=lambda need: need.least)
        return self._said(most.phase, most.least)

    def _said(self, phase: str, size: int) -> str:
        width, height = self.size
        return f"{phase} at {width}x{height} needs about {size / GB:.1f} GB, {self.room.free / GB:.1f} are free"

    def _fitting(self, mode: Offload) -> Iterator[str]:
        """What the user could change so that it fits."""
        lighter = [other for other in MODES[MODES.index(mode) + 1 :] if other in self.room.switches]
        found = next((other for other in lighter if self.fits(other)), None)
        if found is not None:
            yield self.room.switches[found]
        for less in LESS_MEMORY:
            if less < self.request.memory and replace(self, request=replace(self.request, memory=less)).fits(mode):
                yield f"--memory {less}"
                break
        part = replace(self, request=replace(self.request, part=Part.CROSS_ATTENTION))
        if self.request.part in (Part.AUTO, Part.UNET) and not self.composed and part.fits(mode):
            yield "--part cross-attention"
        shorter = min(self.size)
        for side in range(shorter - SIZE_STEP, 0, -SIZE_STEP):
            width, height = (round(each * side / shorter / SIZE_STEP) * SIZE_STEP for each in self.size)
            if replace(self, request=replace(self.request, width=width, height=height)).fits(mode):
                yield f"--width {width} --height {height}"
                return


@contextmanager
def shortage_said(request: EstimateRequest, sessions: Sequence[Session]) -> Iterator[None]:
    """Inside, OutOfMemory with a sentence stands for torch's own error, which comes when nothing smaller is left to
    try."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfMemory(shortage(request, sessions, error)) from error


def shortage(request: EstimateRequest, sessions: Sequence[Session], error: torch.cuda.OutOfMemoryError) -> str:
    """The sentence on memory that has run out all the same."""
    room = shared([session.room() for session in sessions])
    return Case(request, sessions[0].info, room, composed=False, steady=True).full(str(error))
