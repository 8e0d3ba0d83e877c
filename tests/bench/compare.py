"""Every way on the same model, prompt and seed: how much of the error it leaves, after how many forward-equivalents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Conditioning, StepConditioning
from lib_estimate.hosts.standalone import StandaloneSession
from lib_estimate.learn import learning
from lib_estimate.learn.count import starting_vectors
from lib_estimate.learn.initial import initial_vectors
from lib_estimate.learn.learning import learn
from lib_estimate.progress import Cancel
from lib_estimate.report.fidelity import picture_error
from lib_estimate.request import Effort, EstimateRequest, Part, Use
from lib_estimate.target.bank import HELD_OUT, PICTURES, build_bank, latent_noise, noise_under
from lib_estimate.target.error import squared
from lib_estimate.target.recording import materials_of, recording
from lib_estimate.target.target import build_target
from tests.bench import old_way
from tests.bench.measure import Count, Course, counting, drained, trajectories

PROMPTS = (
    "(red:1.6) circle",
    "a (green:1.5) square",
    "(yellow:1.4) star",
    "a large (blue:0.6) square on a (green:1.5) background",
    "a (purple:1.5) ring",
    "a small (orange:1.4) triangle",
    "a photo of a (large:1.5) red star",
    "a (blue:1.5) circle at the top",
    "a red circle and a (blue:1.5) square",
    "a drawing of a ((white)) star on a (red:1.3) background",
)
OLD_WAY = "old way"
# What sets the request of each way apart.
WAYS: dict[str, dict[str, Any]] = {
    OLD_WAY: {},
    **{part.value: {"part": part} for part in (Part.TRANSFORMER, Part.UNET, Part.CROSS_ATTENTION)},
    **{f"{Part.AUTO.value}, {effort.value}": {"part": Part.AUTO, "effort": effort} for effort in Effort},
}
AUTO = tuple(way for way, given in WAYS.items() if given.get("part") is Part.AUTO)
CUT_SHORT = (OLD_WAY, Part.UNET.value)  # by the budget; the others end by themselves
MARKS = (50, 100, 200, 400, 1000, 3000)  # forward-equivalents at which a run is asked what it leaves
SEEDS, OFFSET = 4, -0.46  # of the held-out noise; its timesteps lie between those of a generation

Row = dict[str, Any]
Curve = list[tuple[int, float]]  # forward-equivalents, share of the unweighted prompt's error that is left


@dataclass(frozen=True)
class Settings:
    """What is the same for every way."""

    seed: int
    budget: int  # forward-equivalents for those of CUT_SHORT
    extra_vectors: int  # beyond the prompt's tokens
    images: int  # seeds whose finished latents are compared
    pixels: bool  # whether these are decoded


@dataclass(frozen=True)
class Learnt:
    """What a run came to, and on its way."""

    course: Course
    vectors: Vectors
    steps: int
    recording: int  # forward-equivalents of what was recorded before the learning
    count: Count


def compare(session: StandaloneSession, prompt: str, settings: Settings) -> Iterator[Row]:
    """A row per way, the old one first."""
    request = EstimateRequest(
        prompt=prompt, name="bench", use=Use.WHOLE, seed=settings.seed, images=settings.images
    ).validate()
    if settings.extra_vectors:
        tokens = len(next(iter(session.token_vectors(prompt).values())))
        request = replace(request, vectors=tokens + settings.extra_vectors)
    judge, goal = Judge(session, request, settings.pixels), None
    for way, given in WAYS.items():
        own, budget = replace(request, **given), settings.budget if way in CUT_SHORT else None
        learnt = _learn_old_way(session, own, budget) if way == OLD_WAY else _learn(session, own, budget)
        row = _row(judge, way, learnt, budget)
        goal = row["share"] if goal is None else goal
        yield row | {"reached_old_way": reached(row["curve"], goal)}


# ---- learning -----------------------------------------------------------------------------------------------------


def _learn(session: StandaloneSession, request: EstimateRequest, budget: int | None) -> Learnt:
    """The job's own lines up to the best vectors; all of it counts. Stopped, and the best kept, after the budget."""
    cancel = Cancel()
    with counting(session) as count:
        course = Course(count)
        course.note(initial_vectors(request, session))
        with mock.patch.object(learning, "Fit", course.fit()):
            target = build_target(request, session)
            materials = drained(materials_of(request, session, target, cancel))
            recorded = count.equivalents
            start, _ = drained(starting_vectors(request, session, materials, cancel))

            def stop_in_time(_: Any) -> None:
                if budget is not None and count.equivalents >= budget:
                    cancel.save()

            run = drained(learn(request, session, materials, start, cancel), stop_in_time)
        course.note(run.best)
    return Learnt(course, run.best, len(run.losses), recorded, count)


def _learn_old_way(session: StandaloneSession, request: EstimateRequest, budget: int) -> Learnt:
    """The old way for as long as the budget lasts. The positions to start its steps from are given to it for free."""
    target = build_target(request, session)
    seeds = recording(replace(request, part=Part.UNET)).count
    bank = trajectories(session, request, target, seeds, references=False)
    with counting(session) as count:
        course = Course(count)
        way = old_way.OldWay(session, target, bank, session.parts.alphas_cumprod, request.prompt, request.cfg_scale)
        start = initial_vectors(request, session)
        course.note(start)
        for vectors in old_way.learn(way, start, request.seed, lambda: count.equivalents / budget):
            course.note(vectors)
    return Learnt(course, course.points[-1].vectors, len(course.points) - 1, 0, count)


