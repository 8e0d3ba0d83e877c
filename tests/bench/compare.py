"""Every way on the same model, prompt and seed: how far it comes, in how many seconds and U-Net samples."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Conditioning, StepConditioning, Trajectory
from lib_estimate.hosts.standalone import StandaloneSession
from lib_estimate.learn import learning
from lib_estimate.learn.count import starting_vectors
from lib_estimate.learn.initial import initial_vectors
from lib_estimate.learn.learning import learn
from lib_estimate.progress import Cancel
from lib_estimate.report.fidelity import OFFSET, SEEDS
from lib_estimate.request import EstimateRequest, Part, Use
from lib_estimate.target.bank import HELD_OUT, PICTURES, build_bank, latent_noise
from lib_estimate.target.error import denoising_error, recovered_share
from lib_estimate.target.recording import materials_of, recording
from lib_estimate.target.target import build_target
from tests.bench import old_way
from tests.bench.measure import Clock, Count, Course, counting, drained, peak_memory_mb, trajectories

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
WAYS = (OLD_WAY, *(part.value for part in (Part.TRANSFORMER, Part.UNET, Part.CROSS_ATTENTION, Part.AUTO)))
SHARES = (0.5, 0.25, 0.15, 0.07)  # of the unweighted prompt's error, that a run is asked when it reached them

Row = dict[str, Any]
Reached = dict[str, float]  # "seconds", "forwards"


@dataclass(frozen=True)
class Settings:
    """What is the same for every way."""

    seed: int
    budget: float  # seconds that each may learn
    extra_vectors: int  # beyond the prompt's tokens
    images: int


@dataclass(frozen=True)
class Learnt:
    """What a run came to, and on its way."""

    course: Course
    vectors: Vectors
    seconds: float
    steps: int
    bank_forwards: int
    count: Count


def compare(session: StandaloneSession, prompt: str, settings: Settings) -> Iterator[Row]:
    """A row per way, the old one first."""
    request = EstimateRequest(
        prompt=prompt, name="bench", use=Use.WHOLE, seed=settings.seed, images=settings.images
    ).validate()
    if settings.extra_vectors:
        tokens = len(next(iter(session.token_vectors(prompt).values())))
        request = replace(request, vectors=tokens + settings.extra_vectors)
    judge = Judge(session, request)
    goal = None
    for way in WAYS:
        gc.collect()
        if session.info.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(session.info.device)
        if way == OLD_WAY:
            learnt = _learn_old_way(session, request, settings.budget)
        else:
            learnt = _learn(session, replace(request, part=Part(way)), settings.budget)
        row = _row(judge, way, learnt, goal)
        if way == OLD_WAY:
            goal = row["error"]
            row["reached_old_way"] = _first(row["curve"], goal)
        yield row


# ---- learning, on the clock ---------------------------------------------------------------------------------------


def _learn(session: StandaloneSession, request: EstimateRequest, budget: float) -> Learnt:
    """The job's own lines up to the best vectors; all of it counts. Stopped, and the best kept, after the budget."""
    clock, cancel = Clock(session.info.device), Cancel()
    with counting(session) as count:
        course = Course(clock, count)
        with mock.patch.object(learning, "Fit", course.fit()):
            target = build_target(request, session)
            materials = drained(materials_of(request, session, target, cancel))
            bank_forwards = count.forwards
            start, _ = drained(starting_vectors(request, session, materials, cancel))

            def stop_in_time(_: Any) -> None:
                if clock() > budget:
                    cancel.save()

            run = drained(learn(request, session, materials, start, cancel), stop_in_time)
        course.note(run.best)
    return Learnt(course, run.best, clock(), len(run.losses), bank_forwards, count)


def _learn_old_way(session: StandaloneSession, request: EstimateRequest, budget: float) -> Learnt:
    """The old way for as long as the budget lasts. The positions to start its steps from are given to it for free."""
    target = build_target(request, session)
    seeds = recording(replace(request, part=Part.UNET)).count
    bank = trajectories(session, request, target, seeds, references=False)
    steps = 0
    clock = Clock(session.info.device)
    with counting(session) as count:
        course = Course(clock, count)
        way = old_way.OldWay(session, target, bank, session.parts.alphas_cumprod, request.prompt, request.cfg_scale)
        start = initial_vectors(request, session)
        course.note(start)
        for vectors in old_way.learn(way, start, request.seed, lambda: clock() / budget):
            course.note(vectors)
            steps += 1
    return Learnt(course, course.points[-1].vectors, clock(), steps, 0, count)


# ---- judging, off the clock ---------------------------------------------------------------------------------------


