"""The stages of a plan, one after the other, each from the best vectors of the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Network, Session
from lib_estimate.learn import plan
from lib_estimate.learn.fit import Ended, Fit
from lib_estimate.learn.objectives.base import Objective, Together
from lib_estimate.learn.objectives.cross_attention import CrossAttention, InSentences
from lib_estimate.learn.objectives.denoising import Denoising
from lib_estimate.learn.objectives.hidden_state import HiddenState
from lib_estimate.learn.objectives.sketch import Sketch, Sketched, SketchInSentences, sketched
from lib_estimate.learn.plan import RUNS_THE_UNET, Goal, Stage
from lib_estimate.learn.registry import LOSSES
from lib_estimate.learn.resume import RunState
from lib_estimate.progress import Cancel, Interrupted, Note, Phase, StepReport
from lib_estimate.report.fidelity import report_sentences
from lib_estimate.request import HOLE, Effort, EstimateRequest
from lib_estimate.target.error import denoising_error
from lib_estimate.target.recording import TOO_LARGE, Material, place
from lib_estimate.target.sentences import distinct

CHECK_SENTENCES, CHECK_POSITIONS = 8, 512
# The sketch of use anywhere: under so many conditionings, one in five of them the prompt alone.
ANCHORS = {Effort.QUICK: 10, Effort.NORMAL: 40, Effort.BEST: 400}
ALONE_ONE_IN = 5
# Vectors learnt in random sentences go too far for some that weren't drawn. Held back, they lose little alone.
SHARE_OF_THE_WAY = 0.75
FLOAT16_LOSS_SCALE = 4096.0
HALVED = (
    "The loss was not a number for a while, so the learning went back to the best vectors and on with 1/{share} of the "
    "learning rate."
)

Judged = tuple[Objective, Callable[[Vectors], float]]  # what a stage minimises, and the error it is judged by


@dataclass
class Run:
    """What the stages came to."""

    best: Vectors
    losses: list[float]
    stages: list[dict[str, Any]]
    stopped: str


def learn(
    request: EstimateRequest,
    session: Session,
    materials: list[Material],
    start: Vectors,
    cancel: Cancel,
    state: RunState | None = None,
) -> Iterator[Phase | Note | StepReport]:
    """Runs the planned stages. state: where what goes on is kept, and from where it may go on."""
    target = materials[0].target
    steady = target.single() is not None
    held = len(next(iter(start.values())))
    squeezed = any(len(rows) > held for rows in session.token_vectors(request.text).values())
    planned = plan.stages(request, composed=target.composed(), steady=steady, squeezed=squeezed)
    if not steady and plan.in_sentences(request, steady=True):
        yield Note("The prompt changes from step to step or has AND, so the embedding is made to be the whole prompt.")
    lessons, run, before = Lessons(request, session, materials), Run(start, [], [], ""), None
    if state is not None:
        run, before = come_to(state, start)
    if any(stage.goal in (Goal.SKETCH, Goal.NOISE_AND_SKETCH) for stage in planned):
        yield from lessons.record(cancel)
    for stage in planned[len(run.stages) :]:
        place(materials, *plan.NETWORKS[stage.goal])
        objective, validate = lessons.of(stage)
        if run.stages and stage.goal in RUNS_THE_UNET:  # no stage before was judged by what the U-Net makes of it
            run.best = min(run.best, start, key=validate)
        scale = FLOAT16_LOSS_SCALE if session.info.dtype is torch.float16 else 1.0
        fit = Fit(stage.sized(start), request, objective, run.best, validate, cancel, scale, before)
        if state is not None:
            state.attend(fit)
        for report in fit.run():
            yield report
            if state is not None:
                yield from state.notes()
        run.best, run.stopped = fit.best, fit.stopped
        run.losses += fit.losses
        if fit.lightened:
            yield Note("Memory was short, so the U-Net kept less of it at once: slower, with the same result.")
        if fit.widened:
            yield Note(TOO_LARGE)
        if fit.halvings:
            yield Note(HALVED.format(share=2**fit.halvings))
        run.stages.append({**fit.stage.record(), "steps_run": fit.steps_run, "stopped": fit.stopped})
        before = fit.ended()
        if cancel.wanted is not None:
            break
        if state is not None:
            state.stage_done(run, before)
    if plan.in_sentences(request, steady=steady):
        run.best = {key: torch.lerp(start[key], rows, SHARE_OF_THE_WAY) for key, rows in run.best.items()}
    if state is not None and cancel.wanted is None:
        state.done(run)
    return run


def come_to(state: RunState, start: Vectors) -> tuple[Run, Ended | None]:
    """What the stages of a stopped run came to, and where the last of them ended."""
    saved = state.saved
    best = {key: saved.best[key].to(rows.device) for key, rows in start.items()}
    ended = None if saved.ended is None else Ended.restored(saved.ended, start)
    return Run(best, list(saved.losses), list(saved.stages), saved.stopped), ended


@dataclass
class Lessons:
    """The objectives of a request's stages, made when they are asked for."""

    request: EstimateRequest
    session: Session
    materials: list[Material]
    sketches: list[Sketched] = field(default_factory=list)

    def __post_init__(self) -> None:
        steady = self.materials[0].target.single() is not None
        self.in_sentences = plan.in_sentences(self.request, steady=steady)
        self.checks = distinct(Random(f"checks {self.request.seed}"), CHECK_SENTENCES, (), self.session.random_text)
        self.avoid = [*self.checks, *report_sentences(self.request)]

    def record(self, cancel: Cancel) -> Iterator[Phase]:
        """Records what the sketch is made of, for every material."""
        place(self.materials, Network.TEXT)
        anchors = [self._anchors(material) for material in self.materials]
        for material, (given, at) in zip(self.materials, anchors, strict=True):
            taken = sum(hidden.nbytes for hidden in (*material.queries.hidden, *material.check_queries.hidden))
            budget = max(self.request.memory * 2**30 - taken, 0) / len(self.materials)
            x, timestep = material.bank.x[at], material.bank.timestep[at]
            place(self.materials, Network.UNET, only=material.session)
            for progress in sketched(material.session, given, x, timestep, budget, self.request.seed):
                if isinstance(progress, Sketched):
                    self.sketches.append(progress)
                    continue
                if cancel.wanted is not None:
                    raise Interrupted("Interrupted before the learning began. Nothing was saved.")
                yield Phase("Sketching the U-Net", progress, len(given))

    def _anchors(self, material: Material) -> tuple[list, list[int]]:
        """Conditionings to sketch at, and the number of the bank's latent for each."""
        bank, target = material.bank, material.target
        if not self.in_sentences:
            return [target.wanted(step)[0][1] for step in bank.step.tolist()], list(range(len(bank)))
        count = ANCHORS[self.request.effort]
        alone = max(1, count // ALONE_ONE_IN)
        rng = Random(f"anchors {self.request.seed}")
        chosen = distinct(rng, count - alone, self.avoid, self.session.random_text)
        with torch.no_grad():
            inside = [material.session.encode([sentence.replace(HOLE, self.request.text)]) for sentence in chosen]
        return [target.single()] * alone + inside, [index % len(bank) for index in range(count)]

    def of(self, stage: Stage) -> Judged:
        """What a stage minimises, and the error it is judged by."""
        if self.in_sentences:
            return self._over_sentences(stage.goal)
        together = _mean([self._objective(stage, *each) for each in enumerate(self.materials)])
        return together, self._validator(stage.goal, together)

    def _objective(self, stage: Stage, index: int, m: Material) -> Objective:
        session, distance = m.session, LOSSES[self.request.loss]
        if stage.goal is Goal.HIDDEN_STATES:
            return HiddenState(session, m.target, distance)
        if stage.goal is Goal.CROSS_ATTENTION:
            return CrossAttention(session, m.target, m.queries, distance)
        if stage.goal is Goal.SKETCH:
            return Sketch(session, m.target, self.sketches[index])
        noise = Denoising(session, m.target, m.bank, m.checks, distance, self.request.batch, stage.latents)
        if stage.goal is Goal.NOISE:
            return noise
        # A handful of latents alone is learnt by heart; the sketch has seen them all.
        return Together([noise, Sketch(session, m.target, self.sketches[index])])

    def _over_sentences(self, goal: Goal) -> Judged:
        """The objective over random sentences; judged by its own loss on sentences it never draws."""
        text, distance = self.request.text, LOSSES[self.request.loss]
        generator = torch.Generator().manual_seed(self.request.seed)
        parts, drawn = [], []
        for index, m in enumerate(self.materials):
            if goal is Goal.CROSS_ATTENTION:
                part = InSentences(m.session, m.target, m.queries, distance, text, self.avoid)
                drawn.append(part.prepared([HOLE, *self.checks], generator))
            else:
                part = SketchInSentences(m.session, m.target, self.sketches[index], text, self.avoid)
                drawn.append(part.prepared([HOLE, *self.checks], generator, CHECK_POSITIONS))
            parts.append(part)
        return _mean(parts), _error_by(Together(parts), drawn)

    def _validator(self, goal: Goal, objective: Objective) -> Callable[[Vectors], float]:
        """Where no U-Net runs in a stage, none judges it: a look at it would cost more than all steps in between."""
        if goal is Goal.SKETCH:
            return _error_by(objective, objective.draw(torch.Generator(), True))
        if goal is Goal.CROSS_ATTENTION:
            return cross_attention_validator(self.materials)
        return noise_validator(self.materials)


def _mean(parts: Sequence[Objective]) -> Objective:
    return parts[0] if len(parts) == 1 else Together(parts)


def _error_by(objective: Objective, drawn: Any) -> Callable[[Vectors], float]:
    @torch.no_grad()
    def error(vectors: Vectors) -> float:
        return float(objective.loss(vectors, drawn))

    return error


def cross_attention_validator(materials: Sequence[Material]) -> Callable[[Vectors], float]:
    """The error of cross-attention outputs for queries that aren't learnt from."""
    parts = [CrossAttention(m.session, m.target, m.check_queries, LOSSES["MSE"]) for m in materials]
    together = Together(parts)
    return _error_by(together, together.draw(torch.Generator(), True))


def noise_validator(materials: Sequence[Material]) -> Callable[[Vectors], float]:
    """The error of the predicted noise, on noise that isn't learnt from. The same vectors are not measured twice."""
    known: list[tuple[Vectors, float]] = []

    @torch.no_grad()
    def error(vectors: Vectors) -> float:
        for other, value in known:
            if all(torch.equal(rows, other[key]) for key, rows in vectors.items()):
                return value
        errors = [denoising_error(m.session, m.checks, m.target.embed(m.session, vectors)) for m in materials]
        known.append(({key: rows.clone() for key, rows in vectors.items()}, sum(errors) / len(errors)))
        return known[-1][1]

    return error
