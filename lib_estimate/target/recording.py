"""What is recorded of a target to be learnt from, and how much of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lib_estimate.hosts.base import Network, Session
from lib_estimate.progress import Cancel, Interrupted, Phase
from lib_estimate.request import Effort, EstimateRequest, Part, Use
from lib_estimate.target.bank import TRAIN, VALIDATION, Bank, build_bank, joined, latent_noise
from lib_estimate.target.queries import Queries, Recorder
from lib_estimate.target.target import Target, build_target


@dataclass(frozen=True)
class Recording:
    """Generations that are learnt from: `count` of them for each of `offsets`, which moves their timesteps."""

    count: int
    steps: int
    offsets: tuple[float, ...]


# Several short generations together cost as much as one.
LEARNT_FROM = {
    Effort.QUICK: Recording(1, 5, (-0.25, -0.75)),
    Effort.NORMAL: Recording(2, 5, (-0.25, -0.75)),
    Effort.BEST: Recording(4, 5, (-0.25, -0.75)),
}
# Checked on two seeds, as a single one can favour what is worse, and at timesteps between those learnt from.
CHECKS = {
    Effort.QUICK: Recording(1, 5, (-0.5,)),
    Effort.NORMAL: Recording(2, 5, (-0.5,)),
    Effort.BEST: Recording(4, 5, (-0.5,)),
}


def recording(request: EstimateRequest) -> Recording:
    """What is learnt from.

    Other noise and other timesteps teach more than more steps on the same way. The U-Net part, slow as it is anyway,
    gains from more of both.
    """
    if request.trajectories or request.part is Part.UNET:
        return Recording(request.trajectories or 4, request.sampling_steps, (-0.25,))
    what = LEARNT_FROM[request.effort]
    return replace(what, steps=min(what.steps, request.sampling_steps))


def checks(request: EstimateRequest) -> Recording:
    """What the best vectors are picked by."""
    what = CHECKS[request.effort]
    return replace(what, steps=min(what.steps, request.sampling_steps))


@dataclass(frozen=True)
class Material:
    """What is learnt from, for one sentence (or the prompt alone)."""

    target: Target
    bank: Bank
    checks: Bank
    queries: Queries
    check_queries: Queries  # met on the way to `checks`


def materials_of(request: EstimateRequest, session: Session, alone: Target, cancel: Cancel) -> Iterator[Phase]:
    """One Material per sentence the embedding is made for; the prompt alone unless sentences are given."""
    if request.use is Use.SENTENCE:
        targets = [build_target(request, session, sentence) for sentence in request.sentence]
    else:
        targets = [alone]
    materials = []
    session.place(Network.UNET)
    for target in targets:
        materials.append((yield from _material(request, session, target, cancel)))
    return materials


def _material(request: EstimateRequest, session: Session, target: Target, cancel: Cancel) -> Iterator[Phase]:
    def recorded(phase: str, region: int, what: Recording, **how: Any) -> Iterator[Phase]:
        ways = len(what.offsets)
        recorder = Recorder(request.queries, ways * what.steps, int(request.memory * 2**30) // 2, request.seed)
        noise = latent_noise(request, session, region, ways * what.count).split(what.count)
        banks = []
        for part, offset in zip(noise, what.offsets, strict=True):
            how |= {"steps": what.steps, "offset": offset, "watch": recorder.see}
            sampling = build_bank(session, target, part, request.cfg_scale, **how)
            banks.append((yield from _sampled(phase, sampling, what.steps, cancel)))
        bank, order = joined(banks)
        return bank, recorder.queries(bank.step, order)

    bank, queries = yield from recorded("Recording the target", TRAIN, recording(request), references=False)
    beside, check_queries = yield from recorded("Recording checks", VALIDATION, checks(request), plain=False)
    return Material(target, bank, beside, queries, check_queries)


def _sampled(phase: str, sampling: Iterator[int | Bank], steps: int, cancel: Cancel) -> Iterator[Phase]:
    for progress in sampling:
        if isinstance(progress, Bank):
            return progress
        if cancel.wanted is not None:
            raise Interrupted("Interrupted before the learning began. Nothing was saved.")
        yield Phase(phase, progress, steps)