class Judge:
    """Measures vectors as the program's own report does: on the same held-out noise, and by the same pictures."""

    def __init__(self, session: StandaloneSession, request: EstimateRequest) -> None:
        self.session, self.request = session, request
        self.target = build_target(request, session)
        noise = latent_noise(request, session, HELD_OUT, SEEDS)
        *_, self.bank = build_bank(session, self.target, noise, request.cfg_scale, offset=OFFSET, plain=False)
        self.wanted = self._pictures(self.target.guidance)
        self.unweighted_error = self.unweighted_difference = None
        if self.target.plain is not None:
            self.unweighted_error = self._error(self.target.plain[0].positive[0][1])
            self.unweighted_difference = self._difference(self.target.plain)

    def error(self, vectors: Vectors) -> float:
        return self._error(self._embedded(vectors))

    def pixel_difference(self, vectors: Vectors) -> float | None:
        return self._difference(self.target.with_embedding(self._embedded(vectors)))

    @torch.no_grad()
    def _embedded(self, vectors: Vectors) -> Conditioning:
        return self.target.embed(self.session, vectors)

    def _error(self, conditioning: Conditioning) -> float:
        return denoising_error(self.session, self.bank, conditioning)

    def _difference(self, guidance: tuple[StepConditioning, ...]) -> float | None:
        pictures = self._pictures(guidance)
        return None if pictures is None else float((pictures - self.wanted).abs().mean())

    def _pictures(self, guidance: tuple[StepConditioning, ...]) -> Tensor | None:
        if not self.request.images:
            return None
        noise = latent_noise(self.request, self.session, PICTURES, self.request.images)
        *_, path = self.session.sample(noise, guidance, self.request.cfg_scale)
        assert isinstance(path, Trajectory)
        return self.session.decode(path.final)


def _row(judge: Judge, way: str, learnt: Learnt, goal: float | None) -> Row:
    memory = peak_memory_mb(judge.session.info.device)
    curve = [(point.seconds, point.forwards, judge.error(point.vectors)) for point in learnt.course.thinned()]
    error, unweighted = curve[-1][2], judge.unweighted_error
    return {
        "prompt": judge.request.prompt,
        "way": way,
        "vectors": len(next(iter(learnt.vectors.values()))),
        "seconds": learnt.seconds,
        "setup_seconds": curve[0][0],  # bank, start, objective and the first validation
        "steps": learnt.steps,
        "forwards": learnt.count.forwards,
        "backwards": learnt.count.backwards,
        "forward_equivalents": learnt.count.equivalents,
        "bank_forwards": learnt.bank_forwards,
        "error": error,
        "unweighted_error": unweighted,
        "recovered": recovered_share(error, unweighted),
        "pixel_difference": judge.pixel_difference(learnt.vectors),
        "unweighted_pixel_difference": judge.unweighted_difference,
        "reached": {str(s): _first(curve, s * unweighted) for s in SHARES} if unweighted else {},
        "reached_old_way": None if goal is None else _first(curve, goal),
        "peak_memory_mb": memory,
        "curve": curve,
    }


def _first(curve: list[tuple[float, int, float]], error: float) -> Reached | None:
    """When a run first had at most this error."""
    return next(({"seconds": s, "forwards": f} for s, f, e in curve if e <= error), None)


# ---- over all prompts ---------------------------------------------------------------------------------------------


def speedups(rows: list[Row], budget: float) -> list[float]:
    """Per prompt: the old way's seconds over those in which auto reached the error it ended with; 0 where never."""
    reached = [row["reached_old_way"] for row in rows if row["way"] == Part.AUTO.value]
    return [budget / at["seconds"] if at else 0.0 for at in reached]


def worsened(rows: list[Row]) -> int:
    """For how many prompts the old way ended with a larger error than the vectors it started from had."""
    return sum(row["curve"][-1][2] > row["curve"][0][2] for row in rows if row["way"] == OLD_WAY)


def summary(rows: list[Row]) -> list[Row]:
    """Medians over the prompts, per way. What was never reached counts as infinitely late."""

    def middle(own: list[Row], figure: Callable[[Row], float | None]) -> float | None:
        values = [value for value in map(figure, own) if value is not None]
        return median(values) if values else None

    out = []
    for way in WAYS:
        own = [row for row in rows if row["way"] == way]
        if not own:
            continue
        names = ("seconds", "setup_seconds", "forward_equivalents", "error", "recovered", "pixel_difference")
        out.append(
            {
                "way": way,
                **{name: middle(own, lambda row, name=name: row[name]) for name in names},
                "share_left": middle(
                    own, lambda row: row["error"] / row["unweighted_error"] if row["unweighted_error"] else None
                ),
                "reached": {str(s): _middle_reached([row["reached"].get(str(s)) for row in own]) for s in SHARES},
                "reached_old_way": _middle_reached([row["reached_old_way"] for row in own]),
            }
        )
    return out


def _middle_reached(reached: list[Reached | None]) -> Reached | None:
    """Median seconds and forwards, None where it is that of a run that never reached it."""
    never = float("inf")
    values = [(at["seconds"], at["forwards"]) if at else (never, never) for at in reached]
    seconds, forwards = (median(column) for column in zip(*values, strict=True))
    return None if seconds == never else {"seconds": seconds, "forwards": forwards}
