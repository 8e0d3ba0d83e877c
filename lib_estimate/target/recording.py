"""What is recorded of a target to be learnt from, and how much of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lib_estimate.errors import ModelError
from lib_estimate.hosts.base import Network, Session
from lib_estimate.progress import Cancel, Interrupted, Note, Phase
from lib_estimate.request import Effort, EstimateRequest, Part, Use
from lib_estimate.target import besides
from lib_estimate.target.bank import TRAIN, VALIDATION, Bank, build_banks, joined, latent_noise
from lib_estimate.target.queries import Queries, Recorder
from lib_estimate.target.target import Target, build_target

TOO_LARGE = (
    "Numbers in the U-Net are too large for float16, so it calculates in bfloat16, which is slower on older cards."
)


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


def generations(request: EstimateRequest, what: Recording, groups: int) -> int:
    """How many there are in all, where `groups` prompts take turns. Of each of the user's own there is at least one, if
    he hasn't said how many."""
    count = what.count * len(what.offsets)
    return count if request.trajectories or groups == 1 else max(count, len(besides.own(request)))


@dataclass(frozen=True)
class Material:
    """What is learnt from, for one sentence (or the prompt alone) on one checkpoint."""

    session: Session  # of that checkpoint
    target: Target
    bank: Bank
    checks: Bank
    queries: Queries
    check_queries: Queries  # met on the way to `checks`


def place(materials: Sequence[Material], *networks: Network, only: Session | None = None) -> None:
    """See `base.Session.place`; of every checkpoint, or of one, and then nothing of the others."""
    for session in {id(m.session): m.session for m in materials}.values():
        session.place(*(networks if only in (None, session) else ()))


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
        materials += yield from _recorded(request, session, [(target,) for target in targets], cancel)
    return materials


def materials_of_both(
    request: EstimateRequest, session: Session, sides: tuple[Target, Target], cancel: Cancel
) -> Iterator[Phase]:
    """A Material for each of the two sides of the same guidance, recorded at once."""
    session.place(Network.UNET)
    return (yield from _recorded(request, session, [sides], cancel))


def _recorded(
    request: EstimateRequest, session: Session, groups: Sequence[tuple[Target, ...]], cancel: Cancel
) -> Iterator[Phase]:
    """A Material for each side. groups: the sides that are recorded together, again and again with other prompts beside
    them; in each place they say the same."""

    def recorded(phase: str, region: int, what: Recording, order: Sequence[tuple], **how: Any) -> Iterator[Phase]:
        noise = latent_noise(request, session, region, generations(request, what, len(order)))
        whole = _ways(noise, what, order)
        budget = int(request.memory * 2**30) // 2 // len(order[0])

        def once(most: int) -> Iterator[Phase]:
            ways = [(targets, part, offset) for targets, noise, offset in whole for part in noise.split(most)]
            recorders = [Recorder(request.queries, len(ways) * what.steps, budget, request.seed) for _ in order[0]]
            watches, found = [recorder.see for recorder in recorders], []
            for targets, noise, offset in ways:
                sampling = build_banks(
                    session, targets, noise, request.cfg_scale, offset=offset, steps=what.steps, watches=watches, **how
                )
                found.append((yield from _sampled(phase, sampling, what.steps, cancel)))
            banks = [joined(banks) for banks in zip(*found, strict=True)]
            return [(bank, r.queries(bank.step, rows)) for (bank, rows), r in zip(banks, recorders, strict=True)]

        return (yield from _until_it_works(session, once, max(len(noise) for _, noise, _ in whole)))

    learnt = yield from recorded("Recording the target", TRAIN, recording(request), groups, references=False)
    # Where checks are fewer than the targets they look at others first than the learning does.
    given = ("Recording checks", VALIDATION, checks(request), groups[::-1])
    checked = yield from recorded(*given, plain=False)
    return [
        Material(session, target, bank, beside, queries, check_queries)
        for target, (bank, queries), (beside, check_queries) in zip(groups[0], learnt, checked, strict=True)
    ]


def _until_it_works(session: Session, once: Callable[[int], Iterator[Phase]], most: int) -> Iterator[Phase]:
    """What once(most) comes to, `most` generations at once. Where memory runs out, again with half as many; where
    numbers don't fit into float16, again in bfloat16."""
    while True:
        try:
            found = yield from once(most)
            if all(bank.target.isfinite().all() for bank, _ in found):
                return found
            if not session.widen(Network.UNET):
                raise ModelError(
                    f"The U-Net's answers are no numbers in {str(session.info.dtype).removeprefix('torch.')}. Use "
                    "--dtype float32, or in a webui --no-half or --upcast-sampling; or the checkpoint is damaged."
                )
            yield Note(TOO_LARGE)
        except torch.cuda.OutOfMemoryError:
            if most == 1:
                raise
            most //= 2
            torch.cuda.empty_cache()


def _ways(noise: Tensor, what: Recording, groups: Sequence[tuple]) -> list[tuple[tuple, Tensor, float]]:
    """(targets, noise `[b, c, h, w]`, offset) of each generation, those of the same targets and offset at once."""
    if len(groups) == 1:
        return [(groups[0], *way) for way in zip(noise.split(what.count), what.offsets, strict=True)]
    out = []
    for index, row in enumerate(noise.split(1)):
        turn, which = divmod(index, len(groups))
        out.append((groups[which], row, what.offsets[(which + turn) % len(what.offsets)]))
    return out


def _sampled(phase: str, sampling: Iterator[int | list[Bank]], steps: int, cancel: Cancel) -> Iterator[Phase]:
    for progress in sampling:
        if isinstance(progress, list):
            return progress
        if cancel.wanted is not None:
            raise Interrupted("Interrupted before the learning began. Nothing was saved.")
        yield Phase(phase, progress, steps)
