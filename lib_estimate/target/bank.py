"""A bank: what the model does under the target, recorded once, on latents a generation really passes through.

An entry carries its own target eps. So a prompt that changes with the step (editing), is composed (AND) or spans
several chunks is only another kind of entry: whatever it is made of, the U-Net's answer to it is one eps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lib_estimate.hosts.base import Conditioning, Session, StepConditioning, Trajectory, Watch, compose
from lib_estimate.request import EstimateRequest
from lib_estimate.target.target import Target

# Noise of the parts of the bank never overlaps: each takes its seeds from a region of its own.
TRAIN, VALIDATION, HELD_OUT, PICTURES = range(4)


@dataclass(frozen=True)
class Bank:
    """Noisy latents and what the U-Net should say there.

    x `[M, c, h, w]`, timestep `[M]`, step `[M]` (number of the sampling step), weight `[M]` (dsigma^2 of that step,
    what an error of eps there does to the finished latents' squared error, to first order), target eps
    `[M, c, h, w]`. What only measuring needs, else None: the eps of the empty prompt, and of the prompt without weights
    if it has any.
    """

    x: Tensor
    timestep: Tensor
    step: Tensor
    weight: Tensor
    target: Tensor
    empty: Tensor | None
    plain: Tensor | None

    def __len__(self) -> int:
        return len(self.x)

    def at(self, rows: Tensor, weight: Tensor | None = None) -> Bank:
        """The entries at indices `[K]`, with weights `[K]` of their own where given."""
        there = rows.to(self.x.device)
        picked = [getattr(self, name) for name in ("x", "timestep", "target", "empty", "plain")]
        x, timestep, target, empty, plain = (None if field is None else field[there] for field in picked)
        return Bank(
            x, timestep, self.step[rows], self.weight[there] if weight is None else weight, target, empty, plain
        )


def latent_noise(request: EstimateRequest, session: Session, region: int, count: int) -> Tensor:
    """Starting noise `[count, c, h, w]`; the same for the same seed and region, on every device."""
    info = session.info
    width, height = ((side or info.default_size) // info.latent_scale for side in (request.width, request.height))
    noise = []
    for index in range(count):
        generator = torch.Generator().manual_seed((request.seed * 4 + region) * 1009 + index)
        noise.append(torch.randn(info.latent_channels, height, width, generator=generator))
    return torch.stack(noise).to(info.device)


def bank_of(
    session: Session,
    target: Target,
    path: Trajectory,
    chosen: Sequence[int],
    cfg_scale: float,
    *,
    levels: int = 0,
    references: bool = True,
    plain: bool = True,
) -> Bank:
    """What a generation under the target met; chosen: the target's own step at each of the path's.

    levels: only so many of its steps, evenly, each with the weights of the steps it stands for. `references` and
    `plain`: whether to record the eps of the empty prompt and of the prompt without weights.
    """
    steps, seeds = path.x.shape[:2]
    weight = path.dsigma.square()
    taken = list(range(steps))
    if levels and levels < steps:
        edges = [level * steps // levels for level in range(levels + 1)]
        taken = [(a + b) // 2 for a, b in pairwise(edges)]
        weight = torch.stack([weight[a:b].sum() for a, b in pairwise(edges)])
    x, timestep = path.x[taken].flatten(0, 1), path.timestep[taken].repeat_interleave(seeds)
    step = torch.tensor([chosen[index] for index in taken]).repeat_interleave(seeds)
    own = path.positive[taken].flatten(0, 1)
    other = None if path.negative is None else path.negative[taken].flatten(0, 1)
    if target.negative:
        own, other = other, own
    elif target.networks() and other is not None:
        negative, other = other, guided_noise(session, x, timestep, step, target.plain, True)
        own = without_networks(own, negative, other, cfg_scale)
    empty = unweighted = None
    if references:
        known = other is not None and other_is_empty(target)
        empty = other if known else noise_under(session, x, timestep, target.empty)
    if references and plain and target.plain is not None:
        unweighted = guided_noise(session, x, timestep, step, target.plain, target.negative)
    return Bank(x, timestep, step, weight.repeat_interleave(seeds), own, empty, unweighted)


def without_networks(own: Tensor, negative: Tensor, beside: Tensor, cfg_scale: float) -> Tensor:
    """eps E that acts under CFG beside `beside`, the negative prompt's eps without the prompt's extra networks, as
    `own` does beside `negative`, both with them: beside + s (E - beside) = negative + s (own - negative)."""
    return own + (1 - 1 / cfg_scale) * (beside - negative)


def bank_under(session: Session, bank: Bank, target: Target, cfg_scale: float) -> Bank:
    """The latents of a bank with what another target says there; the empty prompt's eps is the same."""
    wanted = guided_noise(session, bank.x, bank.timestep, bank.step, target.guidance, target.negative)
    if target.networks() and cfg_scale != 1:
        sides = (target.guidance, target.plain)
        wanted = without_networks(
            wanted, *(guided_noise(session, bank.x, bank.timestep, bank.step, side, True) for side in sides), cfg_scale
        )
    plain = None
    if target.plain is not None:
        plain = guided_noise(session, bank.x, bank.timestep, bank.step, target.plain, target.negative)
    return replace(bank, target=wanted, plain=plain)


def build_banks(
    session: Session,
    targets: Sequence[Target],
    noise: Tensor,
    cfg_scale: float,
    *,
    steps: int | None = None,
    offset: float = 0.0,
    references: bool = True,
    plain: bool = True,
    watches: Sequence[Watch | None] | None = None,
) -> Iterator[int | list[Bank]]:
    """Samples from noise `[B, c, h, w]` and records what it meets, S x B entries.

    targets: one, or the two sides of the same guidance, each with its own of the `watches`. Yields the number of each
    sampling step done, and last a Bank for each target. With `steps` it takes fewer than the target's. `references` and
    `plain`: whether to record the eps of the empty prompt and of the prompt without weights.
    """
    whole = targets[0].guidance
    chosen = _spread(len(whole), steps or len(whole))
    sides = {target.negative: watch for target, watch in zip(targets, watches or [None] * len(targets), strict=True)}
    watched = {"watch": sides.get(False), "watch_negative": sides.get(True)}
    for progress in session.sample(noise, [whole[step] for step in chosen], cfg_scale, offset=offset, **watched):
        if isinstance(progress, Trajectory):
            yield [
                bank_of(session, t, progress, chosen, cfg_scale, references=references, plain=plain) for t in targets
            ]
        else:
            yield progress


def build_bank(session: Session, target: Target, noise: Tensor, cfg_scale: float, **how: Any) -> Iterator[int | Bank]:
    """`build_banks` of one target, with its `watch`."""
    for progress in build_banks(session, [target], noise, cfg_scale, watches=[how.pop("watch", None)], **how):
        yield progress[0] if isinstance(progress, list) else progress


def joined(banks: Sequence[Bank]) -> tuple[Bank, Tensor]:
    """One bank of several, by sampling step, and the order `[M]` in which it has the entries of all of them."""
    order = torch.cat([bank.step for bank in banks]).argsort(stable=True)

    def rows(field: str) -> Tensor | None:
        pieces = [getattr(bank, field) for bank in banks]
        return None if pieces[0] is None else torch.cat(pieces)[order]

    return Bank(*map(rows, ("x", "timestep", "step", "weight", "target", "empty", "plain"))), order


def _spread(available: int, count: int) -> list[int]:
    """`count` of `available` steps, evenly from the first on."""
    return [step * available // count for step in range(count)]


def other_is_empty(target: Target) -> bool:
    """Whether the prompt on the other side of CFG is empty, so that its eps is the empty prompt's."""
    guidance = target.with_embedding(target.empty)
    others = [[c for _, c in g.positive] if target.negative else [g.negative] for g in guidance]
    return all(len(o) == 1 and o[0].same_as(target.empty) for o in others)


@torch.no_grad()
def noise_under(session: Session, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """eps `[M, c, h, w]` of latents x `[M, c, h, w]` under one conditioning, or one each."""
    return session.predict_noise(x, timestep, conditioning)


def guided_noise(
    session: Session, x: Tensor, timestep: Tensor, step: Tensor, guidance: Sequence[StepConditioning], negative: bool
) -> Tensor:
    """eps `[M, c, h, w]` of what stands in the embedding's place, at each latent's own sampling step."""
    out = torch.empty_like(x)
    for first, given, last in _runs(guidance, negative):
        at = ((step >= first) & (step < last)).nonzero()[:, 0].to(x.device)
        if not len(at):
            continue
        under = noise_under(session, x[at], timestep[at], given.negative) if negative or given.composed() else x[at]
        if negative:
            out[at] = under
        else:
            out[at] = compose([(w, noise_under(session, x[at], timestep[at], c)) for w, c in given.positive], under)
    return out


def _runs(guidance: Sequence[StepConditioning], negative: bool) -> Iterator[tuple[int, StepConditioning, int]]:
    """(first step, conditioning, step after the last) of stretches where what counts doesn't change."""

    def key(given: StepConditioning) -> tuple[int, ...]:
        positive = () if negative else tuple(id(c) for _, c in given.positive)
        return (*positive, id(given.negative) if negative or given.composed() else 0)

    first = 0
    for step in range(1, len(guidance) + 1):
        if step == len(guidance) or key(guidance[step]) != key(guidance[first]):
            yield first, guidance[first], step
            first = step