# ---- judging ------------------------------------------------------------------------------------------------------


class Judge:
    """Measures vectors on noise that nothing learns from, as shares of what the prompt without its weights does there.

    By the predicted noise, every sampling step alike, and by the finished latents of a generation. These are the judge
    between the old way and the others: what a sampler's step leads to is what the old way learns from, while the others
    see the predicted noise itself.
    """

    def __init__(self, session: StandaloneSession, request: EstimateRequest, pixels: bool) -> None:
        self.session, self.request, self.pixels = session, request, pixels
        self.target = build_target(request, session)
        noise = latent_noise(request, session, HELD_OUT, SEEDS)
        *_, self.bank = build_bank(session, self.target, noise, request.cfg_scale, offset=OFFSET)
        self.far = squared(self.bank.plain, self.bank, weighted=False)
        self.wanted, self.plain = (self._final(given) for given in (self.target.guidance, self.target.plain))

    def share(self, vectors: Vectors) -> float:
        """Of the unweighted prompt's error, pooled over the held-out bank."""
        bank = self.bank
        eps = noise_under(self.session, bank.x, bank.timestep, self._embedded(vectors))
        return squared(eps, bank, weighted=False) / self.far

    def in_the_end(self, vectors: Vectors) -> Row:
        """The finished latents' share, and where pixels are wanted the mean difference of the pictures, in 0..1."""
        final = self._final(self.target.with_embedding(self._embedded(vectors)))
        return {
            "latents_share": picture_error(final, self.wanted, self.plain),
            "pixel_difference": self._difference(final),
            "unweighted_pixel_difference": self._difference(self.plain),
        }

    @torch.no_grad()
    def _embedded(self, vectors: Vectors) -> Conditioning:
        return self.target.embed(self.session, vectors)

    def _final(self, guidance: Sequence[StepConditioning]) -> Tensor:
        """Finished latents `[B, c, h, w]`, B pictures."""
        noise = latent_noise(self.request, self.session, PICTURES, self.request.images)
        *_, path = self.session.sample(noise, guidance, self.request.cfg_scale)
        return path.final

    def _difference(self, final: Tensor) -> float | None:
        if not self.pixels:
            return None
        given, wanted = (self.session.decode(latents) for latents in (final, self.wanted))
        return float((given - wanted).abs().mean())


def _row(judge: Judge, way: str, learnt: Learnt, budget: int | None) -> Row:
    curve = [(point.forwards, judge.share(point.vectors)) for point in learnt.course.thinned(MARKS)]
    return {
        "prompt": judge.request.prompt,
        "way": way,
        "vectors": len(next(iter(learnt.vectors.values()))),
        "steps": learnt.steps,
        "forwards": learnt.count.forwards,
        "backwards": learnt.count.backwards,
        "forward_equivalents": learnt.count.equivalents,
        "recording": learnt.recording,
        "share": curve[-1][1],
        "shares": {str(mark): at_mark(curve, mark, budget) for mark in MARKS},
        **judge.in_the_end(learnt.vectors),
        "curve": curve,
    }


def at_mark(curve: Curve, mark: int, budget: int | None) -> float | None:
    """The share left by the vectors that a run had then, also where it was over; None beyond a budget that ended it."""
    if budget is not None and mark > budget:
        return None
    return next(share for forwards, share in reversed(curve) if forwards <= mark)


def reached(curve: Curve, share: float) -> int | None:
    """Forward-equivalents until a run first left at most this share. The start is nobody's work, and no answer."""
    return next((forwards for forwards, left in curve[1:] if left <= share), None)


# ---- over all prompts ---------------------------------------------------------------------------------------------


def sooner(rows: list[Row], way: str) -> list[float]:
    """Per prompt: the old way's forward-equivalents over those in which a way left as little; 0 where it never did."""
    spent = {row["prompt"]: row["forward_equivalents"] for row in rows if row["way"] == OLD_WAY}
    own = [row for row in rows if row["way"] == way]
    return [spent[row["prompt"]] / row["reached_old_way"] if row["reached_old_way"] else 0.0 for row in own]


def worsened(rows: list[Row]) -> int:
    """For how many prompts the old way ended with a larger error than the vectors it started from had."""
    return sum(row["share"] > row["curve"][0][1] for row in rows if row["way"] == OLD_WAY)


def summary(rows: list[Row]) -> list[Row]:
    """Per way the median of all figures over the prompts, and their worst under "worst"."""
    out = []
    for way in WAYS:
        own = [row for row in rows if row["way"] == way]
        if own:
            out.append({"way": way, **_over(own, median), "worst": _over(own, max)})
    return out


def _over(own: list[Row], pick: Callable[[list[float]], float]) -> Row:
    """What `pick` makes of each figure of several rows. None, never reached or measured, counts as infinite."""

    def picked(values: list[float | None]) -> float | None:
        value = pick([math.inf if value is None else value for value in values])
        return None if value == math.inf else value

    names = ("forward_equivalents", "share", "latents_share", "pixel_difference", "reached_old_way")
    shares = {mark: picked([row["shares"][mark] for row in own]) for mark in own[0]["shares"]}
    return {**{name: picked([row[name] for row in own]) for name in names}, "shares": shares}
