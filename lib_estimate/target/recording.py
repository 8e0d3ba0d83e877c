"""What is recorded of a target to be learnt from, and how much of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lib_estimate.hosts.base import Network, Session
from lib_estimate.progress import Cancel, Interrupted, Phase
from lib_estimate.request import Effort, EstimateRequest, Part, Use
from lib_estimate.target import besides
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
    """One Material per sentence the embedding is made for; the prompt alone unless sentences are given. A negative
    prompt alone is recorded beside several prompts."""
    session.place(Network.TEXT)
    if request.use is Use.SENTENCE:
        groups = [[build_target(request, session, sentence)] for sentence in request.sentence]
    elif alone.negative:
        groups = [[alone, *(build_target(request, session, beside=text) for text in besides.learnt(request)[1:])]]
    else:
        groups = [[alone]]
    materials = []
    session.place(Network.UNET)
    for targets in groups:
        materials.append((yield from _material(request, session, targets, cancel)))
    return materials


def _material(request: EstimateRequest, session: Session, targets: list[Target], cancel: Cancel) -> Iterator[Phase]:
    """What is learnt from of targets that say the same in the embedding's place; of each of the user's own at least one
    generation, if he hasn't said how many."""
    own = len(besides.own(request))

    def recorded(phase: str, region: int, what: Recording, order: Sequence[Target], **how: Any) -> Iterator[Phase]:
        count = max(what.count * len(what.offsets), 0 if request.trajectories or len(order) == 1 else own)
        ways = _ways(latent_noise(request, session, region, count), what, order)
        recorder = Recorder(request.queries, len(ways) * what.steps, int(request.memory * 2**30) // 2, request.seed)
        banks = []
        for target, noise, offset in ways:
            how |= {"steps": what.steps, "offset": offset, "watch": recorder.see}
            sampling = build_bank(session, target, noise, request.cfg_scale, **how)
            banks.append((yield from _sampled(phase, sampling, what.steps, cancel)))
        bank, rows = joined(banks)
        return bank, recorder.queries(bank.step, rows)

    bank, queries = yield from recorded("Recording the target", TRAIN, recording(request), targets, references=False)
    # Where checks are fewer than the targets they look at others first than the learning does.
    given = ("Recording checks", VALIDATION, checks(request), targets[::-1])
    beside, check_queries = yield from recorded(*given, plain=False)
    return Material(targets[0], bank, beside, queries, check_queries)


def _ways(noise: Tensor, what: Recording, targets: Sequence[Target]) -> list[tuple[Target, Tensor, float]]:
    """(target, noise `[b, c, h, w]`, offset) of each generation, those of one target and offset at once."""
    if len(targets) == 1:
        return [(targets[0], *way) for way in zip(noise.split(what.count), what.offsets, strict=True)]
    out = []
    for index, row in enumerate(noise.split(1)):
        turn, which = divmod(index, len(targets))
        out.append((targets[which], row, what.offsets[(which + turn) % len(what.offsets)]))
    return out


def _sampled(phase: str, sampling: Iterator[int | Bank], steps: int, cancel: Cancel) -> Iterator[Phase]:
    for progress in sampling:
        if isinstance(progress, Bank):
            return progress
        if cancel.wanted is not None:
            raise Interrupted("Interrupted before the learning began. Nothing was saved.")
        yield Phase(phase, progress, steps)
